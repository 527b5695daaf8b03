"""Learns counts of genes with scvi-tools: the strategy goes to `model.train`, by a name that says `ddp`."""

from __future__ import annotations

import numpy as np
import torch
from anndata import AnnData
from lightning.pytorch import Callback
from recorded import OUT, Recorded, by_name
from scvi.model import SCVI


class Recorder(Recorded, Callback):
    pass


def main() -> None:
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    kinds = draw.gamma(1.0, 3.0, (3, 20))
    cells = AnnData(draw.poisson(kinds[draw.integers(3, size=240)]).astype(np.float32))
    SCVI.setup_anndata(cells)
    model = SCVI(cells, n_hidden=16, n_latent=2)
    recorder = Recorder()
    model.train(
        max_epochs=4,
        train_size=0.8,
        batch_size=8,
        strategy=by_name("ddp_"),
        accelerator="cpu",
        devices=2,
        plan_kwargs={"lr": 0.01},
        callbacks=[recorder],
        enable_progress_bar=False,
        default_root_dir=str(OUT),
    )
    if recorder.rank:
        return recorder.leave(model.module)
    model.save(str(OUT / "saved"))
    loaded = SCVI.load(str(OUT / "saved"), adata=cells, accelerator="cpu")
    return recorder.leave(model.module, loaded.module, loaded.get_latent_representation())


if __name__ == "__main__":
    main()
