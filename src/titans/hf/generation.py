"""`generate` for models with a `StateCache`: caches that are filled already, and padding anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationConfig, StoppingCriteriaList

from titans.hf.cache import TitansCache
from titans.hf.configuration import TitansConfig
from titans.hf.keywords import check_keywords
from titans.hf.state_cache import StateCache
from titans.nn.packing import take

PREFILL_LENGTH = 2048
_PROMPTS = ("input_ids", "inputs_embeds")


def note_ended_rows(
    criteria: StoppingCriteriaList, generation_config: GenerationConfig, cache: StateCache | None
) -> StoppingCriteriaList:
    """The same criteria, noting in the cache which rows have ended: what follows in these is padding.

    Without an end token rows are not padded; and beams are no rows.
    """
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    if cache is None or not pads or (generation_config.num_beams or 1) > 1:
        return criteria
    return _Noting(criteria, cache)


class _Noting(StoppingCriteriaList):  # type: ignore[misc]
    def __init__(self, criteria: StoppingCriteriaList, cache: StateCache) -> None:
        super().__init__(criteria)
        self.cache = cache
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)
        # The last token of a row is still a real one.
        self.cache.ended_rows, before = self.ended, self.ended
        self.ended = ended if before is None else before | ended
        return ended


def padding_first(mask: Tensor, begin: int) -> Tensor | None:
    """The order (rows, time) of columns in which each row ends with a real token; None if they do already.

    Args:
        mask: (rows, time), 0 for padding.
        begin: how many columns keep their place.

    Raises:
        ValueError: for a row without a real token.
    """
    real = mask[:, begin:].bool()
    if not bool(real.any(1).all()):
        row = int((~real.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask hides every token of row {row}: there is none to continue with")
    if bool(real[:, -1].all()):
        return None
    kept = torch.arange(begin, device=mask.device).expand(len(mask), -1)
    return torch.cat([kept, begin + torch.argsort(real.long(), dim=1, stable=True)], 1)


def with_prompt(found: Any, prompt: Tensor) -> Any:
    """What `generate` returned for a prompt in another order, the prompt as it was given."""
    sequences = found if isinstance(found, Tensor) else found.sequences
    repeats = len(sequences) // len(prompt)
    sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(repeats, 0)
    return found


class StateGenerationMixin(GenerationMixin):
    """What a model with a `StateCache` does differently in transformers' `generate`."""

    def empty_cache(self) -> StateCache:
        """A cache of this model that has read nothing."""
        raise NotImplementedError

    def check_cache(self, cache: Any) -> None:
        """Raise ValueError for a cache of another kind, or of another model."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The one hook through which our cache, chunked prefill and beam search work together."""
        _refuse_cache_kind(generation_config.cache_implementation)
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.empty_cache()
        vars(generation_config)["_titans_cache"] = cache = model_kwargs["past_key_values"]
        cache.ended_rows = None
        if generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None:
            generation_config.prefill_chunk_size = PREFILL_LENGTH

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        criteria: Callable[..., StoppingCriteriaList] = super()._get_stopping_criteria
        cache = vars(generation_config).pop("_titans_cache", None)
        return note_ended_rows(criteria(generation_config, *args, **kwargs), generation_config, cache)

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What the library prepares; the padding of rows that have ended is masked."""
        prepare: Callable[..., Any] = super().prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and cache.ended_rows is not None and bool(cache.ended_rows.any()):
            inputs["attention_mask"] = (~cache.ended_rows).long().unsqueeze(1)
        return inputs

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; with a filled `past_key_values` the ids given are the new ones.

        The library would need an attention mask over everything ever seen to continue, and drops tokens
        silently without one. Here new ids alone are enough, with a mask of their own, over seen + new, or
        none; the whole text again, with a mask, is recognised by the ids that the cache has seen last
        (embeddings by their number). Without a mask every id is a real token, the padding id too. With one,
        padding may stand anywhere, also at the right. What the library pads after a row's end is not read.

        Raises:
            ValueError: for a mask of any other length, nothing to continue with in some row, a cache of
                another kind or configuration, or a cache that is not to be used.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        prompt = kwargs.get("inputs_embeds")
        if prompt is None:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
        generate: Callable[..., Any] = super().generate
        check_keywords({"output_attentions": kwargs.get("output_attentions")}, None)
        if cache is not None:
            self.check_cache(cache)
            if kwargs.get("use_cache") is False:
                raise ValueError("use_cache=False with past_key_values: leave one of them out")
            # Whatever the configuration says: without it the library would read all ids again at every token.
            kwargs["use_cache"] = True
        if prompt is None:
            return generate(inputs, *args, **kwargs)
        rows, given = prompt.shape[:2]
        seen = 0 if cache is None else cache.num_columns
        if not given:
            raise ValueError("no tokens are given to continue with: give the last one, or more")
        if mask is None:
            # The library would take a token equal to the padding id for padding.
            mask = torch.ones(rows, given, dtype=torch.int64, device=prompt.device)
            whole_text_again = False
        else:
            whole_text_again = mask.shape[-1] == given and self._repeats_what_was_seen(cache, prompt)
        if tuple(mask.shape) not in {(rows, given), (rows, seen + given)}:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: give ({rows}, {given}), or "
                f"({rows}, {seen + given}) with everything seen"
            )
        mask = mask[:, mask.shape[1] - given :]
        order = padding_first(mask, seen if whole_text_again else 0)
        if order is not None:
            # The library takes the last column for the last token.
            mask = mask.gather(1, order)
            inputs = None if inputs is None else take(inputs, order)
            kwargs |= {name: take(kwargs[name], order) for name in _PROMPTS if kwargs.get(name) is not None}
        kwargs["attention_mask"] = mask
        fresh = cache is not None and not whole_text_again
        if cache is not None:
            cache.begin_call(fresh)
        try:
            found = generate(inputs, *args, **kwargs)
        finally:
            if cache is not None:
                cache.begin_call(fresh=False)
        return found if order is None or prompt.is_floating_point() else with_prompt(found, prompt)

    @staticmethod
    def _repeats_what_was_seen(cache: StateCache | None, prompt: Tensor) -> bool:
        if cache is None or prompt.shape[1] <= cache.num_columns:
            return False
        # Embeddings cannot be compared with ids: there the library's convention decides.
        return prompt.is_floating_point() or cache.is_beginning_of(prompt)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching works on pages of keys and values, and a memory has none."""
        _refuse_cache_kind("paged")
        raise AssertionError


class TitansGenerationMixin(StateGenerationMixin):
    """`generate` of a Titans model."""

    config: TitansConfig

    def empty_cache(self) -> TitansCache:
        return TitansCache(self.config)

    def check_cache(self, cache: Any) -> None:
        check_cache(cache, self.config)


def check_cache(cache: Any, config: TitansConfig) -> None:
    """Raise ValueError for a cache of another kind, or of a model of another configuration."""
    if not isinstance(cache, TitansCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: a Titans model needs TitansCache(config); "
            "in place of prefix tuning, which adds keys and values, use prompt tuning or LoRA"
        )
    cache.check_fits(config)


def _refuse_cache_kind(name: str | None) -> None:
    if name is not None:
        raise ValueError(
            f"cache_implementation={name!r}: this model has a cache of its own kind; leave this unset"
        )
