"""Keys of an association: features of the last words and of a model's states, of length below 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.memory.features import SOFTNESS

# Weights of the words at first: each counts so much less than the next one.
_ORDER_FADING, _TOPIC_FADING = 0.8, 0.95
# By how many places the code of a word is turned for each word after it, so that the same word has another
# direction at another distance.
_TURN = 61
# For both halves of the features: the sizes of order, topic and states in their arguments at first. The
# larger they are, the more the features of two keys differ. Places inside a number differ in order alone.
_HALVES = ((3.7, 1.4, 0.0), (0.0, 1.8, 0.9))
# The log of a salience lies between −8 and 8.
_MOST_SALIENT = 8.0


class Salience(nn.Module):
    """How much a word counts as topic: log salience = c · [states ; code], c being 0 at first."""

    def __init__(self, hidden_size: int, num_states: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, (num_states + 1) * hidden_size))

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        """log salience (batch, time).

        states: (batch, time, num_states, hidden) and codes: (batch, time, hidden), unit vectors.
        """
        seen = torch.cat([states.flatten(2), codes], -1) * codes.shape[-1] ** 0.5
        return F.linear(seen, self.weight.to(seen.dtype))[..., 0].clamp(-_MOST_SALIENT, _MOST_SALIENT)


class KeyMap(nn.Module):
    """φ_t = h / √(‖h‖² + 0.01 · feature_size), with h = sin(P x_t) and

        x_t = [unit(Σ_j a_j T^j v_{t−j}) ; unit(Σ_j b_j e^{m_{t−j}} v_{t−j}) ; s_1 ; s_2 ; …].

    v_{t−j} are the codes of the last words, j from 0 on, T turns a vector cyclically by 61 places, m is the
    log salience of each, and s_l are unit vectors of the model's states at token t. The first part
    distinguishes the places inside a name or number, the second says what is spoken of, and the states are
    similar where the same is said in other words. P, a and b are learned. ‖φ‖ < 1, which keeps the delta rule
    stable at any step size up to 1.

    Args:
        num_ordered, num_topic: how many words the two sums have.
        num_states: how many states.
    """

    def __init__(
        self, hidden_size: int, num_ordered: int, num_topic: int, num_states: int, feature_size: int
    ) -> None:
        super().__init__()
        self.hidden_size, self.feature_size = hidden_size, feature_size
        self.num_recent = max(num_ordered, num_topic)
        self.weight = nn.Parameter(torch.empty(feature_size, (2 + num_states) * hidden_size))
        self.order_weights = nn.Parameter(torch.empty(num_ordered))
        self.topic_weights = nn.Parameter(torch.empty(num_topic))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.weight.normal_(generator=generator)
        cut, states = self.feature_size // 2, self.weight.shape[1] // self.hidden_size - 2
        halves = self.weight.tensor_split([cut])
        for rows, (order, topic, state) in zip(halves, _HALVES, strict=True):
            sizes = torch.tensor([order, topic, *[state / max(states, 1) ** 0.5] * states]).to(rows)
            rows *= sizes.repeat_interleave(self.hidden_size)
        for weights, fading in ((self.order_weights, _ORDER_FADING), (self.topic_weights, _TOPIC_FADING)):
            weights.copy_(fading ** torch.arange(len(weights)))

    def forward(self, codes: Tensor, salience: Tensor, states: Tensor) -> Tensor:
        """Keys of the last `time` words.

        Args:
            codes: (batch, num_recent − 1 + time, hidden). salience: its log, (batch, num_recent − 1 + time).
            states: (batch, time, num_states, hidden).

        Returns (batch, time, feature_size).
        """
        dtype, time, first = states.dtype, states.shape[1], self.num_recent - 1
        order = topic = torch.zeros_like(codes[:, first:])
        for back, weight in enumerate(self.order_weights.to(dtype)):
            order = order + weight * codes[:, first - back : first - back + time].roll(_TURN * back, -1)
        salient = salience.exp()[..., None] * codes
        for back, weight in enumerate(self.topic_weights.to(dtype)):
            topic = topic + weight * salient[:, first - back : first - back + time]
        x = torch.cat([F.normalize(order, dim=-1), F.normalize(topic, dim=-1), states.flatten(2)], -1)
        h = torch.sin(x @ self.weight.to(dtype).mT)
        return h * torch.rsqrt(h.square().sum(-1, keepdim=True) + SOFTNESS * self.feature_size)
