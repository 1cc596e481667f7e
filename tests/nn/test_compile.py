"""Under torch.compile a layer and a model are what they are without, in one unbroken graph."""

from __future__ import annotations

import pytest
import torch

from titans.nn import NeuralMemory

from ..hf.models import SAME, random_ids, small_model
from ..tolerances import FLOAT32, assert_close

# The compiler looks at every tensor's.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


def test_a_compiled_layer_is_the_layer():
    torch.manual_seed(0)
    # The scan is one operator to the compiler, whatever its network; features are traced.
    layer = NeuralMemory(16, 1, head_dim=16, depth=1, chunk_size=4, features="sin")
    x = torch.randn(2, 9, 16)
    flags = {"mask": torch.rand(2, 9) > 0.2, "reset": torch.rand(2, 9) > 0.8}
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        _, state = run(x)
        y, _ = run(x, state, **flags)
        found.append((y, *torch.autograd.grad(y.sum(), list(layer.parameters()))))
    for name, a, b in zip(("y", *dict(layer.named_parameters())), *found, strict=True):
        assert_close(b, a, FLOAT32, name)


# With local memories it is MAG. Together they have every part that LMM and MAL have.
@pytest.mark.parametrize("variant", ["mac", "tnt"])
def test_a_compiled_model_is_the_model(variant):
    torch._dynamo.reset()
    sizes = dict(num_hidden_layers=1)
    if variant == "tnt":
        sizes, variant = sizes | dict(memory={"local_chunk_sizes": [2], "shard_length": 6}), "mag"
    model, ids = small_model(variant, **sizes), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = []
    with torch.no_grad():
        before = model(ids, use_cache=True).past_key_values
        for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
            if variant == "mac":
                read = run(ids, attention_mask=mask, use_cache=True)
                then = run(ids[:, :1], past_key_values=read.past_key_values)
                found.append(torch.cat([read.logits[mask.bool()], then.logits[:, 0]]))
            else:
                # A call that goes on, alone: what a second graph would have more, the other variant's has.
                read = run(ids, attention_mask=mask, past_key_values=before.clone())
                found.append(read.logits[mask.bool()])
    assert_close(found[1], found[0], SAME, "logits")
