"""Low-rank changes of a graft: the model that was given stays what it was.

How they are trained and saved is in tests/train/test_graft_text.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from titans import graft
from titans.hf import GraftedForCausalLM

from .grafts import SINKS, WINDOW, logits_of, random_ids, small_base


def with_lora(base: Any, **options: Any) -> GraftedForCausalLM:
    model = graft(base, window=WINDOW, sinks=SINKS, adaptation=False, lora={"rank": 2, **options})
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def test_the_model_that_was_given_stays_what_it_was() -> None:
    base, ids = small_base(), random_ids(1, WINDOW)
    before, parameters = logits_of(base, ids), dict(base.named_parameters())
    first = with_lora(base)
    changed = logits_of(first, ids)
    assert (changed - before).abs().max() > 0.1
    # Its weights are not copied.
    (layer,) = {id(m): m for n, m in first.base.named_modules() if n.endswith("0.mlp.up_proj")}.values()
    assert layer.base_layer.weight.data_ptr() == base.model.layers[0].mlp.up_proj.weight.data_ptr()
    # Another graft of it, in another precision, changes neither.
    other = with_lora(base, targets=["q_proj"]).float()
    assert other.base.dtype == torch.float32 and torch.equal(logits_of(first, ids), changed)
    assert torch.equal(logits_of(base, ids), before)
    assert {name: id(p) for name, p in base.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    plain = graft(base, window=WINDOW, sinks=SINKS, adaptation=False)
    assert plain.config.origin == first.config.origin and torch.equal(logits_of(plain, ids), before)


def test_adapters_that_are_there_already_and_those_of_the_head() -> None:
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), small_base())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with adapters in its layers .*: merge them"):
        graft(adapted, window=WINDOW)
    with pytest.raises(ValueError, match=r"lora has targets=.*, and with them the head"):
        with_lora(small_base(), targets=["q_proj", "lm_head"])
