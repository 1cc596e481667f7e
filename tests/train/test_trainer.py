from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from titans.data import CarryDataset
from titans.hf import TitansForCausalLM
from titans.train import FactSettings, TitansTrainer, TrainingRun, TrainSettings, train
from titans.train.model import model_config
from titans.train.optimizer import decayed_parameters, make_optimizer, make_schedule

Make = Callable[..., TrainSettings]


def trainer_of(settings: TrainSettings) -> tuple[TitansTrainer, TitansForCausalLM]:
    settings.output.mkdir(exist_ok=True)
    run = TrainingRun(settings)
    trainer = run._trainer(None)
    run.model.train()
    return trainer, run.model


def batches(trainer: TitansTrainer) -> list[dict[str, torch.Tensor]]:
    return list(DataLoader(trainer.train_dataset, batch_size=4))  # type: ignore[arg-type]


def full_rows(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows (batch,) without padding: all but their last token is read."""
    return batch["attention_mask"][:, :-1].all(1)


def losses(model: TitansForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Nats of every target, each row read alone and without padding: (number of targets,)."""
    found = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        count = int(mask.sum())
        logits = model(ids[None, :count], use_cache=False).logits[0]
        found.append(F.cross_entropy(logits, ids[1 : count + 1], reduction="none"))
    return torch.cat(found)


def test_the_loss_is_the_mean_over_all_predictions_and_the_models_own(
    settings: Make,
) -> None:
    trainer, model = trainer_of(settings())
    batch = next(b for b in batches(trainer) if not full_rows(b).all())
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, losses(model, batch).mean())
    torch.testing.assert_close(loss, model(**batch).loss)
    full = next(b["input_ids"][0] for b in batches(trainer) if full_rows(b)[0])
    assert (full != 0).all()


def test_evaluation_is_the_bits_of_the_held_out_text(settings: Make) -> None:
    trainer, model = trainer_of(settings())
    assert trainer.held_out is not None and trainer.held_out.tokens_per_byte == 1
    nats = torch.cat([losses(model, b) for b in DataLoader(trainer.held_out.windows, batch_size=3)])
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert measured["eval_bits_per_byte"] == pytest.approx(nats.mean().item() / 0.6931471805599453, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_a_carried_memory_goes_on_where_its_row_stopped(settings: Make, variant: str) -> None:
    trainer, model = trainer_of(settings(variant=variant, carry_memory=True, steps=12))
    assert isinstance(trainer.train_dataset.dataset, CarryDataset)  # type: ignore[union-attr]
    read: list[list[int]] = [[], [], [], []]
    continued = restarted = 0
    for batch in batches(trainer):
        total, count = 0.0, 0
        for row in range(4):
            real = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row][real], batch["labels"][row].roll(-1)[real]
            if batch["restart"][row]:
                restarted += bool(read[row])
                read[row] = []
            continued += bool(read[row])
            # What the row has read of its document, and goes on to read, in one piece from an empty memory.
            whole = torch.tensor([*read[row], *ids.tolist()])
            logits = model(whole.unsqueeze(0), use_cache=False).logits[0, -len(ids) :]
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(ids)
            read[row] = whole.tolist()
        loss = trainer.compute_loss(model, batch).item()
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert continued > 4 and restarted > 2


def test_the_gradient_stops_at_the_boundary_and_reaches_the_initial_weights_of_restarted_rows(
    settings: Make,
) -> None:
    # Where fast weights are offsets, every stretch is read on top of the initial ones.
    usual = settings(carry_memory=True, variant="lmm")
    trainer, model = trainer_of(
        replace(usual, config={**usual.config, "memory": {"form": {"decay_to_initial": False}}})
    )
    initial = model.model.layers[0].mixer.memory.initial_weights[0]
    first, second = batches(trainer)[:2]
    trainer.compute_loss(model, first).backward()
    assert initial.grad is not None and initial.grad.abs().sum() > 0
    for restart, reached in [(False, False), (True, True)]:
        model.zero_grad(set_to_none=True)
        kept = trainer.carried
        trainer.compute_loss(model, {**second, "restart": torch.tensor([restart] + [False] * 3)}).backward()
        assert (initial.grad is not None and bool(initial.grad.abs().sum() > 0)) == reached
        trainer.carried = kept


def test_bits_per_byte_do_not_depend_on_how_long_tokens_are(
    settings: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = sorted(map(str, corpus.iterdir()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train(files, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trainer, model = trainer_of(settings(tokenizer=str(tmp_path / "words")))
    assert model.config.vocab_size == 280
    measured = trainer.evaluate()
    held_out = next(corpus / name for name in TrainingRun(settings()).examples.held_out_names)
    ratio = len(words.encode(held_out.read_text()).ids) / held_out.stat().st_size
    assert 0.1 < ratio < 0.5
    nats = measured["eval_bits_per_byte"] * 0.6931471805599453
    assert nats == pytest.approx(measured["eval_loss"] * ratio)

    (tmp_path / "latin").mkdir()
    for name in "ab":
        (tmp_path / "latin" / f"{name}.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"[ab].txt is not valid UTF-8: byte 0xe9 at offset 3"):
        TrainingRun(settings(data=str(tmp_path / "latin"), tokenizer=str(tmp_path / "words")))


def test_carrying_is_refused_where_there_is_nothing_to_carry(settings: Make) -> None:
    with pytest.raises(ValueError, match="carry_memory with variant='transformer': it has no memory"):
        TrainingRun(settings(variant="transformer", carry_memory=True))


def test_examples_do_not_depend_on_where_one_starts_reading(settings: Make) -> None:
    for carry_memory in (False, True):
        stream = TrainingRun(settings(steps=40, carry_memory=carry_memory)).examples.train
        forward = [stream[index]["input_ids"] for index in range(len(stream))]
        assert len(stream) == 160 > 2 * len(stream.dataset)
        for index in (159, 3, 70, 71, 0):
            assert torch.equal(stream[index]["input_ids"], forward[index])


def test_weight_decay_pulls_at_projections_alone(settings: Make) -> None:
    model = TitansForCausalLM(model_config(settings(variant="mac"), 256))
    decayed = set(decayed_parameters(model))
    free = {name for name, _ in model.named_parameters()} - decayed
    spared = ("norm", "bias", "embed_tokens", "persistent", "initial_weights", "conv", "lm_head")
    assert decayed and not [name for name in decayed if any(part in name for part in spared)]
    assert not [name for name in free if not any(part in name for part in spared)]
    optimizer = make_optimizer(model, 1e-3, 0.1, (0.9, 0.95))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decayed) + len(free)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_the_schedule_warms_up_to_the_peak_and_ends_at_the_floor() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = make_schedule(optimizer, steps=50, warmup_steps=10, min_ratio=0.1)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < rates[0] < rates[9] < rates[10] == 2.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)


def test_training_goes_on_from_the_weights_of_another_run(settings: Make) -> None:
    run = TrainingRun(settings(output=settings().output / "first"))
    run.run()
    other = TrainingRun(settings(seed=5, start_from=run.settings.output))
    assert all(
        torch.equal(p, q) for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=r"model.safetensors is missing, damaged or of another model"):
        TrainingRun(settings(variant="lmm", start_from=run.settings.output))
    linear = {name: value for name, value in settings().config.items() if name != "memory_depth"}
    with pytest.raises(ValueError, match=r"has memory_depth=2, this run 1: set memory_depth=2 in config"):
        TrainingRun(settings(config=linear, start_from=run.settings.output))


def test_a_second_stage_goes_on_with_finer_local_chunks(settings: Make) -> None:
    def schedule(*sizes):
        memory = {"shard_length": 16, "local_chunk_sizes": [*sizes]}
        return {**settings().config, "chunk_size": 32, "memory": memory}

    first = settings(variant="lmm", config=schedule(8), steps=4)
    first = replace(first, output=first.output / "first")
    train(first)
    finer = schedule(2)
    second = TrainingRun(settings(variant="lmm", config=finer, steps=2, start_from=first.output))
    trained = load_file(first.output / "model.safetensors")
    for name, parameter in second.model.named_parameters():
        assert name == "lm_head.weight" or torch.equal(parameter, trained[name])
    assert second.model.config.memory.local_chunk_sizes == [2]
    second.run()
    more = schedule(2, 4)
    with pytest.raises(ValueError, match="of another model"):
        TrainingRun(replace(second.settings, config=more, output=first.output / "second"))


def test_facts_are_inserted_in_training_text_and_not_in_held_out_text(settings: Make) -> None:
    plain, with_facts = (
        TrainingRun(settings()),
        TrainingRun(settings(facts=FactSettings(spacing=60.0, distance=64))),
    )
    assert with_facts.examples.num_train_tokens > 1.3 * plain.examples.num_train_tokens
    assert with_facts.examples.held_out is not None and plain.examples.held_out is not None
    for one, other in zip(with_facts.examples.held_out.windows, plain.examples.held_out.windows, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_answers_are_weighted_in_the_loss(settings: Make) -> None:
    facts = FactSettings(spacing=30.0, distance=64)
    trainer, model = trainer_of(settings(facts=replace(facts, answer_weight=7.0)))
    once, _ = trainer_of(settings(facts=facts))
    batch = next(b for b in batches(trainer) if not full_rows(b).all())
    assert torch.equal(batch["labels"], next(b for b in batches(once) if not full_rows(b).all())["labels"])
    answers = batch["answers"][:, 1:][batch["labels"][:, 1:] >= 0]
    assert 0.02 < answers.float().mean() < 0.5
    counts = torch.where(answers, 7.0, 1.0)
    expected = (losses(model, batch) * counts).sum() / counts.sum()
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, r"preset 'huge' is not known: choose one of .*tiny"),
        ({"variant": "mab"}, r"variant='mab': choose one of .*mac"),
        (
            {"config": {"chunksize": 4}},
            r"chunksize=4 is not a field of TitansConfig: choose from .*chunk_size",
        ),
        ({"config": {"chunk_size": "4"}}, r"chunk_size='4': give a whole number"),
        ({"config": {"chunk_size": 0}}, r"chunk_size=0: give a whole number of at least 1"),
        ({"config": {"vocab_size": 300}}, r"vocab_size, which the tokenizer decides"),
        ({"config": {"variant": "lmm"}}, r"variant, which is a setting of its own"),
        ({"steps": 0}, r"steps=0: give a whole number of at least 1"),
        ({"hold_out": 1.5}, r"hold_out=1.5: give a number from 0 to 1"),
        ({"hold_out": 1}, r"hold_out=1 leaves nothing to train on"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan: give a number"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): give two numbers"),
        ({"dtype": "float16"}, r"dtype='float16': choose one of \['float32', 'tfloat32', 'bfloat16'\]"),
        ({"facts": FactSettings(distance=8)}, r"facts.distance=8: give a whole number of at least 32"),
        (
            {"facts": FactSettings(spacing="many")},
            r"facts.spacing='many' is of type str: give float or nothing",
        ),
        (
            {"facts": FactSettings(answer_weight=-1.0)},
            r"facts.answer_weight=-1.0: give a number from 0 to inf",
        ),
        (
            {"facts": FactSettings(answer_weight=2.0), "tokenizer": "gpt"},
            r"answer_weight=2.0 with tokenizer=",
        ),
        ({"facts": FactSettings(refrains=0.95)}, r"facts.refrains=0.95: give a number from 0 to 0.9"),
        ({"facts": FactSettings(alike=1.5)}, r"facts.alike=1.5: give a number from 0 to 1"),
        ({"carry_memory": True, "variant": "transformer"}, r"carry_memory with variant='transformer'"),
        ({"cuda_graph": True, "dtype": "bfloat16"}, r"cuda_graph with dtype='bfloat16'"),
        (
            {
                "config": {"chunk_size": 64, "memory": {"local_chunk_sizes": [8], "shard_length": 64}},
                "variant": "lmm",
            },
            r"with chunk_size=64 and local memories: the global memory is read from its second chunk on",
        ),
        ({"resume": True}, r"resume: there is no checkpoint in output="),
        ({"data": "nowhere"}, r"corpus='nowhere' is neither a file nor a folder nor a built-in name"),
        ({"tokenizer": "./none"}, r"tokenizer='./none' could not be loaded"),
    ],
)
def test_refusals(settings: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRun(settings(**changes))
    assert not settings().output.exists()


def test_a_single_document_cannot_be_held_out(settings: Make, corpus: Path) -> None:
    single = str(corpus / "0.txt")
    with pytest.raises(ValueError, match=r"is a single document, .*: give eval_data, split"):
        TrainingRun(settings(data=single))
    assert TrainingRun(settings(data=single, hold_out=0)).examples.held_out is None
    separate = TrainingRun(settings(data=single, eval_data=str(corpus / "1.txt")))
    assert separate.examples.held_out_names == ("1.txt",)


def test_a_run_is_not_overwritten(settings: Make) -> None:
    (settings().output / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds a run: set resume to continue it, or give"):
        TrainingRun(settings())
