#!/usr/bin/env bash
# The data of the study of learned targets (docs/study2_plan.md), into the folder given, for so many bases.
set -euo pipefail
out=${1:?usage: make_data.sh FOLDER [BASES]}
bases=${2:-24}
here=$(cd "$(dirname "$0")" && pwd)
public=$here/../../data/vsp_test_maps.sha256
mkdir -p "$out"
cd "$out"

# The board at 28 px a cell is one merged token a cell. The public test maps, rotated and reflected too, are left out.
planning() { mirage-ds data build vsp-spatial-planning --cell_size 28 --prompt short --ties random --exclude "$public" "$@"; }
# Drawn paths to read beside another map's board: as latents, and as a picture of the question.
reading() {
    python "$here/reading_rows.py" "$1/data.jsonl" --out "$1-read"
    mirage-ds data vary helper-input "$1-read/data.jsonl" --out "$1-shown"
}

planning --levels 3,4 --proportions 1,39 --count 6000 --seed 10 --out small
planning --levels 4,5,6 --proportions 1,5,10 --count 8000 --seed 20 --out large
for maps in small large; do reading "$maps"; done

# Of each base: weights, and 1,000 maps to learn planning from, with what the exploratory arms get in place of the path.
for base in $(seq 0 $((bases - 1))); do
    mirage-ds init --preset nano-untied --seed "$base" --text large/data.jsonl --out "nano-$base"
    planning --levels 4,5,6 --proportions 2,3,4 --count 1000 --seed "$((100 + base))" --out "train-$base"
    ((base < 12)) || continue
    mirage-ds data vary helper-swap "train-$base/data.jsonl" --out "swapped-$base" --seed "$base"
    mirage-ds data vary helper-text "train-$base/data.jsonl" --out "caption-$base"
    python "$here/letters.py" "train-$base/data.jsonl" --out "letters-$base"
done

# For choices and gates; and for the report, maps that nobody has looked at before.
planning --levels 5,6 --proportions 1,1 --count 1000 --seed 31 --split dev --out dev
reading dev
planning --levels 5,6 --proportions 1,1 --count 2000 --seed 40 --split test --out test
