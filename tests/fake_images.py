"""Small data sets on disk: MNIST's IDX files, and folders of images."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


def random_images(samples: int, channels: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pixels of shape (samples, channels, size, size) and labels 0 to 9 in turn."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (samples, channels, size, size), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(samples) % 10


def idx_files(root: Path, train: int = 120, test: int = 40) -> None:
    """Write ``root/MNIST/raw`` as torchvision reads it."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, samples, seed in (("train", train, 0), ("t10k", test, 1)):
        pixels, labels = random_images(samples, 1, 28, seed)
        header = struct.pack(">4B3I", 0, 0, 8, 3, samples, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, samples)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.to(torch.uint8).numpy().tobytes())


def image_folders(root: Path, size: int = 8, train: int = 30, test: int = 10) -> None:
    """Write ``root/train/<class>/*.png`` and ``root/test/<class>/*.png``, classes ``c0`` to ``c9``."""
    for part, samples, seed in (("train", train, 0), ("test", test, 1)):
        for i, (image, label) in enumerate(zip(*random_images(samples, 3, size, seed), strict=True)):
            folder = root / part / f"c{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
