"""DeepSpeed's compiled extensions for the tests: compiled once into build/, whatever XDG_CACHE_HOME is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build/torch_extensions"
# What compiling all of it may take on two busy cores; unloaded it is a few minutes.
TIMEOUT_S = 3600
PROGRAM = """
import sys
from deepspeed.ops import op_builder
for name in sys.argv[1:]:
    getattr(op_builder, name)().load(verbose=False)
"""


def use_folder() -> None:
    """Let this process and the children that it starts from now on find what has been compiled."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(FOLDER))
    Path(os.environ["TORCH_EXTENSIONS_DIR"]).mkdir(parents=True, exist_ok=True)


def compiled(*builders: str) -> None:
    """Compile what is not compiled yet, and let this process and its children use it.

    Args:
        builders: names in deepspeed.ops.op_builder, such as "CPUAdamBuilder".
    """
    use_folder()
    subprocess.run([sys.executable, "-c", PROGRAM, *builders], check=True, timeout=TIMEOUT_S, capture_output=True)
