"""`generate` gives what the same model gives without any cache, and refuses what a memory cannot do."""

from __future__ import annotations

import pytest
import torch

from titans import Session
from titans.hf import TitansCache, generation

from ..variants import DIFFERENT, VARIANTS
from .models import MODELS, VOCAB, assert_near, filled_cache, logits_of, random_ids, small_model

every_variant = pytest.mark.parametrize("variant", VARIANTS)
different = pytest.mark.parametrize("variant", DIFFERENT)


def greedy(model, ids, count, **kwargs):
    """The new tokens, (batch, count)."""
    out = model.generate(ids, max_new_tokens=count, do_sample=False, **kwargs)
    return out[:, -count:]


def loop(model, ids, count):
    """The definition of greedy decoding: the whole text through the model for every token."""
    for _ in range(count):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], 1)
    new = ids[:, -count:]
    assert count < 24 or len(set(new.flatten().tolist())) > 5, "the text is all but constant"
    return new


def left_padded(rows, fill=0):
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), fill), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask


def spy_on_calls(model, monkeypatch, look):
    forward = model.model.forward

    def spy(**kwargs):
        look(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", spy)


@every_variant
def test_greedy_is_the_loop_without_a_cache(variant):
    model, ids = MODELS[variant], random_ids(3, 5)
    expected = loop(model, ids, 24)
    assert torch.equal(greedy(model, ids, 24), expected)
    assert torch.equal(greedy(model, ids[:1], 12, use_cache=False), expected[:1, :12])


@different
def test_rows_of_a_padded_batch_are_continued_as_alone(variant):
    model = MODELS[variant]
    rows = [random_ids(n, seed=n) for n in (9, 2, 6)]
    ids, mask = left_padded(rows, fill=VOCAB - 1)
    new = greedy(model, ids, 10, attention_mask=mask, pad_token_id=VOCAB - 1)
    for row, continuation in zip(rows, new, strict=True):
        assert torch.equal(continuation, loop(model, row[None], 10)[0])
    assert len(set(new.flatten().tolist())) > 5
    # Padding at the right, as most tokenizers have it, and a prompt that is returned as it was given.
    right = torch.stack([torch.cat([row, row.new_zeros(9 - len(row))]) for row in rows])
    options = dict(attention_mask=mask.flip(1), pad_token_id=0, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(right, **options), torch.cat([right, new], 1))
    embedded = model.get_input_embeddings()(right).detach()
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), new)
    with pytest.raises(ValueError, match="hides every token of row 1"):
        model.generate(right, attention_mask=mask.flip(1) * torch.tensor([[1], [0], [1]]))


@different
def test_padding_after_the_end_of_a_row_is_not_read(variant):
    model = MODELS[variant]
    rows = [random_ids(n, seed=n) for n in (9, 2, 6)]
    alone = [loop(model, row[None], 12)[0] for row in rows]
    # The first row ends after five tokens, the others later or not at all.
    end, cache = int(alone[0][4]), TitansCache(model.config)
    ids, mask = left_padded(rows)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=end)
    new = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, 9:]
    # Each row has read its tokens up to its end; the last that was generated is never read.
    steps = new.shape[1]
    for row, (prompt, text) in enumerate(zip(rows, alone, strict=True)):
        length = text.tolist().index(end) + 1 if end in text.tolist() else 12
        assert new[row].tolist() == [*text[:length].tolist(), *[0] * (steps - length)]
        read = torch.cat([prompt, text[: min(length, steps - 1)], random_ids(1, 3)[0]])
        mine = cache.clone()
        mine.batch_select_indices(torch.tensor([row]))
        with torch.no_grad():
            logits = model(random_ids(1, 3), past_key_values=mine).logits
        assert_near(logits[0, -1], logits_of(model, read[None])[0, -1])


@different
def test_a_prompt_is_read_in_bounded_stretches(variant, monkeypatch):
    model, ids = MODELS[variant], random_ids(2, 29)
    rows = [random_ids(n, seed=n) for n in (29, 3)]
    expected = [greedy(model, ids, 12), *(greedy(model, row[None], 12) for row in rows)]
    widths = []
    spy_on_calls(model, monkeypatch, lambda call: widths.append(call["input_ids"].shape[1]))
    monkeypatch.setattr(generation, "PREFILL_LENGTH", 8)
    assert torch.equal(greedy(model, ids, 12), expected[0])
    assert widths[:4] == [8, 8, 8, 5] and set(widths[4:]) == {1}
    padded, mask = left_padded(rows)
    assert torch.equal(greedy(model, padded, 12, attention_mask=mask), torch.cat(expected[1:]))


@different
@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=3, do_sample=False),
        dict(num_beams=4, num_return_sequences=2, do_sample=False, length_penalty=0.0),
        dict(do_sample=True, num_return_sequences=3, temperature=0.8),
    ],
    ids=["beams", "beams, two returned", "samples"],
)
def test_beams_and_samples_do_not_depend_on_the_cache(variant, how):
    model = MODELS[variant]
    ids, mask = left_padded([random_ids(n, seed=n) for n in (8, 5)])

    def run(use_cache):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **how)

    with_cache = run(True)
    assert with_cache.shape == (2 * how.get("num_return_sequences", 1), 18)
    assert len(set(with_cache[:, 8:].flatten().tolist())) > 3
    assert torch.equal(with_cache, run(False))


@different
def test_a_cache_is_continued_by_new_ids_or_by_the_whole_text(variant):
    model, ids = MODELS[variant], random_ids(2, 19)
    expected = loop(model, ids, 8)
    for seen in (3, 11, 18):
        new = ids[:, seen:]
        ways = [
            (new, {}),
            (new, dict(attention_mask=torch.ones_like(new))),
            (new, dict(attention_mask=torch.ones_like(ids))),
            (ids, dict(attention_mask=torch.ones_like(ids))),
        ]
        for given, mask in ways:
            cache = filled_cache(model, ids[:, :seen])
            assert torch.equal(greedy(model, given, 8, past_key_values=cache, **mask), expected)
            # The last token has been chosen, but not yet read.
            assert cache.num_columns == cache.get_seq_length() == 19 + 7


@different
def test_a_padded_conversation_goes_on_turn_by_turn(variant):
    """Two turns of a batch with pads in the middle, the model's own answers between them."""
    model = MODELS[variant]
    first, second = [[random_ids(n, seed=n) for n in lengths] for lengths in ((7, 4), (2, 6))]
    ids, mask = left_padded(first)
    cache = TitansCache(model.config)
    answers = greedy(model, ids, 6, attention_mask=mask, past_key_values=cache)
    # Every answer's last token is still to be read.
    turn, turn_mask = left_padded([torch.cat([a[-1:], s]) for a, s in zip(answers, second, strict=True)])
    whole_mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64), turn_mask], 1)
    new = greedy(model, turn, 10, attention_mask=whole_mask, past_key_values=cache)
    for row in range(2):
        text = torch.cat([first[row], answers[row], second[row]])[None]
        assert torch.equal(new[row], loop(model, text, 10)[0])


@different
def test_new_ids_continue_a_cache_however_much_it_has_seen(variant, monkeypatch):
    """The same answer after 3 tokens and after 150, and no mask over them is ever built."""
    model = MODELS[variant]
    for seen in (3, 150):
        text, masks = random_ids(1, seen), []
        cache, new = filled_cache(model, text), random_ids(1, 4, seed=1)
        with monkeypatch.context() as patch:
            spy_on_calls(model, patch, lambda call, masks=masks: masks.append(call["attention_mask"]))
            continued = greedy(model, new, 5, past_key_values=cache)
        assert all(mask is None or mask.shape[1] < 4 + 5 for mask in masks) and masks
        assert torch.equal(continued, loop(model, torch.cat([text, new], 1), 5))


@different
def test_prompts_may_be_embeddings(variant):
    model, ids = MODELS[variant], random_ids(2, 7)
    embeddings = model.get_input_embeddings()(ids).detach()
    expected = greedy(model, ids, 12)
    assert torch.equal(greedy(model, None, 12, inputs_embeds=embeddings), expected)
    for begin, mask in ((4, {}), (4, dict(attention_mask=torch.ones_like(ids))), (3, {})):
        cache = filled_cache(model, ids[:, :begin])
        new = greedy(model, None, 12, inputs_embeds=embeddings[:, begin:], past_key_values=cache, **mask)
        assert torch.equal(new, expected)


@different
def test_a_mask_that_fits_neither_new_nor_all_tokens_is_refused(variant):
    model, ids = MODELS[variant], random_ids(1, 6)
    cache = filled_cache(model, random_ids(1, 9))
    for width in (5, 14, 16):
        mask = torch.ones(1, width, dtype=torch.int64)
        with pytest.raises(ValueError, match=rf"\(1, {width}\): give \(1, 6\), or \(1, 15\)"):
            greedy(model, ids, 2, past_key_values=cache, attention_mask=mask)
    for given in (dict(past_key_values=cache), {}):
        with pytest.raises(ValueError, match="no tokens are given"):
            greedy(model, ids[:, :0], 2, **given)
    with torch.no_grad():
        assert_near(
            model(ids, past_key_values=cache).logits,
            logits_of(model, torch.cat([random_ids(1, 9), ids], 1))[:, 9:],
        )


@different
def test_a_cache_that_is_given_is_used_whatever_the_configuration_says(variant):
    model, ids, more = MODELS[variant], random_ids(1, 9), random_ids(1, 3, seed=1)
    expected = greedy(model, torch.cat([ids, more], 1), 6)
    forgetful = small_model(variant, use_cache=False)
    assert torch.equal(greedy(forgetful, more, 6, past_key_values=filled_cache(model, ids)), expected)
    # Nor does a session mind how `generate` returns what it has found.
    forgetful.generation_config.return_dict_in_generate = True
    session = Session(forgetful)
    session.feed(torch.cat([ids, more], 1)[0])
    assert torch.equal(session.generate(max_new_tokens=6, do_sample=False), expected)
    with pytest.raises(ValueError, match="use_cache=False with past_key_values"):
        greedy(model, more, 2, past_key_values=filled_cache(model, ids), use_cache=False)


@different
def test_what_is_no_cache_of_this_model_is_refused(variant):
    ids = random_ids(1, 3)
    for cache, message in (
        (((),), "past_key_values is a tuple"),
        (filled_cache(small_model(variant, chunk_size=4), ids), "made with chunk_size=4, the model has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            greedy(MODELS[variant], ids, 2, past_key_values=cache)
    with pytest.raises(ValueError, match="output_attentions=True: a memory has no attention map"):
        greedy(MODELS[variant], ids, 2, output_attentions=True)


@different
@pytest.mark.parametrize("kind", ["static", "quantized", "paged", "dynamic", "offloaded"])
def test_other_caches_are_refused(variant, kind):
    with pytest.raises(ValueError, match="cache_implementation"):
        greedy(MODELS[variant], random_ids(1, 3), 2, cache_implementation=kind)


@different
def test_what_a_memory_cannot_undo_is_refused(variant):
    model, ids = MODELS[variant], random_ids(1, 6)
    with pytest.raises(ValueError, match=r"stateful|[Aa]ssisted"):
        greedy(model, ids, 4, assistant_model=small_model(variant, seed=2))
    with pytest.raises(ValueError, match=r"stateful|[Aa]ssisted"):
        greedy(model, ids, 4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=r"crop\(-1\): a memory cannot unlearn"):
        filled_cache(model, ids).crop(-1)
