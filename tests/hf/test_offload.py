"""accelerate keeps parameters on the CPU or on disk and brings them where they are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titans.evaluate import keep_memory_only
from titans.stream import Session

from ..variants import VARIANTS
from .models import random_ids, small_model

CASES = [(variant, "cpu", {}) for variant in sorted(VARIANTS)]
CASES += [("mac", "disk", {}), ("lmm", "cpu", dict(memory=dict(local_chunk_sizes=[2], shard_length=8)))]


@pytest.mark.parametrize(("variant", "kept_on", "fields"), CASES)
@torch.no_grad()
def test_an_offloaded_model_reads_and_generates_the_same(
    variant: str, kept_on: str, fields: dict, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = small_model(variant, **fields), random_ids(1, 21)
    restart = torch.tensor([True])

    def results() -> list[torch.Tensor]:
        states = model(ids, return_memory_states=True, use_cache=False).memory_states
        again = model(ids, memory_states=states, restart=restart, use_cache=False).logits
        session = Session(model)
        session.feed(ids[0])
        kept = keep_memory_only(model, session.cache)
        generated = session.generate(max_new_tokens=3, do_sample=False)
        return [again, model(ids, past_key_values=kept).logits, torch.as_tensor(generated)]

    expected = results()
    if kept_on == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for found, wanted in zip(results(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}, "taken away again"
