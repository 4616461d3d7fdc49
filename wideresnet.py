"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146) in the field's usual form for CIFAR.

The parameter names are those of the checkpoints in exchange (`conv1`, `block1.layer.0.bn1`, ..., `bn1`, `fc`).
"""
import torch.nn.functional as F
from torch import Tensor, nn

from preactresnet import Normalize, PreActBlock


class WideBlock(PreActBlock):
    """The same block under the names of wide networks' checkpoints, where its shortcut is `convShortcut`."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__(in_planes, planes, stride)
        shortcut, self.shortcut = self.shortcut, None
        self.convShortcut = None if shortcut is None else shortcut[0]

    def skip(self, x: Tensor, activated: Tensor) -> Tensor:
        return x if self.convShortcut is None else self.convShortcut(activated)


class WideStage(nn.Module):
    """`count` blocks of one width, the first of which may halve the image."""

    def __init__(self, count: int, in_planes: int, planes: int, stride: int):
        super().__init__()
        first = WideBlock(in_planes, planes, stride)
        self.layer = nn.Sequential(first, *(WideBlock(planes, planes, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Images in [0, 1], (B, 3, H, W), to logits, (B, num_classes).

    `depth` is 6n + 4; the three stages are 16, 32 and 64 times `width_factor` wide. The images are normalized by
    `mean` and `std` (one value a channel) first, which adds no key to the state dict.
    """

    def __init__(self, depth=34, width_factor=10, num_classes=10, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4, not {depth}")
        count = (depth - 4) // 6
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(count, 16, 16 * width_factor, 1)
        self.block2 = WideStage(count, 16 * width_factor, 32 * width_factor, 2)
        self.block3 = WideStage(count, 32 * width_factor, 64 * width_factor, 2)
        self.bn1 = nn.BatchNorm2d(64 * width_factor)
        self.fc = nn.Linear(64 * width_factor, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = F.relu(self.bn1(out))
        return self.fc(out.mean(dim=(2, 3)))
