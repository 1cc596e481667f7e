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

import titans
from titans import Session
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


def run(settings: TrainSettings) -> None:
    """In float64, so that what differs is not how sums are rounded."""
    prepared = TrainingRun(settings)
    prepared.model.double()
    prepared.run()


def curve(output: Path) -> list[dict[str, Any]]:
    unlike = ("kind", "elapsed", "loading", "tokens_per_second")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in unlike} for line in lines]


def assert_same(one: Path, other: Path, atol: float = 1e-10) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol, msg=f"{other}: {name}")
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        # Logits are rounded to float32.
        assert theirs == pytest.approx(ours, rel=1e-6), other


def run_as_it_is(settings: TrainSettings) -> None:
    """In the precision that the settings ask for."""
    TrainingRun(settings).run()


def test_two_processes_train_as_one_and_resume_in_any_number(settings: Make, tmp_path: Path) -> None:
    base = settings(
        config=CONFIG, steps=2, sequence_length=24, log_every=1, eval_every=9, save_every=99, hold_out=0
    )
    # Twenty steps of every variant, with both engines, with and without a carried memory.
    long: dict[str, Any] = {"steps": 20, "log_every": 5, "eval_every": 99}
    cases: dict[str, dict[str, Any]] = {
        f"{variant}-{engine}-{carried}": {
            "variant": variant,
            "parallel": engine,
            "carry_memory": carried,
            **long,
        }
        for variant in ("mac", "mag", "mal", "lmm")
        for engine in ("ddp", "fsdp")
        for carried in (False, True)
    }
    cases["hope"] = {"variant": "hope", "carry_memory": True, "parallel": "ddp"}
    cases["transformer"] = {"variant": "transformer", "parallel": "ddp"}
    cases["window"] = {"variant": "window", "parallel": "fsdp"}
    # Rows of different lengths, weights, a price on writing; held-out text that does not divide evenly.
    facts = FactSettings(spacing=60.0, distance=32, answer_weight=3.0, write_cost=0.1)
    held_out = {"hold_out": 0.2, "eval_every": 2, "eval_tokens": 72}
    cases["facts"] = {"facts": facts, "variant": "lmm", "steps": 3, **held_out}
    # Documents are streamed.
    assert isinstance(base.data, str)
    mixture: Any = {"data": (f"{base.data}=0.7", "excerpt=0.3")}
    cases["packed"] = {"variant": "lmm", **mixture, "parallel": "fsdp"}

    # Not to be compared digit by digit: rounded products, and models of which not all run in float64.
    rounded: dict[str, dict[str, Any]] = {}
    cheap = {"variant": "mac", "dtype": "bfloat16", "gradient_checkpointing": True}
    for engine in ("ddp", "fsdp"):
        rounded[f"bfloat16-{engine}"] = {**cheap, "parallel": engine}
    rounded["system"] = {"model": "gated-deltanet", "parameters": "40k", "config": {}, "parallel": "ddp"}

    # At a constant rate a run that goes on after step 2 is the run of three.
    constant = {
        **mixture,
        "variant": "mal",
        "carry_memory": True,
        "min_learning_rate": 1.0,
        "warmup_steps": 0,
    }
    three = replace(base, steps=3, save_every=2, **constant)
    first = {
        engine: replace(three, output=tmp_path / f"first-{engine}", parallel=engine)
        for engine in ("ddp", "fsdp")
    }

    def work(rank: int) -> None:
        for name, changes in cases.items():
            run(replace(base, output=tmp_path / "two" / name, **changes))
        for name, changes in rounded.items():
            run_as_it_is(replace(base, output=tmp_path / "two" / name, **changes))
        run(replace(first["ddp"], steps=2))
        TitansTrainer.training_step = killed  # type: ignore[method-assign]
        run(first["fsdp"])

    step = TitansTrainer.training_step

    def killed(self: TitansTrainer, *given: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    def go_on(rank: int) -> None:
        for engine, one in first.items():
            # What one engine wrote, the other reads.
            other = "fsdp" if engine == "ddp" else "ddp"
            run(replace(one, output=tmp_path / f"again-{engine}", resume=True, parallel=other))

    codes = run_pair(work, tmp_path)
    assert codes == [-signal.SIGKILL] * 2, "".join(path.read_text() for path in tmp_path.glob("*.err"))
    for engine, one in first.items():
        for copy in (f"again-{engine}", f"alone-{engine}"):
            shutil.copytree(one.output, tmp_path / copy)
    assert run_pair(go_on, tmp_path) == [0, 0], "".join(path.read_text() for path in tmp_path.glob("*.err"))

    # What the killed processes left is in parts, and a model all the same.
    left = tmp_path / "first-fsdp" / "checkpoint-2"
    assert (left / "parts").is_dir() and not (left / "model.safetensors").exists()
    model, tokenizer = titans.load(left)
    assert Session(model, tokenizer).feed("The sea").tokens == 7
    assert main(["info", str(left)]) == 0
    for path in (left / "parts").glob("*.safetensors"):
        path.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"parts is damaged or of another model"):
        titans.load(left)

    gc.freeze()  # else every run collects garbage in all that the test runner has loaded
    done: dict[str, Path] = {}
    for name, changes in (cases | rounded).items():
        alone = {key: value for key, value in changes.items() if key != "parallel"}
        if (key := str(alone)) not in done:
            done[key] = tmp_path / "one" / name
            (run if name in cases else run_as_it_is)(replace(base, output=done[key], **alone))
        if name in cases:
            # Over twenty steps what differs by rounding grows a hundredfold.
            assert_same(
                done[key], tmp_path / "two" / name, atol=1e-10 if changes.get("steps") != 20 else 1e-8
            )
        else:
            ours, theirs = (
                [line["loss"] for line in curve(folder)] for folder in (done[key], tmp_path / "two" / name)
            )
            assert theirs == pytest.approx(ours, rel=1e-2 if "bfloat16" in name else 1e-5), name
            weights = load_file(tmp_path / "two" / name / "model.safetensors")
            assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "=0.7 excerpt=0.3: streamed; held out: nothing" in TrainingRun(three).summary()
    run(replace(three, output=tmp_path / "whole"))
    for engine, one in first.items():
        assert_same(tmp_path / "whole", tmp_path / f"again-{engine}")
        run(replace(one, output=tmp_path / f"alone-{engine}", resume=True))
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
