"""The height of a micro-step's memory that `mirage-ds plan` computes, for a batch that is there.

T tokens of a pass, N samples.
"""

from __future__ import annotations

from gpu.packed import Rows
from mirage_ds.data.batch import Batch
from mirage_ds.plan.activations import Micro, PassShape, Peak, peak
from mirage_ds.plan.shape import read_shape, sizes

# What is measured over what is planned. Above: the attention's own workspace and what the allocator rounds up are not
# planned. Below: in stage2 the plan takes the largest of each part of backward, which do not all meet.
LEAST, MOST = 0.85, 1.1


def planned(rows: Rows, batch: Batch, width: int, backend: str, chunk_bytes: int, device: str) -> Peak:
    """Compute the height of forward and backward with checkpointing.

    Args:
        width: bytes of an element of the compute dtype.
        backend: a key of model.attention.BACKENDS.
        chunk_bytes: as LossHead takes them.
    """
    passes = tuple(PassShape(tuple(one.cu_q.diff().tolist()), tuple(one.cu_k.diff().tolist())) for one in batch.passes)
    grounded = len(batch.latents) if rows.stage == "stage1" else None
    model = sizes(read_shape(str(rows.model)))
    labelled, count = len(batch.targets), len(batch.rows)
    return peak(Micro(model, passes, labelled, count, grounded, width, backend, True, chunk_bytes, device))
