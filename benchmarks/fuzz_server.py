"""Do hostile requests ever end in a 5xx, or in a hang? Requests mutated at random, each sent to a server.

    python benchmarks/fuzz_server.py                        # 10,000 requests, counts by status
    python benchmarks/fuzz_server.py --count 300 --seed 7

The server has two small random models. Each request is one that is right, altered: bytes of the head or body
flipped, cut or repeated, fields of the JSON replaced by values of other types and sizes, paths with what
names files elsewhere, bodies that never come. Each has to be answered with 4xx (or 200, where the change did
not matter) within seconds. Ends with 1 if any is not; these are printed.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 20
_VALUES: list[Any] = [
    None, True, -1, 0, 1e308, 2**70, 1.5, "", "x", "\x00", "💥" * 50, [], {}, [[]], [None], {"a": {}},
    "mem_" + "0" * 24, "../../etc/passwd", [-1], [2**63], [256], "a" * 3000, [0.5], {"role": "user"},
    [{"role": "user", "content": None}],
]  # fmt: skip
_RAW = [
    b"", b"{", b"[" * 20_000, b'{"prompt":' * 5_000, b"\xff\xfe", b"null", b"0", b'"', b"NaN",
    b'{"prompt":"\\ud800"}',
    b'{"prompt":"x","max_tokens":1e999}', b'{"prompt":"x","temperature":NaN}', 
    b'{"prompt":1' + b"0" * 10_000 + b"}",
    b'{"prompt":"x","seed":99999999999999999999}', b'{"prompt":"x","prompt":3}', b'{"text":"\xc3"}',
    # An error in each of many places.
    b'{"prompt":[' + b"{}," * 15_000 + b"{}]}", b'{"messages":[' + b"[]," * 15_000 + b"[]]}",
    b'{"prompt":"x"' + b"".join(b',"%d":1' % number for number in range(4_000)) + b"}",
]  # fmt: skip
_IDS = [
    "..", "../x", "%2e%2e%2f", "mem_" + "0" * 24, "mem_" + "A" * 24, "%00", "x" * 3000, "mem_", ".lock",
    "%ff", "*", "a/b", "mem_" + "0" * 24 + "%0a", "💥".encode().decode("latin-1"),
]  # fmt: skip


def request(
    method: str, path: str, body: bytes = b"", kind: str = "application/json", length: int | None = None
) -> bytes:
    """A request as it goes over the wire; length: what it says of the body, if that is wrong."""
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: {kind}\r\n"
        f"content-length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode("latin-1") + body


def send(port: int, content: bytes) -> int:
    """The status of the answer; 400 where the connection is closed without one, 599 where nothing comes, or
    an error of the server as a part of a stream."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.settimeout(SECONDS)
        try:
            connection.sendall(content)
            answer = b""
            while b"\r\n\r\n" not in answer:
                if not (part := connection.recv(4096)):
                    return 400
                answer += part
            head, _, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            # A stream ends with an empty chunk.
            while len(body) < int(length[1]) if length else not body.endswith(b"\r\n0\r\n\r\n"):
                if not (part := connection.recv(65536)):
                    break
                body += part
        except ConnectionError:
            return 400
        except TimeoutError:
            return 599
    return 599 if b'"server_error"' in body else int(head.split(b" ", 2)[1])


def right(memory: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that are right, and answered at once."""
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return [
        ("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 2, "temperature": 1, "stop": ["x"]}),
        ("POST", "/v1/completions", {"prompt": [[1, 2]], "max_tokens": 1, "logprobs": 2, "n": 2, "seed": 1}),
        ("POST", "/v1/chat/completions", {**chat, "model": "chat", "top_p": 0.5, "stream": True}),
        ("POST", "/v1/chat/completions", {**chat, "memory": memory, "remember": False}),
        ("POST", "/v1/memories", {"copy_of": memory}),
        ("POST", f"/v1/memories/{memory}/read", {"text": "Hello", "stream": True, "detail": True}),
    ]


def one_of_each(port: int, memory: str) -> Iterator[tuple[int, bytes]]:
    """Status and request of attacks that are known by name."""
    paths = ["/v1/completions", "/v1/chat/completions", f"/v1/memories/{memory}/read", "/v1/memories"]
    contents = [request("POST", paths[n % 3], body) for n, body in enumerate(_RAW)]
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/file"), ("PUT", "/file"), ("POST", "/fork")):
        contents += [request(method, f"/v1/memories/{id}{end}") for id in _IDS]
    form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="../../x.%s"\r\n\r\n%s\r\n--b--\r\n'
    read, kind = paths[2], "multipart/form-data; boundary=b"
    contents += [
        request("POST", read, form % (b"pdf", b"%PDF-1.7 no"), kind),
        request("POST", read, form % (b"txt", b"\xff\xff"), kind),
        request("POST", read, form % (b"txt", b""), kind),
        request("POST", read, form[:40], kind),
        request("POST", read, form, "multipart/form-data"),
        request("POST", read, b"x", "text/plain; charset=" + "x" * 500),
        request("POST", read, b"\x1f\x8b\x08", "text/plain"),
        request("POST", read, b"x" * 200_000, "text/plain"),
        request("POST", read, b"", length=10**12),
        request("POST", read, b"{", length=50),
        request("POST", paths[0], b"", length=-1),
        request("PUT", f"/v1/memories/{memory}/file", b"\xff" * 8 + b"{}", "application/octet-stream"),
        request("PUT", f"/v1/memories/{memory}/file", b"\x40" + b"\0" * 7 + b"[" * 64, "text/plain"),
        request("BREW", "/v1/models"), request("GET", "/v1/models/" + "x" * 9_000), request("PATCH", "/"),
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n", b"GET /\r\n\r\n",
        b"", b"GET / HTTP/1.1\r\nhos",
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    ]  # fmt: skip
    for content in contents:
        yield send(port, content), content[:300]


def attack(port: int, memory: str, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Status and request of so many requests altered at random."""
    draw = random.Random(seed)
    for _ in range(count):
        method, path, body = draw.choice(right(memory))
        kind, altered = (
            draw.choice(["field", "field", "field", "bytes", "head", "path"]),
            json.loads(json.dumps(body)),
        )
        if kind == "field":
            for _ in range(draw.randint(1, 2)):
                name = draw.choice(
                    [*altered, "memory", "logit_bias", "unknown", "stop", "stream_options", "n"]
                )
                altered[name] = draw.choice(_VALUES)
                # Long answers are no attack.
                if "max_tokens" in body and not isinstance(altered.get("max_tokens"), (str, list, dict)):
                    altered["max_tokens"] = min(altered["max_tokens"] or 1, 3)
        content = request(method, path, json.dumps(altered).encode())
        if kind == "path":
            content = request(method, f"{path}/{draw.choice(_IDS)}", json.dumps(altered).encode())
        if kind in ("bytes", "head"):
            edge = content.index(b"\r\n\r\n") + 4
            low, high = (0, edge) if kind == "head" else (edge, len(content))
            at = draw.randrange(low, high)
            change = draw.choice([bytes([draw.randrange(256)]), b"", content[at:high] * 3])
            content = content[:at] + change + content[at + 1 :]
        yield send(port, content), content[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.serve.servers import engines, running

    # It notes every request that is no HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    statuses: collections.Counter[int] = collections.Counter()
    wrong, slowest, models = [], 0.0, engines()
    limits: dict[str, Any] = dict(body=100_000, json=50_000, body_seconds=0.5, memories=100)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "memories", models, **limits) as server,
    ):
        memory = server.call("POST", "/v1/memories")[1]["id"]
        began = time.perf_counter()
        for attacks in (
            one_of_each(server.port, memory),
            attack(server.port, memory, options.count, options.seed),
        ):
            before = time.perf_counter()
            for status, content in attacks:
                statuses[status] += 1
                slowest = max(slowest, time.perf_counter() - before)
                before = time.perf_counter()
                if status != 200 and not 400 <= status < 500:
                    wrong.append((status, content))
        seconds = time.perf_counter() - began
    for engine in models.values():
        engine.close()
    print(f"{statuses.total():,} requests in {seconds:.0f} s; the slowest took {slowest:.1f} s")
    for status, number in sorted(statuses.items()):
        print(f"{status} {number:6,}")
    for status, content in wrong:
        print(f"WRONG {status}: {content!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
