#!/usr/bin/env bash
# What each pod of kubernetes.yaml runs; it works wherever somebody starts the same command on every host:
#
#     NODES=2 NODE_RANK=0 SLOTS=8 MASTER_ADDR=host0 launch/pod.sh --model … (flags of mirage_ds.train, passed on as they are)
#
# Settings, by environment: NODES, NODE_RANK (JOB_COMPLETION_INDEX under Kubernetes), SLOTS (ranks a host), MASTER_ADDR
# (the host with NODE_RANK 0), MASTER_PORT [29500]; MIRAGE_PYTHON, MIRAGE_JOB, MIRAGE_LOGS, MIRAGE_GUARD, MIRAGE_MODULE as
# in deepspeed.sh.
set -euo pipefail

python=${MIRAGE_PYTHON:-python}
node_rank=${NODE_RANK:-${JOB_COMPLETION_INDEX:?set NODE_RANK}}
port=${MASTER_PORT:-29500}
job=${MIRAGE_JOB:-mirage-ds}
read -r -a more <<<"${MIRAGE_GUARD:-}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# Nobody connects to these names: DeepSpeed counts hosts and slots by them.
hostfile=$(mktemp)
for ((node = 0; node < ${NODES:?}; node++)); do
    echo "node$node slots=${SLOTS:?}"
done >"$hostfile"

guard=(--port $((port + 1)) --job "$job" "${more[@]}")
exec "$python" -m mirage_ds.cluster.guard.launch --master "${MASTER_ADDR:?}" "${guard[@]}" \
    "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --no_local_rank \
    --log_level "${MIRAGE_LOG_LEVEL:-critical}" \
    --master_addr "$MASTER_ADDR" --master_port "$port" \
    --module mirage_ds.cluster.guard "${guard[@]}" --logs "${MIRAGE_LOGS:-runs/logs/$job}" \
    "${MIRAGE_MODULE:-mirage_ds.train}" "$@"
