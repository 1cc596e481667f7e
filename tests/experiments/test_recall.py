"""The recipe of the models to try: every stage is sound, and the second goes on from the first."""

from __future__ import annotations

import sys

import pytest
from safetensors.torch import load_file

from titans.experiments import recall
from titans.nn.blocks import BLOCKS
from titans.train.recipe import check


@pytest.mark.parametrize("variant", BLOCKS)
@pytest.mark.parametrize("plain", [False, True])
def test_stages_are_settings_that_train(variant, plain, tmp_path):
    near, far = recall.stages(variant, tmp_path, plain)
    check(near)
    check(far)
    assert far.start_from == near.output
    assert near.config == far.config
    assert (near.fact_spacing is None) == (far.fact_spacing is None) == plain


def test_the_command_goes_through_its_stages_once(monkeypatch, tmp_path, capsys):
    small = dict(data="excerpt", steps=2, batch_size=2, sequence_length=64, threads=1, eval_tokens=128)
    stages = recall.stages
    monkeypatch.setattr(recall, "stages", lambda v, o, p, **_: stages(v, o, p, **small))
    monkeypatch.setattr(sys, "argv", ["recall", "--variant", "lmm", "--output", str(tmp_path)])
    assert recall.main() == 0
    near, far = (load_file(tmp_path / name / "model.safetensors") for name in ("near", "far"))
    assert near.keys() == far.keys()
    moved = max((far[name] - near[name]).abs().max().item() for name in near)
    assert 0 < moved < 0.1, "the second stage did not begin where the first ended"
    times = [(tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in ("near", "far")]
    assert recall.main() == 0
    assert times == [(tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in ("near", "far")]
