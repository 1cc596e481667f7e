from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from titans.train import FactSettings, Interrupted, NonFiniteError, TrainingRun, TrainSettings, train
from titans.train.checkpoint import alone_in

Make = Callable[..., TrainSettings]
TIMES = ("elapsed", "loading", "tokens_per_second")


def curve(output: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl but the times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_a_model_its_metrics_and_no_pickles(settings: Make) -> None:
    seen: list[dict[str, Any]] = []
    result = train(settings(), seen.append)
    output = result.output
    assert names(output) == {
        "checkpoint-6", "checkpoint-8", "config.json", "curves.png", "generation_config.json",
        "metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json",
    }  # fmt: skip
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".png", ".safetensors"}
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "training.json").read_text())["sequence_length"] == 40

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 3), ("eval", 4), ("train", 6), ("train", 8), ("eval", 8)
    ]  # fmt: skip
    assert set(lines[0]) == {"kind", "step", "loss", "learning_rate", "grad_norm", *TIMES}
    assert all(0 < line["loading"] < 1 for line in lines if line["kind"] == "train")
    assert set(lines[1]) == {"kind", "step", "loss", "bits_per_byte", "elapsed"}
    assert result.losses == tuple((line["step"], line["loss"]) for line in lines if line["kind"] == "train")
    assert result.bits_per_byte == lines[-1]["bits_per_byte"] < 8
    assert result.losses[-1][1] < result.losses[0][1]

    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.use_cache and model.num_parameters() == result.num_parameters
    final, last = (
        load_file(output / "model.safetensors"),
        load_file(output / "checkpoint-8/model.safetensors"),
    )
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert AutoTokenizer.from_pretrained(output)("é")["input_ids"] == [0xC3, 0xA9]


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(settings: Make) -> None:
    more: dict[str, Any] = dict(carry_memory=True, facts=FactSettings(spacing=100.0))
    whole = settings(steps=13, output=settings().output / "whole", **more)
    train(whole)

    stopped = dataclasses.replace(whole, output=settings().output / "stopped")

    def stop_after_five(line: dict[str, Any]) -> None:
        # The evaluation of step 4 comes after its checkpoint is decided on; step 5 is not one that is logged.
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"after step 5 of 13"):
        train(stopped, stop_after_five)
    before = curve(stopped.output)
    assert before == curve(whole.output)[: len(before)] and before[-1]["step"] == 4
    train(dataclasses.replace(stopped, resume=True))
    assert curve(stopped.output) == curve(whole.output)

    # As after a power cut: the last checkpoint is gone, but lines written after the one before it are there.
    shutil.rmtree(stopped.output / "checkpoint-13")
    with (stopped.output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    train(dataclasses.replace(stopped, resume=True))
    assert curve(stopped.output) == curve(whole.output)

    for name in ("model.safetensors", "checkpoint-13/optimizer.safetensors"):
        one, other = load_file(whole.output / name), load_file(stopped.output / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_resuming_may_train_longer_but_not_on_something_else(settings: Make) -> None:
    train(settings(steps=3))
    file = settings().output / "checkpoint-3" / "training.json"
    # The form of a time when all settings were flat and one of them did not exist.
    flat = json.loads(file.read_text())
    facts = flat.pop("facts")
    del facts["write_cost_reach"]
    names = {"spacing": "fact_spacing", "distance": "fact_distance", "alike": "facts_alike"}
    flat |= {names.get(name, name): value for name, value in facts.items()}
    # Two layers were the default until the depth was written down.
    assert flat["config"].pop("memory_depth") == 2
    file.write_text(json.dumps(flat | {"state_passing": 0.5}))
    with pytest.raises(ValueError, match=r"state_passing=0.5: no row begins with the memory of another"):
        train(settings(steps=5, resume=True))
    file.write_text(json.dumps(flat | {"state_passing": 0.0}))
    with pytest.raises(ValueError, match=r"facts.write_cost_reach=9.0, but .*checkpoint-3"):
        train(settings(steps=5, resume=True, facts=FactSettings(write_cost_reach=9.0)))
    result = train(settings(steps=5, resume=True))
    assert [step for step, _ in result.losses] == [3, 5]
    with pytest.raises(ValueError, match=r"batch_size=2, but .*checkpoint-5 was trained with batch_size=4"):
        train(settings(steps=7, batch_size=2, resume=True))
    (settings().output / "checkpoint-5" / "optimizer.safetensors").write_bytes(b"not one")
    with pytest.raises(
        ValueError, match=r"optimizer.safetensors is missing or damaged .* delete checkpoint-5"
    ):
        train(settings(steps=7, resume=True))


@pytest.mark.parametrize("where", ["loss", "gradient", "forget", "held-out loss", "held-out text"])
def test_nan_stops_before_it_reaches_the_weights_or_a_checkpoint(settings: Make, where: str) -> None:
    run = TrainingRun(settings(save_every=2, eval_every=3 if "held-out" in where else 4))
    early = where in ("forget", "held-out text")
    weight = run.model.model.embed_tokens.weight if early else run.model.model.norm.weight

    def poison(line: dict[str, Any]) -> None:
        if line["step"] == 3 and where != "gradient":
            weight.data.fill_(float("nan"))
        elif line["step"] == 3:
            weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(
        NonFiniteError, match=rf"{where}.* at step 4: .*last good checkpoint is .*checkpoint-2"
    ):
        run.run(poison)
    assert {"checkpoint-2"} == {name for name in names(settings().output) if "checkpoint" in name}
    if where == "gradient":
        assert all(p.isfinite().all() for p in run.model.parameters())
        assert train(settings(save_every=2, resume=True, learning_rate=1e-4)).steps == 8


def test_a_full_disk_in_the_middle_of_a_checkpoint_costs_no_other(settings: Make) -> None:
    train(settings(output=settings().output / "whole"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(line: dict[str, Any]) -> None:
        if line["step"] == 4:  # the model still fits, its optimizer does not
            size = (settings().output / "checkpoint-3" / "model.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))

    try:
        with pytest.raises(
            OSError, match=r"checkpoint-6 could not be written .*last good checkpoint is checkpoint-3"
        ):
            train(settings(), fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name for name in names(settings().output) if "checkpoint" in name} == {"checkpoint-3"}
    train(settings(resume=True))
    assert curve(settings().output) == curve(settings().output / "whole")


def test_a_checkpoint_has_its_name_only_once_it_is_complete(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    monkeypatch.setattr(
        "titans.train.checkpoint.save_random_state", lambda folder: seen.append(names(folder.parent))
    )
    train(settings(steps=1))
    assert len(seen) == 1 and "checkpoint-1" not in seen[0]
    assert "checkpoint-1" in names(settings().output)


def test_what_a_killed_process_left_half_written_is_cleared(settings: Make) -> None:
    unfinished = settings().output / ".checkpoint-3.abc"
    unfinished.mkdir(parents=True)
    train(settings(steps=1))
    assert not unfinished.exists()


def test_two_trainings_do_not_share_a_folder(settings: Make) -> None:
    output = settings().output
    late = TrainingRun(settings(steps=1))
    output.mkdir(parents=True)
    with alone_in(output), pytest.raises(ValueError, match="another process is training there"):
        late.run()
    assert not names(output)
    train(settings(steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        late.run()
    assert curve(output)


@pytest.mark.parametrize("variant", ["mag", "mal", "lmm", "transformer"])
def test_every_variant_trains(settings: Make, variant: str) -> None:
    result = train(settings(variant=variant, steps=4, carry_memory=variant in ("mal", "lmm")))
    assert result.losses[-1][1] < result.losses[0][1]


def test_mixed_precision_and_gradient_checkpointing_train(settings: Make) -> None:
    plain = train(settings(steps=3, output=settings().output / "plain"))
    checkpointed = train(
        settings(steps=3, gradient_checkpointing=True, output=settings().output / "checkpointed")
    )
    assert checkpointed.losses[0][1] == pytest.approx(plain.losses[0][1])
    mixed = train(settings(steps=3, dtype="bfloat16", output=settings().output / "mixed"))
    assert mixed.losses[0][1] == pytest.approx(plain.losses[0][1], rel=0.02)
    assert mixed.losses != plain.losses
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(mixed.output / "model.safetensors").values()
    )
