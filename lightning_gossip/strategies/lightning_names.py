"""Lightning, under the name to which this process's classes are bound: the only place of the package that imports it.

Both halves import the same names (:mod:`~lightning_gossip.strategies.lightning_family` says which half runs); what is
private in Lightning has a leading underscore. Type checkers see the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gossip.strategies import lightning_family
from lightning_gossip.strategies.versions import warn_of_untested

warn_of_untested("torch")
warn_of_untested("lightning" if lightning_family.bound() == "lightning.pytorch" else "pytorch-lightning")

if TYPE_CHECKING or lightning_family.bound() == "lightning.pytorch":
    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
    from lightning.fabric.plugins.environments.lightning import find_free_network_port
    from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
    from lightning.fabric.utilities import move_data_to_device
    from lightning.fabric.utilities.cloud_io import get_filesystem
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
    from lightning.fabric.utilities.optimizer import _optimizers_to_device
    from lightning.fabric.utilities.seed import reset_seed
    from lightning.fabric.utilities.types import _PATH, ReduceOp, _Stateful
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies import DDPStrategy, Strategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from lightning.pytorch.strategies.launchers.multiprocessing import (
        _check_bad_cuda_fork,
        _check_missing_main_guard,
        _GlobalStateSnapshot,
    )
    from lightning.pytorch.strategies.strategy import TBroadcast
    from lightning.pytorch.trainer import call
    from lightning.pytorch.trainer.connectors.signal_connector import _get_sigkill_signal
    from lightning.pytorch.trainer.states import RunningStage
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.types import STEP_OUTPUT
else:
    import pytorch_lightning as pl
    from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
    from lightning_fabric.plugins.environments.lightning import find_free_network_port
    from lightning_fabric.strategies import DDPStrategy as FabricDDPStrategy
    from lightning_fabric.utilities import move_data_to_device
    from lightning_fabric.utilities.cloud_io import get_filesystem
    from lightning_fabric.utilities.data import _set_sampler_epoch
    from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
    from lightning_fabric.utilities.optimizer import _optimizers_to_device
    from lightning_fabric.utilities.seed import reset_seed
    from lightning_fabric.utilities.types import _PATH, ReduceOp, _Stateful
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint, Timer
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from pytorch_lightning.plugins.io import AsyncCheckpointIO
    from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
    from pytorch_lightning.plugins.precision import Precision
    from pytorch_lightning.strategies import DDPStrategy, Strategy
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from pytorch_lightning.strategies.launchers.multiprocessing import (
        _check_bad_cuda_fork,
        _check_missing_main_guard,
        _GlobalStateSnapshot,
    )
    from pytorch_lightning.strategies.strategy import TBroadcast
    from pytorch_lightning.trainer import call
    from pytorch_lightning.trainer.connectors.signal_connector import _get_sigkill_signal
    from pytorch_lightning.trainer.states import RunningStage
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng
    from pytorch_lightning.utilities.types import STEP_OUTPUT

__all__ = [
    "STEP_OUTPUT",
    "_PATH",
    "Accelerator",
    "AsyncCheckpointIO",
    "CPUAccelerator",
    "CSVLogger",
    "CUDAAccelerator",
    "Callback",
    "CheckpointIO",
    "ClusterEnvironment",
    "DDPStrategy",
    "FabricDDPStrategy",
    "LightningModule",
    "MisconfigurationException",
    "ModelCheckpoint",
    "Precision",
    "ReduceOp",
    "RunningStage",
    "SIGTERMException",
    "Strategy",
    "TBroadcast",
    "TensorBoardLogger",
    "Timer",
    "TorchCheckpointIO",
    "Trainer",
    "_GlobalStateSnapshot",
    "_MultiProcessingLauncher",
    "_Stateful",
    "_SubprocessScriptLauncher",
    "_WrappingCheckpointIO",
    "_check_bad_cuda_fork",
    "_check_missing_main_guard",
    "_get_sigkill_signal",
    "_optimizers_to_device",
    "_set_num_threads_if_needed",
    "_set_sampler_epoch",
    "call",
    "find_free_network_port",
    "get_filesystem",
    "is_overridden",
    "isolate_rng",
    "move_data_to_device",
    "pl",
    "rank_zero_only",
    "rank_zero_warn",
    "reset_seed",
]
