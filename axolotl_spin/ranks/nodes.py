"""The ranks before there is a process group, and which of them see one `output_dir`.

Ranks of a machine see the same folder, and so do nodes with a filesystem in common. Where they do not, each folder has a
keeper, the first rank that sees it: what another keeper has made goes to rank 0's folder, which is the run's, and the other
way (`ranks/ferry.py`).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

# one node may prepare its data while another waits
_PATIENCE = timedelta(days=2)


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
        found, self.rank, self.count = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        # torchrun keeps its store when it restarts the ranks, with all that those before have left there
        self.launch = _greet(PrefixStore("axolotl_spin/greetings", found), self.rank, self.count)
        self._store = PrefixStore(f"axolotl_spin/start-{self.launch}", found)

    def from_main(self, name: str, value: Callable[[], Any]) -> Any:
        """Returns on every rank what rank 0 has to say, as plain JSON."""
        if self.rank == 0:
            self._store.set(name, json.dumps(value()))
        said = json.loads(self._store.get(name))
        heard = self._store.add(f"{name}/heard", 1)
        while self.rank == 0 and heard < self.count:  # it may hold the store, and end by what it has said
            time.sleep(0.01)
            heard = self._store.add(f"{name}/heard", 0)
        return said

    def together(self, name: str, value: Any, make: Callable[[list[Any]], Any]) -> Any:
        """Has every rank say something, and returns on every rank what rank 0 makes of it, all as plain JSON."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        said = (json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self.count))
        return self.from_main(name, lambda: make(list(said)))

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
        launch = store.get(f"welcome/{rank}/{mine}").decode()
        store.set(f"thanks/{launch}/{rank}", "")
        return launch
    greeted: dict[int, bytes] = {}
    waiting = set(range(1, count))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"thanks/{mine}/{other}"]):
                waiting.remove(other)
            elif store.check([f"hello/{other}"]) and greeted.get(other) != (word := store.get(f"hello/{other}")):
                greeted[other] = word  # that of a rank which is no more is followed by another
                store.set(f"welcome/{other}/{word.decode()}", mine)
        time.sleep(0.02)
    return mine


# a store goes with its object, and rank 0 may hold the one that the others are about to use
_meetings: list[Meeting] = []


def meeting_of_nodes() -> Meeting | None:
    """Returns the meeting of a launch on several nodes; None on one, where all see the same files."""
    ranks, here = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("LOCAL_WORLD_SIZE", "")
    if ranks == 1 or here == str(ranks):
        return None
    _meetings.append(Meeting())
    return _meetings[-1]


def find_nodes(meeting: Meeting, output_dir: Path, patience: float = 3.0) -> Nodes:
    """Finds out which ranks see one `output_dir`: the first of each node leaves a file there and looks for the others'.

    Args:
        meeting: All ranks.
        output_dir: The host's, which may be another folder on each node.
        patience: Seconds until a file that is not seen counts as absent: a network's filesystem may be late.
    """
    leads = os.environ.get("LOCAL_RANK", "0") == "0"

    def token(rank: int) -> Path:
        return output_dir / f".spin-{meeting.launch}-{rank}"

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
    for _ in first:  # the least rank spreads by one look at each turn
        for rank, others in enumerate(seen):
            for other in others:
                first[rank] = first[other] = min(first[rank], first[other])
    return first
