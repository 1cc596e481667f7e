"""Layers on a CUDA device, for `gpu.py`: problems, checks against the float64 oracle, throughput."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from titans.memory import (
    BACKENDS,
    InnerProblem,
    MemoryNetwork,
    MemoryState,
    MomentumRule,
    assume_aligned,
    memory_scan,
)

# Of float32, for products that are float32 too, as they are while it is checked.
TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "tfloat32 operands": 1e-2, "bfloat16 operands": 5e-2}
# PyTorch's settings for products with rounded operands.
PRECISIONS = {"tfloat32 operands": "high", "bfloat16 operands": "medium"}
# TFLOP/s of dense products, by a part of the device's name.
BFLOAT16_PEAK = {"H100": 989, "H200": 989, "A100": 312}
# That of the models, but for a floor that no key's length meets exactly, where it has two slopes.
MODELS_MEMORY = InnerProblem(
    MemoryNetwork(64, 2, 2, activation="silu", residual=False, norm=False),
    rule=MomentumRule(normalize_step=True, length_floor=0.5, row_limit=8.0),
)


def limited(
    head_dim: int, depth: int, *, residual: bool = True, row_limit: float = 8.0, normalize_step: bool = False
) -> InnerProblem:
    """A memory without norm, whose rows keep their length within a limit."""
    net = MemoryNetwork(head_dim, depth, 4, norm=False, residual=residual)
    return InnerProblem(net, rule=MomentumRule(normalize_step=normalize_step, row_limit=row_limit))


def problem(
    inner: InnerProblem,
    batch: int,
    time_steps: int,
    heads: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random unit keys and queries, gates inside their range, weights of unit rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gate(highest: float) -> Tensor:
        return highest * torch.rand(
            batch, time_steps, heads, inner.network.depth, generator=generator, dtype=torch.float64
        )

    unit = torch.nn.functional.normalize
    tensors = {
        "queries": unit(normal(batch, time_steps, heads, inner.network.head_dim), dim=-1),
        "keys": unit(normal(batch, time_steps, heads, inner.network.head_dim), dim=-1),
        "values": normal(batch, time_steps, heads, inner.network.head_dim),
        "forget": gate(0.01),
        "momentum": gate(0.9),
        "step_size": gate(0.05),
    }
    if inner.network.norm:
        tensors["norm_weight"] = torch.full((heads, inner.network.head_dim), 0.5, dtype=torch.float64)
        tensors["norm_bias"] = torch.zeros(heads, inner.network.head_dim, dtype=torch.float64)
    for layer, shape in enumerate(inner.network.weight_shapes):
        tensors[f"weight_{layer}"] = unit(normal(batch, heads, *shape), dim=-1)
        tensors[f"base_{layer}"] = unit(normal(heads, *shape), dim=-1)
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def begin(inner: InnerProblem, tensors: dict[str, Tensor]) -> MemoryState:
    return MemoryState.initial([tensors[f"weight_{layer}"] for layer in range(inner.network.depth)])


def stretch(
    inner: InnerProblem,
    tensors: dict[str, Tensor],
    chunk_size: int,
    backend: str,
    state: MemoryState,
    cut: slice = slice(None),
) -> tuple[Tensor, MemoryState]:
    """Reads of some tokens, and the state after them, of a memory whose fast weights are offsets."""
    inputs = [tensors[n][:, cut] for n in ("queries", "keys", "values", "forget", "momentum", "step_size")]
    base = [tensors[f"base_{layer}"] for layer in range(inner.network.depth)]
    return memory_scan(
        inner, *inputs, state, chunk_size, norm_weight=tensors.get("norm_weight"),
        norm_bias=tensors.get("norm_bias"), base=base, backend=backend,
    )  # fmt: skip


def scan(inner: InnerProblem, tensors: dict[str, Tensor], chunk_size: int, backend: str) -> Tensor:
    """Reads of all tokens at once."""
    return stretch(inner, tensors, chunk_size, backend, begin(inner, tensors))[0]


@torch.no_grad()
def decode(inner: InnerProblem, tensors: dict[str, Tensor], chunk_size: int, backend: str) -> Tensor:
    """Reads of all tokens, one call for each."""
    state, reads = begin(inner, tensors), []
    for t in range(tensors["queries"].shape[1]):
        read, state = stretch(inner, tensors, chunk_size, backend, state, slice(t, t + 1))
        reads.append(read)
    return torch.cat(reads, 1)


def recorded(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A call as a CUDA graph: what replays it, and what the replay writes to."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()
    return graph.replay, answer


def check(device: str) -> tuple[list[str], list[str]]:
    """Largest relative error of reads and gradients of every backend on the device, against the oracle; and
    the backends that are not for it."""
    lines, ran = [], {"reference"}
    for inner in (
        MODELS_MEMORY,
        InnerProblem(MemoryNetwork(32, 2, 2), rule=MomentumRule(normalize_step=True, row_limit=1.0)),
        InnerProblem(MemoryNetwork(32, 1)),
        InnerProblem(MemoryNetwork(16, 3, 2, activation="silu")),
    ):
        answers: dict[tuple[str, str], list[Tensor]] = {}
        for backend, kind in [("oracle", "float64"), *(("triton", kind) for kind in PRECISIONS)] + [
            (name, kind) for name in BACKENDS for kind in ("float64", "float32")
        ]:
            torch.set_float32_matmul_precision(PRECISIONS.get(kind, "highest"))
            dtype = torch.float64 if kind == "float64" else torch.float32
            place, name = ("cpu", "reference") if backend == "oracle" else (device, backend)
            tensors = {n: x.requires_grad_() for n, x in problem(inner, 2, 48, 2, dtype, place).items()}
            try:
                reads = scan(inner, tensors, 16, name)
            except ValueError:
                continue
            ran.add(backend)
            weighting = torch.linspace(-1, 1, reads.numel(), dtype=torch.float64).view_as(reads).to(reads)
            grads = torch.autograd.grad((reads * weighting).sum(), list(tensors.values()))
            answers[backend, kind] = [x.detach().double().cpu() for x in (reads, *grads)]
        exact = answers.pop(("oracle", "float64"))
        for (backend, kind), found in answers.items():
            error = max(
                float((a - b).abs().max() / (b.abs().max() + 1e-12))
                for a, b in zip(found, exact, strict=True)
            )
            verdict = "ok" if error <= TOLERANCE[kind] else "WRONG"
            name = f"depth {inner.network.depth}{'' if inner.network.norm else ', no norm'}"
            lines.append(f"| {backend} | {kind} | {name} | {error:.1e} | {verdict} |")
    return lines, sorted(set(BACKENDS) - ran)


def check_decoding(device: str) -> list[str]:
    """The same of reads alone, token by token by the kernels for that, as they are and recorded."""
    lines = []
    for inner in (
        MODELS_MEMORY,
        limited(128, 2, row_limit=1.0),
        limited(64, 1, residual=False, normalize_step=True, row_limit=1.0),
    ):
        exact = decode(inner, problem(inner, 2, 48, 2, torch.float64, "cpu"), 16, "reference")
        tensors = problem(inner, 2, 48, 2, torch.float32, device)

        def run(inner: InnerProblem = inner, tensors: dict[str, Tensor] = tensors) -> Tensor:
            return decode(inner, tensors, 16, "triton")

        replay, answer = recorded(run)
        replay()
        for name, reads in (("", run()), (", recorded", answer)):
            error = float((reads.cpu() - exact).abs().max() / exact.abs().max())
            verdict = "ok" if error <= TOLERANCE["float32"] else "WRONG"
            size = (
                f"{inner.network.head_dim}, depth {inner.network.depth}, expansion {inner.network.expansion}"
            )
            lines.append(f"| triton, decoding{name} | float32 | {size} | {error:.1e} | {verdict} |")
    return lines


def milliseconds(run: Callable[[], object], repetitions: int = 5) -> float:
    """Median time of a call on the device, after two to warm up."""
    times = []
    for repetition in range(repetitions + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repetition >= 2:
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def layer_rows(deadline: float) -> Iterator[str]:
    """Tokens per second of one memory layer, forward and forward + backward, and a linear memory's."""
    yield gated_delta_row(11, 12, 4096)
    large = MemoryNetwork(64, 2, 4)
    for inner, batch, heads, backend, operands, chunk_size, time_steps in (
        (MODELS_MEMORY, 64, 2, "triton", "tfloat32", 16, 2048),
        (MODELS_MEMORY, 64, 2, "chunkwise", "tfloat32", 16, 2048),
        (MODELS_MEMORY, 16, 2, "triton", "tfloat32", 16, 8192),
        (large, 11, 12, "triton", "bfloat16", 16, 4096),
        (large, 11, 12, "triton", "bfloat16", 64, 4096),
        (large, 11, 12, "triton", "tfloat32", 16, 4096),
        (large, 11, 12, "triton", "tfloat32", 64, 4096),
        (large, 8, 12, "chunkwise", "tfloat32", 16, 2048),
        (large, 8, 12, "chunkwise", "tfloat32", 64, 2048),
        (large, 11, 12, "triton", "bfloat16", 64, 32768),
    ):
        if time.monotonic() > deadline:
            return
        torch.set_float32_matmul_precision("medium" if operands == "bfloat16" else "high")
        tensors = problem(inner, batch, time_steps, heads, torch.float32, "cuda")
        times = layer_milliseconds(inner, tensors, chunk_size, backend)
        hidden = inner.network.expansion * 64
        operations = heads * (22 * 64 * hidden + 4 * chunk_size * (64 + hidden) + 4 * chunk_size**2)
        yield (
            f"| {heads} × 64, expansion {inner.network.expansion} | {backend} | {operands} | {chunk_size} | "
            f"{batch} × {time_steps} | {rates(batch * time_steps, *times, operations)} |"
        )


def rates(tokens: int, forward: float, total: float, operations: int) -> str:
    """Tokens a second, and what part of the device's peak the products are, the backward's counted twice.

    forward, total: milliseconds without and with the backward. operations: of a token, forward.
    """
    peak = next((p for name, p in BFLOAT16_PEAK.items() if name in torch.cuda.get_device_name()), None)
    shares = [operations * tokens / forward / 1e9, 3 * operations * tokens / total / 1e9]
    percent = [f"{100 * share / peak:.2f} %" if peak else "–" for share in shares]
    return f"{tokens / forward * 1000:,.0f} | {tokens / total * 1000:,.0f} | {shares[0]:.2f} | " + " | ".join(
        percent
    )


def gated_delta_row(batch: int, heads: int, time_steps: int) -> str:
    """The scan of Gated DeltaNet, a linear memory, by the kernels of flash-linear-attention (fla-core)."""
    what = f"| {heads} × 64, Gated DeltaNet | fla | bfloat16 | 64 | {batch} × {time_steps} |"
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return f"{what} fla-core is not installed | – | – | – | – |"
    inner = InnerProblem(MemoryNetwork(64, 1, norm=False, residual=False))
    tensors = problem(inner, batch, time_steps, heads, torch.bfloat16, "cuda")
    q, k, v = (tensors[name].requires_grad_() for name in ("queries", "keys", "values"))
    forget, step = (tensors[name][..., 0].float().requires_grad_() for name in ("forget", "step_size"))

    def run() -> Tensor:
        return chunk_gated_delta_rule(q, k, v, torch.log1p(-forget), step.bfloat16())[0]

    with torch.no_grad():
        forward = milliseconds(run)
    total = milliseconds(lambda: run().float().sum().backward())
    # A read and a write of a matrix, and products within chunks of 64: scores twice, and with them twice.
    operations = heads * (4 * 64 * 64 + 4 * 64 * (64 + 64))
    return f"{what} {rates(batch * time_steps, forward, total, operations)} |"


def decode_rows(deadline: float) -> Iterator[str]:
    """Tokens per second of one memory layer, token by token, not recorded and recorded."""
    for inner, batch, heads in (
        (MODELS_MEMORY, 1, 4),
        (MODELS_MEMORY, 64, 4),
        (limited(64, 2), 1, 12),
        (limited(128, 2), 64, 4),
        (limited(64, 1), 64, 12),
    ):
        tensors = problem(inner, batch, 32, heads, torch.float32, "cuda")
        moved = 7 * 4 * batch * heads * sum(out * inp for out, inp in inner.network.weight_shapes)
        for backend in ("triton", "chunkwise"):
            if time.monotonic() > deadline:
                return

            def run(
                inner: InnerProblem = inner, tensors: dict[str, Tensor] = tensors, backend: str = backend
            ) -> Tensor:
                return decode(inner, tensors, 16, backend)

            took = milliseconds(run) / 32
            # The plain path looks at the position, unless it is given one: then no chunk ends, and its time
            # is that of a token all the same.
            with assume_aligned():
                replayed = milliseconds(recorded(run)[0]) / 32
            rate = f"{moved / replayed / 1e6:,.0f}" if backend == "triton" else "–"
            net = inner.network
            yield (
                f"| {heads} × {net.head_dim}, depth {net.depth}, expansion {net.expansion} | {backend} "
                f"| {batch} | {batch / took * 1000:,.0f} | {batch / replayed * 1000:,.0f} | "
                f"{1000 * replayed:.1f} | {rate} |"
            )


def layer_milliseconds(
    inner: InnerProblem, tensors: dict[str, Tensor], chunk_size: int, backend: str
) -> tuple[float, float]:
    with torch.no_grad():
        forward = milliseconds(lambda: scan(inner, tensors, chunk_size, backend))
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    return forward, milliseconds(lambda: scan(inner, leaves, chunk_size, backend).sum().backward())
