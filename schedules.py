"""Learning-rate schedules: pure functions of the time `t` in epochs, which training sets before every step."""
import math


def cyclic(t: float, lr_max: float, peak: float, epochs: float) -> float:
    """Linear from 0 to `lr_max` at `peak`, and back to 0 at `epochs`."""
    if t < peak:
        return lr_max * (t / peak)
    return lr_max * ((epochs - t) / (epochs - peak))


def onedrop(t: float, lr_max: float, drop: float) -> float:
    """`lr_max`, and a tenth of it from `drop` on."""
    return lr_max if t < drop else lr_max / 10


def onecycle(t: float, lr_max: float, epochs: float) -> float:
    """From lr_max / 25 up to `lr_max` in three tenths of the epochs and down to lr_max / 250,000, along cosines.

    PyTorch's OneCycleLR (Smith and Topin, arXiv 1708.07120).
    """
    return _cosines(t / epochs, lr_max / 25, lr_max, lr_max / 250_000)


def onecycle_momentum(t: float, epochs: float) -> float:
    """The momentum that goes with it, as in PyTorch: from 0.95 down to 0.85 and back."""
    return _cosines(t / epochs, 0.95, 0.85, 0.95)


def _cosines(share: float, begin: float, peak: float, end: float) -> float:
    """`begin` to `peak` in three tenths of the time, then to `end`."""
    if share < 0.3:
        return peak + (begin - peak) * (1 + math.cos(math.pi * share / 0.3)) / 2
    return end + (peak - end) * (1 + math.cos(math.pi * (share - 0.3) / 0.7)) / 2
