"""Training: states carried between segments, rows that start afresh, checkpointing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

from titans.hf import TitansCache, TitansForCausalLM
from titans.state import map_state

from ..variants import DIFFERENT, VARIANTS
from .models import VOCAB, assert_near, filled_cache, logits_of, random_ids, small_config, small_model

every_variant = pytest.mark.parametrize("variant", VARIANTS)
different = pytest.mark.parametrize("variant", DIFFERENT)


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def segments_loss(model, ids, cuts, restart=None):
    """The summed loss of next-token prediction, the ids read in pieces, the state inside the graph."""
    total, states, begin = 0.0, None, 0
    for end in [*cuts, ids.shape[1] - 1]:
        output = model(
            ids[:, begin:end],
            memory_states=states,
            restart=None if states is None else restart,
            return_memory_states=True,
        )
        assert output.past_key_values is None
        total = total + cross_entropy(output.logits, ids[:, begin + 1 : end + 1])
        states, begin = output.memory_states, end
    return total


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not missing, f"no gradient reaches {missing}"
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected):
    assert_near(actual[0], expected[0])
    for name, gradient in expected[1].items():
        assert gradient.isfinite().all(), name
        assert_near(actual[1][name], gradient, 1e-8 * max(1.0, gradient.abs().max().item()))


@different
def test_the_output_holds_what_was_asked_for_in_the_librarys_order(variant):
    model, ids = small_model(variant), random_ids(2, 17)
    labels = ids.clone()
    labels[0, 3:6] = -100
    expected = logits_of(model, ids)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(expected, labels[:, 1:].flatten())
    output = model(ids, labels=labels)
    # The library's loss is in float32.
    assert_near(output.loss.double(), expected, 1e-5)
    assert list(output) == ["loss", "logits", "past_key_values"]
    loss, logits, _ = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert torch.equal(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([4, 2])).logits, output.logits[:, [4, 2]])
    base = model.model(ids, output_hidden_states=True, output_surprise=True, use_cache=False)
    assert "past_key_values" not in base and len(base.hidden_states) == model.config.num_hidden_layers + 1
    assert len(base.surprises) in (0, model.config.num_hidden_layers)
    assert torch.equal(model.lm_head(base.last_hidden_state), output.logits)


@every_variant
def test_carried_states_give_the_loss_and_the_gradients_of_one_call(variant):
    model, ids = small_model(variant).train(), random_ids(2, 25)
    whole = loss_and_gradients(model, segments_loss(model, ids, []))
    assert_same_gradients(loss_and_gradients(model, segments_loss(model, ids, [10])), whole)
    assert_same_gradients(loss_and_gradients(model, segments_loss(model, ids, [7, 8, 16])), whole)


@different
def test_a_detached_state_cuts_the_gradient_and_nothing_else(variant):
    model, ids = small_model(variant).train(), random_ids(1, 20)
    embeddings = model.get_input_embeddings()(ids[:, :10]).detach().requires_grad_()
    for detach in (False, True):
        states = model(inputs_embeds=embeddings, return_memory_states=True).memory_states
        if detach:
            states = map_state(torch.Tensor.detach, states)
        late = model(ids[:, 10:], memory_states=states).logits
        assert_near(late.detach(), logits_of(model, ids)[:, 10:])
        (gradient,) = torch.autograd.grad(late.sum(), embeddings, allow_unused=True, materialize_grads=True)
        assert bool(gradient.any()) is not detach


@every_variant
def test_rows_that_restart_are_fresh_rows(variant):
    model = small_model(variant).train()
    first, second = random_ids(3, 11), random_ids(3, 9, seed=1)
    states = model(first, return_memory_states=True).memory_states
    restart = torch.tensor([False, True, False])
    output = model(second, memory_states=states, restart=restart, return_memory_states=True)
    third = random_ids(3, 5, seed=2)
    later = model(third, memory_states=output.memory_states).logits
    whole = torch.cat([second, third], 1)
    got = torch.cat([output.logits, later], 1)
    assert_near(got[1:2], logits_of(model, whole[1:2]))
    for row in (0, 2):
        kept = torch.cat([first, whole], 1)[row : row + 1]
        assert_near(got[row : row + 1], logits_of(model, kept)[:, 11:])


@different
@pytest.mark.parametrize("cuts", [[], [9]], ids=["one call", "carried"])
def test_gradient_checkpointing_changes_no_gradient(variant, cuts):
    model, ids = small_model(variant).train(), random_ids(2, 20)
    restart = torch.tensor([True, False])
    plain = loss_and_gradients(model, segments_loss(model, ids, cuts, restart))
    model.activation_checkpointing_enable()
    calls, mixer = [], model.model.layers[0].mixer
    mixer.register_forward_hook(lambda *_: calls.append(1))
    again = loss_and_gradients(model, segments_loss(model, ids, cuts, restart))
    assert len(calls) == 2 * (1 + len(cuts)), "the layers were not computed again in the backward"
    assert_same_gradients(again, plain)


@different
def test_reentrant_checkpointing_is_refused(variant):
    model = small_model(variant)
    for enable in (model.gradient_checkpointing_enable, model.activation_checkpointing_enable):
        with pytest.raises(ValueError, match="use_reentrant=True gives wrong gradients"):
            enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True gives wrong gradients"):
        model.gradient_checkpointing_enable(use_reentrant=True)
    assert not model.is_activation_checkpointing


@different
def test_contradictory_arguments_are_refused(variant):
    model, ids = small_model(variant, chunk_size=4), random_ids(2, 6)
    cache = filled_cache(model, ids)
    embeddings = model.get_input_embeddings()(ids).detach()
    mask = torch.ones(2, 6, dtype=torch.int64)
    states = model(ids, return_memory_states=True).memory_states
    wrong = {
        "exactly one of input_ids and inputs_embeds": [
            dict(input_ids=ids, inputs_embeds=embeddings),
            dict(),
        ],
        "not both": [dict(input_ids=ids, past_key_values=cache, memory_states=states)],
        r"attention_mask has shape \(2, 5\)": [dict(input_ids=ids, attention_mask=mask[:, :5])],
        r"attention_mask has shape \(1, 6\)": [dict(input_ids=ids, attention_mask=mask[:1])],
        r"attention_mask has shape \(2, 1, 6\)": [dict(input_ids=ids, attention_mask=mask[:, None])],
        r"attention_mask has shape \(2, 12\)": [dict(input_ids=ids, attention_mask=mask.repeat(1, 2))],
        r"attention_mask has shape \(2, 9\)": [
            dict(input_ids=ids, past_key_values=cache, attention_mask=torch.ones(2, 9))
        ],
        "past_key_values is a DynamicCache": [dict(input_ids=ids, past_key_values=DynamicCache())],
        "past_key_values holds 2 rows, the input has 1": [dict(input_ids=ids[:1], past_key_values=cache)],
        "the cache was made with chunk_size=3, the model has 4": [
            dict(input_ids=ids, past_key_values=TitansCache(small_config(variant)))
        ],
        r"input_ids has shape \(6,\)": [dict(input_ids=ids[0])],
        r"input_ids .* dtype torch.float64": [dict(input_ids=ids.double())],
        "input_ids holds -1 to": [dict(input_ids=ids - ids.min() - 1)],
        f"input_ids holds 0 to {VOCAB}: give ids from 0 to {VOCAB - 1}": [
            dict(input_ids=torch.tensor([[0, VOCAB]]))
        ],
        r"inputs_embeds has shape \(2, 6, 5\)": [dict(inputs_embeds=embeddings[..., :5])],
        "memory_states holds 1: give one for each of 2": [dict(input_ids=ids, memory_states=states[:1])],
        r"restart has shape \(3,\)": [
            dict(input_ids=ids, memory_states=states, restart=torch.ones(3, dtype=torch.bool))
        ],
        "restart .* dtype torch.float32": [dict(input_ids=ids, memory_states=states, restart=torch.ones(2))],
    }
    before = cache.states
    for message, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                model(**call)
    assert cache.states is not None and cache.num_columns == 6
    assert all(now is then for now, then in zip(cache.states, before, strict=True))


@different
def test_bfloat16_and_autocast_stay_near_float32(variant):
    model, ids = small_model(variant).float(), random_ids(2, 30)
    expected = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits_of(model, ids)
    narrow = logits_of(small_model(variant).bfloat16(), ids)
    for logits in (mixed, narrow):
        assert logits.dtype == torch.bfloat16
        error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        # A memory that has read little answers little, and its answers are normalised, rounding and all.
        assert error < 0.2


@different
def test_gradients_do_not_depend_on_what_stands_in_the_padding(variant):
    model, ids = small_model(variant).train(), random_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    embeddings = model.get_input_embeddings()(ids).detach()

    def run(fill):
        x = embeddings.masked_fill(mask[..., None] == 0, fill)
        logits = model(inputs_embeds=x, attention_mask=mask).logits
        loss = cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_gradients(run(torch.nan), run(0.0))


@pytest.mark.parametrize("variant", ["mac"])
def test_the_trainer_learns_a_repeated_sequence(variant, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TitansForCausalLM(small_config(variant, hidden_size=16, tie_word_embeddings=True))
    text = random_ids(8, seed=3).repeat(3)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=True,
        dataloader_pin_memory=False,
    )
    rows = [dict(input_ids=text, labels=text) for _ in range(40)]
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and losses[0] > 2.5
    assert losses[-1] < 0.5
    assert trainer.evaluate()["eval_loss"] < 0.5
    predicted = trainer.predict(rows[:3]).predictions
    assert predicted.shape == (3, len(text), VOCAB)
