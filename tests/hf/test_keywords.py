"""How other libraries call the models: their keywords, packed documents, adapters, export."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening

from titans.data import byte_tokenizer
from titans.hf import TitansCache

from ..variants import VARIANTS
from .models import MODELS, VOCAB, assert_near, filled_cache, logits_of, random_ids, small_model

adapters = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_documents_packed_into_a_row_are_read_as_if_each_stood_alone(variant):
    model, texts = MODELS[variant], [random_ids(n, seed=n).tolist() for n in (9, 1, 20)]
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = dict(collator([dict(input_ids=text) for text in texts], return_tensors="pt"))
    alone = torch.cat([logits_of(model, torch.tensor([text])) for text in texts], 1)
    output = model(**batch, output_hidden_states=True, output_surprise=True)
    assert_near(output.logits, alone)
    assert output.past_key_values is None and output.hidden_states[1].shape == (1, 30, 12)
    assert all(surprise.shape[:2] == (1, 30) for surprise in output.surprises)
    # Several rows of several documents, padding behind, between and before them.
    rows = [[texts[0], texts[1]], [texts[2]]]
    ids, positions, mask = (torch.zeros(2, 24, dtype=torch.int64) for _ in range(3))
    expected = torch.zeros(2, 24, VOCAB, dtype=torch.float64)
    for row, documents in enumerate(rows):
        begin = row
        for text in documents:
            end = begin + len(text)
            ids[row, begin:end], mask[row, begin:end] = torch.tensor(text), 1
            positions[row, begin:end] = torch.arange(len(text))
            expected[row, begin:end] = logits_of(model, torch.tensor([text]))[0]
            begin = end + 3
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_near(found[mask.bool()], expected[mask.bool()])
    model.zero_grad()
    loss = model(**batch).loss
    losses = [model(torch.tensor([text]), labels=torch.tensor([text])).loss for text in (texts[0], texts[2])]
    assert_near(loss, (losses[0] * 8 + losses[1] * 19) / 27, 1e-5)
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


def test_packed_documents_have_no_common_state():
    model, ids = MODELS["mac"], random_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for wrong in (
        dict(past_key_values=TitansCache(model.config)),
        dict(use_cache=True),
        dict(return_memory_states=True),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} with position_ids that restart"):
            model(ids, position_ids=positions, **wrong)
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 5\): give \(1, 6\)"):
        model(ids, position_ids=positions[:, 1:])
    with pytest.raises(ValueError, match="seq_idx: give position_ids"):
        model(ids, seq_idx=positions)


def test_keywords_that_change_nothing_are_accepted_and_others_refused_by_name():
    model, ids = MODELS["mag"], random_ids(2, 7)
    expected = logits_of(model, ids)
    harmless = dict(
        position_ids=torch.arange(7)[None],
        cache_position=torch.arange(7),
        output_attentions=False,
        output_router_logits=None,
        is_causal=True,
        token_type_ids=None,
    )
    for called in (model, model.model):
        output = called(ids, **harmless)
        logits = output.logits if called is model else model.lm_head(output.last_hidden_state)
        assert torch.equal(logits, expected)
        for name, value, message in (
            ("output_attentions", True, "a memory has no attention map"),
            ("is_causal", False, "a memory reads forwards"),
            ("num_logits_to_keep", 1, "it is called logits_to_keep"),
        ):
            with pytest.raises(ValueError, match=f"{name}={value}: {message}"):
                called(ids, **{name: value})
        with pytest.raises(TypeError, match="labls=3: a Titans model's forward has no such keyword"):
            called(ids, labls=3)
    # Positions continue where a cache or padding ends, too.
    cache = filled_cache(model, ids[:, :4])
    assert_near(
        model(ids[:, 4:], past_key_values=cache, position_ids=torch.arange(4, 7)[None]).logits,
        expected[:, 4:],
    )
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1]])
    padded = model(ids[:1], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert_near(padded, model(ids[:1], attention_mask=mask).logits)
    # A loss over the labels of all accumulated batches, and outputs as the configuration has them.
    assert_near(model(ids, labels=ids, num_items_in_batch=24).loss, model(ids, labels=ids).loss / 2, 1e-5)
    chosen = small_model("mag", output_hidden_states=True, return_dict=False)
    assert len(chosen(ids, use_cache=False)[1]) == 3


def test_generation_stops_at_strings():
    model, tokenizer = small_model("lmm", vocab_size=128), byte_tokenizer()
    ids = random_ids(1, 5)
    new = model.generate(ids, max_new_tokens=40, do_sample=False)[0, 5:]
    stop = tokenizer.decode(new[9:10])
    found = model.generate(ids, max_new_tokens=40, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    first = new.tolist().index(new[9])
    assert found[0, 5:].tolist() == new[: first + 1].tolist()


@adapters
@pytest.mark.parametrize("variant", ["mac", "mag", "lmm"])
def test_lora_reaches_every_linear_layer(variant):
    """Adapters change the output, get gradients, and give when merged what they gave before."""
    model, ids = small_model(variant), random_ids(2, 13)
    before = logits_of(model, ids)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).double()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    output = tuned(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    parts = [(name, p) for name, p in tuned.named_parameters() if "lora_" in name]
    assert parts and all(p.grad is not None and p.grad.abs().max() > 0 for _, p in parts)
    assert (output.logits - before).abs().max() > 1e-3
    new = tuned.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    merged = tuned.merge_and_unload()
    assert_near(logits_of(merged, ids), output.logits.detach())
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), new)


@adapters
def test_prompts_are_tuned_and_prefixes_refused():
    ids = random_ids(2, 6)
    tuned = get_peft_model(
        small_model("mac"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    tuned = tuned.double()
    output = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    output.loss.backward()
    prompt = tuned.prompt_encoder["default"].embedding.weight
    assert prompt.grad.abs().max() > 0 and output.logits.shape == (2, 9, VOCAB)
    new = tuned.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    text = torch.cat([prompt.expand(2, -1, -1), tuned.base_model.get_input_embeddings()(ids)], 1)
    expected = tuned.base_model.generate(inputs_embeds=text, max_new_tokens=4, do_sample=False)
    assert torch.equal(new[:, 6:], expected)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=8,
                                num_attention_heads=2)  # fmt: skip
    tuned = get_peft_model(small_model("mac"), prefix)
    with pytest.raises(ValueError, match="prefix tuning"):
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_export_needs_no_keywords():
    model, ids = MODELS["lmm"], random_ids(2, 7)
    exported = torch.export.export(model, (ids,)).module()
    assert_near(exported(ids).logits, logits_of(model, ids))


def test_labels_that_do_not_fit_leave_the_cache_as_it_was() -> None:
    model, ids = small_model("lmm"), torch.zeros(2, 5, dtype=torch.int64)
    cache = model(ids, use_cache=True).past_key_values
    for wrong, message in (({"labels": ids[:1]}, "labels has shape"), ({"logits_to_keep": -1}, "number of")):
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache, **wrong)
    assert cache.num_columns == 5
