"""The commands that read with a graft: of a folder, or made of any model on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import titans
from titans.cli import main
from titans.data import byte_tokenizer
from titans.evaluate import score
from titans.stream import describe_memory

from ..models import small_causal_lm

TEXT = "To be, or not to be, that is the question. " * 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small_causal_lm("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grafted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder; what it is made on is named in it."""
    folder = tmp_path_factory.mktemp("graft")
    titans.graft(
        titans.load(base)[0], window=32, adaptation={"chunk_size": 16, "warm_up": 0}
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def call(*arguments: object) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_a_folder_is_read_evaluated_and_continued(
    grafted: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    book, memory = tmp_path / "book.txt", tmp_path / "memory"
    book.write_text(TEXT)
    model, tokenizer = titans.load(grafted)
    assert model.config.window == 32 and len(tokenizer) == 256
    found = run("eval", "perplexity", grafted, "--data", book, "--freeze-memory")
    losses = score(model, np.frombuffer(TEXT.encode(), np.uint8))
    assert found["nats_per_token"] == pytest.approx(float(losses.mean()), abs=1e-4)
    assert found["gain"] > 0.01, "the adaptation learns a text that repeats"
    cells = run("eval", "needle", grafted, "--lengths", "300", "--depths", "0", "1", "--samples", "1")[
        "cells"
    ]
    assert [cell["beyond_attention"] for cell in cells] == [True, False]
    read = run("memorize", grafted, book, "-o", memory)
    assert read["tokens"] == len(TEXT) and read["mean_surprise"] == pytest.approx(
        float(losses.mean()), abs=0.05
    )
    assert describe_memory(memory).stats.tokens == len(TEXT)
    options = ["--memory", memory, "--max-new-tokens", 5, "--greedy"]
    session = titans.Session.load(memory, model, tokenizer)
    assert run("generate", grafted, *options)["text"] == session.generate(max_new_tokens=5, do_sample=False)


def test_info_names_base_and_memories(base: Path, grafted: Path, run: Callable[..., dict[str, Any]]) -> None:
    of_graft, of_base = run("info", grafted), run("info", base)
    model = titans.load(grafted)[0]
    assert of_graft["kind"] == "graft" and of_graft["base"] == str(base) and of_graft["window"] == 32
    assert of_graft["base_fingerprint"] == model.config.origin["weights"]
    assert of_graft["memories"] == ["adaptation"] and of_graft["adaptation"]["chunk_size"] == 16
    assert of_graft["parameters"] == sum(value.numel() for value in model.own_state_dict().values())
    assert of_base["kind"] == "model" and of_base["base_class"] == "LlamaForCausalLM"
    assert of_base["parameters"] == model.base.num_parameters() and "memory" in of_base


def test_any_model_is_grafted_on_the_way(
    base: Path, tmp_path: Path, run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    book, memory = tmp_path / "book.txt", tmp_path / "memory"
    book.write_text(TEXT)
    found = run("eval", "perplexity", base, "--data", book, "--graft", "--freeze-memory")
    losses = score(titans.graft(titans.load(base)[0]), np.frombuffer(TEXT.encode(), np.uint8))
    assert found["nats_per_token"] == pytest.approx(float(losses.mean()), abs=1e-4) and found["gain"] > 0.01
    run("memorize", base, book, "-o", memory, "--graft")
    options = ["generate", base, "--memory", memory, "--max-new-tokens", 3, "--greedy"]
    assert run(*options, "--graft")["tokens"] == 3
    assert main([*map(str, options)]) == 1, "a graft's memory is not the plain model's"
    assert "graft the model first" in capsys.readouterr().err
    assert main(["generate", "titans-mac-tiny", "--prompt", "a", "--graft"]) == 1
    assert "has a memory of its own" in capsys.readouterr().err


def test_a_graft_of_a_model_in_memory_is_loaded_with_it(
    base: Path, grafted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids, folder = small_causal_lm("llama"), torch.arange(40)[None], tmp_path / "graft"
    graft = titans.graft(model, byte_tokenizer(), window=32)
    expected = graft(ids).logits
    graft.save_pretrained(folder)
    assert "was made in memory and is not saved with it" in caplog.text
    with pytest.raises(ValueError, match=r"has no name: give it, titans\.load\(folder, base=model\)"):
        titans.load(folder)
    for given in (model, base, str(base)):
        again, tokenizer = titans.load(folder, base=given)
        assert torch.equal(again(ids).logits, expected) and len(tokenizer) == 256
    named = titans.load(grafted, base=model)[0]
    assert again.base is not model and named.base is model
    caplog.clear()
    named.save_pretrained(tmp_path / "named")
    assert "made in memory" not in caplog.text
    with pytest.raises(ValueError, match="is no graft: leave it out"):
        titans.load(base, base=model)


def test_a_text_begins_with_what_the_tokenizer_puts_before_it(
    base: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "\x01"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="\x01 $A", special_tokens=[("\x01", 1)]
    )
    folder = tmp_path / "model"
    small_causal_lm("llama", vocab_size=257).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (book := tmp_path / "book.txt").write_text(TEXT)
    read = run("memorize", folder, book, "-o", tmp_path / "memory", "--graft")
    assert (read["tokens"], read["tokens_in_memory"]) == (len(TEXT), len(TEXT) + 1)
    options = ["--graft", "--max-new-tokens", 4, "--greedy"]
    model, tokenizer = titans.load(folder)
    session = titans.Session(titans.graft(model), tokenizer)
    session.feed([1, *TEXT.encode()])
    expected = session.generate(max_new_tokens=4, do_sample=False)
    assert run("generate", folder, "--prompt", TEXT, *options)["text"] == expected
    assert run("generate", folder, "--memory", tmp_path / "memory", *options)["text"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origin": {}}, "is damaged or of another version"),
        ({"window": 3}, "is damaged or of another version"),
        ({"name": "nowhere/base"}, "was made on 'nowhere/base', which is neither a folder here"),
        ({"name": ""}, "was made on a model in memory, which has no name"),
        ({"name": "ITSELF"}, "which is no model to graft"),
        ({"name": "titans-mac-tiny"}, "which is no model to graft"),
        ({"origin": {"name": "BASE"}}, "is damaged"),
        ({"weights": "other"}, "give the same checkpoint"),
    ],
)
def test_a_graft_without_its_base_is_one_line(
    base: Path,
    grafted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = tmp_path / "graft"
    shutil.copytree(grafted, folder)
    config = json.loads((folder / "config.json").read_text())
    if "name" in changes:
        changes = {"origin": config["origin"] | changes}
    if "weights" in changes:
        other = tmp_path / "other"
        model = small_causal_lm("llama")
        model.lm_head.weight.data.add_(1.0)
        model.save_pretrained(other)
        changes = {"origin": config["origin"] | {"name": str(other)}}
    text = json.dumps(config | changes).replace("ITSELF", str(folder)).replace("BASE", str(base))
    (folder / "config.json").write_text(text)
    assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1"]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
