"""What holds for the whole suite: the import of Triton, the search of hypothesis, the report of skips."""

import gc
import os
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings

# Triton must be imported the way its interpreter needs it, before anything else imports it.
os.environ["TRITON_INTERPRET"] = "1"
with suppress(ImportError):
    import triton  # noqa: F401

    from .interpreter import make_the_interpreter_fast

    make_the_interpreter_fast()
# A test of the kernels sets the variable again; for all others there is no device.
del os.environ["TRITON_INTERPRET"]
# Commands choose threads for a process that has yet to load torch; called from a test they leave them alone.
import torch  # noqa: F401

# The objects of libraries stay until the end. To search them for garbage while they are loaded, and again and
# again afterwards, takes up to a tenth of the time.
gc.disable()

# No test depends on time, and every run tries the same examples, so that a red test stays red.
settings.register_profile(
    "titans",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("titans")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, by reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if not reasons:
        return
    terminalreporter.section(f"{reasons.total()} tests skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5}  {reason}")
