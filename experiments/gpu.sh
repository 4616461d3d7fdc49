#!/usr/bin/env bash
# Speed and tables at the paper's scale on a GPU, in order of worth and within a time:
#     experiments/gpu.sh MINUTES [--data-dir DIR] [--jobs K]      (a relative DIR is taken from the project's folder)
# Call it again until all runs are there; what is done is kept, and a run cut off goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} =~ ^[0-9]+$ ]] || { echo "gpu.sh: MINUTES must be a whole number, not '${1:-}'" >&2; exit 2; }
time=$((60 * $1)) end=$((SECONDS + 60 * $1)); shift
for mode in default reduce-overhead; do
    speed=benchmarks/results/gpu_bfloat16_$mode.json
    [ -e "$speed" ] || timeout --foreground $((time / 6 + 1)) python benchmarks/speed.py --device cuda --amp --compile \
        --compile-mode "$mode" --json "$speed" || echo "$mode: not all was measured; $speed has what was, if any" >&2
done
status=0
python experiments/reproduce.py --scale=paper --budget="$(((end - SECONDS) > 0 ? (end - SECONDS) / 60 : 0))" "$@" || status=$?
python experiments/report.py --scale=paper || true  # there may be no results yet
exit $status
