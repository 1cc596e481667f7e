"""Times one contender in a process of its own: JSON requests on stdin, answers on stdout, a line each."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from contenders import build


def _resident(field: str) -> int:
    """VmRSS or VmHWM, bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field + ":"))


def main() -> None:
    """Serve until stdin closes."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                step = None
                torch.set_num_threads(request["threads"])
                step = build(request["contender"], request["case"])
                began = time.perf_counter()
                step()
                answer = {"first": time.perf_counter() - began}
            elif request["do"] == "time":
                began, used = time.perf_counter(), time.process_time()
                for _ in range(request["repeat"]):
                    step()
                took = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used}
                answer = {name: total / request["repeat"] for name, total in took.items()}
            elif request["do"] == "where":
                import titans

                answer = {"folder": str(Path(titans.__file__).parents[1])}
            elif request["do"] == "forget":
                step, answer = None, {}
                gc.collect()
            else:
                ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system
                before = _resident("VmRSS")
                with open("/proc/self/clear_refs", "w") as refs:
                    refs.write("5")  # the high-water mark begins again here
                step()
                answer = {"bytes": max(0, _resident("VmHWM") - before)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
