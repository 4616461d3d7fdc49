"""Draw what the attacks do: images, the perturbations of FGSM and ZeroGrad, and the entries that ZeroGrad zeroed.

    python experiments/sheet.py runs/cpu/NAME --out=sheet.png

draws test images under the last model of a finished run, whose arguments (data set, epsilon) are used.
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from definitions import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(ROOT))
import train_cifar
import train_cifar100
import train_svhn
from attacks import box, input_gradient, quantile_mask
from checkpoint import Folder, open_run
from data import load
from options import Parser, number
from utils import UsageError, whole_file

DATASETS = {module.DATASET.name: module.DATASET for module in (train_cifar, train_cifar100, train_svhn)}


def sheet(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, q: float) -> plt.Figure:
    """A column for each image of x (B, 3, H, W): the image, perturbations from zero of size epsilon, what q zeroes."""
    grad, _ = input_gradient(model.eval(), x, y, torch.zeros_like(x))
    kept = quantile_mask(grad, q)
    fgsm, zerograd = (box(epsilon * g.sign(), x, epsilon) for g in (grad, kept))
    rows = {
        "image": x,
        "gradient,\nroot of\nmagnitude": (grad.abs() / grad.abs().amax(dim=(1, 2, 3), keepdim=True)).sqrt(),
        "FGSM's\nperturbation": (fgsm / epsilon + 1) / 2,
        f"ZeroGrad's,\nq = {q:g}": (zerograd / epsilon + 1) / 2,
        "zeroed\n(white: in all\nchannels)": (kept == 0).float().mean(dim=1, keepdim=True).expand_as(x),
        "image with\nZeroGrad's": x + zerograd,
    }
    figure, axes = plt.subplots(len(rows), len(x), figsize=(1.1 * len(x) + 1, 1.15 * len(rows)), squeeze=False,
                                layout="constrained")
    for line, (name, images) in zip(axes, rows.items()):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for panel, image in zip(line, images):
            panel.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
    return figure


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("run", type=Path, help="the folder of a finished run")
    p.add_argument("--images", type=number(int, 1, 64), default=8, help="how many, from the first on")
    p.add_argument("--zero-qval", type=number(float, 0, 1), default=0.7, help="ZeroGrad's q")
    p.add_argument("--data-dir", help="torchvision's root (default: the run's)")
    p.add_argument("--out", type=Path, default=Path("sheet.png"), help="the picture")
    args = p.parse_args()
    try:
        if not (args.run / "args.json").exists():
            raise UsageError(f"{args.run} is not the folder of a run: it has no args.json")
        try:
            started = json.loads((args.run / "args.json").read_text())
            run, dataset = SimpleNamespace(**started["args"]), DATASETS[started["data_set"]]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{args.run / 'args.json'} is damaged") from None
        run.data_dir = args.data_dir or str(ROOT / os.path.expanduser(run.data_dir))  # reproduce.py starts runs in ROOT
        model = open_run(Folder(args.run).file("model", run.epochs - 1)).model
        x, y = load(dataset, run)[2].batch(slice(args.images))
    except UsageError as error:
        p.error(str(error))
    figure = sheet(model, x, y, run.epsilon / 255, args.zero_qval)
    commits = dict.fromkeys(str(start["commit"])[:12] for start in started["starts"])
    figure.suptitle(f"{args.run.resolve().name}, after epoch {run.epochs - 1}, commit {', '.join(commits)}", fontsize=8)
    try:
        with whole_file(args.out) as file:
            figure.savefig(file, format="png", metadata={"Software": None})
    except OSError as error:
        p.error(f"--out {args.out} cannot be written ({error.strerror})")
    print(args.out)


if __name__ == "__main__":
    main()
