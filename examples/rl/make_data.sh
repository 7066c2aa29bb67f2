#!/usr/bin/env bash
# The data of the reinforcement study (docs/study_rl.md), into the folder given; what is there stays.
#   make_data.sh FOLDER [BASES] [TRAIN] [PROMPTS] [GATE] [TEST]
set -euo pipefail
out=${1:?usage: make_data.sh FOLDER} bases=${2:-6} train=${3:-10000} prompts=${4:-1600} gate=${5:-400} test=${6:-2100}
public=$(cd "$(dirname "$0")" && pwd)/../../data/vsp_test_maps.sha256
mkdir -p "$out"
cd "$out"

# Whole or not at all: a folder gets its name once everything is in it.
build() {
    local name=$1
    [ -e "$name" ] && return
    rm -rf "$name.part"
    mirage-ds data build vsp-spatial-planning --cell_size 28 --prompt short --exclude "$public" \
        --out "$name.part" "${@:2}"
    mv "$name.part" "$name"
}

build train --levels 3,4 --proportions 1,49 --count "$train" --seed 2000
for one in "prompts $prompts 2001 train" "gate $gate 2002 dev" "test $test 2003 test"; do
    read -r name count seed split <<<"$one"
    build "$name" --levels 4,5,6 --proportions 1,1,1 --count "$count" --seed "$seed" --split "$split"
done
for seed in $(seq 0 $((bases - 1))); do
    [ -e "nano-$seed/config.json" ] && continue
    rm -rf "nano-$seed"
    mirage-ds init --preset nano --seed "$seed" --text train/data.jsonl --out "nano-$seed"
done
