"""What a run needs before it starts: parameters, memory of each device, operations and hours.

The model is built without storage, so a plan of any size takes a second. Weights, gradients, optimizer and
state are exact; operations and activations are estimates, for which the functions below say what they count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from titans.data import load_tokenizer
from titans.hf import TitansConfig, TitansForCausalLM
from titans.train.model import model_config
from titans.train.settings import TrainSettings

_ADAM_AVERAGES = 2
_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    state_bytes: what one row carries. weights, gradients, optimizer, activations: bytes on each device.
    tokens: read in the whole run, padding included. operations_per_token: forward and backward, a
    multiply-add counted as two. hours: on all devices together, None without a rate.
    """

    parameters: int
    state_bytes: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    operations_per_token: float
    devices: int
    hours: float | None

    @property
    def bytes_per_device(self) -> int:
        """The sum of what each device holds."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        memory = ", ".join(f"{name} {getattr(self, name) / _GB:.2f}" for name in parts)
        lines = [
            f"{self.parameters / 1e6:.1f} M parameters, state {self.state_bytes / 1e6:.2f} MB a row",
            f"each of {self.devices} devices: {self.bytes_per_device / _GB:.2f} GB ({memory} (estimate))",
            f"{self.tokens / 1e9:.3f} G tokens, {self.operations_per_token / 1e9:.2f} G operations a token "
            "(estimate)",
        ]
        if self.hours is None:
            lines.append("hours: give --rate TOKENS_PER_SECOND of a device, or --flops OPERATIONS_PER_SECOND")
        else:
            lines.append(f"{self.hours:,.1f} hours on {self.devices} devices, without evaluations and stops")
        return "\n".join(lines)


def plan(
    settings: TrainSettings, devices: int = 1, rate: float | None = None, flops: float | None = None
) -> Plan:
    """The plan of a run of a Titans model.

    Args:
        devices: how many, one process each.
        rate: tokens per second that one device trains with, as `titans bench` or a short run measures it.
        flops: in place of it, operations per second that one device reaches in such a step.

    Raises:
        ValueError: for settings that no run can have, other models, or numbers that are not above 0.
    """
    for name, value in (("devices", devices), ("rate", rate), ("flops", flops)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: give a number above 0")
    if rate is not None and flops is not None:
        raise ValueError(f"rate={rate} and flops={flops}: give one of them")
    if settings.batch_size % devices:
        raise ValueError(
            f"batch_size={settings.batch_size} with {devices} devices: give a multiple of {devices}"
        )
    settings.check()
    config = model_config(settings, _vocab_size(settings))
    if not isinstance(config, TitansConfig):
        raise ValueError(f"model={settings.model!r}: only Titans models can be planned; leave it out")
    with torch.device("meta"):
        model = TitansForCausalLM(config)
        state_bytes = _state_bytes(config)
    parameters = sum(p.numel() for p in model.parameters())
    parts = devices if settings.parallel == "fsdp" else 1
    gathered = 0 if parts == 1 else 4 * _largest_block(model)
    operations = operations_per_token(model, config, settings.sequence_length)
    tokens = settings.steps * settings.batch_size * settings.sequence_length
    if rate is None and flops is not None:
        rate = flops / operations
    return Plan(
        parameters=parameters,
        state_bytes=state_bytes,
        weights=4 * parameters // parts + gathered,
        gradients=4 * parameters // parts + gathered,
        optimizer=_ADAM_AVERAGES * 4 * parameters // parts,
        activations=activation_bytes(config, settings, settings.batch_size // devices),
        tokens=tokens,
        operations_per_token=operations,
        devices=devices,
        hours=None if rate is None else tokens / (rate * devices) / 3600,
    )


def operations_per_token(model: nn.Module, config: TitansConfig, length: int) -> float:
    """An estimate: three times those of the forward pass, which are

    - two for each weight of a linear layer, the head included;
    - four · width for each token that attention sees on average: in a window or segment, and persistent ones;
    - of a memory, for each fast weight: reading from weights and momentum, the gradient, and the update of
      both, ten together; and within a chunk of C tokens six · C · width for each fast matrix.
    """
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    width = config.num_attention_heads * config.head_dim
    span = {"transformer": length, "mac": config.segment_length, "lmm": 0, "hope": 0}.get(
        config.variant, config.sliding_window
    )
    span = min(span, length)
    seen = 0.0 if not span else span - span**2 / (2 * length) if config.variant != "mac" else float(span)
    attention = 4 * width * (seen + (config.num_persistent_tokens if span else 0))
    memory = 0.0
    if config.has_memory:
        depth, inner = config.memory_depth, config.head_dim * config.memory_expansion
        matrices = (
            [config.head_dim**2]
            if depth == 1
            else [config.head_dim * inner, *[inner**2] * (depth - 2), inner * config.head_dim]
        )
        memory = config.num_attention_heads * 10.0 * sum(matrices) + 6.0 * config.chunk_size * width * depth
    return 3 * (linear + config.num_hidden_layers * (attention + memory))


def activation_bytes(config: TitansConfig, settings: TrainSettings, rows: int) -> int:
    """An estimate of what is kept for the backward pass: for each token and layer 16 vectors of the hidden
    size (norms, projections, attention), 12 more with a memory, and three of the feed-forward's width; with
    gradient checkpointing one vector for each layer and all of these for one. The logits, and their
    gradient, are in float32. Scores of attention are not kept; states that a memory keeps between groups of
    chunks are not counted.
    """
    size = 2 if settings.dtype == "bfloat16" else 4
    hidden = 16 + (12 if config.has_memory else 0)
    layer = size * (hidden * config.hidden_size + 3 * config.intermediate_size)
    layers = config.num_hidden_layers
    kept = layer + layers * size * config.hidden_size if settings.gradient_checkpointing else layers * layer
    return rows * settings.sequence_length * (kept + 2 * 4 * config.vocab_size)


def _vocab_size(settings: TrainSettings) -> int:
    """Of the tokenizer, if it is here; else the preset's."""
    if settings.tokenizer == "bytes" or Path(settings.tokenizer).exists():
        return len(load_tokenizer(settings.tokenizer))
    return TitansConfig.vocab_size


def _state_bytes(config: TitansConfig) -> int:
    # Persistent tokens shape no state, and reading them needs real weights.
    fields: dict[str, Any] = {**config.to_dict(), "num_persistent_tokens": 0, "num_hidden_layers": 1}
    fields["layer_types"] = None
    layer = TitansForCausalLM(TitansConfig.from_dict(fields)).model.layers[0]
    leaves = pytree.tree_leaves(layer.mixer.initial_state(1))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return config.num_hidden_layers * sum(t.numel() * t.element_size() for t in tensors)


def _largest_block(model: TitansForCausalLM) -> int:
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
