#!/usr/bin/env bash
# Make the records of the examples, from the repository's root:
#
#     examples/7b/make_data.sh TASK…        vsp-spatial-planning vsp-spatial-reasoning blink-jigsaw sat comt
#     examples/7b/make_data.sh study        what study.yaml compares, on top of vsp-spatial-planning
#
# Files that are there are left alone. What has to be fetched before, by environment (nothing is downloaded here):
#     PHOTOS    blink-jigsaw: a folder of photographs of yours, about 1,250 for 1,000 training rows
#     BLINK     the same: BLINK's rows, to test on       hf download BLINK-Benchmark/BLINK --repo-type dataset …
#     SAT       SAT_train.parquet and SAT_val.parquet    hf download array/SAT --repo-type dataset …
#     SAT_V2    SAT-v2, 150 real rows, to test on        hf download array/SAT-v2 --repo-type dataset …
#     HELPERS   sat: your helper images, one a row, called as the row's id or its number from 0; without it sft alone
#     COMT      data.jsonl and images/                   hf download czh-up/comt --repo-type dataset …
#     MAPS      vsp-spatial-planning: a JSONL with map_desc, such as the 1,000 rows of train_direct.jsonl of
#               https://github.com/UMass-Embodied-AGI/Mirage, whose boards are trained on; without it random ones
set -euo pipefail

out=${OUT:-runs/7b}
tests=data/vsp_test_maps.sha256

# once FILE COMMAND…: run COMMAND --out FOLDER --name NAME, unless FOLDER/NAME.jsonl is there.
once() {
    local file=$1
    shift
    if [ -e "$file" ]; then
        echo "$file is there"
    else
        mirage-ds data "$@" --out "$(dirname "$file")" --name "$(basename "$file" .jsonl)"
    fi
}

planning() {
    local data=$out/vsp-spatial-planning/data
    local boards=(--count 1000)
    if [ -n "${MAPS:-}" ]; then
        boards=(--maps "$MAPS")
    fi
    # The public test maps and their rotations and reflections are never trained on, nor chosen by.
    once "$data/train.jsonl" build vsp-spatial-planning "${boards[@]}" --exclude "$tests"
    once "$data/dev.jsonl" build vsp-spatial-planning --split dev --count 200 --exclude "$tests"
    # Level 3 has too few boards to be tested on: with at most 20 % holes many are alike.
    once "$data/test.jsonl" build vsp-spatial-planning --split test --count 1000 --levels 4,5,6 --proportions 1,2,2
}

reasoning() {
    local data=$out/vsp-spatial-reasoning/data
    once "$data/train.jsonl" build vsp-spatial-reasoning --count 3000 --answer cot --exclude "$tests"
    once "$data/dev.jsonl" build vsp-spatial-reasoning --split dev --count 200 --answer cot --exclude "$tests"
    once "$data/test.jsonl" build vsp-spatial-reasoning --split test --count 1000 --answer cot --levels 4,5,6 \
        --proportions 1,2,2
}

jigsaw() {
    local data=$out/blink-jigsaw/data
    once "$data/train.jsonl" build blink-jigsaw --photos "${PHOTOS:?name a folder of photographs}" --count 1000
    once "$data/dev.jsonl" build blink-jigsaw --photos "$PHOTOS" --split dev
    if [ -n "${BLINK:-}" ]; then
        once "$data/test.jsonl" convert blink-jigsaw "$BLINK" --split val
    fi
}

sat() {
    local data=$out/sat/data
    local helpers=()
    if [ -n "${HELPERS:-}" ]; then
        helpers=(--helpers "$HELPERS")
    fi
    once "$data/train.jsonl" convert sat "${SAT:?name the folder with SAT_train.parquet}" --split train --count 1000 \
        "${helpers[@]}"
    once "$data/test.jsonl" convert sat "$SAT" --split val --count 500
    if [ -n "${SAT_V2:-}" ]; then
        once "$data/test_real.jsonl" convert sat "$SAT_V2" --split test --question_types all
    fi
}

comt() {
    local data=$out/comt/data
    once "$data/train.jsonl" convert comt "${COMT:?name the folder with data.jsonl and images/}" --split train
    once "$data/test.jsonl" convert comt "$COMT" --split test
}

study() {
    planning
    local data=$out/vsp-spatial-planning/data
    for kind in helper-swap helper-noise helper-rows helper-text helper-input; do
        once "$data/$kind/train.jsonl" vary "$kind" "$data/train.jsonl"
    done
    # With the answer's path as an input: what the helper's information is worth if it is simply given.
    once "$data/helper-input/test.jsonl" vary helper-input "$data/test.jsonl"
}

if [ $# -lt 1 ]; then
    echo "usage: $0 TASK…; see the first lines of this file" >&2
    exit 2
fi
for task in "$@"; do
    case $task in
    vsp-spatial-planning) planning ;;
    vsp-spatial-reasoning) reasoning ;;
    blink-jigsaw) jigsaw ;;
    sat) sat ;;
    comt) comt ;;
    study) study ;;
    *)
        echo "error: no task $task; the first lines of $0 list them" >&2
        exit 2
        ;;
    esac
done
