"""The association: against the delta rule token by token, in any split, padded, frozen, and its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.nn.association import Association, AssociationState
from titans.nn.whitening import whitening_of

D, V, TIME = 6, 17, 12
LAYERS = (1, 4)
EXACT = dict(rtol=1e-10, atol=1e-11)
FORMS: dict[str, dict[str, Any]] = {
    "product": dict(keys=((1, 1), (4, 1), (4,)), feature_size=9, value_size=4, half_life=20.0),
    "sin": dict(features="sin", feature_size=5, half_life=None),
}


def make(form: str = "product", **options: Any) -> Association:
    """With every part doing something."""
    layer = Association(D, LAYERS, gate_hidden_size=3, **(FORMS[form] | options)).double()
    layer.set_head(rows())
    random = torch.Generator().manual_seed(3)
    mixed = torch.randn(D, D, generator=random, dtype=torch.float64)
    layer.whiten([torch.randn(99, D, generator=random, dtype=torch.float64) @ mixed + 0.3 for _ in LAYERS])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        layer.scale += 6.0
        layer.write_gate.bias += 1.5
    return layer


def rows() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def text(batch: int = 1, time: int = TIME) -> tuple[list[Tensor], Tensor, Tensor]:
    """States of each layer, the head's input, and ids."""
    random = torch.Generator().manual_seed(1)
    states, hidden = (
        [torch.randn(batch, time, D, generator=random, dtype=torch.float64) for _ in range(n)] for n in (2, 1)
    )
    return states, hidden[0], torch.randint(V, (batch, time), generator=random)


def oracle(
    layer: Association, states: list[Tensor], hidden: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One text (time, d), as the class describes it: hidden, surprise (time, heads), the last weights."""
    code_mean, root, _ = whitening_of(rows())
    codes = F.normalize((rows() - code_mean) @ root, dim=-1)
    whitened = [
        F.normalize((s - mean) @ root, dim=-1)
        for s, mean, root in zip(states, layer.state_mean, layer.state_whitening, strict=True)
    ]

    def feature(head: int, t: int) -> Tensor:
        pairs = zip(layer.keys[head], layer.key_map.weights[head], strict=True)
        parts = [projection @ whitened[LAYERS.index(layer)][t] for layer, projection in pairs]
        h = torch.stack(parts).prod(0)
        if layer.features == "sin":
            h = torch.sin(layer.key_map.log_bandwidth[head].exp() * torch.stack(parts).sum(0))
        return h / (h.square().sum() + 0.01 * len(h)).sqrt()

    def gate(module: Any, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs)
        return module.weight @ x + module.bias + module.down_weight @ F.silu(module.up_weight @ x)

    size, heads = D**0.5, range(layer.num_heads)
    weights = [torch.zeros(layer.value_size, layer.feature_size, dtype=hidden.dtype) for _ in heads]
    found, surprises = [], []
    for t, token in enumerate(ids.tolist()):
        before = [torch.zeros_like(w[0]) if not t else w[t - 1] for w in whitened]
        logits = gate(
            layer.write_gate,
            *(size * s for s in before),
            *(size * w[t] for w in whitened),
            size * codes[token],
        )
        reads, surprise = [], []
        for head in heads:
            value = codes[token] if layer.value_weight is None else layer.value_weight[head] @ codes[token]
            key = torch.zeros(layer.feature_size, dtype=hidden.dtype) if not t else feature(head, t - 1)
            error = weights[head] @ key - value
            beta, alpha = torch.sigmoid(logits[head]), 0.0
            if layer.half_life is not None:
                alpha = 1 - (-F.softplus(logits[layer.num_heads + head])).exp()
            weights[head] = (1 - alpha) * weights[head] - beta * torch.outer(error, key)
            reads.append(weights[head] @ feature(head, t))
            surprise.append(error.square().sum())
        squares = torch.stack([r.square().sum() for r in reads]) + 1e-4
        normal = hidden[t] / (hidden[t].square().mean() + 1e-6).sqrt()
        g = torch.sigmoid(
            gate(
                layer.output_gate,
                *(size * w[t] for w in whitened),
                normal,
                squares.sqrt(),
                0.3 * squares.log(),
            )
        )
        added = [layer.scale[n] * g[n] * layer.output_weight[n] @ reads[n] for n in heads]
        found.append(hidden[t] + sum(added))
        surprises.append(torch.stack(surprise))
    return torch.stack(found), torch.stack(surprises), weights


def read(layer: Any, cuts: tuple[int, ...], states: list[Tensor], hidden: Tensor, ids: Tensor) -> Any:
    """A text in several calls: hidden, state, surprise."""
    state: AssociationState | None = None
    changed, lost = [], []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        part = slice(start, stop)
        given = [x[:, part] for x in (*states, hidden, ids)]
        some, state, surprise = layer(given[:-2], *given[-2:], rows(), state, surprise=True)
        changed.append(some)
        lost.append(surprise)
    return torch.cat(changed, 1), state, torch.cat(lost, 1)


def assert_same(a: object, b: object, **tolerance: float) -> None:
    for one, other in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token(form: str) -> None:
    layer, (states, hidden, ids) = make(form), text()
    wanted, surprise, weights = oracle(layer, [s[0] for s in states], hidden[0], ids[0])
    assert (wanted - hidden[0])[2:].abs().amax(1).min() > 0.1, "what is recalled must be seen"
    found, state, lost = read(layer, (), states, hidden, ids)
    assert_same((found[0], lost[0], state.weight[0]), (wanted, surprise, torch.stack(weights)))
    assert state.position.tolist() == [TIME]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, TIME), max_size=5), st.sampled_from(sorted(FORMS)))
def test_any_split_is_one_call(cuts: list[int], form: str) -> None:
    layer, given = make(form), text(2)
    assert_same(read(layer, tuple(sorted(cuts)), *given), read(layer, (), *given))


def test_padded_rows_are_read_as_if_alone() -> None:
    layer, (states, hidden, ids), lengths = make(), text(4), (12, 5, 0, 1)
    _, begun, _ = layer(states, hidden, ids, rows())
    bad = [x.clone() for x in states]
    for row, length in enumerate(lengths):
        for x in bad:
            x[row, length:] = 1e3
    for frozen in (False, True):
        options = dict(surprise=True, frozen=frozen)
        found, state, lost = layer(bad, hidden, ids, rows(), begun, lengths=torch.tensor(lengths), **options)
        for row, n in enumerate(lengths):
            some = [x[[row], :n] for x in (*states, hidden, ids)]
            mine = pytree.tree_map(lambda x, row=row: x[[row]], begun)
            alone, after, surprise = layer(some[:-2], *some[-2:], rows(), mine, **options)
            assert_same((found[[row], :n], lost[[row], :n]), (alone, surprise))
            assert_same(pytree.tree_map(lambda x, row=row: x[[row]], state), after)
            assert_same(found[row, n:], hidden[row, n:], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_changes_nothing_before_it(form: str) -> None:
    layer, (states, hidden, ids) = make(form), text()
    whole = read(layer, (), states, hidden, ids)[0]
    for name in ("state", "id"):
        others, labels = [s.clone() for s in states], ids.clone()
        if name == "state":
            others[0][0, 6] += 1.0
        else:
            labels[0, 6] = (labels[0, 6] + 1) % V
        other = read(layer, (), others, hidden, labels)[0]
        differs = (other != whole).any(-1)[0].tolist()
        assert differs == [False] * 6 + [True] * 6, "what was written with it is recalled from then on"


@pytest.mark.parametrize("options", [{}, {"value_size": 24}, {"features": "sin"}])
def test_what_followed_a_context_is_recalled_as_a_logit_of_its_token(options: dict[str, Any]) -> None:
    size, vocab, time, random = 48, 40, 8, torch.Generator().manual_seed(5)
    head = torch.randn(vocab, size, generator=random) + 1.0
    layer = Association(size, LAYERS, keys=((4, 1) if not options else (4,),), feature_size=400, **options)
    layer.set_head(head)
    with torch.no_grad():
        layer.scale += 3.0
        layer.write_gate.bias[0] = layer.output_gate.bias[0] = 9.0
    states = [torch.randn(1, time, size, generator=random).repeat(1, 2, 1) for _ in LAYERS]
    ids = torch.randperm(vocab, generator=random)[None, :time].repeat(1, 2)
    found = layer(states, torch.zeros(1, 2 * time, size), ids, head)[0][0] @ head.T
    for t in range(time, 2 * time - 1):
        # This context was followed by this token before.
        logits, follower = found[t] - found[t].mean(), ids[0, t - time + 1]
        assert logits.argmax() == follower and 1.2 < logits[follower] < 4.0


def test_an_untrained_association_is_the_model_bit_for_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        states, hidden, ids = text(2)
        layer = Association(D, LAYERS)
        layer.set_head(rows().to(dtype))
        given = [s.to(dtype) for s in states]
        found, state, _ = layer(given, hidden.to(dtype), ids, rows().to(dtype))
        assert torch.equal(found, hidden.to(dtype)) and found.dtype == dtype
        assert state.weight.dtype == torch.promote_types(dtype, torch.float32) and state.weight.any()
    again = Association(D, LAYERS)
    torch.testing.assert_close(again.key_map.weights[0], layer.key_map.weights[0], rtol=0, atol=0)


def test_half_precision_is_near_float64() -> None:
    layer, (states, hidden, ids) = make(), text(2)
    wanted = layer(states, hidden, ids, rows())[0]
    given = [s.bfloat16().double() for s in (*states, hidden, rows())]
    rounded = layer(given[:2], given[2], ids, given[3])[0]
    found = layer.float()([s.bfloat16() for s in states], hidden.bfloat16(), ids, rows().bfloat16())[0]
    assert (rounded - wanted).norm() < 0.1 * wanted.norm()
    torch.testing.assert_close(found, rounded.bfloat16(), rtol=0.02, atol=0.02)


def test_frozen_reading_uses_the_weights_and_leaves_them() -> None:
    layer, (states, hidden, ids) = make(), text(2)
    parts = [[x[:, part] for x in (*states, hidden, ids)] for part in (slice(0, 7), slice(7, 12))]
    _, state, _ = layer(parts[0][:2], *parts[0][2:], rows())
    found = layer.read(parts[1][:2], *parts[1][2:], rows(), state, frozen=True, surprise=True)
    assert_same((found.state.weight, found.state.position), (state.weight, state.position), rtol=0, atol=0)
    assert (found.hidden - parts[1][2]).abs().amax(-1).min() > 0.05
    # The surprise of the first is that of learning it, and of the others what the same weights give.
    learned = layer.read(parts[1][:2], *parts[1][2:], rows(), state, surprise=True)
    assert_same(found.surprise[:, 0], learned.surprise[:, 0])
    assert (found.surprise - learned.surprise)[:, 1:].abs().max() > 1e-3
    # Learning goes on from the last token that was read.
    assert_same(found.state.previous, learned.state.previous)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_everything(form: str) -> None:
    layer, (states, hidden, ids) = make(form), text(time=5)
    names = [name for name, _ in layer.named_parameters()]

    def loss(cuts: tuple[int, ...], hidden: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))

        def run(*args: Any, **options: Any) -> Any:
            return torch.func.functional_call(layer, parameters, args, options)

        return read(run, cuts, states, hidden, ids)[0].square().sum()

    given = [hidden.requires_grad_(), *layer.parameters()]
    whole, split = (torch.autograd.grad(loss(cuts, *given), given) for cuts in ((), (2, 3)))
    assert_same(whole, split)
    for name, gradient in zip(["hidden", *names], whole, strict=True):
        assert gradient.abs().max() > 1e-4, name
    if form == "product":
        assert torch.autograd.gradcheck(partial(loss, (2,)), given, fast_mode=True)


def test_settings_and_inputs() -> None:
    wrong: dict[str, dict[str, Any]] = {
        r"layers=\(4, 1\): give each layer once": dict(layers=(4, 1)),
        r"layers=\(\): give numbers of layers": dict(layers=()),
        r"keys=\(\(2,\),\): give for each head the layers": dict(keys=((2,),)),
        "features='cos': choose one of product, sin": dict(features="cos"),
        "feature_size=0: give a whole number": dict(feature_size=0),
        "gate_hidden_size=True": dict(gate_hidden_size=True),
        "half_life=-1: give a positive number": dict(half_life=-1),
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            Association(D, **{"layers": LAYERS, **options})
    layer, (states, hidden, ids) = make(), text(2)
    for message, args in {
        r"states holds 1 tensor\(s\)": (states[:1], hidden, ids, rows()),
        "hidden has shape": (states, hidden[:, 1:], ids, rows()),
        "states has shape": ([states[0], states[1][..., 1:]], hidden, ids, rows()),
        r"state\.weight has shape \(3,": (states, hidden, ids, rows(), layer.initial_state(3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            layer(*args)
    with pytest.raises(ValueError, match="give some that differ"):
        layer.whiten([torch.ones(5, D), torch.ones(5, D)])
    with pytest.raises(ValueError, match="covariance of 5 vector"):
        layer.whiten([torch.full((5, D), torch.nan)] * 2)
