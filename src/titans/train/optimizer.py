"""AdamW and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to.

    These are the matrices that project activations and the gates' dependence on the token. Decay towards zero
    makes no sense for the others: embeddings (and a head tied to them), persistent tokens, the memory's
    initial weights, whose row lengths matter, norms, convolution taps, and biases, which set the gates'
    half-lives.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    projections = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in embeddings
        and (
            id(parameter) in projections
            or name.endswith(("gate_weight", "gate_key_weight", "gate_up_weight", "gate_down_weight"))
        )
    ]


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in a group that decays and one that does not."""
    decayed = set(decayed_parameters(model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def make_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_ratio: float
) -> LambdaLR:
    """The learning rate of every step, as `rate_factor` has it."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, steps, warmup_steps, min_ratio))


def rate_factor(step: int, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """A share of the peak: a linear warm-up, then half a cosine down to `min_ratio` at the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min((step - warmup_steps) / max(steps - 1 - warmup_steps, 1), 1.0)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2
