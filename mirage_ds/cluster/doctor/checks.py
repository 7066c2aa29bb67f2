"""Checks of the hosts, their GPUs and the way between them, and the table of all checks."""

import ipaddress
from collections.abc import Iterator, Sequence
from shutil import which

from mirage_ds.cluster.doctor.bandwidth import slow
from mirage_ds.cluster.doctor.check_run import code, data, disk, ds_config, model, packages, shared_folder
from mirage_ds.cluster.doctor.finding import HERE, Facts, Finding, Seen, fail, refused, size, unlike, warn, well
from mirage_ds.cluster.environment import is_wanted

# More than this share of a GPU's memory in use before the run: somebody else works there.
USED_SHARE = 0.1
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 60.0
# (name, option of ulimit, least) of what data loading and sockets need; bytes that RDMA pins.
LEAST_LIMITS = (("nofile", "n", 4096), ("nproc", "u", 4096))
MIN_LOCKED_BYTES = 1 << 30
SHM_FAIL_BYTES, SHM_WARN_BYTES_A_SLOT = 256 << 20, 1 << 30
# A lock this young may belong to a compiler that is just starting; compilations end within the second time.
YOUNG_LOCK_S, OLDEST_LOCK_S = 120.0, 3600.0


def ssh(seen: Seen) -> Iterator[Finding]:
    """Every host can be asked, without a password, with a known key; the launcher's own tool is there."""
    for answer in seen.answers.values():
        if answer.fault:
            yield fail(answer.host, answer.fault, answer.mend)
    if seen.launcher == "pdsh" and not which("pdsh"):
        yield warn(HERE, "pdsh is not installed", "install it, or give `deepspeed` another --launcher")
    yield well("this machine" if seen.launcher == "local" else "all answer")


def probe(seen: Seen) -> Iterator[Finding]:
    """The working directory is there, and every section of the probe says something."""
    for host, facts in seen.facts.items():
        if "cwd" in facts:
            says = f"cannot enter the working directory: {facts['cwd']}"
            yield fail(host, says, "start the job in a folder that every host sees under the same path")
        for section, why in facts.get("errors", {}).items():
            yield warn(host, f"{section}: cannot be found out ({why})", "fix that, or look by hand")


def _gpus_of(host: str, facts: Facts, slots: int, needed: bool) -> Iterator[Finding]:
    """Judge the GPUs of one host whose ranks use them; `needed`: another host has some."""
    count = len(facts["gpus"])
    if "fault" in facts:
        mend = "restart the host: its driver was updated under a running kernel module, or has crashed"
        yield fail(host, f"nvidia-smi: {facts['fault']}", mend)
    elif not count:
        why = "a GPU is there and nvidia-smi is not installed" if facts["there"] else "no GPU is seen"
        # Where no host has one, it may be meant.
        status = fail if facts["there"] or needed else warn
        yield status(host, why, "install the driver; for a run on CPUs set DS_ACCELERATOR=cpu")
    elif count < slots:
        mend = f"write slots={count} into the hostfile, or look for the missing one: nvidia-smi, dmesg | grep -i xid"
        yield fail(host, f"{count} GPU(s) for {slots} slots", mend)
    for gpu in facts["gpus"]:
        if gpu["ecc_faults"]:
            says = f"GPU {gpu['index']}: {gpu['ecc_faults']} uncorrected memory errors since the last restart"
            yield fail(host, says, "restart the host; if they come back, leave this GPU out")
        if gpu["used_mib"] > USED_SHARE * gpu["total_mib"]:
            who = f" by process {', '.join(map(str, gpu['pids']))}" if gpu["pids"] else ""
            says = f"GPU {gpu['index']}: {gpu['used_mib']:,} of {gpu['total_mib']:,} MiB in use{who}"
            yield fail(host, says, "end what runs there (a rank left over?), or leave this GPU out")


def gpus(seen: Seen) -> Iterator[Finding]:
    """As many GPUs as slots, of one kind and driver, none that fails, nobody else's memory on them."""
    found = {host: facts for host, facts in seen.section("gpus").items() if not seen.on_cpu(host)}
    with_gpus = {host: facts["gpus"] for host, facts in found.items() if facts["gpus"]}
    for host, facts in found.items():
        yield from _gpus_of(host, facts, seen.slots(host), bool(with_gpus))
    kinds = {
        host: {"each": ", ".join(sorted({f"{gpu['name']} with driver {gpu['driver']}" for gpu in own}))}
        for host, own in with_gpus.items()
    }
    mend = "the slowest GPU sets the pace of all: use hosts of one kind, with one driver"
    yield from unlike(kinds, mend, fatal=False)
    free = [gpu["total_mib"] - gpu["used_mib"] for own in with_gpus.values() for gpu in own]
    if not found:
        yield well("none asked for (DS_ACCELERATOR=cpu)")
    elif free:
        yield well(f"{next(iter(kinds.values()))['each']}, {size(min(free) * 2**20)} free")


def _nowhere(addresses: Sequence[str]) -> str | None:
    """Say where addresses lead at which another host finds nobody; None where it may find somebody."""
    leads = all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in addresses)
    return (", ".join(addresses) or "nothing") if leads else None


def host_name(seen: Seen) -> Iterator[Finding]:
    """Each host's own name leads to it from elsewhere, and no two hosts are the same machine."""
    if len(seen.hosts) < 2:
        return
    named: dict[str, str] = {}
    for host, place in seen.section("place").items():
        name, nowhere = place["hostname"], _nowhere(place["own_addresses"])
        if name in named:
            says = f"is called {name}, as {named[name]} is: the same machine twice?"
            yield warn(host, says, "give a machine one line in the hostfile, with all its slots")
        named.setdefault(name, host)
        if nowhere and seen.on_cpu(host) and not seen.fact(host, "variables", "GLOO_SOCKET_IFNAME"):
            mend = "write its real address into its /etc/hosts, or set GLOO_SOCKET_IFNAME to its interface"
            yield fail(host, f"its own name {name} leads to {nowhere}: gloo will listen there", mend)
    yield well("leads to a real address")


def master(seen: Seen) -> Iterator[Finding]:
    """The others find the first host, and its two ports are free."""
    places, first, given = seen.section("place"), seen.hosts[0].name, seen.spec.master_addr
    if first not in places:
        return
    for port, why in (seen.fact(first, "ports", "faults") or {}).items():
        mend = f"give another --master_port (ss -ltnp 'sport = :{port}' there says who has it)"
        guards = "" if port == str(seen.spec.master_port) else ", the guards',"
        yield fail(first, f"port {port}{guards} cannot be listened on: {why}", mend)
    by_address = seen.launcher == "pdsh" and not given
    if by_address and (nowhere := _nowhere(places[first]["addresses"][:1])):
        says = f"`hostname -I` gives {nowhere}, which DeepSpeed takes as master address"
        yield fail(first, says, f"give --master_addr, an address of {first} that the others reach")
    # launch/deepspeed.sh gives the name; `deepspeed` alone asks for the address.
    status, name = warn if by_address else fail, given or seen.hosts[0].address
    for host, place in places.items():
        if host != first and (nowhere := _nowhere(place["master_addresses"])):
            mend = f"write {name} into DNS or /etc/hosts, or give rank 0's address as --master_addr (MASTER_ADDR)"
            yield status(host, f"the name {name} leads to {nowhere}", mend)
    yield well(f"port {seen.spec.master_port} and the next are free on {first}")


def bandwidth(seen: Seen) -> Iterator[Finding]:
    """Ranks start and meet as in training, and no host is much slower than the others."""
    measured = seen.bandwidth
    if seen.unmeasured:
        yield warn(HERE, seen.unmeasured, "fix that first")
    if measured is None:
        return
    for host, (what, mend) in measured.faults.items():
        yield fail(host, what, mend)
    says = f"all-reduce {size(measured.all_reduce)}/s, all-gather {size(measured.all_gather)}/s"
    if measured.pairs:
        rates_of, median = slow(measured.pairs)
        look = "look at its cable, link speed (ethtool, ibstat) and NCCL_SOCKET_IFNAME / NCCL_IB_HCA"
        for hosts, rate in rates_of.items():
            yield warn(hosts, f"{size(rate)}/s at best; the hosts' median is {size(median)}/s", look)
        rates = [rate for _, _, rate in measured.pairs]
        says += f", between two hosts {size(min(rates))}/s to {size(max(rates))}/s"
    yield well(says if measured.all_reduce else "a rank starts")


def clock(seen: Seen) -> Iterator[Finding]:
    """Clocks agree with the launching machine's: time stamps of files and logs, Slurm's and Kerberos' tickets."""
    for answer in seen.answers.values():
        if abs(answer.skew_s) > CLOCK_WARN_S:
            status = fail if abs(answer.skew_s) > CLOCK_FAIL_S else warn
            says = f"clock is at least {abs(answer.skew_s):.1f} s {'ahead' if answer.skew_s > 0 else 'behind'}"
            yield status(answer.host, says, "switch on time synchronisation: timedatectl set-ntp true")
    if seen.launcher != "local":
        yield well("the same, as far as can be seen")


def ulimits(seen: Seen) -> Iterator[Finding]:
    """Limits that data loading, sockets and RDMA run into."""
    where = "in /etc/security/limits.conf there (Slurm: slurmd's unit)"
    for host, facts in seen.section("limits").items():
        limits = facts["ulimits"]
        for name, option, least in LEAST_LIMITS:
            if limits[name] is not None and limits[name] < least:
                says = f"ulimit -{option} is {limits[name]}, below {least}"
                yield warn(host, says, f"set {name} to {least} or more {where}")
        fabric = seen.fact(host, "place", "infiniband")
        if fabric and limits["memlock"] is not None and limits["memlock"] < MIN_LOCKED_BYTES:
            says = f"ulimit -l is {size(limits['memlock'])}: RDMA over {fabric[0]} cannot pin its buffers"
            yield fail(host, says, f"set memlock to unlimited {where}")
    yield well("high enough")


def shm(seen: Seen) -> Iterator[Finding]:
    """/dev/shm holds what NCCL and data-loader workers put there."""
    frees = {host: facts["shm_bytes"] for host, facts in seen.section("limits").items()}
    for host, free in frees.items():
        wanted = seen.slots(host) * SHM_WARN_BYTES_A_SLOT
        if free < wanted:
            status, gib = fail if free < SHM_FAIL_BYTES else warn, -(-wanted >> 30)
            mend = f"give the container --shm-size={gib}g, or remount /dev/shm with size={gib}g"
            yield status(host, f"/dev/shm has {size(free)} free for {seen.slots(host)} slot(s)", mend)
    yield well(f"at least {size(min(frees.values(), default=0))} free")


def locks(seen: Seen) -> Iterator[Finding]:
    """No lock of a compilation that was killed: every later run waits on it without a word."""
    sections = seen.section("locks")
    # The folder may be shared: the compiler may run on another host.
    compiling = any(facts["compilers"] for facts in sections.values())
    for host, facts in sections.items():
        for lock in facts["locks"]:
            age, path = lock["age_s"], lock["path"]
            if age < YOUNG_LOCK_S or (compiling and age < OLDEST_LOCK_S):
                says = f"{path}, {age:.0f} s old: something is being compiled"
                yield warn(host, says, "wait for it; if no ninja or nvcc runs, remove the lock")
            else:
                says = f"{path}, {age:.0f} s old, and nothing compiles: every run waits on it for ever"
                yield fail(host, says, f"rm {path}")
    yield well("no stale lock")


def environment(seen: Seen) -> Iterator[Finding]:
    """Variables that matter reach the hosts, and are alike there."""
    found = {
        # PATH of another machine need not be ours; the interpreter goes by its full name.
        host: {name: value for name, value in variables.items() if is_wanted(name) and name != "PATH"}
        for host, variables in seen.section("variables").items()
    }
    mend = "python -m mirage_ds.cluster.environment --out FILE, and export DS_ENV_FILE=FILE, before `deepspeed`"
    for host, variables in found.items():
        lost = [name for name, value in seen.variables.items() if variables.get(name) != value]
        if lost:
            yield warn(host, f"{', '.join(lost)}: set here, not or otherwise there", mend)
    more = {host: {name: own[name] for name in own.keys() - seen.variables.keys()} for host, own in found.items()}
    fatal = len({own.get("DS_ACCELERATOR") for own in more.values()}) > 1
    yield from unlike(more, "set it alike on all hosts", fatal)
    yield well("alike")


def deepspeed_env(seen: Seen) -> Iterator[Finding]:
    """`.deepspeed_env` is what DeepSpeed's launcher and the hosts' shells can read."""
    for file, faults in seen.env_files.items():
        for fault in faults:
            yield refused(f"{file} {fault}")
    if seen.launcher == "pdsh":
        yield well(", ".join(map(str, seen.env_files)) or "none", HERE)


# In the order in which a job meets what they look at; a check's name is its function's.
_IN_ORDER = [ssh, probe, packages, code, gpus, host_name, master, bandwidth, clock, ulimits, shm, locks, environment]
_IN_ORDER += [deepspeed_env, model, data, shared_folder, disk, ds_config]
CHECKS = {check.__name__.replace("_", "-"): check for check in _IN_ORDER}
ORDER = {"fail": 0, "warn": 1, "pass": 2}


def run_checks(seen: Seen) -> list[Finding]:
    """Run the checks that are wanted; failures first, then warnings, then one pass a host."""
    findings = []
    for name, check in CHECKS.items():
        if not seen.spec.wants(name):
            continue
        found = [one._replace(check=name) for one in check(seen)]
        bad = [one for one in found if one.status != "pass"]
        # Hosts that did not answer are no part of a pass.
        findings += bad or [
            one._replace(host=host) for one in found for host in ([one.host] if one.host else seen.facts)
        ]
    return sorted(findings, key=lambda finding: ORDER[finding.status])
