"""The comparison with a graft, on a tiny byte model: every system reads, answers and is in the tables."""

from __future__ import annotations

import io
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from titans import graft
from titans.data import byte_tokenizer
from titans.experiments import graft_comparison as comparison
from titans.experiments import graft_comparison_systems as systems
from titans.experiments import ruler
from titans.experiments.graft_comparison_cloze import SENTENCES, contains, first_line
from titans.experiments.graft_comparison_texts import HAYSTACKS, haystacks
from titans.experiments.ruler import RulerSample, ruler_score
from titans.experiments.runner import Request, run

# Lines of short made-up words.
_WORDS = np.random.default_rng(0).integers(97, 123, (1000, 10), dtype=np.uint8)
TEXT = "".join(f"{w[:2]} {w[2:4]} {w[4:6]} {w[6:]}.\n" for w in (row.tobytes().decode() for row in _WORDS))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random byte model as the base, a text as every document, and no graft of the library."""
    sizes = dict(vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, eos_token_id=None, bos_token_id=None)

    def base() -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, **heads, max_position_embeddings=768)
        return AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer()

    monkeypatch.setattr(systems, "base", base)
    monkeypatch.setattr(systems, "graft_names", list)
    texts = dict.fromkeys(("King Lear", "Essays", "State of the Union"), lambda: TEXT)
    sample = RulerSample(TEXT, "\nWhat is hidden? It is", ("7", "8"))
    monkeypatch.setattr(comparison, "documents", lambda: texts)
    monkeypatch.setattr(comparison, "address", lambda: TEXT)
    monkeypatch.setattr(comparison, "tempest", lambda: TEXT)
    monkeypatch.setattr(comparison, "smollm_folder", lambda: None)
    monkeypatch.setattr(comparison, "ruler_samples", lambda *_: [sample])
    monkeypatch.setattr(comparison, "QUICK", 200)
    # A passage has more bytes than a pretrained model has tokens for it.
    monkeypatch.setattr(systems, "WINDOW", 640)


def test_a_quick_run_measures_every_system_and_goes_on_where_it_stopped(tiny: None, tmp_path: Path) -> None:
    experiment, request = comparison.GraftComparison(), Request("quick", work=tmp_path)
    only = ["prediction, King*", "prediction, Ess*window*", "one,*[wps], seed 0", "cloze*[wps]"]
    only += ["ruler, vt, *passages*", "tuning*3e-05", "tuning, cache", "values, 1024, window*"]
    page = run(experiment, request, tmp_path, only=only)
    for name in systems.BASELINES:
        assert f"| {name}" in page.split("## Prediction")[1], name
    assert "| passkey | 1,024 | 0 (0–79) |" in page and "| values | 1,024 | 0 (0–79) | –" in page
    assert f"| {SENTENCES[-1][0]} … | 200,000 |" in page and "| vt | 4,096 | 0 (1) |" in page
    assert "3e-05 (chosen)" in page and "| 10, small |" in page
    assert "count it as if that system had read alone" in page
    assert "## What the graft loses and wins" in page and page.count("](graft-comparison.png)") == 1
    assert (tmp_path / "graft-comparison.png").stat().st_size > 10_000
    again = run(experiment, request, tmp_path, only=only, resume=True)
    assert again == page


def test_prediction_of_the_untrained_systems_starts_as_the_window(tiny: None) -> None:
    found = {}
    for name in systems.READERS:
        system = systems.system(name, Request())
        found[name], memory = system.losses(system.encode(TEXT)[:96])
        assert system.nbytes(memory) >= 0
    expected = found.pop("window")
    for name, losses in found.items():
        # The first chunk of the adaptation; of a cache only the first token's.
        same = 1 if "cache" in name else 15
        torch.testing.assert_close(losses[:same], expected[:same], rtol=0, atol=1e-5)


def test_systems_that_share_a_base_read_as_each_alone_would(tiny: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, tokenizer = systems._opened(systems.base, dtype)
        first, spared = systems.system("window", Request(), dtype), 0.0
        for name in ("window", "cache", "adaptation"):
            alone = systems.System(systems.READERS[name](base), tokenizer)
            system = systems.system(name, Request(), dtype)
            # The same piece twice: what is shared depends on what was read before it.
            ids = system.encode(TEXT)[:512].repeat(3)[:1100]
            found, expected = system.losses(ids)[0], alone.losses(ids)[0]
            assert found.equal(expected), name
            answers = [
                one.answer(one.remember(ids), "\nWhat?", "What?", 5, lambda text: False)
                for one in (system, alone)
            ]
            assert answers[0] == answers[1], name
            assert system.shared is first.shared and system.shared is not None
            assert system.shared.spared > spared
            spared, began = system.shared.spared, time.process_time()
            assert system.seconds() >= began + spared
    base, _ = systems._opened(systems.base, torch.float32)
    assert systems._share(systems.grafted(base, lora={"rank": 2}), Request(), torch.float32) is None
    torch.manual_seed(1)
    foreign = AutoModelForCausalLM.from_config(base.config)
    with pytest.raises(ValueError, match="other weights"):
        systems._share(systems.grafted(foreign), Request(), torch.float32)


def test_a_model_with_positions_reads_the_end_and_retrieval_finds_the_fact(tiny: None) -> None:
    full = systems.system("full attention", Request())
    assert full.limit == 768
    memory = full.remember(full.encode(TEXT))
    assert memory.num_columns == 768 - systems.ROOM
    full.answer(memory, "\nWhat?", "What?", 20, lambda text: False)
    assert memory.num_columns == 768 - systems.ROOM, "an answer has changed the memory"
    retrieval = systems.system("passages", Request())
    asked = next(haystacks(retrieval.tokenizer, [TEXT], "four", 1024, 0))
    prompts: list[str] = []
    retrieval.generated = lambda memory, prompt, steps, until: prompts.append(prompt) or ""
    for question in asked.questions:
        retrieval.answer(retrieval.remember(asked.ids), question.prompt, question.query, 9, lambda text: True)
    right = [q.answer in prompt for q, prompt in zip(asked.questions, prompts, strict=True)]
    assert len(right) == 8 and all(right) and max(map(len, prompts)) < systems.WINDOW


@pytest.mark.parametrize("kind", HAYSTACKS)
def test_haystacks_hold_their_facts_in_the_first_half(kind: str) -> None:
    tokenizer = byte_tokenizer()
    made = list(haystacks(tokenizer, [TEXT, TEXT.upper()], kind, 1024, seed=2))
    assert len(made) == 8 and made[0].ids[:99].tolist() != made[1].ids[:99].tolist()
    for asked in made:
        text = tokenizer.decode(asked.ids)
        assert len(asked.ids) == 1024
        for question in asked.questions:
            assert question.prompt == f"\n{question.query}" and not question.query.endswith(" ")
            places = [text.find(part) for part in question.answer.split(", ")]
            assert all(0 < place < 800 for place in places)
    again = next(haystacks(tokenizer, [TEXT], kind, 1024, seed=2))
    assert again.ids.equal(made[0].ids) and again.questions == made[0].questions


def test_a_trained_graft_is_measured_with_both_memories_and_with_its_association(
    tiny: None, tmp_path: Path
) -> None:
    base, tokenizer = systems.base()
    base.save_pretrained(tmp_path / "base")
    model = graft(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tokenizer,
        window=64,
        association={"layers": [0]},
    )
    model.save_pretrained(tmp_path / "graft")
    request = Request(models={"mine": str(tmp_path / "graft")})
    assert [*systems.trained_grafts(request)] == ["mine", "mine association"]
    cells = {cell.name: cell for cell in comparison.GraftComparison().cells(request)}
    assert "prediction, King Lear, 16384, mine association" in cells
    before = cells["qa1, 4096, mine, seed 0"].conditions
    assert before["dtype"] == "bfloat16" and len(before["texts"]) == 3
    model.save_pretrained(tmp_path / "other")
    other = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: x + 1e-3 for name, x in other.items()}, tmp_path / "graft" / "model.safetensors")
    cells = {cell.name: cell for cell in comparison.GraftComparison().cells(request)}
    after = cells["qa1, 4096, mine, seed 0"].conditions
    assert before["weights"] != after["weights"] and "weights" not in cells["cloze, window"].conditions
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "graft" / "model.safetensors")
    both, alone = (systems.system(name, request) for name in ("mine", "mine association"))
    ids = both.encode(TEXT)[:80]
    # An untrained association changes nothing; the adaptation learns from the second chunk on.
    found, memory = both.losses(ids)
    window, _ = systems.System(systems.WindowedReader(base, window=64), tokenizer).losses(ids)
    torch.testing.assert_close(alone.losses(ids)[0], window, rtol=0, atol=1e-5)
    assert (found[40:] - window[40:]).abs().max() > 1e-4 and both.nbytes(memory) > 0


def test_answers_are_compared_as_whole_words() -> None:
    assert contains("It was the Ursa Major.", "ursa major") and contains("48 years", "forty eight/48")
    assert not contains("hundreds", "hundred/100") and not contains("", "arm")
    assert first_line("\n \n Kent\nLear") == "Kent" and first_line(" \n") == ""
    assert comparison.decided(" 12345", "123") and comparison.decided(" 13", "123")
    assert not comparison.decided(" 12", "123") and not comparison.decided("", "123")


def test_the_code_of_ruler_is_unpacked_once_for_each_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("package/module.py", "x = 1\n")
    monkeypatch.setattr(ruler, "fetch", lambda archive: content.getvalue())
    code = ruler._unpacked(tmp_path)
    files = ("tenacity.py", "scipy/special.py", "package/module.py", "complete")
    times = [(code / name).stat().st_mtime_ns for name in files]
    assert ruler._unpacked(tmp_path) == code
    assert [(code / name).stat().st_mtime_ns for name in files] == times
    monkeypatch.setitem(ruler._REPLACED, "tenacity.py", "x = 2\n")
    ruler._unpacked(tmp_path)
    assert (code / "tenacity.py").read_text() == "x = 2\n"


def test_rulers_score_is_the_share_of_expected_strings() -> None:
    assert ruler_score("It is ABC, then def.", ("abc", "DEF", "ghi", "jkl")) == 0.5
