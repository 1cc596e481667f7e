import pytest
import torch

from titans.memory.native import missing


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """Without a compiler there is no native backend to test, and without matrix tiles none in bfloat16."""
    callspec = getattr(request.node, "callspec", None)
    backend = "" if callspec is None else str(callspec.params.get("backend"))
    if backend == "triton":
        pytest.skip("its shapes are its own: test_triton.py")
    if backend.startswith("native") and (reason := missing()):
        pytest.skip(reason)
    if backend == "native_bfloat16" and not torch.ops.titans_native.has_tiles():
        pytest.skip("this processor has no matrix tiles")
