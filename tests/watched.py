"""Notes what a process of the host does that could do harm, by an audit hook: for `test_security.py`.

SPIN_WATCH names the file of the notes, a JSON list a line: an event of Python's, and what it was about. Libraries in C that
open files by themselves (Arrow, safetensors) are not seen. As a module it is `axolotl spin ...`, watched.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# of these the paths are noted, which are their first arguments
_PATHS = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1,
          "os.chmod": 1, "shutil.rmtree": 1}  # fmt: skip
_WHOLE = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.bind",
    "socket.connect",
)


class WatchPlugin(BasePlugin):
    """Watches from the host's registration of its plugins on."""

    def get_input_args(self):
        if "SPIN_WATCH" in os.environ:
            watch(Path(os.environ.pop("SPIN_WATCH")))
        return None


def watch(notes: Path) -> None:
    """Installs the hook in this process, for the rest of its life."""
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        said: list[str] = []
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and (flags or 0) & _WRITES:
                said = [os.path.abspath(os.fsdecode(path))]
        elif event in _PATHS:
            paths = arguments[: _PATHS[event]]
            said = [os.path.abspath(os.fsdecode(path)) for path in paths if isinstance(path, (str, bytes, os.PathLike))]
        elif event == "exec":
            said = [getattr(arguments[0], "co_filename", "")]
        elif event in _WHOLE:
            said = [str(part) for part in arguments]
            if event == "pickle.find_class":
                said += [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_stack()[-6:-1]]
        if said:
            os.write(file, f"{json.dumps([event, *said])}\n".encode())

    sys.addaudithook(hook)


if __name__ == "__main__":
    watch(Path(os.environ["SPIN_WATCH"]))
    from axolotl_spin.cli import spin

    spin()
