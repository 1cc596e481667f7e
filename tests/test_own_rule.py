"""A rule of this file, registered from outside, goes everywhere that the package's own rule goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from titans.hf import TitansCache, TitansConfig, TitansForCausalLM
from titans.memory import BACKENDS, UPDATE_RULES, InnerProblem, MemoryState, MomentumRule
from titans.nn import NeuralMemory
from titans.state import map_state
from titans.stream import Session

from .hf.models import assert_near, filled_cache, logits_of, random_ids, small_model
from .memory.problems import Problem, answers, assert_same, everything, make_problem
from .memory.test_conformance import calls, stretches, tame
from .tolerances import FLOAT64, assert_close


@dataclass(frozen=True)
class Averaging(MomentumRule):
    """Where a chunk ends, the average of the weights at all such places pulls at them, and what the chunk has
    changed is bounded; long momentum is shortened. Of its own: the average, and the number of chunks."""

    pull: float = 0.2

    def extra_shapes(self, weight_shapes):
        return (*weight_shapes, ())

    def fresh_extra(self, weights):
        return (*weights, weights[0].new_zeros(weights[0].shape[:-2]))

    def end(self, state):
        *averages, chunks = state.extra
        rate = (1 / (chunks.square() + 2))[..., None, None]
        averages = [a + rate * (w - a) for a, w in zip(averages, state.weights, strict=True)]
        changed = [a + torch.tanh(w - a) for w, a in zip(state.weights, state.anchor, strict=True)]
        pulled = replace(
            state,
            weights=tuple(w + self.pull * (a - w) for w, a in zip(changed, averages, strict=True)),
            momentum=tuple(m / (1 + m.square().sum((-2, -1), keepdim=True)).sqrt() for m in state.momentum),
            extra=(*averages, chunks + 1),
        )
        return super().end(pulled)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(UPDATE_RULES, "averaging", Averaging)
        yield


class Anchored(Problem):
    def scan(self, backend, state=None, cut=slice(None), **changes):
        return super().scan(backend, state, cut, read_anchor=True, **changes)


def problem(anchored=False, **call) -> Problem:
    made = make_problem(rule="averaging", **call)
    return Anchored(**vars(made)) if anchored else made


@settings(max_examples=10)
@given(
    call=calls,
    stretch=stretches,
    cuts=st.lists(st.integers(0, 40), max_size=3),
    anchored=st.booleans(),
    objective=st.sampled_from(["squared_error", "huber"]),
)
def test_any_call_and_split(call, stretch, cuts, anchored, objective):
    assume(call["head_dim"] > 1 or call["row_limit"] is None)
    made = problem(anchored, **call, **stretch, objective=objective)
    expected = everything(made, "reference")
    assume(tame(expected))
    cuts = sorted(min(cut, made.time) for cut in cuts)
    assert_same(everything(made, "chunkwise", cuts), expected, FLOAT64)


RAGGED = dict(mask="random", reset="last", position="apart", time=30, chunk_size=3)


def test_without_autograd_the_values_are_the_same():
    made = problem(**RAGGED)
    recording = answers(*made.require_grad().scan("chunkwise"))
    for name, value in answers(*made.scan("chunkwise")).items():
        assert torch.equal(value, recording[name]), name


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"reference", "chunkwise"}))
def test_other_backends_refuse_it_by_name(backend):
    with pytest.raises(ValueError, match=rf"backend='{backend}' refuses this call: ") as caught:
        problem().scan(backend)
    if backend.startswith("native"):
        assert "update rule MomentumRule, and not Averaging" in str(caught.value)


def test_a_compiled_graph_takes_it(monkeypatch):
    made, taken, operator = problem(**RAGGED), [], torch.ops.titans.scan
    expected = everything(made, "chunkwise")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.ops.titans, "scan", lambda *given: taken.append(given) or operator(*given))
    assert_same(everything(made, "chunkwise"), expected, FLOAT64)
    monkeypatch.undo()
    library.opcheck(operator.default, taken[0], test_utils=("test_schema", "test_faketensor"))


def test_what_it_carries_is_checked():
    made = problem()
    with pytest.raises(ValueError, match=r"state.extra has 0 tensors: the rule carries 3; see InnerProblem"):
        made.scan("chunkwise", replace(made.state, extra=()))
    state = InnerProblem.initial_state(made.inner, made.state.weights)
    assert [x.shape for x in state.extra] == [x.shape for x in made.state.extra]
    assert torch.equal(state.extra[0], state.weights[0])


@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_a_model_reads_generates_saves_and_searches_with_it(variant, tmp_path: Path):
    model = small_model(variant, memory=dict(rule={"name": "averaging", "pull": 0.3}))
    ids = random_ids(2, 20)
    expected = logits_of(model, ids)
    plain = logits_of(small_model(variant), ids)
    assert (expected - plain).abs().max() > 1e-3

    cache = filled_cache(model, ids[:, :11])
    cache.save(tmp_path / "memory")
    loaded = TitansCache.load(tmp_path / "memory", model.config)
    cache.reorder_cache(torch.tensor([1, 0]))
    for held, rows in ((loaded, [0, 1]), (cache, [1, 0])):
        rest = model(ids[rows, 11:], past_key_values=held).logits
        assert_near(rest, expected[rows, 11:])

    options = dict(num_beams=3, do_sample=False, max_new_tokens=7, pad_token_id=0)
    beams = [model.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)

    model.save_pretrained(tmp_path / "model")
    again = TitansForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert torch.equal(logits_of(again, ids), expected)

    session = Session(model)
    session.feed(ids[0, :9].tolist())
    session.save(tmp_path / "session")
    fork = Session.load(tmp_path / "session", model)
    for reader in (session, fork):
        reader.feed(ids[0, 9:].tolist())
    assert session.stats().layers == fork.stats().layers
    assert TitansConfig.from_pretrained(tmp_path / "model").memory.rule == {"name": "averaging", "pull": 0.3}


def test_documents_packed_start_afresh_with_persistent_tokens():
    """A fresh row's own tensors are those that the persistent tokens have left."""
    torch.manual_seed(0)
    layer = NeuralMemory(6, 2, 3, depth=2, chunk_size=2, rule=Averaging()).double()
    persistent, x = torch.randn(5, 6).double(), torch.randn(1, 12, 6).double()
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[:, 7] = True
    packed, after = layer(x, reset=reset, persistent=persistent)
    first, _ = layer(x[:, :7], persistent=persistent)
    second, alone = layer(x[:, 7:], persistent=persistent)
    assert_close(packed, torch.cat([first, second], 1), FLOAT64, "answers")
    for name, a, b in zip("abc", after.memory.extra, alone.memory.extra, strict=True):
        assert_close(a, b, FLOAT64, name)
    assert isinstance(map_state(Tensor.detach, after.memory), MemoryState)
