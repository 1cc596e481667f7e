"""Hope's two parts against their equations, token by token, and with what they read for long."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from titans.nn import BLOCKS, BlockContext, BlockSettings, Caching
from titans.nn.memory.continuum import ContinuumMemory, PeriodicMemory
from titans.nn.memory.self_modifying import SelfModifyingMemory

from ..tolerances import FLOAT64, assert_close
from .memory_oracle import Oracle, output, rms, vectors
from .naive import conv

HIDDEN, HEADS, DIM = 6, 2, 4


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(layer):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def self_modifying_by_the_equations(layer, x):
    """Outputs (time, hidden_size) of one row, and the five memories of each head."""
    projected = F.linear(x, layer.input.weight)
    filtered, _ = conv(projected[:, : 2 * HEADS * DIM], layer.conv.weight, [False] * len(x))
    inputs, queries = F.normalize(F.silu(filtered).view(len(x), 2, HEADS, DIM), dim=-1).unbind(1)
    gates = F.silu(projected[:, 2 * HEADS * DIM :])

    def short(vector):
        return vector * (DIM**0.5 / vector.norm()).clamp(max=1)

    now = [list(layer.initial_weights[h].split(layer.rows)) for h in range(HEADS)]
    outputs = []
    for t in range(len(x)):
        if t % layer.chunk_size == 0:
            anchor = [list(memories) for memories in now]
        answers = []
        for h in range(HEADS):
            of_k, of_v, of_memory, of_eta, of_alpha = anchor[h]
            key, value = F.normalize(of_k @ inputs[t, h], dim=0), short(of_v @ inputs[t, h])
            eta = torch.sigmoid(of_eta @ inputs[t, h] + layer.gate_bias[0, h])
            alpha = torch.exp(-F.softplus(of_alpha @ inputs[t, h] + layer.gate_bias[1, h]))
            answers.append(of_memory @ queries[t, h])
            turn = alpha * torch.eye(DIM, dtype=x.dtype) - eta * torch.outer(key, key)
            for n, start in enumerate(anchor[h]):
                made = short(start @ value)
                now[h][n] = now[h][n] @ turn - eta * torch.outer(start @ key - made, key)
        outputs.append(
            layer.output.weight @ (rms(torch.stack(answers), layer.read_norm).flatten() * gates[t])
        )
    return torch.stack(outputs), torch.stack([torch.cat(memories) for memories in now])


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_self_modification_is_the_equations(chunk_size):
    layer = perturbed(SelfModifyingMemory(HIDDEN, HEADS, DIM, chunk_size, half_lives=(4.0, 40.0)))
    x = tokens(1, 15, HIDDEN).requires_grad_()
    y, state, trace = layer(x, layer.initial_state(1), BlockContext(trace=True))
    expected, memories = self_modifying_by_the_equations(layer, x[0])
    assert_close(y[0], expected, FLOAT64, "outputs")
    assert_close(state.weights[0], memories, FLOAT64, "memories")
    assert (trace.surprise > 0).all() and not trace.momentum.any()
    leaves = [x, *layer.parameters()]
    found, wanted = (
        torch.autograd.grad((each * tokens(*each.shape, seed=3)).sum(), leaves) for each in (y[0], expected)
    )
    for a, b in zip(found, wanted, strict=True):
        assert b.any(), "a parameter is dead"
        assert_close(a, b, FLOAT64, "gradients")
    parts, state = [], layer.initial_state(1)
    for piece in x.split([1, 2, 7, 5], 1):
        part, state, _ = layer(piece, state, BlockContext())
        parts.append(part)
    assert_close(torch.cat(parts, 1), y, FLOAT64, "pieces")


def test_no_text_makes_the_memories_grow_without_bound():
    """A token repeated, two in turn, and noise, with all gates as open as they can be."""
    layer = SelfModifyingMemory(16, 1, 16, 16)
    with torch.no_grad():
        layer.initial_weights.mul_(4)
        layer.gate_bias.copy_(torch.tensor([[20.0], [-40.0]]))
        noise = torch.randn(3, 2048, 16, generator=torch.Generator().manual_seed(0))
        noise[0] = noise[0, 0]
        noise[1] = noise[1, :2].repeat(1024, 1)
        y, state, _ = layer(noise, layer.initial_state(3), BlockContext())
    # The largest value is 4 long.
    assert y.isfinite().all() and state.weights.abs().max() < 100


def continuum_of(**changes):
    options = {"form": {"max_step_size": 0.3}, **changes}

    def make(period):
        return PeriodicMemory(HIDDEN, HEADS, DIM, 2, 2, period, **options)

    return perturbed(ContinuumMemory(HIDDEN, [2, 6], make))


def test_a_continuum_is_the_equations():
    """Each level answers with the weights of before its period, and reads what the one before puts out."""
    chain, x = continuum_of(), tokens(1, 17, HIDDEN).requires_grad_()
    expected = x[0]
    for layer, norm in zip(chain.levels, chain.norms, strict=True):
        memory, outputs, seen = Oracle(layer), [], rms(expected, norm)
        for token, query, key, value, gate in zip(seen, *vectors(layer, seen, [False] * 17), strict=True):
            read = memory.answer(memory.anchor, query)
            memory.write(token, key, value, key)
            outputs.append(output(layer, read, memory.prior(query), gate))
        expected = expected + torch.stack(outputs)
    y, _ = chain(x, chain.initial_state(1), BlockContext())
    assert_close(y[0], expected, FLOAT64, "outputs")
    leaves = [x, *chain.parameters()]
    found, wanted = (
        torch.autograd.grad((each * tokens(*each.shape, seed=3)).sum(), leaves) for each in (y[0], expected)
    )
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, FLOAT64, "gradients")


def test_a_level_changes_its_answers_when_its_period_ends():
    """A token moves what follows in its own place through convolutions alone, until a period ends."""
    chain, x = continuum_of(conv_kernel=1), tokens(1, 12, HIDDEN)
    other = torch.cat([tokens(1, 1, HIDDEN, seed=1), x[:, 1:]], 1)

    def moved():
        both = (chain(each, chain.initial_state(1), BlockContext())[0] for each in (other, x))
        return torch.sub(*both).abs().amax((0, 2))

    assert moved()[0] > 0 and not moved()[1] and (moved()[2:] > 0).all()
    with torch.no_grad():
        # The slow level alone has answers.
        chain.levels[0].output.weight.zero_()
    assert not moved()[1:6].any() and (moved()[6:] > 0).all()


def test_what_hope_has_no_schedule_for_is_refused():
    settings = BlockSettings(6, 2, 4, 4, 5, 4, 2, 3, 2, 2, 1e4, 1e-6)
    for changes in (dict(caching=Caching(4)), dict(local_chunk_sizes=(2,), shard_length=4)):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* with variant='hope'.*give None"):
            BLOCKS["hope"](dataclasses.replace(settings, **changes))
