from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from titans.hf import TitansForCausalLM
from titans.memory import MemoryState
from titans.stream.saved import find_states
from titans.train import TitansTrainer, TrainingRun, TrainSettings
from titans.train.distraction import distracted, draw_distraction

Make = Callable[..., TrainSettings]


def trainer_of(settings: TrainSettings) -> tuple[TitansTrainer, TitansForCausalLM, dict[str, torch.Tensor]]:
    settings.output.mkdir(exist_ok=True)
    run = TrainingRun(settings)
    trainer = run._trainer(None)
    run.model.train()
    return trainer, run.model, next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_fast_heads_of_these_rows_know_what_their_neighbours_have_read(settings: Make, variant: str) -> None:
    _, model, batch = trainer_of(settings(variant=variant))
    states = model(batch["input_ids"], use_cache=False, return_memory_states=True).memory_states
    rows = torch.tensor([True, False, False, True])
    changed = distracted(states, rows)
    memories, others = find_states(MemoryState, states), find_states(MemoryState, changed)
    assert len(memories) == len(others) > 0
    for memory, other in zip(memories, others, strict=True):
        for part in ("weights", "momentum", "anchor"):
            for before, after in zip(getattr(memory, part), getattr(other, part), strict=True):
                assert torch.equal(after[:, 1], before[:, 1]), "the slow head of two keeps all"
                assert torch.equal(after[[1, 2], 0], before[[1, 2], 0])
                assert torch.equal(after[[0, 3], 0], before[[3, 2], 0])
    ids = {id(leaf) for memory in memories for leaf in pytree.tree_leaves(memory)}
    for before, after in zip(pytree.tree_leaves(states), pytree.tree_leaves(changed), strict=True):
        assert id(before) in ids or before is after, "attention and filters are left alone"
    written = others[0].weights[0][0]
    (gradient,) = torch.autograd.grad(
        written[0].square().sum(), model.get_input_embeddings().weight, retain_graph=True
    )
    assert gradient.any(), "a gradient goes to where the knowledge comes from"


@pytest.mark.parametrize("carry_memory", [False, True])
def test_the_loss_is_that_of_two_stretches_with_the_exchange_between(
    settings: Make, carry_memory: bool
) -> None:
    trainer, model, batch = trainer_of(settings(variant="mag", distraction=0.5, carry_memory=carry_memory))
    generator = np.random.default_rng([0, 0, 7])
    rows, place = draw_distraction(generator, 4, 40, 8, 0.5)
    assert rows.any() and not rows.all() and place in (8, 16, 24, 32)
    mask = batch["attention_mask"]
    first = model(batch["input_ids"][:, :place], mask[:, :place], use_cache=False, return_memory_states=True)
    second = model(
        batch["input_ids"][:, place:],
        mask[:, place:],
        use_cache=False,
        memory_states=distracted(first.memory_states, rows),
    )
    logits = torch.cat([first.logits, second.logits], 1)
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    assert (trainer.carried is not None) is carry_memory
    trainer.distraction = 0.0
    trainer.carried = None
    assert abs(trainer.compute_loss(model, batch) - loss) > 1e-5
    trainer.distraction = 1e-12  # cut in two, and no row is distracted
    trainer.carried = None
    torch.testing.assert_close(trainer.compute_loss(model, batch), model_loss(model, batch))


def model_loss(model: TitansForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def test_places_are_where_chunks_begin_and_not_near_the_ends() -> None:
    places = [draw_distraction(np.random.default_rng(seed), 8, 2048, 16, 0.5)[1] for seed in range(200)]
    assert all(place % 16 == 0 and 240 <= place < 1792 for place in places)
    assert len(set(places)) > 60
    shares = [draw_distraction(np.random.default_rng(seed), 8, 2048, 16, 0.5)[0] for seed in range(200)]
    assert torch.stack(shares).float().mean() == pytest.approx(0.5, abs=0.05)
    assert draw_distraction(np.random.default_rng(0), 2, 1, 16, 0.5)[1] == 0
