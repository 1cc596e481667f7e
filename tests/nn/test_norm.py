"""Normalisation and the feed-forward half against their formulas."""

from __future__ import annotations

import torch

from titans.nn.mlp import SwiGLU
from titans.nn.norm import SHORTEST, HeadRMSNorm, ReadNorm, RMSNorm, unit_queries


def test_formula_and_weight():
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm, heads = RMSNorm(6, eps=0.1, init=0.5).double(), HeadRMSNorm(4, 6, eps=0.1).double()
    with torch.no_grad():
        heads.weight.copy_(torch.arange(24.0).view(4, 6))
    unit = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x), 0.5 * unit)
    torch.testing.assert_close(heads(x), unit * torch.arange(24.0, dtype=torch.float64).view(4, 6))


def test_what_is_faint_is_not_drowned_by_the_prior():
    generator = torch.Generator().manual_seed(0)
    taught, prior = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64).unbind(0)
    norm = ReadNorm(4, 6, has_prior=True, eps=0.0).double()
    known = prior / prior.square().mean(-1, keepdim=True).sqrt()
    for size in (1e-3, 1.0):
        torch.testing.assert_close(
            norm(prior + size * taught, prior), taught / taught.square().mean(-1, keepdim=True).sqrt() + known
        )
    alone = ReadNorm(4, 6, has_prior=False).double()
    torch.testing.assert_close(alone(taught, None), alone.taught(taught))


def test_a_query_is_of_length_one_unless_it_is_very_short_and_its_gradient_is_bounded():
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([0, 1e-12, 1e-6, 5e-3, 0.0099, 0.0101, 0.1, 1, 100])[:, None]
    x = (lengths * x / x.norm(dim=-1, keepdim=True)).requires_grad_()
    y = unit_queries(x)
    torch.testing.assert_close(y.norm(dim=-1), (lengths[:, 0] / SHORTEST).clamp(max=1).double())
    for column in range(6):
        (grad,) = torch.autograd.grad(y[:, column].sum(), x, retain_graph=True)
        assert grad.norm(dim=-1).max() <= 1 / SHORTEST


def test_bfloat16_is_normalised_in_float32():
    x = torch.full((1, 512), 300.0, dtype=torch.bfloat16)
    for norm in (RMSNorm(512), RMSNorm(512).bfloat16(), HeadRMSNorm(1, 512).bfloat16()):
        y = norm(x if isinstance(norm, RMSNorm) else x[:, None])
        assert y.dtype == torch.bfloat16 and (y == 1).all()


def test_swiglu_is_its_formula():
    torch.manual_seed(0)
    mlp, x = SwiGLU(4, 6).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up = mlp.gate_up.weight.split(6)
    g = x @ gate.t()
    torch.testing.assert_close(mlp(x), (g * g.sigmoid() * (x @ up.t())) @ mlp.down.weight.t())
