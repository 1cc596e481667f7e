"""Any causal LM of transformers as a reader."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from titans.hf.causal_cache import CausalCache, attention_reach
from titans.hf.state_file import StateFile
from titans.stream.model import reading, unwrapped

# Under these names models of transformers take their cache and give it back.
_CACHE_NAMES = ("past_key_values", "cache_params", "state")
# Model types that lose a part of what they have read when several tokens meet a filled cache.
_MIXER_OF_MAMBA_1 = "its Mamba-1 layers begin their recurrence anew in a call of several tokens"
_ONE_TOKEN_AT_A_TIME = {
    "mamba": _MIXER_OF_MAMBA_1,
    "falcon_mamba": _MIXER_OF_MAMBA_1,
    "jamba": _MIXER_OF_MAMBA_1,
    "zamba": _MIXER_OF_MAMBA_1,
    "minimax": "its lightning attention adds the past to the first block of a call only",
}
_TRIAL_LENGTH = 4
# The largest difference of a position's logits from those of one call, relative to their size. A state that
# is lost changes them by a tenth and more, the order of a sum in float32 by a ten-thousandth, in bfloat16 by
# a twentieth.
_ALLOWED, _ALLOWED_IN_HALF_PRECISION = 0.02, 0.25


@dataclass(frozen=True)
class Read:
    """What a reader returns for ids (rows, n).

    logits: (rows, 1 or n, vocab_size), of the last position or of all; None where n is 0.
    surprises: of each memory layer (rows, n, heads), where asked for; None for a model without a memory.
    """

    logits: Tensor | None
    surprises: Sequence[Tensor] | None = None


class CausalReader:
    """A causal LM of transformers with a cache: attention, recurrent or both.

    Its whole past with full attention, and so it grows with the text; constant with windows and recurrences.

    Pieces give the logits of one call up to the rounding of the model's own kernels. Two kinds are further
    away, by transformers' own doing: Zamba2 and Nemotron-H limit the step size of their recurrence in a call
    of several tokens only (logits of random models differ by some 1e-3); and models with a part that is
    computed in float32 whatever their precision (the recurrences of Mamba-2 and Qwen3-Next) agree to float32.
    Models that lose what they have read in a call of several tokens (Mamba-1 and its relatives) read one
    token per call after the first call. Rows are never padded: right padding enters the states of recurrent
    models. A short trial on the model itself, once, finds what else does not agree.

    Args:
        model: evaluated unchanged; its class is asked, never changed.

    Raises:
        ValueError: if the trial finds that no way of reading in pieces gives what one call gives.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.inner = model, unwrapped(model)
        self.name = type(self.inner).__name__
        config = self.inner.config
        self.config = config.get_text_config(decoder=True)
        self.vocab_size: int = self.config.vocab_size
        accepted = inspect.signature(self.inner.forward).parameters
        found = [name for name in _CACHE_NAMES if name in accepted]
        if not found or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} takes no cache ({' or '.join(_CACHE_NAMES[:2])}): a text is read in pieces by "
                "causal models that carry one"
            )
        self._cache_name = found[0]
        self._takes_positions = "position_ids" in accepted
        self._takes_mask = "attention_mask" in accepted
        self._keeps_logits = "logits_to_keep" in accepted
        if self.inner not in _TRIED:
            _TRIED[self.inner] = self._try_out()
        self._at_once = _TRIED[self.inner]

    @property
    def device(self) -> torch.device:
        return cast("torch.device", self.inner.device)

    @property
    def most_tokens(self) -> int | None:
        """How many tokens a text may have; None for any number."""
        return position_limit(self.config)

    def start(self) -> CausalCache:
        return CausalCache()

    def read(
        self, ids: Tensor, cache: CausalCache, *, all_logits: bool = False, output_surprise: bool = False
    ) -> Read:
        if not ids.shape[1]:
            return Read(None)
        self.check_room(cache.num_columns + ids.shape[1])
        ids = ids.to(self.device)
        one_by_one = not self._at_once and cache.num_columns
        found = []
        with reading(self.inner):
            for piece in ids.split(1 if one_by_one else ids.shape[1], 1):
                logits = self._call(piece, cache, all_logits)
                if all_logits or not found:
                    found.append(logits)
                else:
                    found[0] = logits
        return Read(torch.cat(found, 1))

    def read_one_each(self, ids: Tensor, cache: CausalCache, lengths: Sequence[int]) -> Tensor:
        """Read one token of each of several texts: ids (rows, 1), to a cache of `side_by_side`.

        lengths: how much each has read. Returns logits (rows, 1, vocab_size). See `can_read_side_by_side`.
        """
        self.check_room(max(lengths) + 1)
        have = torch.tensor(lengths, device=self.device)[:, None]
        mask = None
        if self._takes_mask and min(lengths) < cache.num_columns:
            columns = torch.arange(cache.num_columns + 1, device=self.device)
            mask = (columns >= cache.num_columns - have).long()
        with reading(self.inner):
            return self._call(
                ids.to(self.device), cache, False, have if self._takes_positions else None, mask
            )

    def can_read_side_by_side(self) -> bool:
        """Whether texts of different lengths may be read by `read_one_each`: found by a short trial, once."""
        if self.inner not in _TRIED_SIDE_BY_SIDE:
            _TRIED_SIDE_BY_SIDE[self.inner] = self._try_side_by_side()
        return _TRIED_SIDE_BY_SIDE[self.inner]

    def _try_side_by_side(self) -> bool:
        lengths, caches, expected = [_TRIAL_LENGTH - 2, _TRIAL_LENGTH], [], []
        ids = (7 * torch.arange(2 * _TRIAL_LENGTH, device=self.device) + 1).remainder(self.vocab_size)
        ids = ids.view(2, -1)
        more = ids[:, :2].flip(0)
        try:
            for row, length in enumerate(lengths):
                cache = self.start()
                self.read(ids[[row], :length], cache)
                caches.append(cache.clone())
                with reading(self.inner):
                    alone = [self._call(token, cache, False) for token in more[[row]].split(1, 1)]
                expected.append(torch.cat(alone, 1))
            together = CausalCache.side_by_side(caches)
            found = [
                self.read_one_each(more[:, [n]], together, [length + n for length in lengths])
                for n in range(more.shape[1])
            ]
            together.row(0, lengths[0] + more.shape[1])
        # What a model raises that was not made for this is of any kind.
        except (ValueError, RuntimeError, TypeError, AttributeError, LookupError):
            return False
        return not _difference(torch.cat(found, 1), torch.cat(expected))

    def check_room(self, num_tokens: int) -> None:
        limit = self.most_tokens
        if limit is not None and num_tokens > limit:
            raise ValueError(
                f"{self.name} has positions for {limit:,} tokens (max_position_embeddings), and this text "
                f"has {num_tokens:,}: read it in parts, each from its own beginning (context_length, where "
                "there is one), or raise max_position_embeddings in its config if it can read further"
            )

    def generate(self, start: Tensor, cache: CausalCache, **kwargs: Any) -> Any:
        """transformers' `generate` from start (rows, n) ids; the cache is changed."""
        settings = kwargs.get("generation_config") or self.inner.generation_config
        new = kwargs.get("max_new_tokens") or getattr(settings, "max_new_tokens", None)
        if new is not None:
            self.check_room(cache.num_columns + start.shape[1] + new - 1)
        with reading(self.inner):
            generate: Callable[..., Any] = _Continuation(self, cache).generate
            return generate(start.to(self.device), past_key_values=cache, use_cache=True, **kwargs)

    def save(self, cache: CausalCache, path: Path, about: dict[str, str]) -> None:
        """Write a cache to a file, with `about` in its header."""
        cache.save(path, self.inner.config, about)

    def load(self, file: StateFile) -> CausalCache:
        """The cache in a file, in this model's precision; ValueError where it is not this model's."""
        template = self.start()
        self.read(torch.zeros(1, 1, dtype=torch.int64), template)
        return CausalCache.from_file(file, self.inner.config, template)

    def _call(
        self,
        ids: Tensor,
        cache: CausalCache,
        all_logits: bool,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        begin, count = cache.num_columns, ids.shape[1]
        kwargs: dict[str, Any] = {} if cache.held is None else {self._cache_name: cache.held}
        if self._takes_positions:
            # Some models count from 0 in every call otherwise.
            if positions is None:
                positions = torch.arange(begin, begin + count, device=ids.device).expand(len(ids), -1)
            kwargs["position_ids"] = positions
        if mask is not None:
            kwargs["attention_mask"] = mask
        if self._keeps_logits:
            kwargs["logits_to_keep"] = 0 if all_logits else 1
        output = self.model(input_ids=ids, use_cache=True, **kwargs)
        held = getattr(output, self._cache_name, None)
        if held is None:
            raise ValueError(f"its output has no {self._cache_name} to read on from")
        cache.store(held, count)
        logits: Tensor = output.logits
        if logits.shape[1] not in (1, count):
            raise ValueError(f"it returns {logits.shape[1]} logits for {count} tokens")
        return logits if all_logits else logits[:, -1:]

    def _try_out(self) -> bool:
        """Whether several tokens may meet a filled cache; ValueError if not even one may."""
        limit = position_limit(self.config)
        if limit is not None and limit < 2 * _TRIAL_LENGTH:
            raise ValueError(
                f"{self.name} has max_position_embeddings={limit}: give it {2 * _TRIAL_LENGTH} or more"
            )
        ids = (7 * torch.arange(2 * _TRIAL_LENGTH, device=self.device) + 1).remainder(self.vocab_size)[None]
        with reading(self.inner):
            whole = self.model(input_ids=ids, use_cache=False).logits
            if reason := self._trial(ids, whole, [1] * _TRIAL_LENGTH):
                raise ValueError(f"{self.name} cannot read a text in pieces: {reason}")
            known = getattr(self.config, "model_type", "") in _ONE_TOKEN_AT_A_TIME
            return not known and not self._trial(ids, whole, [_TRIAL_LENGTH])

    def _trial(self, ids: Tensor, whole: Tensor, sizes: list[int]) -> str:
        """What is wrong with reading the second half of the ids in pieces of these sizes, or nothing."""
        cache = self.start()
        try:
            pieces = ids.split([_TRIAL_LENGTH, *sizes], 1)
            logits = torch.cat([self._call(piece, cache, all_logits=True) for piece in pieces], 1)
        # What a model raises that was not made for this is of any kind.
        except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        return _difference(logits, whole)


# Whether a model reads several tokens with a filled cache as it would in one call.
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Whether it reads a token of each of several texts of different lengths as it would read each alone.
_TRIED_SIDE_BY_SIDE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _difference(logits: Tensor, whole: Tensor) -> str:
    """What is wrong with logits (rows, time, vocab), or nothing."""
    if logits.shape != whole.shape:
        return f"its logits have shape {tuple(logits.shape)} in pieces and {tuple(whole.shape)} in one call"
    allowed = _ALLOWED_IN_HALF_PRECISION if whole.dtype in (torch.float16, torch.bfloat16) else _ALLOWED
    logits, whole = logits.double(), whole.double()
    size = (whole - whole.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-12)
    most = float(((logits - whole).norm(dim=-1) / size).max())
    return "" if most <= allowed else f"its logits differ by {most:.0%} from those of one call"


def position_limit(config: Any) -> int | None:
    """The number of positions a model has, or None where there is no last one.

    Rotary positions that are extended reach `factor` times as far as the original ones. They have no end
    where no layer looks back further than a window, because only distances count.
    """
    most = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    if not isinstance(most, int) or most < 1 or (rotary and attention_reach(config) < math.inf):
        return None
    kinds = [rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))]
    extended = [
        int(kind["factor"] * kind.get("original_max_position_embeddings", most))
        for kind in kinds
        if kind.get("rope_type", "default") != "default" and kind.get("factor")
    ]
    return max([most, *extended])


class _Continuation(GenerationMixin):
    """What `generate` needs to go on from any reader's cache: it is given the new ids alone."""

    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, reader: CausalReader, cache: CausalCache) -> None:
        self.reader, self.before = reader, cache.num_columns
        self.config = reader.inner.config
        self.generation_config = reader.inner.generation_config
        self.device, self.dtype = reader.device, reader.inner.dtype

    def can_generate(self) -> bool:
        return True

    def forward(
        self, input_ids: Tensor, past_key_values: CausalCache, use_cache: bool = True, **kwargs: Any
    ) -> ModelOutput:
        logits = self.reader.read(input_ids, past_key_values).logits
        return ModelOutput(logits=logits, past_key_values=past_key_values)

    __call__ = forward

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        past_key_values: CausalCache = kwargs["past_key_values"]
        new = input_ids[:, past_key_values.num_columns - self.before :]
        return {"input_ids": new, "past_key_values": past_key_values}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """It is given one."""

    def get_experts_implementation(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.reader.inner.get_experts_implementation())
