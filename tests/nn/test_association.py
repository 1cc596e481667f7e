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

from titans.nn.association import LEAST_SHARE, Association, AssociationState
from titans.nn.whitening import whitening_of

D, V, TIME, ORDER, TOPIC = 6, 17, 12, 2, 4
LAYERS = (1, 4)
EXACT = dict(rtol=1e-10, atol=1e-11)
FORMS: dict[str, dict[str, Any]] = {
    "one state": dict(num_ordered=ORDER, num_topic=TOPIC, feature_size=9, half_life=20.0),
    "both states": dict(num_ordered=TOPIC, num_topic=ORDER, key_layers=(1, 4)),
}


def make(form: str = "one state", **options: Any) -> Association:
    """With every part doing something."""
    layer = Association(D, V, LAYERS, gate_hidden_size=3, **(FORMS[form] | options)).double()
    layer.set_head(rows())
    random = torch.Generator().manual_seed(3)
    mixed = torch.randn(D, D, generator=random, dtype=torch.float64)
    layer.whiten([torch.randn(99, D, generator=random, dtype=torch.float64) @ mixed + 0.3 for _ in LAYERS])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        layer.write_gate.bias[0] += 2.0
        layer.mixing_gate.bias += 3.0
        layer.trained.fill_(1.0)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One text (time, d), as the class describes it: log-probabilities (time, vocab), λ, surprise, the last
    weights."""
    centred = rows() - rows().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (V - 1))
    codes = centred @ vectors @ torch.diag((values + 0.3 * values.mean()) ** -0.5) @ vectors.T
    codes = codes / codes.norm(dim=1, keepdim=True)
    whitened = [
        F.normalize((s - mean) @ root, dim=-1)
        for s, mean, root in zip(states, layer.state_mean, layer.state_whitening, strict=True)
    ]

    def salience(t: int) -> Tensor:
        seen = torch.cat([*(w[t] for w in whitened), codes[ids[t]]]) * D**0.5
        return (layer.salience.weight[0] @ seen).exp()

    def feature(t: int) -> Tensor:
        if t < 0:
            return torch.zeros(layer.feature_size, dtype=hidden.dtype)
        a, b = layer.key_map.order_weights, layer.key_map.topic_weights
        order = [a[j] * codes[ids[t - j]].roll(61 * j) for j in range(min(len(a), t + 1))]
        topic = [b[j] * salience(t - j) * codes[ids[t - j]] for j in range(min(len(b), t + 1))]
        parts = [F.normalize(sum(some), dim=0) for some in (order, topic)]
        parts += [whitened[LAYERS.index(number)][t] for number in layer.key_layers]
        h = torch.sin(layer.key_map.weight @ torch.cat(parts))
        return h / (h.square().sum() + 0.01 * len(h)).sqrt()

    def gate(module: Any, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs)
        return module.weight @ x + module.bias + module.down_weight @ F.silu(module.up_weight @ x)

    size, weight = D**0.5, torch.zeros(D, layer.feature_size, dtype=hidden.dtype)
    found, mixed, surprises = [], [], []
    for t, token in enumerate(ids.tolist()):
        before = [torch.zeros_like(w[0]) if not t else w[t - 1] for w in whitened]
        now = [size * w[t] for w in whitened]
        logits = gate(layer.write_gate, *(size * s for s in before), *now, size * codes[token])
        alpha = 0.0 if layer.half_life is None else 1 - (-F.softplus(logits[1])).exp()
        error = weight @ feature(t - 1) - codes[token]
        weight = (1 - alpha) * weight - torch.sigmoid(logits[0]) * torch.outer(error, feature(t - 1))
        read = weight @ feature(t)
        square = read.square().sum()[None] + 1e-4
        normal = hidden[t] / (hidden[t].square().mean() + 1e-6).sqrt()
        share = torch.sigmoid(gate(layer.mixing_gate, *now, normal, 3 * square.sqrt(), 0.3 * square.log()))
        share = share * bool(t)  # Nothing was learned at the first token.
        recalled = (layer.log_sharpness.exp() * codes @ read).softmax(0)
        found.append(((1 - share) * (rows() @ hidden[t]).softmax(0) + share * recalled).log())
        mixed.append(share[0])
        surprises.append(error.square().sum())
    return torch.stack(found), torch.stack(mixed), torch.stack(surprises), weight


def read(
    layer: Any, cuts: tuple[int, ...], states: list[Tensor], hidden: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, AssociationState, Tensor]:
    """A text in several calls: reads, the logits of λ, state, surprise."""
    state: AssociationState | None = None
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        part = slice(start, stop)
        given = [x[:, part] for x in (*states, hidden, ids)]
        found = layer(given[:-2], *given[-2:], rows(), state, surprise=True)
        parts.append((found.reads, found.mixing, found.surprise))
        state = found.state
    reads, mixing, surprise = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return reads, mixing, state, surprise


def assert_same(a: object, b: object, **tolerance: float) -> None:
    for one, other in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token(form: str) -> None:
    layer, (states, hidden, ids) = make(form), text()
    wanted, shares, surprise, weight = oracle(layer, [s[0] for s in states], hidden[0], ids[0])
    logits = hidden @ rows().T
    assert (wanted - logits[0].log_softmax(-1))[2:].abs().amax(1).min() > 0.1, "what is recalled must be seen"
    reads, mixing, state, lost = read(layer, (), states, hidden, ids)
    mixed = layer.mix(logits, reads, mixing, rows())
    assert_same(mixed.logsumexp(-1), logits.logsumexp(-1))
    assert_same(
        (mixed.log_softmax(-1)[0], torch.sigmoid(mixing[0, 1:]), lost[0], state.weight[0]),
        (wanted, shares[1:], surprise, weight),
    )
    assert state.position.tolist() == [TIME] and state.recent.tolist() == [ids[0, -TOPIC:].tolist()]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, TIME), max_size=5), st.sampled_from(sorted(FORMS)))
def test_any_split_is_one_call(cuts: list[int], form: str) -> None:
    layer, given = make(form), text(2)
    assert_same(read(layer, tuple(sorted(cuts)), *given), read(layer, (), *given))


def test_padded_rows_are_read_as_if_alone() -> None:
    layer, (states, hidden, ids), lengths = make(), text(4), (12, 5, 0, 1)
    begun = layer(states, hidden, ids, rows()).state
    bad = [x.clone() for x in states]
    for row, length in enumerate(lengths):
        for x in bad:
            x[row, length:] = 1e3
    for frozen in (False, True):
        options = dict(surprise=True, frozen=frozen)
        found = layer(bad, hidden, ids, rows(), begun, lengths=torch.tensor(lengths), **options)
        for row, n in enumerate(lengths):
            some = [x[[row], :n] for x in (*states, hidden, ids)]
            mine = pytree.tree_map(lambda x, row=row: x[[row]], begun)
            alone = layer(some[:-2], *some[-2:], rows(), mine, **options)
            for name in ("reads", "mixing", "surprise"):
                assert_same(getattr(found, name)[[row], :n], getattr(alone, name))
            assert_same(pytree.tree_map(lambda x, row=row: x[[row]], found.state), alone.state)
            assert not found.reads[row, n:].any() and not found.surprise[row, n:].any()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_followed_a_context_is_predicted(dtype: torch.dtype) -> None:
    size, vocab, time, random = 96, 60, 20, torch.Generator().manual_seed(5)
    head = (torch.randn(vocab, size, generator=random) + 1.0).to(dtype)
    layer = Association(size, vocab, LAYERS, feature_size=400)
    layer.set_head(head)
    with torch.no_grad():
        layer.write_gate.bias[0] = layer.mixing_gate.bias[0] = 9.0
    layer.trained.fill_(1.0)
    # The words repeat; the states are others.
    states = [torch.randn(1, 2 * time, size, generator=random, dtype=dtype) for _ in LAYERS]
    ids = torch.randperm(vocab, generator=random)[None, :time].repeat(1, 2)
    hidden = torch.zeros(1, 2 * time, size, dtype=dtype)
    found = layer(states, hidden, ids, head)
    mixed = layer.mix(hidden @ head.T, found.reads, found.mixing, head)
    assert mixed.dtype == dtype
    probs = mixed[0].float().softmax(-1)
    asked, followers = torch.arange(time + 2, 2 * time - 1), ids[0, 3:time]
    assert (probs[asked].argmax(-1) == followers).float().mean() > 0.85
    assert probs[asked].gather(1, followers[:, None]).mean() > 0.2


def test_until_it_is_trained_and_where_little_is_mixed_nothing_changes() -> None:
    layer, (states, hidden, ids), logits = make(), text(2), rows()[None, :TIME].repeat(2, 1, 3)
    reads, mixing, *_ = read(layer, (), states, hidden, ids)
    layer.trained.zero_()
    assert layer.mix(logits, reads, mixing, rows()) is logits
    layer.trained.fill_(1.0)
    little = torch.logit(torch.tensor(0.999 * LEAST_SHARE, dtype=torch.float64))
    more = torch.logit(torch.tensor(1.001 * LEAST_SHARE, dtype=torch.float64))
    assert layer.mix(logits, reads, little.expand_as(mixing), rows()) is logits
    some = torch.where(torch.arange(TIME) == 5, more, little).expand_as(mixing).clone()
    some[0, 5] = -torch.inf
    changed = (layer.mix(logits[..., :V], reads, some, rows()) != logits[..., :V]).any(-1)
    assert changed.nonzero().tolist() == [[1, 5]]
    # The bound on the harm.
    mixed = layer.mix(logits[..., :V], reads, mixing, rows()).log_softmax(-1)
    harm = (logits[..., :V].log_softmax(-1) - mixed).amax(-1)
    assert (harm <= F.softplus(mixing) + 1e-9).all() and harm.max() > 0.5


def test_it_is_the_same_whenever_it_is_made() -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(Association(D, V, LAYERS))
    assert_same(*(layer.state_dict() for layer in made), rtol=0, atol=0)
    assert made[0].feature_size == 2 * D and made[0].key_layers == (4,) and not made[0].trained


def test_half_precision_is_near_float64() -> None:
    layer, (states, hidden, ids) = make(), text(2)
    given = [s.bfloat16().double() for s in (*states, hidden, rows())]
    wanted = layer(given[:2], given[2], ids, given[3])
    half = [s.bfloat16() for s in given]
    found = layer.float()(half[:2], half[2], ids, half[3])
    assert found.reads.dtype == found.state.weight.dtype == torch.float32
    assert_same(
        (found.reads.double(), found.mixing.double()), (wanted.reads, wanted.mixing), rtol=1e-3, atol=1e-4
    )


def test_frozen_reading_uses_the_weights_and_leaves_them() -> None:
    layer, (states, hidden, ids) = make(), text(2)
    parts = [[x[:, part] for x in (*states, hidden, ids)] for part in (slice(0, 7), slice(7, 12))]
    state = layer(parts[0][:2], *parts[0][2:], rows()).state
    found = layer(parts[1][:2], *parts[1][2:], rows(), state, frozen=True, surprise=True)
    assert_same((found.state.weight, found.state.position), (state.weight, state.position), rtol=0, atol=0)
    assert found.reads.norm(dim=-1).min() > 0.01 and found.write is None
    # The surprise of the first is that of learning it, and of the others what the same weights give.
    learned = layer(parts[1][:2], *parts[1][2:], rows(), state, surprise=True)
    assert_same(found.surprise[:, 0], learned.surprise[:, 0])
    assert (found.surprise - learned.surprise)[:, 1:].abs().max() > 1e-3
    # Learning goes on from the last token that was read.
    assert_same(found.state.states, learned.state.states)
    assert torch.equal(found.state.recent, learned.state.recent)
    assert_same(found.state.salience, learned.state.salience)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_everything(form: str) -> None:
    layer, (states, hidden, ids) = make(form), text(time=5)
    names = [name for name, _ in layer.named_parameters()]

    def loss(cuts: tuple[int, ...], hidden: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))

        def run(*args: Any, **options: Any) -> Any:
            return torch.func.functional_call(layer, parameters, args, options)

        reads, mixing, *_ = read(run, cuts, states, hidden, ids)
        # As `mix` does with the parameters of the layer itself.
        logits = parameters["log_sharpness"].exp() * layer.words.products(reads, rows())
        base = (hidden @ rows().T).log_softmax(-1)
        mixed = torch.logaddexp(
            F.logsigmoid(-mixing)[..., None] + base,
            F.logsigmoid(mixing)[..., None] + logits.log_softmax(-1),
        )
        return F.cross_entropy(mixed[0, 1:-1], ids[0, 2:])

    given = [hidden.requires_grad_(), *layer.parameters()]
    whole, split = (torch.autograd.grad(loss(cuts, *given), given) for cuts in ((), (2, 3)))
    assert_same(whole, split)
    reads, mixing, *_ = read(layer, (), states, hidden, ids)
    mixed = layer.mix(hidden @ rows().T, reads, mixing, rows())
    assert_same(torch.autograd.grad(F.cross_entropy(mixed[0, 1:-1], ids[0, 2:]), given), whole)
    for name, gradient in zip(["hidden", *names], whole, strict=True):
        assert gradient.abs().max() > 1e-5, name
    if form == "one state":
        assert torch.autograd.gradcheck(partial(loss, (2,)), given, fast_mode=True)


def test_words_are_those_of_the_chosen_rows_too() -> None:
    layer, chosen = make(), torch.tensor([3, 11, 4])
    reads = torch.randn(2, 5, D, dtype=torch.float64)
    whole = layer.word_logits(reads, rows())
    assert_same(layer.word_logits(reads, rows()[chosen], chosen), whole[..., chosen])
    codes = layer.words.codes(torch.arange(V), rows(), torch.float64)
    assert_same(whole, layer.log_sharpness.exp() * reads @ codes.T, rtol=1e-6, atol=1e-6)
    assert not layer.words.codes(torch.tensor([-1]), rows(), torch.float64).any()
    found = whitening_of(rows(), 0.3)
    assert_same(codes, F.normalize((rows() - found.mean) @ found.root, dim=-1), rtol=1e-6, atol=1e-6)


def test_settings_and_inputs() -> None:
    wrong: dict[str, dict[str, Any]] = {
        r"layers=\(4, 1\): give each layer once": dict(layers=(4, 1)),
        r"layers=\(\): give numbers of layers": dict(layers=()),
        r"key_layers=\(2,\): give some of layers=\(1, 4\)": dict(key_layers=(2,)),
        "feature_size=0: give a whole number": dict(feature_size=0),
        "num_topic=0: give a whole number": dict(num_topic=0),
        "gate_hidden_size=True": dict(gate_hidden_size=True),
        "half_life=-1: give a positive number": dict(half_life=-1),
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            Association(D, V, **{"layers": LAYERS, **options})
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
