"""An `output_dir` on a mount that cannot rename, as many of object stores cannot: refused at once, not after a training."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from axolotl_spin.disk.atomic import explained
from axolotl_spin.disk.directory import check_output_dir

pytestmark = pytest.mark.once


@pytest.mark.parametrize(("kind", "number"), [("file", errno.ENOSYS), ("folder", errno.EMFILE)])
def test_a_mount_that_cannot_rename_is_refused(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such mount is at hand: what one gives is given here, for folders only where there is something in them."""
    whole, out = os.replace, tmp_path / "new" / "out"

    def replace(source: Any, target: Any) -> None:
        found = "folder" if Path(source).is_dir() and any(Path(source).iterdir()) else "file"
        if found == kind:
            raise OSError(number, os.strerror(number), str(source))
        whole(source, target)

    monkeypatch.setattr(os, "replace", replace)
    expected = (
        rf"`output_dir: {out}` is on a mount that cannot rename .*\({os.strerror(number)}\): write to a local disk"
    )
    with pytest.raises(OSError, match=expected):
        check_output_dir(str(out))
    assert list(out.iterdir()) == []
    with (
        pytest.raises(OSError, match=r"could not be written, because .*an object store's .*another disk"),
        explained(out),
    ):
        replace(out / "x" if kind == "file" else tmp_path, out / "y")
    monkeypatch.undo()
    check_output_dir(str(out))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_to_be_freed_and_not_another_folder_to_be_chosen(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that a full disk has stopped goes on in its folder alone."""

    def mkdir(path: Path, *arguments: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match=rf"`output_dir: {tmp_path}` has no space left .*: free some, .*\.model") as found:
        check_output_dir(str(tmp_path))
    assert "choose another" not in str(found.value) and found.value.errno == number
