"""Checks of what is to be run: the software, the model and data, the run folder, the JSON."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mirage_ds.cluster.doctor.finding import HERE, Facts, Finding, Seen, fail, refused, size, unlike, warn, well
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.engine.ds_config import read_json, shipped_folder
from mirage_ds.engine.versions import PACKAGES
from mirage_ds.errors import UserError

NEEDED = tuple(name for name in PACKAGES if name not in ("flash-attn", "peft"))
# Two versions hang or fail when the ranks join.
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
SLOW_DISK_BYTES_S = 50e6
# A sharded checkpoint: fp32 weights and AdamW's two moments; the exported model: 16-bit weights.
CHECKPOINT_BYTES, EXPORT_BYTES = 12, 2
# With nothing known of the model.
MIN_FREE_BYTES = 1e9


def packages(seen: Seen) -> Iterator[Finding]:
    """Python and the packages that training imports, in one version each."""
    mend = "install the same versions on every host, or one environment on a disk that all see"
    whole: dict[str, dict[str, str]] = {}
    for host, facts in seen.section("python").items():
        missing = [name for name in NEEDED if facts["packages"][name] is None]
        if missing:
            yield fail(host, f"not installed: {', '.join(missing)}", mend)
        else:
            installed = {name: version for name, version in facts["packages"].items() if version}
            # Python 3.11.7 and 3.11.9 run the same wheels.
            whole[host] = {"Python": facts["version"].rpartition(".")[0], **installed}
    yield from unlike(whole, mend)
    first = next(iter(whole.values()), {})
    yield well(f"Python {first.get('Python')}, torch {first.get('torch')}")


def code(seen: Seen) -> Iterator[Finding]:
    """The same source of mirage_ds, at a commit that names it."""
    sections = seen.section("code")
    first, own = next(((host, facts) for host, facts in sections.items() if facts["folder"]), ("", {}))
    for host, facts in sections.items():
        if not facts["folder"]:
            mend = "install it there, or start in its checkout on a shared disk"
            yield fail(host, "mirage_ds cannot be imported", mend)
        elif facts["hash"] != own["hash"]:
            says = f"{facts['folder']} holds other code than on {first} ({facts['hash'][:8]}, not {own['hash'][:8]})"
            yield fail(host, says, "bring every host to the same commit, or use one checkout on a shared disk")
        elif facts["commit"] and own["commit"] and facts["commit"] != own["commit"]:
            # Something beside the code has changed.
            says = f"commit {facts['commit'][:8]} (on {first} {own['commit'][:8]})"
            yield warn(host, says, f"git checkout {own['commit'][:8]} there")
        elif facts["changed"]:
            says = f"changes in {facts['folder']} are not committed: the run's commit does not name its code"
            yield warn(host, says, "commit them")
    if own:
        yield well(f"{own['hash'][:8]}, commit {(own['commit'] or 'unknown')[:8]}")


def check_model(spec: DoctorSpec) -> None:
    """Check the folder that gives the weights as the run would: that takes more than a host's Python may have.

    Raises:
        UserError: the run would refuse it.
    """
    named = [(flag, Path(name)) for flag, name in spec.models().items()]
    if named and named[0][1].is_dir():
        from mirage_ds.model.folder import resolve_folder
        from mirage_ds.model.load import check_folder

        flag, folder = named[0]
        resolve_folder(str(folder), flag, None)
        check_folder(folder, [other for _, other in named[1:] if other.is_dir()])


def _files(named: str, found: Mapping[str, Facts]) -> Iterator[Finding]:
    """Judge what each host has of a path: a fault, or files that are not the first host's."""
    whole, mend = {}, "put it on a disk that every host sees, or copy it there again"
    for host, facts in found.items():
        if facts["fault"]:
            yield fail(host, f"{named}: {facts['fault']}", mend)
        else:
            whole[host] = {name: f"{count:,} bytes" for name, count in facts["files"].items()}
    yield from unlike(whole, "copy it again, or use one on a shared disk", what=f"{named}: ")


def _weights(seen: Seen) -> int:
    """Return the number of weights of the largest model that is known."""
    models = [facts for section in seen.section("models").values() for facts in section.values()]
    return max((facts.get("weights", 0) for facts in models), default=0)


def model(seen: Seen) -> Iterator[Finding]:
    """Every host has the same files of the model; where they are here too, they are one whole (load.check_folder)."""
    sections = seen.section("models")
    if not seen.spec.models() or not sections:
        return
    try:
        check_model(seen.spec)
    except UserError as error:
        yield refused(error, "copy or download it again")
        return
    for flag, name in seen.spec.models().items():
        found = {host: facts[flag] for host, facts in sections.items()}
        is_id = flag == "--model" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        if not is_id or any("hub" not in facts for facts in found.values()):
            yield from _files(f"{flag} {name}", found)
            continue
        for host, facts in found.items():
            if not facts["kept"]:
                says = f"{flag} {name} is not in {facts['hub']}: rank 0 downloads it, and the others read it there"
                mend = "download it before the job into a cache that every host sees (HF_HOME or --cache_dir)"
                yield warn(host, says, mend)
    yield well(f"{_weights(seen):,} weights" if _weights(seen) else "in the hub's cache")


def data(seen: Seen) -> Iterator[Finding]:
    """Every host reads the records, the images of the first one, and the other files of the run."""
    for flag, path in seen.spec.files().items():
        look = seen.records.get(flag)
        if isinstance(look, UserError):
            yield refused(f"{flag}: {look}", "name the run's records")
        else:
            yield from _files(f"{flag} {path}", {host: facts[flag] for host, facts in seen.section("data").items()})
    if seen.spec.files():
        yield well(", ".join(seen.spec.files()))


def shared_folder(seen: Seen) -> Iterator[Finding]:
    """The run folder is the same folder on every host: checkpoints are written by all and read by all."""
    folder = seen.spec.save_model_path
    if not folder:
        return
    for host, facts in seen.section("folder").items():
        # One host may share it with nobody.
        if not facts["there"] or (len(seen.hosts) > 1 and not facts["shared"]):
            what = "is another folder there" if facts["there"] else "is not there"
            says = f"{folder} {what}: a file made here is not seen"
            yield fail(host, says, "give a --save_model_path on a file system that every host mounts")
    yield well(f"{folder}")


def disk(seen: Seen) -> Iterator[Finding]:
    """The run folder can be written to, holds the checkpoints that are kept and takes them fast enough."""
    folder, weights, kept = seen.spec.save_model_path, _weights(seen), seen.spec.keep_checkpoints + 1
    # One more than is kept: the new one is whole before the oldest goes.
    need = weights * (CHECKPOINT_BYTES * kept + EXPORT_BYTES) or MIN_FREE_BYTES
    # Where it is not there shared-folder says so.
    sections = {host: facts for host, facts in seen.section("folder").items() if facts.get("there")}
    for host, facts in sections.items():
        if facts.get("fault"):
            says = f"{folder} cannot be written to: {facts['fault']}"
            yield fail(host, says, "see its owner, its mount options, its quota and free space")
        elif facts["free_bytes"] < need:
            what = f"; {kept} checkpoints and the model of {weights:,} weights need {size(need)}" if weights else ""
            mend = "free space, choose another folder or lower --keep_checkpoints"
            yield warn(host, f"{size(facts['free_bytes'])} free{what}", mend)
        if facts.get("write_bytes_s", SLOW_DISK_BYTES_S) < SLOW_DISK_BYTES_S:
            minutes = weights * CHECKPOINT_BYTES / (facts["write_bytes_s"] * len(seen.hosts)) / 60
            what = f": a checkpoint takes about {minutes:.1f} min" if weights else ""
            says = f"writes {size(facts['write_bytes_s'])}/s, synced, {len(seen.hosts)} host(s) at once{what}"
            yield warn(host, says, "choose a faster file system for --save_model_path, or a larger --save_every")
    written = [facts for facts in sections.values() if "write_bytes_s" in facts]
    if written:
        free, speed = (size(min(facts[name] for facts in written)) for name in ("free_bytes", "write_bytes_s"))
        yield well(f"{free} free, {speed}/s a host written and synced")


def ds_config(seen: Seen) -> Iterator[Finding]:
    """DeepSpeed knows every key of the JSON, and this trainer can honour it."""
    if seen.spec.deepspeed is None:
        return
    try:
        read_json(seen.spec.deepspeed)
    except UserError as error:
        yield refused(error, f"fix the JSON; {shipped_folder()} has examples")
    yield well(f"{seen.spec.deepspeed}", HERE)
