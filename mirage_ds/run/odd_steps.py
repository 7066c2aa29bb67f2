"""Steps that are worth a look: their loss jumps, or is not finite, or their gradient is not.

Imports no torch.
"""

import math
from collections.abc import Sequence
from statistics import median

FILE = "odd_steps.jsonl"
# A loss is a spike if it lies above the median of the last WINDOW finite ones by more than SPREADS of their median
# absolute deviations, and by more than SHARE of the median. A flat curve has deviations near zero, and one of few rows
# a step has large jumps: neither rule alone would do. Fewer than LEAST losses say nothing yet.
WINDOW, LEAST, SPREADS, SHARE = 50, 10, 8, 0.5


def spike_over(loss: float, before: Sequence[float]) -> float | None:
    """Return the median of the losses before, if this one is a spike over them; None where it is none."""
    if len(before) < LEAST or not math.isfinite(loss):
        return None
    usual = median(before)
    spread = median(abs(one - usual) for one in before)
    return usual if loss - usual > max(SPREADS * spread, SHARE * abs(usual)) else None
