from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader

from titans.hf import TitansConfig, TitansForCausalLM
from titans.memory import assume_aligned, checks
from titans.nn import NeuralMemory
from titans.nn.blocks import has_memory
from titans.state import map_state
from titans.train import FactSettings, TitansTrainer, TrainingRun, TrainSettings
from titans.train.recorded import RecordedStep

from ..variants import VARIANTS

Make = Callable[..., TrainSettings]


class Replay:
    """Stands in for a CUDA graph where there is no device: what was recorded is run again, in place."""

    recorded: RecordedStep

    def replay(self) -> None:
        step = self.recorded
        for result, new in zip(step._results, step._run()[:2], strict=True):
            result.copy_(new)
        for parameter, gradient in zip(step._parameters, step._gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                gradient.copy_(parameter.grad)


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    for name, stub in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "CUDAGraph": Replay,
        "graph": lambda *_, **__: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    init = RecordedStep.__init__

    def connected(self: RecordedStep, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self._graph.recorded = self  # type: ignore[attr-defined]

    monkeypatch.setattr(RecordedStep, "__init__", connected)


def trained(trainer: TitansTrainer, model: TitansForCausalLM, steps: int) -> list[torch.Tensor]:
    """The loss and every gradient of consecutive steps, with an update after each."""
    found = []
    loader = DataLoader(trainer.train_dataset, batch_size=4)  # type: ignore[arg-type]
    for _, batch in zip(range(steps), loader, strict=False):
        batch["attention_mask"][:, :-1] = 1
        found.append(trainer.training_step(model, batch).clone())
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        trainer._adamw.step()
        model.zero_grad()
    return found


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag"])
@pytest.mark.parametrize("carry", [False, True])
def test_replayed_steps_are_the_steps(
    settings: Make, graphs_on_the_cpu: None, variant: str, carry: bool
) -> None:
    results = []
    for recorded in (False, True):
        # Small updates: Adam makes much of gradients that are nothing but rounding.
        changes = {"carry_memory": carry, "sequence_length": 48, "learning_rate": 1e-4}
        changes["facts"] = FactSettings(write_cost=0.01)
        run = TrainingRun(settings(variant=variant, **changes))
        trainer = run._trainer(None)
        trainer.cuda_graph, trainer.current_gradient_accumulation_steps = recorded, 1
        results.append(trained(trainer, run.model, 6))
    assert len(results[0]) == len(results[1]) > 6
    for eager, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_step_can_be_recorded_because_it_looks_at_no_value(
    monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    # As on an accelerator: no compiled kernels for the CPU, and gates are not looked at.
    monkeypatch.setattr(checks, "_expect_range", lambda *_: None)
    carried = has_memory(variant)
    with FakeTensorMode(allow_non_fake_inputs=True), assume_aligned():
        config = TitansConfig.from_preset("tiny", variant=variant, segment_length=32, num_hidden_layers=1)
        model = TitansForCausalLM(config)
        for module in model.modules():
            if isinstance(module, NeuralMemory):
                module.backend = "chunkwise"
        ids, states = torch.zeros(2, 64, dtype=torch.int64), None
        if carried:
            layers = model.model.layers
            states = map_state(torch.clone, tuple(layer.mixer.initial_state(2) for layer in layers))
        output = model(
            ids,
            memory_states=states,
            restart=torch.zeros(2, dtype=torch.bool) if carried else None,
            return_memory_states=carried,
            use_cache=False,
        )
        output.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
