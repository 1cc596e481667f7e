"""A fact hidden in a text: what was read is told, and only the right answer is right."""

from __future__ import annotations

from dataclasses import replace

import torch

from titans.data import byte_tokenizer
from titans.experiments.hidden_fact import hide_and_ask
from titans.hf import TitansConfig, TitansForCausalLM


def test_the_text_is_read_with_the_fact_in_it_and_the_answer_judged():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, intermediate_size=32, num_hidden_layers=1)
    model = TitansForCausalLM(TitansConfig.from_preset("tiny", variant="lmm", **sizes)).eval()
    text = b"There and back again. " * 200
    read = []
    found = hide_and_ask(model, byte_tokenizer(), text, progress=read.append)
    assert read[-1] == len(text) + len(found.statement) + 1
    assert found.num_bytes == len(text) - 1005 and found.state_bytes > 1000 and found.seconds > 0
    assert found.answer in found.statement and len(found.told) > 0 and not found.is_right
    assert replace(found, told=f" {found.answer}. And").is_right
    assert not replace(found, told=f"1{found.answer}").is_right
    other = hide_and_ask(model, byte_tokenizer(), text[:1500], task="word", seed=1)
    assert other.answer != found.answer and other.question.endswith("is:")
