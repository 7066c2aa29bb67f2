"""The only place that touches what DeepSpeed does not promise. tests/unit/test_private.py notices when it changes."""

from __future__ import annotations


def use_plain_gloo() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on CPU.

    `init_distributed` compiles `deepspeed_shm_comm` (44 s, minutes under load) whatever the run needs; without it the
    collectives go through gloo with the same results. A no-op on GPUs, where the extension is not used.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
