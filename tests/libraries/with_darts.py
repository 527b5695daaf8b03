"""Forecasts a wave with darts: the strategy is one of the `pl_trainer_kwargs`."""

from __future__ import annotations

import numpy as np
import torch
from darts import TimeSeries
from darts.models import NLinearModel
from pytorch_lightning import Callback, Trainer
from recorded import OUT, Recorded, by_name


class Recorder(Recorded, Callback):
    pass


def main() -> None:
    torch.manual_seed(0)
    time = np.arange(240)
    wave = TimeSeries.from_values((np.sin(time / 5) + 0.01 * time).astype(np.float32))
    recorder = Recorder()
    model = NLinearModel(
        input_chunk_length=16,
        output_chunk_length=4,
        n_epochs=4,
        batch_size=8,
        optimizer_kwargs={"lr": 0.003},
        save_checkpoints=True,
        model_name="wave",
        work_dir=str(OUT),
        force_reset=True,
        pl_trainer_kwargs={
            "strategy": by_name(),
            "accelerator": "cpu",
            "devices": 2,
            "callbacks": [recorder],
            "enable_progress_bar": False,
        },
    )
    model.fit(wave[:-40], val_series=wave[-40:])
    if recorder.rank:
        return recorder.leave(model.model)
    loaded = NLinearModel.load_from_checkpoint("wave", work_dir=str(OUT), best=False, trusted=True)
    alone = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    forecast = loaded.predict(4, series=wave[:-40], trainer=alone).values()
    return recorder.leave(model.model, loaded.model, forecast)


if __name__ == "__main__":
    main()
