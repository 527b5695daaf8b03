"""The table in docs/lightning.md says what the tests show: each row names tests that run on two or more processes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "lightning.md"

FEATURES = "strategies/test_features.py"
STRATEGIES = "strategies/test_strategies.py"
COUNTING = "strategies/test_counting_ranks.py"
LAUNCH = "strategies/test_launch.py"
SHOWN: dict[str, list[tuple[str, str]]] = {
    "`accumulate_grad_batches`, gradient clipping": [
        (STRATEGIES, "test_a_fit_equals_its_replay"),
        (FEATURES, "test_gradient_clipping"),
    ],
    "`precision` 32-true": [(FEATURES, "test_precision")],
    "several optimizers, manual optimization": [
        (STRATEGIES, "test_manual_optimization_ticks_once_a_batch_and_both_networks_travel")
    ],
    "schedulers by step": [(FEATURES, "test_learning_rate_schedulers")],
    "`EarlyStopping`, `ModelCheckpoint(monitor=…)`": [
        (FEATURES, "test_early_stopping_of_ranks_that_disagree_is_one_decision"),
        ("strategies/test_checkpoint.py", "test_ranks_that_disagree_on_a_metric_make_one_decision_and_one_file"),
    ],
    "`self.log` with and without `sync_dist`": [
        (FEATURES, "test_metrics_with_and_without_sync"),
        (FEATURES, "test_a_rank_that_is_slow_is_waited_for_where_torchmetrics_pool"),
    ],
    "`StochasticWeightAveraging`": [
        (FEATURES, "test_stochastic_weight_averaging"),
        (FEATURES, "test_the_mean_of_averaged_weights_is_validated"),
    ],
    "`BackboneFinetuning`": [
        (FEATURES, "test_parameters_that_unfreeze_begin_to_travel"),
        (STRATEGIES, "test_frozen_tied_and_unused_parameters"),
    ],
    "`configure_model`, `torch.compile`d": [
        (STRATEGIES, "test_all_ranks_start_from_rank_zeros_parameters"),
        (FEATURES, "test_compiled_modules"),
    ],
    "IterableDataset, DataModules, own samplers": [
        (FEATURES, "test_several_loaders_and_a_sampler_of_ones_own"),
        (FEATURES, "test_unequal_batch_counts"),
    ],
    "unequal numbers of batches": [
        (COUNTING, "test_all_at_once_on_three_ranks"),
        (COUNTING, "test_a_rank_without_batches_is_done"),
    ],
    "`limit_*_batches`": [
        (FEATURES, "test_limits"),
        (FEATURES, "test_max_time"),
        (COUNTING, "test_validations_within_an_epoch"),
    ],
    "`training_step` returning None": [(FEATURES, "test_training_step_may_return_none_on_one_rank")],
    "`trainer.should_stop` on one rank": [(FEATURES, "test_should_stop_on_one_rank_ends_all")],
    "`validate`, `test`, `predict`": [
        (FEATURES, "test_validate_test_and_predict_alone_and_after_fit"),
        (LAUNCH, "test_names_that_start_the_program_again_fit_and_test"),
    ],
    "profilers, LightningCLI": [
        (FEATURES, "test_profilers"),
        (FEATURES, "test_lightning_cli_with_a_yaml_file"),
        (FEATURES, "test_learning_rate_finder"),
        (FEATURES, "test_on_exception_checkpoint"),
    ],
    "`popen`, `spawn`, `fork`, `forkserver`": [
        (LAUNCH, "test_names_that_start_the_program_again_fit_and_test"),
        (LAUNCH, "test_gossip_spawn_fits_and_tests"),
        (LAUNCH, "test_torchrun_with_two_nodes_of_two_processes"),
        (STRATEGIES, "test_registered_names_that_fork_fit_and_test"),
        ("strategies/test_own_parameters.py", "test_ranks_train_parameters_of_their_own"),
    ],
    "SLURM's signal": [("strategies/test_signals.py", "test_ranks_save_at_the_end_of_one_step_and_requeue_once")],
    "several Trainers in a script": [
        ("strategies/test_second_trainer.py", "test_a_lost_rank_of_a_later_trainer_is_noticed_at_once"),
        ("parameter_server/test_sources_on_path.py", "test_downpour_from_a_job_that_ships_its_sources"),
    ],
}
"""By how a row begins."""


def rows() -> list[str]:
    _, _, table = PAGE.read_text().partition("Each row has a test on two or more processes.")
    lines = table.split("\n\n")[1].splitlines()
    return [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines[2:]]


def test_every_row_names_its_tests() -> None:
    beginnings = {row: [begin for begin in SHOWN if row.startswith(begin)] for row in rows()}
    assert all(len(found) == 1 for found in beginnings.values()), beginnings
    assert len(beginnings) == len(SHOWN), "what is shown stands on the page"


@pytest.mark.parametrize("row", SHOWN)
def test_they_are_there_and_start_processes(row: str) -> None:
    for file, name in SHOWN[row]:
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file
        imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert {"fit", "Walk", "Linear", "Program", "subprocess"} & imported, f"{file} starts no processes"
