#!/usr/bin/env bash
# For anyone with one GPU and an hour. All files go to the folder OUT.
#     experiments/gpu.sh OUT probe    what steps and evaluations take, without data; OUT/probe.jsonl, a line an item
#     experiments/gpu.sh OUT table    the tables at the scale `paper`, the paper's commands first; OUT/report/paper.md
# After an hour (--budget=MINUTES), the runs of `table` save and stop; the same command continues. Other flags go to
# probe.py or reproduce.py (--data-dir=DIR, --jobs=3). With --dummy behind the word, both need no GPU and no data, and
# only show that they work.
set -euo pipefail
here=$(dirname "$0") out=${1:-} what=${2:-}
[[ $out && $what =~ ^(probe|table)$ ]] || { echo "gpu.sh: use experiments/gpu.sh OUT probe or OUT table" >&2; exit 2; }
shift 2
[ "$what" = table ] || exec python3 "$here/probe.py" "$out" "$@"
scale=paper tables='' status=0
[ "${1:-}" != --dummy ] || { scale=smoke tables=paper; shift; }
python3 "$here/reproduce.py" $tables --scale=$scale --budget=60 --runs="$out/runs" --results="$out/results" "$@" ||
    status=$?
[ ! -e "$out/results/$scale" ] || python3 "$here/report.py" --scale=$scale --results="$out/results" --out="$out/report"
exit $status
