"""`report.html`: one page that shows a run, or compares several, and needs nothing but a browser.

`reading` and `answers` read what a run left on disk, `guide` judges it, `charts` draws it, `page` puts it together. Nothing
here imports torch or the host, so that the command starts at once. This file imports neither Plotly nor Jinja either: a run
asks it about them at its start, and must end well without them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from axolotl_spin.disk.atomic import write_whole
from axolotl_spin.disk.directory import RunDirectory

INSTALL = "install what makes it with `pip install 'plotly>=6,<8' 'jinja2>=3.1'`"
# a child of the host's logger, without importing it
LOG = logging.getLogger(__name__)


def write_report(output_dirs: Sequence[Path], path: Path, complete: bool | None = None) -> int:
    """Writes the page of a run, or of several for comparison.

    Args:
        output_dirs: The host's `output_dir` of each run; running, stopped or complete.
        path: Where the page is to appear.
        complete: Of runs that this process has ended: whether they count as complete; read from disk where it is None.

    Returns:
        The size of the page in bytes.

    Raises:
        NoRunError: A folder holds no run, or one that may not be read.
        OSError: The page could not be written.
        ImportError: Plotly or Jinja is missing or does not fit.
    """
    from axolotl_spin.report.page import render
    from axolotl_spin.report.reading import NoRunError, read_run

    try:
        text = render([read_run(folder, complete) for folder in output_dirs])
    except OSError as error:
        raise NoRunError(f"a file of the run cannot be read: {error}") from error
    write_whole(path, lambda aside: aside.write_bytes(text))
    return len(text)


def warn_without_report(directory: RunDirectory) -> None:
    """Imports at a run's start what makes its report at the end, and says where there will be none.

    A run is not refused for its report, which can be made afterwards.

    Args:
        directory: The run's.
    """
    try:
        importlib.import_module("axolotl_spin.report.page")
    except Exception as error:  # a package that is broken rather than missing fails in any way
        LOG.warning(
            f"this run will leave no {directory.report} ({type(error).__name__}: {error}): {INSTALL}. Also later, with "
            f"`axolotl spin report {directory.root.parent}`"
        )


def report_at_end(directory: RunDirectory, complete: bool) -> None:
    """Writes `spin/report.html` of a run that has just ended; a failure is logged and leaves the run as it is.

    Args:
        directory: The run's.
        complete: It took its last step.
    """
    try:
        write_report([directory.root.parent], directory.report, complete=complete)
    except Exception as error:  # whatever it is, the trained model is worth more than its report
        LOG.warning(
            f"{directory.report} could not be made ({type(error).__name__}: {error}); the run itself is as it was. Try "
            f"`axolotl spin report {directory.root.parent}`"
        )
