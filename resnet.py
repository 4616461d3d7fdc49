"""ResNet18 for small images (He et al., arXiv 1512.03385): a 3x3 stem, no pooling before the first stage.

The parameter names are those of the checkpoints that the field exchanges for CIFAR (`conv1`, `bn1`,
`layer1.0.shortcut.1`, ..., `linear`).
"""
import torch.nn.functional as F
from torch import Tensor, nn

from preactresnet import Normalize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each before BatchNorm; (B, in_planes, H, W) -> (B, planes, H/stride, W/stride)."""

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
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Images in [0, 1], (B, 3, H, W), to logits, (B, num_classes); see `preactresnet.PreActResNet`."""

    def __init__(self, num_classes=10, base_width=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, base_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(base_width * before, base_width * width, 1 if width == 1 else 2),
                          BasicBlock(base_width * width, base_width * width, 1))
            for before, width in ((1, 1), (1, 2), (2, 4), (4, 8)))
        self.linear = nn.Linear(8 * base_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean(dim=(2, 3)))
