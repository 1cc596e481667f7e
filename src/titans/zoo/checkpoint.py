"""Opening a checkpoint folder: everything checked, nothing unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.zoo.by_name import PRETRAINED, folder_in_library, or_by_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from titans.hf import TitansConfig, TitansForCausalLM

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def folder_of(checkpoint: Path) -> Path:
    """The folder of a model given by name, or the path itself; a pretrained base is fetched on first use."""
    if checkpoint.exists():
        return checkpoint
    if (folder := folder_in_library(str(checkpoint))) is not None:
        return folder
    if str(checkpoint) != PRETRAINED:
        return checkpoint
    # It imports torch, which a command that ends with an error has no need of.
    from titans.zoo.smollm import smollm_folder

    return smollm_folder()


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
    fields = config_fields(folder)
    if (kind := fields.get("model_type")) != "titans":
        raise ValueError(
            f"checkpoint={str(folder)!r} is a model of type {kind!r}: this needs a Titans model, as `titans "
            "train` writes it; generate, chat, memorize, inspect and eval take other causal models, too"
        )
    from huggingface_hub.errors import StrictDataclassError

    from titans.hf import TitansConfig

    try:
        return TitansConfig.from_dict(fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        if "first import the file that registers it" in str(error):
            raise ValueError(
                f"{folder / 'config.json'} names a part that is not registered: first import the file that "
                f"registers it, or restore the file ({error})"
            ) from None
        raise ValueError(
            f"{folder / 'config.json'} is damaged or of another version ({error}): restore the file"
        ) from None


def config_fields(folder: Path) -> dict[str, Any]:
    """What config.json holds; ValueError where there is none, or no JSON object in it."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"checkpoint={str(folder)!r} has no config.json: give a folder that `titans train` or "
            "`save_pretrained` wrote"
        )
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore the file") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): restore the file")
    return fields


def load_checkpoint(
    folder: Path, base: PreTrainedModel | str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint folder, or by name, on the GPU if there is one; without tokenizer
    files, bytes.

    A Titans model, a graft, or any causal LM that transformers has saved as safetensors. Nothing but a
    pretrained base is downloaded, no code of the folder is executed, and nothing is unpickled.

    Args:
        base: of a graft, where it is not what the graft names: the model, or its folder or name.

    Raises:
        ValueError: naming the file that is missing, damaged or does not fit the others; for a base of what is
            no graft.
    """
    given, folder = folder, folder_of(folder)
    if not folder.is_dir():
        raise ValueError(
            f"checkpoint={str(folder)!r} is not a folder: give one written by `titans train` or "
            f"`save_pretrained`{or_by_name()}, {PRETRAINED}"
        )
    if (kind := config_fields(folder).get("model_type")) == "titans-graft":
        return _load_graft(folder, base)
    if base is not None:
        raise ValueError(f"base is given, and checkpoint={str(given)!r} is no graft: leave it out")
    if kind == "titans":
        return load_titans(folder)
    from transformers import AutoModelForCausalLM

    model = _load_model(folder, AutoModelForCausalLM)
    if folder != given:
        # A graft names its base by it, and is then read on other machines, too.
        model.name_or_path = str(given)
    return model, _load_tokenizer(folder, model.config.get_text_config(decoder=True).vocab_size)


def load_titans(folder: Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """`load_checkpoint` for what needs a Titans model; ValueError for any other."""
    folder = folder_of(folder)
    config = load_config(folder)
    from titans.hf import TitansForCausalLM

    return _load_model(folder, TitansForCausalLM, config=config), _load_tokenizer(folder, config.vocab_size)


def _load_graft(
    folder: Path, given: PreTrainedModel | str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A graft on the base that is given, or that it names; the tokenizer is its own or the base's."""
    from huggingface_hub.errors import StrictDataclassError

    from titans.hf import GraftedForCausalLM
    from titans.hf.graft import GraftConfig

    try:
        config = GraftConfig.from_dict(config_fields(folder))
        name = config.origin["name"]
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is damaged or of another version ({error!r}): restore the file"
        ) from None
    from transformers import AutoModelForCausalLM, PreTrainedModel

    # A model in memory has no folder, and no tokenizer there.
    place, base = folder, given
    if not isinstance(given, PreTrainedModel):
        place = _base_folder(folder, name if given is None else str(given))
        if str(config_fields(place).get("model_type")).startswith("titans"):
            raise ValueError(f"checkpoint={str(folder)!r} was made on {name!r}, which is no model to graft")
        base = _load_model(place, AutoModelForCausalLM)
    try:
        model = GraftedForCausalLM.from_pretrained(folder, base=base, config=config)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error!r}): restore the file") from None
    own = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    return model, _load_tokenizer(folder if own else place, model.config.vocab_size)


def _base_folder(graft: Path, name: str) -> Path:
    """Where the base of a graft is: a folder, or a snapshot of the Hub that was downloaded before."""
    if not name:
        raise ValueError(
            f"checkpoint={str(graft)!r} was made on a model in memory, which has no name: give it, "
            "titans.load(folder, base=model), or save it and give its folder as base"
        )
    place = folder_of(Path(name))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ValueError(
            f"checkpoint={str(graft)!r} was made on {name!r}, which is neither a folder here nor a "
            "downloaded model of Hugging Face's Hub: bring it there, or give the base, "
            "titans.load(folder, base=…)"
        ) from None


def _load_model(folder: Path, kind: Any, **options: Any) -> Any:
    # Not at the top: torch is not needed to say what is missing.
    if (folder / "parts").is_dir():
        return _load_parts(folder, kind, **options)
    if not any(folder.glob("model*.safetensors*")):
        raise ValueError(
            f"checkpoint={str(folder)!r} has no model.safetensors: give a folder that `titans train` or "
            "`save_pretrained` wrote (pickled weights are not opened)"
        )
    import safetensors
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = kind.from_pretrained(
            folder,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} are damaged ({error}): copy them again, or use an older checkpoint"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, ImportError, StrictDataclassError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"checkpoint={str(folder)!r} is no causal model that transformers can open ({reason})"
        ) from None
    for reason, parts in found.items():
        # Other models may leave out parts that were saved with them, such as heads for drafts.
        if parts and (options or reason != "unexpected_keys"):
            name = sorted(map(str, parts))[0]
            raise ValueError(
                f"the weights in {folder} do not fit its config.json ({reason.replace('_', ' ')}: {name}): "
                "the two files must come from the same model"
            )
    return _checked(model, folder)


def _load_parts(folder: Path, kind: Any, **options: Any) -> Any:
    """A model from a checkpoint of `titans train --parallel fsdp`, which is in parts."""
    from transformers import AutoConfig

    from titans.hf import parts

    try:
        config = options.get("config") or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = kind(config) if options else kind.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"checkpoint={str(folder)!r} is no causal model that transformers can open ({reason})"
        ) from None
    parts.read_model(folder, model)
    return _checked(model, folder)


def _checked(model: Any, folder: Path) -> Any:
    """The model ready to evaluate, on the GPU if there is one; ValueError for weights that are not finite."""
    import torch

    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not parameter.isfinite().all()
    ]
    if broken:
        raise ValueError(f"the weights in {folder} hold NaN or Inf ({broken[0]}): use an older checkpoint")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    from titans.data import byte_tokenizer, load_tokenizer

    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
    elif vocab_size == 256:
        tokenizer = byte_tokenizer()
    else:
        raise ValueError(
            f"checkpoint={str(folder)!r} has no tokenizer: save the one of its training in the same folder"
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {vocab_size}: "
            "use the tokenizer the model was trained with"
        )
    return tokenizer
