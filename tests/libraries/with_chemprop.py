"""Learns the number of atoms of alkanes and alcohols with chemprop: the strategy goes to a Trainer."""

from __future__ import annotations

import numpy as np
import torch
from chemprop import nn
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from chemprop.models import MPNN
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recorded import OUT, Recorded, by_name


class Recorder(Recorded, Callback):
    pass


def main() -> None:
    torch.manual_seed(0)
    molecules = [(f"{'C' * n}{end}", n) for n in range(1, 13) for end in ("C", "O", "N", "CO", "CN", "OC", "F", "Cl")]
    data = MoleculeDataset([MoleculeDatapoint.from_smi(smiles, np.array([n / 12])) for smiles, n in molecules])
    model = MPNN(
        nn.BondMessagePassing(d_h=16, depth=2),
        nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=16, hidden_dim=16),
        batch_norm=True,
        warmup_epochs=1,
        init_lr=1e-3,
        max_lr=1e-2,
        final_lr=1e-3,
    )
    recorder, checkpoint = Recorder(), ModelCheckpoint(OUT, "best", monitor="val_loss", mode="min", save_last=True)
    trainer = Trainer(
        strategy=by_name(),
        accelerator="cpu",
        devices=2,
        max_epochs=4,
        callbacks=[recorder, checkpoint],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, build_dataloader(data, batch_size=4), build_dataloader(data, batch_size=8, shuffle=False))
    trainer.save_checkpoint(OUT / "end.ckpt")
    if recorder.rank:
        return recorder.leave(model)
    best = MPNN.load_from_checkpoint(checkpoint.best_model_path).eval()
    graphs = next(iter(build_dataloader(data, batch_size=8, shuffle=False))).bmg
    return recorder.leave(model, MPNN.load_from_checkpoint(OUT / "end.ckpt"), best(graphs).detach())


if __name__ == "__main__":
    main()
