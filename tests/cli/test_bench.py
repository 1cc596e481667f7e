"""titans bench: its numbers as far as no clock decides them, and its errors when it is called wrongly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from titans.cli import main
from titans.evaluate.throughput import throughput
from titans.hf import TitansConfig, TitansForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, head_dim=16,
    memory_depth=2, memory_expansion=2, chunk_size=16, segment_length=16, sliding_window=16,
    num_persistent_tokens=0,
)  # fmt: skip
RATES = ("decoding", "reading", "training")


def small(**fields: Any) -> TitansForCausalLM:
    return TitansForCausalLM(TitansConfig(**{**SIZES, "variant": "lmm", "num_hidden_layers": 1, **fields}))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only counts operations does the work once, and no clock runs."""
    monkeypatch.setattr("titans.evaluate.throughput._median_seconds", lambda *_: 1.0)


def operations(length: int = 32, **fields: Any) -> dict[str, float]:
    found = throughput(small(**fields), batch_size=1, sequence_length=length, seconds=1e-3)
    return {name: getattr(found, name).operations_per_token for name in RATES}


def test_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    fields = [f"{name}={value}" for name, value in SIZES.items()]
    fields += ["memory_depth=1", "memory.features=sin", "memory.start=sharp"]
    options = ["--batch-size", "2", "--sequence-length", "32", "--seconds", "0.05", "--device", "cpu"]
    options += ["--threads", str(torch.get_num_threads()), "--json", "--config", *fields]
    assert main(["bench", "--preset", "tiny", "--variant", "lmm", *options]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found.keys() == {
        "checkpoint", "variant", "parameters", "device", "threads", "batch_size", "sequence_length",
        "roofline", *RATES, "state_bytes", "state_tokens",
    }  # fmt: skip
    assert (found["checkpoint"], found["variant"], found["device"]) == (None, "lmm", "cpu")
    for rate in (found[name] for name in RATES):
        assert all(math.isfinite(number) and number > 0 for number in rate.values()), rate
        done = rate["tokens_per_second"] * rate["operations_per_token"]
        assert rate["roofline_percent"] == pytest.approx(100 * done / found["roofline"])
    tokens = {"decoding": 2, "reading": 64, "training": 64}
    for name, count in tokens.items():
        rate = found[name]
        assert rate["tokens_per_second"] * rate["milliseconds"] == pytest.approx(1000 * count)
    assert found["decoding"]["peak_bytes"] <= found["training"]["peak_bytes"]
    assert all(f"measuring: {name}" in err for name in RATES) and "roofline" in err.lower()


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(vocab_size=256)
    model.save_pretrained(tmp_path)
    options = ["--batch-size", "1", "--sequence-length", "16", "--seconds", "0.001", "--json"]
    assert main(["bench", *options, "--checkpoint", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(tmp_path) and found["parameters"] == model.num_parameters()


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("variant", ["mac", "transformer"])
def test_every_layer_has_the_same_operations(variant: str) -> None:
    one, two, three = (operations(16, variant=variant, num_hidden_layers=layers) for layers in (1, 2, 3))
    for name in RATES:
        layer = two[name] - one[name]
        assert layer > 0 and three[name] - two[name] == pytest.approx(layer), name


def two_layers(d: int, chunk: int) -> int:
    m = 2 * d
    return 26 * d * m + 4 * chunk * (d + m) + 4 * chunk**2


def sin_features(d: int, chunk: int) -> int:
    m = 4 * d
    return 12 * d * m + 2 * chunk * (d + m) + 2 * chunk**2 + 4 * d * m


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("fields", "formula"),
    [({}, two_layers), (dict(memory_depth=1, memory={"features": "sin"}), sin_features)],
)
def test_operations_are_those_of_the_formula(fields: dict[str, Any], formula: Any) -> None:
    # docs/how/speed.md and docs/how/maths.md; what is decayed to, and the products of gates, are about.
    layer = operations(num_hidden_layers=2, **fields)["reading"] - operations(**fields)["reading"]
    heads, d, chunk = 2, 16, 16
    # Of queries, keys and values, four tokens wide.
    convolution = 2 * 4 * 3 * heads * d
    matrices = [
        module.weight.numel()
        for module in small(**fields).model.layers[0].modules()
        if isinstance(module, torch.nn.Linear)
    ]
    expected = heads * formula(d, chunk) + convolution + 2 * sum(matrices)
    assert layer == pytest.approx(expected, rel=0.1)


@pytest.mark.usefixtures("untimed")
def test_attention_is_counted() -> None:
    # Two products with as many keys as were read, as many again, and this one, in the last of two stretches.
    few, many = (
        throughput(small(variant="transformer"), batch_size=1, sequence_length=length, seconds=1e-3)
        for length in (32, 64)
    )
    expected = 2 * 2 * 2 * 16 * (2 * 64 - 2 * 32)
    head = 2 * 32 * 64 * (1 / 64 - 1 / 32)
    found = many.reading.operations_per_token - few.reading.operations_per_token
    assert found == pytest.approx(expected + head, rel=0.01)


def test_a_model_is_left_as_it_was() -> None:
    model = small().train()
    model.model.layers[0].mixer.memory.backend = "reference"
    throughput(model, batch_size=1, sequence_length=16, seconds=1e-3)
    assert model.training and model.model.layers[0].mixer.memory.backend == "reference"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["titans-lmm-tiny", "--preset", "tiny"], "preset='tiny' with checkpoint='titans-lmm-tiny'"),
        (["titans-lmm-tiny", "--variant", "mac"], "variant='mac' with checkpoint"),
        (["titans-lmm-tiny", "--config", "chunk_size=8"], "config={'chunk_size': 8} with checkpoint"),
        (["--preset", "huge"], "preset 'huge' is not known: choose one of"),
        (["--variant", "rnn"], "variant='rnn': choose one of"),
        (["--config", "chunks=8"], "chunks=8 is not a field of TitansConfig"),
        (["--config", "variant=mac"], "give --variant instead"),
        (["--config", "hidden_size=wide"], "hidden_size"),
        (["--batch-size", "0"], "batch_size=0: give a whole number of at least 1"),
        (["--sequence-length", "1"], "sequence_length=1: give a whole number of at least 2"),
        (["--threads", "0"], "threads=0: give a whole number of at least 1"),
        (["--seconds", "0"], "seconds=0.0: give a number above 0"),
        (["--seconds", "nan"], "seconds=nan: give a number above 0"),
        (["--device", "tpu"], "device='tpu': choose one of cpu"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("titans: ") and err.count("\n") == 1 and message in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "Example: titans bench" in capsys.readouterr().out
