"""Networks for small images: PreActResNet, ResNet18 and WideResNet."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .methods import MODELS
from .options import Args, DataSet


class Normalize(nn.Module):
    """(x - mean) / std for each channel; mean and std are buffers that are not in the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU; (B, in_planes, H, W) -> (B, planes, H/stride, W/stride)."""

    expansion = 1
    raw = False  # whether the shortcut convolution reads the input before BatchNorm and ReLU

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = self.skip(x, out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + skip

    def skip(self, x: Tensor, activated: Tensor) -> Tensor:
        """Return the shortcut's output: the input itself, or a convolution of the activated or the raw input."""
        return x if self.shortcut is None else self.shortcut(x if self.raw else activated)


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each after BatchNorm and ReLU.

    (B, in_planes, H, W) -> (B, 4 planes, H/stride, W/stride)
    """

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.shortcut = _shortcut(in_planes, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + shortcut


def _shortcut(in_planes: int, planes: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_planes == planes:
        return None
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))


class PreActResNet(nn.Module):
    """Pre-activation ResNet: images in [0, 1], (B, 3, H, W), to logits, (B, num_classes).

    Args:
        block: PreActBlock or PreActBottleneck.
        blocks: number of blocks in each of the four stages, whose widths are 1, 2, 4 and 8 times `base_width`.
        mean, std: one value for each channel; they normalize the images and are not in the state dict.
        shortcut: "activated", or "raw": the shortcut convolutions of PreActBlocks read the input before BatchNorm and
            ReLU, as in github.com/locuslab/fast_adversarial.
        final_norm: whether BatchNorm and ReLU follow the last stage; in github.com/kuangliu/pytorch-cifar, they do not.
    """

    def __init__(self, block, blocks, num_classes=10, base_width=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
                 shortcut="activated", final_norm=True):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, base_width, 3, padding=1, bias=False)
        in_planes = base_width
        stages = []
        for stage, count in enumerate(blocks):
            planes, layer = base_width * 2**stage, nn.Sequential()
            for i in range(count):
                layer.append(block(in_planes, planes, stride=2 if stage > 0 and i == 0 else 1))
                layer[-1].raw = shortcut == "raw"
                in_planes = planes * block.expansion
            stages.append(layer)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(in_planes) if final_norm else None
        self.linear = nn.Linear(in_planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.bn is not None:
            out = F.relu(self.bn(out))
        return self.linear(out.mean(dim=(2, 3)))


def _depth(block, *blocks: int) -> Callable[..., PreActResNet]:
    def network(num_classes: int = 10, **kwargs) -> PreActResNet:
        return PreActResNet(block, blocks, num_classes, **kwargs)
    return network


PreActResNet18 = _depth(PreActBlock, 2, 2, 2, 2)
PreActResNet34 = _depth(PreActBlock, 3, 4, 6, 3)
PreActResNet50 = _depth(PreActBottleneck, 3, 4, 6, 3)
PreActResNet101 = _depth(PreActBottleneck, 3, 4, 23, 3)
PreActResNet152 = _depth(PreActBottleneck, 3, 8, 36, 3)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each before a BatchNorm; (B, in_planes, H, W) -> (B, planes, H/stride, W/stride)."""

    rectified = False  # whether a ReLU also follows the second BatchNorm, before the addition

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.rectified:
            out = F.relu(out)
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18: images in [0, 1], (B, 3, H, W), to logits, (B, num_classes).

    Args:
        num_classes, base_width, mean, std: as in `PreActResNet`.
        block: "standard", or "nuat": a ReLU also follows each block's second BatchNorm, before the addition, as in
            github.com/val-iisc/NuAT.
    """

    def __init__(self, num_classes=10, base_width=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), block="standard"):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, base_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(base_width * before, base_width * width, 1 if width == 1 else 2),
                          BasicBlock(base_width * width, base_width * width, 1))
            for before, width in ((1, 1), (1, 2), (2, 4), (4, 8)))
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.rectified = block == "nuat"
        self.linear = nn.Linear(8 * base_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean(dim=(2, 3)))


class WideBlock(PreActBlock):
    """PreActBlock whose shortcut is named `convShortcut`, as in published checkpoints of WideResNets."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__(in_planes, planes, stride)
        shortcut, self.shortcut = self.shortcut, None
        self.convShortcut = None if shortcut is None else shortcut[0]

    def skip(self, x: Tensor, activated: Tensor) -> Tensor:
        return x if self.convShortcut is None else self.convShortcut(activated)


class WideStage(nn.Module):
    """`count` blocks of one width; the first block has stride `stride`."""

    def __init__(self, count: int, in_planes: int, planes: int, stride: int):
        super().__init__()
        first = WideBlock(in_planes, planes, stride)
        self.layer = nn.Sequential(first, *(WideBlock(planes, planes, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide ResNet: images in [0, 1], (B, 3, H, W), to logits, (B, num_classes).

    Args:
        depth: 6n + 4, with n blocks in each of the three stages.
        width_factor: the widths of the stages are 16, 32 and 64 times this.
        mean, std: one value for each channel; they normalize the images and are not in the state dict.
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


def new_network(dataset: DataSet, args: Args) -> nn.Module:
    """Return a new network of the architecture in `args`, with the classes of the data set.

    --mean and --std take precedence over the data set's normalization.
    """
    return globals()[args.model](num_classes=dataset.classes, mean=args.mean or dataset.mean,
                                 std=args.std or dataset.std, **args.keywords(MODELS[args.model]))
