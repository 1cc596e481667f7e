from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.train import FactSettings, TrainingRun, TrainSettings
from titans.train.write_cost import write_cost


def a_model(variant: str = "mag", heads: int = 3) -> TitansForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, head_dim=4, num_hidden_layers=2, num_attention_heads=heads, vocab_size=11)
    sizes |= dict(num_persistent_tokens=0, intermediate_size=8, chunk_size=4, segment_length=4)
    sizes |= dict(memory_depth=2)
    return TitansForCausalLM(TitansConfig(variant=variant, sliding_window=4, **sizes)).double()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_it_is_the_logarithm_of_the_odds_of_a_step_over_the_slower_half_of_the_heads(variant: str) -> None:
    model, ids = a_model(variant), torch.arange(22).view(2, 11) % 11
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    traces = model(ids, use_cache=False, output_trace=True).traces
    opened = torch.stack(
        [trace.step_size / memory.max_step_size for trace, memory in zip(traces, memories, strict=True)]
    )[..., 2:, :]  # of three heads the slowest
    expected = torch.log1p(math.exp(8) * opened / (1 - opened)).mean()
    torch.testing.assert_close(write_cost(traces, 8.0), expected)

    # Of the first chunk, whose gates no memory has had an effect on.
    write_cost(traces[:1], 8.0, (torch.arange(11) < 4).expand(2, -1)).backward()
    forget, momentum, step_size = memories[0].gate_bias.grad
    assert (step_size[2] > 0).all() and step_size[:2].abs().max() == 0
    assert forget.abs().max() == momentum.abs().max() == 0
    # A gate that is closed a thousandfold is pushed down all but as hard as an open one.
    slow = torch.tensor([0.0, -7.0], dtype=torch.float64, requires_grad=True)
    (pushed,) = torch.autograd.grad(F.softplus(slow + 8).sum(), slow)
    assert pushed[1] > 0.7 * pushed[0]


def test_a_baseline_pays_nothing() -> None:
    traces = a_model("window")(torch.arange(8).view(1, 8), use_cache=False, output_trace=True).traces
    assert write_cost(traces, 8.0) == 0


def test_training_adds_it_to_the_loss_and_reports_the_loss_without(
    settings: Callable[..., TrainSettings],
) -> None:
    found = []
    for price in (0.0, 0.5):
        output = settings().output.with_name(f"run-{price}")
        run = TrainingRun(settings(facts=FactSettings(write_cost=price, write_cost_reach=5.0), output=output))
        run.settings.output.mkdir()
        trainer = run._trainer(None)
        run.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(run.model, batch)
        read = batch["attention_mask"].bool()
        output = run.model(batch["input_ids"], batch["attention_mask"], use_cache=False, output_trace=True)
        found.append((loss.item(), write_cost(output.traces, 5.0, read).item(), trainer.metrics._losses[-1]))
    (plain, price, reported), (paid, same, reported_too) = found
    assert price == pytest.approx(same) and price > 1
    assert paid == pytest.approx(plain + 0.5 * price, rel=1e-5)
    assert reported == pytest.approx(reported_too) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("variant", ["lmm", "mac"])
def test_spared_tokens_pay_nothing_and_padding_does_not_count(variant: str) -> None:
    model = a_model(variant)
    ids = torch.arange(80).view(2, 40) % 11
    traces = model(ids, use_cache=False, output_trace=True).traces
    spared = torch.zeros(2, 40, dtype=torch.bool)
    assert write_cost(traces, 8.0, spared=spared) == write_cost(traces, 8.0)
    assert write_cost(traces, 8.0, spared=~spared) == 0
    spared[1, 17:23] = True
    paid = write_cost(traces, 8.0, spared=spared) + write_cost(traces, 8.0, spared=~spared)
    torch.testing.assert_close(paid, write_cost(traces, 8.0))

    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, 25:] = 0
    padded = model(ids, mask, use_cache=False, output_trace=True).traces
    total = 0
    for row, n in enumerate((25, 40)):
        alone = model(ids[row : row + 1, :n], use_cache=False, output_trace=True).traces
        total = total + n * write_cost(alone, 8.0)
    torch.testing.assert_close(write_cost(padded, 8.0, mask.bool()), total / 65)
