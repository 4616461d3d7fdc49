"""See catastrophic overfitting: train with FGSM from zero and N-FGSM at epsilon 16/255, and draw accuracy over epochs.

    python experiments/demo.py --data-dir=../cifar-data

The command trains a narrow network twice: 8 epochs on 5,000 images of CIFAR-10, which it downloads if they are missing.
It trains in bfloat16 if the CPU has bfloat16 instructions and there is a C++ compiler. It prints the epochs of both
runs and a row for each, and writes the figure runs/SCALE/demo.png. The same command continues after an interruption.
"""
import subprocess
import sys
from pathlib import Path

from definitions import ROOT, experiments
from reproduce import default_scale

sys.path.insert(0, str(ROOT))
from singlestep.options import Parser, number, path


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--data-dir", type=path, help="folder of the data set (default: that of train_cifar.py)")
    p.add_argument("--scale", choices=("demo", "demo-bf16", "smoke"), help="demo: float32; demo-bf16: bfloat16, "
                   "compiled; smoke: seconds, on synthetic images (default: demo-bf16 on a CPU with bfloat16 "
                   "instructions and a C++ compiler, else demo)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="seed of both runs")
    p.add_argument("--runs", type=path, default="runs", help="folder of the runs and the figure")
    args = p.parse_args()
    scale = args.scale or ("demo-bf16" if default_scale() == "cpu-bf16" else "demo")
    data = [f"--data-dir={args.data_dir}"] if args.data_dir else []
    runs = []
    for experiment in experiments(["demo"], scale, (args.seed,)):
        runs.append(str(Path(args.runs, scale, experiment.name)))
        start(*experiment.command, *data, "--resume=auto", f"--fname={runs[-1]}")
    start("plot.py", *runs, "--y=train_robust_acc,test_robust_acc", f"--out={Path(args.runs, scale, 'demo.png')}")


def start(script: str, *flags: str) -> None:
    """Run a script of the project. Exits with its status if it fails."""
    status = subprocess.run([sys.executable, str(ROOT / script), *flags]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
