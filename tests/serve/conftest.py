"""One server for all tests of this folder, and OpenAI's own client of it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from .servers import KEY, OTHER, Server, engines, running


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = engines()
    folder = tmp_path_factory.mktemp("serve")
    with running(folder / "memories", models, keys=(KEY, OTHER), requests=70, body=1 << 20) as found:
        yield found
    for engine in models.values():
        engine.close()


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as found:
        yield found
