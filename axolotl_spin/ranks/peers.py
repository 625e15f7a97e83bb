"""When one rank fails, all stop within seconds and say why, instead of waiting for a collective's time-out.

The failing rank leaves its message in the process group's key-value store. A thread on every rank looks for it each second:
the main thread raises it at its next `check`; where that thread is stuck in a collective, the process is ended.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
import traceback
from logging import ERROR, WARNING
from types import TracebackType
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from axolotl.utils.logging import get_logger
from torch.distributed import distributed_c10d

LOG = get_logger(__name__)

_KEY = "failure"
_SEEN = "failure_seen"


class PeerFailedError(RuntimeError):
    """Another rank failed; carries its message."""


class Peers:
    """A context in which a failure on any rank reaches all of them.

    Args:
        interval: Seconds between two looks.
        grace: Seconds that the main thread has to notice a failure by itself before its process is ended.

    Attributes:
        failure: What another rank failed with; None while none has.
        common: An error that every rank raises, so that none has to be told.
    """

    def __init__(self, interval: float = 1.0, grace: float = 5.0):
        self.interval, self.grace = interval, grace
        self.failure: str | None = None
        self.common: BaseException | None = None
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._alone: dict[str, int] = {}
        self._rank, self._count = 0, 1

    def __enter__(self) -> Peers:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # kept, since the host's handler of Ctrl-C destroys the process group before it ends the process
            self._rank, self._count, self.common = dist.get_rank(), dist.get_world_size(), None
            # a connection of its own: the process group's may be held by a blocking wait of the main thread
            if self._store is None:
                store: Any = distributed_c10d._get_default_store()
                self._store = dist.PrefixStore(f"axolotl_spin/{_name_of_this_launch()}", store.clone())
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, name="axolotl-spin-peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout=2 * self.interval)
        self._thread = None
        if error is None or error is self.common or isinstance(error, PeerFailedError):
            return
        stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code)
        if self.failure is None:
            self._tell(error, stopped)
        elif not stopped:  # a collective broke because the rank that failed has gone
            raise PeerFailedError(self.failure) from error

    def check(self) -> None:
        """Raises what another rank failed with; costs nothing.

        Raises:
            PeerFailedError: Another rank failed.
        """
        if self.failure is not None:
            raise PeerFailedError(self.failure)

    def add(self, name: str, amount: int) -> int:
        """Adds to a number that all ranks share.

        Args:
            name: Which one; it starts at 0 with the launch.
            amount: May be 0, to ask.

        Returns:
            The sum of what all ranks have added so far.
        """
        if self._store is None:
            self._alone[name] = self._alone.get(name, 0) + amount
            return self._alone[name]
        return self._store.add(name, amount)

    def meet(self, name: str) -> None:
        """Waits until every rank has come here, however long that takes: in a collective it would run into a time-out.

        Args:
            name: Of the place; met once in a launch.

        Raises:
            PeerFailedError: Another rank failed.
        """
        arrived, pause = self.add(f"meet/{name}", 1), self.interval / 200
        while self._store is not None and arrived < dist.get_world_size():
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, self.interval / 4)  # at once where the others are near, seldom where they are far
            arrived = self.add(f"meet/{name}", 0)

    def _tell(self, error: BaseException, stopped: bool) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({last[0].filename}:{last[0].lineno})" if last else ""
        what = "was stopped" if stopped else f"failed: {type(error).__name__}: {error}{where}"
        message = f"rank {self._rank} {what}"
        LOG.log(WARNING if stopped else ERROR, f"{message}; telling the other ranks", main_process_only=False)
        try:
            self._store.set(_KEY, message)
            # this process may hold the store: leave the others time to read it
            deadline = time.monotonic() + 5 * self.interval
            while self._store.add(_SEEN, 0) < self._count - 1 and time.monotonic() < deadline:
                time.sleep(self.interval / 10)
        except Exception as lost:
            LOG.error(f"the other ranks could not be told: {lost}", main_process_only=False)

    def _watch(self) -> None:
        """Runs in a thread of its own."""
        while not self._stop.wait(self.interval):
            try:
                if not self._store.check([_KEY]):
                    continue
                self.failure = self._store.get(_KEY).decode()
                self._store.add(_SEEN, 1)
            except Exception as lost:
                self.failure = self.failure or f"the process that holds the ranks' store is gone ({lost})"
            break
        if self.failure is None or self._stop.wait(self.grace):
            return
        # through the file descriptor: the main thread may hold the stream's lock
        os.write(sys.stderr.fileno(), f"axolotl-spin: {self.failure}; this rank stops too\n".encode())
        os._exit(1)


def _name_of_this_launch() -> str:
    """Returns a name that all ranks of a start have in common, and no other start has.

    A launcher that restarts ranks may hand them the store of those that failed (torchrun does, unless
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1): their failure and their counts stand in it.
    """
    box = [secrets.token_hex(8)]
    broadcast_object_list(box)
    return box[0]
