#!/usr/bin/env bash
# The records of the recipe, into the folder given: two minutes on two cores.
set -euo pipefail
out=${1:?usage: make_data.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
cd "$out"

# The board at 28 px a cell is one merged token a cell. The public test maps, rotated and reflected too, are left out.
build() {
    mirage-ds data build "$@" --cell_size 28 --prompt short --exclude "$here/../../data/vsp_test_maps.sha256"
}

# There are 228 different boards of level 3 to train on, hence its small share.
# What the model learns to see on: maps to copy, and other maps' helpers to read a path from.
build vsp-transcription --levels 3,4,5,6 --proportions 0.2,3,6,10 --count 16000 --seed 1 --out copy
build vsp-spatial-planning --levels 3,4,5,6 --proportions 0.2,3,6,10 --count 16000 --seed 2 --ties random --out read
python "$here/../study/base_rows.py" copy/data.jsonl read/data.jsonl --out base
mirage-ds init --preset nano-untied --seed 0 --text base/data.jsonl --out nano

# What it learns to plan on, and maps that it never sees. Of level 3 the test split has 16.
build vsp-spatial-planning --levels 3,4,5,6 --proportions 0.2,3,6,10 --count 20000 --seed 3 --out train
build vsp-spatial-planning --levels 3,4,5,6 --proportions 1,25,25,25 --count 1216 --seed 4 --split test --out test
