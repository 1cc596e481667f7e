"""Feature maps alone, and what a layer with features refuses, begins with and shares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from titans.nn import FEATURES, BlockContext, NeuralMemory, TNTMemory
from titans.nn.packing import Packed

from ..tolerances import FLOAT32, assert_close

MAPS = [name for name in FEATURES if name != "identity"]
every_map = pytest.mark.parametrize("name", MAPS)


def map_of(name, heads=3, dim=4, size=7):
    torch.manual_seed(0)
    return FEATURES[name](heads, dim, size).double()


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double(), dim=-1)


@every_map
def test_features_are_what_their_formula_says_head_by_head(name):
    feature_map, x = map_of(name), unit(2, 5, 3, 4)
    for head in range(3):
        weight, z = feature_map.weight[head], x[:, :, head]
        if name == "sin":
            hidden = torch.sin(feature_map.log_bandwidth[head].exp() * z @ weight.T)
        elif name == "polynomial":
            (a, b, c), first, second = feature_map.coefficients[head], z @ weight[:2].T, z @ weight[2:].T
            one = torch.ones(2, 5, 1).double()
            hidden = 7**0.5 * torch.cat([a * one, b * z, c * first * second / 2**0.5], -1)
        else:
            first, second = z @ weight[:7].T, z @ weight[7:].T
            hidden = (F.silu(first) if name == "swiglu" else first) * second
        expected = hidden / (hidden.square().sum(-1, keepdim=True) + 0.01 * 7).sqrt()
        assert_close(feature_map(x)[:, :, head], expected, 1e-12, "features")


@every_map
def test_gradients_are_right_at_a_zero_vector_too(name):
    feature_map, x = map_of(name), unit(1, 3, 3, 4)
    x[0, 1] = 0
    parameters = dict(feature_map.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(feature_map, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters.values()))


@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_feature_vector_is_longer_than_one(name, dtype):
    """Whatever the vectors and weights; and in at least float32, under autocast as well."""
    feature_map = map_of(name, size=64).to(dtype)
    x = torch.cat([scale * unit(1, 50, 3, 4) for scale in (0.0, 1e-6, 1.0, 30.0)], 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        features = feature_map(x)
    # The polynomial has a constant.
    assert features.dtype == torch.float32 and (name == "polynomial" or not features[:, :50].any())
    assert features.norm(dim=-1).max() <= 1 + 1e-6
    assert features[:, 100:].norm(dim=-1).min() > 0.5, "unit vectors have features of some length"
    assert_close(features.double(), feature_map.double()(x.double()), FLOAT32, "features")


def test_polynomial_features_have_the_inner_products_of_a_polynomial_on_average():
    torch.manual_seed(0)
    x = unit(1, 2, 1, 8).expand(-1, -1, 400, -1)
    hidden = FEATURES["polynomial"](400, 8, 40).double().hidden(x[0].transpose(0, 1)).detach()
    inner = (hidden[:, 0] * hidden[:, 1]).sum(-1).mean() / 40
    product = (x[0, 0, 0] * x[0, 1, 0]).sum()
    assert abs(inner - (1 + product + product**2 / 2)) < 0.02


def test_sin_features_tell_more_keys_apart_than_the_keys_do_and_heads_differ():
    """1 / E[cos²] over pairs of keys: the number of dimensions that they span as evenly as random vectors."""
    keys = F.normalize(F.silu(torch.randn(1, 500, 4, 32, generator=torch.Generator().manual_seed(0))), dim=-1)
    torch.manual_seed(0)
    features = FEATURES["sin"](4, 32, 128)(keys).detach()

    def dimensions(x):
        cosines = torch.einsum("thd,shd->hts", F.normalize(x[0], dim=-1), F.normalize(x[0], dim=-1))
        return 1 / cosines[:, ~torch.eye(500, dtype=torch.bool)].square().mean(-1)

    of_keys, of_features = dimensions(keys), dimensions(features)
    assert (of_features > 1.5 * of_keys).all(), (of_keys, of_features)
    assert (of_features.diff() > 0).all(), "the later heads have the larger bandwidths"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(features="cos"), r"features='cos': choose one of .*'product', 'sin', 'swiglu'\]"),
        (dict(features=None), "features=None: choose one of"),
        (dict(features="sin", depth=2), "depth=2 with features='sin': .* give depth=1, or features='id"),
        (dict(feature_size=8), "feature_size=8 with features='identity': .* give None, or one of"),
        (dict(features="sin", feature_size=0), "feature_size=0: give a whole number of at least 1"),
        (dict(features="polynomial", feature_size=5), "feature_size=5 .*: give at least head_dim . 2 = 6"),
        (dict(features="sin", feature_size=8.0), "feature_size=8.0: give a whole number"),
        (dict(features="sin", form="paper"), "features='sin' with residual=True in the form: .* give resid"),
        (dict(start="sharp", conv_kernel=1), "start='sharp' looks one token back: give a conv_kernel of at"),
    ],
)
def test_a_wrong_argument_is_named_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(6, 2, 4, **{"depth": 1, **arguments})


@pytest.mark.parametrize("features", FEATURES)
def test_a_sharp_memory_finds_what_followed_one_token(features):
    """Twelve symbols in an order of no pattern, then in another one: what follows a symbol is found again
    behind any other, and the query for it is exactly its key."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        symbols = F.normalize(torch.randn(12, 64), dim=-1) * 8
        layer = NeuralMemory(64, 1, 64, 1, chunk_size=4, start="sharp", features=features)
        assert not layer.initial_weights[0].any(), "what has read nothing answers 0"
        order = torch.randperm(12)
        text = torch.cat([symbols, symbols[order]]).unsqueeze(0)
        stretch, _, _ = layer._stretch(text, layer.initial_state(1).tail, Packed(), None)
        read, _, _ = layer.learn(text, None, BlockContext())
        queries, keys = stretch.queries[0, :, 0], stretch.keys[0, :, 0]
        assert torch.equal(queries[:11], keys[1:12]) and not keys[0].any()
        values = F.silu(layer.input(symbols).chunk(4, -1)[2])
        scores = F.normalize(read.reads[0, 12:, 0], dim=-1) @ F.normalize(values, dim=-1).T
        asked = order != 11
        found.append((scores.argmax(-1) == order + 1)[asked].float().mean().item())
    # The constant of the polynomial makes all keys alike, at a cosine of 0.4 even where they are orthogonal.
    assert sum(found) / 3 > (0.3 if features == "polynomial" else 0.6), found


def test_local_memories_share_the_feature_map_and_gates_see_the_keys_themselves():
    sizes = dict(local_chunk_sizes=[2, 4], shard_length=8, features="sin", feature_size=16)
    form = dict(gates_see_keys=True)
    layer = TNTMemory(6, 2, 4, 1, chunk_size=8, form=form, **sizes)
    maps = [name for name, _ in layer.named_parameters() if name.endswith("log_bandwidth")]
    assert maps == ["feature_map.log_bandwidth"]
    assert {w.shape for m in (layer, *layer.local) for w in m.initial_weights} == {(2, 4, 16)}
    assert {m.gate_key_weight.shape for m in (layer, *layer.local)} == {(3, 2, 1, 4)}
    _, state, trace = layer(torch.randn(1, 5, 6), context=BlockContext(trace=True))
    assert trace.keys.shape == (1, 5, 2, 16) and (trace.keys.norm(dim=-1) < 1).all()
    assert state.local.key_sum.shape == (1, 2, 4, 4)
