from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.evaluate import keep_memory_only, score
from titans.experiments.hidden_fact import HiddenFact, Reply
from titans.experiments.recollection import Recollection, recollect, shuffled_lines
from titans.experiments.report import DemoResult, TrainedModel, write_report
from titans.experiments.small_demo import same_size_config, surprise_of, verdict_on
from titans.hf import TitansCache, TitansConfig, TitansForCausalLM

PAST, TEXT = (
    b"Now is the winter of our discontent\n" * 40,
    b"Made glorious summer by this sun of York.\n" * 30,
)


@pytest.fixture(scope="module")
def model() -> TitansForCausalLM:
    torch.manual_seed(0)
    config = TitansConfig.from_preset(
        "tiny", hidden_size=32, head_dim=16, intermediate_size=32, num_hidden_layers=2, initializer_range=0.2
    )
    return TitansForCausalLM(config).double().eval()


def ids(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text))


def test_an_arm_is_the_text_scored_after_its_past_with_the_memory_alone(model: TitansForCausalLM) -> None:
    found = recollect(model, {"past": PAST, "nothing": b"", "other": PAST[::-1]}, TEXT)
    cache = TitansCache(model.config)
    with torch.no_grad():
        model(ids(PAST)[None], past_key_values=cache)
    after = score(model, ids(TEXT), keep_memory_only(model, cache)).mean() / math.log(2)
    fresh = score(model, ids(TEXT)).mean() / math.log(2)
    assert found.arms == ("past", "nothing", "other")
    assert found.bits_per_byte[0] == pytest.approx(float(after), abs=1e-9)
    assert found.bits_per_byte[1] == pytest.approx(float(fresh), abs=1e-9)
    assert abs(found.bits_per_byte[0] - found.bits_per_byte[1]) > 1e-4
    assert found.bits_per_byte[2] != pytest.approx(found.bits_per_byte[0], abs=1e-7)


def test_shuffling_keeps_the_lines() -> None:
    text = b"".join(b"line %d\n" % i for i in range(50))
    shuffled = shuffled_lines(text, 0)
    assert shuffled != text
    assert sorted(shuffled.splitlines()) == sorted(text.splitlines())


def test_there_is_a_surprise_for_every_byte(model: TitansForCausalLM) -> None:
    before, passage = TEXT[:100], TEXT[100:300]
    surprise = surprise_of(model, before, passage)
    with torch.no_grad():
        surprises = model(ids(before + passage)[None], output_surprise=True).surprises
    layers = torch.stack([s[0, 100:].mean(-1) for s in surprises], 1)
    assert surprise.shape == (200,)
    # Sessions keep surprises in float32.
    np.testing.assert_allclose(surprise, (layers / layers.mean(0)).mean(1).numpy(), rtol=1e-6)


def test_the_transformer_is_of_the_same_size() -> None:
    with torch.device("meta"):
        sizes = [
            TitansForCausalLM(
                TitansConfig.from_preset("tiny", variant=variant, **same_size_config(variant))
            ).num_parameters()
            for variant in ("mac", "transformer")
        ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.005


def test_the_page_holds_everything(tmp_path: Path) -> None:
    curve = np.array([[3.0, 2.9], [3.1, 3.0], [3.0, 3.0], [3.2, 3.1]])
    found = Recollection(("own", "shuffled", "other", "nothing"), (2.95, 3.05, 3.0, 3.15), curve)
    trained = TrainedModel("titans (mac)", 10, 20, 2.5, 1e3, ((1, 5.0), (2, 4.0)), ((2, 4.5),))
    passage = "<b>Ö & so</b>".encode()
    result = DemoResult(
        "setting", "machine", (trained, trained), "note", found, "why", verdict_on(found), passage,
        np.linspace(0, 2, len(passage)), "a <sample>", 0.8,
        HiddenFact("The key <is> 7.", "The key?", "7", (Reply(1_000_000, "8"),), 50.0, 4096), "of a model",
    )  # fmt: skip
    write_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page and "<script" not in page
    assert "a &lt;sample&gt;" in page and "&lt;</span>" in page and "2.9500" in page and "-0.2000" in page
    assert (
        "The key &lt;is&gt; 7." in page and "8 (wrong, it is 7)" in page and "1,000,000 bytes later" in page
    )
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_verdict_says_what_fell() -> None:
    worse = Recollection(("own", "shuffled", "other", "nothing"), (3.2, 3.0, 3.0, 3.1), np.zeros((4, 1)))
    assert "costs 0.1000 bits per byte" in verdict_on(worse)
    assert "worse than another play's by 0.2000" in verdict_on(worse)
