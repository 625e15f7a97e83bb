"""The ranks before there is a process group, and which of them see one `output_dir`.

Ranks of a machine see the same folder, and so do nodes with a filesystem in common. Where they do not, each folder has a
keeper, the first rank that sees it: what another keeper has made goes to rank 0's folder, which is the run's, and the other
way (`ranks/ferry.py`).
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_spin.disk.directory import sign_of

LOG = get_logger(__name__)

# one node may prepare its data while another waits
_PATIENCE = timedelta(days=2)
# seconds until a wait is said; then after twice as many, and so on, up to ten times as many
_SAID_AFTER = 60.0


@dataclass(frozen=True)
class Nodes:
    """Who sees which `output_dir`.

    Attributes:
        folders: For each rank the first one that sees the same folder, its keeper; nothing where all ranks see one.
    """

    folders: tuple[int, ...] = ()

    @property
    def keepers(self) -> list[int]:
        """The keeper of each folder; rank 0 alone where all ranks see one."""
        return sorted({0, *self.folders})

    @property
    def shared(self) -> bool:
        """Whether all ranks see one folder."""
        return len(self.keepers) == 1

    def far(self, rank: int) -> bool:
        """Whether a rank sees another folder than rank 0."""
        return bool(self.folders) and self.folders[rank] != 0


class Meeting:
    """The ranks of a launch, before there is a process group: they meet at the launcher's key-value store.

    Every rank makes the same calls.

    Attributes:
        rank, count: As in the process group that is to come.
        launch: A word that no other start has.
    """

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        # rank 0 may hold the store; the process group's is then another client of the same
        with _waiting(lambda: "all ranks to connect"):
            found, self.rank, self.count = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        # torchrun keeps its store when it restarts the ranks, with all that those before have left there
        self.launch = _greet(PrefixStore("axolotl_spin/greetings", found), self.rank, self.count)
        self._store = PrefixStore(f"axolotl_spin/start-{self.launch}", found)

    def from_main(self, name: str, value: Callable[[], Any]) -> Any:
        """Returns on every rank what rank 0 has to say, as plain JSON."""
        if self.rank == 0:
            self._store.set(name, json.dumps(value()))
        with _waiting(lambda: "rank 0"):
            said = json.loads(self._store.get(name))
        heard = self._store.add(f"{name}/heard", 1)
        if self.rank == 0:  # it may hold the store, and end by what it has said
            with _waiting(lambda: f"{self.count - heard} of {self.count} ranks") as check:
                while heard < self.count:
                    check()
                    time.sleep(0.01)
                    heard = self._store.add(f"{name}/heard", 0)
        return said

    def together(self, name: str, value: Any, make: Callable[[list[Any]], Any]) -> Any:
        """Has every rank say something, and returns on every rank what rank 0 makes of it, all as plain JSON."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

        def said() -> list[Any]:
            found: list[Any] = []
            with _waiting(lambda: f"rank {len(found)}"):
                for rank in range(self.count):
                    found.append(json.loads(self._store.get(f"{name}/{rank}")))
            return found

        return self.from_main(name, lambda: make(said()))

    def agree(self, name: str, fault: str) -> None:
        """Raises on every rank where one has found a fault.

        Args:
            name: Of the question.
            fault: What this rank has found; empty where all is well.

        Raises:
            ValueError: The first rank's that has found one.
        """
        if first := self.together(name, fault, lambda said: next(filter(None, said), "")):
            raise ValueError(first)


def _greet(store: Any, rank: int, count: int) -> str:
    """Returns a word that rank 0 has drawn at this start, told to each rank in reply to a word of its own."""
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", mine)
        with _waiting(lambda: "rank 0"):
            launch = store.get(f"welcome/{rank}/{mine}").decode()
        store.set(f"thanks/{launch}/{rank}", "")
        return launch
    greeted: dict[int, bytes] = {}
    waiting = set(range(1, count))
    with _waiting(lambda: _some(waiting)) as check:
        while waiting:
            check()
            for other in sorted(waiting):
                if store.check([f"thanks/{mine}/{other}"]):
                    waiting.remove(other)
                elif store.check([f"hello/{other}"]) and greeted.get(other) != (word := store.get(f"hello/{other}")):
                    greeted[other] = word  # that of a rank which is no more is followed by another
                    store.set(f"welcome/{other}/{word.decode()}", mine)
            time.sleep(0.02)
    return mine


@contextmanager
def _waiting(whom: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Says from time to time whom this node waits for, from a thread of its own: the store waits in silence.

    A node that fails before it meets the others cannot tell them, and their launchers may not know of it.

    Args:
        whom: Asked each time.

    Yields:
        For waits that go by turns: raises after as long as the store waits.
    """
    over, since = threading.Event(), time.monotonic()

    def say() -> None:
        pause = _SAID_AFTER
        while not over.wait(pause):
            LOG.warning(
                f"waiting for {whom()}, {time.monotonic() - since:.0f} s so far: another node may be preparing its "
                "data still, or may have failed, of which its own log tells",
                main_process_only=False,
            )
            pause = min(2 * pause, 10 * _SAID_AFTER)

    def check() -> None:
        if time.monotonic() - since > _PATIENCE.total_seconds():
            raise TimeoutError(f"waited in vain for {whom()} ({_PATIENCE})")

    thread = threading.Thread(target=say, name="axolotl-spin-meeting", daemon=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of a node is enough
        thread.start()
    try:
        yield check
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def _some(ranks: Collection[int], most: int = 8) -> str:
    """Names ranks, the first of them where there are many."""
    first = sorted(ranks)
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return f"rank {', '.join(map(str, first[:most]))}{more}"


# a store goes with its object, and rank 0 may hold the one that the others are about to use
_meetings: list[Meeting] = []


def meeting_of_nodes() -> Meeting | None:
    """Returns the meeting of a launch on several nodes; None on one, where all see the same files."""
    ranks, here = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("LOCAL_WORLD_SIZE", "")
    if ranks == 1 or here == str(ranks):
        return None
    _meetings.append(Meeting())
    return _meetings[-1]


def ranks_here(otherwise: int) -> int:
    """Returns how many ranks of the launch are on this node, as its launcher says.

    Args:
        otherwise: Where it says nothing.
    """
    # the latter alone by DeepSpeed's launcher
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(said or otherwise)


def find_nodes(meeting: Meeting, output_dir: Path, patience: float = 3.0) -> Nodes:
    """Finds out which ranks see one `output_dir`: the first of each node leaves a file there and looks for the others'.

    Args:
        meeting: All ranks.
        output_dir: The host's, which may be another folder on each node.
        patience: Seconds until a file that is not seen counts as absent: a network's filesystem may be late.
    """
    leads = os.environ.get("LOCAL_RANK", "0") == "0"

    def token(rank: int) -> Path:
        return sign_of(output_dir, meeting.launch, rank)

    if leads:
        token(meeting.rank).touch()
    try:
        leaders = meeting.together("leaders", leads, lambda said: [rank for rank, one in enumerate(said) if one])
        until = time.monotonic() + patience
        while len(seen := [rank for rank in leaders if token(rank).exists()]) < len(leaders):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        folders = meeting.together("seen", seen, first_to_see)
    finally:
        if leads:
            token(meeting.rank).unlink(missing_ok=True)
    return Nodes(tuple(folders))


def first_to_see(seen: Sequence[Iterable[int]]) -> list[int]:
    """Returns for each rank the first one that sees the same folder.

    Args:
        seen: The ranks whose files each rank sees. One that has looked too early may miss a rank that sees its own.
    """
    first = [min(others, default=rank) for rank, others in enumerate(seen)]
    before: list[int] = []
    while first != before:  # the least rank spreads by one look at each turn
        before = first.copy()
        for rank, others in enumerate(seen):
            for other in others:
                first[rank] = first[other] = min(first[rank], first[other])
    return first
