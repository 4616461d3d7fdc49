"""Show how much of a low accuracy is due to BatchNorm's running statistics.

    python experiments/batchnorm.py runs/gradalign --samples=1000

prints the accuracy of all networks that the run's folder holds (model_E.pth of every epoch with --chkpt-iters=1): as
saved, and with the running statistics estimated anew, as means over the run's training images without perturbation.
"""
import sys
from collections.abc import Iterator

import torch
from definitions import ROOT
from diagnose import networks, table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(ROOT))
from singlestep.checkpoints import open_run
from singlestep.data import Images, load
from singlestep.options import Parser, number, path
from singlestep.robustness import PGD, evaluate
from singlestep.run.console import one_line_errors, say
from singlestep.run.folder import Folder

BATCH = 128


def batches(images: Images) -> Iterator[Tensor]:
    """Yield the images in batches, in order, without augmentation."""
    for index in torch.arange(len(images)).split(BATCH):
        yield images.batch(index)[0]


def accuracies(model: nn.Module, images: Images, epsilon: float, alpha: float) -> list[str]:
    """Return the accuracy without perturbation, under FGSM and under PGD-10, in %. epsilon, alpha: in pixel units."""
    x, y = images.batch(slice(None))
    fgsm = evaluate(model, x, y, PGD(epsilon, epsilon, 1, 1, init="zero")).metrics()
    pgd = evaluate(model, x, y, PGD(epsilon, alpha, 10, 1)).metrics()
    return [f"{100 * value:.1f}" for value in (pgd["clean_acc"], fgsm["robust_acc"], pgd["robust_acc"])]


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("run", type=path, help="the folder of a run")
    p.add_argument("--samples", type=number(int, 1), metavar="N", default=1000, help="the first N test images")
    p.add_argument("--data-dir", type=path, help="folder of the data set (default: the run's)")
    args = p.parse_args()
    rows = []
    with one_line_errors():
        for network in networks(Folder(args.run)):
            opened = open_run(network.file, data_dir=args.data_dir)
            run, model = opened.args, opened.model
            train, _, test = load(opened.dataset, run)
            for title in ("as saved", "anew"):
                if title == "anew":
                    update_bn(batches(train), model)
                rows.append([str(network.epoch), title,
                             *accuracies(model, test[:args.samples], run.epsilon / 255, run.pgd_alpha / 255)])
        say(table(["epoch", "statistics", "clean", "FGSM", "PGD-10"], rows))


if __name__ == "__main__":
    main()
