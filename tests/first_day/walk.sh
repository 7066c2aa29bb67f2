#!/usr/bin/env bash
# The first day of somebody with data of their own: from a folder of PNGs and a CSV to a model that is scored, asked and
# probed. Python of their own: scorer.py and compare.py (draw.py stands for the data that they have).
#
#     tests/first_day/walk.sh FOLDER        FOLDER is new; about three minutes on two quiet cores, no GPU
set -euo pipefail

mkdir "$1"
cp "$(dirname "$0")"/{draw,scorer,compare}.py "$1"
cd "$1"
python draw.py

columns=question=question,answer=answer,image=chart,helper=outlined
mirage-ds data check train.csv --columns "$columns"
mirage-ds data show train.csv --columns "$columns" --rows 2

mirage-ds init --preset nano-untied --text train.csv --columns "$columns" --out base

# A random model learns quickly and with its tower; a trained one wants --learning_rate 1e-5 and nothing of this.
random="--learning_rate 1.5e-3 --adam_beta2 0.98 --train_vision --no_gradient_checkpointing"
run="--data_path train.csv --columns $columns --global_batch_size 15 --log_every 10 $random"
mirage-ds train --stage sft --model base --epochs 10 --save_model_path sft $run
mirage-ds train --stage stage1 --model sft --epochs 3 --save_model_path stage1 $run
mirage-ds train --stage stage2 --model stage1 --epochs 5 --save_model_path stage2 $run

test="--data_path test.csv --columns $columns --task scorer:right --max_new_tokens 16"
mirage-ds evaluate stage2 $test --out scores.json
mirage-ds generate stage2 --prompt "<image>Which bar is the tallest?" --image test/000.png --max_new_tokens 16
mirage-ds controls stage2 $test --latents own,zero,swap,oracle --out controls.json
python compare.py
