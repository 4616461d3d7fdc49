"""The pre-activation ResNets, under their published import path; the code is in singlestep/networks.py."""
from singlestep.networks import (
    PreActResNet,
    PreActResNet18,
    PreActResNet34,
    PreActResNet50,
    PreActResNet101,
    PreActResNet152,
)

__all__ = ["PreActResNet", "PreActResNet18", "PreActResNet34", "PreActResNet50", "PreActResNet101", "PreActResNet152"]
