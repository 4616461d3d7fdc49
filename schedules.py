"""Learning-rate schedules: pure functions of the time `t` in epochs, which training sets before every step."""


def cyclic(t: float, lr_max: float, peak: float, epochs: float) -> float:
    """Linear from 0 to `lr_max` at `peak`, and back to 0 at `epochs`."""
    if t < peak:
        return lr_max * (t / peak)
    return lr_max * ((epochs - t) / (epochs - peak))


def onedrop(t: float, lr_max: float, drop: float) -> float:
    """`lr_max`, and a tenth of it from `drop` on."""
    return lr_max if t < drop else lr_max / 10
