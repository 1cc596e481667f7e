"""A run of two processes is the run of one with the same settings."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.pair import run_pair

from titans.cli import main
from titans.train import FactSettings, TrainingRun, TrainSettings
from titans.train.trainer import TitansTrainer

Make = Callable[..., TrainSettings]

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "chunk_size": 8,
    "segment_length": 16,
    "sliding_window": 16,
    "num_persistent_tokens": 2,
}
WITH_MEMORY, WITHOUT = ("mac", "mag", "mal", "lmm", "hope"), ("transformer", "window")


def run(settings: TrainSettings) -> None:
    """In float64, so that what differs is not how sums are rounded."""
    prepared = TrainingRun(settings)
    prepared.model.double()
    prepared.run()


def curve(output: Path) -> list[dict[str, Any]]:
    unlike = ("kind", "elapsed", "tokens_per_second")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in unlike} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-10, msg=f"{other}: {name}")
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        # Logits are rounded to float32.
        assert theirs == pytest.approx(ours, rel=1e-6), other


def test_two_processes_train_as_one_and_resume_in_any_number(settings: Make, tmp_path: Path) -> None:
    base = settings(
        config=CONFIG, steps=2, sequence_length=24, log_every=1, eval_every=9, save_every=9, hold_out=0
    )
    cases: dict[str, dict[str, Any]] = {}
    # The first step of a memory that is carried is also that of one that is not.
    cases["mac"], cases["mal"] = {"variant": "mac", "parallel": "ddp"}, {"variant": "mal", "parallel": "fsdp"}
    for variant in WITH_MEMORY:
        for engine in ("ddp", "fsdp"):
            cases[f"{variant}-{engine}"] = {"variant": variant, "carry_memory": True, "parallel": engine}
    for variant in WITHOUT:
        for engine in ("ddp", "fsdp"):
            cases[f"{variant}-{engine}"] = {"variant": variant, "parallel": engine}
    # Rows of different lengths, weights, a price on writing; held-out text that does not divide evenly.
    facts = FactSettings(spacing=60.0, distance=32, answer_weight=3.0, write_cost=0.1)
    held_out = {"hold_out": 0.2, "eval_every": 2, "eval_tokens": 72}
    cases["facts"] = {"facts": facts, "variant": "lmm", "steps": 3, **held_out}
    # At a constant rate a run of two steps that goes on is the run of three. Its documents are streamed.
    assert isinstance(base.data, str)
    mixture: Any = {"data": (f"{base.data}=0.7", "excerpt=0.3")}
    cases["packed"] = {"variant": "lmm", **mixture, **held_out}
    constant = {
        **mixture,
        "variant": "mal",
        "carry_memory": True,
        "min_learning_rate": 1.0,
        "warmup_steps": 0,
    }
    first = {
        engine: replace(base, output=tmp_path / f"first-{engine}", steps=2, parallel=engine, **constant)
        for engine in ("ddp", "fsdp")
    }

    def work(rank: int) -> None:
        for name, changes in cases.items():
            run(replace(base, output=tmp_path / "two" / name, **changes))
        for engine, one in first.items():
            run(one)
            if rank == 0:
                for copy in (f"again-{engine}", f"alone-{engine}"):
                    shutil.copytree(one.output, tmp_path / copy)
        for engine, one in first.items():
            # What one engine wrote, the other reads.
            other = "fsdp" if engine == "ddp" else "ddp"
            run(replace(one, output=tmp_path / f"again-{engine}", steps=3, resume=True, parallel=other))

    assert run_pair(work, tmp_path) == [0, 0], "".join(path.read_text() for path in tmp_path.glob("*.err"))
    gc.freeze()  # else every run collects garbage in all that the test runner has loaded
    done: dict[str, Path] = {}
    for name, changes in cases.items():
        alone = {key: value for key, value in changes.items() if key != "parallel"}
        if (key := str(alone)) not in done:
            done[key] = tmp_path / "one" / name
            run(replace(base, output=done[key], **alone))
        assert_same(done[key], tmp_path / "two" / name)
    run(replace(base, output=tmp_path / "whole", steps=3, **constant))
    for engine, one in first.items():
        assert_same(tmp_path / "whole", tmp_path / f"again-{engine}")
        run(replace(one, output=tmp_path / f"alone-{engine}", steps=3, resume=True))
        assert_same(tmp_path / "whole", tmp_path / f"alone-{engine}")
    gc.unfreeze()


def options(settings: TrainSettings) -> list[str]:
    config = [f"{name}={value}" for name, value in CONFIG.items()]
    return [
        "train", "--data", settings.data, "--output", str(settings.output), "--batch-size", "4",
        "--steps", "9", "--sequence-length", "24", "--threads", "1", "--hold-out", "0",
        "--config", *config,
    ]  # fmt: skip


def spoken(folder: Path) -> list[str]:
    """What both processes have complained about."""
    lines = [line for rank in "01" for line in (folder / f"{rank}.err").read_text().splitlines()]
    return [line for line in lines if line.startswith("titans:") or "Traceback" in line]


def test_an_error_in_one_process_ends_both_with_one_line(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TitansTrainer.training_step

    def fail(self: TitansTrainer, *given: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step == 1:
            raise OSError("the disk has gone")
        return step(self, *given)

    monkeypatch.setattr(TitansTrainer, "training_step", fail)
    codes = run_pair(lambda rank: main(options(settings())), tmp_path)
    assert codes == [1, 1]
    assert spoken(tmp_path) == ["titans: the disk has gone (in process 1 of 2)"]


def test_an_interrupt_in_one_process_saves_once(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TitansTrainer.training_step

    def interrupt(self: TitansTrainer, *given: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(TitansTrainer, "training_step", interrupt)
    codes = run_pair(lambda rank: main(options(settings())), tmp_path)
    assert set(codes) <= {1, 130} and 130 in codes
    (line,) = spoken(tmp_path)
    assert line.startswith("titans: interrupted after step 2 of 9; checkpoint-2 in ")
    assert (settings().output / "checkpoint-2" / "model.safetensors").exists()


def test_rows_that_cannot_be_divided_are_refused(settings: Make, tmp_path: Path) -> None:
    codes = run_pair(lambda rank: main([*options(settings()), "--batch-size", "3"]), tmp_path)
    assert set(codes) <= {1, 2}
    assert len(spoken(tmp_path)) == 1
    assert (
        "batch_size=3 with 2 processes: it counts the rows of all of them; give a multiple of 2"
        in (spoken(tmp_path)[0])
    )
