"""How fast `titans serve` answers when 1, 8 and 64 clients ask at once.

    python benchmarks/serve.py titans-lmm-tiny
    python benchmarks/serve.py titans-smollm2-135m --compare smollm2-135m --tokens 12 --json found.json

Starts a server of the model in a process of its own. All clients ask at the same time, each for a streamed
chat answer of at most so many tokens; each has a memory of its own, which holds the turn and is on the disk
when the answer ends. --compare names a transformer of the same size, which then
answers the same requests without a memory: served by `titans serve`, and by `transformers serve` without and
with continuous batching. Prints a table: tokens per second of all answers together, the time to an answer's
first text, and between two pieces of its text (median / 95 % quantile). Processor time is that of the server.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = "Write a long story about a winter of discontent that was made glorious summer by the sun of York."


@dataclass(frozen=True)
class System:
    """A server to measure. model: what requests call it. remembers: whether each client has a memory."""

    name: str
    command: list[str]
    model: str
    remembers: bool = False


def systems(options: argparse.Namespace, folder: str) -> list[System]:
    def titans(model: str, remembers: bool) -> System:
        command = [sys.executable, "-m", "titans", "serve", model, "--timeout", "3600"]
        name = f"titans serve {Path(model).name}" + (", memories" if remembers else "")
        own = tempfile.mkdtemp(dir=folder)
        return System(name, [*command, "--memories", f"{own}/memories"], Path(model).name, remembers)

    found = [titans(options.model, True)]
    if options.compare is not None:
        found.append(titans(options.compare, False))
        other = base_folder(options.compare)
        program = "from transformers.cli.transformers import main; main()"
        command = [sys.executable, "-c", program, "serve", other, "--device", "cpu", "--dtype", options.dtype]
        found.append(System("transformers serve", command, other))
        batching = ["--continuous-batching", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]
        found.append(System("transformers serve, continuous batching", [*command, *batching], other))
    return found


def base_folder(name: str) -> str:
    """Where a model of transformers lies."""
    if Path(name).is_dir():
        return name
    from titans.zoo.smollm import smollm_folder

    return str(smollm_folder())


def call(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {response.read()[:300]!r}")
    return response


@dataclass
class Client:
    """When it asked, and when each piece of its answer came."""

    body: dict[str, Any]
    times: list[float]
    tokens: int = 0

    def ask(self, port: int, ready: threading.Barrier) -> None:
        ready.wait()
        self.times.append(time.perf_counter())
        for line in call(port, "/v1/chat/completions", self.body):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                self.times.append(time.perf_counter())
            if usage := event.get("usage"):
                self.tokens = usage["completion_tokens"]


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(system: System, port: int, process: int, clients: int, tokens: int) -> dict[str, Any]:
    asking = []
    for number in range(clients):
        body: dict[str, Any] = {
            "model": system.model, "messages": [{"role": "user", "content": f"{number}: {TEXT}"}],
            "max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if system.remembers:
            body["memory"] = json.loads(call(port, "/v1/memories", {}).read())["id"]
        asking.append(Client(body, []))
    ready = threading.Barrier(clients + 1)
    threads = [threading.Thread(target=client.ask, args=(port, ready)) for client in asking]
    for thread in threads:
        thread.start()
    before = processor_seconds(process)
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds, used = time.perf_counter() - began, processor_seconds(process) - before
    if any(len(client.times) < 2 for client in asking):
        raise SystemExit(f"{system.name}: an answer of {clients} has no text")
    generated = sum(client.tokens for client in asking)
    between = [b - a for client in asking for a, b in itertools.pairwise(client.times[1:])]
    return {
        "system": system.name,
        "clients": clients,
        "tokens": generated,
        "tokens_per_second": round(generated / seconds, 1),
        "tokens_per_processor_second": round(generated / max(used, 0.01), 1),
        "first_text_ms": [round(1000 * x) for x in quantiles([c.times[1] - c.times[0] for c in asking])],
        "next_text_ms": [round(1000 * x, 1) for x in quantiles(between or [0.0])],
    }


def quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]


def run(system: System, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start a server, measure it, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([*system.command, "--port", str(port)], env=environment, **quiet)
    try:
        while True:
            time.sleep(0.5)
            if server.poll() is not None:
                raise SystemExit(f"it has ended: {' '.join(system.command)} --port {port}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                continue
        measure(system, port, server.pid, 1, 4)
        return [measure(system, port, server.pid, clients, options.tokens) for clients in options.clients]
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="titans-lmm-tiny")
    parser.add_argument("--compare", help="a transformer of the same size: a name of the library or a folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the transformer under transformers serve")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {
        "tokens_each": options.tokens, "processors": os.cpu_count(),
        "machine": platform.processor() or platform.machine(), "load_before": round(os.getloadavg()[0], 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "chosen by each command"),
    }  # fmt: skip
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    print("| server | clients | tokens/s | tokens per processor second | first text, ms | next text, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for system in systems(options, folder):
            for row in run(system, options):
                rows.append(row)
                first, later = (
                    " / ".join(f"{x:,}" for x in row[name]) for name in ("first_text_ms", "next_text_ms")
                )
                print(
                    f"| {row['system']} | {row['clients']} | {row['tokens_per_second']} "
                    f"| {row['tokens_per_processor_second']} | {first} | {later} |", flush=True,
                )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
