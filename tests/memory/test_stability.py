"""The default memory is stable at the limits of its gates, on streams made to break it; others are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from titans.evaluate.hostile import PAPER_FORM, hostile_cases, stressed_memory
from titans.evaluate.stress import key_gradients, perturbation_growth, search_growth, state_bound
from titans.memory import Huber, Lp, SquaredError, Yaad
from titans.nn import NeuralMemory

GROWTH_LIMIT = 100
WORST_GATES = [("all at max", "0"), ("all at max", "1 as a chunk starts"), ("switching", "0.001")]


@pytest.mark.parametrize(
    ("depth", "chunk_size", "last", "objective"),
    [
        (1, 1, 0.0, SquaredError()),
        (2, 4, 0.0, SquaredError()),
        (2, 16, 1.0, SquaredError()),
        (3, 16, 0.0, SquaredError()),
        (2, 16, 1.0, Huber(0.3)),
        (1, 1, 0.0, Lp(3.0)),
        (2, 16, 1.0, Lp(4.0)),
        (2, 16, 1.0, Yaad()),
    ],
)
def test_small_changes_stay_small_and_the_state_bounded(depth, chunk_size, last, objective):
    memory = stressed_memory(8, depth, chunk_size, last=last)
    memory = replace(memory, inner=replace(memory.inner, objective=objective))
    tokens = 2048 if objective == SquaredError() else 1024
    growth = perturbation_growth(memory, hostile_cases(memory, tokens, gates=WORST_GATES))
    assert growth.weights.max() < GROWTH_LIMIT
    assert growth.first_key.max() < GROWTH_LIMIT
    bound = state_bound(memory)
    assert (growth.longest_weights.amax(0) <= torch.tensor(bound.weights)).all()
    assert (growth.longest_momentum.amax(0) <= torch.tensor(bound.momentum)).all()
    # Had nothing been written, this would prove nothing.
    assert growth.longest_weights[:, -1].max() > 1


@pytest.mark.parametrize(
    ("features", "chunk_size"), [("sin", 1), ("sin", 16), ("product", 16), ("swiglu", 16)]
)
def test_memories_of_features_are_as_stable_as_linear_ones(features, chunk_size):
    """On keys that go through the map, and on any features no longer than 1."""
    through_map = stressed_memory(8, 1, chunk_size, features=features, feature_size=32)
    on_features = replace(through_map, features=None)
    for memory in (through_map, on_features) if features == "sin" else (through_map,):
        cases = hostile_cases(memory, 1024, gates=WORST_GATES)
        assert cases.keys.shape[-1] == (32 if memory is on_features else 8)
        growth = perturbation_growth(memory, cases)
        # Linear in what it learns: no difference of weights grows. A key's does, by the slope of the map.
        assert growth.weights.max() <= 1
        assert growth.first_key.max() < GROWTH_LIMIT
        bound = state_bound(memory)
        assert (growth.longest_weights.amax(0) <= torch.tensor(bound.weights)).all()
        assert (growth.longest_momentum.amax(0) <= torch.tensor(bound.momentum)).all()
        assert growth.longest_weights.max() > 1


def test_the_bound_needs_short_features_to_count_as_one_long():
    def longest(floor):
        options = dict(features="sin", feature_size=32, length_floor=floor)
        memory = replace(stressed_memory(8, 1, 16, **options), features=None)
        growth = perturbation_growth(memory, hostile_cases(memory, 512, gates=[("all at max", "0")]))
        return memory, float(growth.longest_weights.max())

    memory, bounded = longest(1.0)
    (bound,) = state_bound(memory).weights
    assert bounded <= bound < longest(0.0)[1]


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_of_far_keys_do_not_grow(depth):
    memory = stressed_memory(8, depth, 16)
    cases = hostile_cases(memory, 1040, gates=[("all at max", "0"), ("switching", "0.001")])
    lengths, finite = key_gradients(memory, cases, (256, 1024))
    near, far = lengths.amax(0)
    assert finite and near > 0 and far < 2 * near


@pytest.mark.parametrize(
    "options",
    [
        dict(max_step_size=8 * 0.5 / 16),
        PAPER_FORM | dict(norm=True, residual=True, gain=1.0, max_momentum=0.9, max_step_size=0.1 / 16),
    ],
    ids=["steps of 8 in normalised units", "the paper's equations with residual and LayerNorm"],
)
def test_unstable_memories_fail_the_same_checks(options):
    memory = stressed_memory(8, 2, 16, **options)
    gates = [("all at max", "0.05")]
    growth = perturbation_growth(memory, hostile_cases(memory, 4096, gates=gates))
    assert growth.weights.max() > 1e6 and growth.first_key.max() > 1e6
    lengths, _ = key_gradients(memory, hostile_cases(memory, 2064, gates=gates), (256, 2048))
    assert lengths[:, 1].max() > 100 * lengths[:, 0].max()


@pytest.mark.parametrize(("eta", "fraction"), [(0.95, 1), (0.97, 0.5), (0.99, 0.5)])
def test_the_simple_rule_for_the_step_fails_on_two_alternating_keys(eta, fraction):
    """theta = (1 − eta) / chunk_size, or half of it: stable for one key, a swing for two."""
    memory = stressed_memory(4, 1, 4, **PAPER_FORM, max_momentum=eta, max_step_size=fraction * (1 - eta) / 4)
    cases = hostile_cases(memory, 4096, gates=[("all at max", "0")], periods=(14, 26, 44))
    growth = perturbation_growth(memory, cases).weights
    assert growth[cases.names.index("constant; gates: all at max; forget: 0")] < 1.01
    worst = int(growth.argmax())
    assert growth[worst] > 1e8 and cases.names[worst].startswith("orthogonal keys")


def test_the_bound_holds_against_a_search_and_no_form_without_one_gets_it():
    memory = stressed_memory(4, 2, 4, seed=1)
    growth, worst = search_growth(memory, 64, 25, 8)
    assert growth > 1.5
    found = perturbation_growth(memory, worst.repeated(1024))
    bound = state_bound(memory)
    assert (found.longest_weights[0] <= torch.tensor(bound.weights)).all()
    assert (found.longest_momentum[0] <= torch.tensor(bound.momentum)).all()
    for options in (
        PAPER_FORM,
        dict(length_floor=0.0),
        dict(residual=True),
        dict(row_limit=None),
        dict(norm=True),
    ):
        with pytest.raises(ValueError, match="no bound is known"):
            state_bound(stressed_memory(4, 2, 4, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_takes_inputs_of_any_size(dtype, norm):
    """Forward, backward and state; with a LayerNorm the memory's answer starts at 0, where that is steep."""
    torch.manual_seed(0)
    layer = NeuralMemory(16, 2, 8, depth=2, form=dict(norm=norm)).to(dtype)
    x = torch.randn(1, 160, 16)
    for scale in (0.0, 1e-4, 1e-2, 1.0, 1e2, 1e4):
        layer.zero_grad()
        leaf = (scale * x).to(dtype).requires_grad_()
        y, state = layer(leaf)
        y.float().square().sum().backward()
        everything = [y, leaf.grad, *(p.grad for p in layer.parameters())]
        assert all(t is not None and t.isfinite().all() for t in everything)
        for weight in state.memory.weights:
            assert weight.norm(dim=-1).max() <= 8 * (1 + 1e-5)
        assert all(s.isfinite().all() for s in state.memory.momentum)
