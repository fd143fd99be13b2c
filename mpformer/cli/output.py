"""What the commands print."""

from __future__ import annotations


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)
