"""What the benchmarks of speed train: LightningModules, and random batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import lightning.pytorch as pl
import torch
from language_model import Block
from models import mlp
from torch import Tensor, nn
from torch.utils.data import IterableDataset

Batch = tuple[Tensor, Tensor]


class Model(pl.LightningModule):
    """A network trained by cross-entropy.

    Args:
        network: from inputs to logits, classes last.
        optimizer: of its parameters.
    """

    def __init__(
        self, network: nn.Module, optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return loss(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy; ``logits`` has one more dimension than ``labels``, the last."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def nesterov(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum in torch's default implementation, one parameter after another."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)


def perceptron() -> nn.Module:
    """Return the example's MNIST network, the thesis', on flat inputs and without dropout: 2.9 million parameters.

    A benchmark of speed has no use for scaled pixels and for dropout's random numbers.
    """
    return nn.Sequential(*(layer for layer in mlp() if isinstance(layer, (nn.Linear, nn.ReLU))))


def convnet() -> nn.Module:
    """Return four 3×3 convolutions with BatchNorm for images of 32×32: 0.4 million parameters, 14 tensors."""
    widths = (3, 32, 64, 128, 256)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4, 10), nn.Unflatten(1, (10,)))


class Transformer(nn.Module):
    """A GPT-like network, by default of 9.7 million parameters in 149 tensors: pre-norm blocks, causal attention.

    Args:
        vocabulary: number of tokens.
        context: tokens a sequence.
        width: of the residual stream.
        depth: number of blocks.
        heads: of each attention.
    """

    def __init__(
        self, vocabulary: int = 512, context: int = 32, width: int = 256, depth: int = 12, heads: int = 8
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position; shape ``(batch, length, vocabulary)``."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on in a benchmark of speed.

    Attributes:
        network: makes one, with torch's present seed.
        optimizer: of a Model.
        batch: makes one rank's batch of random data.
    """

    network: Callable[[], nn.Module]
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    batch: Callable[[], Batch]

    def model(self) -> Model:
        """Return the LightningModule, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            return Model(self.network(), self.optimizer)

    @property
    def bytes(self) -> int:
        """Of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model().parameters())


TASKS = {
    "mlp": Task(perceptron, nesterov, lambda: (torch.randn(32, 784), torch.randint(10, (32,)))),
    "convnet": Task(convnet, nesterov, lambda: (torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))),
    "transformer": Task(
        Transformer,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        lambda: (torch.randint(512, (2, 32)), torch.randint(512, (2, 32))),
    ),
}
"""By name: 32, 16 and 2 samples a rank and step."""


class SameBatch(IterableDataset[Batch]):
    """One batch again and again: it costs nothing to load."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch
