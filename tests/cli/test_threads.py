"""How many threads a command takes, on machines of files; and that it says so before anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from titans.cli import threads
from titans.cli.threads import Choice, Watch, choose_threads, cpu_quota


def machine(
    root: Path, processors: int, busy: float, *, group: str = "", files: dict[str, str] | None = None
) -> Path:
    """A /proc/stat of so many processors, each busy for so many seconds; and control groups."""
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    ticks = round(busy * os.sysconf("SC_CLK_TCK"))
    lines = [f"cpu{number} {ticks} 0 0 900 5 0 0 0 0 0" for number in range(processors)]
    (root / "proc" / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "ctxt 7"]))
    (root / "proc" / "self" / "cgroup").write_text(group)
    for name, text in (files or {}).items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/app\n", {"app/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/app/part\n", {"app/cpu.max": "100000 100000", "app/part/cpu.max": "max 100000"}, 1.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        (
            "5:cpuset:/\n1:cpu,cpuacct:/box\n0::/\n",
            {"cpu/box/cpu.cfs_quota_us": "50000", "cpu/box/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("", {}, float("inf")),
    ],
)
def test_the_quota_of_control_groups(group: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, 2, 0, group=group, files=files)) == quota


@pytest.mark.parametrize(
    ("processors", "seconds_of_others", "quota", "chosen", "reason"),
    [
        (4, 0.0, "max", None, "for 4 free processors as many as PyTorch chooses"),
        (4, 0.5, "max", 2, "because other programs use 2.0 of 4 processors; OMP_NUM_THREADS sets another"),
        (2, 1.0, "max", 1, "because other programs use 2.0 of 2 processors"),
        (4, 0.0, "250000", 2, "for 2.5 of 4 processors that this process is granted"),
        (4, 0.0, "50000", 1, "for 0.5 of 4 processors"),
        (4, 0.9, "250000", 1, "because other programs use 3.6 of 4 processors"),
    ],
)
def test_threads_for_the_processors_that_are_free(
    processors: int,
    seconds_of_others: float,
    quota: str,
    chosen: int | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 11.0, 11.0])
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(threads, "_processors", lambda: set(range(processors)))
    monkeypatch.setattr(threads, "_used_by_this_process", lambda: 7.0)
    files = {"cpu.max": f"{quota} 100000"}
    watch = Watch(machine(tmp_path, 8, 5.0, group="0::/\n", files=files))
    machine(tmp_path, 8, 5.0 + seconds_of_others, group="0::/\n")
    choice = watch.choose()
    assert choice.threads == chosen and reason in str(choice)


@pytest.mark.parametrize(
    ("group", "limit", "usage"),
    [
        ("0::/box\n", {"box/cpu.max": "300000 100000"}, ("box/cpu.stat", "usage_usec {us}\nuser_usec 1\n")),
        (
            "1:cpu,cpuacct:/box\n",
            {"cpu/box/cpu.cfs_quota_us": "300000", "cpu/box/cpu.cfs_period_us": "100000"},
            ("cpu/box/cpuacct.usage", "{us}000\n"),
        ),
    ],
)
@pytest.mark.parametrize(("by_group", "chosen"), [(3.0, 1), (1.5, 2), (1.2, 3)])
def test_others_of_the_same_control_group_share_its_limit(
    group: str, limit: dict[str, str], usage: tuple[str, str], by_group: float, chosen: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 8 processors all are free, and the group may use 3: in one second it uses `by_group`, we 1 of it."""
    file, text = usage
    clock, own = iter([10.0, 11.0, 11.0]), iter([7.0, 8.0])
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(threads, "_processors", lambda: set(range(8)))
    monkeypatch.setattr(threads, "_used_by_this_process", lambda: next(own))
    watch = Watch(machine(tmp_path, 8, 5.0, group=group, files={**limit, file: text.format(us=40_000_000)}))
    after = text.format(us=40_000_000 + round(by_group * 1e6))
    machine(tmp_path, 8, 5.0 + by_group / 8, group=group, files={file: after})
    choice = watch.choose()
    assert choice.threads == chosen
    assert ("of the 3 processors that its control group grants" in str(choice)) == (chosen < 3)


def test_a_command_says_its_choice_first_and_leaves_the_environment_to_the_user() -> None:
    """Two commands in one process, before and after torch is loaded."""
    program = (
        "import os, sys\n"
        "from titans.cli import main\n"
        "assert main(['info', 'nothing']) == 1\n"
        "assert 'torch' not in sys.modules\n"
        "os.environ['OMP_NUM_THREADS'] = '1'\n"
        "assert main(['bench', 'nothing', '--threads', '3']) == 1\n"
        "import torch\n"
        "assert main(['info', 'nothing']) == 1\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stderr
    first, missing, second, *_, last = done.stderr.splitlines()
    assert first.startswith("threads: ") and "nothing" in missing
    assert second == "threads: 3, by --threads" and "threads:" not in last


@pytest.mark.parametrize(
    ("set_before", "chosen", "changes"),
    [
        ({}, Choice(2, "busy"), {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"}),
        ({}, Choice(None, "free"), {}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, Choice(2, "busy"), {"OMP_NUM_THREADS": "2"}),
        ({"GOMP_SPINCOUNT": "7"}, Choice(1, "busy"), {"OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "8"}, Choice(1, "busy"), {}),
    ],
)
def test_what_the_user_has_set_stays(
    set_before: dict[str, str], chosen: Choice, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(set_before)
    monkeypatch.setattr(threads.os, "environ", environment)
    monkeypatch.setattr(Watch, "choose", lambda _: chosen)
    watch = Watch()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        found = choose_threads(watch, None)
    assert environment == {**set_before, **changes} and found is not None
    assert str(found) == ("threads: OMP_NUM_THREADS=8" if "OMP_NUM_THREADS" in set_before else str(chosen))
