"""What surrounds a scan: the compiled passes against the same in torch, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.memory.backends.native import missing
from titans.nn.conv import CausalConv
from titans.nn.kernels import native as compiled
from titans.nn.memory.heads import UNIT, gated_answers, head_vectors
from titans.nn.norm import ReadNorm
from titans.nn.packing import Packed

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no compiled backend: {missing()}")


def _both(run, leaves):
    """Outputs and gradients with the compiled passes and without them."""
    found = []
    for backend in ("native", "chunkwise"):
        outputs = run(backend)
        nodes = {y.grad_fn.name() for y in outputs if y.grad_fn is not None}
        compiled_ran = bool(nodes & {"_FilterHeadsBackward", "_GatedAnswersBackward"})
        assert compiled_ran == (backend == "native")
        weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin() for y in outputs]
        loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        found.append([*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    return found


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    time=st.integers(0, 9),
    kernel=st.integers(1, 5),
    ragged=st.booleans(),
    resets=st.booleans(),
    seed=st.integers(0, 99),
)
def test_head_vectors_compiled_are_those_of_torch(batch, time, kernel, ragged, resets, seed):
    torch.manual_seed(seed)
    conv = CausalConv(3 * 2 * 16, kernel).double()
    # A slice, as a projection that also has a gate in it gives. Some vectors are long enough to be shortened,
    # some too short to be brought to length 1.
    scale = torch.tensor([1e-3, 1.0, 8.0])[torch.randint(3, (batch, time, 1))]
    whole = torch.randn(batch, time, 4 * 2 * 16, dtype=torch.float64) * scale
    lengths = torch.randint(0, time + 1, (batch,)) if ragged else None
    reset = torch.rand(batch, time) < 0.3 if resets else None
    if lengths is not None:
        whole[torch.arange(time) >= lengths[:, None]] = float("nan")
    tail = torch.randn(batch, kernel - 1, 3 * 2 * 16, dtype=torch.float64)
    leaves = [whole.requires_grad_(), tail.requires_grad_(), conv.weight]

    def run(backend):
        x = whole[..., : 3 * 2 * 16]
        assert compiled.refuses(16, x, tail, conv.weight) is None
        packed = Packed.first(lengths, time)
        vectors, new_tail = head_vectors(conv, x, tail, 16, (UNIT, UNIT, 4.0), packed, reset, backend)
        return [*vectors, new_tail]

    for got, want in zip(*_both(run, leaves), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_gated_answers_compiled_are_those_of_torch():
    torch.manual_seed(0)
    norm = ReadNorm(2, 32, has_prior=True).double()
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    reads = torch.randn(3, 5, 2, 32, dtype=torch.float64)
    prior = torch.randn(3, 2, 5, 32, dtype=torch.float64).transpose(1, 2)
    gate = torch.randn(3, 5, 80, dtype=torch.float64)
    leaves = [reads.requires_grad_(), prior.detach().requires_grad_(), gate.requires_grad_()]
    leaves += norm.parameters()

    def run(backend):
        return [gated_answers(norm, leaves[0], leaves[1], leaves[2][..., :64], backend)]

    for got, want in zip(*_both(run, leaves), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_second_derivatives_are_refused_and_other_dtypes_left_to_torch():
    x = torch.randn(1, 3, 16, requires_grad=True)
    conv = CausalConv(16, 2)
    (vectors,), _ = head_vectors(conv, x, torch.zeros(1, 1, 16), 16, (UNIT,))
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(vectors.square().sum(), x, create_graph=True)
    assert "torch.bfloat16" in compiled.refuses(16, x.bfloat16())
    assert "head_dim=8 is no multiple of 16" in compiled.refuses(8, x)
    assert "all of the same dtype" in compiled.refuses(16, x, x.double())
