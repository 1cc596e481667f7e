"""RecurrentGemma (Griffin): two recurrent layers, then one of windowed attention, and so on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, RecurrentGemmaConfig

from titans.baselines.systems.system import Sizes, System
from titans.stream.causal import Read
from titans.stream.model import reading


def recurrent_gemma(sizes: Sizes) -> RecurrentGemmaConfig:
    """arXiv 2402.19427."""
    return RecurrentGemmaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        # It halves this.
        intermediate_size=2 * sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        lru_width=sizes.width,
        attention_window_size=sizes.window,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


class _Ids:
    """What a `RereadingReader` has read: the ids themselves. config: of its model."""

    def __init__(self, config: Any) -> None:
        self.config, self.ids = config, torch.zeros(0, 0, dtype=torch.int64)

    @property
    def num_columns(self) -> int:
        return self.ids.shape[1]

    @property
    def batch_size(self) -> int:
        return len(self.ids) or -1

    def nbytes(self) -> int:
        """Bytes of the states that the model itself would keep, in float32."""
        c, kinds = self.config, self.config.layers_block_type
        attention = sum("attention" in kind and "linear" not in kind for kind in kinds)
        keys_values = 2 * min(c.attention_window_size, self.num_columns) * c.hidden_size
        # The recurrence's, and the convolution's last tokens.
        recurrent = c.lru_width * c.conv1d_width
        numbers = attention * keys_values + (len(kinds) - attention) * recurrent
        return 4 * len(self.ids) * numbers

    def clone(self) -> _Ids:
        other = _Ids(self.config)
        other.ids = self.ids
        return other

    def batch_select_indices(self, indices: Tensor) -> None:
        self.ids = self.ids[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids = self.ids.repeat_interleave(repeats, 0)


class RereadingReader:
    """Reads a text from its beginning in every call.

    For a model of transformers that keeps its state in its modules and returns no cache: how a text is cut
    changes nothing, at a cost that grows with the number of calls.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocab_size: int = model.config.vocab_size

    def start(self) -> Any:
        """An empty cache."""
        return _Ids(self.model.config)

    def check_room(self, num_tokens: int) -> None:
        """Any number of tokens."""

    def read(
        self, ids: Tensor, cache: Any, *, all_logits: bool = False, output_surprise: bool = False
    ) -> Read:
        """Read on: ids (rows, n) int64, all of them real tokens; the cache is changed in place."""
        count = ids.shape[1]
        if not count:
            return Read(None)
        ids = ids.cpu()
        cache.ids = torch.cat([cache.ids, ids], 1) if cache.num_columns else ids
        with reading(self.model):
            output = self.model(
                input_ids=cache.ids.to(self.model.device),
                use_cache=False,
                logits_to_keep=count if all_logits else 1,
            )
        return Read(output.logits)


SYSTEMS: dict[str, System] = {
    "recurrent-gemma": System(
        "RecurrentGemma",
        "arXiv 2402.19427; RecurrentGemmaForCausalLM of transformers",
        recurrent_gemma,
        reader=RereadingReader,
    )
}
