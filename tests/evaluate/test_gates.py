"""What the gates are said to have learned is what the memory is written with."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from titans.evaluate import gate_statistics
from titans.hf import TitansCache, TitansForCausalLM
from titans.memory import MemoryState, memory_scan
from titans.nn import BlockContext, NeuralMemory
from titans.nn.memory import learner
from titans.stream.reader import initial_states

from .models import small_model, some_ids

# Together 31 tokens, so that the quantiles are those of ranks 3, 15 and 27, and no chunk or segment is whole.
DOCUMENTS = [some_ids(18, seed=1), some_ids(13, seed=2)]
EXACT: dict[str, Any] = dict(rtol=1e-6, atol=0)


def memories_of(model: TitansForCausalLM) -> list[NeuralMemory]:
    return [module for module in model.modules() if isinstance(module, NeuralMemory)]


@torch.no_grad()
def test_gates_that_see_nothing_are_their_biases() -> None:
    model = small_model("mac", num_attention_heads=3, memory={"form": {"normalize_step": False}})
    expected = torch.tensor([1024.0, 32e3, 1e6]).double()[:, None].expand(3, 2)  # log-spaced
    layers = gate_statistics(model, DOCUMENTS)
    assert len(layers) == 2
    for layer in layers:
        torch.testing.assert_close(layer.half_life_at_rest, expected, **EXACT)
        assert (layer.half_life_10 < layer.half_life_median).all()

    for memory in memories_of(model):
        memory.gate_weight.zero_()
        memory.gate_bias[:, 2, 1] = torch.tensor([-200.0, math.log(3), -math.log(3)])
    expected = expected.clone()
    expected[2, 1] = torch.inf  # exp(−200) of it is forgotten, which is nothing in float32
    for layer in gate_statistics(model.float(), DOCUMENTS):
        for quantile in ("at_rest", "10", "median", "90"):
            torch.testing.assert_close(getattr(layer, f"half_life_{quantile}"), expected, **EXACT)
        # Bounds 0.5 and 2 (1 − 0.5) / 4. Biases 0 and 1, but in one place ± ln 3: sigmoid 3/4 and 1/4.
        written = 0.25 / (1 + math.exp(-1))
        for found, middle, last in (
            (layer.momentum_mean, 0.25, 0.375),
            (layer.step_size_median, written, 0.0625),
            (layer.write_strength_median, written / 0.75, 0.0625 / 0.625),
        ):
            everywhere = torch.full((3, 2), middle, dtype=torch.float64)
            everywhere[2, 1] = last
            torch.testing.assert_close(found, everywhere, **EXACT)


def written_with(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    """forget, momentum and step size (tokens, heads, depth) of scans of one row that follow one another.

    The step size is taken from what a token adds to the momentum, as a multiple of its gradient.
    """
    gates: list[list[Tensor]] = [[], [], []]
    for (inner, *inputs, state, chunk_size), options in calls:
        slow = {name: options[name] for name in ("norm_weight", "norm_bias", "base")}
        gain, bias = (None if slow[n] is None else slow[n].unsqueeze(1) for n in ("norm_weight", "norm_bias"))
        for t in range(inputs[0].shape[1]):
            token = [x[:, t : t + 1] for x in inputs]
            _, key, value, forget, momentum, _ = (x.transpose(1, 2) for x in token)

            def loss(
                weights: tuple[Tensor, ...],
                net: Any = inner.network,
                key: Tensor = key,
                value: Tensor = value,
                gain: Tensor | None = gain,
                bias: Tensor | None = bias,
                base: Any = slow["base"],
            ) -> Tensor:
                return (net(net.total(weights, base), key, gain, bias) - value).square().sum()

            gradients = torch.func.grad(loss)(state.anchor)
            after: MemoryState = memory_scan(inner, *token, state, chunk_size, **slow, backend="reference")[1]
            steps = []
            for l, gradient in enumerate(gradients):
                added = after.momentum[l] - momentum[..., l, None] * state.momentum[l]
                steps.append(-(added * gradient).sum((-1, -2)) / gradient.square().sum((-1, -2)))
            gates[0].append(forget[0, :, 0])
            gates[1].append(momentum[0, :, 0])
            gates[2].append(torch.stack(steps, -1)[0])
            state = after
    return [torch.stack(gate) for gate in gates]


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("mac", dict(segment_length=6)),  # segments end within chunks
        ("mag", dict(memory_depth=1)),
        ("mal", dict(memory={"form": {"normalize_step": False}})),
        (
            "lmm",
            dict(memory_depth=3, memory={"form": dict(norm=True, residual=True, decay_to_initial=False)}),
        ),
    ],
)
@torch.no_grad()
def test_statistics_are_those_of_what_is_written(
    variant: str, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(variant, **form)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    done: list[tuple[int, int]] = []
    found = gate_statistics(model.train(), DOCUMENTS, progress=lambda *now: done.append(now))
    assert done == sorted(done) and done[-1] == (31, 31) and model.training

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return memory_scan(*args, **kwargs)

    gates: list[list[list[Tensor]]] = [[], []]
    for ids in DOCUMENTS:
        cache = TitansCache(model.config)
        cache.store(initial_states(model), 0)
        with monkeypatch.context() as patch:
            patch.setattr(learner, "memory_scan", spy)
            model(torch.from_numpy(ids.astype(np.int64))[None], past_key_values=cache)
        # Each layer reads the whole document before the next one does.
        edges = range(0, len(calls) + 1, len(calls) // 2)
        for layer, (begin, end) in enumerate(pairwise(edges)):
            gates[layer].append(written_with(calls[begin:end]))
        calls.clear()

    for layer, parts, memory in zip(found, gates, memories_of(model), strict=True):
        forget, momentum, step_size = (torch.cat(gate) for gate in zip(*parts, strict=True))
        at_rest = -torch.log2(torch.sigmoid(-memory.gate_bias[0]))  # halvings for each token
        half_lives = -math.log(2) / torch.log1p(-forget)
        for actual, expected in (
            (layer.half_life_at_rest, 1 / at_rest),
            (layer.half_life_10, half_lives.quantile(0.1, 0)),
            (layer.half_life_median, half_lives.median(0).values),
            (layer.half_life_90, half_lives.quantile(0.9, 0)),
            (layer.momentum_mean, momentum.mean(0)),
            (layer.step_size_median, step_size.median(0).values),
            (layer.write_strength_median, (step_size / (1 - momentum)).median(0).values),
        ):
            torch.testing.assert_close(actual, expected, **EXACT)
        assert len({x.item() for x in layer.step_size_median.flatten()}) == layer.step_size_median.numel()


@torch.no_grad()
def test_a_chunk_may_be_looked_at_in_parts() -> None:
    memory = memories_of(small_model())[0]
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    traced = BlockContext(trace=True)
    _, begun = memory(x[:, :4])
    _, running = memory(x[:, 4:5], begun)
    _, _, whole = memory(x[:, 4:], begun, context=traced)
    _, _, rest = memory(x[:, 5:], running, context=traced)
    for one, other in (
        (whole.forget, rest.forget),
        (whole.momentum, rest.momentum),
        (memory.applied_step_size(whole, begun), memory.applied_step_size(rest, running)),
    ):
        assert one.shape == (2, 3, 2, 2)
        torch.testing.assert_close(other, one[:, 1:], rtol=1e-9, atol=0)
    _, _, longer = memory(x[:, :4], running, context=traced)
    with pytest.raises(ValueError, match="trace has 4 tokens: give at most the 3 left"):
        memory.applied_step_size(longer, running)


def test_nothing_to_describe() -> None:
    assert gate_statistics(small_model("transformer"), DOCUMENTS) == []
    with pytest.raises(ValueError, match="documents hold no token"):
        gate_statistics(small_model(), [[], []])
