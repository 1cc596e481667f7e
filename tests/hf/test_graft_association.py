"""A graft with an association: the states it reads, what it changes, its files and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from titans import Session, graft
from titans.hf import GraftedForCausalLM
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.window import Window
from titans.hf.state_file import open_state_file, write_state_file

from .grafts import (
    BLOCK,
    FAMILIES,
    LEARNING,
    RECALLING,
    SINKS,
    VOCAB,
    WINDOW,
    assert_near,
    logits_of,
    random_ids,
    read_on,
    small_base,
    small_graft,
)

MODELS = {
    "association": small_graft(adaptation=False, association=RECALLING),
    "both": small_graft(association=RECALLING),
}
LONG = 3 * WINDOW + 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_between_the_layers(family: str) -> None:
    model, ids = small_base(family), random_ids(3, WINDOW)
    base, count = WindowedBase(model, Window(WINDOW, SINKS)), model.config.num_hidden_layers
    layers = [0, count - 2] if count > 2 else [0]
    base.check_layers(layers)
    hidden, states, state = base.read_layers(ids[:, :5], base.initial_state(3), layers=layers)
    again, more, _ = base.read_layers(ids[:, 5:], state, layers=layers)
    assert not any(module._forward_hooks for module in model.modules())
    # The first of these is the embedding.
    expected = base.decoder(ids, output_hidden_states=True)
    assert_near(torch.cat([hidden, again], 1), expected.last_hidden_state, 1e-5)
    for index, early, late in zip(layers, states, more, strict=True):
        assert_near(torch.cat([early, late], 1), expected.hidden_states[index + 1], 1e-5)
    lengths = torch.tensor([7, 2, 0])
    _, more, _ = base.read_layers(ids[:, 5:], state, lengths, layers=layers)
    for index, late in zip(layers, more, strict=True):
        for row, length in enumerate(lengths.tolist()):
            assert_near(late[row, :length], expected.hidden_states[index + 1][row, 5 : 5 + length], 1e-5)
            assert not late[row, length:].any()


@torch.no_grad()
def test_it_is_mixed_with_what_the_base_or_the_adaptation_predicts() -> None:
    model, alone, ids = MODELS["both"], MODELS["association"], random_ids(2, LONG)
    bare = graft(model.base, window=WINDOW, sinks=SINKS, adaptation=False)._windowed
    hidden, states, _ = bare.read_layers(ids, bare.initial_state(2), layers=(0, 1))
    rows = model.base.get_output_embeddings().weight
    recalled = model.association(states, hidden, ids, rows, surprise=True)
    adapted, _, losses = model.adaptation(hidden, ids, bare.head, surprise=True)

    def mixed(logits: Tensor) -> Tensor:
        share = torch.sigmoid(recalled.mixing)[..., None]
        share[:, 0] = 0.0
        words = model.association.word_logits(recalled.reads, rows).softmax(-1)
        return ((1 - share) * logits.softmax(-1) + share * words).log()

    found = model(ids, output_surprise=True, output_base_logits=True)
    base = F.linear(hidden, rows)
    assert (mixed(adapted) - adapted.log_softmax(-1)).abs().max() > 0.3
    assert (mixed(adapted) - mixed(base)).abs().max() > 0.1
    assert_near(found.logits.log_softmax(-1), mixed(adapted), 1e-9)
    assert_near(found.logits.logsumexp(-1), adapted.logsumexp(-1), 1e-9)
    assert_near(found.surprises[0][..., 0], recalled.surprise, 1e-9)
    assert_near(found.surprises[1][..., 0], losses, 1e-9)
    assert_near(found.base_logits, base, 1e-9)
    assert_near(found.association_logits.log_softmax(-1), mixed(base), 1e-9)
    own = alone(ids, output_surprise=True, output_base_logits=True)
    assert_near(own.logits, found.association_logits, 1e-9)
    assert own.association_logits is None and len(own.surprises) == 1
    assert_near(alone(ids, logits_to_keep=3).logits, own.logits[:, -3:], 1e-9)
    assert_near(alone(ids, logits_to_keep=torch.tensor([4, 20])).logits, own.logits[:, [4, 20]], 1e-9)
    expected = F.cross_entropy(own.logits[:, :-1].transpose(1, 2), ids[:, 1:])
    assert_near(alone(ids, labels=ids).loss, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_untrained_it_is_the_graft_without_it_to_the_bit(dtype: torch.dtype) -> None:
    base, ids = small_base().to(dtype), random_ids(2, LONG)
    mask = torch.arange(LONG) >= torch.tensor([[0], [9]])
    for adaptation in (False, LEARNING):
        options = dict(window=WINDOW, sinks=SINKS, adaptation=adaptation)
        with_one, without = graft(base, association=True, **options), graft(base, **options)
        assert with_one.association.layers == (1,)
        with_one.whiten(random_ids(60))
        if adaptation:
            without.whiten(random_ids(60))
        for given in ({}, dict(attention_mask=mask)):
            assert torch.equal(logits_of(with_one, ids, **given), logits_of(without, ids, **given))
        state = with_one(ids).past_key_values.state
        assert state.association.weight.any()
        assert state.association.weight.dtype == torch.promote_types(dtype, torch.float32)


def test_half_precision_is_near() -> None:
    model, ids = MODELS["association"], random_ids(2, LONG)
    half = graft(small_base().bfloat16(), window=WINDOW, sinks=SINKS, adaptation=False, association=RECALLING)
    half.association.load_state_dict(model.association.state_dict())
    found, expected = logits_of(half, ids), logits_of(model, ids)
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.1 * expected.norm()


def test_any_split_and_padding_is_one_call() -> None:
    model, ids = MODELS["association"], random_ids(2, LONG)
    whole = logits_of(model, ids)
    for sizes in ([1] * LONG, [4, 0, 15, 1, LONG - 20]):
        assert_near(read_on(model, ids.split(sizes, 1))[0], whole, 1e-9)
    mask = torch.arange(LONG + 4) >= torch.tensor([[4], [9]])
    padded = torch.where(mask, torch.cat([ids[:, :4], ids], 1), VOCAB - 1)
    with torch.no_grad():
        output = model(padded, attention_mask=mask.long(), output_surprise=True)
        alone = model(padded[1:, 9:], output_surprise=True)
    assert_near(output.logits[:1, 4:], whole[:1], 1e-9)
    assert_near(output.logits[1:, 9:], alone.logits, 1e-9)
    assert_near(output.surprises[0][1:, 9:], alone.surprises[0], 1e-9)
    assert not output.surprises[0][1, :9].any()


def test_a_frozen_association_recalls_and_learns_nothing() -> None:
    model, ids = MODELS["association"], random_ids(1, BLOCK)
    cache = model(random_ids(1, WINDOW, seed=2)).past_key_values
    before = cache.state.association
    found = model(ids, past_key_values=cache, freeze_memory=True, output_base_logits=True)
    after = cache.state.association
    assert torch.equal(after.weight, before.weight) and torch.equal(after.position, before.position)
    assert (found.logits - found.base_logits).abs().amax(-1).min() > 0.01
    # Frozen from the start it holds nothing.
    plain = small_graft(adaptation=False)
    assert torch.equal(logits_of(model, ids, freeze_memory=True), logits_of(plain, ids))


def test_its_files(tmp_path: Path) -> None:
    model, path = MODELS["both"], tmp_path / "text.memory"
    session = Session(model)
    with torch.no_grad():
        # The last token waits for the next call, and the first counts as 0.
        loss = small_graft()(random_ids(1, 29), labels=random_ids(1, 29)).loss
    given = session.feed(random_ids(30))
    torch.testing.assert_close(given.mean_surprise, float(loss) * 28 / 29, rtol=1e-3, atol=0)
    session.save(path)
    others: dict[str, Any] = {
        "'feature_size': 20}, the model has None": dict(association=None),
        "association.num_topic=3, the model has 4": dict(association={**RECALLING, "num_topic": 4}),
        "association.feature_size=20, the model has None": dict(
            association={**RECALLING, "feature_size": None}
        ),
        "adaptation=True, the model has False": dict(adaptation=False, association=RECALLING),
    }
    for message, options in others.items():
        with pytest.raises(ValueError, match=message):
            Session.load(path, small_graft(**options))
    single = graft(small_base().float(), window=12, sinks=2, adaptation=LEARNING, association=RECALLING)
    single.association.load_state_dict(model.association.state_dict())
    assert Session.load(path, single).cache.state.association.weight.dtype == torch.float32
    with open_state_file(path) as file:
        tensors, about = file.tensors(), dict(file.about)
    weight, place = "[0].association.weight", "[0].association.position"
    for name, value, message in (
        (weight, tensors[weight][:, :1], "weight.*shape"),
        (weight, tensors[weight] * torch.inf, "NaN or infinite"),
        (place, tensors[place] + 1, "contradict each other"),
        ("[0].association.states", tensors["[0].association.states"].long(), "states has dtype"),
        ("[0].association.recent", tensors["[0].association.recent"] + VOCAB, "recent holds values that no"),
        ("[0].association.recent", tensors["[0].association.recent"] - VOCAB, "recent holds values that no"),
    ):
        write_state_file(path, {**tensors, name: value}, about)
        with pytest.raises(ValueError, match=message):
            Session.load(path, model)
    # Without an association there is no trace of one, as before there was any.
    plain = Session(small_graft())
    plain.feed(random_ids(30))
    plain.save(path)
    with open_state_file(path) as file:
        assert "association" not in str(file.about) + str(file.kinds)
    with pytest.raises(ValueError, match="association=None, the model has"):
        Session.load(path, model)


def test_a_folder_holds_what_the_base_does_not(tmp_path: Path) -> None:
    model, ids = MODELS["both"], random_ids(1, LONG)
    model.save_pretrained(tmp_path)
    loaded = GraftedForCausalLM.from_pretrained(tmp_path, base=model.base)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "association.state_whitening" in names and not any(".words." in name for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["association"]["layers"] == [0, 1] and config["association"]["half_life"] == 30.0
    small_graft().save_pretrained(tmp_path)
    assert "association" not in (tmp_path / "config.json").read_text()
    # Made again with the same settings it is the same memory.
    twice = [graft(model.base, window=WINDOW, association=True).association.state_dict() for _ in range(2)]
    assert all(torch.equal(twice[0][name], twice[1][name]) for name in twice[0])


def test_both_memories_learn_through_their_updates() -> None:
    model, ids = small_graft(association=RECALLING).train(), random_ids(2, 30)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        of_base = name.startswith("base.")
        assert parameter.requires_grad != of_base and (parameter.grad is None) == of_base, name
        assert of_base or parameter.grad.abs().max() > 0, name


def test_whitening_is_of_the_states_of_a_text() -> None:
    model, ids = small_graft(association=RECALLING), random_ids(400)
    model.whiten(ids)
    _, states, _ = model._windowed.read_layers(ids[None], model._windowed.initial_state(1), layers=(0, 1))
    for x, mean, root in zip(
        states, model.association.state_mean, model.association.state_whitening, strict=True
    ):
        # Without the first token, whose states are far from all others in many models.
        white = (x[0, 1:] - mean) @ root.double()
        assert_near(white.mean(0), torch.zeros(16), 1e-5)
        assert (white.T.cov() - torch.eye(16)).norm() < 1.2
