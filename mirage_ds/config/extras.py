"""What is not installed with the package itself: its extras, what each brings, and which settings of a run need one.

A command asks at its start, so that nothing is missing at its end.
"""

from importlib.metadata import version
from importlib.util import find_spec

from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError

# Extra → modules, with a version where only that one will do; pyproject.toml has the oldest of the others.
EXTRAS = {
    "plot": ("matplotlib",),
    # Other versions draw the VSP benchmark's pictures otherwise.
    "vsp": ("gymnasium==1.2.3", "pygame"),
    "lora": ("peft",),
    "liger": ("liger_kernel",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
# Setting of a run → extra. --report_to names the others.
NEEDED = {"eval_pictures": "plot", "lora_rank": "lora", "kernels": "liger"}


def need(extra: str, what: str) -> None:
    """Refuse what needs an extra that is not installed.

    Args:
        what: the command, flag or folder that needs it.

    Raises:
        UserError: names the first module that is missing or of another version, and how to install it.
    """
    how = f'pip install "mirage-ds[{extra}]"'
    for name in EXTRAS[extra]:
        module, _, wanted = name.partition("==")
        if find_spec(module) is None:
            raise UserError(f"{what} needs {module}, which is not installed: {how}")
        if wanted and version(module) != wanted:
            raise UserError(f"{what} needs {module} {wanted}, and {version(module)} is installed: {how}")


def need_for(config: RunConfig) -> None:
    """Refuse a run whose settings need what is not installed; UserError says so."""
    for name, extra in NEEDED.items():
        if value := getattr(config, name):
            need(extra, f"--{name} {value}")
    for name in config.report_to:
        if name in EXTRAS:
            need(name, f"--report_to {name}")
