"""The versions of what computes here, and every difference between releases of DeepSpeed that this project knows.

docs/versions.md has the releases that the suite is run with.
"""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from mirage_ds.engine import ds_config as ds
from mirage_ds.errors import UserError

PACKAGES = ("mirage-ds", "torch", "transformers", "deepspeed", "accelerate", "datasets", "flash-attn", "peft")
# Below it, ZeRO-3 frees frozen weights while backward still recomputes their layer, and torch stops the run.
RECOMPUTES_FROZEN = "0.19.4"
# Below it, ZeRO-3 waits for the last of several gathers only. On GPUs they end in their order; on the CPU they do not,
# and weights are random numbers now and then.
WAITS_FOR_ALL = "0.19.8"


def versions() -> dict[str, str | None]:
    """Return the versions of what computes, the machine's kind and the commit; None for a package that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found["git_commit"] = commit.stdout.strip() or None
    return found


def _older_than(release: str) -> str | None:
    """Return the installed release where it is older."""
    found = version("deepspeed")
    return found if Version(found) < Version(release) else None


def check_release(values: dict[str, Any], path: Path, recomputes_frozen: bool) -> None:
    """Refuse what the installed DeepSpeed is too old for.

    Args:
        values: the resolved DeepSpeed configuration of the JSON at `path`.
        recomputes_frozen: the run has frozen weights in layers that backward computes again.

    Raises:
        UserError: names the release that is needed.
    """
    for key, since in ds.KEYS["since"].items():
        if key in values and (found := _older_than(since)):
            raise UserError(f"{path}: DeepSpeed {found} would ignore '{key}'; install deepspeed>={since}")
    if recomputes_frozen and ds.zero_stage(values) == 3 and (found := _older_than(RECOMPUTES_FROZEN)):
        raise UserError(
            f"--lora_rank: DeepSpeed {found} cannot recompute layers with frozen weights under ZeRO-3 ({path}); "
            f"install deepspeed>={RECOMPUTES_FROZEN}, or use --no_gradient_checkpointing"
        )


def gather_safely(values: dict[str, Any], device: str) -> None:
    """Let a DeepSpeed that needs it gather one parameter at a time on the CPU.

    Args:
        values: the resolved DeepSpeed configuration, which is changed.
        device: "cpu" or anything else.
    """
    if device == "cpu" and ds.zero_stage(values) == 3 and _older_than(WAITS_FOR_ALL):
        values["zero_optimization"]["stage3_allgather_sequential"] = True
