#!/usr/bin/env bash
# The data of the planning study (docs/study.md), into the folder given: some two minutes on two cores.
set -euo pipefail
out=${1:?usage: make_data.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
public=$here/../../data/vsp_test_maps.sha256
mkdir -p "$out"
cd "$out"

# The board at 28 px a cell is one merged token a cell. The public test maps, rotated and reflected too, are left out.
style=(--cell_size 28 --prompt short --exclude "$public")
build() { mirage-ds data build "$@" "${style[@]}"; }

# The bases: maps to copy, and other maps' helpers to read a path from. Levels 4 to 6; never the same map in both.
for seed in 0 1 2; do
    build vsp-transcription --levels 4,5,6 --proportions 1,5,10 --count 16000 --seed "1$seed" --out "copy$seed"
    build vsp-spatial-planning --levels 4,5,6 --proportions 1,5,10 --count 16000 --seed "2$seed" --ties random \
        --out "read$seed"
    python "$here/base_rows.py" "copy$seed/data.jsonl" "read$seed/data.jsonl" --out "base$seed"
    mirage-ds init --preset nano-untied --seed "$seed" --text "base$seed/data.jsonl" --out "nano-$seed"
done

# The arms, and what choices are made on.
build vsp-spatial-planning --levels 4,5,6 --proportions 2,3,4 --count 1000 --seed 30 --ties random --out train
build vsp-spatial-planning --levels 5,6 --proportions 1,1 --count 1000 --seed 31 --ties random --split dev --out dev
mirage-ds data vary helper-swap train/data.jsonl --out swapped --seed 32

# The gates: the helper as an input, no picture at all, and the bases' own task on unseen maps.
build vsp-spatial-planning --levels 4,5,6 --proportions 2,3,4 --count 3000 --seed 33 --ties random --out wide
mirage-ds data vary helper-input wide/data.jsonl --out wide-helper
mirage-ds data vary helper-input dev/data.jsonl --out dev-helper
for split in train dev; do mirage-ds data vary no-image "$split/data.jsonl" --out "$split-blind"; done
build vsp-transcription --levels 5,6 --proportions 1,1 --count 1000 --seed 34 --split dev --out dev-copy
build vsp-spatial-planning --levels 5,6 --proportions 1,1 --count 1000 --seed 35 --ties random --split dev --out dev-other
python "$here/base_rows.py" dev-copy/data.jsonl dev-other/data.jsonl --out dev-read

# What the report is made of: maps that nobody has looked at before.
build vsp-spatial-planning --levels 5,6 --proportions 1,1 --count 4000 --seed 40 --ties random --split test --out test
