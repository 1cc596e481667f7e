import pytest

from titans.memory.native import missing


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """Without a compiler there is no native backend to test."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "native" and (reason := missing()):
        pytest.skip(reason)
