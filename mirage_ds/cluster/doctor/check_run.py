"""Checks of what is to be run: the software, the model and data, the run folder, the JSON."""

from __future__ import annotations

import re

from mirage_ds.cluster.doctor.finding import HERE, Bad, Facts, Seen, Verdict, fail, size, unlike, warn
from mirage_ds.engine.ds_config import read_json
from mirage_ds.engine.installed import PACKAGES
from mirage_ds.errors import UserError

OPTIONAL = ("flash-attn", "peft")
# Two versions hang or fail when the ranks join.
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
SLOW_DISK_BYTES_S = 50e6
# A sharded checkpoint: fp32 weights and AdamW's two moments; the exported model: 16-bit weights.
CHECKPOINT_BYTES, EXPORT_BYTES = 12, 2
# With nothing known of the model.
MIN_FREE_BYTES = 1e9


def packages(seen: Seen) -> Verdict:
    """Python and the packages that training imports, in one version each."""
    found = {host: facts["packages"] for host, facts in seen.section("python").items()}
    # Python 3.11.7 and 3.11.9 run the same wheels.
    pythons = {host: facts["version"].rpartition(".")[0] for host, facts in seen.section("python").items()}
    mend = "install the same versions on every host, or one environment on a disk that all see"
    bad = unlike(pythons, "Python ", mend)
    first = next(iter(found), "")
    for host, versions in found.items():
        missing = [name for name in PACKAGES if name not in OPTIONAL and versions[name] is None]
        if missing:
            bad.append(fail(host, f"not installed: {', '.join(missing)}", mend))
        other = [
            f"{name} {version or 'missing'} (on {first} {found[first][name] or 'missing'})"
            for name, version in versions.items()
            if version != found[first][name] and name not in missing
        ]
        if other:
            bad.append(fail(host, ", ".join(other), mend))
    torch = found.get(first, {}).get("torch")
    return f"Python {pythons.get(first)}, torch {torch}", bad


def code(seen: Seen) -> Verdict:
    """The same source of mirage_ds, at a commit that names it."""
    sections = {host: facts for host, facts in seen.section("code").items() if facts["folder"]}
    bad = [
        fail(host, "mirage_ds cannot be imported", "install it there, or start in its checkout on a shared disk")
        for host, facts in seen.section("code").items()
        if not facts["folder"]
    ]
    if not sections:
        return None, bad
    first, own = next(iter(sections.items()))
    for host, facts in sections.items():
        if facts["hash"] != own["hash"]:
            says = f"{facts['folder']} holds other code than on {first} ({facts['hash'][:8]}, not {own['hash'][:8]})"
            bad.append(fail(host, says, "bring every host to the same commit, or use one checkout on a shared disk"))
        elif facts["commit"] and own["commit"] and facts["commit"] != own["commit"]:
            # Something beside the code has changed.
            says = f"commit {facts['commit'][:8]}, on {first} {own['commit'][:8]}"
            bad.append(warn(host, says, f"git checkout {own['commit'][:8]} there"))
        elif facts["changed"]:
            says = f"changes in {facts['folder']} are not committed: the run's commit does not name its code"
            bad.append(warn(host, says, "commit them"))
    return f"{own['hash'][:8]}, commit {(own['commit'] or 'unknown')[:8]}", bad


def _model_on(host: str, named: str, facts: Facts, downloaded: bool) -> list[Bad]:
    """Judge a model on one host; `downloaded`: it comes from the hub where no folder has its name."""
    if "files" in facts:
        return [fail(host, f"{named}: {facts['fault']}", "copy or download it again")] if facts["fault"] else []
    if not downloaded:
        return [fail(host, f"{named}: no such folder", "put it on a disk that every host sees, or copy it there")]
    if facts["kept"]:
        return []
    says = f"{named} is not in {facts['hub']}: rank 0 downloads it, and the others read it there"
    return [warn(host, says, "download it before the job into a cache that every host sees (HF_HOME or --cache_dir)")]


def _weights(seen: Seen) -> int:
    """Return the number of weights of the largest model that is known."""
    models = [facts for section in seen.section("models").values() for facts in section.values()]
    return max((facts.get("weights", 0) for facts in models), default=0)


def model(seen: Seen) -> Verdict:
    """Every host has the same files of the model; where they are here too, they are one whole (load.check_folder)."""
    sections, bad = seen.section("models"), []
    if not seen.spec.models() or not sections:
        return None, []
    if seen.model_fault:
        says, _, mend = seen.model_fault.partition("; ")
        return None, [fail(HERE, says, mend)]
    for flag, name in seen.spec.models().items():
        found = {host: facts[flag] for host, facts in sections.items()}
        is_id = flag == "--model" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        downloaded = is_id and not any("files" in facts for facts in found.values())
        for host, facts in found.items():
            bad += _model_on(host, f"{flag} {name}", facts, downloaded)
        # A host whose files are faulty has had its finding; only whole folders are compared.
        readable = {host: facts["files"] for host, facts in found.items() if "files" in facts and not facts["fault"]}
        first_host, first = next(iter(readable.items()), ("", {}))
        for host, files in readable.items():
            if files != first:
                names = sorted(one for one in files.keys() | first.keys() if files.get(one) != first.get(one))
                says = f"{flag} {name}: not the files of {first_host}: {', '.join(names[:3])}"
                bad.append(fail(host, says, "copy it again, or use one folder on a shared disk"))
    return f"{_weights(seen):,} weights" if _weights(seen) else "in the hub's cache", bad


def data(seen: Seen) -> Verdict:
    """Every host reads the records, the images of the first one, and the other files of the run."""
    sections, bad = seen.section("data"), []
    if not seen.spec.files() or not sections:
        return None, []
    for flag, path in seen.spec.files().items():
        found = {host: facts[flag] for host, facts in sections.items()}
        for host, facts in found.items():
            if facts["fault"]:
                bad.append(fail(host, f"{flag} {path}: {facts['fault']}", "put it on a disk that every host sees"))
        sizes = {host: f"{facts['bytes']:,} bytes" for host, facts in found.items() if facts["bytes"] is not None}
        bad += unlike(sizes, f"{flag} {path}: ", "copy it again, or use one file on a shared disk")
    return ", ".join(seen.spec.files()), bad


def shared_folder(seen: Seen) -> Verdict:
    """The run folder is the same folder on every host: checkpoints are written by all and read by all."""
    folder, bad = seen.spec.save_model_path, []
    if not folder or len(seen.hosts) < 2:
        return None, []
    for host, facts in seen.section("folder").items():
        if not facts.get("shared"):
            what = "is another folder there" if facts["there"] else "is not there"
            says = f"{folder} {what}: a file made here is not seen"
            bad.append(fail(host, says, "give a --save_model_path on a file system that every host mounts"))
    return f"{folder}", bad


def _disk_of(seen: Seen, host: str, facts: Facts) -> list[Bad]:
    folder, weights, keep = seen.spec.save_model_path, _weights(seen), seen.spec.keep_checkpoints
    if facts.get("fault"):
        says = f"{folder} cannot be written to: {facts['fault']}"
        return [fail(host, says, "see its owner, its mount options, its quota and free space")]
    if not facts["there"]:
        # On several hosts shared-folder says it.
        alone = fail(host, f"{folder} cannot be made", "give a folder that you may write to")
        return [alone] if len(seen.hosts) == 1 else []
    bad, free, speed = [], facts["free_bytes"], facts["write_bytes_s"]
    # One more than is kept: the new one is whole before the oldest goes.
    need = weights * (CHECKPOINT_BYTES * (keep + 1) + EXPORT_BYTES) or MIN_FREE_BYTES
    if free < need:
        what = f"; {keep + 1} checkpoints and the model of {weights:,} weights need {size(need)}" if weights else ""
        mend = "free space, choose another folder or lower --keep_checkpoints"
        bad.append(warn(host, f"{size(free)} free{what}", mend))
    if speed < SLOW_DISK_BYTES_S:
        minutes = weights * CHECKPOINT_BYTES / (speed * len(seen.hosts)) / 60
        what = f": a checkpoint takes about {minutes:.1f} min" if weights else ""
        says = f"writes {size(speed)}/s, synced, {len(seen.hosts)} host(s) at once{what}"
        bad.append(warn(host, says, "choose a faster file system for --save_model_path, or a larger --save_every"))
    return bad


def disk(seen: Seen) -> Verdict:
    """The run folder can be written to, holds the checkpoints that are kept and takes them fast enough."""
    if not seen.spec.save_model_path:
        return None, []
    sections = seen.section("folder")
    bad = [one for host, facts in sections.items() for one in _disk_of(seen, host, facts)]
    written = [facts for facts in sections.values() if "write_bytes_s" in facts]
    if not written:
        return None, bad
    free, speed = (size(min(facts[name] for facts in written)) for name in ("free_bytes", "write_bytes_s"))
    return f"{free} free, {speed}/s a host written and synced", bad


def ds_config(seen: Seen) -> Verdict:
    """DeepSpeed knows every key of the JSON, and this trainer can honour it."""
    path = seen.spec.deepspeed
    if path is None:
        return None, []
    try:
        read_json(path)
    except UserError as error:
        says, _, mend = str(error).rpartition("; ")
        return None, [fail(HERE, says or str(error), mend if says else "fix the JSON; ds_configs/ has examples")]
    return f"{path}", []
