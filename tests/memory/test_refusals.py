"""What the public calls refuse, in a line with the argument, its value and the remedy, and who runs what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from titans.memory import (
    BACKENDS,
    UPDATE_RULES,
    Backend,
    InnerProblem,
    MemoryNetwork,
    MemoryState,
    MomentumRule,
    Yaad,
    memory_read,
    memory_scan,
)
from titans.memory.reference import reference_scan

from ..tolerances import FLOAT64, assert_close
from .problems import TOKENS, make_problem

PROBLEM = make_problem(time=5, reset="random", initial_momentum=True)
LEAVES, STATE = PROBLEM.leaves, PROBLEM.state
TOKEN_SHAPE = r"\(2, 5, 2, 3\)"


def arguments(**changes: object) -> dict[str, object]:
    given = {name: LEAVES[name] for name in TOKENS}
    given |= dict(state=STATE, chunk_size=4, **PROBLEM.slow, **PROBLEM.flags)
    given |= {name: PROBLEM.layers(name) for name in ("initial", "initial_momentum")}
    return given | changes


def changed(name: str, value: float) -> torch.Tensor:
    tensor = LEAVES[name].clone()
    tensor[0, 1, 0, 1] = value
    return tensor


REFUSED = [
    (dict(queries=torch.zeros(2, 5, 3)), r"queries has shape \(2, 5, 3\): give .*head_dim=3"),
    (dict(queries=torch.zeros(2, 5, 2, 4)), r"queries has shape \(2, 5, 2, 4\): give .*head_dim=3"),
    (dict(queries=torch.zeros(2, 5, 2, 3).long()), r"queries has dtype torch.int64: give a floating"),
    (dict(keys=LEAVES["keys"][:, 1:]), rf"keys has shape \(2, 4, 2, 3\): give {TOKEN_SHAPE}"),
    (dict(keys=LEAVES["keys"] > 0), r"keys has dtype torch.bool: give a floating"),
    (dict(values=LEAVES["values"][:1]), rf"values has shape \(1, 5, 2, 3\): give {TOKEN_SHAPE}"),
    (dict(values=LEAVES["values"].int()), r"values has dtype torch.int32: give a floating"),
    (dict(chunk_size=0), r"chunk_size=0: give a whole number of at least 1"),
    (dict(chunk_size=1.5), r"chunk_size=1.5: give a whole number"),
    (dict(chunk_size=True), r"chunk_size=True: give a whole number"),
    (dict(mask=torch.ones(1, 5).bool()), r"mask has shape \(1, 5\): give \(2, 5\), \(batch, time\)"),
    (dict(mask=torch.ones(2, 5)), r"mask has dtype torch.float32: give torch.bool"),
    (dict(reset=torch.ones(5).bool()), r"reset has shape \(5,\): give \(2, 5\), \(batch, time\)"),
    (dict(reset=torch.ones(2, 5).int()), r"reset has dtype torch.int32: give torch.bool"),
    (dict(forget=torch.zeros(2, 5, 2)), r"forget has shape \(2, 5, 2\): give \(2, 5, 2, 2\)"),
    (dict(momentum=torch.zeros(2, 5, 2, 1)), r"momentum has shape .*: give \(2, 5, 2, 2\)"),
    (dict(step_size=torch.zeros(2, 5, 2, 2).int()), r"step_size has dtype torch.int32: give a fl"),
    (dict(forget=changed("forget", 1.5)), r"forget spans \[.*, 1.5\]: give finite values between 0 and 1"),
    (dict(momentum=changed("momentum", -0.5)), r"momentum spans \[-0.5, .*between 0 and 1"),
    (dict(step_size=changed("step_size", -1)), r"step_size spans \[-1, .*: give finite values at least 0"),
    (dict(step_size=changed("step_size", torch.inf)), r"step_size spans \[.*, inf\]: give finite"),
    (dict(forget=changed("forget", torch.nan)), r"forget holds NaN: give finite values"),
    (dict(initial=None), r"initial=None: with reset, give the weights to start afresh from"),
    (dict(initial=PROBLEM.layers("initial")[:1]), r"initial has 1 tensors: give one for each of the 2"),
    (dict(initial=STATE.weights), r"initial\[0\] has shape .*: give \(2, 12, 3\), \(heads, out, in\)"),
    (dict(initial_momentum=STATE.weights), r"initial_momentum\[0\] has shape .*: give \(2, 12, 3\)"),
    (dict(norm_weight=torch.ones(3)), r"norm_weight has shape \(3,\): give \(2, 3\), \(heads, head_dim\)"),
    (dict(norm_bias=torch.ones(2, 3).long()), r"norm_bias has dtype torch.int64: give a floating"),
    (dict(state=replace(STATE, weights=STATE.weights[:1])), r"state.weights has 1 tensors: give one"),
    (dict(state=MemoryState.initial([w[:1] for w in STATE.weights])), r"state.weights\[0\] has shape \(1, "),
    (dict(state=replace(STATE, momentum=[m.mT for m in STATE.momentum])), r"state.momentum\[0\] has shape"),
    (dict(state=replace(STATE, anchor=[a.int() for a in STATE.anchor])), r"state.anchor\[0\] has dtype"),
    (dict(state=replace(STATE, position=torch.tensor(0))), r"state.position has shape \(\): give \(2,\)"),
    (dict(state=replace(STATE, position=torch.zeros(2))), r"state.position has dtype torch.float32: give t"),
    (
        dict(backend="cuda"),
        r"backend='cuda' is not known here: choose one of \['auto', 'native', 'triton', 'chunk",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_wrong_arguments(changes, sentence):
    memory_scan(PROBLEM.net, **arguments())
    with pytest.raises(ValueError, match=sentence) as caught:
        memory_scan(PROBLEM.net, **arguments(**changes))
    assert "\n" not in str(caught.value)
    if changes.keys() <= {"queries", "state", "norm_weight", "norm_bias"}:
        given = {
            name: arguments(**changes)[name] for name in ("queries", "state", "norm_weight", "norm_bias")
        }
        with pytest.raises(ValueError, match=sentence):
            memory_read(PROBLEM.net, **given)


def test_the_numbers_that_an_objective_takes():
    """They are missing, or are given to one that takes none, or have a wrong shape or value."""
    thresholds = torch.ones(2, 5, 2, 1, dtype=torch.float64)
    yaad = InnerProblem(PROBLEM.net, Yaad())
    memory_scan(yaad, **arguments(objective_inputs=thresholds))
    for inner, given, sentence in (
        (yaad, None, r"objective_inputs=None: Yaad takes 1 for each token, give \(batch, time, heads, 1\)"),
        (PROBLEM.net, thresholds, r"objective_inputs is given, and SquaredError takes none: leave it out"),
        (yaad, thresholds[..., 0], r"objective_inputs has shape \(2, 5, 2\): give \(2, 5, 2, 1\)"),
        (yaad, -thresholds, r"objective_inputs spans \[-1, -1\]: give finite values at least 0"),
        (yaad, thresholds.long(), r"objective_inputs has dtype torch.int64: give a floating"),
    ):
        with pytest.raises(ValueError, match=sentence):
            memory_scan(inner, **arguments(objective_inputs=given))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(rule="moneta"), "it knows the update rule MomentumRule, and not Moneta"),
        (dict(rule="memora"), "it knows the update rule MomentumRule, and not Memora"),
        (dict(objective="yaad"), "it knows the objectives SquaredError, Huber and Lp, and not Yaad"),
        (dict(by_row=True), "it knows one forget gate for each layer, and not one for each row"),
    ],
)
def test_what_kernels_do_not_know_they_name(options, sentence):
    problem = make_problem(time=2, **options)
    assert sentence in str(problem.refused("native"))
    problem.scan("auto")


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (dict(name="moneta", q=1.5), "q=1.5: give a finite number of at least 2"),
        (dict(name="moneta", floor=-1.0), "floor=-1.0: give a finite number of at least 0"),
        (dict(name="moneta", floor=0.0, normalize_step=True), "floor=0 with normalize_step=True: no step is"),
        (dict(name="memora", mass=0.0), "mass=0.0: give a finite number above 0"),
    ],
)
def test_wrong_rules(rule, sentence):
    with pytest.raises(ValueError, match=sentence):
        UPDATE_RULES.make(rule)


def test_gain_without_norm():
    net = replace(PROBLEM.net, norm=False)
    with pytest.raises(ValueError, match="norm_bias is given but the network has norm=False: leave it out"):
        memory_scan(net, **arguments(norm_weight=None))


def test_gates_behind_the_mask_may_be_anything():
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = False
    memory_scan(PROBLEM.net, **arguments(forget=changed("forget", torch.nan), mask=mask))


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        (dict(head_dim=0), "head_dim=0: give a whole number of at least 1"),
        (dict(depth=2.0), "depth=2.0: give a whole number"),
        (dict(expansion=-1), "expansion=-1: give a whole number"),
        (dict(activation="relu"), r"activation='relu': choose one of \['gelu', 'silu', 'sin'\]"),
        (dict(key_dim=0), "key_dim=0: give a whole number of at least 1"),
        (dict(key_dim=32, residual=True), "key_dim=32 with head_dim=64: a residual adds the key"),
    ],
)
def test_wrong_networks(field, sentence):
    with pytest.raises(ValueError, match=sentence):
        MemoryNetwork(**field)


def test_auto_passes_over_a_backend_that_refuses(monkeypatch):
    ran = []

    def scan(problem):
        ran.append(problem.chunk_size)
        return reference_scan(problem)

    picky = Backend(scan, lambda problem: "it wants chunks of 8" if problem.chunk_size != 8 else None)
    others = dict(BACKENDS)
    monkeypatch.setitem(BACKENDS, "picky", picky)
    for name in others:  # to the end of the line: "auto" tries them in order
        BACKENDS[name] = BACKENDS.pop(name)
    assert next(iter(BACKENDS)) == "picky"

    memory_scan(PROBLEM.net, **arguments(chunk_size=4, backend="auto"))
    assert ran == []
    with pytest.raises(ValueError, match="backend='picky' refuses this call: it wants chunks of 8"):
        memory_scan(PROBLEM.net, **arguments(chunk_size=4, backend="picky"))
    memory_scan(PROBLEM.net, **arguments(chunk_size=8, backend="auto"))
    memory_scan(PROBLEM.net, **arguments(chunk_size=8, backend="picky"))
    assert ran == [8, 8]


@pytest.mark.parametrize("name", ["keys", "forget"])
def test_function_transforms(name):
    """torch.func does not pass through the chunkwise backward: by name refused, "auto" takes the oracle."""
    given = LEAVES[name]

    def loss(leaf, backend):
        return PROBLEM.change(**{name: leaf}).scan(backend)[0].square().sum()

    leaf = given.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, "chunkwise"), leaf)
    assert_close(torch.func.grad(loss)(given, "auto"), expected, FLOAT64, "func.grad")
    several = torch.stack([given, given / 2])
    mapped = torch.func.vmap(lambda x: loss(x, "auto"))(several)
    assert_close(mapped, torch.stack([loss(x, "chunkwise") for x in several]), FLOAT64, "vmap")
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(ValueError, match=r"backend='chunkwise' refuses this call: .*torch.func"):
            transform(lambda x: loss(x, "chunkwise"))(several[0] if transform is torch.func.grad else several)


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda state: None, TypeError, r"Wrong.end returned None: return a MemoryState"),
        (
            lambda state: replace(state, momentum=state.momentum[:1]),
            ValueError,
            r"Wrong.end returned state.momentum of shapes \[.*\]: return \[.*\], as given",
        ),
    ],
)
def test_a_rule_that_ends_a_chunk_with_another_state_is_named(backend, returned, error, message):
    class Wrong(MomentumRule):
        def end(self, state):
            return returned(state)

    problem = make_problem()
    problem = replace(problem, inner=InnerProblem(problem.net, rule=Wrong()))
    with pytest.raises(error, match=message):
        problem.scan(backend)


def test_a_rule_overrides_step_and_coefficients_together():
    with pytest.raises(TypeError, match="Half defines one of step and coefficients: define both"):

        class Half(MomentumRule):
            def coefficients(self, forget, momentum, step_size, written): ...


def test_an_inner_problem_is_made_of_objects():
    with pytest.raises(ValueError, match="rule='momentum': give an object, such as"):
        InnerProblem(MemoryNetwork(), rule="momentum")
