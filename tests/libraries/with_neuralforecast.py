"""Forecasts waves with neuralforecast: the strategy is one of the model's keywords."""

from __future__ import annotations

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NLinear
from pytorch_lightning import Callback

import lightning_gossip

lightning_gossip.use_lightning("pytorch_lightning")  # neuralforecast imports both, and trains with this one

from recorded import OUT, Recorded, by_name  # noqa: E402


class Recorder(Recorded, Callback):
    pass


def main() -> None:
    time = np.arange(120)
    waves = pd.concat(
        pd.DataFrame({"unique_id": f"wave {n}", "ds": time, "y": np.sin(time / 5 + n) + 0.01 * time}) for n in range(8)
    )
    model = NLinear(
        h=4,
        input_size=16,
        max_steps=40,
        val_check_steps=20,
        learning_rate=0.003,
        batch_size=2,
        strategy=by_name(),
        accelerator="cpu",
        devices=2,
        callbacks=[Recorder()],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=str(OUT),
    )
    forecast = NeuralForecast(models=[model], freq=1)
    forecast.fit(waves, val_size=8)
    forecast.save(str(OUT / "saved"))  # by rank 0 alone
    (model,) = forecast.models  # a copy of the one above
    recorder = next(each for each in model.trainer_kwargs["callbacks"] if isinstance(each, Recorder))
    if recorder.rank:
        return recorder.leave(model)
    forecast = NeuralForecast.load(str(OUT / "saved"))
    (loaded,) = forecast.models
    loaded.trainer_kwargs["devices"] = 1  # it is saved, other than the strategy
    return recorder.leave(model, loaded, forecast.predict()["NLinear"].to_numpy())


if __name__ == "__main__":
    main()
