"""A small base that reads bytes, and features of it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from titans.data import Document, byte_tokenizer
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.window import Window
from titans.nn.association import Association
from titans.train.graft.features import FeaturePlan
from titans.train.graft.settings import FeatureSettings

HIDDEN, LAYERS = 16, (0, 1)
SETTINGS = FeatureSettings(
    episodes=48, block_tokens=192, facts=2, held_out_episodes=8, text_tokens=6000, document_tokens=900
)


def small_base(seed=0) -> LlamaForCausalLM:
    """A Llama of two layers with random weights that give answers of some size."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def text_of(seed: int, count: int = 1200) -> bytes:
    """Words of small letters, and lines."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (count,), generator=generator).tolist()
    spaces = torch.randint(2, 9, (count,), generator=generator).tolist()
    words, at = [], 0
    while at < count - 10:
        words.append(bytes(letters[at : at + spaces[at] + 2]))
        at += spaces[at] + 2
    return b" ".join(words) + b".\n"


def documents(first: int, count: int) -> list[Document]:
    return [Document(f"text-{seed}", text_of(seed)) for seed in range(first, first + count)]


def small_plan(model=None) -> FeaturePlan:
    base = WindowedBase(small_base() if model is None else model, Window(32, 2))
    return FeaturePlan(base, byte_tokenizer(), documents(0, 6), documents(100, 2), LAYERS, SETTINGS)


def small_association(base: WindowedBase) -> Association:
    association = Association(
        HIDDEN, 256, LAYERS, num_ordered=3, num_topic=8, feature_size=64, gate_hidden_size=8
    )
    association.set_head(base.head.weight)
    return association
