#!/usr/bin/env bash
# Train on this machine alone, one rank a GPU; the same as `mirage-ds train`:
#
#     launch/local.sh --model … --stage … (the flags of mirage_ds.train, passed on as they are)
#
# Settings, by environment: MIRAGE_RANKS (one for each GPU, 2 without a GPU), and MIRAGE_PYTHON, MIRAGE_JOB, MIRAGE_PORT,
# MIRAGE_LOGS, MIRAGE_GUARD, MIRAGE_LOG_LEVEL as in deepspeed.sh; without MIRAGE_LOGS the ranks write to the terminal alone.
set -euo pipefail

exec "${MIRAGE_PYTHON:-python}" -m mirage_ds train "$@"
