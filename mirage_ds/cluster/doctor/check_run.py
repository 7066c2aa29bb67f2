"""Checks of what is to be run: the software, the model and data, the run folder, the JSON."""

import re
from collections.abc import Iterator
from pathlib import Path

from mirage_ds.cluster.doctor.finding import HERE, Facts, Finding, Seen, fail, size, unlike, warn, well
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.engine.ds_config import read_json, shipped_folder
from mirage_ds.engine.versions import PACKAGES
from mirage_ds.errors import UserError

OPTIONAL = ("flash-attn", "peft")
# Two versions hang or fail when the ranks join.
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
SLOW_DISK_BYTES_S = 50e6
# A sharded checkpoint: fp32 weights and AdamW's two moments; the exported model: 16-bit weights.
CHECKPOINT_BYTES, EXPORT_BYTES = 12, 2
# With nothing known of the model.
MIN_FREE_BYTES = 1e9


def packages(seen: Seen) -> Iterator[Finding]:
    """Python and the packages that training imports, in one version each."""
    found = {host: facts["packages"] for host, facts in seen.section("python").items()}
    # Python 3.11.7 and 3.11.9 run the same wheels.
    pythons = {host: facts["version"].rpartition(".")[0] for host, facts in seen.section("python").items()}
    mend = "install the same versions on every host, or one environment on a disk that all see"
    yield from unlike(pythons, "Python ", mend)
    first = next(iter(found), "")
    own = found.get(first, {})
    for host, versions in found.items():
        missing = [name for name in PACKAGES if name not in OPTIONAL and versions[name] is None]
        if missing:
            yield fail(host, f"not installed: {', '.join(missing)}", mend)
        other = [
            f"{name} {version or 'missing'} (on {first} {own[name] or 'missing'})"
            for name, version in versions.items()
            if version != own[name] and name not in missing
        ]
        if other:
            yield fail(host, ", ".join(other), mend)
    yield well(f"Python {pythons.get(first)}, torch {own.get('torch')}")


def code(seen: Seen) -> Iterator[Finding]:
    """The same source of mirage_ds, at a commit that names it."""
    sections = seen.section("code")
    first, own = next(((host, facts) for host, facts in sections.items() if facts["folder"]), ("", {}))
    for host, facts in sections.items():
        if not facts["folder"]:
            yield fail(
                host, "mirage_ds cannot be imported", "install it there, or start in its checkout on a shared disk"
            )
        elif facts["hash"] != own["hash"]:
            says = f"{facts['folder']} holds other code than on {first} ({facts['hash'][:8]}, not {own['hash'][:8]})"
            yield fail(host, says, "bring every host to the same commit, or use one checkout on a shared disk")
        elif facts["commit"] and own["commit"] and facts["commit"] != own["commit"]:
            # Something beside the code has changed.
            says = f"commit {facts['commit'][:8]}, on {first} {own['commit'][:8]}"
            yield warn(host, says, f"git checkout {own['commit'][:8]} there")
        elif facts["changed"]:
            says = f"changes in {facts['folder']} are not committed: the run's commit does not name its code"
            yield warn(host, says, "commit them")
    if own:
        yield well(f"{own['hash'][:8]}, commit {(own['commit'] or 'unknown')[:8]}")


def model_fault(spec: DoctorSpec) -> str:
    """Check the folder that gives the weights as the run would: that takes more than a host's Python may have."""
    named = [(flag, Path(name)) for flag, name in spec.models().items()]
    if not named or not named[0][1].is_dir():
        return ""
    from mirage_ds.model.folder import resolve_folder
    from mirage_ds.model.load import check_folder

    flag, folder = named[0]
    try:
        resolve_folder(str(folder), flag, None)
        check_folder(folder, [other for _, other in named[1:] if other.is_dir()])
    except UserError as error:
        return str(error)
    return ""


def _model_on(host: str, named: str, facts: Facts, downloaded: bool) -> Iterator[Finding]:
    """Judge a model on one host; `downloaded`: it comes from the hub where no folder has its name."""
    if facts.get("fault"):
        yield fail(host, f"{named}: {facts['fault']}", "copy or download it again")
    elif "files" not in facts and not downloaded:
        yield fail(host, f"{named}: no such folder", "put it on a disk that every host sees, or copy it there")
    elif "files" not in facts and not facts["kept"]:
        says = f"{named} is not in {facts['hub']}: rank 0 downloads it, and the others read it there"
        yield warn(host, says, "download it before the job into a cache that every host sees (HF_HOME or --cache_dir)")


def _weights(seen: Seen) -> int:
    """Return the number of weights of the largest model that is known."""
    models = [facts for section in seen.section("models").values() for facts in section.values()]
    return max((facts.get("weights", 0) for facts in models), default=0)


def model(seen: Seen) -> Iterator[Finding]:
    """Every host has the same files of the model; where they are here too, they are one whole (load.check_folder)."""
    sections = seen.section("models")
    if not seen.spec.models() or not sections:
        return
    if fault := model_fault(seen.spec):
        says, _, mend = fault.partition("; ")
        yield fail(HERE, says, mend)
        return
    for flag, name in seen.spec.models().items():
        found = {host: facts[flag] for host, facts in sections.items()}
        is_id = flag == "--model" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        downloaded = is_id and not any("files" in facts for facts in found.values())
        for host, facts in found.items():
            yield from _model_on(host, f"{flag} {name}", facts, downloaded)
        # A host whose files are faulty has had its finding; only whole folders are compared.
        readable = {host: facts["files"] for host, facts in found.items() if "files" in facts and not facts["fault"]}
        first_host, first = next(iter(readable.items()), ("", {}))
        for host, files in readable.items():
            if files != first:
                names = sorted(one for one in files.keys() | first.keys() if files.get(one) != first.get(one))
                says = f"{flag} {name}: not the files of {first_host}: {', '.join(names[:3])}"
                yield fail(host, says, "copy it again, or use one folder on a shared disk")
    yield well(f"{_weights(seen):,} weights" if _weights(seen) else "in the hub's cache")


def data(seen: Seen) -> Iterator[Finding]:
    """Every host reads the records, the images of the first one, and the other files of the run."""
    for flag, path in seen.spec.files().items():
        look = seen.records.get(flag)
        if isinstance(look, UserError):
            says, _, mend = str(look).rpartition("; ")
            yield fail(HERE, f"{flag}: {says or look}", mend if says else "name the run's records")
            continue
        found = {host: facts[flag] for host, facts in seen.section("data").items()}
        for host, facts in found.items():
            if facts["fault"]:
                yield fail(host, f"{flag} {path}: {facts['fault']}", "put it on a disk that every host sees")
        sizes = {host: f"{facts['bytes']:,} bytes" for host, facts in found.items() if facts["bytes"] is not None}
        yield from unlike(sizes, f"{flag} {path}: ", "copy it again, or use one file on a shared disk")
    if seen.spec.files():
        yield well(", ".join(seen.spec.files()))


def shared_folder(seen: Seen) -> Iterator[Finding]:
    """The run folder is the same folder on every host: checkpoints are written by all and read by all."""
    folder = seen.spec.save_model_path
    if not folder or len(seen.hosts) < 2:
        return
    for host, facts in seen.section("folder").items():
        if not facts.get("shared"):
            what = "is another folder there" if facts["there"] else "is not there"
            says = f"{folder} {what}: a file made here is not seen"
            yield fail(host, says, "give a --save_model_path on a file system that every host mounts")
    yield well(f"{folder}")


def disk(seen: Seen) -> Iterator[Finding]:
    """The run folder can be written to, holds the checkpoints that are kept and takes them fast enough."""
    folder, weights, kept = seen.spec.save_model_path, _weights(seen), seen.spec.keep_checkpoints + 1
    # One more than is kept: the new one is whole before the oldest goes.
    need = weights * (CHECKPOINT_BYTES * kept + EXPORT_BYTES) or MIN_FREE_BYTES
    sections = {host: facts for host, facts in seen.section("folder").items() if facts}
    for host, facts in sections.items():
        if facts.get("fault"):
            says = f"{folder} cannot be written to: {facts['fault']}"
            yield fail(host, says, "see its owner, its mount options, its quota and free space")
        elif not facts["there"]:
            # On several hosts shared-folder says it.
            if len(seen.hosts) == 1:
                yield fail(host, f"{folder} cannot be made", "give a folder that you may write to")
            continue
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
        says, _, mend = str(error).rpartition("; ")
        yield fail(HERE, says or str(error), mend if says else f"fix the JSON; {shipped_folder()} has examples")
    yield well(f"{seen.spec.deepspeed}", HERE)
