"""A fact hidden in a text: every question is answered, and only the right answer counts."""

from __future__ import annotations

import torch

from titans.data import byte_tokenizer
from titans.experiments.hidden_fact import Reply, hide_and_ask
from titans.hf import TitansConfig, TitansForCausalLM


def test_the_text_is_read_with_the_fact_in_it_and_the_answer_judged():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, intermediate_size=32, num_hidden_layers=1)
    model = TitansForCausalLM(TitansConfig.from_preset("tiny", variant="lmm", **sizes)).eval()
    text = b"There and back again. " * 200
    read = []
    found = hide_and_ask(model, byte_tokenizer(), text, (100, 3000), progress=read.append)
    assert read[-1] == 3000 and [reply.num_bytes for reply in found.replies] == [100, 3000]
    assert found.state_bytes > 1000 and found.seconds > 0 and found.answer in found.statement
    assert all(reply.answer and not found.is_right(reply) for reply in found.replies)
    assert found.is_right(Reply(1, f" {found.answer}. And"))
    assert not found.is_right(Reply(1, f"1{found.answer}"))
    # A question changes nothing for the reader.
    assert hide_and_ask(model, byte_tokenizer(), text, (3000,)).replies == found.replies[1:]
    other = hide_and_ask(model, byte_tokenizer(), text, (500,), task="word", seed=1)
    assert other.answer != found.answer and other.question.endswith("is:")
