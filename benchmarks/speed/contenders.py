"""What is timed: for each kind of case and each contender a function that does it once.

A case is a dictionary that travels to the process that times it. `kind`:
  product  float32 matrix products: `shape` (batch, rows, depth, columns); the machine's rate
  scan     memory_scan alone, heads × 64, the paper's equations
  layer    a whole memory (or attention) layer with its projections, batch 1
  equal scan, equal layer   the same of memories of equal state, see forms.py
  stream   that layer reads `time` tokens in calls of 4096 or fewer, carrying its state
  train    a whole model's training step, batch 1
  prefill  a whole model reads `time` tokens into a cache
  decode   a whole model's next tokens after `time` of them, one call each
  generate the same by transformers' `generate`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from forms import build_form
from library import full_attention, run_on
from steps import Case, Step, backward_step, layer_step
from torch import Tensor

HEAD_DIM = 64


def floating_operations(case: Case) -> float:
    """Operations of the algorithm (docs/how/speed.md), for a product or a scan, forward, or with backward."""
    if case["kind"] == "product":
        batch, rows, depth, columns = case["shape"]
        return 2.0 * batch * rows * depth * columns
    d, m, c = HEAD_DIM, case["expansion"] * HEAD_DIM, case["chunk"]
    forward = case["width"] // d * (22 * d * m + 4 * c * (d + m) + 4 * c * c)
    return case["time"] * forward * (4.0 if case["backward"] else 1.0)


def _product(case: Case) -> Step:
    batch, rows, depth, columns = case["shape"]
    left, right = torch.randn(batch, rows, depth), torch.randn(batch, depth, columns)
    out = torch.empty(batch, rows, columns)
    if batch == 1:
        return lambda: torch.mm(left[0], right[0], out=out[0])
    return lambda: torch.bmm(left, right, out=out)


def _scan(case: Case, backend: str) -> Step:
    from titans.memory import MemoryNetwork, MemoryState, memory_scan

    heads = case["width"] // HEAD_DIM
    net = MemoryNetwork(HEAD_DIM, 2, case["expansion"], "silu", residual=False, norm=False)
    shape = (1, case["time"], heads)
    unit = torch.nn.functional.normalize
    tokens = [unit(torch.randn(*shape, HEAD_DIM), dim=-1) for _ in range(3)]
    # Little is forgotten: a memory that decays to 0 would be timed on denormal numbers.
    gates = [high * torch.rand(*shape, 2) for high in (1e-4, 0.5, 0.5 / case["chunk"])]
    weights = [torch.randn(1, heads, *s) / s[1] ** 0.5 for s in net.weight_shapes]
    leaves = [*tokens, *gates, *weights]
    for leaf in leaves:
        leaf.requires_grad_(case["backward"])

    def run() -> Tensor:
        state = MemoryState.initial(weights)
        return memory_scan(net, *tokens, *gates, state, case["chunk"], backend=backend)[0]

    if case["backward"]:
        return backward_step(run, leaves)
    return run


def _titans(case: Case, backend: str) -> Step:
    if case["kind"] == "scan":
        return _scan(case, backend)
    if case["kind"] in ("layer", "stream"):
        from titans.nn import NeuralMemory

        layer = NeuralMemory(
            case["width"],
            case["width"] // HEAD_DIM,
            HEAD_DIM,
            depth=2,
            expansion=case["expansion"],
            chunk_size=case["chunk"],
        )
        run_on(backend, layer)
        if case["kind"] == "stream":
            return _stream(layer, case)
        return layer_step(layer, case, lambda x: layer(x)[0])
    return _titans_step(case, case["variant"], backend)


def _stream(layer: torch.nn.Module, case: Case) -> Step:
    pieces = torch.randn(1, 4096, case["width"]), max(1, case["time"] // 4096)

    def read() -> None:
        state = None
        with torch.no_grad():
            for _ in range(pieces[1]):
                _, state = layer(pieces[0], state)

    return read


def _transformer(case: Case, _: str) -> Step:
    if case["kind"] == "layer":
        layer = full_attention(case["width"], case["width"] // HEAD_DIM, HEAD_DIM)
        return layer_step(layer, case, lambda x: layer(x)[0])
    return _titans_step(case, "transformer")


def _llama(case: Case, _: str) -> Step:
    """A model of transformers with the sizes of the preset: what its own decoding costs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from titans.hf import PRESETS

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: PRESETS[case["preset"]][name] for name in names}
    longest = case["time"] + 2**14
    return _model_step(case, LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=longest)))


def _titans_step(case: Case, variant: str, backend: str | None = None) -> Step:
    from titans.hf import TitansConfig, TitansForCausalLM

    depth = case.get("memory_depth", 2)
    options = {"segment_length": case["segment"], "chunk_size": case["chunk"]} if "segment" in case else {}
    config = TitansConfig.from_preset(case["preset"], variant=variant, memory_depth=depth, **options)
    model = TitansForCausalLM(config)
    if backend is not None:
        run_on(backend, model)
    return _model_step(case, model)


def _model_step(case: Case, model: Any) -> Step:
    ids = torch.randint(model.config.vocab_size, (1, case["time"]))
    if case["kind"] == "train":

        def train() -> None:
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()

        return train
    model.eval()
    if case["kind"] == "prefill":

        def prefill() -> None:
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)

        return prefill
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    tokens = 16
    if case["kind"] == "generate":
        text = torch.cat([ids, ids[:, :1]], 1)

        def generate() -> None:
            nonlocal text
            options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            mask = torch.ones_like(text)
            text = model.generate(text, attention_mask=mask, past_key_values=cache, **options)

        return generate

    def decode() -> None:
        # Each repetition goes on from the last: a cache that grows does so by a few tokens only.
        with torch.no_grad():
            for _ in range(tokens):
                model(ids[:, :1], past_key_values=cache, use_cache=True)

    return decode


def _peer(case: Case, mode: str) -> Step:
    """titans-pytorch, in its own environment; modes as in its README, or as close to the paper's rule."""
    from titans_pytorch import MemoryAsContextTransformer, MemoryMLP, NeuralMemory

    if case["kind"] in ("train", "prefill"):
        # Width, depth, segments and memory of the preset `small`; its feed-forward is a little narrower.
        model = MemoryAsContextTransformer(
            num_tokens=256,
            dim=256,
            depth=7,
            segment_len=case["segment"],
            num_persist_mem_tokens=4,
            num_longterm_mem_tokens=4,
            heads=4,
            dim_head=HEAD_DIM,
            neural_memory_model=MemoryMLP(dim=HEAD_DIM, depth=2, expansion_factor=4.0),
            neural_memory_kwargs=dict(dim_head=HEAD_DIM, heads=4),
        )
        return _peer_step(case, model, lambda ids: model(ids, return_loss=True))
    sizes = {
        "default": dict(chunk_size=64),
        "sequential": dict(chunk_size=64, batch_size=64),
        "per token": dict(chunk_size=1, batch_size=case["chunk"]),
    }[mode]
    layer = NeuralMemory(
        dim=case["width"],
        dim_head=HEAD_DIM,
        heads=case["width"] // HEAD_DIM,
        model=MemoryMLP(dim=HEAD_DIM, depth=2, expansion_factor=float(case["expansion"])),
        **sizes,
    )
    return layer_step(layer, case, lambda x: layer(x)[0])


def _open_titans(case: Case, _: str) -> Step:
    """open-titans in the environment of the peers: a memory in every layer, which is not its default."""
    from open_titans import TitansMACModel
    from open_titans.models.titans_mac.configuration_mac import TitansMACConfig
    from open_titans.modules.memory.memory_model import MemoryMLP

    config = TitansMACConfig(
        vocab_size=256,
        hidden_size=256,
        num_hidden_layers=7,
        segment_len=case["segment"],
        num_longterm_mem_tokens=4,
        num_persist_mem_tokens=4,
        num_attention_heads=4,
        dim_head=HEAD_DIM,
        intermediate_size=4 * 256,
        neural_memory_layers=[*range(1, 8)],
    )
    memory = MemoryMLP(dim=HEAD_DIM, depth=2, expansion_factor=4.0)
    model = TitansMACModel(config, memory, dim_head=HEAD_DIM, heads=4)
    return _peer_step(case, model, lambda ids: model(ids, return_loss=True).loss)


def _peer_step(case: Case, model: torch.nn.Module, loss: Callable[[Tensor], Tensor]) -> Step:
    """A step of training with a peer's loss, or its forward pass."""
    ids = torch.randint(256, (1, case["time"]))

    def train() -> None:
        model.zero_grad()
        loss(ids).backward()

    def prefill() -> None:
        with torch.no_grad():
            model(ids)

    return train if case["kind"] == "train" else prefill


CONTENDERS: dict[str, tuple[Callable[[Case, str], Step], str]] = {
    "titans, native": (_titans, "native"),
    "titans, bfloat16": (_titans, "native_bfloat16"),
    "titans, torch": (_titans, "chunkwise"),
    "attention": (_transformer, ""),
    "transformers": (_llama, ""),
    "titans-pytorch": (_peer, "default"),
    "open-titans": (_open_titans, ""),
    "titans-pytorch, sequential": (_peer, "sequential"),
    "titans-pytorch, per token": (_peer, "per token"),
}


def build(contender: str, case: Case) -> Step:
    """The function that does a case once."""
    torch.manual_seed(0)
    if case["kind"] == "product":
        return _product(case)
    if case["kind"].startswith("equal"):
        return build_form(case, contender)
    make, argument = CONTENDERS[contender]
    return make(case, argument)
