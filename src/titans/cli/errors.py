"""What a command raises when it was called wrongly."""

from __future__ import annotations


class UsageError(ValueError):
    """The options contradict each other or name something that does not exist: exit code 2."""
