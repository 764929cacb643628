"""A progress that keeps what it was told."""

from __future__ import annotations

from data_tools.progress import Progress


class Listening(Progress):
    """said: every line, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
