"""Checks of the hosts themselves: reached, named, timed, limited. Each is a function of the facts."""

from __future__ import annotations

import ipaddress

from mirage_ds.cluster.doctor.finding import HERE, Bad, Seen, Verdict, fail, size, unlike, warn
from mirage_ds.cluster.environment import is_wanted, lint

CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 60.0
MIN_FILES, MIN_PROCESSES = 4096, 4096
MIN_LOCKED_BYTES = 1 << 30
SHM_FAIL_BYTES, SHM_WARN_BYTES_A_SLOT = 256 << 20, 1 << 30
# A lock this young may belong to a compiler that is just starting.
YOUNG_LOCK_S = 120.0
# Compilations of DeepSpeed's operators end within minutes.
OLDEST_LOCK_S = 3600.0


def ssh(seen: Seen) -> Verdict:
    """Every host can be asked, without a password, with a known key; the launcher's own tool is there."""
    bad = [fail(answer.host, answer.fault, answer.mend) for answer in seen.answers.values() if answer.fault]
    if seen.plan.launcher == "pdsh" and not seen.here.pdsh:
        bad.append(warn(HERE, "pdsh is not installed", "install it, or give `deepspeed` another --launcher"))
    return "all answer" if seen.plan.launcher != "local" else "this machine", bad


def probe(seen: Seen) -> Verdict:
    """The working directory is there, and every section of the probe says something."""
    bad: list[Bad] = []
    for host, facts in seen.facts.items():
        if "cwd" in facts:
            says = f"cannot enter the working directory: {facts['cwd']}"
            bad.append(fail(host, says, "start the job in a folder that every host sees under the same path"))
        for section, why in facts.get("errors", {}).items():
            bad.append(warn(host, f"{section}: cannot be found out ({why})", "mend that, or look by hand"))
    return None, bad


def clock(seen: Seen) -> Verdict:
    """Clocks agree with the launching machine's: time stamps of files and logs, Slurm's and Kerberos' tickets."""
    bad, worst = [], 0.0
    for answer in seen.answers.values():
        if answer.offset_s is None:
            continue
        # What the round trip leaves open is to the host's credit.
        skew = abs(answer.offset_s) - answer.error_s
        worst = max(worst, abs(answer.offset_s) + answer.error_s)
        if skew > CLOCK_WARN_S:
            status = fail if skew > CLOCK_FAIL_S else warn
            where = "ahead" if answer.offset_s > 0 else "behind"
            says = f"clock is {abs(answer.offset_s):.1f} s {where} (± {answer.error_s:.2f} s)"
            bad.append(status(answer.host, says, "switch on time synchronisation: timedatectl set-ntp true"))
    return f"{worst:.2f} s apart at most" if seen.plan.launcher != "local" else None, bad


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def host_name(seen: Seen) -> Verdict:
    """Each host's own name leads to it from elsewhere, and no two hosts are the same machine."""
    places, bad = seen.section("place"), []
    named: dict[str, str] = {}
    for host, place in places.items():
        if place["hostname"] in named:
            says = f"is called {place['hostname']}, as {named[place['hostname']]} is: the same machine twice?"
            bad.append(warn(host, says, "give a machine one line in the hostfile, with all its slots"))
        named.setdefault(place["hostname"], host)
        own = place["own_addresses"]
        chosen = "GLOO_SOCKET_IFNAME" in seen.section("variables").get(host, {})
        if seen.on_cpu(host) and not chosen and all(map(_is_loopback, own)):
            says = f"its own name {place['hostname']} leads to {', '.join(own) or 'nothing'}: gloo will listen there"
            mend = "write its real address into its /etc/hosts, or set GLOO_SOCKET_IFNAME to its interface"
            bad.append(fail(host, says, mend))
    return ("leads to a real address", bad) if len(seen.hosts) > 1 else (None, [])


def master(seen: Seen) -> Verdict:
    """The others find the first host, and its port is free."""
    places = seen.section("place")
    first = seen.hosts[0].name
    if first not in places:
        return None, []
    bad, plan = [], seen.plan
    fault = seen.section("port").get(first, {}).get("fault")
    if fault:
        mend = f"give another --master_port (ss -ltnp 'sport = :{plan.master_port}' there says who has it)"
        bad.append(fail(first, f"port {plan.master_port} cannot be listened on: {fault}", mend))
    listed = places[first]["addresses"]
    if plan.launcher == "pdsh" and not plan.master_addr and (not listed or _is_loopback(listed[0])):
        says = f"`hostname -I` gives {listed[0] if listed else 'nothing'}, which DeepSpeed takes as master address"
        bad.append(fail(first, says, f"give --master_addr, an address of {first} that the others reach"))
    # launch/deepspeed.sh gives the name; `deepspeed` alone asks for the address.
    status = warn if plan.launcher == "pdsh" and not plan.master_addr else fail
    name = plan.master_addr or seen.hosts[0].address
    for host, place in list(places.items())[1:]:
        address = place["master_address"]
        if address is None or _is_loopback(address):
            mend = f"write {name} into DNS or /etc/hosts, or give rank 0's address as --master_addr (MASTER_ADDR)"
            bad.append(status(host, f"the name {name} leads to {address or 'nothing'}", mend))
    return f"port {plan.master_port} is free on {first}", bad


def ulimits(seen: Seen) -> Verdict:
    """Limits that data loading, sockets and RDMA run into."""
    bad = []
    for host, facts in seen.section("limits").items():
        limits = facts["ulimits"]
        for name, option, least in (("nofile", "n", MIN_FILES), ("nproc", "u", MIN_PROCESSES)):
            if limits[name] is not None and limits[name] < least:
                mend = f"set {name} to {least} or more in /etc/security/limits.conf there (Slurm: slurmd's unit)"
                bad.append(warn(host, f"ulimit -{option} is {limits[name]}, below {least}", mend))
        fabric = seen.section("place").get(host, {}).get("infiniband")
        if fabric and limits["memlock"] is not None and limits["memlock"] < MIN_LOCKED_BYTES:
            says = f"ulimit -l is {size(limits['memlock'])}: RDMA over {fabric[0]} cannot pin its buffers"
            bad.append(
                fail(host, says, "set memlock to unlimited in /etc/security/limits.conf there (Slurm: slurmd's unit)")
            )
    return "high enough", bad


def shm(seen: Seen) -> Verdict:
    """/dev/shm holds what NCCL and data-loader workers put there."""
    bad, least = [], float("inf")
    slots = {host.name: host.slots for host in seen.hosts}
    for host, facts in seen.section("limits").items():
        free, wanted = facts["shm_bytes"], slots[host] * SHM_WARN_BYTES_A_SLOT
        least = min(least, free)
        if free < wanted:
            status = fail if free < SHM_FAIL_BYTES else warn
            mend = (
                f"give the container --shm-size={-(-wanted >> 30)}g, or remount /dev/shm with size={-(-wanted >> 30)}g"
            )
            bad.append(status(host, f"/dev/shm has {size(free)} free for {slots[host]} slot(s)", mend))
    return f"at least {size(least)} free", bad


def locks(seen: Seen) -> Verdict:
    """No lock of a compilation that was killed: every later run waits on it without a word."""
    sections, bad = seen.section("locks"), []
    # The folder may be shared: the compiler may run on another host.
    compiling = any(facts["compilers"] for facts in sections.values())
    for host, facts in sections.items():
        for lock in facts["locks"]:
            age, path = lock["age_s"], lock["path"]
            if age < YOUNG_LOCK_S or (compiling and age < OLDEST_LOCK_S):
                says = f"{path}, {age:.0f} s old: something is being compiled"
                bad.append(warn(host, says, "wait for it; if no ninja or nvcc runs, remove the lock"))
            else:
                says = f"{path}, {age:.0f} s old, and nothing compiles: every run waits on it for ever"
                bad.append(fail(host, says, f"rm {path}"))
    return "no stale lock", bad


def environment(seen: Seen) -> Verdict:
    """Variables that matter reach the hosts, and are alike there."""
    bad: list[Bad] = []
    found = {
        host: {name: value for name, value in variables.items() if is_wanted(name)}
        for host, variables in seen.section("variables").items()
    }
    here = seen.here.variables if seen.plan.launcher == "pdsh" else {}
    mend = "python -m mirage_ds.cluster.environment --out FILE, and export DS_ENV_FILE=FILE, before `deepspeed`"
    for host, variables in found.items():
        # PATH of another machine need not be ours; the interpreter goes by its full name.
        lost = [name for name in here if name != "PATH" and variables.get(name) != here[name]]
        if lost:
            bad.append(warn(host, f"{', '.join(lost)}: set here, not or otherwise there", mend))
    names = sorted({name for variables in found.values() for name in variables} - here.keys() - {"PATH"})
    for name in names:
        values = {host: variables.get(name) for host, variables in found.items()}
        for host, value, first in unlike(values):
            status = fail if name == "DS_ACCELERATOR" else warn
            says = f"{name} is {value or 'not set'}, on {next(iter(values))} {first or 'not set'}"
            bad.append(status(host, says, "set it alike on all hosts"))
    return "alike", bad


def deepspeed_env(seen: Seen) -> Verdict:
    """`.deepspeed_env` is what DeepSpeed's launcher and the hosts' shells can read."""
    if seen.plan.launcher != "pdsh":
        return None, []
    bad = []
    for file, text in seen.here.env_files.items():
        for fault in lint(text):
            status = fail if fault.fatal else warn
            bad.append(status(HERE, f"{file} line {fault.line}: {fault.what}", fault.how))
    return ", ".join(map(str, seen.here.env_files)) or "none", bad
