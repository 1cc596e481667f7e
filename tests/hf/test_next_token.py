"""Without autograd one token is read by an operator for each part of a layer, equal to the plain layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from titans.hf import TitansCache
from titans.memory.backends.native import missing
from titans.state import expanded

from ..tolerances import assert_close
from .models import random_ids, small_model

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no compiled backend: {missing()}")

# The same products in another order, in float64, through some twenty tokens.
SAME = 1e-12
ALWAYS = {"rms_norm", "feed_forward"}
WINDOW, MEMORY = ALWAYS | {"window_token"}, ALWAYS | {"memory_token"}
MAC = MEMORY | {"segment_token", "recall_token"}
# What a step consists of. Options: heads whose widths are whole vectors, and each form of a memory.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "mag": ("mag", {}, WINDOW | MEMORY | {"gate"}),
    "mag with the gates of recall": ("mag", dict(memory=dict(form="recall")), WINDOW | MEMORY),
    "mal": ("mal", dict(memory=dict(form="paper")), WINDOW | MEMORY),
    "lmm": ("lmm", dict(memory=dict(conv_kernel=1)), MEMORY),
    "mac": ("mac", dict(memory_depth=1), MAC),
    "mac in the paper's form": (
        "mac",
        dict(memory=dict(form="paper"), num_persistent_tokens=0, segment_length=3),
        MAC,
    ),
    "window of one token": ("window", dict(sliding_window=1), WINDOW),
}


class Operators(TorchDispatchMode):
    """Notes the library's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "titans_native":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_a_token_read_by_operators_is_that_token(case: str) -> None:
    variant, options, expected = CASES[case]
    model = small_model(variant, head_dim=8, **options)
    # Rows of different lengths: each stands at another place of its chunk and its segment.
    start, mask = random_ids(3, 9), torch.arange(9) < torch.tensor([[9], [4], [2]])
    caches, seen = [], []
    for plain in (False, True):
        with torch.set_grad_enabled(plain), Operators() as operators:
            cache = TitansCache(model.config)
            model(start, attention_mask=mask, past_key_values=cache)
            operators.names.clear()
            found = [model(ids, past_key_values=cache).logits for ids in random_ids(17, 3, 1, seed=1)]
        caches.append(cache)
        seen.append(torch.cat(found, 1).detach())
        assert expected <= operators.names if not plain else not expected & operators.names
    assert_close(seen[0], seen[1], SAME, "logits")
    leaves, others = (pytree.tree_leaves(expanded(cache.states)) for cache in caches)
    for mine, its in zip(leaves, others, strict=True):
        assert_close(mine.double(), its.double(), SAME, "state")


def test_what_an_operator_does_not_know_is_read_without_it() -> None:
    model = small_model("mag", head_dim=8, num_hidden_layers=1)
    cache, layer = TitansCache(model.config), model.model.layers[0].mixer
    heard: list[Tensor] = []

    def used() -> set[str]:
        with Operators() as operators:
            model(random_ids(1, 1), past_key_values=cache.clone())
        return operators.names

    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
        for module, name in ((layer.memory.input, "memory_token"), (layer.attention.query, "window_token")):
            handle = module.register_forward_hook(lambda module, given, y: heard.append(y))
            assert name not in used() and heard
            handle.remove()
            heard.clear()
            assert name in used()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not used() & {"memory_token", "window_token", "feed_forward"}
        layer.memory.backend = "chunkwise"
        assert "memory_token" not in used()
