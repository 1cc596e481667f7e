"""Mamba and Mamba-2, from transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba

from titans.baselines.systems.system import Sizes, System

# The library's own function, also after `with_fast_gradient`.
REFERENCE = modeling_mamba.mamba_selective_scan
# They have no MLP, and twice as many layers in its place. Their inner size is the state's.
_COMMON: dict[str, Any] = dict(
    tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None, expand=2
)


def mamba(sizes: Sizes) -> MambaConfig:
    """arXiv 2312.00752."""
    return MambaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=2 * sizes.layers,
        state_size=sizes.inner,
        time_step_rank=-(-sizes.width // 16),
        **_COMMON,
    )


def mamba2(sizes: Sizes) -> Mamba2Config:
    """arXiv 2405.21060, with eight heads."""
    return Mamba2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=2 * sizes.layers,
        state_size=sizes.inner,
        num_heads=8,
        head_dim=sizes.width // 4,
        n_groups=1,
        chunk_size=64,
        **_COMMON,
    )


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    """transformers' reference of the selective scan, with a backward pass of linear time.

    The reference indexes the tokens of a tensor one by one, and the gradient of each index has the size of
    the whole (docs/notebook/2026-11-30-systems.md). Names and shapes are theirs:
    hidden_states, dt and z (batch, channels, time), A (channels, state), B and C (batch, state, time).
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    steps = dt.permute(2, 0, 1).unsqueeze(-1)
    kept = torch.exp(A * steps)
    written = steps * B.permute(2, 0, 1).unsqueeze(2) * hidden_states.permute(2, 0, 1).unsqueeze(-1)
    state = torch.zeros_like(written[0])
    states = []
    for keep, write in zip(kept.unbind(0), written.unbind(0), strict=True):
        state = keep * state + write
        states.append(state)
    read = torch.einsum("tbds,bst->bdt", torch.stack(states), C.to(state.dtype)).to(hidden_states.dtype)
    read = read + hidden_states * D[:, None]
    read = read if z is None else read * F.silu(z)
    return (read, state) if return_last_state else read


def with_fast_gradient(model: Any) -> None:
    """Have Mamba-1 use `selective_scan` where no kernel is installed."""
    if not torch.cuda.is_available():
        modeling_mamba.mamba_selective_scan = selective_scan


SYSTEMS: dict[str, System] = {
    "mamba": System(
        "Mamba",
        "arXiv 2312.00752; MambaForCausalLM of transformers",
        mamba,
        step=4,
        inner=lambda width: 16,
        inner_step=1,
        prepare=with_fast_gradient,
    ),
    "mamba2": System(
        "Mamba-2",
        "arXiv 2405.21060; Mamba2ForCausalLM of transformers",
        mamba2,
        step=4,
        inner=lambda width: 64,
        inner_step=1,
    ),
}
