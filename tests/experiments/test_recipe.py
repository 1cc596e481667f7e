"""The recipe of the models to try: every stage is sound, and goes on from the one before."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from safetensors.torch import load_file

from titans.experiments import recipe
from titans.train import FactSettings
from titans.train.recipe import check

from ..variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plain", [False, True])
def test_stages_are_settings_that_train(variant, plain, tmp_path):
    planned = recipe.stages(variant, tmp_path, plain)
    for stage in planned:
        check(stage)
        assert (stage.facts.spacing is None) == (stage.facts.answer_weight == 1) == plain
        assert not plain or stage.facts == FactSettings()
    for before, after in pairwise(planned):
        assert after.start_from == before.output
        assert after.config == before.config


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_on_a_gpu_go_on_from_each_other_and_end_as_without_one(variant, tmp_path):
    planned, plain = (recipe.stages(variant, tmp_path, plain, gpu=True) for plain in (False, True))
    for stage in (*planned, *plain):
        stage.check()
    assert [stage.output.name for stage in planned] == ["dense", "near", "far", "keep", "hold"]
    for before, after in pairwise(planned):
        assert after.start_from == before.output and after.config == before.config
    prices = [stage.facts.write_cost for stage in planned]
    assert prices[2] == 0 and prices == sorted(prices)
    assert not any(stage.facts.write_cost for stage in plain)


def test_the_command_goes_through_its_stages_once(monkeypatch, tmp_path, capsys):
    small = dict(data="excerpt", steps=2, batch_size=2, sequence_length=64, threads=1, eval_tokens=128)
    stages = recipe.stages
    monkeypatch.setattr(recipe, "stages", lambda v, o, p, g, **_: stages(v, o, p, g, **small))
    for module in ("metrics", "recipe"):
        monkeypatch.setattr(f"titans.train.{module}.draw_curves", lambda lines, path: None)
    monkeypatch.setattr(sys, "argv", ["recipe", "--variant", "lmm", "--output", str(tmp_path)])
    assert recipe.main() == 0
    files = [tmp_path / name / "model.safetensors" for name in ("dense", "near", "far", "hold")]
    for before, after in pairwise(map(load_file, files)):
        assert before.keys() == after.keys()
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert 0 < moved < 0.1, "a stage did not begin where the one before it ended"
    times = [file.stat().st_mtime_ns for file in files]
    assert recipe.main() == 0
    assert times == [file.stat().st_mtime_ns for file in files]
