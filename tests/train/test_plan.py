from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from titans.cli import main
from titans.cli.train import defaults_of
from titans.train import TrainingRun, TrainSettings, train
from titans.train.plan import plan

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def recipe(name: str) -> TrainSettings:
    found = defaults_of(["--config-file", str(RECIPES / f"{name}.yml")])
    assert found is not None
    return TrainSettings(**{name: getattr(found, name) for name in TrainSettings.__dataclass_fields__})


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("170m", 170e6, 15e9),
        ("340m", 340e6, 15e9),
        ("400m", 400e6, 15e9),
        ("760m", 760e6, 30e9),
        ("1.3b", 1.3e9, 100e9),
    ],
)
def test_every_recipe_is_of_the_size_it_names(name: str, parameters: float, tokens: float) -> None:
    found = plan(recipe(name), devices=8)
    assert found.tokens == pytest.approx(tokens, rel=1e-3)
    # The paper gives neither the width of the feed-forward nor the memory's shape: the smallest has 119M.
    assert found.parameters == pytest.approx(parameters, rel=0.31)


def test_the_smallest_recipe_trains_at_reduced_depth(corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        data=str(corpus), output=tmp_path / "run", tokenizer="bytes", steps=3, batch_size=2,
        sequence_length=64,
        config={"num_hidden_layers": 1, "num_persistent_tokens": 4}, eval_every=9, save_every=9, hold_out=0.0,
        threads=1, warmup_steps=1, log_every=1,
    )  # fmt: skip
    losses = train(replace(recipe("170m"), **changes)).losses
    assert [step for step, _ in losses] == [1, 2, 3] and losses[-1][1] < losses[0][1]


def test_a_plan_counts_what_the_model_has(
    corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = TrainSettings(data=str(corpus), output=tmp_path / "run", steps=10, batch_size=4)
    found = plan(settings, rate=1000.0)
    run = TrainingRun(settings)
    assert found.parameters == run.num_parameters
    states = [layer.initial_state(1) for layer in run.model.model.layers]
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(states) if isinstance(leaf, torch.Tensor)]
    assert found.state_bytes == sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    assert found.optimizer == 2 * found.weights == 8 * found.parameters
    assert found.tokens == 10 * 4 * 256 and found.hours == pytest.approx(10 * 4 * 256 / 1000 / 3600)
    sharded = plan(TrainSettings(data=str(corpus), parallel="fsdp"), devices=4)
    assert sharded.optimizer == found.optimizer // 4
    with pytest.raises(ValueError, match=r"batch_size=4 with 3 devices: give a multiple of 3"):
        plan(settings, devices=3)
    options = ["--data", str(corpus), "--output", str(tmp_path / "run"), "--dry-run", "--flops", "1e12"]
    assert main(["train", *options]) == 0
    assert "hours on 1 devices" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
