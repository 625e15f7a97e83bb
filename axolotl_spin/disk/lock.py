"""One run at a time in an `output_dir`: a lock that the kernel gives back however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time

from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import explained
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.printable import printable

LOG = get_logger(__name__)

# held until the process ends; a POSIX lock goes with its process, so children and kills leave none behind
_held: dict[str, int] = {}


def hold_directory(directory: RunDirectory) -> None:
    """Takes `spin/run.lock` for the rest of this process. Call it on one rank.

    The file's content says who holds it; the lock itself is the kernel's (`fcntl`, over NFS too).

    Args:
        directory: The run's.

    Raises:
        RuntimeError: Another process holds it; names host and process.
        OSError: The folder cannot be written to.
    """
    path = directory.lock
    if str(path.absolute()) in _held:
        return
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = printable(os.read(descriptor, 1000).decode(errors="replace").strip())
            os.close(descriptor)
            raise RuntimeError(
                f"another run is writing to `output_dir: {directory.root.parent}` ({holder or 'starting just now'}): "
                "wait for it to end or stop it, or choose another `output_dir`"
            ) from error
        LOG.warning(f"{path}: this filesystem has no locks ({error}), so nothing stops a second run in the same folder")
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    with explained(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder}\n".encode(), 0)
    _held[str(path.absolute())] = descriptor
