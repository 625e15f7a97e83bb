"""A phase's progress over all ranks, shown by rank 0 as one bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar:
    """Counts answers and tokens of all ranks.

    Args:
        add: Adds to a number that all ranks share and returns the sum; see `Peers.add`.
        shown: This rank shows the bar.
        interval: Seconds between two looks at the others' numbers.
    """

    def __init__(self, add: Callable[[str, int], int], shown: bool, interval: float = 1.0):
        self._add, self._shown, self._interval = add, shown, interval
        self._bar: tqdm | None = None
        self._name = ""
        self._since = self._looked = time.monotonic()

    @contextmanager
    def shown(self, name: str, description: str, total: int) -> Iterator[None]:
        """Shows a bar for as long as the context lasts; see `Ranks.answering`."""
        self._name = name
        self._bar = tqdm(desc=description, total=total, unit="answer", disable=not self._shown)
        self.start_clock()
        try:
            yield
            self._show()
        finally:
            self._bar.close()
            self._bar = None

    def start_clock(self) -> None:
        """What the tokens per second are counted from: now."""
        self._since = time.monotonic()

    def count(self, answers: int, tokens: int) -> None:
        """Adds what this rank has made; nothing where no bar is shown."""
        if self._bar is None:
            return
        self._add(f"{self._name}/answers", answers)
        self._add(f"{self._name}/tokens", tokens)
        self._show()

    def look(self) -> None:
        """Shows what the others have made since the last look, from time to time."""
        if time.monotonic() - self._looked > self._interval:
            self._show()

    def _show(self) -> None:
        if self._bar is None or not self._shown:
            return
        self._looked = time.monotonic()
        answers, tokens = (self._add(f"{self._name}/{kind}", 0) for kind in ("answers", "tokens"))
        rate = tokens / max(time.monotonic() - self._since, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(answers - self._bar.n)
