"""Opening a checkpoint folder: everything checked, nothing unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.hf import TitansConfig, TitansForCausalLM

_MODELS = Path(__file__).parent
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def names() -> list[str]:
    """The models that come with the library."""
    return sorted(path.parent.name for path in _MODELS.glob("*/config.json"))


def or_by_name() -> str:
    """How an error that wants a model goes on: with the names there are, if any."""
    return f", or one of {', '.join(names())}" if names() else ""


def folder_of(checkpoint: Path) -> Path:
    """The folder of a model that is named, or else what was given."""
    return _MODELS / checkpoint if not checkpoint.exists() and str(checkpoint) in names() else checkpoint


def load_config(folder: Path) -> TitansConfig:
    """The configuration of a checkpoint folder, or of a model by name.

    Raises:
        ValueError: if there is no such folder, or no valid configuration of a Titans model in it.
    """
    folder = folder_of(folder)
    if not folder.is_dir():
        raise ValueError(
            f"checkpoint={str(folder)!r} is not a folder: give one written by `titans train`{or_by_name()}"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"checkpoint={str(folder)!r} has no config.json: give a folder written by `titans train`"
        )
    from huggingface_hub.errors import StrictDataclassError

    from titans.hf import TitansConfig

    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
        if fields.get("model_type") != "titans":
            raise ValueError(f"model_type is {fields.get('model_type')!r}, not 'titans'")
        return TitansConfig.from_dict(fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"{path} is damaged or of another kind of model ({error}): restore the file"
        ) from None


def load_checkpoint(folder: Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint folder, or by name, on the GPU if there is one; without tokenizer
    files, bytes.

    Raises:
        ValueError: naming the file that is missing, damaged or does not fit the others.
    """
    folder = folder_of(folder)
    config = load_config(folder)
    if not any(folder.glob("model*.safetensors*")):
        raise ValueError(
            f"checkpoint={str(folder)!r} has no model.safetensors: give a folder written by `titans train`"
        )
    import safetensors
    import torch
    import transformers

    from titans.hf import TitansForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = TitansForCausalLM.from_pretrained(
            folder,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} are damaged ({error}): copy them again, or use an older checkpoint"
        ) from None
    model, found = loaded
    for kind, names in found.items():
        if names:
            name = sorted(map(str, names))[0]
            raise ValueError(
                f"the weights in {folder} do not fit its config.json ({kind.replace('_', ' ')}: {name}): "
                "the two files must come from the same model"
            )
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise ValueError(f"the weights in {folder} hold NaN or Inf ({broken[0]}): use an older checkpoint")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), _load_tokenizer(folder, config)


def _load_tokenizer(folder: Path, config: TitansConfig) -> PreTrainedTokenizerBase:
    from titans.data import byte_tokenizer, load_tokenizer

    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
    elif config.vocab_size == 256:
        tokenizer = byte_tokenizer()
    else:
        raise ValueError(
            f"checkpoint={str(folder)!r} has no tokenizer: save the one of its training beside the model"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            "use the tokenizer the model was trained with"
        )
    return tokenizer
