"""Files between rank 0's folder and those of nodes that do not see it, by a process group, in pieces of bounded size.

    made on another node (chunks of answers, its ranks' part of a checkpoint)  -> `fetch` -> rank 0's folder, the run's
    rank 0's (staged pairs, an opponent for engines, a checkpoint to go on from) -> `send` -> the other nodes, for a while

Where all ranks see one folder both do nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from axolotl_spin.disk.atomic import write_whole
from axolotl_spin.ranks.nodes import Nodes

# bytes that are in memory at once
PIECE = 16 << 20


class Ferry:
    """Carries files between the keepers of folders; see `Nodes`.

    Args:
        nodes: Who keeps a folder.
        rank: This one.
        meet: Waits for every rank.

    Attributes:
        keeps: Whether this rank does what is to be done once in a folder.
        far: Whether this rank sees another folder than rank 0.
    """

    def __init__(self, nodes: Nodes, rank: int, meet: Callable[[], None]):
        self.nodes, self._rank, self._meet = nodes, rank, meet
        self.keeps, self.far = rank in nodes.keepers, nodes.far(rank)
        self._group: Any = None
        self._brought: list[Path] = []
        if not nodes.shared:
            # of CPUs, whatever trains; the ranks wait for each other elsewhere, where no time-out is
            self._group = dist.new_group(nodes.keepers, timeout=timedelta(days=2), backend="gloo")

    def send(self, path: Path, keep: bool = True) -> None:
        """Has rank 0's file or folder appear in every folder that is not rank 0's.

        Args:
            path: On rank 0 what is sent, on others where it is to appear.
            keep: Else `clear` removes what has appeared.
        """
        if self._group is None:
            return
        if self.keeps:
            if not keep and self._rank:
                self._brought.append(path)
            listed = [_files(path) if self._rank == 0 else None]
            dist.broadcast_object_list(listed, src=0, group=self._group)
            for name, size in listed[0] or []:
                carry = _write if self._rank else _read
                carry(path / name, size, lambda piece: dist.broadcast(piece, src=0, group=self._group))
        self._meet()

    def fetch(self, folder: Path) -> None:
        """Moves the files of a folder to rank 0's; where that has one of the name, its own stays.

        Args:
            folder: On each node; it need not be there.
        """
        if self._group is None:
            return
        for keeper in self.nodes.keepers[1:]:
            if self._rank == keeper:
                self._give(folder)
            elif self._rank == 0:
                self._take(folder, keeper)
        self._meet()

    def clear(self) -> None:
        """Removes what `send` has brought for a while."""
        while self._brought:
            path = self._brought.pop()
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    def _give(self, folder: Path) -> None:
        box: list[Any] = [_files(folder)]
        dist.send_object_list(box, dst=0, group=self._group)
        dist.recv_object_list(box, src=0, group=self._group)
        for name, size in box[0]:
            _read(folder / name, size, lambda piece: dist.send(piece, dst=0, group=self._group))
        dist.recv_object_list(box, src=0, group=self._group)  # all are on rank 0's disk
        shutil.rmtree(folder, ignore_errors=True)

    def _take(self, folder: Path, keeper: int) -> None:
        box: list[Any] = [None]
        dist.recv_object_list(box, src=keeper, group=self._group)
        wanted = [(name, size) for name, size in box[0] if not (folder / name).exists()]
        dist.send_object_list([wanted], dst=keeper, group=self._group)
        for name, size in wanted:
            _write(folder / name, size, lambda piece: dist.recv(piece, src=keeper, group=self._group))
        dist.send_object_list([None], dst=keeper, group=self._group)


def _files(path: Path) -> list[tuple[str, int]]:
    """Returns a folder's files with their sizes in bytes, or a file itself, by an empty name."""
    if path.is_file():
        return [("", path.stat().st_size)]
    return [(str(file.relative_to(path)), file.stat().st_size) for file in sorted(path.rglob("*")) if file.is_file()]


def _read(path: Path, size: int, give: Callable[[Tensor], Any]) -> None:
    with path.open("rb") as file:
        for piece in _pieces(size):
            if file.readinto(piece.numpy().data) != len(piece):  # type: ignore[attr-defined]
                raise OSError(f"{path} has become shorter while it was sent to another node")
            give(piece)


def _write(path: Path, size: int, take: Callable[[Tensor], Any]) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            for piece in _pieces(size):
                take(piece)
                file.write(piece.numpy().data)

    write_whole(path, write)


def _pieces(size: int) -> Iterator[Tensor]:
    """Yields room for each piece of a file, the same again and again."""
    buffer = torch.empty(min(size, PIECE), dtype=torch.uint8)
    for start in range(0, size, PIECE):
        yield buffer[: min(PIECE, size - start)]
