from collections.abc import Generator

import pytest

from . import problems


def backend_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else str(callspec.params.get("backend"))


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler there is no native backend to test, and without matrix tiles none in bfloat16."""
    backend = backend_of(request.node)
    if backend == "triton":
        pytest.importorskip("triton")
        if request.node.originalname == "test_gradcheck":
            pytest.skip("too many calls for an interpreter: test_triton.py")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(problems, "NARROWEST", 16)
        # Its programs run one after the other, one for each row and head, tile by tile of the hidden layer.
        monkeypatch.setattr(problems, "HEADS", 1)
        monkeypatch.setattr(problems, "EXPANSION", 2)
    if reason := problems.unavailable(backend):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """What kernels do not know they refuse, which is no failure."""
    try:
        return (yield)
    except ValueError as error:
        if backend_of(pyfuncitem) == "triton" and "refuses this call" in str(error):
            pytest.skip(str(error))
        raise
