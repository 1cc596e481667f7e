"""Models on a CUDA device, for `gpu.py`: training, reading and decoding, compared with a transformer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_layers import milliseconds
from torch import Tensor

from titans.hf import TitansConfig, TitansForCausalLM
from titans.state import map_state
from titans.train.recorded import RecordedStep

# Local memories in chunks of 16 within shards that run side by side, and a global one in large chunks.
TNT = dict(chunk_size=2048, memory={"local_chunk_sizes": [16], "shard_length": 2048})
# What is trained: a name, a variant, changes of its configuration. The others are compared with the first.
TRAINED = (
    ("transformer", "transformer", {}),
    ("mag", "mag", {}),
    ("mag, TNT", "mag", TNT),
    ("lmm", "lmm", {}),
    ("mac", "mac", {}),
    ("mal", "mal", {}),
)
# Batch and tokens of a step; tokens after which one more is timed; and how many are read at a time.
TRAINED_SIZES = ((2, 2**12), (1, 2**15))
DECODED_BEHIND = (2**12, 2**17, 2**20)
PIECE = 2**14


def make(preset: str, variant: str, device: str, **changes: Any) -> TitansForCausalLM:
    torch.manual_seed(0)
    config = TitansConfig.from_preset(preset, **{"variant": variant, "memory_depth": 2, **changes})
    return TitansForCausalLM(config).to(device)


def tokens_of(model: TitansForCausalLM, batch: int, time_steps: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, time_steps), device=model.device)


def model_rows(deadline: float, preset: str = "170m", device: str = "cuda") -> Iterator[str]:
    """Tokens per second of a training step in bfloat16, and of the transformer with flash attention."""
    took: dict[tuple[str, int], float] = {}
    for batch, time_steps in TRAINED_SIZES:
        for name, variant, changes in TRAINED:
            if time.monotonic() > deadline:
                return
            model = make(preset, variant, device, **changes)
            ids = tokens_of(model, batch, time_steps)

            def step(model: TitansForCausalLM = model, ids: Tensor = ids) -> None:
                with torch.autocast(device, torch.bfloat16):
                    model(ids, labels=ids).loss.backward()
                model.zero_grad(set_to_none=True)

            torch.cuda.reset_peak_memory_stats()
            cells = "out of memory | – | –"
            try:
                took[name, time_steps] = milliseconds(step, 3)
                peak = torch.cuda.max_memory_allocated() / 2**30
                theirs = took.get((TRAINED[0][0], time_steps))
                times = f"{took[name, time_steps] / theirs:.2f}" if theirs else "–"
                rate = 1000 * ids.numel() / took[name, time_steps]
                cells = f"{rate:,.0f} | {times} | {peak:.1f} GiB"
            except torch.OutOfMemoryError:
                pass
            yield f"| {preset} {name} | {batch} × {time_steps} | {cells} |"
            del model, step
            torch.cuda.empty_cache()


@torch.no_grad()
def decoding_rows(deadline: float, preset: str = "170m", device: str = "cuda") -> Iterator[str]:
    """Milliseconds of a token after more and more of them, one row, bfloat16.

    The transformer's: a token after 64 others, and in each layer attention to that many keys, by
    the faster of two ways, without the cost of keeping them. The others have read as many random tokens.
    """
    model = make(preset, "transformer", device).to(torch.bfloat16).eval()
    config = model.config
    alone = token_milliseconds(model, read(model, None, 64))
    for variant in ("mag", "lmm"):
        reader = make(preset, variant, device).to(torch.bfloat16).eval()
        cache, seen = None, 0
        for length in DECODED_BEHIND:
            if time.monotonic() > deadline:
                return
            cache, seen = read(reader, cache, length - seen), length
            heads = (1, config.num_attention_heads, length, config.head_dim)
            keys = torch.randn(heads, device=device, dtype=torch.bfloat16)
            attended = attention_milliseconds(keys, torch.randn_like(keys))
            theirs = alone + config.num_hidden_layers * attended
            took = token_milliseconds(reader, cache)
            yield f"| {preset} {variant} | {length:,} | {took:.2f} | {theirs:.2f} | {theirs / took:.1f} |"


def read(model: TitansForCausalLM, cache: Any, count: int) -> Any:
    """The cache after `count` more random tokens, in pieces."""
    for begin in range(0, count, PIECE):
        ids = tokens_of(model, 1, min(PIECE, count - begin))
        cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def token_milliseconds(model: TitansForCausalLM, cache: Any) -> float:
    """Of one more token; the cache is left unchanged."""
    ids, cache = tokens_of(model, 1, 1), cache.clone()
    return milliseconds(lambda: model(ids, past_key_values=cache, use_cache=True), 16)


def attention_milliseconds(keys: Tensor, values: Tensor) -> float:
    """Of one query to all keys."""
    query = torch.randn_like(keys[:, :, :1])

    def by_hand() -> Tensor:
        return (query @ keys.mT).softmax(-1) @ values

    ways = (lambda: F.scaled_dot_product_attention(query, keys, values), by_hand)
    return min(milliseconds(way, 16) for way in ways)


def step_row(variant: str, batch: int, time_steps: int) -> str:
    """A tfloat32 training step of a tiny model, memory carried: not recorded, and recorded and replayed."""
    model = make("tiny", variant, "cuda")
    ids = tokens_of(model, batch, time_steps)
    states = tuple(layer.mixer.initial_state(batch) for layer in model.model.layers)
    states = map_state(Tensor.detach, states)

    def loss_of(inputs: dict[str, Tensor], states: Any) -> tuple[Tensor, Tensor, Any]:
        ids = inputs["ids"]
        output = model(ids, labels=ids, memory_states=states, return_memory_states=True)
        return output.loss, output.loss.detach(), map_state(Tensor.detach, output.memory_states)

    def gradients() -> list[Tensor]:
        return [p.grad for p in model.parameters() if p.grad is not None]

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        loss_of({"ids": ids}, states)[0].backward()
        return gradients()

    exact, took = step(), milliseconds(step, 1)
    began = time.perf_counter()
    recorded = RecordedStep(model, loss_of, {"ids": ids}, states)
    torch.cuda.synchronize()
    once = time.perf_counter() - began
    recorded({"ids": ids})
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients(), exact, strict=True))
    replayed = milliseconds(lambda: recorded({"ids": ids}), 3)
    return (
        f"| tiny {variant} | {batch} × {time_steps} | {ids.numel() / took * 1000:,.0f} | "
        f"{ids.numel() / replayed * 1000:,.0f} | {once:.1f} s | {error:.0e} |"
    )


def step_rows(deadline: float) -> Iterator[str]:
    """Rows of 2,048 tokens, as the models to try are trained."""
    for variant, batch in (("lmm", 8), ("lmm", 64), ("mag", 64), ("mac", 64)):
        if time.monotonic() > deadline:
            return
        yield step_row(variant, batch, 2048)
        torch.cuda.empty_cache()
