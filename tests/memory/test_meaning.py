"""What the memory does, in small cases that can be followed by hand. Every backend must agree with each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titans.memory import BACKENDS, MemoryNetwork, MemoryState, memory_read, memory_scan

from ..tolerances import FLOAT64, assert_close
from .problems import Problem, make_problem

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
LINEAR = dict(depth=1, residual=False, norm=False)


def with_gates(problem: Problem, **gates: float) -> Problem:
    """The problem with these gates held at one value."""
    return problem.change(**{name: torch.full_like(problem.leaves[name], x) for name, x in gates.items()})


def close_state(actual: MemoryState, expected: MemoryState) -> None:
    for part in ("weights", "momentum"):
        for a, b in zip(getattr(actual, part), getattr(expected, part), strict=True):
            assert_close(a, b, FLOAT64, part)


@pytest.mark.parametrize("depth", [1, 2])
def test_forget_1_and_momentum_0_wipe_the_past(backend, depth):
    """Only the last token is left: W = S = −theta u."""
    problem = with_gates(make_problem(depth=depth, time=9, chunk_size=16), forget=1.0, momentum=0.0)
    _, state, _ = problem.scan(backend)
    for weight, momentum in zip(state.weights, state.momentum, strict=True):
        assert torch.equal(weight, momentum)
    # In one chunk all gradients are taken at the anchor, so nothing else of the past comes in.
    other = make_problem(depth=depth, time=9, chunk_size=16, seed=1)
    tokens = {
        name: torch.cat([other.leaves[name][:, :-1], problem.leaves[name][:, -1:]], 1)
        for name in ("queries", "keys", "values", "step_size")
    }
    past = {
        f"state.{part}.{i}": other.leaves[f"state.{part}.{i}"]
        for part in ("weights", "momentum")
        for i in range(depth)
    }
    _, same, _ = problem.change(**tokens, **past).scan(backend)
    close_state(same, state)


@pytest.mark.parametrize("norm", [False, True])
def test_momentum_0_is_gradient_descent(backend, norm):
    """One token a chunk, nothing forgotten: torch's own SGD on the same losses, token after token."""
    problem = make_problem(batch=1, heads=1, depth=2, time=8, chunk_size=1, norm=norm)
    problem = with_gates(problem, momentum=0.0, forget=0.0, step_size=0.05)
    net, leaves = problem.net, problem.leaves
    slow = (leaves.get("norm_weight"), leaves.get("norm_bias"))
    weights = [w[0, 0].clone().requires_grad_() for w in problem.state.weights]
    sgd = torch.optim.SGD(weights, lr=0.05)
    for key, value in zip(leaves["keys"][0], leaves["values"][0], strict=True):
        sgd.zero_grad()
        (net(weights, key, *slow) - value).square().sum().backward()
        sgd.step()
    _, state, _ = problem.scan(backend)
    for ours, torchs in zip(state.weights, weights, strict=True):
        assert_close(ours[0, 0], torchs.detach(), FLOAT64, "weights")


def test_step_0_and_momentum_0_only_decay(backend):
    problem = with_gates(make_problem(time=11), momentum=0.0, step_size=0.0)
    _, state, _ = problem.scan(backend)
    for layer, weight in enumerate(state.weights):
        kept = (1 - problem.leaves["forget"][..., layer]).prod(1)[..., None, None]
        assert_close(weight, kept * problem.state.weights[layer], FLOAT64, "weights")
        assert (state.momentum[layer] == 0).all()


def test_gates_all_0_coast_on_nothing(backend):
    """No momentum is kept and nothing is written: the memory stays what it was."""
    problem = with_gates(make_problem(time=11), forget=0.0, momentum=0.0, step_size=0.0)
    _, state, _ = problem.scan(backend)
    for before, after in zip(problem.state.weights, state.weights, strict=True):
        assert torch.equal(before, after)


def test_momentum_1_coasts(backend):
    """Nothing written, nothing lost: every token adds the same momentum once more."""
    problem = with_gates(make_problem(time=10), forget=0.0, momentum=1.0, step_size=0.0)
    _, state, _ = problem.scan(backend)
    for layer, weight in enumerate(state.weights):
        expected = problem.state.weights[layer] + 10 * problem.state.momentum[layer]
        assert_close(weight, expected, FLOAT64, "weights")


def test_one_token_a_chunk_is_the_delta_rule(backend):
    """S ← eta S − 2 theta (W k − v) kᵀ; W ← (1 − alpha) W + S; y = W q."""
    problem = make_problem(time=12, chunk_size=1, **LINEAR)
    leaves = problem.leaves
    weight, momentum = problem.state.weights[0], problem.state.momentum[0]
    expected = []
    for t in range(problem.time):
        query, key, value = (leaves[name][:, t].unsqueeze(-1) for name in ("queries", "keys", "values"))
        alpha, eta, theta = (leaves[name][:, t].unsqueeze(-1) for name in ("forget", "momentum", "step_size"))
        momentum = eta * momentum - 2 * theta * (weight @ key - value) @ key.mT
        weight = (1 - alpha) * weight + momentum
        expected.append((weight @ query).squeeze(-1))
    reads, state, _ = problem.scan(backend)
    assert_close(reads, torch.stack(expected, 1), FLOAT64, "reads")
    assert_close(state.weights[0], weight, FLOAT64, "weights")


def test_one_chunk_from_nothing_is_linear_attention(backend):
    """W_0 = 0, one chunk, no gates: W_t = 2 theta Σ v_j k_jᵀ, so y_t = 2 theta Σ_{j≤t} (q_t · k_j) v_j."""
    problem = make_problem(time=12, chunk_size=12, **LINEAR)
    problem = with_gates(problem, forget=0.0, momentum=0.0, step_size=0.5)
    nothing = MemoryState.initial(tuple(map(torch.zeros_like, problem.state.weights)))
    reads, _, _ = problem.scan(backend, nothing)
    queries, keys, values = (problem.leaves[name].transpose(1, 2) for name in ("queries", "keys", "values"))
    expected = ((queries @ keys.mT).tril() @ values).transpose(1, 2)
    assert_close(reads, expected, FLOAT64, "reads")


def test_what_is_written_is_read_back(backend):
    """Orthonormal keys, theta one half: after one pass every key gives its value."""
    size = 4
    net = MemoryNetwork(head_dim=size, **LINEAR)
    keys = torch.eye(size, dtype=torch.float64).view(1, size, 1, size)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    none = torch.zeros(1, size, 1, 1)
    state = MemoryState.initial((torch.ones(1, 1, size, size, dtype=torch.float64),))
    reads, state, surprise = memory_scan(
        net,
        keys,
        keys,
        values,
        none,
        none,
        none + 0.5,
        state,
        chunk_size=1,
        backend=backend,
        return_surprise=True,
    )
    assert_close(reads, values, FLOAT64, "reads at once")
    assert_close(memory_read(net, keys, state), values, FLOAT64, "reads afterwards")
    assert_close(surprise, (1 - values).square().sum(-1), FLOAT64, "surprise")


@pytest.mark.parametrize("row_limit", [None, 0.7])
def test_surprise_is_the_loss_before_the_chunk(backend, row_limit):
    """‖M(k; W') − v‖² with the weights the chunk started from, and outside the graph."""
    problem = make_problem(time=8, chunk_size=4, row_limit=row_limit).require_grad()
    _, state, surprise = problem.scan(backend)
    _, halfway, _ = problem.scan(backend, cut=slice(0, 4))
    assert not surprise.requires_grad
    for start, tokens in ((problem.state, slice(0, 4)), (halfway, slice(4, 8))):
        answers = memory_read(problem.net, problem.leaves["keys"][:, tokens], start, **problem.slow)
        expected = (answers - problem.leaves["values"][:, tokens]).square().sum(-1)
        assert_close(surprise[:, tokens], expected, FLOAT64, "surprise")


@pytest.mark.parametrize("time", [6, 8])
def test_reading_asks_the_network_that_was_written(backend, time):
    """A query repeated after the scan gets the answer of the last token."""
    problem = make_problem(time=time, position="apart", chunk_size=4)
    reads, state, _ = problem.scan(backend)
    again = memory_read(problem.net, problem.leaves["queries"][:, -1:], state, **problem.slow)
    assert_close(again, reads[:, -1:], FLOAT64, "read")
    # The whole network of the contract, once more by hand, with the weights of one row and head.
    hidden: Tensor = problem.leaves["queries"][1, -1, 0]
    first, last = (w[1, 0] for w in state.weights)
    out = last @ torch.nn.functional.gelu(first @ hidden)
    out = (out - out.mean()) / (out.var(correction=0) + 1e-5).sqrt()
    out = out * problem.slow["norm_weight"][0] + problem.slow["norm_bias"][0] + hidden
    assert_close(again[1, 0, 0], out, FLOAT64, "read by hand")


@pytest.mark.parametrize("norm", [False, True])
def test_normalized_steps_never_overshoot(backend, norm):
    """With `normalize_step` a step size of 1 is still safe: one step on one token lowers its loss."""
    problem = make_problem(time=1, chunk_size=1, batch=3, depth=3, head_dim=5, norm=norm, normalize_step=True)
    problem = with_gates(problem, forget=0.0, momentum=0.0, step_size=1.0)
    # Large weights above a layer make its curvature large too.
    large = {name: 8 * x for name, x in problem.leaves.items() if name.startswith(("state.w", "state.a"))}
    problem = problem.change(**large)
    _, state, surprise = problem.scan(backend)
    _, _, after = problem.scan(backend, state)
    assert (after < surprise).all()


@pytest.mark.parametrize("norm", [False, True])
def test_a_row_limit_bounds_the_weights(backend, norm):
    problem = make_problem(time=12, chunk_size=4, norm=norm, row_limit=0.7)
    _, state, _ = problem.scan(backend)
    for weight in state.weights:
        lengths = weight.norm(dim=-1)
        assert (lengths <= 0.7 + 1e-12).all() and (lengths < 0.7 - 1e-12).any()
