"""A graft with residual branches: what they add to the base's states, and the files of their memories.

Splits, padded rows, sessions and generation are in test_graft_memory.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titans import Session, graft
from titans.hf import GraftedForCausalLM
from titans.hf.state_file import open_state_file, write_state_file
from titans.nn.residual import ResidualBranches

from .grafts import (
    INSIDE,
    LEARNING,
    RECALLING,
    SINKS,
    WINDOW,
    assert_near,
    logits_of,
    random_ids,
    read_on,
    small_base,
    small_graft,
)

LONG = 3 * WINDOW + 1


@torch.no_grad()
def added_by_hand(model: Any, branches: ResidualBranches, ids: Tensor) -> Tensor:
    """The model's logits of a text with each branch's answers, one token at a time, added after its layer."""

    def add(layer: int) -> Any:
        branch = branches[str(layer)]

        def hook(module: Any, given: Any, output: Any) -> Any:
            states = output if isinstance(output, Tensor) else output[0]
            memory, parts = branch.memory.initial_state(len(states)), []
            for token in states.split(1, 1):
                answer, memory = branch.memory(branch.norm(token), memory)
                parts.append(token + answer)
            changed = torch.cat(parts, 1)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        return hook

    handles = [model.model.layers[layer].register_forward_hook(add(layer)) for layer in branches.layers]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_added_after_their_layers(family: str) -> None:
    model, ids = small_graft(family, residual=INSIDE, adaptation=False), random_ids(2, WINDOW)
    expected = added_by_hand(model.base, model.residual, ids)
    assert (expected - model.base(ids).logits).abs().max() > 0.3
    assert_near(logits_of(model, ids), expected, 1e-5 if family == "gemma3" else 1e-10)
    assert_near(read_on(model, ids.split(1, 1))[0], expected, 1e-5 if family == "gemma3" else 1e-10)
    assert not any(module._forward_hooks for module in model.base.modules())


def test_later_tokens_change_nothing_before_them() -> None:
    model, ids = small_graft(residual=INSIDE), random_ids(1, LONG)
    other = torch.cat([ids[:, :20], (ids[:, 20:] + 1) % 53], 1)
    assert torch.equal(logits_of(model, ids)[:, :20], logits_of(model, other)[:, :20])
    # What was read long before the window changes what is predicted.
    other = torch.cat([(ids[:, :4] + 1) % 53, ids[:, 4:]], 1)
    alone = small_graft(residual=INSIDE, sinks=0, adaptation=False)
    assert (logits_of(alone, ids) - logits_of(alone, other))[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_untrained_it_is_the_graft_without_it_to_the_bit(dtype: torch.dtype) -> None:
    base, ids = small_base().to(dtype), random_ids(2, LONG)
    mask = torch.arange(LONG) >= torch.tensor([[0], [9]])
    for others in (dict(adaptation=False), dict(adaptation=LEARNING, association=RECALLING)):
        options = dict(window=WINDOW, sinks=SINKS, **others)
        with_one, without = graft(base, residual=True, **options), graft(base, **options)
        assert with_one.residual.layers == (1,)
        for given in ({}, dict(attention_mask=mask)):
            assert torch.equal(logits_of(with_one, ids, **given), logits_of(without, ids, **given))
        (state,) = with_one(ids).past_key_values.state.residual
        assert state.memory.weights[0].abs().max() > 1e-3
        assert state.memory.weights[0].dtype == torch.promote_types(dtype, torch.float32)


def test_a_frozen_memory_writes_nothing() -> None:
    model, ids = small_graft(residual=INSIDE, adaptation=False), random_ids(1, LONG)
    cache = model(ids, freeze_memory=True).past_key_values
    assert not any(layer.memory.weights[0].any() for layer in cache.state.residual)
    assert (logits_of(model, ids) - logits_of(model, ids, freeze_memory=True)).abs().max() > 0.01
    with pytest.raises(ValueError, match="changes the base's own states; call read_base"):
        model(ids, output_base_logits=True)


def test_all_memories_together_learn_through_their_updates() -> None:
    model, ids = small_graft(residual=INSIDE, association=RECALLING).train(), random_ids(2, 30)
    found = model(ids, labels=ids, output_surprise=True)
    assert [surprise.shape[-1] for surprise in found.surprises] == [2, 1, 1]
    found.loss.backward()
    for name, parameter in model.named_parameters():
        of_base = name.startswith("base.")
        assert parameter.requires_grad != of_base and (parameter.grad is None) == of_base, name
        # A memory that is empty in the beginning has no use for its weights until it is written to.
        assert of_base or parameter.grad.abs().max() > 0, name


def test_its_files_and_folders(tmp_path: Path) -> None:
    model, ids, path = small_graft(residual=INSIDE), random_ids(1, LONG), tmp_path / "text.memory"
    model.save_pretrained(tmp_path / "graft")
    loaded = GraftedForCausalLM.from_pretrained(tmp_path / "graft", base=model.base)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    session = Session(model)
    session.feed(ids[0])
    session.save(path)
    others: dict[str, dict[str, Any]] = {
        "residual={.*, the model has None": {},
        r"residual.layers=\[0, 1\], the model has \[0\]": dict(residual={**INSIDE, "layers": [0]}),
        "residual.head_dim=8, the model has 4": dict(residual={**INSIDE, "head_dim": 4}),
    }
    for message, options in others.items():
        with pytest.raises(ValueError, match=message):
            Session.load(path, small_graft(**options))
    # Another beginning means the same; the weights are others.
    begun = small_graft(residual={**INSIDE, "half_lives": (9.0, 90.0)})
    assert Session.load(path, begun, strict=False).num_tokens == LONG
    with open_state_file(path) as file:
        tensors, about = file.tensors(), dict(file.about)
    weight, place = "[0].residual[1].memory.weights[0]", "[0].residual[0].memory.position"
    for name, value, message in (
        (weight, tensors[weight][:, :1], "weights.*shape"),
        (weight, tensors[weight] * torch.nan, "NaN or infinite"),
        (place, tensors[place] + 1, "contradict each other"),
    ):
        write_state_file(path, {**tensors, name: value}, about)
        with pytest.raises(ValueError, match=message):
            Session.load(path, model)
    for given, message in (
        ({"layers": [0, 2]}, "can have no such residual: layers has 2, and it has layers 0 to 1"),
        ({"layers": [1, 0]}, r"layers=\[1, 0\]: give numbers of layers in increasing order"),
        ({"layer": 1}, "residual has no setting 'layer'"),
        ({"num_heads": 0}, "num_heads=0: give a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            graft(model.base, window=WINDOW, sinks=SINKS, residual=given)
    with pytest.raises(ValueError, match="recurrence=True: there is no such memory; choose from residual"):
        graft(model.base, window=WINDOW, recurrence=True)
