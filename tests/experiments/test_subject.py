"""Experiments change the gates of a model's memories in a model of their own, which shares the weights."""

from __future__ import annotations

import torch

from titans.data import byte_tokenizer
from titans.experiments.subject import Subject, only_where
from titans.hf import TitansConfig, TitansForCausalLM

TEXTS = [b"There and back again. " * 2, b"In a hole in the ground there lived a hobbit"]


def fast_weights(subject: Subject) -> list[torch.Tensor]:
    """Of each memory the first layer's after both texts, (texts, heads, out, in)."""
    return [state.memory.weights[0] for state in subject.read(TEXTS).states]


def test_gates_change_in_a_copy_that_shares_the_weights():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, intermediate_size=32, num_hidden_layers=2)
    config = TitansConfig.from_preset("tiny", variant="lmm", num_persistent_tokens=0, **sizes)
    subject = Subject(TitansForCausalLM(config).eval(), byte_tokenizer(), 2)
    plain = fast_weights(subject)

    changed = subject.with_gates([1.0, 0.0])
    first, second = fast_weights(changed)
    assert torch.equal(first, plain[0])
    assert not second.any() and plain[1].any()
    pairs = zip(changed.model.parameters(), subject.model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)

    first_text_alone = torch.tensor([True, False])[:, None, None].expand(2, len(TEXTS[0]), 2)
    written, _ = fast_weights(subject.with_gates([only_where(first_text_alone), 1.0]))
    assert torch.equal(written[0], plain[0][0]) and not written[1].any()

    kept, _ = fast_weights(subject.with_gates([1.0, 1.0], [0.0, 1.0]))
    assert not torch.equal(kept, plain[0])
    for before, after in zip(plain, fast_weights(subject), strict=True):
        assert torch.equal(before, after)
