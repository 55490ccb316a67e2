"""Ends a run whose validation Dice no longer improves (`run.early_stop`).

1. After each validation, Lightning's EarlyStopping compares the mean Dice with the best one so far. The sums behind it
   are those of all ranks, which therefore decide alike.
2. A run that is stopped ends as a complete one: `last.ckpt` is its last step, `best.ckpt` that of the best Dice, and
   the journal says why.
3. How many validations in a row brought nothing is in the checkpoints. A start that resumes from one where they are as
   many as `run.early_stop` has nothing to do; with a larger number, or 0, it trains on.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from segvol_pl.config import RunConfig
from segvol_pl.errors import ConfigError
from segvol_pl.training.validation import ValidationDice

DICE = "val/dice"
"""Metric: the mean of all `val/dice/PROMPT`."""
STATE = "EarlyStop"
"""Name of its state in a checkpoint."""


class EarlyStop(EarlyStopping):
    """Stop after `run.early_stop` validations without a Dice above the best by more than `run.early_stop_delta`.

    dice: it is called before this one, and computes the Dice. Raises ConfigError if there is none.
    """

    def __init__(self, run: RunConfig, dice: ValidationDice) -> None:
        super().__init__(
            DICE, run.early_stop_delta, patience=run.early_stop, mode="max", check_on_train_epoch_end=False
        )
        self.run, self.dice = run, dice

    @property
    def state_key(self) -> str:
        """A name without the settings, which a resumed run may change."""
        return STATE

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.dice.mean is None:
            raise ConfigError(
                "run.early_stop: the held-out volumes that validation reads show no category, so there is no Dice: "
                "raise run.val_batches, or leave it out"
            )
        trainer.callback_metrics[DICE] = torch.tensor(self.dice.mean)
        for logger in trainer.loggers:
            logger.log_metrics({DICE: self.dice.mean}, step=trainer.global_step)
        super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.run.early_stop})


def why_stopped(run: RunConfig, callbacks: dict[str, Any]) -> str:
    """Why a run ends before its last step, by the state of callbacks in a checkpoint; empty if it continues."""
    state = callbacks.get(STATE)
    if not run.early_stop or state is None or state["wait_count"] < run.early_stop:
        return ""
    return (
        f"stopped early: in {state['wait_count']} validations Dice has not come more than {run.early_stop_delta:g} "
        f"above {float(state['best_score']):.4f}"
    )


def end_of(trainer: pl.Trainer, run: RunConfig) -> str:
    """The same of the trainer's run, which has just ended."""
    found = trainer.early_stopping_callback
    if found is None or trainer.state.fn != TrainerFn.FITTING:
        return ""
    return why_stopped(run, {STATE: found.state_dict()})
