#!/usr/bin/env bash
# All that a GPU is needed for, in order of worth and within a time: experiments/gpu.sh MINUTES [--data-dir DIR] [--jobs K]
# Call it again until it says that all runs are there; what is done is kept, and a run cut off goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=$1; shift
for mode in default reduce-overhead; do
    speed=benchmarks/results/gpu_bfloat16_$mode.json
    [ -e "$speed" ] || python benchmarks/speed.py --amp --compile --compile-mode "$mode" --json "$speed" || true
done
python experiments/reproduce.py --scale=paper --budget="$minutes" "$@"
python experiments/report.py --scale=paper
