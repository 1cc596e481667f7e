"""How many threads a command computes with: as many as there are processors free for it.

Two threads that wait for each other on one free processor are many times slower than one. All of this happens
before torch is loaded, because its OpenMP library reads the environment once.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from math import floor
from pathlib import Path

NUMBER, WAITING, SPINS = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# On limited or shared processors: how often a thread looks whether the others are done before it sleeps,
# GNU's own number for more threads than processors. On free ones its usual number stays, 300 times that:
# there threads that sleep between operations halve the speed of a small model's training.
_FEW_SPINS = "1000"
_LEAST_SECONDS = 0.3
# A processor counts as free when others use at most so much of it.
_TOLERATED = 0.3


@dataclass(frozen=True)
class Choice:
    """threads: how many; None leaves the number to PyTorch. reason: why so many."""

    threads: int | None
    reason: str

    def __str__(self) -> str:
        number = "" if self.threads is None else f"{self.threads}, "
        return f"threads: {number}{self.reason}"


@dataclass(frozen=True)
class _Look:
    """What was used until now, in seconds of a processor; None where the system does not say.

    at: the clock. processors: of those that this process may use. own: by this process. groups: by each
    of the control groups that limit it.
    """

    at: float
    processors: float | None
    own: float
    groups: tuple[float | None, ...]


class Watch:
    """Looks at what other programs compute, from its construction until `choose`.

    Args:
        root: where /proc and /sys are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._processors = _processors()
        self._limits = _limits(root)
        self._then = self._look()

    def choose(self) -> Choice:
        """The number of threads for the processors this process may use and that others leave free."""
        count = len(self._processors)
        time.sleep(max(0.0, _LEAST_SECONDS - (time.monotonic() - self._then.at)))
        now = self._look()
        taken = self._taken_by_others(now)
        free = floor(count - taken + _TOLERATED)
        left, limit, shared = self._left_of_limits(now)
        threads = max(1, min(floor(left), free))
        if threads == count:
            return Choice(None, f"for {count} free processors as many as PyTorch chooses")
        other = f"; {NUMBER} sets another number"
        if left < count and floor(left) <= free:
            if shared <= _TOLERATED:
                return Choice(threads, f"for {left:g} of {count} processors that this process is granted")
            granted = f"{limit:g} processors that its control group grants this process"
            return Choice(threads, f"because other programs use {shared:.1f} of the {granted}{other}")
        return Choice(threads, f"because other programs use {taken:.1f} of {count} processors{other}")

    def _look(self) -> _Look:
        groups = tuple(_used_in(group) for _, group in self._limits)
        return _Look(time.monotonic(), self._used(), _used_by_this_process(), groups)

    def _taken_by_others(self, now: _Look) -> float:
        """Processors that others kept busy since the beginning; without /proc in the last minute."""
        then = self._then
        if now.processors is None or then.processors is None:
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return max(0.0, now.processors - then.processors - (now.own - then.own)) / (now.at - then.at)

    def _left_of_limits(self, now: _Look) -> tuple[float, float, float]:
        """Of the control group that leaves least: what it leaves, its limit, and what others of it use."""
        then, found = self._then, [(float(len(self._processors)), float("inf"), 0.0)]
        for (limit, _), after, before in zip(self._limits, now.groups, then.groups, strict=True):
            shared = 0.0
            if after is not None and before is not None:
                shared = max(0.0, after - before - (now.own - then.own)) / (now.at - then.at)
            found.append((limit - (shared if shared > _TOLERATED else 0.0), limit, shared))
        return min(found)

    def _used(self) -> float | None:
        """Seconds for which this process's processors have been busy or withheld by a hypervisor."""
        try:
            lines = (self._root / "proc" / "stat").read_text().splitlines()
        except OSError:
            return None
        ticks = 0
        for line in lines:
            name, *times = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._processors:
                user, nice, system, _idle, _waiting, *rest = map(int, times[:8])
                ticks += user + nice + system + sum(rest)
        return ticks / os.sysconf("SC_CLK_TCK")


def choose_threads(watch: Watch, requested: int | None) -> Choice | None:
    """Set this process's environment for torch and return the choice; None where torch is loaded already.

    Args:
        watch: what others compute.
        requested: the command's own `--threads`, if any.
    """
    if "torch" in sys.modules:
        return None
    if requested is not None:
        return Choice(requested, "by --threads")
    if NUMBER in os.environ:
        return Choice(None, f"{NUMBER}={os.environ[NUMBER]}")
    choice = watch.choose()
    if choice.threads is not None:
        os.environ[NUMBER] = str(choice.threads)
        if WAITING not in os.environ:
            os.environ.setdefault(SPINS, _FEW_SPINS)
    return choice


def cpu_quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that control groups grant this process; inf without a limit."""
    return min((limit for limit, _ in _limits(root)), default=float("inf"))


def _limits(root: Path) -> list[tuple[float, Path]]:
    """Every control group, of either version, that limits this process: processors, and its folder."""
    groups = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = groups / (controllers and "cpu")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            group = folder.joinpath(*parts[:depth])
            if (limit := _quota_of(group)) < float("inf"):
                found[group] = limit
    return [(limit, group) for group, limit in found.items()]


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else float("inf")
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")


def _used_in(group: Path) -> float | None:
    """Seconds that the processes of a control group have computed; None if it does not say."""
    try:
        if (group / "cpuacct.usage").is_file():
            return float((group / "cpuacct.usage").read_text()) / 1e9
        numbers = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        return float(numbers["usage_usec"]) / 1e6
    except (OSError, ValueError, KeyError):
        return None


def _processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _used_by_this_process() -> float:
    times = os.times()
    return times.user + times.system
