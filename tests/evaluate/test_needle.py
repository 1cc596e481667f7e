"""The needle table, asked of readers whose answers are known beforehand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from titans.data import byte_tokenizer
from titans.data.needles import TASKS
from titans.evaluate.ask import is_answer
from titans.evaluate.heat_map import draw_heat_maps
from titans.evaluate.needle import attention_reach, needle_table, wilson
from titans.hf import TitansConfig
from titans.stream.causal import Read

TEXT = " ".join(f"line {i} of a long and even text" for i in range(900))


class Seen:
    """All ids so far, as a cache."""

    def __init__(self, ids=None):
        self.ids = ids

    def batch_select_indices(self, rows):
        self.ids = self.ids[rows]

    def clone(self):
        return Seen(self.ids)


class Copycat:
    """A reader that looks for the last bytes earlier in what it has read, up to `reach` back, and gives what
    followed."""

    vocab_size = 256

    def __init__(self, reach=10**9, config=None):
        self.reach, self.config = reach, config

    start = Seen

    def check_room(self, num_tokens):
        pass

    def read(self, ids, cache, *, all_logits=False, output_surprise=False):
        ids = cache.ids = ids if cache.ids is None else torch.cat([cache.ids, ids], 1)
        logits = torch.zeros(len(ids), 1, 256)
        for row, logit in zip(ids, logits, strict=True):
            text = bytes(row.tolist())
            for size in range(16, 3, -1):
                found = text.rfind(text[-size:], max(len(text) - self.reach, 0), len(text) - 1)
                if found >= 0:
                    logit[0, text[found + size]] = 1
                    break
        return Read(logits)


def table(model, task, lengths=(700,), depths=(0.0, 0.5, 1.0), **options):
    return needle_table(
        model, byte_tokenizer(), task, lengths, depths, haystack=TEXT, samples=5, batch_size=2, **options
    )


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.is_story])
def test_who_copies_what_follows_is_right_everywhere(task):
    cells = table(Copycat(), task, (300, 1500), piece_length=256)
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in (300, 1500) for d in (0.0, 0.5, 1.0)]
    assert all(c.accuracy == 1 and c.samples == 5 and c.num_bytes == c.length for c in cells)
    # A reader of whatever kind keeps all: the needle is never beyond its attention.
    assert not any(c.beyond_attention for c in cells)


@pytest.mark.parametrize("task", ["passkey", "number"])
def test_who_forgets_is_right_where_the_needle_is_near(task):
    near, far = table(Copycat(reach=300), task, (1500,), (1.0, 0.2))
    assert near.accuracy == 1 and far.accuracy == 0
    assert near.low > 0.5 and far.high < 0.5


def test_several_needles_questions_of_many_lengths_and_all_answers_count():
    (cell,) = table(Copycat(), "word", num_keys=4, num_questions=3)
    assert cell.depth is None and cell.accuracy == 1
    # Of two values the copycat gives the newer one alone.
    (cell,) = table(Copycat(), "number", num_values=2)
    assert cell.accuracy == 0


def test_out_of_attentions_reach():
    def config(variant):
        return TitansConfig.from_preset("tiny", variant=variant)

    assert [attention_reach(config(v)) for v in ("lmm", "mac", "mag", "mal")] == [0, 64, 192, 192]
    assert attention_reach(config("transformer")) == float("inf")
    near, far = table(Copycat(config=config("mag")), "number", (1500,), (1.0, 0.2))
    assert not near.beyond_attention and far.beyond_attention


def test_wilson():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(task="needle"), "task='needle': choose one of passkey, number, word, uuid, qa1"),
        (dict(lengths=(50,)), "the needles alone take"),
        (dict(depths=(1.5,)), r"depths=\[1.5\]: give numbers from 0 to 1"),
        (dict(samples=0), "samples=0: give a whole number"),
        (dict(haystack=None), "task='number' hides its needle in a text: give a haystack"),
        (dict(haystack=""), "the haystack is empty"),
    ],
)
def test_refusals(change, sentence):
    wanted = dict(task="number", lengths=(700,), haystack=TEXT) | change
    with pytest.raises(ValueError, match=sentence):
        needle_table(Copycat(), byte_tokenizer(), **wanted)


def test_a_picture(tmp_path):
    draw_heat_maps(tmp_path / "map.png", {"number": table(Copycat(), "number")}, "copycat")
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.parametrize("task", ["passkey", "qa2"])
def test_any_causal_model_of_transformers_is_asked(task):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=4096, **sizes)).eval()
    cells = table(model, task, (500,), (0.5,), piece_length=200)
    assert len(cells) == 1 and cells[0].accuracy == 0 and not cells[0].beyond_attention


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("0502444", True),
        (" 0502444. And", True),
        ("0502444\n", True),
        ("05024444", False),
        ("0502444a", False),
        ("050244", False),
        ("It is 0502444", False),
    ],
)
def test_an_answer_is_the_value_and_not_the_beginning_of_another(text, right):
    assert is_answer(text, "0502444") is right
