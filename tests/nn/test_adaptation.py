"""The adaptation beside a model's head: against autograd token by token, in any split, on hostile streams."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.nn.adaptation import Adaptation, AdaptationState, FunctionHead, Head, LinearHead
from titans.nn.adaptation.head import curvature
from titans.state import map_state

D, V, CHUNK = 6, 11, 4
EXACT = dict(rtol=1e-10, atol=1e-11)


def make(**options: object) -> Adaptation:
    """An adaptation with every part there is, at steps that change predictions visibly."""
    torch.manual_seed(0)
    everything = dict(
        chunk_size=CHUNK, step=0.6, half_life=40.0, momentum=0.3, warm_up=10, learned_start=True
    )
    layer = Adaptation(D, V, 1.5, **(everything | options)).double()  # type: ignore[arg-type]
    layer.whiten(torch.randn(200, D) @ torch.randn(D, D))
    if layer.start_weight is not None:
        nn.init.normal_(layer.start_weight, std=0.05)
        nn.init.normal_(layer.start_bias, std=0.2)
    return layer


def text(batch: int = 1, time: int = 19, seed: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, time, D, generator=random, dtype=torch.float64)
    return hidden, torch.randint(V, (batch, time), generator=random)


def head(**options: object) -> LinearHead:
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(V, D, generator=random, dtype=torch.float64)
    return LinearHead(weight, torch.randn(V, generator=random, dtype=torch.float64), **options)  # type: ignore[arg-type]


def oracle(layer: Adaptation, hidden: Tensor, ids: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    """One text (time, d), token by token as the class describes it: logits (time, vocab) and its losses."""
    cap, logits, losses = head.softcap, [], [torch.zeros((), dtype=hidden.dtype)]
    weight, bias = torch.zeros(D, D, dtype=hidden.dtype), torch.zeros(V, dtype=hidden.dtype)
    slow = [torch.zeros_like(weight), torch.zeros_like(bias)]
    start = (0.0, 0.0) if layer.start_weight is None else (layer.start_weight, layer.start_bias)
    eta = torch.sigmoid(layer.momentum_logit) if layer.momentum_logit is not None else 0.0
    kept = 1.0 if layer.log_half_life is None else 0.5 ** (layer.chunk_size / layer.log_half_life.exp())
    x = (hidden - layer.mean) @ layer.whitening.T
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def predict(t: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the factor by which the softcap flattens each."""
        own = (hidden[t] + (weight + start[0]) @ x[t]) @ head.weight.T + head.bias
        if cap is None:
            return own + bias + start[1], torch.ones_like(own)
        return cap * torch.tanh(own / cap) + bias + start[1], (own / cap).cosh() ** -2

    def curvature(t: int, logits: Tensor, slopes: Tensor) -> Tensor:
        """The largest variance of the head's rows under any mixture of the prediction and the label."""
        rows, probs, label = head.weight * slopes[:, None], logits.softmax(-1), F.one_hot(ids[t + 1], V)

        def variance(share: float | Tensor) -> Tensor:
            mixed = (1 - share) * probs + share * label
            return mixed @ rows.square().sum(-1) - (mixed @ rows).square().sum()

        first, middle, last = variance(0.0), variance(0.5), variance(1.0)  # of a parabola
        bent, rising = first + last - 2 * middle, 4 * middle - 3 * first - last
        return variance((-rising / (4 * bent)).clamp(0, 1))

    chunk: list[int] = []
    for t in range(len(ids)):
        if t % layer.chunk_size == 0 and t:
            with torch.enable_grad():
                leaves = [v.detach().requires_grad_() if not v.requires_grad else v for v in (weight, bias)]
                total = sum(F.cross_entropy(predict(i, *leaves)[0], ids[i + 1]) for i in chunk)
                gradients = torch.autograd.grad(total, leaves, create_graph=torch.is_grad_enabled())
            curved = torch.stack([curvature(i, *predict(i, *leaves)) for i in chunk])
            values = torch.linalg.svdvals(x[chunk] * curved.sqrt()[:, None])
            ratio = layer.log_ratio.exp() / (layer.row_variance * D)
            theta = 2 * torch.sigmoid(layer.step_logit)
            theta = theta * (min(t / layer.warm_up, 1) if layer.warm_up else 1)
            theta = theta / (ratio * (values**16).sum() ** (1 / 8) + layer.chunk_size / 2)
            scales = (ratio * theta, theta)
            slow = [eta * s - (1 - eta) * r * g for s, r, g in zip(slow, scales, gradients, strict=True)]
            weight, bias, chunk = kept * leaves[0] + slow[0], kept * leaves[1] + slow[1], []
        chunk.append(t)
        logits.append(predict(t, weight, bias)[0])
        if t + 1 < len(ids):
            losses.append(F.cross_entropy(logits[-1], ids[t + 1]))
    return torch.stack(logits), torch.stack(losses)


def read(
    layer: Adaptation, hidden: Tensor, ids: Tensor, head: Head | Tensor, cuts: tuple[int, ...] = (), **options
):
    """A text in several calls: logits, losses, final state."""
    state: AdaptationState | None = None
    logits, losses = [], []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        part = slice(start, stop)
        some, state, loss = layer(hidden[:, part], ids[:, part], head, state, surprise=True)
        logits.append(some)
        losses.append(loss)
    return torch.cat(logits, 1), torch.cat(losses, 1), state


def assert_same(a: object, b: object, **tolerance: float) -> None:
    for one, other in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0, "half_life": None, "warm_up": 0, "learned_start": False}]
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_by_token_with_autograd(options: dict, softcap: float | None) -> None:
    layer, (hidden, ids), linear = make(**options), text(), head(softcap=softcap)
    wanted, losses = oracle(layer, hidden[0], ids[0], linear)
    plain = linear.logits(hidden[0])
    assert (wanted - plain)[CHUNK:].abs().max() > 0.1, "the text must have changed the predictions"
    logits, lost, _ = read(layer, hidden, ids, linear)
    torch.testing.assert_close(logits[0], wanted, **EXACT)
    torch.testing.assert_close(lost[0], losses, **EXACT)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.5}])
def test_a_function_and_a_linear_head_have_the_same_gradient(options: dict) -> None:
    linear = head(**options)
    hidden, other = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(3, V, dtype=torch.float64)
    labels = torch.tensor([0, 4, 9])
    probs = (linear.logits(hidden[0]) + other).softmax(-1)
    (mean, trace), row = linear.moments(hidden[0], probs), linear.row(hidden[0], labels, torch.float64)
    function = FunctionHead(linear.logits, 7.0)
    again, constant = function.moments(hidden[0], probs)
    torch.testing.assert_close(mean, again)
    torch.testing.assert_close(row, function.row(hidden[0], labels, torch.float64))
    assert constant.tolist() == [7.0] * 3
    hidden = hidden[0].requires_grad_()
    F.cross_entropy(linear.logits(hidden) + other, labels, reduction="sum").backward()
    torch.testing.assert_close(mean - row, hidden.grad)
    if "softcap" not in options:
        for t in range(3):  # Hessians
            h = torch.autograd.functional.hessian(
                lambda z, t=t: F.cross_entropy(linear.logits(z) + other[t], labels[t]), hidden[t].detach()
            )
            assert torch.linalg.eigvalsh(h)[-1] <= trace[t]


def test_the_curvature_is_that_of_an_even_prediction_even_where_the_prediction_is_sure_and_wrong() -> None:
    weight = torch.zeros(3, D, dtype=torch.float64)
    weight[0, 0], weight[1, 0] = 3.0, -1.0
    probs = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    mean, trace = LinearHead(weight).moments(torch.zeros(D), probs)
    assert trace.item() == 0.0
    assert curvature(trace, mean - weight[1]).item() == pytest.approx(4.0)  # (3 − (−1))² / 4


@pytest.mark.parametrize("cuts", [(1,), (4,), (3, 4, 5, 5, 13), tuple(range(1, 19))])
def test_any_split_is_one_call(cuts: tuple[int, ...]) -> None:
    layer, (hidden, ids) = make(), text(2)
    assert_same(read(layer, hidden, ids, head(), cuts), read(layer, hidden, ids, head()))


def test_rows_at_different_places_of_a_chunk_are_read_as_if_alone() -> None:
    layer, begins, time = make(), (0, 9, 3, 4), 10
    hidden, ids = text(4, 24)
    states, alone = [], []
    for row, begin in enumerate(begins):
        pick = slice(row, row + 1)
        _, _, state = read(layer, hidden[pick, :begin], ids[pick, :begin], head())
        states.append(state)
        part = slice(begin, begin + time)
        alone.append(layer(hidden[pick, part], ids[pick, part], head(), state, surprise=True))
    together = pytree.tree_map(lambda *leaves: torch.cat(leaves), *states)
    place = torch.tensor(begins)[:, None] + torch.arange(time)
    rows = torch.arange(4)[:, None]
    for keep in (0, 3):
        found = layer(hidden[rows, place], ids[rows, place], head(), together, surprise=True, keep=keep)
        for row, (logits, state, losses) in enumerate(alone):
            mine = map_state(lambda leaf, row=row: leaf[row : row + 1], found)
            assert_same(mine, (logits[:, -keep:], state, losses))


def test_a_token_changes_nothing_before_it_and_all_after_its_chunk() -> None:
    layer, (hidden, ids) = make(), text()
    logits, *_ = read(layer, hidden, ids, head())
    other = ids.clone()
    other[0, 6] = (ids[0, 6] + 1) % V
    changed, *_ = read(layer, hidden, other, head())
    differs = (changed != logits).any(-1)[0]
    assert differs.tolist() == [False] * 8 + [True] * 11, "the label at 6 is learned at the end of its chunk"


def test_an_empty_adaptation_is_the_model_bit_for_bit() -> None:
    layer = Adaptation(D, V, 1.5, chunk_size=32)
    hidden, ids = text()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        states, linear = hidden.to(dtype), LinearHead(head().weight.to(dtype))
        logits, _, _ = layer(states, ids, linear)
        assert logits.dtype == dtype
        assert torch.equal(logits, linear.logits(states))


def test_frozen_reading_uses_the_weights_and_leaves_them() -> None:
    layer, (hidden, ids), linear = make(), text(), head()
    _, _, state = read(layer, hidden[:, :10], ids[:, :10], linear)
    logits, frozen, lost = layer(hidden[:, 10:], ids[:, 10:], linear, state, frozen=True, surprise=True)
    short, again, _ = layer(hidden[:, 10:], ids[:, 10:], linear, state, frozen=True, keep=2)
    torch.testing.assert_close(short, logits[:, -2:])
    assert_same(again, frozen)
    for name in ("weight", "bias", "momentum", "position", "inputs", "errors", "curvatures", "bias_gradient"):
        assert_same(getattr(frozen, name), getattr(state, name), rtol=0, atol=0)
    before = layer(hidden[:, 9:10], ids[:, 9:10], linear, _state_before(layer, hidden, ids, 9))[0]
    torch.testing.assert_close(lost[0, 0], F.cross_entropy(before[0], ids[0, 10:11]))
    torch.testing.assert_close(lost[0, 1:], F.cross_entropy(logits[0, :-1], ids[0, 11:], reduction="none"))
    # What was predicted while frozen is not learned afterwards.
    _, after, _ = layer(hidden[:, :1], ids[:, :1], linear, frozen)
    torch.testing.assert_close(after.bias_gradient, state.bias_gradient)


def _state_before(layer: Adaptation, hidden: Tensor, ids: Tensor, time: int) -> AdaptationState:
    return read(layer, hidden[:, :time], ids[:, :time], head())[2]


def test_outer_gradients_go_through_the_updates() -> None:
    layer, (hidden, ids) = make(chunk_size=3), text(time=8)
    slow = list(layer.parameters())

    def loss(cuts: tuple[int, ...], hidden: Tensor, *values: Tensor) -> Tensor:
        names = [name for name, _ in layer.named_parameters()]
        run = partial(torch.func.functional_call, layer, dict(zip(names, values, strict=True)))
        state: AdaptationState | None = None
        total = torch.zeros((), dtype=torch.float64)
        for start, stop in zip((0, *cuts), (*cuts, 8), strict=True):
            part = slice(start, stop)
            args = (hidden[:, part], ids[:, part], head(), state)
            _, state, lost = run(args, dict(surprise=True))
            total = total + lost.sum()
        return total

    given = [hidden.requires_grad_(), *slow]
    assert torch.autograd.gradcheck(partial(loss, (5, 6)), given)
    whole, split = (torch.autograd.grad(loss(cuts, *given), given) for cuts in ((), (5, 6)))
    assert_same(whole, split)
    assert all(gradient.abs().max() > 1e-4 for gradient in whole)


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("stream", ["same", "pair", "wrong", "random"])
def test_no_text_makes_it_unstable(chunk_size: int, stream: str) -> None:
    """A change of 1e-9 in the weights stays small on any text, at the largest step there is."""
    torch.manual_seed(3)
    time, dim, vocab = 16 * chunk_size, 16, 50
    linear = LinearHead(torch.randn(vocab, dim, dtype=torch.float64) * 3)
    layer = Adaptation(
        dim, vocab, linear.row_variance(), chunk_size=chunk_size, step=0.999, warm_up=0
    ).double()
    few = {"same": 1, "pair": 2, "wrong": 1, "random": time}[stream]
    hidden = torch.randn(few, dim, dtype=torch.float64).repeat(-(-time // few), 1)[None, :time]
    if stream == "wrong":  # the likeliest word never comes, and two rare ones do in turn
        ids = linear.logits(hidden[0, 0]).argsort()[:2].repeat(time // 2)[None]
    else:
        ids = torch.randint(vocab, (1, few)).repeat(1, -(-time // few))[:, :time]
    if stream == "pair":  # the same two states, their labels swapped in every chunk
        ids = torch.where(torch.arange(time) // chunk_size % 2 == 0, ids, ids.roll(1, 1))
    r = layer.log_ratio.exp().item() / (layer.row_variance * dim)

    def distance(a: AdaptationState, b: AdaptationState) -> float:
        return ((a.weight - b.weight).square().sum() / r + (a.bias - b.bias).square().sum()).sqrt().item()

    state = layer.initial_state(1, dtype=torch.float64)
    moved = replace(
        state,
        weight=1e-9 * torch.randn_like(state.weight),
        bias=1e-9 * torch.randn_like(state.bias),
    )
    with torch.no_grad():
        logits, after, _ = layer(hidden, ids, linear, state)
        _, near, _ = layer(hidden, ids, linear, moved)
    assert logits.isfinite().all()
    assert after.bias.abs().max() > 0.1, "it must have learned"
    assert distance(after, near) <= distance(state, moved) * (1 + 1e-5)
