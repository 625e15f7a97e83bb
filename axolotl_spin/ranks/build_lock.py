"""Says what a start waits for while torch waits for the build of an extension, which it does in silence.

torch marks a build by a file called `lock`, and waits until it is gone. A killed build leaves it behind: DeepSpeed's
next start would wait for ever.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


_NAME = "axolotl-spin-builds"


def watch_builds() -> None:
    """Watches, from a thread of its own and once in a process, whether the main thread waits for a build."""
    if all(thread.name != _NAME for thread in threading.enumerate()):
        threading.Thread(target=watch, args=(threading.Event(),), name=_NAME, daemon=True).start()


def watch(stop: threading.Event, interval: float = 1.0, patience: float = 5.0) -> None:
    """Says once for each lock that the main thread waits for it.

    Args:
        stop: Ends the watch.
        interval: Seconds between two looks.
        patience: Seconds of waiting before it is said.
    """
    waiting, since, said = "", 0.0, set()
    while not stop.wait(interval):
        found = _awaited_lock()
        if found != waiting:
            waiting, since = found, time.monotonic()
        if waiting and waiting not in said and time.monotonic() - since >= patience:
            said.add(waiting)
            LOG.warning(_message(waiting), main_process_only=False)


def _awaited_lock() -> str:
    """Returns the lock for which the main thread waits in `torch.utils.file_baton`, or nothing."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wait" and os.path.basename(code.co_filename) == "file_baton.py":
            return str(getattr(frame.f_locals.get("self"), "lock_file_path", ""))
        frame = frame.f_back
    return ""


def _message(lock: str) -> str:
    try:
        age = f"{time.time() - os.path.getmtime(lock):.0f} s old"
    except OSError:
        age = "just gone"
    return (
        f"waiting for {lock} ({age}): another process builds this extension of torch, or was killed while it did. Where "
        "none is running, delete the file; this start then goes on"
    )
