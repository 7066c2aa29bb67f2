#!/usr/bin/env bash
# Train on this machine alone, one rank a GPU:
#
#     launch/local.sh --model … --stage … (the flags of mirage_ds.train, passed on as they are)
#
# Settings, by environment: MIRAGE_RANKS (the GPUs that nvidia-smi lists; needed where there are none), and MIRAGE_PYTHON,
# MIRAGE_JOB, MIRAGE_PORT, MIRAGE_LOGS, MIRAGE_GUARD, MIRAGE_MODULE as in deepspeed.sh; without MIRAGE_LOGS the ranks write
# to the terminal alone.
set -euo pipefail

python=${MIRAGE_PYTHON:-python}
job=${MIRAGE_JOB:-${USER:-user}-$$}
port=${MIRAGE_PORT:-$((20000 + $(printf %s "$job" | cksum | cut -d ' ' -f 1) % 6000 * 2))}
read -r -a more <<<"${MIRAGE_GUARD:-}"
ranks=${MIRAGE_RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "$ranks" -lt 1 ]; then
    echo "error: nvidia-smi lists no GPU; set MIRAGE_RANKS to the number of ranks (on a CPU also DS_ACCELERATOR=cpu)" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
logs=()
if [ -n "${MIRAGE_LOGS:-}" ]; then
    logs=(--logs "$MIRAGE_LOGS")
fi

guard=(--port $((port + 1)) --job "$job" "${more[@]}")
exec "$python" -m mirage_ds.cluster.guard.launch --master 127.0.0.1 "${guard[@]}" \
    "$python" -m deepspeed.launcher.runner --hostfile /nonexistent --num_accelerators "$ranks" --no_local_rank \
    --master_addr 127.0.0.1 --master_port "$port" \
    --module mirage_ds.cluster.guard "${guard[@]}" "${logs[@]}" "${MIRAGE_MODULE:-mirage_ds.train}" "$@"
