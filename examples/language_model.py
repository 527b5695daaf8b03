"""A byte-level GPT: pre-norm, fused attention, tied weights (Radford et al. 2019, "Language Models are …", §2.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Size:
    """Of a network; ``lr`` suits it."""

    layers: int
    width: int
    heads: int
    context: int
    lr: float


SIZES = {
    "nano": Size(layers=3, width=64, heads=4, context=64, lr=3e-3),  # 0.17 M parameters
    "micro": Size(layers=4, width=128, heads=4, context=128, lr=2e-3),  # 0.84 M
    "small": Size(layers=6, width=256, heads=8, context=256, lr=1e-3),  # 4.9 M
}


class Block(nn.Module):
    """Attention and a perceptron, each on normalised inputs and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(gelu(self.widen(self.perceptron_norm(x))))


class GPT(nn.Module):
    """Bytes, shape ``(batch, length)``, to logits of the next ones, shape ``(batch, length, 256)``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)  # and, transposed, the last layer
        self.positions = nn.Parameter(torch.empty(size.context, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                # what is added to the residual stream, 2 layers' worth of times, is scaled down
                onto_stream = ("project" in name) or ("narrow" in name)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers) if onto_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, data: Tensor) -> Tensor:
        x = self.embedding(data) + self.positions[: data.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.t()


class LanguageModel(pl.LightningModule):
    """Trains a GPT with AdamW, a warm-up and a cosine; losses are in nats a byte, of this replica.

    Args:
        size: of the network.
        lr: learning rate after the warm-up; it falls to a tenth.
        beta: AdamW's first.
        warmup: part of all steps, from 0 to 1.
    """

    def __init__(self, size: Size, lr: float, beta: float = 0.9, warmup: float = 0.05) -> None:
        super().__init__()
        self.network = GPT(size)
        self.lr, self.beta, self.warmup = lr, beta, warmup

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, following = batch
        return cross_entropy(self.network(inputs.long()).flatten(0, 1), following.long().flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta, 0.95), fused=True)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warm = max(1, round(self.warmup * total))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
