"""transformers' Trainer with a carried memory, and checkpoints that are exact and hold data only."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, default_collate
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from titans.data import StreamDataset
from titans.hf import TitansForCausalLM
from titans.state import map_state
from titans.train import carried, parallel
from titans.train import checkpoint as files
from titans.train.examples import EpochAfterEpoch, HeldOut, Part
from titans.train.flow import Flow
from titans.train.metrics import MetricsLog
from titans.train.processes import ALONE
from titans.train.recorded import RecordedStep
from titans.train.write_cost import write_cost

_STATE_FILE = "trainer_state.json"


class NonFiniteError(ArithmeticError):
    """The loss, its gradient or something on the way to them is NaN or infinite."""


class TitansTrainer(Trainer):
    """Trains a Titans model, or another causal LM of transformers, on examples of `titans.data`.

    The loss is the mean cross-entropy over the real targets of a step. With `carry_memory` what the model has
    read in one step is where the next one starts, cut off from the gradient, except in rows marked `restart`.
    Nothing it reads back is ever unpickled.

    Args:
        model, args: as for `Trainer`; logging, evaluation and saving are not taken from `args`.
        train_dataset: examples in the order of training.
        held_out: text to evaluate on, or None.
        optimizers: the optimizer and its schedule.
        metrics: where results are written.
        engine: how the model, which `engine.spread` has seen, is spread over the processes of the run.
        carry_memory: whether states pass from step to step.
        answer_weight: weight in the loss of labels that the examples' `answers` marks; others have 1.
        write_cost: weight of `titans.train.write_cost` in the loss. write_cost_reach: its `reach`.
        cuda_graph: record the step and replay it; padding is then read like text.
        eval_every, save_every, log_every: steps; the last step is always evaluated, saved and logged.
        save_extras: called with the folder of every checkpoint, to add files to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: EpochAfterEpoch | StreamDataset,
        held_out: HeldOut | None,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR],
        metrics: MetricsLog,
        engine: parallel.Whole | None = None,
        *,
        carry_memory: bool = False,
        answer_weight: float = 1.0,
        write_cost: float = 0.0,
        write_cost_reach: float = 8.0,
        cuda_graph: bool = False,
        eval_every: int = 100,
        save_every: int = 100,
        log_every: int = 10,
        save_extras: Callable[[Path], None] | None = None,
    ) -> None:
        if carry_memory and not getattr(model.config, "has_memory", False):
            kind = getattr(model.config, "variant", model.config.model_type)
            raise ValueError(f"carry_memory=True: {kind!r} has no memory")
        super().__init__(
            model,
            args,
            data_collator=default_collate,
            train_dataset=train_dataset,
            optimizers=optimizers,
            callbacks=[Flow(self)],
        )
        self.remove_callback(DefaultFlowCallback)
        self.remove_callback(PrinterCallback)
        # The library wraps, and types as optional, what it was given.
        self._network: Any = model
        self._examples = train_dataset
        self._folder = Path(str(args.output_dir))
        self._adamw, self._schedule = optimizers
        self.held_out = held_out
        self.metrics = metrics
        self.carry_memory = carry_memory
        self.answer_weight = answer_weight
        self.write_cost, self.write_cost_reach = write_cost, write_cost_reach
        self.eval_every, self.save_every, self.log_every = eval_every, save_every, log_every
        self.save_extras = save_extras
        self.stop_requested = False
        self._engine = engine or parallel.Whole(ALONE)
        # As for models that the library has sharded itself: it puts no DistributedDataParallel around them.
        self.is_distributed_loading_by_transformers = self._engine.averages_gradients
        self.processes = self._engine.processes
        self.carried: tuple[Any, ...] | None = None
        # Of a stream: where this process's rows are in their documents after the last step.
        self._cursors: Tensor | None = None
        if carry_memory:
            # Before DistributedDataParallel looks for parameters that its results depend on.
            model.register_forward_hook(_cut_off_states)
        self.cuda_graph = cuda_graph
        self._recorded: RecordedStep | None = None
        self._columns_carried = 0

    # Loss and gradient

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        """The examples of the next step."""
        with self.metrics.loading():
            return super().get_batch_samples(*given, **named)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy in nats of all predictions; answers may count more."""
        states, restart = self._before(inputs)
        try:
            loss, reported, logits, states = self._loss(model, inputs, states, restart)
        except ValueError as error:
            # A memory refuses gates that are NaN before there is a loss.
            raise self._stopped(f"the model could not read its input ({error})") from error
        self._count(reported, inputs, states)
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss of a step, with its gradient in the parameters."""
        if not self.cuda_graph:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self._recorded is None:
            states = self.carried
            if self.carry_memory and states is None:
                # A graph of autograd that is alive would draw its own stream into the recording.
                with torch.no_grad():
                    layers, rows = self._network.model.layers, len(inputs["input_ids"])
                    states = tuple(layer.initial_state(rows) for layer in layers)
            self._recorded = RecordedStep(model, partial(self._recorded_loss, model), inputs, states)
        loss, reported = self._recorded(inputs)
        self._count(reported, inputs, self._recorded.states)
        return loss.clone()

    def _recorded_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], states: tuple[Any, ...] | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...] | None]:
        loss, reported, _, states = self._loss(model, inputs, states, inputs.get("restart"), masked=False)
        return loss, reported, states

    def _loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        states: tuple[Any, ...] | None,
        restart: Tensor | None,
        masked: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...] | None]:
        """(loss to minimise, mean cross-entropy to report, logits, detached states after the step)."""
        read, targets = _read_columns(inputs), inputs["labels"][:, 1:].flatten()
        output = model(**self._arguments(read, states, restart, masked))
        logits, states = output.logits, getattr(output, "memory_states", None)
        each = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
        weights = (targets >= 0).to(each.dtype)
        reported = each.detach().sum() / weights.sum()
        if self.answer_weight != 1:
            weights = torch.where(inputs["answers"][:, 1:].flatten(), self.answer_weight, weights)
        loss = (each * weights).sum() / weights.sum() * self.processes.share(weights.sum())
        if self.write_cost:
            tokens = read["attention_mask"].bool() if masked else None
            cost = write_cost(output.traces, self.write_cost_reach, tokens, read.get("facts"))
            cost = cost * self.processes.share(read["attention_mask"].sum())
            loss = loss + self.write_cost * cost.to(loss.device)
        return loss, reported, logits, states

    def _arguments(
        self, read: dict[str, Tensor], states: tuple[Any, ...] | None, restart: Tensor | None, masked: bool
    ) -> dict[str, Any]:
        """What the model is called with; others than Titans need no mask, as padding is on the right."""
        plain = {"input_ids": read["input_ids"], "use_cache": False}
        if not isinstance(self._network, TitansForCausalLM):
            return plain
        return plain | {
            "attention_mask": read["attention_mask"] if masked else None,
            "memory_states": states,
            "restart": restart,
            "return_memory_states": self.carry_memory,
            "output_trace": self.write_cost > 0,
        }

    def _count(self, reported: Tensor, inputs: dict[str, Tensor], states: tuple[Any, ...] | None) -> None:
        """Record a step's loss, if it is finite, and its states."""
        value = self.processes.mean(reported.item(), int((inputs["labels"][:, 1:] >= 0).sum()))
        self._refuse_non_finite(value, "loss")
        if self.carry_memory:
            self.carried = states
            self._columns_carried += inputs["input_ids"].shape[1] - 1
        self._cursors = inputs.get("cursor")
        (num_tokens,) = self.processes.sums(int(inputs["attention_mask"].sum()))
        self.metrics.add_step(value, int(num_tokens))

    def _before(self, inputs: dict[str, Tensor]) -> tuple[tuple[Any, ...] | None, Tensor | None]:
        """The rows' states before this step, and which rows start with an empty memory all the same."""
        return self.carried, None if self.carried is None else inputs["restart"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last call before the optimizer step: a bad gradient must not reach the weights.
        norm = super()._get_grad_norm(model, grad_norm)
        for parameter in model.parameters():
            # One that no token of the step depends on: its gradient is 0, however the rows are divided.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self._refuse_non_finite(norm, "gradient's norm")
        self.metrics.grad_norm = norm
        self.metrics.learning_rate = self._adamw.param_groups[0]["lr"]
        return norm

    def _refuse_non_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise self._stopped(f"the {what} is {value}")

    def _stopped(self, reason: str) -> NonFiniteError:
        left = files.checkpoints(self._folder)
        return NonFiniteError(
            f"{reason} at step {self.state.global_step + 1}: training stopped before that step; "
            + (f"the last good checkpoint is {left[-1]}: " if left else "there is no checkpoint yet: ")
            + ("resume from it" if left else "start again")
            + " with a lower learning_rate"
        )

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss in nats per token and bits per byte; every window starts with an empty memory.

        Raises:
            ValueError: if the trainer was given no held-out text, or is handed another data set here.
        """
        held_out = self.held_out
        if held_out is None or eval_dataset is not None:
            raise ValueError(
                "evaluate() reads the held-out text that the trainer was made with: give held_out"
            )
        self._network.eval()
        total, count = 0.0, 0
        windows = Part(held_out.windows, self.processes.rank, self.processes.size)
        for batch in DataLoader(windows, self.args.eval_batch_size, collate_fn=default_collate):
            batch = self._prepare_inputs(batch)
            read, targets = _read_columns(batch), batch["labels"][:, 1:].flatten()
            logits = self._network(
                input_ids=read["input_ids"], attention_mask=read["attention_mask"], use_cache=False
            ).logits
            total += F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum").item()
            count += int((targets != -100).sum())
        self._network.train()
        total, count = self.processes.sums(total, count)
        loss = total / count
        bits = loss / math.log(2) * held_out.tokens_per_byte
        return {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_bits_per_byte": bits}

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        with self.metrics.paused():
            try:
                results = self.evaluate()
            except ValueError as error:
                raise self._stopped(f"the model could not read the held-out text ({error})") from error
        self._refuse_non_finite(results["eval_loss"], "held-out loss")
        self.metrics.log_evaluation(
            self.state.global_step, results["eval_loss"], results["eval_bits_per_byte"]
        )
        self.control.should_evaluate = False  # the library asks again at the end of the epoch
        return results

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        first, target = self.processes.is_first, self._folder / f"checkpoint-{self.state.global_step}"
        with self.metrics.paused():
            with files.shared_folder(target, self.processes) as folder:
                self._engine.save(folder, self._network, self._adamw)
                if self.carried is not None:
                    first_row = self.processes.rank * self.args.train_batch_size
                    carried.save(folder, self._network.config, self.carried, self._columns_carried, first_row)
                if self._cursors is not None:
                    cursors = self.processes.stacked(self._cursors.cpu())
                    if first:
                        files.save_cursors(folder, cursors)
                if first:
                    self._save_extras(folder)
                    self._save_rng_state(str(folder))
                    self.metrics.save(folder)
                    self.state.save_to_json(str(folder / _STATE_FILE))
            if first:
                files.delete_old(self._folder)

    def save_into(self, folder: Path) -> None:
        """Write the model and the files that it needs to be loaded from the folder alone; the first process
        writes, and all call it."""
        self._engine.save_model(folder, self._network)
        if self.processes.is_first:
            self._save_extras(folder)

    def _save_extras(self, folder: Path) -> None:
        if self.save_extras is not None:
            self.save_extras(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        parallel.load_weights(self._network, folder)
        if self.carry_memory:
            rows = self.processes.rows(self.processes.size * self.args.train_batch_size)
            self.carried, self._columns_carried = carried.load(
                folder, self._network.config, rows, self.args.device
            )
        if isinstance(self._examples, StreamDataset):
            step = files.step_of(folder)
            self._examples.resume(step, files.load_cursors(folder))
        self.metrics.load(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parallel.load_optimizer(Path(checkpoint), self._adamw, self._network)
        # The learning rate is a function of the step alone.
        schedule, step = self._schedule, self.state.global_step
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1})
        for group, base, factor in zip(
            self._adamw.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)

    def _save_rng_state(self, output_dir: str) -> None:
        files.save_random_state(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            files.load_random_state(Path(checkpoint))


def _cut_off_states(model: nn.Module, arguments: Any, output: Any) -> None:
    output.memory_states = map_state(Tensor.detach, output.memory_states)


def _read_columns(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a step reads: all columns but the last, whose tokens are predicted and never read.

    A token that is not read is 0, for a recorded step reads padding like text.
    """
    read = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask", "facts") if name in batch}
    return {**read, "input_ids": read["input_ids"] * read["attention_mask"]}
