"""Where a run's metrics go besides the console and the JSON lines: TensorBoard, Weights & Biases, MLflow. Rank 0 only.

A sink takes numbers and figures by step, and is closed with how the run ended. The identities of runs on the two
trackers are kept in the run folder (trackers.json), so that a run that goes on is one run there too.
"""

import json
import shlex
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import yaml
from PIL import Image

from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_atomically

End = Literal["finished", "stopped", "failed"]

IDENTITIES = "trackers.json"

# MLflow's names of how runs end.
STATUS: dict[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Of a setting's text, so many letters go to MLflow: older servers take no more.
LONGEST_VALUE = 500
# Of pictures in TensorBoard.
DPI = 150
# Settings by which TensorBoard compares runs; the text beside them has all.
COMPARED = """
    stage model load_model_path data_path latent_size slots compress_strategy latent_loss latent_passes bottleneck
    detach_latents train_vision lora_rank max_length max_pixels helper_max_pixels epochs max_steps global_batch_size
    reduction ce_weight learning_rate lr_scheduler warmup_steps weight_decay seed
""".split()  # noqa: SIM905


class Sink(ABC):
    """Takes what is measured.

    Attributes:
        errors: what it raises where it is away; training goes on without it.
    """

    errors: tuple[type[Exception], ...] = ()

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers, named group/name, after `step` optimizer steps."""

    def figure(self, step: int, name: str, figure: Any) -> None:  # noqa: B027  # TensorBoard alone takes them
        """Take a figure of matplotlib, a picture of Pillow, or Markdown."""

    @abstractmethod
    def close(self, end: End) -> None:
        """Send what waits, and say how the run ended."""


def open_sinks(
    report_to: Sequence[str], own_folder: Path, name: str, settings: Mapping[str, Any], start: int
) -> list[Sink]:
    """Open what --report_to names.

    Args:
        own_folder: the run's own folder.
        name: of the run, for people.
        settings: of the run, as they are to be shown beside it.
        start: optimizer steps already taken.

    Raises:
        UserError: a tracker refuses the run; only this rank knows.
    """
    own_folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    try:
        if "tensorboard" in report_to:
            sinks.append(TensorBoard(own_folder / settings["stage"], settings, start))
        if "wandb" in report_to:
            sinks.append(WandB(own_folder, name, settings))
        if "mlflow" in report_to:
            sinks.append(MLflow(own_folder, name, settings))
    except UserError:
        for sink in sinks:
            sink.close("failed")
        raise
    return sinks


def _refused(tracker: str, error: Exception) -> UserError:
    how = "fix that, or leave it out"
    return UserError(f"--report_to {tracker}: the run cannot be opened ({reason(error)}); {how}", everywhere=False)


def _known(own_folder: Path) -> dict[str, str]:
    file = own_folder / IDENTITIES
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _keep(own_folder: Path, tracker: str, identity: str) -> None:
    write_atomically(own_folder / IDENTITIES, json.dumps({**_known(own_folder), tracker: identity}, indent=1) + "\n")


class TensorBoard(Sink):
    """Event files in the run folder. TensorBoard calls a run by the folder of its files: FOLDER/run/STAGE."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], start: int):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # torch's types leave its file_writer out.
        self.writer = cast(Any, SummaryWriter(folder, purge_step=start + 1, flush_secs=10))
        # Not add_hparams: it also writes which columns there are, and those of one run would hold for all.
        compared = {name: _cell(settings.get(name, "not set")) for name in COMPARED}
        _, begins, self._ends = hparams(compared, {})
        self.writer.file_writer.add_summary(begins)
        # Indented, they are verbatim in Markdown.
        command = shlex.join(sys.orig_argv).replace(" --", " \\\n    --")
        for name, text in (("command", command), ("settings", yaml.safe_dump(dict(settings), sort_keys=False))):
            self.writer.add_text(name, textwrap.indent(text, " " * 4), start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write them."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Write it; one of matplotlib is sharp also where TensorBoard shows it whole, and the writer closes it."""
        if isinstance(figure, str):
            self.writer.add_text(name, figure, step)
        elif isinstance(figure, Image.Image):
            self.writer.add_image(name, np.asarray(figure), step, dataformats="HWC")
        else:
            figure.set_dpi(DPI)
            self.writer.add_figure(name, figure, step)

    def close(self, end: End) -> None:
        """Write what waits."""
        if end == "finished":
            # TensorBoard keeps what it hears first, and any other end may be gone on from.
            self.writer.file_writer.add_summary(self._ends)
        self.writer.close()


def _cell(value: Any) -> str | int | float:
    """Write a setting as TensorBoard takes it."""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


class WandB(Sink):
    """One run at Weights & Biases, however often this one is interrupted.

    Its own step counter refuses to go back, as a run does that continues from a checkpoint: the optimizer step is a
    metric, and the axis of all the others.
    """

    AXIS = "optimizer_step"

    def __init__(self, own_folder: Path, name: str, settings: Mapping[str, Any]):
        import wandb

        known = _known(own_folder).get("wandb")
        resume = {} if known is None else {"id": known, "resume": "allow"}
        try:
            self.run: Any = wandb.init(dir=str(own_folder), name=name, **resume)
        except (OSError, wandb.Error) as error:
            raise _refused("wandb", error) from None
        _keep(own_folder, "wandb", self.run.id)
        self.run.config.update(dict(settings), allow_val_change=True)
        self.run.define_metric(self.AXIS)
        self.run.define_metric("*", step_metric=self.AXIS)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand them to its sender, which works beside the run."""
        self.run.log({self.AXIS: step, **values})

    def close(self, end: End) -> None:
        """Wait until all is sent."""
        if end == "stopped":
            # A code that is not 0 would make it "failed".
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if end == "finished" else 1)


class MLflow(Sink):
    """One run at MLflow (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME), however often this one is interrupted."""

    def __init__(self, own_folder: Path, name: str, settings: Mapping[str, Any]):
        import mlflow

        self.mlflow: Any = mlflow
        self.errors = (OSError, mlflow.MlflowException)
        known = _known(own_folder).get("mlflow")
        try:
            run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=name)
            # A parameter stays what it was at first: MLflow refuses another value.
            there = run.data.params
            texts = {key: str(value)[:LONGEST_VALUE] for key, value in settings.items() if key not in there}
            if texts:
                mlflow.log_params(texts)
        except self.errors as error:
            raise _refused("mlflow", error) from None
        _keep(own_folder, "mlflow", run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send them."""
        self.mlflow.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def close(self, end: End) -> None:
        """Say how it ended."""
        self.mlflow.end_run(status=STATUS[end])
