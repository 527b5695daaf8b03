"""The networks of the examples, from raw pixels (uint8) to logits, and augmentation of whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Normalize(nn.Module):
    """Pixels of 0 to 255, shape ``(batch, channels, height, width)``, to (pixel / 255 − mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # not buffers: DDP would send them in every step
        self.scale = [1 / (255 * s) for s in std]
        self.shift = [-m / s for m, s in zip(mean, std, strict=True)]

    def forward(self, pixels: Tensor) -> Tensor:
        scale, shift = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.scale, self.shift))
        return torch.addcmul(shift, pixels.float(), scale)


def mlp() -> nn.Sequential:
    """Return 784-1024-1024-1024-10 with dropout of 0.2 and 0.5 and Kaiming-normal weights (arXiv:1812.02407, MNIST)."""
    sizes = (784, 1024, 1024, 1024)
    layers: list[nn.Module] = [Normalize((0.1307,), (0.3081,)), nn.Flatten(), nn.Dropout(0.2)]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5)]
    return kaiming(nn.Sequential(*layers, nn.Linear(sizes[-1], 10)))


def kaiming(network: nn.Sequential) -> nn.Sequential:
    """Draw weights whose variance keeps that of the activations under ReLU (He et al. 2015, arXiv:1502.01852)."""
    for layer in network:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight)
    return network


def alexnet() -> nn.Sequential:
    """Return AlexNet for 32×32 images: 2.5 million parameters.

    Layers as in the DistBelief project, weights Kaiming-normal: from torch's default ones, which the project took,
    plain SGD stays near chance for the first epoch.
    """
    network = nn.Sequential(
        Normalize((0.5,) * 3, (0.5,) * 3),
        nn.Conv2d(3, 64, 11, stride=4, padding=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    return kaiming(network)


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions (He et al. 2016, arXiv:1603.05027, figure 4e)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        active = torch.relu(self.norm1(features))
        carried = features if self.shortcut is None else self.shortcut(active)
        return self.conv2(torch.relu(self.norm2(self.conv1(active)))) + carried


def preact_resnet18() -> nn.Sequential:
    """Return the pre-activation ResNet-18 for 32×32 images: 11.2 million parameters."""
    layers: list[nn.Module] = [
        Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
    ]
    channels = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [PreActivationBlock(channels, outputs, stride), PreActivationBlock(outputs, outputs, 1)]
        channels = outputs
    layers += [nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Return a random crop of each image out of itself with a black border, half of them mirrored.

    As torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()``, for a whole batch at once.

    Args:
        images: shape ``(batch, channels, height, width)``.
        padding: pixels of the border.
    """
    batch, device = len(images), images.device
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), device=device)
    flip = torch.rand(batch, 1, device=device) < 0.5
    return crop_at(images, padding, top, left, flip)


def crop_at(images: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Return each image's crop at its own place; ``top``, ``left`` and ``flip`` have shape ``(batch, 1)``."""
    batch, channels, height, width = images.shape
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(flip, width - 1 - across, across)
    padded = pad(images, (padding,) * 4)
    image = torch.arange(batch, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[image, channel, rows.view(batch, 1, height, 1), columns.view(batch, 1, 1, width)]
