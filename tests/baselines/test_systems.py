"""Every system: as many parameters as asked for, read in pieces as in one call, and able to learn."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from titans.baselines.systems import SYSTEMS, load_system, parse_parameters, system_config
from titans.baselines.systems.mamba import REFERENCE, selective_scan
from titans.cli import main
from titans.nn.blocks.rwkv7 import generalized_delta
from titans.train.optimizer import make_optimizer

from ..tolerances import FLOAT64, assert_close

PARAMETERS = 48_000
IDS = torch.randint(256, (2, 41), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_has_its_size_reads_in_pieces_and_learns(name: str) -> None:
    system = SYSTEMS[name]
    config = system.sized(PARAMETERS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = system.build(config)
    assert abs(sum(p.numel() for p in model.parameters()) / PARAMETERS - 1) <= 0.02

    reader, ids = system.reader(model), IDS[:, :-1]
    whole, cache = reader.read(ids, reader.start(), all_logits=True).logits, reader.start()
    pieces = [reader.read(piece, cache, all_logits=True).logits for piece in ids.split([19, 1, 20], 1)]
    assert whole is not None and cache.num_columns == 40 and cache.nbytes() > 0
    assert_close(torch.cat([x for x in pieces if x is not None], 1), whole, 3e-5, "logits")

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), IDS[:, 1:].flatten())

    model.train()
    before = loss()
    assert_close(before, F.cross_entropy(whole.flatten(0, 1), IDS[:, 1:].flatten()), 1e-4, "loss")
    before.backward()
    make_optimizer(model, 3e-3, 0.0, (0.9, 0.95)).step()
    assert loss().item() < before.item() - 0.01


def test_an_unknown_system_or_a_bad_size_is_refused() -> None:
    with pytest.raises(ValueError, match="model='gpt': choose one of lmm, mac"):
        system_config("gpt", "1M")
    for text in ("1", "many", "inf", "-3M", ""):
        with pytest.raises(ValueError, match="parameters="):
            parse_parameters(text)
    assert parse_parameters("1.5M") == 1_500_000 and parse_parameters("350k") == 350_000
    with pytest.raises(ValueError, match="parameters=2,000: the nearest LSTM is"):
        system_config("lstm", 2_000)
    with pytest.raises(ValueError, match="config sets 'heads'"):
        system_config("transformer", PARAMETERS, changes={"heads": 2})
    assert system_config("transformer", PARAMETERS, changes={"rms_norm_eps": 1e-5}).num_hidden_layers == 2


def test_rwkv7_computes_what_flash_linear_attention_computes() -> None:
    pytest.importorskip("einops", reason="einops is missing: pip install fla-core==0.6.0 einops")
    try:
        path = distribution("fla-core").locate_file("fla/ops/generalized_delta_rule/dplr/naive.py")
    except PackageNotFoundError:
        pytest.skip("fla-core is missing: pip install fla-core==0.6.0 einops")
    names: dict[str, Any] = {}
    exec(compile(Path(str(path)).read_text().replace(".float()", ".double()"), str(path), "exec"), names)
    generator = torch.Generator().manual_seed(1)
    reads, keys, values, removed, rate, decay = torch.randn(
        6, 2, 37, 3, 8, generator=generator, dtype=torch.float64
    )
    removed, rate = F.normalize(removed, dim=-1), torch.sigmoid(rate)
    log_decay = -torch.sigmoid(decay)
    start = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    arguments = (reads, log_decay, keys, values, -removed, removed * rate)
    found, matrix = generalized_delta(*arguments, start)
    heads = [x.transpose(1, 2) for x in (reads * 8**0.5, keys, values, -removed, removed * rate, log_decay)]
    expected, state = names["dplr_recurrence"](*heads, initial_state=start)
    assert_close(found, expected.transpose(1, 2), FLOAT64, "reads")
    assert_close(matrix, state, FLOAT64, "state")


def test_the_scan_of_mamba_is_the_reference_of_transformers() -> None:
    reference = inspect.unwrap(REFERENCE)
    generator = torch.Generator().manual_seed(2)
    x, steps, gate = torch.randn(3, 2, 6, 9, generator=generator)
    B, C = torch.randn(2, 2, 4, 9, generator=generator)
    A, D, bias = -torch.rand(6, 4, generator=generator), torch.ones(6), torch.randn(6, generator=generator)
    options: dict[str, Any] = dict(z=gate, delta_bias=bias, delta_softplus=True, return_last_state=True)
    for ours, theirs in zip(
        selective_scan(x, steps, A, B, C, D, **options),
        reference(x, steps, A, B, C, D, **options),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-6, "scan")


def test_a_system_is_trained_by_the_same_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes more time than training here.
    for module in ("metrics", "recipe"):
        monkeypatch.setattr(f"titans.train.{module}.draw_curves", lambda lines, path: None)
    output = tmp_path / "run"
    command = ["train", "--data", "excerpt", "--output", str(output), "--model", "mamba2"]
    sizes = ["--parameters", "40k", "--batch-size", "2", "--sequence-length", "24", "--eval-tokens", "96"]
    code = main([*command, *sizes, "--steps", "2", "--threads", "1", "--save-every", "1", "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert err.startswith("mamba2, 0.04 M parameters")
    assert main([*command, "--steps", "3", "--resume", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["steps"] == 3 and abs(result["num_parameters"] / 40_000 - 1) <= 0.02
    reader = SYSTEMS["mamba2"].reader(load_system("mamba2", output))
    cache = reader.start()
    reader.read(IDS[:, :9], cache)
    assert reader.read(IDS[:, 9:12], cache).logits is not None and cache.num_columns == 12
    assert main([*command, *sizes, "--steps", "3", "--carry-memory"]) == 2
    assert "carry_memory with model='mamba2'" in capfd.readouterr().err
