"""Checks of what is to be run: the software, the model and data, the run folder, the JSON."""

from __future__ import annotations

import re
from typing import Any

from mirage_ds.cluster.doctor.finding import HERE, Bad, Facts, Seen, Verdict, fail, size, unlike, warn
from mirage_ds.engine.ds_config import read_json
from mirage_ds.engine.installed import PACKAGES
from mirage_ds.errors import UserError
from mirage_ds.model.family import check_text, family_of

OPTIONAL = ("flash-attn", "peft")
SLOW_DISK_BYTES_S = 50e6
# A sharded checkpoint: fp32 weights and AdamW's two moments; the exported model: 16-bit weights.
CHECKPOINT_BYTES, EXPORT_BYTES = 12, 2
# With nothing known of the model.
MIN_FREE_BYTES = 1e9


def python(seen: Seen) -> Verdict:
    """One Python on all hosts."""
    versions = {host: facts["version"] for host, facts in seen.section("python").items()}
    bad = []
    for host, value, first in unlike(versions):
        status = warn if value.rsplit(".", 1)[0] == first.rsplit(".", 1)[0] else fail
        bad.append(status(host, f"Python {value}, on {next(iter(versions))} {first}", "install the same on every host"))
    return f"{next(iter(versions.values()), '')}", bad


def packages(seen: Seen) -> Verdict:
    """The packages that training imports, in one version each."""
    found = {host: facts["packages"] for host, facts in seen.section("python").items()}
    bad: list[Bad] = []
    mend = "install the same versions on every host, or one environment on a disk that all see"
    for host, versions in found.items():
        missing = [name for name in PACKAGES if name not in OPTIONAL and versions[name] is None]
        if missing:
            bad.append(fail(host, f"not installed: {', '.join(missing)}", mend))
    first = next(iter(found), "")
    for host, versions in found.items():
        other = [
            f"{name} {versions[name] or 'missing'} (on {first} {found[first][name] or 'missing'})"
            for name in PACKAGES
            if versions[name] != found[first][name] and (versions[name] or name in OPTIONAL)
        ]
        if other:
            bad.append(fail(host, ", ".join(other), mend))
    torch = found.get(first, {}).get("torch")
    return f"torch {torch}, {sum(1 for name in PACKAGES if found.get(first, {}).get(name))} compared", bad


def code(seen: Seen) -> Verdict:
    """The same source of mirage_ds."""
    sections = seen.section("code")
    bad = [
        fail(host, "mirage_ds cannot be imported", "install it there, or start in its checkout on a shared disk")
        for host, facts in sections.items()
        if facts["folder"] is None
    ]
    hashes = {host: facts["hash"] for host, facts in sections.items() if facts["folder"]}
    for host, value, first in unlike(hashes):
        says = (
            f"{sections[host]['folder']} holds other code than on {next(iter(hashes))} ({value[:8]}, not {first[:8]})"
        )
        bad.append(fail(host, says, "bring every host to the same commit, or use one checkout on a shared disk"))
    return f"{next(iter(hashes.values()), '')[:8]}", bad


def commit(seen: Seen) -> Verdict:
    """The same git commit, and nothing uncommitted: what is trained can be named."""
    sections = {host: facts for host, facts in seen.section("code").items() if facts.get("commit")}
    if not sections:
        return None, []
    commits, bad = {host: facts["commit"] for host, facts in sections.items()}, []
    for host, value, first in unlike(commits):
        # The same source at another commit: something beside the code has changed.
        same = sections[host]["hash"] == next(iter(sections.values()))["hash"]
        says = f"commit {value[:8]}, on {next(iter(commits))} {first[:8]}"
        bad.append((warn if same else fail)(host, says, f"git checkout {first[:8]} there"))
    for host, facts in sections.items():
        if facts["changed"]:
            says = f"changes in {facts['folder']} are not committed: the run's commit does not name its code"
            bad.append(warn(host, says, "commit them"))
    return next(iter(commits.values()))[:8], bad


def _is_hub_id(flag: str, name: str) -> bool:
    return flag == "--model" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _model_on(host: str, flag: str, name: str, facts: Facts) -> list[Bad]:
    if "hub" in facts:
        if not _is_hub_id(flag, name):
            return [fail(host, f"{flag} {name}: no such folder", "put it on a disk that every host sees")]
        if not facts["kept"]:
            says = f"{flag} {name} is not in {facts['hub']}: rank 0 downloads it, and the others read it there"
            mend = "download it before the job into a cache that every host sees (HF_HOME or --cache_dir)"
            return [warn(host, says, mend)]
        return []
    if facts["fault"]:
        return [fail(host, f"{flag} {name}: {facts['fault']}", "copy or download it anew")]
    if not facts["elements"]:
        return [fail(host, f"{flag} {name}: no weights in it", "give a folder with *.safetensors")]
    config = facts["config"]
    try:
        if isinstance(config, dict):
            family_of(config.get("model_type"), f"{flag} {name}")
            check_text(config, facts["files"], facts["head"], f"{flag} {name}")
    except UserError as error:
        says, _, mend = str(error).rpartition("; ")
        return [fail(host, says or mend, mend)]
    return []


def model(seen: Seen) -> Verdict:
    """Every host reads the model, the same files everywhere, and they are one whole model (load.check_folder)."""
    plan, sections = seen.plan, seen.section("models")
    if not plan.models or not sections:
        return None, []
    for fault in seen.here.model_faults.values():
        says, _, mend = fault.partition("; ")
        return None, [fail(HERE, says, mend)]
    bad: list[Bad] = []
    for flag, name in plan.models.items():
        found = {host: facts[flag] for host, facts in sections.items()}
        local = any("files" in facts for facts in found.values())
        for host, facts in found.items():
            if local and "hub" in facts:
                says = f"{flag} {name}: no such folder"
                bad.append(fail(host, says, "put it on a disk that every host sees, or copy it there"))
            else:
                bad += _model_on(host, flag, name, facts)
        readable = {host: facts["files"] for host, facts in found.items() if "files" in facts and not facts["fault"]}
        for host, files, first in unlike(readable):
            names = sorted(name for name in files.keys() | first.keys() if files.get(name) != first.get(name))
            says = f"{flag} {name}: not the files of {next(iter(readable))}: {', '.join(names[:3])}"
            bad.append(fail(host, says, "copy it anew, or use one folder on a shared disk"))
    return f"{_elements(seen):,} weights" if _elements(seen) else "in the hub's cache", bad


def _elements(seen: Seen) -> int:
    """Return the weights of the largest model that is known."""
    models = [facts for section in seen.section("models").values() for facts in section.values()]
    return max((facts.get("elements", 0) for facts in models), default=0)


def data(seen: Seen) -> Verdict:
    """Every host reads the records, the images of the first one, and the other files of the run."""
    bad: list[Bad] = []
    sections = seen.section("data")
    if not seen.plan.files or not sections:
        return None, []
    for flag, path in seen.plan.files.items():
        found = {host: facts[flag] for host, facts in sections.items()}
        for host, facts in found.items():
            if facts["fault"]:
                bad.append(fail(host, f"{flag} {path}: {facts['fault']}", "put it on a disk that every host sees"))
        sizes = {host: facts["bytes"] for host, facts in found.items() if facts["bytes"] is not None}
        for host, value, first in unlike(sizes):
            says = f"{flag} {path}: {value:,} bytes, on {next(iter(sizes))} {first:,}"
            bad.append(fail(host, says, "copy it anew, or use one file on a shared disk"))
    return ", ".join(seen.plan.files), bad


def shared_folder(seen: Seen) -> Verdict:
    """The run folder is the same folder on every host: checkpoints are written by all and read by all."""
    if not seen.plan.run_folder or len(seen.hosts) < 2:
        return None, []
    bad = []
    for host, facts in seen.section("folder").items():
        if not facts.get("shared"):
            what = "is another folder there" if facts["there"] else "is not there"
            says = f"{seen.plan.run_folder} {what}: a file made here is not seen"
            bad.append(fail(host, says, "give a --save_model_path on a file system that every host mounts"))
    return f"{seen.plan.run_folder}", bad


def disk(seen: Seen) -> Verdict:
    """The run folder can be written to, holds the checkpoints that are kept and takes them fast enough."""
    if not seen.plan.run_folder:
        return None, []
    elements, keep = _elements(seen), seen.plan.keep_checkpoints
    # One more than is kept: the new one is whole before the oldest goes.
    need = elements * (CHECKPOINT_BYTES * (keep + 1) + EXPORT_BYTES) or MIN_FREE_BYTES
    bad, frees, speeds = [], [], []
    for host, facts in seen.section("folder").items():
        if facts.get("fault"):
            says = f"{seen.plan.run_folder} cannot be written to: {facts['fault']}"
            bad.append(fail(host, says, "see its owner, its mount options, its quota and free space"))
            continue
        if not facts["there"]:
            if len(seen.hosts) == 1:
                bad.append(fail(host, f"{seen.plan.run_folder} cannot be made", "give a folder that you may write to"))
            continue
        frees.append(facts["free_bytes"])
        speeds.append(facts["write_bytes_s"])
        if frees[-1] < need:
            says = f"{size(frees[-1])} free"
            if elements:
                says += f"; {keep + 1} checkpoints and the model of {elements:,} weights need {size(need)}"
            bad.append(warn(host, says, "free space, choose another folder or lower --keep_checkpoints"))
        if speeds[-1] < SLOW_DISK_BYTES_S:
            says = f"writes {size(speeds[-1])}/s, synced, {len(seen.hosts)} host(s) at once"
            if elements:
                hours = elements * CHECKPOINT_BYTES / (speeds[-1] * len(seen.hosts)) / 3600
                says += (
                    f": a checkpoint takes about {hours:.1f} h" if hours > 1 else f": {hours * 60:.1f} min a checkpoint"
                )
            bad.append(warn(host, says, "choose a faster file system for --save_model_path, or a larger --save_every"))
    if not frees:
        return None, bad
    return f"{size(min(frees))} free, {size(min(speeds))}/s a host written and synced", bad


def ds_config(seen: Seen) -> Verdict:
    """DeepSpeed knows every key of the JSON, and this trainer can honour it."""
    path: Any = seen.plan.deepspeed
    if path is None:
        return None, []
    try:
        read_json(path)
    except UserError as error:
        says, _, mend = str(error).rpartition("; ")
        return None, [fail(HERE, says or str(error), mend if says else "mend the JSON; ds_configs/ has examples")]
    return f"{path}", []
