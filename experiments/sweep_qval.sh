#!/usr/bin/env bash
# ZeroGrad over its quantile, one run after another; QS lists the values. Call it again after an interruption: finished
# runs are kept, an interrupted one continues. Flags given to it are passed on, the later of two the stronger:
#     QS="0 0.35 0.7" experiments/sweep_qval.sh --epochs=5 --base-width=16 --data-dir="$HOME/data"
# (relative paths are taken from the project's folder). The run of value Q is in runs/zerograd_qQ. At the end, plot.py
# compares the runs, and draws them in runs/zerograd_q.png where matplotlib is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=() out=
for q in ${QS:-0 0.2 0.35 0.5 0.7 0.9}; do
    python train_cifar.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=zerograd --zero-qval="$q" \
        --resume=auto --fname="runs/zerograd_q$q" "$@"
    runs+=("runs/zerograd_q$q")
done
if python -c "import matplotlib" 2>/dev/null; then out=--out=runs/zerograd_q.png; fi
python plot.py "${runs[@]}" $out
