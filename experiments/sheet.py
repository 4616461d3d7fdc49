"""Draw images, the perturbations of FGSM and ZeroGrad, and the entries that ZeroGrad zeroed.

    python experiments/sheet.py runs/cpu/NAME --out=sheet.png

The command draws test images and attacks the last network of a finished run, with the data set and epsilon of the run.
Below each image: its class and the network's prediction. Below each perturbed image: the prediction. Wrong predictions
are bold.
"""
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from definitions import ROOT

sys.path.insert(0, str(ROOT))
from singlestep import options
from singlestep.attacks import box, input_gradient, quantile_mask
from singlestep.checkpoints import open_run
from singlestep.data import load
from singlestep.figures import own_style, save, subplots
from singlestep.options import Parser, number, path
from singlestep.run.console import UsageError, one_line_errors, say
from singlestep.run.folder import Folder


def class_names(dataset: options.DataSet, args) -> list[str]:
    """Return the class names from the data set's files; without names, the class numbers."""
    source = getattr(torchvision.datasets, str(dataset.source), None)
    if args.dummy or not hasattr(source, "meta"):
        return [str(label) for label in range(dataset.classes)]
    with open(Path(args.data_dir) / source.base_folder / source.meta["filename"], "rb") as file:
        return pickle.load(file)[source.meta["key"]]


@own_style()
def sheet(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, q: float, names: list[str]) -> Any:
    """Draw a column for each image of x (B, 3, H, W): image, gradient, perturbations from zero, zeroed entries."""
    grad, logits = input_gradient(model.eval(), x, y, torch.zeros_like(x))
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
    figure, axes = subplots(len(rows), len(x), figsize=(1.1 * len(x) + 1, 1.15 * len(rows) + 0.5), squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for panel, image in zip(line, images):
            panel.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            panel.spines[:].set_visible(False)
    with torch.no_grad():
        answers = logits.argmax(1), model(x + zerograd).argmax(1)
    for line, found, above in zip((axes[0], axes[-1]), answers, ("{}\n", "")):
        for panel, label, answer in zip(line, y.tolist(), found.tolist()):
            panel.set_xlabel(f"{above.format(names[label])}taken for\n{names[answer]}", fontsize=7,
                             weight="normal" if answer == label else "bold")
    return figure


def read(folder: Path, data_dir: str | None) -> tuple[Any, dict[str, Any]]:
    """Return the run's arguments, with data_dir resolved, and the content of its args.json."""
    if not (folder / "args.json").exists():
        raise UsageError(f"{folder} is not the folder of a run: it has no args.json")
    try:
        started = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        run, _ = SimpleNamespace(**options.run_flags(folder)), [start["commit"] for start in started["starts"]]
        recorded = os.path.expanduser(started["args"]["data_dir"])
        run.data_dir = data_dir or str(ROOT / recorded)  # reproduce.py starts runs in ROOT
        return run, started
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{folder / 'args.json'} is damaged") from None


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("run", type=path, help="the folder of a finished run")
    p.add_argument("--images", type=number(int, 1, 64), default=8, help="number of test images, from the first on")
    p.add_argument("--zero-qval", type=number(float, 0, 1), default=0.7, help="ZeroGrad's q")
    p.add_argument("--data-dir", type=path, help="folder of the data set (default: the run's)")
    p.add_argument("--out", type=options.figure_path, default="sheet.png", help="the figure: .png, .pdf or .svg")
    args = p.parse_args()
    with one_line_errors():
        folder, out = Path(args.run), Path(args.out)
        run, started = read(folder, args.data_dir)
        dataset = options.data_set(started["data_set"])
        model = open_run(Folder(folder).file("model", run.epochs - 1)).model
        x, y = load(dataset, run)[2].batch(slice(args.images))
        figure = sheet(model, x, y, run.epsilon / 255, args.zero_qval, class_names(dataset, run))
        commits = dict.fromkeys(str(start["commit"])[:12] for start in started["starts"])
        figure.suptitle(f"{folder.resolve().name}, after epoch {run.epochs}, commit {', '.join(commits)}", fontsize=8)
        try:
            save(figure, out)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written ({error.strerror})") from None
        say(str(out))


if __name__ == "__main__":
    main()
