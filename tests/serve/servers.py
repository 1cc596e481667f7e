"""A server in a thread, with models so small that they answer at once, and the plainest of clients: a Titans
model, a graft, and a causal model of transformers."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import titans
from titans.cli.conversation import Conversation
from titans.data import byte_tokenizer
from titans.hf import TitansConfig, TitansForCausalLM
from titans.hf.causal_cache import CausalCache, named_leaves
from titans.serve.engine import Engine
from titans.serve.listening import server_of
from titans.serve.service import Service
from titans.serve.settings import Settings
from titans.stream import Session
from titans.stream.turns import Turns

from ..models import small_causal_lm

KEY, OTHER = "sk-first", "sk-second"
BOOK = "All the world's a stage, and all the men and women merely players. " * 5
END = 257
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|s|>system\nBe brief.<|e|>\n{% endif %}"
    "<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


def byte_model() -> Any:
    """A Titans model of bytes without a chat template, in float64."""
    sizes: dict[str, Any] = dict(
        variant="lmm", vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, head_dim=8, memory_depth=2, memory_expansion=2, chunk_size=16,
        num_persistent_tokens=2, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TitansForCausalLM(TitansConfig(**sizes)).double().eval()
    # Printable letters alone.
    with torch.no_grad():
        model.lm_head.weight[:32] = model.lm_head.weight[127:] = 0
        model.lm_head.weight *= 3
    return model


def chat_model() -> tuple[Any, Any]:
    """A graft with a chat template, whose answers end now and then, in float64."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>"]})
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        base = small_causal_lm("llama", vocab_size=258).double()
        with torch.no_grad():
            base.lm_head.weight[:97] = base.lm_head.weight[123:] = 0
            base.lm_head.weight[END] = 1.2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    # It learns from the first token on: conversations are shorter than the usual warm-up.
    return titans.graft(base, tokenizer, window=64, sinks=2, adaptation={"warm_up": 0}), tokenizer


def engines(rows: int = 64) -> dict[str, Engine]:
    """One for each model."""
    chat, tokenizer = chat_model()
    return {
        "bytes": Engine("bytes", byte_model(), byte_tokenizer(), rows),
        "chat": Engine("chat", chat, tokenizer, rows),
        "llama": Engine("llama", small_causal_lm("llama").double(), byte_tokenizer(), rows),
    }


class Server:
    """Where it listens, and what it serves, where this is in the same process."""

    service: Service

    def __init__(self, port: int, service: Service | None = None) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        if service is not None:
            self.service = service

    def call(
        self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and content of an answer, parsed where it is JSON."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, (dict, list)):
            body, given = json.dumps(body), {"content-type": "application/json", **given}
        if key is not None:
            given["authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            # A body that is refused before its end may find the connection closed; the answer is there.
            with suppress(BrokenPipeError):
                connection.request(method, path, body, given)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        kind = response.headers.get("content-type", "")
        return response.status, json.loads(content) if kind.startswith("application/json") else content


def _listening() -> socket.socket:
    listening = socket.socket()
    # So that a client that does not read is noticed after some kilobytes.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    return listening


def forked(folder: Path) -> tuple[int, Server]:
    """The number of another process that serves the same models, and its server.

    It is a copy of this process, since a new one first loads libraries for seconds.
    """
    listening = _listening()
    if process := os.fork():
        port = listening.getsockname()[1]
        listening.close()
        return process, Server(port)
    try:
        # Another number of threads would wait for those that stayed in the other process.
        torch.set_num_threads(1)
        server_of(Service(Settings(folder), engines())).run(sockets=[listening])
    finally:
        os._exit(1)


@contextmanager
def running(folder: Path, models: dict[str, Engine], **settings: Any) -> Iterator[Server]:
    """A server of models, until the end; the engines go on."""
    service = Service(Settings(folder, **settings), models)
    listening, server = _listening(), server_of(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Server(listening.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
        service.memories.close()


def session_of(server: Server, name: str) -> Session:
    return server.service.engines[name].session()


def conversation_of(server: Server, name: str) -> Conversation:
    session = session_of(server, name)
    return Conversation(session, Turns(server.service.engines[name].tokenizer))


def said(conversation: Conversation, message: str, most: int = 8) -> str:
    pieces: list[str] = []
    conversation.ask(message, pieces.append, lambda: False, max_new_tokens=most, do_sample=False)
    return "".join(pieces)


def new_memory(server: Server, model: str, key: str = KEY, **body: Any) -> str:
    status, found = server.call("POST", "/v1/memories", {"model": model, **body}, key)
    assert status == 200, found
    return str(found["id"])


def saved_session(server: Server, name: str, id: str, path: Path) -> Session:
    """The memory as a client downloads it."""
    status, content = server.call("GET", f"/v1/memories/{id}/file", key=KEY)
    assert status == 200
    path.write_bytes(content)
    engine = server.service.engines[name]
    return Session.load(path, engine.model, engine.tokenizer)


def assert_same(found: Session, expected: Session) -> None:
    assert found.num_tokens == expected.num_tokens and found.recent == expected.recent
    for mine, its in zip(*map(_tensors, (found, expected)), strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-8)


def wait_until(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come")


def _tensors(session: Session) -> list[Any]:
    cache = session.cache
    return (
        list(named_leaves(cache.held).values())
        if isinstance(cache, CausalCache)
        else pytree.tree_leaves(cache.states)
    )
