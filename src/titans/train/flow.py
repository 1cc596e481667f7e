"""When a training run logs, evaluates, saves and stops."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Flow(TrainerCallback):
    """When to log, evaluate, save and stop, from the trainer's own settings.

    transformers' own flow prefers the intervals of a resumed checkpoint to those asked for.

    Args:
        trainer: a `TitansTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.metrics.start(time.perf_counter())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, step = self.trainer, state.global_step
        last = step >= state.max_steps
        if last or step % trainer.log_every == 0:
            trainer.metrics.log_training(step)
        control.should_evaluate = trainer.held_out is not None and (last or step % trainer.eval_every == 0)
        # Whichever process was asked to stop, all do so after the same step.
        stop = last or trainer.processes.any(trainer.stop_requested)
        control.should_save = stop or step % trainer.save_every == 0
        control.should_training_stop = stop
