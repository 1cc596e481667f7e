from collections.abc import Generator

import pytest
import torch

from titans.memory.backends.native import missing

from . import problems

# What takes hundreds of examples: under its interpreter a kernel takes seconds.
TOO_MANY = ("test_any_call", "test_any_split", "test_gradcheck")


def backend_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else str(callspec.params.get("backend"))


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler there is no native backend to test, and without matrix tiles none in bfloat16."""
    backend = backend_of(request.node)
    if backend == "triton":
        pytest.importorskip("triton")
        if request.node.originalname in TOO_MANY:
            pytest.skip("too many examples for an interpreter: test_triton.py")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(problems, "NARROWEST", 16)
        # Its programs run one after the other, one for each row and head.
        monkeypatch.setattr(problems, "HEADS", 1)
    if backend.startswith("native") and (reason := missing()):
        pytest.skip(reason)
    if backend == "native_bfloat16" and not torch.ops.titans_native.has_tiles():
        pytest.skip("this processor has no matrix tiles")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """What kernels do not know they refuse, which is no failure."""
    try:
        return (yield)
    except ValueError as error:
        if backend_of(pyfuncitem) == "triton" and "refuses this call" in str(error):
            pytest.skip(str(error))
        raise
