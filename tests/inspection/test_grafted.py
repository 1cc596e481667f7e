"""An inspection of a graft: both losses are those of the graft and of its base in the same window."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import titans
from titans.cli import main
from titans.evaluate import score
from titans.inspection import inspect_graft
from titans.inspection.graft_page import graft_content

from ..models import small_causal_lm, tokenizer_with_beginning

TEXT = "Cordelia: Nothing, my lord. Lear: Nothing! Naïve “nothing”.\n" * 24


def small_graft(**options: Any) -> Any:
    options = {"window": 32, "adaptation": {"step": 0.9}, **options}
    return titans.graft(small_causal_lm("llama", vocab_size=257), **options)


def test_both_losses_are_of_one_window() -> None:
    model, ids = small_graft(), np.frombuffer(TEXT.encode(), np.uint8)
    seen = []
    found = inspect_graft(model, ids, progress=lambda done, total: seen.append((done, total)))
    assert np.isnan(found.loss[0]) and np.isnan(found.base[0]) and seen[-1] == (len(ids), len(ids))
    np.testing.assert_allclose(found.loss[1:], score(model, ids), rtol=1e-4)
    base = titans.graft(model.base, window=32, adaptation=False)
    np.testing.assert_allclose(found.base[1:], score(base, ids), rtol=1e-4)
    assert found.whole().gain > 0.05, "a text that repeats is learned"

    parts = found.by_position((0, 100, 700, 10_000))
    assert [(part.begin, part.end, part.tokens) for part in parts] == [
        (0, 100, 99), (100, 700, 600), (700, 10_000, len(ids) - 700)
    ]  # fmt: skip
    assert parts[1].base == pytest.approx(found.base[100:700].mean())

    cache = model.empty_cache()
    with torch.no_grad():
        model(torch.from_numpy(ids[:100].astype(np.int64))[None], past_key_values=cache)
    later = inspect_graft(model, ids[100:400], cache=cache)
    np.testing.assert_allclose(later.loss[1:], found.loss[101:400], rtol=1e-3)
    np.testing.assert_allclose(later.base[1:], found.base[101:400], rtol=1e-3)
    begun = inspect_graft(model, ids[7:60], beginning=ids[:7])
    np.testing.assert_allclose(begun.loss[1:], found.loss[8:60], rtol=1e-3)
    with pytest.raises(ValueError, match="has no memory to inspect"):
        inspect_graft(base, ids)
    with pytest.raises(ValueError, match=r"1 token\(s\)"):
        inspect_graft(model, ids[:1])


def test_each_of_two_memories_has_its_part_of_the_gain() -> None:
    recalling = {"layers": (0, 1), "feature_size": 256}
    model, ids = small_graft(association=recalling), np.frombuffer(TEXT.encode(), np.uint8)[:400]
    alone = small_graft(adaptation=False, association=recalling)
    for association in (model.association, alone.association):
        with torch.no_grad():
            association.write_gate.bias += 3.0
            association.mixing_gate.bias += 4.0
            association.trained.fill_(1.0)
    found = inspect_graft(model, ids)
    np.testing.assert_allclose(found.loss[1:], score(model, ids), rtol=1e-4)
    np.testing.assert_allclose(found.association[1:], score(alone, ids), rtol=1e-4)
    of_one = inspect_graft(alone, ids)
    np.testing.assert_allclose(of_one.loss, found.association, rtol=1e-4)
    np.testing.assert_allclose(of_one.base, found.base, rtol=1e-4)
    assert of_one.association is None and "association" not in of_one.to_json()
    assert (found.base - found.association)[100:].mean() > 0.2, "a text that repeats is recalled"
    assert found.to_json()["by_position"][0]["association"] == pytest.approx(found.association[1:].mean())
    assert found.whole().association == pytest.approx(found.association[1:].mean())
    names = [part["name"] for part in graft_content(found, [chr(c) for c in ids])["channels"]]
    assert names[3:] == ["gain of the association", "gain of the adaptation"]
    assert len(graft_content(of_one, [chr(c) for c in ids])["channels"]) == 3


def test_a_graft_that_changes_its_base_says_what_to_do_without_a_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder, text = tmp_path / "base", tmp_path / "graft", tmp_path / "text.txt"
    small_causal_lm("llama", vocab_size=257).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    titans.graft(model, tokenizer_with_beginning(), window=32, lora={"rank": 2}).save_pretrained(folder)
    text.write_text(TEXT, encoding="utf-8")
    memory = ["--memory", str(tmp_path / "read.memory")]
    assert main(["inspect", str(folder), str(text), "-o", str(tmp_path / "page.html"), *memory]) == 1
    error = capsys.readouterr().err
    assert "memory=" in error and "only reading all of the text gives" in error
    assert "leave --memory out, and give one file that begins with what it has read" in error


@pytest.mark.parametrize("adaptation", [False, {"step": 0.9}])
def test_what_changes_the_base_inside_is_compared_with_the_base_alone(adaptation: Any) -> None:
    ids = np.frombuffer(TEXT.encode(), np.uint8)[:300]
    inside = {"layers": [0], "num_heads": 1, "head_dim": 16}
    model = small_graft(adaptation=adaptation, residual=inside, lora={"rank": 2})
    plain = small_graft(adaptation=False)
    np.testing.assert_allclose(inspect_graft(model, ids).base[1:], score(plain, ids), rtol=1e-4)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("output" in name or "lora_B" in name):
                parameter.normal_(std=0.3)
    found = inspect_graft(model, ids, beginning=ids[:7])
    losses, bare = (score(one, [*ids[:7], *ids])[7:] for one in (model, plain))
    np.testing.assert_allclose(found.loss[1:], losses, rtol=1e-4)
    np.testing.assert_allclose(found.base[1:], bare, rtol=1e-4)
    assert np.abs(found.helped[1:]).mean() > 0.1 and found.association is None
    with pytest.raises(ValueError, match="inspect one text that begins with what it has read"):
        inspect_graft(model, ids, cache=model.empty_cache())
    with pytest.raises(ValueError, match=r"changes the base's own states; call read_base"):
        model(torch.tensor([[1, 2]]), output_base_logits=True)


def test_the_page_shows_the_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text, page = tmp_path / "model", tmp_path / "text.txt", tmp_path / "page.html"
    small_causal_lm("llama", vocab_size=257).save_pretrained(folder)
    tokenizer_with_beginning().save_pretrained(folder)
    text.write_text(TEXT, encoding="utf-8")
    command = ["inspect", str(folder), str(text), "-o", str(page)]
    assert (
        main(command) == 1 and "without a memory: give a Titans model or a graft" in capsys.readouterr().err
    )
    assert main([*command, "--graft", "--json"]) == 0
    printed = capsys.readouterr()
    arrays = json.loads(printed.out)
    assert "tokens/s" in printed.err and (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    ids = list(TEXT.encode())
    losses = score(titans.graft(titans.load(folder)[0]), [256, *ids])
    np.testing.assert_allclose(arrays["loss"][1:], losses[1:], rtol=1e-3)

    content = page.read_text(encoding="utf-8")
    data = json.loads(content.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert data["text"] == TEXT
    gain = np.array(arrays["base"][1:]) - np.array(arrays["loss"][1:])
    high = data["channels"][0]["high"]
    drawn = np.frombuffer(base64.b64decode(data["channels"][0]["values"]), np.uint8)[1:]
    np.testing.assert_allclose((drawn - 128.0) / 127 * high, np.clip(gain, -high, high), atol=high / 120)
    names = dict(data["numbers"])
    assert names["tokens"] == f"{len(ids):,}" and any("tokens 512 to 2,047" in name for name in names)
    # The last stretch may be shorter than the others.
    assert data["charts"][1]["lines"][0]["values"][-1] == pytest.approx(gain.sum(), rel=0.02)
    assert "NaN" not in content
