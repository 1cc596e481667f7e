"""What `generate` gives, while it is still at work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class _Sink(BaseStreamer):  # type: ignore[misc]
    """Hands on the ids that are generated, without the prompt that comes first."""

    def __init__(self, give: Callable[[int], None]) -> None:
        self.give, self.prompt_seen = give, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.give(token)
        self.prompt_seen = True

    def end(self) -> None:
        """The end is seen where `generate` returns."""


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def generated(generate: Callable[..., Any], kwargs: dict[str, Any]) -> Iterator[int]:
    """The ids of generate(**kwargs) one by one, from a thread of its own; whoever stops asking stops it.

    Raises:
        ValueError: for a streamer or several beams, which have no order in time.
        Exception: whatever `generate` raises.
    """
    if kwargs.get("streamer") is not None or (kwargs.get("num_beams") or 1) > 1:
        raise ValueError("stream=True gives tokens as they come: leave streamer and num_beams out")
    found: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    stop, failed = threading.Event(), []
    criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or []), _Stopped(stop)])

    def work() -> None:
        try:
            generate(**kwargs, streamer=_Sink(found.put), stopping_criteria=criteria)
        except BaseException as error:
            failed.append(error)
        finally:
            found.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (token := found.get()) is not None:
            yield token
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
