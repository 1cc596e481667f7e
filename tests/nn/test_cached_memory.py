"""A memory with checkpoints against its equations, token by token, and however a text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from titans.nn import BlockSettings, CachedMemory, Caching, NeuralMemory
from titans.state import state_nbytes

from ..tolerances import FLOAT64, assert_close
from .memory_oracle import Oracle, output, vectors

HIDDEN, HEADS, DIM = 6, 2, 4
FORMS = {
    "linear, log": dict(depth=1, caching=dict(every=4)),
    "two layers, linear": dict(caching=dict(every=6, keep="linear"), form=dict(gates_see_keys=True)),
    "the paper's form, log": dict(
        chunk_size=3, caching=dict(every=3), form=dict(name="paper", max_momentum=0.5, max_step_size=0.01)
    ),
    "features, linear": dict(
        depth=1, features="sin", feature_size=7, caching=dict(every=4, keep="linear"), conv_kernel=1
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def layer_of(form, seed=0):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        sizes = {"depth": 2, "expansion": 2, "chunk_size": 2, **form}
        layer = CachedMemory(HIDDEN, HEADS, DIM, **sizes).double()
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_of(keep, n):
    """The numbers, from 1, of the checkpoints that are kept after n segments."""
    if keep == "linear":
        return list(range(1, n + 1))
    found = {}
    for number in range(1, n + 1):
        power = 1
        while number % (2 * power) == 0:
            power *= 2
        found[power] = number
    return list(found.values())


def by_the_equations(layer, x, persistent):
    """Outputs of one row (time, hidden_size), and (weights, mean key) of every checkpoint by its number."""
    memory, checkpoints, segment, outputs = Oracle(layer), {}, [], []

    def features(vector):
        return layer.feature_map(vector[None, None])[0, 0]

    for token, _, key, value, _ in zip(
        persistent, *vectors(layer, persistent, [False] * len(persistent)), strict=True
    ):
        memory.write(token, features(key), value, key)
    memory.anchor, memory.count = memory.weights, 0
    for token, query, key, value, gate in zip(x, *vectors(layer, x, [False] * len(x)), strict=True):
        memory.write(token, features(key), value, key)
        segment.append(key)
        known = [(memory.weights, sum(segment) / len(segment))]
        known += [checkpoints[i] for i in kept_of(layer.caching.keep, len(checkpoints))]
        u = (layer.connector.weight @ token).view(HEADS, DIM)
        gamma = torch.stack([(u * mean).sum(-1) for _, mean in known]).softmax(0)
        answers = [memory.answer(weights, features(query)) for weights, _ in known]
        read = sum(g[:, None] * answer for g, answer in zip(gamma, answers, strict=True))
        outputs.append(output(layer, read, memory.prior(features(query)), gate))
        if len(segment) == layer.caching.every:
            checkpoints[len(checkpoints) + 1] = memory.weights, sum(segment) / len(segment)
            segment = []
    return torch.stack(outputs), checkpoints


@every_form
def test_it_is_the_equations_token_by_token(form):
    """Outputs, checkpoints and all gradients, of whole rows and of rows with masked tokens."""
    layer, x, persistent = layer_of(form), tokens(2, 21, HIDDEN), tokens(2, HIDDEN, seed=5)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert "connector.weight" in names

    def gradients(rows):
        return torch.autograd.grad(sum((y * tokens(*y.shape, seed=3)).sum() for y in rows), parameters)

    everywhere = torch.ones(2, 21, dtype=torch.bool)
    some = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.9], [0.6]])
    for mask in (everywhere, some) if layer.caching.keep == "log" else (some,):
        given_mask = None if mask is everywhere else mask
        y, state = layer(x.masked_fill(~mask[..., None], torch.nan), mask=given_mask, persistent=persistent)
        expected = [by_the_equations(layer, x[b, mask[b]], persistent) for b in range(2)]
        for row, (outputs, checkpoints) in enumerate(expected):
            assert_close(y[row, mask[row]], outputs, FLOAT64, "outputs")
            found = state.checkpoints
            assert found.taken[row] == len(checkpoints)
            kept = kept_of(layer.caching.keep, len(checkpoints))
            assert (found.tokens[row] > 0).sum() == len(kept)
            for number in kept:
                slot = layer.caching.slot(torch.tensor([number]))
                assert_close(found.means[row, slot][0], checkpoints[number][1], FLOAT64, "mean keys")
                for a, b in zip(found.weights, checkpoints[number][0], strict=True):
                    assert_close(a[row, slot][0], b, FLOAT64, "weights of a checkpoint")
        ours = gradients([y[row, mask[row]] for row in range(2)])
        for name, a, b in zip(names, ours, gradients([each[0] for each in expected]), strict=True):
            assert_close(a, b, FLOAT64, f"gradient of {name}")


flags = st.lists(st.lists(st.booleans(), min_size=17, max_size=17), min_size=2, max_size=2)


@pytest.mark.parametrize("form", [FORMS["linear, log"], FORMS["features, linear"]], ids=["log", "linear"])
@settings(max_examples=3)
@given(mask=flags, reset=flags, cuts=st.lists(st.integers(0, 17), max_size=4), seed=st.integers(0, 99))
def test_any_split_with_masks_and_resets_is_one_call(form, mask, reset, cuts, seed):
    """And one call is every row's stretches between resets, alone, without their masked tokens."""
    layer, x = layer_of(form), tokens(2, 17, HIDDEN, seed=seed)
    mask, persistent = torch.tensor(mask), tokens(2, HIDDEN, seed=5)
    reset = torch.tensor(reset) & (torch.rand(2, 17, generator=torch.Generator().manual_seed(seed)) < 0.2)
    x = x.masked_fill(~mask[..., None], torch.nan)
    whole, _ = layer(x, mask=mask, reset=reset, persistent=persistent)
    assert whole.isfinite().all() and not whole[~mask].any()
    parts, running = [], None
    for begin, end in pairwise([0, *sorted(cuts), 17]):
        cut = slice(begin, end)
        y, running = layer(x[:, cut], running, mask[:, cut], reset[:, cut], persistent=persistent)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, FLOAT64, "outputs")
    for row in range(2):
        begins = [0, *reset[row].nonzero().flatten().tolist()]
        for begin, end in zip(begins, [*begins[1:], 17], strict=True):
            real = mask[row, begin:end]
            alone, last = layer(x[row, begin:end][real][None], persistent=persistent)
            assert_close(whole[row, begin:end][real], alone[0], FLOAT64, "row alone")
        held = pytree.tree_map(lambda leaf, row=row: leaf[row : row + 1], running).checkpoints.trimmed()
        for a, b in zip(*map(pytree.tree_leaves, (held, last.checkpoints)), strict=True):
            assert_close(a.double(), b.double(), FLOAT64, "checkpoints")


@every_form
def test_no_token_reaches_back_and_each_reaches_on(form):
    layer, x = layer_of(form), tokens(1, 20, HIDDEN)
    before, _ = layer(x)
    for t in range(0, 20, 3):
        other = x.clone()
        other[:, t] = tokens(HIDDEN, seed=t + 1)
        after, _ = layer(other)
        assert torch.equal(after[:, :t], before[:, :t]) and (after[:, t:] - before[:, t:]).abs().amin() > 0


def test_gradients_are_those_of_finite_differences():
    layer = layer_of(FORMS["linear, log"])
    x = tokens(1, 9, HIDDEN).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,), fast_mode=True)


def test_before_its_first_checkpoint_it_is_a_plain_memory():
    layer, x = layer_of(FORMS["linear, log"]), tokens(2, 12, HIDDEN)
    plain = NeuralMemory(HIDDEN, HEADS, DIM, 1, 2, 2).double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("connector")})
    ours, expected = layer(x)[0], plain(x)[0]
    assert torch.equal(ours[:, :4], expected[:, :4]) and (ours[:, 4:] - expected[:, 4:]).abs().max() > 1e-3


def test_the_state_grows_as_the_setting_says():
    """And for each j a kept checkpoint is fewer than 2^(j + 1) segments old."""
    layer, sizes = layer_of(FORMS["linear, log"]), []
    _, state = layer(tokens(1, 4 * 13, HIDDEN))
    for n in (1, 2, 4, 8, 13):
        kept = kept_of("log", n)
        assert len(kept) == n.bit_length()
        assert all(any(0 <= n - number < 2 ** (j + 1) for number in kept) for j in range(n.bit_length()))
        sizes.append(state_nbytes(layer(tokens(1, 4 * n, HIDDEN))[1].checkpoints))
    # 8 heads · weights and means, 8 for the tokens of a segment.
    each = 8 * HEADS * (DIM * DIM + DIM) + 8
    assert sizes == [sizes[0] + (n.bit_length() - 1) * each for n in (1, 2, 4, 8, 13)]
    assert state.checkpoints.tokens.tolist() == [[4] * 4]


@pytest.mark.parametrize("length", [10, 12])
def test_a_fresh_context_keeps_checkpoints_and_closes_a_segment(length):
    layer, x = layer_of(FORMS["linear, log"]), tokens(1, 9, HIDDEN, seed=4)
    _, state = layer(tokens(1, length, HIDDEN))
    fresh = layer.fresh_context(state)
    found = fresh.checkpoints
    assert found.taken == 3 and found.tokens.tolist() == [[length - 8, 4]] and not found.key_sum.any()
    assert not fresh.memory.position.any()
    if length == 10:
        assert torch.equal(found.weights[0][:, 0], fresh.memory.weights[0])
    whole = layer(x, fresh)[0]
    first, running = layer(x[:, :3], fresh)
    assert_close(torch.cat([first, layer(x[:, 3:], running)[0]], 1), whole, FLOAT64, "outputs")


@pytest.mark.parametrize(
    ("caching", "message"),
    [
        ({"every": 0}, "caching.every=0: give a whole number of at least 1"),
        ({"every": 5}, "caching.every=5 with chunk_size=2: .* give a multiple of 2"),
        ({"every": 4, "keep": "all"}, r"caching.keep='all': choose one of \['log', 'linear'\]"),
        ({"keep": "log"}, "caching={'keep': 'log'}: give {'every': 512"),
        ({"every": 4, "size": 1}, "caching={'every': 4, 'size': 1}: give"),
        (512, "caching=512: give"),
    ],
)
def test_a_wrong_setting_is_named(caching, message):
    with pytest.raises(ValueError, match=message):
        CachedMemory(HIDDEN, HEADS, DIM, chunk_size=2, caching=caching)
    with pytest.raises(ValueError, match=r"caching with local_chunk_sizes=\[2\]: .* one of the two"):
        BlockSettings(6, 2, 4, 4, 5, 4, 2, 3, 2, 2, 1e4, 1e-6, local_chunk_sizes=(2,), shard_length=4,
                      caching=Caching(4)).memory()  # fmt: skip
