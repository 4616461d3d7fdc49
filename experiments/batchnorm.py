"""Show how much of a low accuracy is due to BatchNorm's running statistics.

    python experiments/batchnorm.py runs/gradalign --samples=1000

The command prints the accuracy of all networks in the run's folder (model_E.pth of every epoch with --chkpt-iters=1):
as saved, and with running statistics estimated again, as means over the run's training images without perturbation.
--out=FILE.json saves the accuracies, the run's command and epochs, and the machines of the run and of this command.
"""
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from definitions import ROOT
from diagnose import networks, table
from results import MACHINE
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(ROOT))
from singlestep.checkpoints import open_run
from singlestep.data import Images, load
from singlestep.options import Parser, number, path
from singlestep.robustness import PGD, evaluate
from singlestep.run.console import one_line_errors, say
from singlestep.run.device import describe
from singlestep.run.folder import Folder, atomic_write, read_records

BATCH = 128


def batches(images: Images) -> Iterator[Tensor]:
    """Yield the images in batches, in order, without augmentation."""
    for index in torch.arange(len(images)).split(BATCH):
        yield images.batch(index)[0]


def accuracies(model: nn.Module, images: Images, epsilon: float, alpha: float) -> dict[str, float]:
    """Return the accuracy without perturbation, under FGSM and under PGD-10. epsilon, alpha: in pixel units."""
    x, y = images.batch(slice(None))
    fgsm = evaluate(model, x, y, PGD(epsilon, epsilon, 1, 1, init="zero")).metrics()
    pgd = evaluate(model, x, y, PGD(epsilon, alpha, 10, 1)).metrics()
    return {"clean": pgd["clean_acc"], "FGSM": fgsm["robust_acc"], "PGD-10": pgd["robust_acc"]}


def result(run: Path, networks: list[dict]) -> dict:
    """Return the accuracies of the networks, with the run's command and epochs, and versions and hardware of both."""
    starts = json.loads((run / "args.json").read_text(encoding="utf-8"))["starts"]
    command = [word for word in starts[0]["command"] if not word.startswith(("--data-dir", "--fname"))]
    machines = [{key: start[key] for key in MACHINE} for start in (*starts, describe(torch.device("cpu")))]
    return {"command": shlex.join(["python", *command]), "starts": machines, "networks": networks,
            "epochs": read_records(Folder(run))}


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("run", type=path, help="the folder of a run")
    p.add_argument("--samples", type=number(int, 1), metavar="N", default=1000, help="the first N test images")
    p.add_argument("--data-dir", type=path, help="folder of the data set (default: the run's)")
    p.add_argument("--out", type=path, metavar="FILE", help="JSON file of the accuracies")
    args = p.parse_args()
    found = []
    with one_line_errors():
        for network in networks(Folder(args.run)):
            opened = open_run(network.file, data_dir=args.data_dir)
            run, model = opened.args, opened.model
            train, _, test = load(opened.dataset, run)
            for title in ("as saved", "anew"):
                if title == "anew":
                    update_bn(batches(train), model)
                found.append({"epoch": network.epoch, "statistics": title, "images": len(test[:args.samples]),
                              **accuracies(model, test[:args.samples], run.epsilon / 255, run.pgd_alpha / 255)})
        say(table(["epoch", "statistics", "clean", "FGSM", "PGD-10"], [
            [str(row["epoch"]), row["statistics"], *(f"{100 * row[name]:.1f}" for name in ("clean", "FGSM", "PGD-10"))]
            for row in found]))
        if args.out:
            with atomic_write(Path(args.out)) as file:
                file.write(f"{json.dumps(result(Path(args.run), found), indent=1)}\n".encode())


if __name__ == "__main__":
    main()
