"""Checks of GPUs, driver, NCCL and of how fast the hosts talk."""

from __future__ import annotations

from mirage_ds.cluster.doctor.bandwidth import slow
from mirage_ds.cluster.doctor.finding import HERE, Bad, Seen, Verdict, fail, size, unlike, warn

# More than this share of a GPU's memory in use before the run: somebody else works there.
USED_SHARE = 0.1
# Oldest driver that runs a CUDA of this major version (NVIDIA's table of minor version compatibility).
DRIVERS = {12: 525, 13: 580}
CUDA_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def gpus(seen: Seen) -> Verdict:
    """As many GPUs as slots, all of one kind, none that fails."""
    found, bad = seen.section("gpus"), []
    slots = {host.name: host.slots for host in seen.hosts}
    if all(map(seen.on_cpu, found)):
        return "none asked for (DS_ACCELERATOR=cpu)", []
    for host, facts in found.items():
        if seen.on_cpu(host):
            continue
        if "fault" in facts:
            mend = "restart the host: its driver was updated under a running kernel module, or has crashed"
            bad.append(fail(host, f"nvidia-smi: {facts['fault']}", mend))
            continue
        count = len(facts["gpus"])
        if not count:
            why = "a GPU is there and nvidia-smi is not installed" if facts["there"] else "no GPU is seen"
            # Where no host has one, it may be meant.
            status = fail if facts["there"] or any(other["gpus"] for other in found.values()) else warn
            bad.append(status(host, why, "install the driver; for a run on CPUs set DS_ACCELERATOR=cpu"))
        elif count < slots[host]:
            mend = (
                f"write slots={count} into the hostfile, or look for the missing one: nvidia-smi, dmesg | grep -i xid"
            )
            bad.append(fail(host, f"{count} GPU(s) for {slots[host]} slots", mend))
        for gpu in facts["gpus"]:
            if gpu["ecc_faults"]:
                says = f"GPU {gpu['index']}: {gpu['ecc_faults']} uncorrected memory errors since the last restart"
                bad.append(fail(host, says, "restart the host; if they come back, leave this GPU out"))
    kinds = {host: sorted({gpu["name"] for gpu in facts["gpus"]}) for host, facts in found.items() if facts["gpus"]}
    for host, value, first in unlike(kinds):
        says = f"{', '.join(value)}; on {next(iter(kinds))} {', '.join(first)}"
        bad.append(warn(host, says, "the slowest GPU sets the pace of all; use hosts of one kind"))
    return ", ".join(next(iter(kinds.values()), [])), bad


def gpu_memory(seen: Seen) -> Verdict:
    """Nobody else's memory on the GPUs."""
    bad: list[Bad] = []
    free = []
    for host, facts in seen.section("gpus").items():
        for gpu in [] if seen.on_cpu(host) else facts["gpus"]:
            free.append((gpu["total_mib"] - gpu["used_mib"]) * 2**20)
            if gpu["used_mib"] > USED_SHARE * gpu["total_mib"]:
                who = f" by process {', '.join(map(str, gpu['pids']))}" if gpu["pids"] else ""
                says = f"GPU {gpu['index']}: {gpu['used_mib']:,} of {gpu['total_mib']:,} MiB in use{who}"
                bad.append(fail(host, says, "end what runs there (a rank left over?), or leave this GPU out"))
    return (f"at least {size(min(free))} free a GPU" if free else None), bad


def driver(seen: Seen) -> Verdict:
    """One driver, new enough for torch's CUDA."""
    drivers = {host: facts["gpus"][0]["driver"] for host, facts in seen.section("gpus").items() if facts["gpus"]}
    bad = []
    for host, value, first in unlike(drivers):
        bad.append(warn(host, f"driver {value}, on {next(iter(drivers))} {first}", "install one driver on all hosts"))
    for host, value in drivers.items():
        packages = seen.section("python").get(host, {}).get("packages", {})
        cuda = next((packages[name] for name in CUDA_PACKAGES if packages.get(name)), None)
        least = DRIVERS.get(int(cuda.split(".")[0])) if cuda else None
        if least and int(value.split(".")[0]) < least:
            says = f"driver {value} is too old for torch's CUDA {cuda}, which needs {least} or newer"
            bad.append(
                fail(host, says, "update the driver, or install torch's wheel for an older CUDA (README, Install)")
            )
    return next(iter(drivers.values()), None), bad


def nccl(seen: Seen) -> Verdict:
    """One NCCL: two versions hang or fail when the ranks join."""
    versions: dict[str, str] = {}
    for host, facts in seen.section("python").items():
        found = (facts["packages"].get(name) for name in NCCL_PACKAGES)
        # What the ranks ran, where they did, counts more than what is installed.
        version = (seen.bandwidth.nccl.get(host) if seen.bandwidth else None) or next(filter(None, found), None)
        if version:
            versions[host] = version
    bad = [
        fail(host, f"NCCL {value}, on {next(iter(versions))} {first}", "install the same torch on every host")
        for host, value, first in unlike(versions)
    ]
    return next(iter(versions.values()), None), bad


def bandwidth(seen: Seen) -> Verdict:
    """The hosts reach each other, none much slower than the others."""
    measured = seen.bandwidth
    if measured is None:
        return None, [warn(HERE, seen.unmeasured, "mend that first")] if seen.unmeasured else []
    if measured.faults:
        return None, [fail(host, what, mend) for host, (what, mend) in measured.faults.items()]
    bad = []
    says = f"all-reduce {size(measured.all_reduce)}/s, all-gather {size(measured.all_gather)}/s"
    if measured.pairs:
        hosts, links, median = slow(measured.pairs)
        look = "look at its cable, link speed (ethtool, ibstat) and NCCL_SOCKET_IFNAME / NCCL_IB_HCA"
        for host, rate in hosts.items():
            bad.append(warn(host, f"{size(rate)}/s at best; the hosts' median is {size(median)}/s", look))
        for (a, b), rate in links.items():
            bad.append(warn(f"{a}, {b}", f"{size(rate)}/s between them; the hosts' median is {size(median)}/s", look))
        rates = measured.pairs.values()
        says += f", between two hosts {size(min(rates))}/s to {size(max(rates))}/s"
    return says, bad
