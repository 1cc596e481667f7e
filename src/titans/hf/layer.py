"""One layer of a Titans model, and what transformers may do with models made of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from titans.hf.cache import TitansCache
from titans.hf.configuration import TitansConfig
from titans.hf.offload import all_parameters, execution_device, is_offloaded
from titans.nn.blocks import BLOCKS, BlockResult
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.mlp import SwiGLU, feed_forward
from titans.nn.norm import RMSNorm
from titans.state import where_rows


@dataclass
class TitansOutput(ModelOutput):
    """What the models return.

    loss: mean cross-entropy in nats, with `labels`. logits: (batch, time, vocab_size). last_hidden_state and
    hidden_states: (batch, time, hidden_size). past_key_values: the cache. memory_states: the blocks' states,
    inside the autograd graph. surprises: per memory layer (batch, time, heads), ‖M(k) − v‖² before the write.
    traces: per memory layer what it did at each token, 0 at padding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory_states: tuple[Any, ...] | None = None
    surprises: tuple[Tensor, ...] | None = None
    traces: tuple[MemoryTrace, ...] | None = None


class TitansLayer(GradientCheckpointingLayer):
    """One block of the chosen variant, then SwiGLU, each with a norm before it and a residual connection."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.mixer = BLOCKS[config.variant](config.block_settings())
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, state: Any, restart: Tensor | None, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size); state of this layer or None; rows (batch,) to start afresh or None.

        The initial state is made here, where sharded parameters have been gathered. The state is an argument
        and a result of the layer because gradient checkpointing drops any cache.
        """
        with all_parameters(self) if is_offloaded(self.mlp_norm) else nullcontext():
            if state is None:
                state = self.mixer.initial_state(x.shape[0])
            elif restart is not None:
                state = where_rows(restart, self.mixer.initial_state(x.shape[0]), state)
            x, state, trace = self.mixer(x, state, context)
            return BlockResult(feed_forward(self.mlp_norm, self.mlp, x), state, trace)

    def initial_state(self, batch: int) -> Any:
        """The state of rows that have read nothing, wherever the parameters are kept."""
        with all_parameters(self):
            return self.mixer.initial_state(batch)

    def fresh_context(self, state: Any) -> Any:
        """An initial state that keeps the memory alone, likewise."""
        with all_parameters(self):
            return self.mixer.fresh_context(state)


class TitansPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what the library may and may not do with these models."""

    config: TitansConfig
    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_sdpa = True

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where an offloaded model computes, not where its parameters are kept."""
        return execution_device(self.get_input_embeddings()) or super().device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint has filled, and nothing else."""
        if all(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
            return
        # All of them: a module may set what its children hold, too.
        loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif isinstance(persistent := getattr(module, "persistent", None), nn.Parameter):
            nn.init.normal_(persistent)
        for parameter, value in loaded:
            parameter.copy_(value)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        use_reentrant: bool = False,
        **kwargs: Any,
    ) -> None:
        """Turn on gradient checkpointing, of the non-re-entrant kind.

        Raises:
            ValueError: for use_reentrant=True, whose gradients through a carried state are silently wrong.
        """
        if use_reentrant or (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True gives wrong gradients through the memory's state: pass "
                "use_reentrant=False"
            )
        self._activation_checkpointing_enable(
            {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}, **kwargs
        )
