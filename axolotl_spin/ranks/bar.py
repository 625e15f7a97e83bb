"""A phase's progress over all ranks, shown by rank 0 as one bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from axolotl_spin.ranks.peers import Peers


class Tally:
    """Counts answers and tokens of all ranks.

    Args:
        peers: Whose numbers are shared.
        shown: This rank shows the bar.
        interval: Seconds between two looks at the others' numbers.
    """

    def __init__(self, peers: Peers, shown: bool, interval: float = 1.0):
        self.peers, self.shown, self.interval = peers, shown, interval
        self._bar: tqdm | None = None
        self._name = ""
        self._since = self._looked = time.monotonic()

    @contextmanager
    def bar(self, name: str, description: str, total: int) -> Iterator[None]:
        """Shows a bar for as long as the context lasts; every rank must enter it.

        Args:
            name: Of the phase, once in a launch.
            description: Of the bar.
            total: Answers that all ranks together make.
        """
        self._name = name
        self._bar = tqdm(desc=description, total=total, unit="answer", disable=not self.shown)
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
        """Adds what this rank has made."""
        self.peers.add(f"{self._name}/answers", answers)
        self.peers.add(f"{self._name}/tokens", tokens)
        self._show()

    def pulse(self) -> None:
        """Raises what another rank failed with, and keeps the bar moving by what the others make. Call it often."""
        self.peers.check()
        if time.monotonic() - self._looked > self.interval:
            self._show()

    def _show(self) -> None:
        if self._bar is None or not self.shown:
            return
        self._looked = time.monotonic()
        answers, tokens = (self.peers.add(f"{self._name}/{kind}", 0) for kind in ("answers", "tokens"))
        rate = tokens / max(time.monotonic() - self._since, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(answers - self._bar.n)
