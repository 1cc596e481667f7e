"""How fast `titans serve` answers when 1, 8 and 64 clients ask at once.

    python benchmarks/serve.py titans-lmm-tiny
    python benchmarks/serve.py titans-smollm2-135m --clients 1 8 --tokens 32 --json found.json

Starts a server of the model in a process of its own. Every client has a memory of its own, sends a text and
asks for an answer of a fixed number of tokens, streamed, all at the same time. Prints a table: tokens per
second of all answers together, the time to an answer's first token, and between two tokens of one answer
(median and 95 % quantile). Processor time is that of the server.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TEXT = "Now is the winter of our discontent made glorious summer by this sun of York; "


def call(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {response.read()[:300]!r}")
    return response


def ask(
    port: int, memory: str, tokens: int, number: int, ready: threading.Barrier, times: list[float]
) -> None:
    """Note when the request is sent and when each token comes."""
    body = {
        "prompt": f"{number}: {TEXT}", "memory": memory, "max_tokens": tokens, "stream": True, "seed": number,
        "logprobs": 0,
    }  # fmt: skip
    ready.wait()
    times.append(time.perf_counter())
    for line in call(port, "/v1/completions", body):
        if line.startswith(b"data: {"):
            found = json.loads(line[6:])["choices"][0]["logprobs"]
            times += [time.perf_counter()] * len(found["tokens"] if found else ())


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, process: int, clients: int, tokens: int) -> dict[str, Any]:
    memories = [json.loads(call(port, "/v1/memories", {}).read())["id"] for _ in range(clients)]
    ready, times = threading.Barrier(clients + 1), [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=ask, args=(port, memory, tokens, n, ready, times[n]))
        for n, memory in enumerate(memories)
    ]
    for thread in threads:
        thread.start()
    before = processor_seconds(process)
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds, used = time.perf_counter() - began, processor_seconds(process) - before
    first = [mine[1] - mine[0] for mine in times]
    between = [b - a for mine in times for a, b in itertools.pairwise(mine[1:])]
    generated = sum(len(mine) - 1 for mine in times)
    return {
        "clients": clients,
        "tokens": generated,
        "tokens_per_second": round(generated / seconds, 1),
        "tokens_per_processor_second": round(generated / max(used, 0.01), 1),
        "first_token_ms": [round(1000 * x) for x in quantiles(first)],
        "next_token_ms": [round(1000 * x, 1) for x in quantiles(between)],
    }


def quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="titans-lmm-tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "titans", "serve", options.model, "--port", "0"]
        command += ["--memories", f"{folder}/memories", "--timeout", "3600"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        try:
            port = next(int(m[1]) for line in server.stderr if (m := re.search(r"http://[^ ]*:(\d+)", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            measure(port, server.pid, 1, 4)
            load = os.getloadavg()[0]
            rows = [measure(port, server.pid, clients, options.tokens) for clients in options.clients]
        finally:
            server.terminate()
            server.wait()
    about = {
        "model": options.model, "tokens_each": options.tokens, "processors": os.cpu_count(),
        "machine": platform.processor() or platform.machine(), "load_before": round(load, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "chosen by the command"),
    }  # fmt: skip
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    print("| clients | tokens/s | tokens per processor second | first token, ms | next token, ms |")
    print("|---|---|---|---|---|")
    for row in rows:
        first, later = (
            " / ".join(f"{x:,}" for x in row[name]) for name in ("first_token_ms", "next_token_ms")
        )
        print(
            f"| {row['clients']} | {row['tokens_per_second']} | {row['tokens_per_processor_second']} "
            f"| {first} | {later} |"
        )
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
