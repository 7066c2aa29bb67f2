#!/usr/bin/env bash
# Train on the hosts of a hostfile, started by OpenMPI's mpirun:
#
#     launch/mpi.sh HOSTFILE --model … --stage … (the flags of mirage_ds.train, passed on as they are)
#
# Settings, by environment: as in deepspeed.sh, and MIRAGE_MPI, more options of mpirun.
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
read -r -a mpi <<<"${MIRAGE_MPI:-}"
place=$("$python" -m mirage_ds.cluster.hosts "$hostfile")
read -r master ranks <<<"$place"
mkdir -p "$logs"

export MASTER_ADDR=$master MASTER_PORT=$port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# mpirun carries only the variables that it is told.
"$python" -m mirage_ds.cluster.environment --out "$logs/mpi_env"
exports=(-x MASTER_ADDR -x MASTER_PORT)
while IFS='=' read -r name _; do
    if [ -n "${!name+set}" ]; then
        exports+=(-x "$name")
    fi
done <"$logs/mpi_env"
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

guard=(--port $((port + 1)) --job "$job" "${more[@]}")
# --bind-to none: otherwise the ranks of every host share its first cores.
exec "$python" -m mirage_ds.cluster.guard.launch --master "$master" "${guard[@]}" \
    mpirun --hostfile "$hostfile" -np "$ranks" --bind-to none \
    --mca plm_rsh_args "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3" \
    "${exports[@]}" "${mpi[@]}" \
    "$python" -m mirage_ds.cluster.guard "${guard[@]}" --logs "$(realpath "$logs")" "${MIRAGE_MODULE:-mirage_ds.train}" "$@"
