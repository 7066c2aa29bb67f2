#!/usr/bin/env bash
# Train on the hosts of a hostfile, started by ssh (pdsh):
#
#     launch/deepspeed.sh HOSTFILE --model … --stage … (the flags of mirage_ds.train, passed on as they are)
#
# Settings, by environment (docs/launch.md says more):
#     MIRAGE_PYTHON   the interpreter, at the same path on every host          [python]
#     MIRAGE_JOB      the job's name; two jobs of one name collide             [user-process id]
#     MIRAGE_PORT     this port and the next one are used on the first host    [from the job's name]
#     MIRAGE_LOGS     folder of rank<N>.log                                    [runs/logs/JOB]
#     MIRAGE_GUARD    more options of the guards, such as "--hang 300"
#     MIRAGE_MODULE   what runs as a rank                                      [mirage_ds.train]
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 HOSTFILE FLAGS…; see launch/hostfile.example" >&2
    exit 2
fi
hostfile=$1
shift
python=${MIRAGE_PYTHON:-python}
job=${MIRAGE_JOB:-${USER:-user}-$$}
port=${MIRAGE_PORT:-$((20000 + $(printf %s "$job" | cksum | cut -d ' ' -f 1) % 6000 * 2))}
logs=${MIRAGE_LOGS:-runs/logs/$job}
read -r -a more <<<"${MIRAGE_GUARD:-}"
place=$("$python" -m mirage_ds.cluster.hosts "$hostfile")
read -r master _ <<<"$place"
mkdir -p "$logs"

# What ssh does not carry; a .deepspeed_env of your own is read too, and wins.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
DS_ENV_FILE=$(realpath "$logs")/deepspeed_env
export DS_ENV_FILE
"$python" -m mirage_ds.cluster.environment --out "$DS_ENV_FILE"
# Without this an ssh whose host is gone waits for ever.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"

# A shell on each host reads the flags again: percent-encoded, it finds nothing to change.
mapfile -t flags < <("$python" -c '
import sys, urllib.parse
print("\n".join(urllib.parse.quote(word, safe="/=,:@+") for word in sys.argv[1:]))' "$@")
# exec would hand it to the guard, as a child that nobody waits for.
wait "$!"

guard=(--port $((port + 1)) --job "$job" "${more[@]}")
exec "$python" -m mirage_ds.cluster.guard.launch --master "$master" "${guard[@]}" \
    "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi --no_local_rank \
    --log_level "${MIRAGE_LOG_LEVEL:-critical}" \
    --master_addr "$master" --master_port "$port" \
    --module mirage_ds.cluster.guard "${guard[@]}" --logs "$(realpath "$logs")" --quoted \
    "${MIRAGE_MODULE:-mirage_ds.train}" "${flags[@]}"
