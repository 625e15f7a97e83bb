"""How a process ends that cannot go on: with the message alone, said once, where an error is the user's to mend.

Python asks `sys.excepthook` about an error that nobody caught, so neither the host nor `fire` nor `click` knows of it.
Errors in code keep their traceback.
"""

from __future__ import annotations

import dis
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from axolotl_spin.disk.printable import printable

_PACKAGE = str(Path(__file__).parents[1])
# seconds after which a rank other than 0 speaks: where rank 0 failed of the same, the launcher has ended this one by then
_RANK_0_FIRST = 5.0


def end_plainly() -> None:
    """From now on this process ends with the message alone where an error is the user's to mend."""
    if not isinstance(sys.excepthook, _Ending):
        sys.excepthook = _Ending(sys.excepthook)


def plain_message(error: BaseException) -> str | None:
    """Returns what a user has to know of an error, or None where its traceback is needed.

    Args:
        error: A config that the host's schema or ours refuses, or anything else. What a `raise` of this package made says
            what was found and what to change, and where in the code it was found helps nobody.
    """
    if type(error).__name__ == "ValidationError" and str(getattr(error, "title", "")).startswith("Axolotl"):
        return "the config is refused:\n" + "\n".join(_refused(error))
    if isinstance(error, Exception) and not isinstance(error, AssertionError) and _raised_here(error):
        return "\n".join([str(getattr(error, "strerror", None) or error), *getattr(error, "__notes__", [])])
    return None


def _refused(error: Any) -> list[str]:
    """Returns what pydantic found, a sentence for each key."""
    lines = []
    for found in error.errors(include_url=False):
        text = found["msg"].removeprefix("Value error, ")
        if not found["loc"]:  # what a validator says of the whole config names its keys
            lines.append(text)
            continue
        given = repr(found["input"])
        given = given if len(given) <= 80 else f"{given[:80]}..."
        lines.append(f"`{'.'.join(map(str, found['loc']))}: {given}`: {text[:1].lower()}{text[1:]}")
    return lines


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    # a library written in C leaves no frame: what it raises appears to come from the line that called it
    return code.co_filename.startswith(_PACKAGE) and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


class _Ending:
    """The hook.

    Args:
        before: The hook that was there, which shows tracebacks.
    """

    def __init__(self, before: Any):
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = plain_message(error)
        if text is None:
            self._before(kind, error, trace)
            return
        text = printable(text)
        _to_debug_log("".join(traceback.format_exception(kind, error, trace)))
        if int(os.environ.get("RANK", "0")):
            time.sleep(_RANK_0_FIRST)
        if not _told_launcher(text):
            sys.stdout.flush()
            sys.stderr.write(f"\naxolotl-spin: {text}\n\n")


def _to_debug_log(text: str) -> None:
    """Keeps a traceback in `OUTPUT_DIR/debug.log` alone, once the host has opened it."""
    tee = sys.modules.get("axolotl.utils.tee")
    if tee is not None:
        tee.file_only_stream.write(text)


def _told_launcher(text: str) -> bool:
    """Leaves the message to torchrun, or to accelerate with several ranks, which shows it behind all that ranks print.

    Returns:
        Whether there is such a launcher; accelerate on one rank is none, and shows its own traceback last.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    if any(path.parents[1].glob(f"*/{path.name}")):  # another rank of this machine has said it
        return True
    # the launcher shows the call stack of this form alone
    extra = {"py_callstack": f"axolotl-spin: {text}", "timestamp": str(int(time.time()))}
    try:
        path.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    except OSError:
        return False
    return True
