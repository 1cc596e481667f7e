"""What trained grafts recall, measured on a tiny byte model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import titans
from titans.data import Document, byte_tokenizer
from titans.experiments import graft_training
from titans.experiments.runner import Request, run

from ..train.grafts import small_base, text_of


def test_recall_and_texts_of_several_grafts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [Document(f"text {seed}", text_of(seed)) for seed in (0, 1)]
    monkeypatch.setattr(graft_training, "documents", lambda: texts)
    model = small_base()
    model.save_pretrained(tmp_path / "base")
    base, _ = titans.load(tmp_path / "base")
    grafted = titans.graft(base, byte_tokenizer(), window=32, association=dict(feature_size=32, num_topic=8))
    assert grafted.association is not None
    grafted.whiten(torch.arange(32, 126)[None])
    grafted.association.trained.fill_(1.0)
    for name, logit in (("closed", -20.0), ("open", 3.0)):
        with torch.no_grad():
            grafted.association.mixing_gate.bias.fill_(logit)
        grafted.save_pretrained(tmp_path / name)
    experiment = graft_training.GraftTraining()
    models = {name: str(tmp_path / name) for name in ("closed", "open")}
    request = Request("quick", models=models, work=tmp_path / "work")
    only = ["*, new wordings", "*, texts"]
    page = run(experiment, request, tmp_path, only=only)
    cells = json.loads((tmp_path / "graft-training.json").read_text())["cells"]
    assert {*cells} == {f"{name}, {what}" for name in models for what in ("new wordings", "texts")}
    # A gate that is shut changes nothing; one that is open does.
    assert abs(cells["closed, texts"]["text 0"]) < 1e-6 < 1e-3 < abs(cells["open, texts"]["text 0"])
    hits, count = cells["open, new wordings"]["256"]
    assert 0 <= hits <= count and count >= 4
    assert "| recalled, % | after 256 tokens |" in page and "| text 1 | " in page and " ± " in page
