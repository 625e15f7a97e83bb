"""One run at a time in an `output_dir`: a lock that the kernel gives back however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import explained
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.printable import printable

LOG = get_logger(__name__)

# held until the process ends: its children let go of them at once, so that none outlives it in a child
_held: dict[str, int] = {}


def hold_directory(directory: RunDirectory) -> None:
    """Takes `spin/run.lock` for the rest of this process. Call it on one rank.

    The file's content says who holds it; the lock itself is the kernel's (`fcntl`, over NFS too). Who reads the file in
    this process, as the host does to upload it (`hub_model_id`), takes nothing from it where there are locks of an open
    file; a POSIX lock, which is taken elsewhere, goes with whichever descriptor of the file is closed first.

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
        _take(descriptor)
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
    if not _held:
        os.register_at_fork(after_in_child=_let_go)
    _held[str(path.absolute())] = descriptor


def _take(descriptor: int) -> None:
    """Locks a file, for as long as this open file is there in any process; a POSIX lock where there are no such locks."""
    if sys.platform.startswith("linux") and not _on_fuse(descriptor):
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, asked)
            return
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _on_fuse(descriptor: int) -> bool:
    """Returns whether a file is on a FUSE mount, whose server may never learn that an open file's lock has ended: after a
    kill the folder would stay locked. It learns of a POSIX lock's end.
    """
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        return kind_of_mount(os.fstat(descriptor).st_dev, mounts).startswith(("fuse", "virtiofs"))
    return False


def kind_of_mount(device: int, mounts: str) -> str:
    """Returns the kind of filesystem that a device is mounted as; nothing where it is not found.

    Args:
        device: As in `os.stat`.
        mounts: Of the form of Linux's `/proc/PID/mountinfo`: the third field is the device, and behind a dash is the kind.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        fields = line.split()
        if number in fields[2:3] and "-" in fields[:-1]:
            return fields[fields.index("-") + 1]
    return ""


def _let_go() -> None:
    while _held:
        with suppress(OSError):
            os.close(_held.popitem()[1])
