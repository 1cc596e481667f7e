"""The folder of a graft: its memories' weights, its configuration, and what identifies its base."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from titans.hf.fingerprint import vocabulary_name
from titans.hf.graft.configuration import GraftConfig, fields
from titans.hf.graft.lora import is_lora
from titans.hf.weights_file import read_weights, write_weights

logger = logging.getLogger(__name__)
_WEIGHTS = "model.safetensors"
# What `from_pretrained` hands to the base, and what the Auto classes add of themselves.
_FOR_BASE = {"dtype", "torch_dtype", "device_map", "local_files_only", "attn_implementation"}
_FROM_AUTO = {"trust_remote_code", "adapter_kwargs", "revision", "token", "_from_auto"}


class GraftFolder(PreTrainedModel):  # type: ignore[misc]
    """A model whose weights are its own and those of a base; it is saved and loaded without its base."""

    config: GraftConfig
    tokenizer: PreTrainedTokenizerBase | None

    def own_state_dict(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the memories, and of the base's adapters, alone."""
        whole = self.state_dict() if state_dict is None else state_dict
        return {name: value for name, value in whole.items() if not name.startswith("base.") or is_lora(name)}

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
            OSError: if a file cannot be written; what was there before is left.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True is not supported: save the graft, and upload the folder")
        if not is_main_process:
            return
        if not self.config.origin.get("name"):
            logger.warning(
                "%s: the base of this graft was made in memory and is not saved with it: save it, too, and "
                "load the graft with titans.load(folder, base=…)",
                save_directory,
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        if self.tokenizer is not None:
            self.config.vocabulary = vocabulary_name(self.tokenizer)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".graft-") as scratch:
            try:
                for part in (self.config, self.generation_config, self.tokenizer):
                    if part is not None:
                        part.save_pretrained(scratch)
            except Exception as error:
                # The package tokenizers has no error of its own for a full disk.
                if type(error) is not Exception and not isinstance(error, OSError):
                    raise
                raise OSError(f"{folder} could not be written ({error}): make room") from None
            write_weights(folder / _WEIGHTS, self.own_state_dict(state_dict))
            for file in [path for path in Path(scratch).rglob("*") if path.is_file()]:
                place = folder / file.relative_to(scratch)
                place.parent.mkdir(exist_ok=True)
                file.replace(place)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        base: PreTrainedModel | str | Path | None = None,
        config: GraftConfig | None = None,
        **kwargs: Any,
    ) -> Self:
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
        changes = {name: kwargs.pop(name) for name in fields() if name in kwargs}
        if unknown := kwargs.keys() - _FOR_BASE - _FROM_AUTO:
            raise TypeError(f"from_pretrained has no keyword {min(unknown)!r}: leave it out")
        if config is None:
            config = GraftConfig.from_pretrained(folder, **changes)
        elif changes:
            raise ValueError(f"{min(changes)} is given in addition to config: change config")
        if not isinstance(base, PreTrainedModel):
            base = _load_base(base or config.origin.get("name"), kwargs)
        model = cls(config, base)
        model._load_own(folder / _WEIGHTS)
        return model.eval()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Whether a tokenizer has the vocabulary of the one that the graft was saved with, if any.

        Raises:
            ValueError: if it has other tokens, or other numbers for them.
        """
        known = self.config.vocabulary
        if self.tokenizer is not None:
            known = vocabulary_name(self.tokenizer)
        if known is not None and known != vocabulary_name(tokenizer):
            raise ValueError(
                "tokenizer has another vocabulary than the one that this graft was made with: give the base's"
            )

    def _load_own(self, path: Path) -> None:
        found, own = read_weights(path), self.own_state_dict()
        for name in sorted(own.keys() | found.keys()):
            if name not in own or name not in found or own[name].shape != found[name].shape:
                raise ValueError(f"{path} does not fit its config.json: {name} differs; restore both")
        self.load_state_dict(found, strict=False)


def _load_base(name: str | Path | None, options: dict[str, Any]) -> PreTrainedModel:
    if not name:
        raise ValueError("the graft was made on a model without a name: give it as base=…")
    known = {key: value for key, value in options.items() if key in _FOR_BASE}
    try:
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **known)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the base {str(name)!r} cannot be loaded ({reason}): give it as base=…, or open the graft with "
            "titans.load, which knows the library's own names"
        ) from None
