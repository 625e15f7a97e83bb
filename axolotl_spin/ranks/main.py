"""The ranks of a launch as one: rank 0 does it and all learn, one fails and all stop, all count and one bar shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from axolotl.utils.logging import get_logger
from torch import Tensor
from tqdm import tqdm

from axolotl_spin.ranks.bar import Bar
from axolotl_spin.ranks.ferry import Ferry
from axolotl_spin.ranks.nodes import Nodes
from axolotl_spin.ranks.peers import Peers

LOG = get_logger(__name__)
T = TypeVar("T")


class Ranks:
    """All ranks, seen from this one; a context within which a failure on any of them reaches all.

    Every rank makes the same calls, `check`, `say` and `made` aside.

    Args:
        accelerator: The trainer's.
        nodes: Which ranks see one `output_dir`.

    Attributes:
        accelerator: The trainer's, for what concerns wrapped models.
        rank: This one, from 0.
        count: How many there are.
        main: Whether this is rank 0.
        device: Where this rank's model is.
        ferry: Carries files between folders that are not one.
    """

    def __init__(self, accelerator: Any, nodes: Nodes = Nodes()):  # noqa: B008 (it is frozen)
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.main: bool = accelerator.is_main_process
        self.device = accelerator.device
        self._peers = Peers()
        self._bar = Bar(self._peers.add, shown=self.main)
        self._turns = 0
        self.ferry = Ferry(nodes, self.rank, self.meet_again)

    def __enter__(self) -> Ranks:
        self._peers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._peers.__exit__(kind, error, at)

    def on_main(self, work: Callable[[], T]) -> T:
        """Has rank 0 do something while the others wait, however long it takes; what it returns or raises, all do."""
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        self.meet_again()  # the broadcast is a collective, whose time-out may be shorter than the work
        broadcast_object_list(box)
        if box[1] is not None:
            with suppress(Exception):  # what stops this is told by the rank that it stopped
                self.meet_again()  # every rank has the error before one of them ends by it
            self._peers.common = box[1]
            raise box[1]
        return box[0]

    def say(self, line: str) -> None:
        """Logs a line once, from rank 0."""
        if self.main:
            LOG.info(line)

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of every rank's tensor."""
        return self.accelerator.reduce(value, "sum")

    def wait(self) -> None:
        """Waits for every rank, in a collective: for what takes moments."""
        self.accelerator.wait_for_everyone()

    def meet(self, name: str) -> None:
        """Waits for every rank, however long that takes; see `Peers.meet`."""
        self._peers.meet(name)

    def meet_again(self) -> None:
        """Waits for every rank at a place that is met often: before a collective, where ranks may be far apart."""
        self._turns += 1
        self.meet(f"turn/{self._turns}")

    def check(self) -> None:
        """Raises what another rank failed with, and keeps the bar moving by what the others make. Call it often.

        Raises:
            PeerFailedError: Another rank failed.
        """
        self._peers.check()
        self._bar.look()

    @contextmanager
    def answering(self, name: str, description: str, total: int) -> Iterator[None]:
        """Shows, from rank 0, how many answers and tokens all ranks make while the context lasts.

        Args:
            name: Of the phase, once in a launch.
            description: Of the bar.
            total: Answers that all ranks together make.
        """
        with self._bar.shown(name, description, total):
            yield

    def made(self, answers: int, tokens: int) -> None:
        """Adds to what `answering` shows what this rank has made."""
        self._bar.count(answers, tokens)

    def start_clock(self) -> None:
        """What the bar's tokens per second are counted from: now."""
        self._bar.start_clock()

    def bar(self, description: str, total: int, unit: str) -> tqdm:
        """Returns a bar of this rank's own progress, shown by rank 0 alone.

        It is gone at its end: the phase's line has the figures, and the training's bar stays the only one.
        """
        return tqdm(desc=description, total=total, unit=unit, leave=False, dynamic_ncols=True, disable=not self.main)
