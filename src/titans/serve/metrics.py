"""Counts of what a server does, as text in Prometheus' form. Nothing in them names a user or a text."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Requests by route and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str, int], int] = defaultdict(int)
        self._seconds: dict[str, list[float]] = {}

    def note(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        with self._lock:
            self._requests[method, route, status] += 1
            found = self._seconds.setdefault(route, [0.0] * (len(_SECONDS) + 2))
            for index, limit in enumerate(_SECONDS):
                found[index] += seconds <= limit
            found[-2] += 1
            found[-1] += seconds

    def text(self, gauges: Iterable[tuple[str, str, str, Labels, float]]) -> str:
        """The exposition: own counts, and others given as (name, type, help, labels, value)."""
        lines: list[str] = []
        with self._lock:
            lines += _head("titans_requests_total", "counter", "Requests answered.")
            for (method, route, status), count in sorted(self._requests.items()):
                labels = (("method", method), ("route", route), ("status", str(status)))
                lines.append(_line("titans_requests_total", labels, count))
            name = "titans_request_seconds"
            lines += _head(name, "histogram", "Time from a request to the end of its answer.")
            for route, found in sorted(self._seconds.items()):
                bounds = [*(f"{limit:g}" for limit in _SECONDS), "+Inf"]
                for bound, count in zip(bounds, found, strict=False):
                    lines.append(_line(f"{name}_bucket", (("route", route), ("le", bound)), count))
                lines.append(_line(f"{name}_count", (("route", route),), found[-2]))
                lines.append(_line(f"{name}_sum", (("route", route),), found[-1]))
        known = ""
        for name, kind, about, labels, value in gauges:
            if name != known:
                lines += _head(name, kind, about)
                known = name
            lines.append(_line(name, labels, value))
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{shown}}} {value:.10g}" if shown else f"{name} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
