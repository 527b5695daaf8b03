"""Forecasts waves with pytorch-forecasting's TemporalFusionTransformer: the strategy goes to a Trainer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss
from recorded import OUT, Recorded, by_name


class Recorder(Recorded, Callback):
    pass


def main() -> None:
    torch.manual_seed(0)
    time = np.arange(40)
    waves = pd.concat(
        (pd.DataFrame({"series": f"wave {n}", "time": time, "value": np.sin(time / 5 + n)}) for n in range(6)),
        ignore_index=True,
    )
    training = TimeSeriesDataSet(
        waves[waves.time < 36],
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=4,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
        static_categoricals=["series"],
    )
    validation = TimeSeriesDataSet.from_dataset(training, waves, predict=True, stop_randomization=True)
    model = TemporalFusionTransformer.from_dataset(
        training,
        hidden_size=4,
        attention_head_size=1,
        hidden_continuous_size=4,
        learning_rate=0.01,
        loss=QuantileLoss(),
    )
    recorder, checkpoint = Recorder(), ModelCheckpoint(OUT, "best", monitor="val_loss", mode="min")
    trainer = Trainer(
        strategy=by_name(),
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        gradient_clip_val=0.1,
        callbacks=[recorder, checkpoint, EarlyStopping("val_loss", patience=2)],
        logger=False,
        enable_progress_bar=False,
    )
    held_out = validation.to_dataloader(train=False, batch_size=3)
    trainer.fit(model, training.to_dataloader(train=True, batch_size=4), held_out)
    trainer.save_checkpoint(OUT / "end.ckpt")
    if recorder.rank:
        return recorder.leave(model)
    load = TemporalFusionTransformer.load_from_checkpoint
    alone = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    forecast = load(checkpoint.best_model_path).predict(held_out, trainer_kwargs=alone)
    return recorder.leave(model, load(OUT / "end.ckpt"), forecast)


if __name__ == "__main__":
    main()
