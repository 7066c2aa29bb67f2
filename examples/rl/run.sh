#!/usr/bin/env bash
# The whole reinforcement study (docs/study_rl.md) in FOLDER; may be stopped or killed at any time: the same command goes on.
set -euo pipefail
folder=${1:?usage: run.sh FOLDER [what make_data.sh takes]} here=$(cd "$(dirname "$0")" && pwd)
"$here/make_data.sh" "$@"
for file in rl.yaml rewards.py; do [ -e "$folder/$file" ] || cp "$here/$file" "$folder"; done
cd "$folder"
mirage-ds ablate run rl.yaml --arms base,words
python "$here/gate.py" rl.yaml
# 1: some run failed for good; the report names it.
mirage-ds ablate run passed.yaml || test $? = 1
mirage-ds ablate report rl.yaml --out report
mirage-ds ablate report passed.yaml --out report-passed
python "$here/gains.py" report/report.csv report-passed/report.csv | tee gains.md
