"""Standard output that holds a command's result and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from typing import Any, TextIO

import click

from axolotl_spin.disk.printable import printable


@contextmanager
def result_stream() -> Iterator[TextIO]:
    """Sends to standard error whatever is printed meanwhile: by the host and its loggers, by libraries, by child processes.

    What stands there already cannot be taken back: `axolotl` prints its banner before it imports a plugin's command.

    Yields:
        The standard output of before, for the result.
    """
    try:
        number = sys.stdout.fileno()
    except OSError:  # a stream in memory
        result = sys.stdout
        with redirect_stdout(sys.stderr):
            yield result
        return
    kept = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    try:
        sys.stdout.flush()
        with open(kept, "w", encoding=sys.stdout.encoding, closefd=False) as result:
            yield result
    finally:
        sys.stdout.flush()
        os.dup2(kept, number)
        os.close(kept)


def prints_result(command: Callable[..., None]) -> Callable[..., None]:
    """Calls a command with `result`, the stream that `result_stream` yields, and keeps all else from standard output."""

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            with result_stream() as result:
                command(result=result, **options)
        except click.ClickException as error:
            error.message = printable(error.message)  # it may quote a file
            raise

    return run
