"""What the host does in a micro-step: it asks a GPU for each operator. Imports no torch.

Counted: operators, forward and backward, of a layer and pass in bf16 with a varlen kernel; a test counts them again.
Fitted: what ZeRO-3's hooks of a layer and pass cost, in operators that take as long, to one rank's seconds of
benchmarks/results/host-2026-11-30.jsonl. Assumed: the microseconds of an operator (--operator_us).
"""

from mirage_ds.plan.activations import Micro
from mirage_ds.plan.settings import Settings

# Without and with recomputation: a pass of many tokens, one of a token a row.
FULL, THIN = (230, 360), (202, 324)
# Of a micro-step, outside the layers: embedding, head, loss.
REST = 123
# ZeRO-3's hooks in a pass of many tokens, in one of a token a row.
HOOKS_KEPT, HOOKS_RELEASED = (260, 70), (500, 400)


def operators(micro: Micro, settings: Settings) -> int:
    """Count what the host issues in a micro-step."""
    thin = sum(max(one.queries) == 1 for one in micro.passes)
    kept = settings.resident(micro.model)
    hooks = (0, 0) if settings.stage < 3 else HOOKS_KEPT if kept else HOOKS_RELEASED
    full = (len(micro.passes) - thin) * (FULL[micro.checkpointing] + hooks[0])
    return REST + micro.model.layers * (full + thin * (THIN[micro.checkpointing and not kept] + hooks[1]))
