"""A training run: from settings to a trained model in a folder."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as library_logging

from titans.data import StreamDataset, is_corpus, load_corpus, load_tokenizer, weighted_corpora
from titans.data.token_cache import OnTokenised
from titans.hf import PEAK_LEARNING_RATES, PRESETS, TitansConfig
from titans.train.checkpoint import (
    alone_in,
    checkpoints,
    delete_unfinished,
    flush,
    step_of,
    write_json,
    writing,
)
from titans.train.examples import make_examples
from titans.train.interrupt import stops_on_interrupt
from titans.train.metrics import MetricsLog, draw_curves, read_metrics
from titans.train.model import check_depth, make_model, model_config
from titans.train.optimizer import make_optimizer, make_schedule
from titans.train.parallel import ENGINES, load_weights
from titans.train.processes import join
from titans.train.settings import SETTINGS_FILE, TrainSettings
from titans.train.trainer import TitansTrainer

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"


class Interrupted(KeyboardInterrupt):
    """Training was stopped from the keyboard, after its last step had been saved."""


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run, resumed parts included.

    `losses` are (step, nats per token) of every logged step, `evaluations` (step, held-out bits per byte);
    `bits_per_byte` is the last of these, None without held-out text; `tokens_per_second` is the mean over the
    logged steps; `elapsed` is in seconds.
    """

    output: Path
    steps: int
    num_parameters: int
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    bits_per_byte: float | None
    tokens_per_second: float
    elapsed: float


def check(settings: TrainSettings) -> None:
    """Find what is wrong with the settings themselves, before anything is read or written.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    settings.check()
    processes = join()
    processes.rows(settings.batch_size)
    if settings.cuda_graph and processes.size > 1:
        raise ValueError(
            f"cuda_graph with {processes.size} processes: a recorded step exchanges no gradients; "
            "leave it out"
        )
    config = model_config(settings, PRESETS.get(settings.preset, {}).get("vocab_size", 256))
    if not isinstance(config, TitansConfig):
        _check_other(settings)
    elif (
        config.memory.local_chunk_sizes
        and settings.sequence_length <= config.chunk_size
        and not settings.carry_memory
    ):
        raise ValueError(
            f"sequence_length={settings.sequence_length} with chunk_size={config.chunk_size} and local "
            "memories: the global memory is read from its second chunk on, so that a row needs two; give "
            "longer rows, or carry_memory"
        )
    if settings.cuda_graph:
        if not torch.cuda.is_available():
            raise ValueError("cuda_graph=True needs a CUDA device, and there is none: leave it out")
        assert isinstance(config, TitansConfig), "others have been refused"
        whole = math.lcm(config.chunk_size, config.segment_length, config.memory.shard_length or 1)
        if settings.sequence_length % whole:
            raise ValueError(
                f"cuda_graph with sequence_length={settings.sequence_length}: give a multiple of {whole}, so "
                "that every step begins with a chunk, a segment and a shard"
            )
    for corpus in filter(None, (*(c.name for c in weighted_corpora(settings.data)), settings.eval_data)):
        if not is_corpus(corpus):
            load_corpus(corpus)  # raises, listing the known names
    found = checkpoints(settings.output)
    if settings.resume:
        if not found:
            raise ValueError(
                f"resume: there is no checkpoint in output={str(settings.output)!r}; start without it"
            )
        settings.check_resumes(found[-1])
        if step_of(found[-1]) > settings.steps:
            raise ValueError(f"steps={settings.steps}: {found[-1]} is past that; give as many at least")
    elif found or (settings.output / "model.safetensors").exists():
        raise ValueError(
            f"output={str(settings.output)!r} already holds a run: set resume to continue it, or give "
            "another folder"
        )
    elif settings.output.exists() and not settings.output.is_dir():
        raise ValueError(f"output={str(settings.output)!r} is a file: give a folder")


def _check_other(settings: TrainSettings) -> None:
    """Refuse what only a model of this library can do.

    Raises:
        ValueError: naming the setting.
    """
    asked = {
        "carry_memory": settings.carry_memory,
        "cuda_graph": settings.cuda_graph,
        "facts.write_cost": settings.facts.write_cost > 0,
        "start_from": settings.start_from is not None,
    }
    if wrong := [name for name, given in asked.items() if given]:
        raise ValueError(f"{wrong[0]} with model={settings.model!r}, which is no Titans model: leave it out")


def _newest(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from, of settings that have been checked."""
    return checkpoints(settings.output)[-1] if settings.resume else None


class TrainingRun:
    """A run that is ready to start: data read, model built.

    Args:
        on_tokenised: called with bytes done, bytes of all and tokens so far while a cache of tokens is made.

    Raises:
        ValueError: for settings, data or a checkpoint that cannot be used.
        OSError: if the output folder cannot be written.
    """

    def __init__(self, settings: TrainSettings, on_tokenised: OnTokenised | None = None) -> None:
        self.processes = join()
        check(settings)
        self.settings = settings
        self.checkpoint = _newest(settings)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.tokenizer = load_tokenizer(settings.tokenizer)
        rows = self.processes.rows(settings.batch_size)
        self.examples = make_examples(settings, self.tokenizer, rows, on_tokenised)
        config = model_config(settings, len(self.tokenizer))
        set_seed(settings.seed)
        self.model = make_model(settings, config)
        if settings.start_from is not None:
            assert isinstance(config, TitansConfig), "others have been refused"
            check_depth(config, settings.start_from)
            load_weights(self.model, settings.start_from)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.num_parameters = self.model.num_parameters()

    def summary(self) -> str:
        """The run in one line: model, data, steps, output folder."""
        settings, examples = self.settings, self.examples
        held_out = ", ".join(examples.held_out_names[:3]) + (" …" if len(examples.held_out_names) > 3 else "")
        name = f"{settings.preset} {settings.variant}" if settings.model is None else settings.model
        size = f"{name}, {self.num_parameters / 1e6:.2f} M parameters"
        corpora = settings.data if isinstance(settings.data, str) else " ".join(settings.data)
        data = f"{corpora}: streamed"
        if examples.num_train_tokens is not None:
            data = (
                f"{corpora}: {examples.num_train_documents} documents, {examples.num_train_tokens:,} tokens"
            )
        work = f"{settings.steps} steps of {settings.batch_size} × {settings.sequence_length} tokens"
        resuming = f"; resuming from {self.checkpoint.name}" if self.checkpoint else ""
        return (
            f"{size}; {data}; held out: {held_out or 'nothing'}; {work}; output: {settings.output}{resuming}"
        )

    def run(self, on_log: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
        """Train to the end; `on_log` is called with every object that goes into metrics.jsonl.

        Raises:
            ValueError: if another process is training in the output folder.
            NonFiniteError: if the loss or the gradient is NaN or infinite.
            Interrupted: after SIGINT, once a checkpoint has been written.
            OSError: if the output folder cannot be written; the last good checkpoint is still there.
        """
        output = self.settings.output
        with writing(output / SETTINGS_FILE):
            output.mkdir(parents=True, exist_ok=True)
        with self.processes.end_together(), alone_in(output) if self.processes.is_first else nullcontext():
            # Another process may have trained there since this one looked.
            check(self.settings)
            self.checkpoint = _newest(self.settings)
            return self._run(on_log)

    def _run(self, on_log: Callable[[dict[str, Any]], None] | None) -> TrainResult:
        settings = self.settings
        if self.processes.is_first:
            with writing(settings.output / SETTINGS_FILE):
                delete_unfinished(settings.output)
                if self.checkpoint is None:
                    (settings.output / METRICS_FILE).unlink(missing_ok=True)
                write_json(settings.output / SETTINGS_FILE, settings.to_json())
        self.processes.wait()
        with _quiet_library(), _products_in(settings.dtype):
            trainer = self._trainer(on_log)
            with stops_on_interrupt(trainer):
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            step = trainer.state.global_step
            if step < settings.steps:
                raise Interrupted(
                    f"interrupted after step {step} of {settings.steps}; checkpoint-{step} in "
                    f"{settings.output} is complete: continue with --resume"
                )
            self._write_model(trainer)
        return self._result()

    def _trainer(self, on_log: Callable[[dict[str, Any]], None] | None) -> TitansTrainer:
        settings = self.settings
        rows = self.processes.rows(settings.batch_size)
        # Other processes prepare text, so that a GPU does not wait for it; a stream is read by one of them.
        workers = 1 if isinstance(self.examples.train, StreamDataset) else 2
        arguments = TrainingArguments(
            output_dir=str(settings.output),
            per_device_train_batch_size=len(rows),
            per_device_eval_batch_size=len(rows),
            max_steps=settings.steps,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=settings.dtype == "bfloat16",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_num_workers=workers if torch.cuda.is_available() else 0,
            dataloader_prefetch_factor=16 if torch.cuda.is_available() else None,
            use_cache=self.model.config.use_cache,
            # A part of the model that writes rarely takes part in some steps, and not in all processes.
            ddp_find_unused_parameters=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        if arguments.world_size != self.processes.size:
            raise ValueError(
                f"{arguments.world_size} processes were started in a way that this library does not know: "
                "use torchrun or accelerate launch"
            )
        # With several devices in sight the library would split each step between copies of the model.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        peak = (
            PEAK_LEARNING_RATES[settings.preset] if settings.learning_rate is None else settings.learning_rate
        )
        warmup = min(settings.steps // 10, 2000) if settings.warmup_steps is None else settings.warmup_steps
        engine = ENGINES[settings.parallel if self.processes.size > 1 else "ddp"](self.processes)
        engine.spread(self.model, settings.dtype == "bfloat16")
        optimizer = make_optimizer(self.model, peak, settings.weight_decay, settings.betas)
        return TitansTrainer(
            self.model,
            arguments,
            self.examples.train,
            self.examples.held_out,
            (optimizer, make_schedule(optimizer, settings.steps, warmup, settings.min_learning_rate)),
            MetricsLog(settings.output / METRICS_FILE, on_log, writes=self.processes.is_first),
            engine,
            carry_memory=settings.carry_memory,
            answer_weight=settings.facts.answer_weight,
            write_cost=settings.facts.write_cost,
            write_cost_reach=settings.facts.write_cost_reach,
            cuda_graph=settings.cuda_graph,
            eval_every=settings.eval_every,
            save_every=settings.save_every,
            log_every=settings.log_every,
            save_extras=self._save_extras,
        )

    def _save_extras(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        write_json(folder / SETTINGS_FILE, self.settings.to_json())

    def _write_model(self, trainer: TitansTrainer) -> None:
        output = self.settings.output
        if not self.processes.is_first:
            trainer.save_into(output)
            self.processes.wait()
            return
        with (
            writing(output / "model.safetensors"),
            tempfile.TemporaryDirectory(dir=output, prefix=".checkpoint-final.") as folder,
        ):
            trainer.save_into(Path(folder))
            flush(Path(folder))
            for file in Path(folder).iterdir():
                os.replace(file, output / file.name)
            draw_curves(read_metrics(output / METRICS_FILE), output / CURVES_FILE)
        self.processes.wait()

    def _result(self) -> TrainResult:
        lines = read_metrics(self.settings.output / METRICS_FILE)
        training = [line for line in lines if line["kind"] == "train"]
        evaluations = tuple((line["step"], line["bits_per_byte"]) for line in lines if line["kind"] == "eval")
        return TrainResult(
            output=self.settings.output,
            steps=self.settings.steps,
            num_parameters=self.num_parameters,
            losses=tuple((line["step"], line["loss"]) for line in training),
            evaluations=evaluations,
            bits_per_byte=evaluations[-1][1] if evaluations else None,
            tokens_per_second=sum(line["tokens_per_second"] for line in training) / len(training),
            elapsed=lines[-1]["elapsed"],
        )


def train(settings: TrainSettings, on_log: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Train a model according to the settings; errors are those of `TrainingRun` and `TrainingRun.run`."""
    return TrainingRun(settings).run(on_log)


@contextmanager
def _products_in(dtype: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tfloat32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _quiet_library() -> Iterator[None]:
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # No block changes what another has returned in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()
