"""The runs of a study on disk: what is done, what failed and how often, what somebody works at now. Imports no torch.

<out>/runs/<name>-<key>/
    node.json      what it is and what its key is a hash of
    config.yaml    of a training stage, as `python -m mirage_ds.train --config` takes it
    model/         of a training stage: its save_model_path
    result.json    of an evaluation, as `mirage-ds evaluate --out` or `mirage-ds controls --out` writes it
    output.log     what it printed, attempt by attempt
    attempts.jsonl one line an attempt that ended: when, exit code, why
    done.json      written last, once all of it is there
    lock           held by the process that works at it
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from mirage_ds.cluster.status.facts import json_lines
from mirage_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR
from mirage_ds.files import TARGETS_NOTE, write_atomically
from mirage_ds.run.folder import delete_checkpoints
from mirage_ds.study.nodes import Node, Study, spell_out
from mirage_ds.study.spec import read_study

State = Literal["done", "failed", "running", "waiting"]

# Somebody who only looks (Store.is_held) has the lock for less than that.
LOOK_S = 1.0


class Store:
    """The folder of a study.

    Args:
        root: the study's `out`.
        keep_checkpoints: leave a finished run its sharded checkpoints; its model is saved, and a 7B's take 91 GB each.
        tries: attempts that a node has, the first one included; after a user's error (exit code 2) there is no other.
    """

    def __init__(self, root: Path, tries: int = 1, keep_checkpoints: bool = False):
        self.root, self.tries, self.keep_checkpoints = root, tries, keep_checkpoints

    @cached_property
    def _folders(self) -> dict[str, str]:
        """The folders that were there at first, by the end of their key."""
        place = self.root / "runs"
        return {path.name[-12:]: path.name for path in place.iterdir()} if place.is_dir() else {}

    def place(self, node: Node) -> Path:
        """Return the node's folder: under its key, whatever its stage was called when it was made."""
        return self.root / "runs" / self._folders.get(node.folder[-12:], node.folder)

    def model(self, node: Node) -> Path:
        """Return the folder of a training node's model."""
        return self.place(node) / "model"

    def result(self, node: Node) -> Path:
        """Return the file of an evaluation's result."""
        return self.place(node) / "result.json"

    def log(self, node: Node) -> Path:
        """Return the file of what the node printed."""
        return self.place(node) / "output.log"

    def is_done(self, node: Node) -> bool:
        """Tell whether a node is done."""
        return (self.place(node) / "done.json").is_file()

    def attempts(self, node: Node) -> list[dict[str, Any]]:
        """Return the attempts that failed; those that somebody stopped are none.

        Half a line, where a disk was full or the process killed, is not counted.
        """
        return [one for one in json_lines(self.place(node) / "attempts.jsonl") if one["code"] != EXIT_STOPPED]

    def state(self, node: Node) -> State:
        """Say where a node stands."""
        if self.is_done(node):
            return "done"
        if self.is_held(node):
            return "running"
        failures = self.attempts(node)
        # What a user has to fix fails the same way each time.
        hopeless = any(one["code"] == EXIT_USER_ERROR for one in failures)
        return "failed" if hopeless or len(failures) >= self.tries else "waiting"

    def is_held(self, node: Node) -> bool:
        """Tell whether a process works at a node."""
        file = self.place(node) / "lock"
        if not file.is_file():
            return False
        with file.open() as handle:
            try:
                # Shared: others may look at the same time, and NFS gives no other one to who only reads.
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def hold(self, node: Node) -> Iterator[IO[str] | None]:
        """Claim a node for this process and for whom it hands the open file on to; None where another one has it."""
        place = self.place(node)
        place.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + LOOK_S
        with (place / "lock").open("w") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        yield None
                        return
                    time.sleep(LOOK_S / 20)
            yield handle

    def prepare(self, node: Node) -> None:
        """Write down what a node is, before it starts."""
        place = self.place(node)
        write_atomically(place / "node.json", json.dumps({"key": node.key, **node.material}, indent=1) + "\n")
        if node.kind == "train":
            values = json.loads(node.config.model_dump_json(exclude_none=True))
            values |= {"save_model_path": str(self.model(node)), "resume": "auto"}
            if node.parent is not None:
                values["load_model_path"] = str(self.model(node.parent))
            if node.targets is not None:
                values["latent_targets"] = str(self.model(node.targets))
            write_atomically(place / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def ended(self, node: Node, begun: float, code: int, why: str) -> None:
        """Write down that an attempt ended without what it was made for."""
        line = {"begun": begun, "ended": time.time(), "code": code, "why": why}
        with (self.place(node) / "attempts.jsonl").open("a") as file:
            # Begun anew behind half a line.
            file.write("\n" + json.dumps(line, ensure_ascii=False))

    def finish(self, node: Node, begun: float) -> None:
        """Write down that a node is done."""
        if node.kind == "train" and not self.keep_checkpoints:
            # What cannot be deleted costs room alone.
            with suppress(OSError):
                delete_checkpoints(self.model(node) / "run" / "checkpoints")
        write_atomically(self.place(node) / "done.json", json.dumps({"begun": begun, "ended": time.time()}) + "\n")

    def forget_failures(self, node: Node) -> None:
        """Give a node that failed all its attempts again."""
        (self.place(node) / "attempts.jsonl").unlink(missing_ok=True)

    def is_whole(self, node: Node) -> bool:
        """Tell whether a node's result is there: the last file that its command writes."""
        last = TARGETS_NOTE if node.config.stage == "scaffold" else "config.json"
        return ((self.model(node) / last) if node.kind == "train" else self.result(node)).is_file()


def open_study(file: Path) -> tuple[Study, Store]:
    """Read a study's file and find its folder.

    Raises:
        UserError: see read_study and spell_out.
    """
    spec, here = read_study(file), file.resolve().parent
    # A scorer of one's own may lie beside the study's file; the runs look there too.
    if str(here) not in sys.path:
        sys.path.append(str(here))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(here))))
    return spell_out(spec, here), Store(spec.out, spec.launch.retries + 1, spec.launch.keep_checkpoints)
