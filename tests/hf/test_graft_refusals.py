"""What cannot be grafted is refused with the reason, before anything is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from titans import graft
from titans.hf import GraftConfig, GraftedForCausalLM

from ..models import CONFIGS
from .grafts import FAMILIES, ExactRotary, random_ids, small_base, small_graft
from .models import small_model

_SIZES: dict[str, Any] = FAMILIES["llama"].to_dict()


def with_rotary(**parameters: Any) -> PreTrainedConfig:
    fields = {**_SIZES, "rope_parameters": {"rope_theta": 1e4, "factor": 4.0, **parameters}}
    return LlamaConfig.from_dict(fields)


OTHERS = {
    "learned positions": (
        GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=2, eos_token_id=None, bos_token_id=None),
        "GPT2LMHeadModel cannot be grafted.*positions are not rotary",
    ),
    "biased distances": (
        BloomConfig(vocab_size=53, hidden_size=16, n_layer=2, n_head=2, eos_token_id=None, bos_token_id=None),
        "BloomForCausalLM cannot be grafted.*positions are not rotary",
    ),
    "no keys": (CONFIGS["mamba"], "MambaForCausalLM cannot be grafted: its forward has no past_key_values"),
    "a recurrent layer": (CONFIGS["qwen3_next"], r"layer 0 \(linear_attention\) keeps more than keys"),
    "frequencies by length": (with_rotary(rope_type="dynamic"), "rope_type='dynamic'"),
    "few positions": (
        LlamaConfig.from_dict({**_SIZES, "max_position_embeddings": 13}),
        "need 14 positions, and it has max_position_embeddings=13; give a smaller window, as .*window=10\\)",
    ),
}
assert isinstance(CONFIGS["mamba"], MambaConfig) and isinstance(CONFIGS["qwen3_next"], Qwen3NextConfig)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_a_window_cannot_carry_on(name: str) -> None:
    config, reason = OTHERS[name]
    with pytest.raises(ValueError, match=reason):
        graft(small_base(config), window=12, sinks=2)


class _Backwards(ExactRotary):
    """Rotates by the square of the position: no distance turns one place into another."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, position_ids.square())


class _Deceptive(ExactRotary):
    """States other angles for a position than those by which it rotates."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, position_ids if x.numel() else -position_ids)


class _Head(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).exp()


def test_the_trial_finds_models_that_do_something_else() -> None:
    model = small_base()
    model.model.rotary_emb = _Backwards(8)
    with pytest.raises(ValueError, match="depend on the absolute position"):
        graft(model, window=12, sinks=2)
    model = small_base()
    model.model.rotary_emb = _Deceptive(8)
    with pytest.raises(ValueError, match="keys of layer 0 are rotated in an unknown way"):
        graft(model, window=12, sinks=2)
    model = small_base()
    model.lm_head = _Head(16, 53, bias=False).double()
    with pytest.raises(ValueError, match="its logits are not those of its head alone"):
        graft(model, window=12, sinks=2)


def test_weights_that_are_not_all_there() -> None:
    model = small_base()
    model.quantization_method = "some"
    with pytest.raises(ValueError, match="cannot be grafted: its weights are quantised"):
        graft(model, window=12)
    with pytest.raises(ValueError, match="cannot be grafted: its weights are offloaded"):
        graft(small_base().to("meta"), window=12)


def test_weights_that_are_no_numbers() -> None:
    model = small_base()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="cannot be grafted: its logits hold NaN"):
        graft(model, window=12)


def test_arguments() -> None:
    base = small_base()
    wrong: dict[str, dict[str, Any]] = {
        "window=7: give an even number": dict(window=7),
        "window=0": dict(window=0),
        "window=True": dict(window=True),
        "sinks=-1": dict(sinks=-1),
        "sinks=7: give at most half of window=12": dict(sinks=7),
        "association has no setting 'layer': it has layers, key_layers, num_ordered": dict(
            association={"layer": 1}
        ),
        "can have no such association: layers has 2, and it has layers 0 to 1": dict(
            association={"layers": [0, 2]}
        ),
        r"key_layers=\[1\]: give some of layers=\(0,\)": dict(association={"layers": [0], "key_layers": [1]}),
        "adaptation has no setting 'stepsize': it has row_variance, chunk_size": dict(
            adaptation={"stepsize": 1}
        ),
        "step must be between 0 and 1": dict(adaptation={"step": 1.5}),
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            graft(base, **{"window": 12, "sinks": 2, **options})
    with pytest.raises(ValueError, match="tokenizer has 60 tokens, the model 53"):
        graft(base, [None] * 60, window=12)
    for model, message in (
        (nn.Linear(2, 2), "is a Linear: give the model of transformers itself"),
        (small_graft(), "GraftedForCausalLM, which has a memory of its own"),
        (small_model("lmm"), "TitansForCausalLM, which has a memory of its own"),
        (
            LlamaModel(FAMILIES["llama"]),
            "LlamaModel cannot be grafted: its language-modelling head is not a linear layer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            graft(model, window=12)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_configuration_is_checked_where_it_is_read(tmp_path: Path) -> None:
    base = small_base()
    graft(base, window=12, sinks=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    learning, origin = saved["adaptation"], saved["origin"]
    wrong: dict[str, dict[str, Any]] = {
        "windw=8 is not a field of GraftConfig: choose from": {"windw": 8},
        "adaptation has no setting 'stp'": {"adaptation": {**learning, "stp": 1}},
        "adaptation lacks row_variance": {"adaptation": {"step": 0.5}},
        "adaptation=True: give its settings as a dict": {"adaptation": True},
        "chunk_size must be a whole number, not 2.5": {"adaptation": {**learning, "chunk_size": 2.5}},
        "half_life must be a number, not '9'": {"adaptation": {**learning, "half_life": "9"}},
        "momentum must be a number, not False": {"adaptation": {**learning, "momentum": False}},
        "origin does not describe a base": {"origin": {**origin, "sizes": []}},
        "the base in origin has 53: leave vocab_size out": {"vocab_size": 99},
    }
    for message, change in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps({**saved, **change}))
        with pytest.raises(ValueError, match=message):
            GraftedForCausalLM.from_pretrained(tmp_path, base=base)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds a list, no object"):
        GraftedForCausalLM.from_pretrained(tmp_path, base=base)
    with pytest.raises(ValueError, match="states no base"):
        GraftedForCausalLM(GraftConfig(), base)
    # A graft from before the adaptation had a warm-up has none.
    assert learning.pop("warm_up") == 512
    (tmp_path / "config.json").write_text(json.dumps(saved))
    old = GraftedForCausalLM.from_pretrained(tmp_path, base=base)
    assert old.adaptation.warm_up == 0 and old.config.adaptation["warm_up"] == 0
    new = GraftedForCausalLM.from_pretrained(tmp_path, base=base, adaptation=learning)
    assert new.adaptation.warm_up == 512
    for kind in (GraftedForCausalLM, AutoModelForCausalLM):
        assert kind.from_pretrained(tmp_path, base=base, window=6)._windowed.window.size == 6
        with pytest.raises(ValueError, match="window=7: give an even number"):
            kind.from_pretrained(tmp_path, base=base, window=7)
        with pytest.raises(TypeError, match="no keyword 'windw'"):
            kind.from_pretrained(tmp_path, base=base, windw=8)
    with pytest.raises(ValueError, match="windw=8 is not a field"):
        GraftConfig.from_pretrained(tmp_path, windw=8)


def test_calls() -> None:
    model, ids = small_graft(), random_ids(2, 5)
    plain = small_graft(adaptation=False)
    cache, restarts = model(ids).past_key_values, torch.tensor([[0, 1, 0, 1, 2]])
    for call, error, message in (
        (lambda: model(ids, logits_to_keep=-1), ValueError, "logits_to_keep=-1"),
        (lambda: model(), ValueError, "exactly one of input_ids and inputs_embeds"),
        (lambda: model(ids[0]), ValueError, r"input_ids has shape \(5,\)"),
        (lambda: model(ids + 53), ValueError, "give ids from 0 to 52"),
        (lambda: model(ids, attention_mask=torch.ones(2, 4)), ValueError, "attention_mask has shape"),
        (
            lambda: model(ids, past_key_values=DynamicCache()),
            ValueError,
            "a DynamicCache: a grafted model",
        ),
        (lambda: model.generate(ids, past_key_values=DynamicCache()), ValueError, "is a DynamicCache"),
        (lambda: model(ids[:1], past_key_values=cache), ValueError, "past_key_values holds 2 rows"),
        (lambda: model(ids, past_key_values=plain(ids).past_key_values), ValueError, "adaptation=False"),
        (
            lambda: model(ids, position_ids=restarts),
            ValueError,
            "one document per row",
        ),
        (lambda: model(ids, output_hidden_states=True), ValueError, "call the base"),
        (lambda: model(ids, hidden=1), TypeError, "no such keyword"),
        (lambda: model(inputs_embeds=torch.zeros(1, 2, 16)), ValueError, "a memory learns the token ids"),
        (lambda: plain(inputs_embeds=torch.zeros(1, 2, 5)), ValueError, "hidden_size=16"),
        (lambda: plain(ids, freeze_memory=True), ValueError, "has no memory that learns"),
        (lambda: plain.whiten(ids[0]), ValueError, "this graft has no memory"),
        (lambda: cache.crop(-1), ValueError, "cannot unlearn"),
    ):
        with pytest.raises(error, match=message):
            call()
    # A call that fails has not been read.
    for labels in (ids[:1], ids + 53):
        with pytest.raises((ValueError, IndexError)):
            model(ids, past_key_values=cache, labels=labels)
    assert cache.num_columns == 5 and cache.state.window.position.tolist() == [5, 5]


def test_no_rows_give_no_answers() -> None:
    for model in (small_graft(), small_graft(adaptation=False)):
        assert model(random_ids(0, 5)).logits.shape == (0, 5, 53)
