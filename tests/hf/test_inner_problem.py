"""Objectives, update rules and features through whole models: by name and parameters, one of them from
outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from titans.hf import TitansCache, TitansForCausalLM
from titans.memory import UPDATE_RULES, MemoryState, UpdateRule
from titans.nn.memory.learner import Learner

from .models import SAME, assert_near, filled_cache, logits_of, random_ids, small_config, small_model


@dataclass(frozen=True)
class Averaged(UpdateRule):
    """At each chunk's end the weights are drawn towards their mean over the chunks so far.

    The rule carries that mean, of each matrix, and how many chunks it is of.
    """

    pull: float = 0.5

    def extra_shapes(self, weight_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
        return (*weight_shapes, (1, 1))

    def end(self, state: MemoryState) -> MemoryState:
        *means, chunks = state.extra
        means = [m + (w - m) / (chunks + 1) for m, w in zip(means, state.weights, strict=True)]
        weights = tuple(w + self.pull * (m - w) for m, w in zip(means, state.weights, strict=True))
        return replace(state, weights=weights, extra=(*means, chunks + 1))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    UPDATE_RULES["averaged"] = Averaged
    yield
    del UPDATE_RULES["averaged"]


PARTS = {
    "huber": {"objective": {"name": "huber", "delta": 0.3}},
    "l_p": {"objective": {"name": "lp", "p": 3.0}},
    "a rule of its own": {"rule": {"name": "averaged", "pull": 0.3}},
    "sin features": {"features": "sin", "feature_size": 6},
    "sharp product features": {"features": "product", "start": "sharp"},
}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


@every_part
@pytest.mark.parametrize("variant", ["mac", "mal"])
@torch.no_grad()
def test_a_model_reads_saves_loads_and_searches(part, variant, tmp_path):
    depth = dict(memory_depth=1 if "features" in part else 2)
    model, ids = small_model(variant, memory=part, **depth), random_ids(2, 20)
    whole = logits_of(model, ids)
    assert (whole - logits_of(small_model(variant, **depth), ids)).abs().max() > 1e-6, "it changes nothing"
    cache = filled_cache(model, ids[:, :8])
    assert_near(model(ids[:, 8:], past_key_values=cache.clone()).logits, whole[:, 8:])

    model.save_pretrained(tmp_path)
    again = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    kept = {name: getattr(again.config.memory, name) for name in part}
    assert kept == part and torch.equal(logits_of(again, ids), whole)

    cache.save(tmp_path / "memory")
    loaded = TitansCache.load(tmp_path / "memory", again.config)
    following = [model(ids[:, 8:], past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*following)
    with pytest.raises(ValueError, match=rf"was written with memory.{next(iter(part))}(.name)?="):
        TitansCache.load(tmp_path / "memory", small_config(variant, **depth))

    beams = dict(num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0)
    found = [model.generate(ids[:, :11], use_cache=cached, **beams) for cached in (True, False)]
    assert torch.equal(*found) and found[0].shape == (2, 17)


@every_part
def test_a_model_trains_alike_on_every_backend(part):
    """Its loss falls, and its gradients are those of the reference."""
    torch.manual_seed(0)
    depth = 1 if "features" in part else 2
    config = small_config("lmm", memory=part, memory_depth=depth, num_hidden_layers=1)
    model = TitansForCausalLM(config).double()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    begins = torch.randint(9, (20, 4, 1), generator=torch.Generator().manual_seed(0))
    losses = []
    for begin in begins:
        ids = (begin + torch.arange(18)) % 9
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    gradients = []
    for backend in ("reference", "chunkwise"):
        for module in model.modules():
            if isinstance(module, Learner):
                module.backend = backend
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_near(b, a, SAME)


def test_a_feature_size_that_is_left_open_is_the_one_it_stands_for(tmp_path):
    """A memory file of a model without the size is one of a model with it, and of no other size."""

    def config(size):
        return small_config("lmm", memory_depth=1, memory=dict(features="sin", feature_size=size))

    model = TitansForCausalLM(config(None)).double()
    cache = filled_cache(model, random_ids(1, 8))
    cache.check_fits(config(16))
    cache.save(tmp_path / "memory")
    assert TitansCache.load(tmp_path / "memory", config(16)).num_columns == 8
    with pytest.raises(ValueError, match=r"written with memory\.feature_size=16, the model has 12"):
        TitansCache.load(tmp_path / "memory", config(12))


@pytest.mark.parametrize("backend", ["auto", "chunkwise"])
@pytest.mark.parametrize("start", ["induction", "sharp"])
@pytest.mark.parametrize("variant", ["lmm", "mac"])
def test_the_first_gradient_is_of_ordinary_size(variant, start, backend):
    """Where keys see the token before, that of a text's first token, persistent or not, is exactly 0."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, head_dim=32, num_hidden_layers=1, memory=dict(start=start))
    model = TitansForCausalLM(small_config(variant, **sizes))
    for module in model.modules():
        if isinstance(module, Learner):
            module.backend = backend
    ids = random_ids(2, 24)
    model(ids, labels=ids).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradient.norm() < 1e3
