"""Show the statistics behind ZeroGrad: gradient magnitudes within an image, and how often gradient signs flip.

    python experiments/diagnose.py runs/zerograd --out=zerograd.png

The command prints two tables over all networks in the run's folder (model_E.pth of every epoch with --chkpt-iters=1),
on the first test images; --out also draws them, into zerograd_magnitudes.png and zerograd_flips.png:

* quantiles of abs(gradient) within an image, relative to the image's mean; the median over the images;
* fraction of entries whose gradient sign differs between two random points of the epsilon ball: by rank of the
  magnitude at the first point, and separately for the entries that ZeroGrad with --zero-qval zeroes and keeps.
"""
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from definitions import ROOT
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))
from singlestep.attacks import confident_gradient, quantile_mask, start
from singlestep.checkpoints import open_run
from singlestep.data import testing
from singlestep.figures import legend_below, own_style, save, shade, subplots
from singlestep.options import Parser, figure_path, number, path
from singlestep.run.console import UsageError, one_line_errors, say
from singlestep.run.device import seed_everything
from singlestep.run.folder import Folder, read_records
from singlestep.run.state import read_checkpoint

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
BINS = 10
POINTS = 5  # first number of the key that seeds the two points, see train.ORDER
BATCH = 64


class Network(NamedTuple):
    """A saved network: its file, and the epoch, counted from 1, after which it was saved."""

    epoch: int
    file: Path


class Found(NamedTuple):
    """Diagnostics of one network.

    Attributes:
        magnitudes: quantiles of the magnitude, at LEVELS.
        flips: fraction of signs that flip, in BINS bins by rank, smallest magnitudes first.
        groups: fraction of signs that flip among zeroed and among kept entries.
    """

    network: Network
    magnitudes: list[float]
    flips: list[float]
    groups: list[float]


def networks(folder: Folder) -> list[Network]:
    """Return a run's networks by epoch: model_E.pth; for other epochs, the last, best and healthy network."""
    try:
        records = read_records(folder)
        found = {epoch + 1: folder.file("model", epoch) for epoch in sorted(folder.epochs("model"))}
        epochs = {folder.path / "state.pth": [record["epoch"] for record in records],
                  folder.file("model", "best"): [record["epoch"] for record in records if record["best"]],
                  folder.file("model", "healthy"): [record["epoch"] for record in records
                                                    if record.get("collapsed") is False]}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{folder.path / 'metrics.jsonl'} is damaged: move it away to diagnose the "
                         f"model_E.pth files alone") from None
    for file, of in epochs.items():
        if of and file.exists() and not (file.name == "state.pth" and is_midway(file)):
            found.setdefault(of[-1] + 1, file)
    if not found:
        raise UsageError(f"{folder.path} has no network of a run: it needs a file model_E.pth")
    return [Network(epoch, file) for epoch, file in sorted(found.items())]


def is_midway(state: Path) -> bool:
    """Return whether a run's state was saved within an epoch."""
    return bool(read_checkpoint(state).get("opt", {}).get("run", {}).get("step"))


def diagnose(model: nn.Module, x: Tensor, y: Tensor, points: tuple[Tensor, Tensor], q: float
             ) -> tuple[list[float], list[float], list[float]]:
    """Return magnitudes, flips and groups (see `Found`) for images x (B, C, H, W) and two perturbations of them."""
    grad, here, there = (gradients(model, x, y, delta) for delta in (torch.zeros_like(x), *points))
    opposite = (here.sign() * there.sign() < 0).float()
    ordered = opposite.flatten(1).gather(1, here.abs().flatten(1).argsort(dim=1))
    zeroed = quantile_mask(here, q) == 0
    shares = [part.mean().item() for part in ordered.tensor_split(BINS, dim=1)]
    return quantiles(grad), shares, [opposite[part].mean().item() for part in (zeroed, ~zeroed)]


def gradients(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient at x + delta, up to a positive factor per image, which changes neither sign nor rank."""
    parts = zip(x.split(BATCH), y.split(BATCH), delta.split(BATCH))
    return torch.cat([confident_gradient(model, *part)[0] for part in parts])


def quantiles(grad: Tensor) -> list[float]:
    """Return the quantiles of abs(gradient) within an image, relative to the image's mean; the median over images."""
    size = grad.abs().flatten(1)
    relative = size / size.mean(dim=1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return relative.quantile(torch.tensor(LEVELS, dtype=size.dtype), dim=1).median(dim=1).values.tolist()


# Output


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = [heads, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths))} |" for line in lines)


def tables(found: list[Found], q: float) -> str:
    """Return both diagnostics as Markdown tables; signs in %."""
    heads = ["epoch", "network"]
    first = [[str(each.network.epoch), each.network.file.name] for each in found]
    magnitudes = [[f"{value:.3f}" for value in each.magnitudes] for each in found]
    flips = [["" if value != value else f"{100 * value:.1f}" for value in (*each.flips, *each.groups)]
             for each in found]
    bins = [f"{100 * i // BINS}-{100 * (i + 1) // BINS}" for i in range(BINS)]
    return "\n".join([
        "\nMagnitude of the gradient's entries relative to the image's mean, by quantile\n",
        table(heads + [f"{level:g}" for level in LEVELS], [a + b for a, b in zip(first, magnitudes)]),
        f"\nSigns that flip between two points of the ball, in %, by the rank of the magnitude in the image, in %; and "
        f"below and above the quantile q = {q:g}\n",
        table(heads + bins + ["below q", "above q"], [a + b for a, b in zip(first, flips)])])


@own_style()
def figures(found: list[Found], q: float, title: str) -> dict[str, Any]:
    """Draw a figure for each diagnostic. Returns name -> figure."""
    from matplotlib.ticker import MaxNLocator

    epochs, ticks = [each.network.epoch for each in found], (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)

    def lines(axes, x: list[float], curves: dict[str, list[float]]) -> None:
        for i, (name, values) in enumerate(curves.items()):  # they are ordered: from dark to light
            axes.plot(x, values, color=shade(i, len(curves) - 1), marker="osD^vP"[i], label=name, zorder=3,
                      clip_on=False)

    magnitudes, panel = subplots(figsize=(5.5, 3.6))
    lines(panel, epochs, {f"{100 * level:g}%": [math.log10(max(each.magnitudes[i], 1e-3)) for each in found]
                         for i, level in enumerate(LEVELS)})
    panel.set_yticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    every = [value for line in panel.lines for value in line.get_ydata()]
    panel.set(xlabel="epoch", ylabel="magnitude / the image's mean", ylim=(min(every) - 0.1, max(every) + 0.1),
              title=f"{title}: quantiles of the gradient's entries")
    flips, (left, right) = subplots(1, 2, figsize=(10, 3.6))
    shown = [found[round(i * (len(found) - 1) / 4)] for i in range(5)] if len(found) > 5 else found
    lines(left, [100 * (i + 0.5) / BINS for i in range(BINS)],
          {f"epoch {each.network.epoch}": [100 * share for share in each.flips] for each in shown})
    lines(right, epochs, {f"{name} q = {q:g}": [100 * each.groups[i] for each in found]
                          for i, name in enumerate(("below", "above"))})
    left.set(xlabel="rank of the magnitude in the image, %", ylabel="signs that flip, %")
    right.set(xlabel="epoch", ylabel="signs that flip, %")
    for axes in (panel, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    flips.suptitle(f"{title}: signs that flip between two points of the ball", fontsize=9)
    legend_below(magnitudes)
    for axes in (left, right):
        axes.legend(loc="best", fontsize=7)
    return {"magnitudes": magnitudes, "flips": flips}


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("run", type=path, help="the folder of a run")
    p.add_argument("--samples", type=number(int, 1), metavar="N", default=256, help="the first N test images")
    p.add_argument("--zero-qval", type=number(float, 0, 1), help="ZeroGrad's q (default: the run's)")
    p.add_argument("--seed", type=number(int, 0, 2**32 - 1), help="seed of the two points (default: the run's)")
    p.add_argument("--data-dir", type=path, help="folder of the data set (default: the run's)")
    p.add_argument("--out", type=figure_path, metavar="FILE",
                   help="draw the figures: x.png (.pdf, .svg) gives x_magnitudes.png and x_flips.png")
    args = p.parse_args()
    with one_line_errors():
        out = Path(args.out) if args.out else None
        if out:
            with own_style():  # fails at once without matplotlib
                pass
        found, q = measured(Folder(args.run), args)
        say(tables(found, q))
        for part, figure in figures(found, q, Path(args.run).resolve().name).items() if out else ():
            file = out.with_stem(f"{out.stem}_{part}")
            try:
                save(figure, file)
            except OSError as error:
                raise UsageError(f"--out {file} cannot be written ({error.strerror})") from None
            say(f"# drawn in {file}")


def measured(folder: Folder, args) -> tuple[list[Found], float]:
    """Diagnose each of a run's networks, on the same images and points. Returns the diagnostics and ZeroGrad's q."""
    found: list[Found] = []
    for network in networks(folder):
        opened = open_run(network.file, data_dir=args.data_dir, zero_qval=args.zero_qval, seed=args.seed)
        run = opened.args
        if not found:
            x, y = testing(opened.dataset, run.data_dir, run.dummy)[:args.samples].batch(slice(None))
            seed_everything(POINTS, run.seed)
            points = start(x, run.epsilon / 255), start(x, run.epsilon / 255)
        found.append(Found(network, *diagnose(opened.model, x, y, points, run.zero_qval)))
    return found, run.zero_qval


if __name__ == "__main__":
    main()
