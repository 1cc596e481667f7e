"""A pretrained model with a sliding window, and memories that learn during reading."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from titans.hf.generation import StateGenerationMixin
from titans.hf.graft.adapted import read_adapted
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.cache import GraftCache, GraftState
from titans.hf.graft.configuration import FIELDS, GraftConfig, check_origin
from titans.hf.graft.window import Window
from titans.hf.keywords import check_keywords, check_targets, check_tokens, documents_of, real_tokens
from titans.nn.adaptation import Adaptation
from titans.nn.association import Association
from titans.nn.packing import Packed

_WEIGHTS = "model.safetensors"
# What `from_pretrained` hands to the base, and what the Auto classes add of themselves.
_FOR_BASE = {"dtype", "torch_dtype", "device_map", "local_files_only", "attn_implementation"}
_FROM_AUTO = {"trust_remote_code", "adapter_kwargs", "revision", "token", "_from_auto"}


@dataclass
class GraftOutput(ModelOutput):
    """What a graft returns.

    loss: mean cross-entropy in nats, with `labels`. logits: (batch, time or fewer, vocab_size).
    past_key_values: the cache. surprises: with `output_surprise`, of each memory, the association first: of
    the association (batch, time, 1), the squared error of what each token's context recalled; of the
    adaptation (batch, time, 1), its own loss of each token in nats, 0 for the first of a text. base_logits:
    with `output_base_logits`, the base's logits in the same window without a memory, shaped as logits.
    association_logits: with `output_base_logits` and both memories, those with the association alone.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: GraftCache | None = None
    surprises: tuple[Tensor, ...] | None = None
    base_logits: Tensor | None = None
    association_logits: Tensor | None = None


class GraftedForCausalLM(PreTrainedModel, StateGenerationMixin):  # type: ignore[misc]
    """A causal LM of transformers, the base, read through a window, with memories of its own.

    Made by `titans.graft`. The base is part of it, frozen, and is never saved with it.

    Args:
        base: its parameters are frozen; otherwise it is unchanged and can still be used alone.

    Raises:
        ValueError: for a base that cannot be grafted, or that is not the one in the configuration.
    """

    config: GraftConfig
    config_class = GraftConfig
    base_model_prefix = "base"
    _is_stateful = True
    _skip_keys_device_placement = ["past_key_values"]
    # The loss is a mean; without this the Trainer would rescale it under gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: GraftConfig, base: PreTrainedModel | None = None) -> None:
        if base is None:
            raise ValueError(
                "a graft has no base of its own: use titans.graft(base), or from_pretrained(folder, base=…)"
            )
        super().__init__(config)
        check_origin(base, config.origin)
        window = Window(config.window, config.sinks)
        self.adaptation: Adaptation | None = None
        if config.adaptation is not None:
            self.adaptation = Adaptation(config.hidden_size, config.vocab_size, **config.adaptation)
        self.association: Association | None = None
        if config.association is not None:
            self.association = Association(config.hidden_size, config.vocab_size, **config.association)
        # Whatever is refused, the base is unchanged.
        windowed = WindowedBase(base, window)
        if self.association is not None:
            windowed.check_layers(self.association.layers)
        # Before the base is assigned, so that `post_init` does not initialise the base's weights anew.
        self.post_init()
        self.base = base.requires_grad_(False).eval()
        # transformers' Trainer leaves these out of its checkpoints, without a warning.
        self._keys_to_ignore_on_save = {name for name in self.state_dict() if name.startswith("base.")}
        self._windowed = windowed
        if self.adaptation is not None:
            self.adaptation.to(base.device)
        if self.association is not None:
            self.association.to(base.device)
            self.association.set_head(windowed.head.weight)
        # Saved with the graft, so that a folder is complete but for the base.
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.generation_config = copy.deepcopy(base.generation_config)

    def _init_weights(self, module: nn.Module) -> None:
        """Memories initialise themselves."""

    def train(self, mode: bool = True) -> GraftedForCausalLM:
        """Training mode for the memories alone: the base has no dropout here."""
        super().train(mode)
        if "base" in self._modules:
            self.base.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's precision; memories are in float32 at least."""
        return self.base.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings() if "base" in self._modules else None

    def empty_cache(self) -> GraftCache:
        return GraftCache(self.config)

    def check_cache(self, cache: Any) -> None:
        if not isinstance(cache, GraftCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: a grafted model needs GraftCache(config)"
            )
        cache.check_fits(self.config)

    def initial_state(self, rows: int) -> GraftState:
        """The state of rows that have read nothing."""
        states = (
            None if memory is None else memory.initial_state(rows, self.device, self.dtype)
            for memory in (self.adaptation, self.association)
        )
        return GraftState(self._windowed.initial_state(rows), *states)

    @torch.no_grad()
    def whiten(self, ids: Tensor) -> None:
        """Set the mean and covariance of the memories' inputs from ids (n,) of any text, n > 2.

        Raises:
            ValueError: without a memory.
        """
        if not self.config.has_memory:
            raise ValueError("this graft has no memory: whitening applies to a memory's inputs")
        x = self._checked(ids.reshape(1, -1).to(self.device), None)
        layers = () if self.association is None else self.association.layers
        hidden, states, _ = self._windowed.read_layers(x, self._windowed.initial_state(1), layers=layers)
        if self.adaptation is not None:
            self.adaptation.whiten(hidden)
        if self.association is not None:
            # Many models give the first token of a text states a hundred times as long as any others, which
            # would be all that the covariance sees.
            self.association.whiten([state[:, 1:] for state in states])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GraftCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_surprise: bool = False,
        freeze_memory: bool = False,
        output_base_logits: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **keywords: Any,
    ) -> GraftOutput | tuple[Any, ...]:
        """Read a stretch of tokens, of any length.

        Args:
            input_ids: (batch, time) int64, or, without a memory, `inputs_embeds`.
            attention_mask: (batch, time), or (batch, seen + time) with `past_key_values`; 0 marks padding,
                anywhere. A row is read as if it stood alone without it.
            past_key_values: what was read before; it is updated.
            labels: (batch, time) int64, the input ids again; shifted here, −100 is ignored.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these.
            output_surprise: return each memory's surprise at every token.
            freeze_memory: no memory learns.
            output_base_logits: return what the base alone predicts from the same states, too, and with two
                memories what it predicts with the association alone.
            keywords: keywords of transformers are accepted where they change nothing.

        Raises:
            ValueError: for contradictory or ill-shaped arguments, and requests that cannot be met.
            TypeError: for an unknown keyword.
        """
        position_ids = keywords.pop("position_ids", None)
        if keywords.pop("output_hidden_states", False):
            raise ValueError("output_hidden_states: call the base for them; leave it out")
        check_keywords(keywords, position_ids)
        x = self._checked(input_ids, inputs_embeds)
        batch, time = x.shape[:2]
        check_targets(labels, logits_to_keep, x)
        if freeze_memory and not self.config.has_memory:
            raise ValueError("freeze_memory=True: this graft has no memory that learns; leave it out")
        if (cache := past_key_values) is not None:
            self.check_cache(cache)
        seen = set() if cache is None else {cache.get_seq_length(), cache.num_columns}
        real = real_tokens(attention_mask, batch, time, seen)
        if position_ids is not None and documents_of(position_ids, real, (batch, time)) is not None:
            raise ValueError("position_ids restart inside a row: give a grafted model one document per row")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.empty_cache()
        if cache is not None:
            cache.check_rows(batch)
        state = None if cache is None else cache.state
        state = self.initial_state(batch) if state is None else state

        # Everything stateful sees real tokens only, each row's moved to its front.
        rows = Packed.of(real)
        x = rows.pack(x)
        head = self._windowed.head
        kept: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep

        loss, base_logits, association_logits, mixed = None, None, None, None
        surprises: list[Tensor] = []
        adaptation, association = state.adaptation, state.association
        layers = () if self.association is None else self.association.layers
        hidden, between, window = self._windowed.read_layers(x, state.window, rows.lengths, layers=layers)
        if self.association is not None:
            found = self.association.read(
                between,
                hidden,
                x,
                head.weight,
                association,
                lengths=rows.lengths,
                frozen=freeze_memory,
                surprise=output_surprise,
            )
            association = found.state
            surprises += [] if found.surprise is None else [rows.unpack(found.surprise).unsqueeze(-1)]
            mixed = partial(
                self.association.mix,
                reads=rows.unpack(found.reads)[:, kept],
                mixing=rows.unpack(found.mixing)[:, kept],
                rows=head.weight,
            )
        if self.adaptation is None or output_base_logits:
            base_logits = head.logits(rows.unpack(hidden)[:, kept])
        if self.adaptation is None:
            assert base_logits is not None
            logits = base_logits
        else:
            logits, adaptation, surprise = read_adapted(
                self.adaptation,
                head,
                hidden,
                x,
                adaptation,
                rows,
                frozen=freeze_memory,
                keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
                surprise=output_surprise,
            )
            logits = logits if isinstance(logits_to_keep, int) else logits[:, kept]
            surprises += [] if surprise is None else [surprise.unsqueeze(-1)]
            if mixed is not None and base_logits is not None:
                association_logits = mixed(base_logits)
        if mixed is not None:
            logits = mixed(logits)
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        # Last, so that a call that fails has not been read.
        if past_key_values is not None:
            past_key_values.store((GraftState(window, adaptation, association),), time, input_ids)
        output = GraftOutput(
            loss,
            logits,
            past_key_values,
            tuple(surprises) or None,
            base_logits if output_base_logits else None,
            association_logits,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _checked(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The ids, or the embeddings; ValueError for another shape or type, and on a CPU for unknown ids."""
        if inputs_embeds is not None and input_ids is None and self.config.has_memory:
            raise ValueError("inputs_embeds: a memory learns the token ids; give input_ids")
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds
        if input_ids.numel() and input_ids.device.type == "cpu":
            least, most = (int(x) for x in input_ids.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids holds {least} to {most}: give ids from 0 to {self.config.vocab_size - 1}, "
                    "the vocabulary"
                )
        return input_ids

    def own_state_dict(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the memories alone."""
        whole = self.state_dict() if state_dict is None else state_dict
        return {name: value for name, value in whole.items() if not name.startswith("base.")}

    def save_pretrained(  # pyrefly: ignore[bad-override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write configuration and the memories' weights; the base stays where it is.

        Args:
            kwargs: further arguments of transformers; accepted if they would change nothing.

        Raises:
            ValueError: for push_to_hub=True.
            OSError: if a file cannot be written; a file of weights that was there before is left.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True is not supported: save the graft, and upload the folder")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        own = {name: value.detach().contiguous() for name, value in self.own_state_dict(state_dict).items()}
        temporary = folder / f".{_WEIGHTS}.part"
        try:
            save_file(own, temporary, {"format": "pt"})
            temporary.replace(folder / _WEIGHTS)
        except SafetensorError as error:
            raise OSError(f"{folder / _WEIGHTS} could not be written ({error}): make room") from None
        finally:
            temporary.unlink(missing_ok=True)
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        base: PreTrainedModel | str | Path | None = None,
        config: GraftConfig | None = None,
        **kwargs: Any,
    ) -> GraftedForCausalLM:
        """A graft that was saved, on its base.

        Args:
            pretrained_model_name_or_path: the folder that `save_pretrained` wrote.
            base: the model it was made on, or its name or folder; by default the saved name or folder.
            kwargs: changed fields of the configuration, and, for loading the base, dtype, device_map,
                attn_implementation or local_files_only.

        Raises:
            ValueError: for a damaged folder, a base that is not found, or another base.
            TypeError: for an unknown keyword.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: give a folder that a graft was saved to")
        changes = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        if unknown := kwargs.keys() - _FOR_BASE - _FROM_AUTO:
            raise TypeError(f"from_pretrained has no keyword {min(unknown)!r}: leave it out")
        if config is None:
            config = GraftConfig.from_pretrained(folder, **changes)
        elif changes:
            raise ValueError(f"{min(changes)} is given beside config: change config")
        if not isinstance(base, PreTrainedModel):
            base = _load_base(base or config.origin.get("name"), kwargs)
        model = cls(config, base)
        model._load_own(folder / _WEIGHTS)
        return model.eval()

    def _load_own(self, path: Path) -> None:
        try:
            found = load_file(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: restore the file") from None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): restore the file") from None
        own = self.own_state_dict()
        for name in sorted(own.keys() | found.keys()):
            if name not in own or name not in found or own[name].shape != found[name].shape:
                raise ValueError(f"{path} does not fit its config.json: {name} differs; restore both")
            if not found[name].is_floating_point() or not torch.isfinite(found[name]).all():
                raise ValueError(f"{path} holds values that are no finite numbers ({name}): restore the file")
        self.load_state_dict(found, strict=False)


def _load_base(name: str | Path | None, options: dict[str, Any]) -> PreTrainedModel:
    if not name:
        raise ValueError("the graft was made on a model without a name: give it as base=…")
    known = {key: value for key, value in options.items() if key in _FOR_BASE}
    try:
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **known)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the base {str(name)!r} cannot be loaded ({reason}): give it as base=…") from None


AutoConfig.register("titans-graft", GraftConfig)
AutoModelForCausalLM.register(GraftConfig, GraftedForCausalLM)
