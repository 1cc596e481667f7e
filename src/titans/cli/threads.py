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


class Watch:
    """Looks at what other programs compute, from its construction until `choose`.

    Args:
        root: where /proc and /sys are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._processors = _processors()
        self._began = time.monotonic(), self._used(), _used_by_this_process()

    def choose(self) -> Choice:
        """The number of threads for the processors this process may use and that others leave free."""
        count, quota = len(self._processors), cpu_quota(self._root)
        granted = min(count, quota)
        taken = self._taken_by_others()
        free = floor(count - taken + _TOLERATED)
        threads = max(1, min(floor(granted), free))
        if threads == count:
            return Choice(None, f"for {count} free processors as many as PyTorch chooses")
        if granted < count and floor(granted) <= free:
            return Choice(threads, f"for {granted:g} of {count} processors that this process is granted")
        busy = f"because other programs use {taken:.1f} of {count} processors"
        return Choice(threads, f"{busy}; {NUMBER} sets another number")

    def _taken_by_others(self) -> float:
        """Processors that others kept busy since the beginning; without /proc in the last minute."""
        began, used_then, own_then = self._began
        time.sleep(max(0.0, _LEAST_SECONDS - (time.monotonic() - began)))
        used, own = self._used(), _used_by_this_process()
        if used is None or used_then is None:
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return max(0.0, used - used_then - (own - own_then)) / (time.monotonic() - began)

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
    groups = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    least = float("inf")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = groups / (controllers and "cpu")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            least = min(least, _quota_of(folder.joinpath(*parts[:depth])))
    return least


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else float("inf")
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")


def _processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _used_by_this_process() -> float:
    times = os.times()
    return times.user + times.system
