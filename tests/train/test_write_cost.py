from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.train import FactSettings, TrainingRun, TrainSettings
from titans.train.write_cost import collected_write_logits, write_cost


def a_model(variant: str = "mag", heads: int = 3) -> TitansForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, head_dim=4, num_hidden_layers=2, num_attention_heads=heads, vocab_size=11)
    sizes |= dict(num_persistent_tokens=0, intermediate_size=8, chunk_size=4, segment_length=4)
    return TitansForCausalLM(TitansConfig(variant=variant, sliding_window=4, **sizes)).double()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_it_is_the_logarithm_of_the_odds_of_a_step_over_the_slower_half_of_the_heads(variant: str) -> None:
    model, ids, steps = a_model(variant), torch.arange(22).view(2, 11) % 11, []
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    hooks = [
        memory.step_size_gate.register_forward_hook(lambda _, __, opened: steps.append(opened))
        for memory in memories
    ]
    with collected_write_logits(model) as logits:
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    opened = torch.cat([step.flatten(0, 1) for step in steps])[:, 2:]  # of three heads the slowest
    expected = torch.log1p(math.exp(8) * opened / (1 - opened)).mean()
    torch.testing.assert_close(write_cost(logits, 8.0), expected)
    assert model(ids, use_cache=False) is not None and len(logits) == len(steps), "it looks within the block"

    write_cost(logits[:1], 8.0).backward()
    forget, momentum, step_size = memories[0].gate_bias.grad
    assert (step_size[2] > 0).all() and step_size[:2].abs().max() == 0
    assert forget.abs().max() == momentum.abs().max() == 0
    # A gate that is closed a thousandfold is pushed down all but as hard as an open one.
    slow = torch.tensor([0.0, -7.0], dtype=torch.float64, requires_grad=True)
    (pushed,) = torch.autograd.grad(F.softplus(slow + 8).sum(), slow)
    assert pushed[1] > 0.7 * pushed[0]


def test_a_baseline_pays_nothing() -> None:
    model = a_model("window")
    with collected_write_logits(model) as logits:
        model(torch.arange(8).view(1, 8), use_cache=False)
    assert write_cost(logits, 8.0) == 0


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
        with collected_write_logits(run.model) as logits:
            run.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        found.append((loss.item(), write_cost(logits, 5.0).item(), trainer.metrics._losses[-1]))
    (plain, price, reported), (paid, same, reported_too) = found
    assert price == pytest.approx(same) and price > 1
    assert paid == pytest.approx(plain + 0.5 * price, rel=1e-5)
    assert reported == pytest.approx(reported_too) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("variant", ["lmm", "mac"])
def test_what_will_be_asked_for_pays_nothing(variant: str) -> None:
    model = a_model(variant)
    ids = torch.arange(80).view(2, 40) % 11
    with collected_write_logits(model) as logits:
        model(ids, use_cache=False)
    spared = torch.zeros(2, 40, dtype=torch.bool)
    assert write_cost(logits, 8.0, spared) == write_cost(logits, 8.0)
    persistent = [x for x in logits if len(x) == 1]
    of_all = sum(x[..., (x.shape[-2] + 1) // 2 :, :].numel() for x in logits)
    of_them = sum(x[..., (x.shape[-2] + 1) // 2 :, :].numel() for x in persistent)
    rest = write_cost(persistent, 8.0).item() * of_them / of_all
    assert write_cost(logits, 8.0, ~spared).item() == pytest.approx(rest, abs=1e-6)
    spared[1, 17:23] = True
    paid = write_cost(logits, 8.0, spared) + write_cost(logits, 8.0, ~spared)
    assert paid.item() == pytest.approx(write_cost(logits, 8.0).item() + rest, rel=1e-5)
