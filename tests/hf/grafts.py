"""Small random models of many families, and grafts of them whose blocks are short."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from titans import graft
from titans.hf import GraftedForCausalLM

VOCAB, WINDOW, BLOCK, SINKS, CHUNK = 53, 12, 6, 2, 5
# What cutting a text changes in float64; Gemma 2's attention has a softmax in float32.
SAME = {"gemma2": 1e-5}
LEARNING: dict[str, Any] = dict(chunk_size=CHUNK, step=0.9, momentum=0.3, half_life=40.0, warm_up=9)
INSIDE: dict[str, Any] = dict(layers=[0, 1], num_heads=2, head_dim=8, chunk_size=4, half_lives=(20.0, 50.0))
RECALLING: dict[str, Any] = dict(layers=(0, 1), num_ordered=2, num_topic=3, feature_size=20, half_life=30.0)
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, eos_token_id=None, bos_token_id=None, pad_token_id=None,
)  # fmt: skip
_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)

# With a second base of rotation for local layers, parts of heads or whole layers without positions, planes of
# neighbouring features, scaled logits, sliding windows shorter than a block and longer.
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "gemma2": Gemma2Config(**_SIZES, sliding_window=9),
    "gemma3": Gemma3TextConfig(
        **_SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": MistralConfig(**_SIZES, sliding_window=7),
    "yarn": LlamaConfig(**_SIZES, rope_parameters=_YARN),
    "smollm3": SmolLM3Config(**{**_SIZES, "num_hidden_layers": 4}),
    "cohere": CohereConfig(**_SIZES),
    "granite": GraniteConfig(**_SIZES, logits_scaling=2.0),
    "glm": GlmConfig(**_SIZES),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        rotary_pct=0.25, eos_token_id=None, bos_token_id=None,
    ),
}  # fmt: skip


def small_base(family: str | PreTrainedConfig = "llama", seed: int = 0) -> PreTrainedModel:
    """In float64, with weights that give answers of some size."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        config = FAMILIES[family] if isinstance(family, str) else family
        model: PreTrainedModel = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.double().eval()


def small_graft(family: str = "llama", **options: Any) -> GraftedForCausalLM:
    """With an adaptation that changes answers visibly, unless told otherwise; with other memories that do, if
    asked for."""
    model = graft(small_base(family), **{"window": WINDOW, "sinks": SINKS, "adaptation": LEARNING, **options})
    if (association := model.association) is not None:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in association.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            association.write_gate.bias[0] += 3.0
            association.mixing_gate.bias += 4.0
            association.trained.fill_(1.0)
    if (residual := model.residual) is not None:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2)
            for name, parameter in residual.named_parameters():
                parameter += (0.5 if "output" in name else 0.1) * torch.randn_like(parameter)
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """In one call, without a cache."""
    return model(ids, use_cache=False, **options).logits


@torch.no_grad()
def read_on(model: GraftedForCausalLM, pieces: Any, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of all pieces, and the cache."""
    cache = model.empty_cache() if cache is None else cache
    found = [model(piece, past_key_values=cache).logits for piece in pieces]
    return torch.cat(found, 1), cache


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape and expected.isfinite().all()
    off = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert off <= tolerance, f"off by {off:.3g}, allowed {tolerance:.3g}"


class ExactRotary(nn.Module):
    """Llama's rotary positions in float64; the library's own are in float32, whatever the model."""

    def __init__(self, head_dim: int, base: float = 1e4) -> None:
        super().__init__()
        self.frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
