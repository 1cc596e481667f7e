"""The models that come with the library: small, complete, described, and loaded by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import titans
from titans import zoo
from titans.cli import main
from titans.data.archives import cache_folder
from titans.hf.graft import GraftConfig
from titans.zoo import smollm
from titans.zoo.by_name import PRETRAINED

from .models import small_causal_lm

FOLDER = Path(zoo.__file__).parent


@pytest.mark.parametrize("name", zoo.names())
def test_a_model_loads_by_its_name_reads_and_is_described(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = titans.load(name)
    assert not model.training and name == f"titans-{model.config.variant}-tiny"
    session = titans.Session(model, tokenizer)
    session.feed("The pass key is 31337. ")
    assert len(session.generate(max_new_tokens=5, do_sample=False).encode()) >= 5
    monkeypatch.setattr("titans.cli.info.SAMPLE_TOKENS", 100)
    assert main(["info", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == model.config.variant
    files = list((FOLDER / name).iterdir())
    assert sum(file.stat().st_size for file in files) <= 12e6
    card = (FOLDER / name / "README.md").read_text()
    assert all(part in card for part in ("recall", "seed", "Shakespeare", "bits per byte", "minutes"))


@pytest.mark.parametrize("name", zoo.graft_names())
def test_a_graft_of_the_library_recalls_and_is_described(name):
    folder = FOLDER / "grafts" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15e6
    card = (folder / "README.md").read_text()
    assert all(part in card for part in ("recall", "seed", "minutes", "Limits", "not in training"))
    assert GraftConfig.from_pretrained(folder).origin["name"] == PRETRAINED
    if not (cache_folder() / f"{PRETRAINED}-{smollm._SHA256[:8]}").is_dir():
        pytest.skip(f"{PRETRAINED} has not been fetched")
    model, tokenizer = titans.load(name)
    # Longer than the window, by little.
    text = "Howl, howl, howl, howl! O, you are men of stones! " * 27
    assert len(tokenizer.encode(text)) > model.config.window + model.config.sinks

    def answer(reader):
        session = titans.Session(reader, tokenizer)
        session.feed("The password to the north gate is hawthorn.\n\n")
        session.feed(text)
        session.feed("\n\nThe password to the north gate is")
        return session.generate(max_new_tokens=4, do_sample=False).strip()

    # bfloat16 takes half of the time.
    model.base.bfloat16()
    assert answer(model).startswith("hawthorn")
    assert not answer(titans.graft(model.base)).startswith("hawthorn")


def test_a_folder_is_loaded_and_an_unknown_name_is_refused(tmp_path):
    model = titans.TitansForCausalLM(titans.TitansConfig.from_preset("tiny", variant="lmm"))
    model.save_pretrained(tmp_path / "mine")
    again, _ = titans.load(tmp_path / "mine")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    with pytest.raises(
        ValueError, match=r"'titans-tiny' is not a folder: give one written by `titans train`"
    ):
        titans.load("titans-tiny")


def test_a_graft_has_a_name_and_finds_its_base_by_name(tmp_path, monkeypatch):
    base = tmp_path / "cache" / "base"
    small_causal_lm("llama").save_pretrained(base)
    monkeypatch.setattr("titans.zoo.by_name.MODELS", tmp_path)
    monkeypatch.setattr("titans.zoo.smollm.smollm_folder", lambda: base)
    grafted = titans.graft(titans.load("smollm2-135m")[0], window=32)
    assert grafted.config.origin["name"] == "smollm2-135m"
    grafted.save_pretrained(tmp_path / "grafts" / "titans-some-graft")
    assert zoo.names() == [] and zoo.graft_names() == ["titans-some-graft"]
    ids = torch.arange(70)[None]
    assert torch.equal(titans.load("titans-some-graft")[0](ids).logits, grafted(ids).logits)
    with pytest.raises(ValueError, match="or one of titans-some-graft, smollm2-135m"):
        titans.load("titans-other-graft")


def test_a_new_folder_is_a_new_name_and_errors_list_it(tmp_path, monkeypatch):
    model = titans.TitansForCausalLM(titans.TitansConfig.from_preset("tiny", variant="lmm"))
    model.save_pretrained(tmp_path / "titans-some-tiny")
    monkeypatch.setattr("titans.zoo.by_name.MODELS", tmp_path)
    assert zoo.names() == ["titans-some-tiny"]
    again, _ = titans.load("titans-some-tiny")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    with pytest.raises(ValueError, match=r"`save_pretrained`, or one of titans-some-tiny, smollm2-135m"):
        titans.load("titans-other-tiny")
