#!/usr/bin/env bash
# All that a GPU is needed for, in order of worth and within a time: experiments/gpu.sh MINUTES [--data-dir DIR] [--jobs K]
# Call it again until it says that all runs are there; what is done is kept, and a run cut off goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=$1; shift
speed=experiments/results/gpu_speed.json
[ -e "$speed" ] || python benchmarks/speed.py --amp --compile --json "$speed"
python experiments/reproduce.py --scale=paper --budget="$minutes" "$@"
python experiments/report.py --scale=paper
