"""What a start waits for, and what memory it may take."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import HashStore
from torch.utils.file_baton import FileBaton

from axolotl_spin.ranks import nodes
from axolotl_spin.ranks.build_lock import watch
from axolotl_spin.ranks.gather import _free_bytes


def test_a_build_lock_that_a_kill_left_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Torch's own wait, in the main thread; the lock goes as soon as it was named, or the test would hang."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    assert FileBaton(str(lock)).try_acquire()
    stop, begun = threading.Event(), time.monotonic()

    def free() -> None:
        while str(lock) not in caplog.text and time.monotonic() < begun + 20:
            time.sleep(0.05)
        lock.unlink()

    with caplog.at_level(logging.WARNING):
        watching = threading.Thread(target=watch, args=(stop, 0.05, 0.3))
        freeing = threading.Thread(target=free)
        watching.start()
        freeing.start()
        FileBaton(str(lock)).wait()
        stop.set()
        watching.join()
        freeing.join()
    [said] = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert f"waiting for {lock} (" in said and "delete the file" in said
    assert time.monotonic() - begun < 10


def test_no_wait_is_named_where_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    watching = threading.Thread(target=watch, args=(stop, 0.02, 0.0))
    watching.start()
    time.sleep(0.2)
    stop.set()
    watching.join()
    assert "waiting for" not in caplog.text


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of an XPU that this machine does not have, what torch would tell of it; of a CPU, this rank's part of the machine."""

    def on(kind: str, index: int | None = None) -> Any:
        return SimpleNamespace(device=torch.device(kind, index), num_processes=2)

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert 0 < _free_bytes(on("cpu")) <= psutil.virtual_memory().total / 2
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (3000, 9000))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 500)
    assert _free_bytes(on("xpu", 0)) == 3000 + 700 - 500
    monkeypatch.undo()
    assert _free_bytes(on("xpu", 0)) == 0.0
    assert "xpu:0 does not tell how much of its memory is free" in caplog.text


def test_a_node_says_whom_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Three ranks at one store, of which each comes when it has been waited for: a node that failed tells nothing."""
    monkeypatch.setattr(nodes, "_SAID_AFTER", 0.2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    store, until = HashStore(), time.monotonic() + 20

    def said(text: str) -> None:
        while text not in caplog.text:
            assert time.monotonic() < until, caplog.text
            time.sleep(0.01)

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(nodes._greet, store, 1, 3)]
        said("waiting for rank 0, ")
        ranks.append(pool.submit(nodes._greet, store, 0, 3))
        said("waiting for rank 2, ")
        ranks.append(pool.submit(nodes._greet, store, 2, 3))
        assert len({rank.result(timeout=20) for rank in ranks}) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "axolotl-spin-meeting"]
    assert nodes._some(range(3, 14)) == "rank 3, 4, 5, 6, 7, 8, 9, 10 and 3 more"
    monkeypatch.setattr(nodes, "_PATIENCE", timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="waited in vain for rank 1 "):
        nodes._greet(HashStore(), 0, 2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 16),
        ({"LOCAL_SIZE": "8"}, 8),  # DeepSpeed's own launcher
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "8"}, 4),
    ],
)
def test_how_many_ranks_a_node_has(variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert nodes.ranks_here(otherwise=16) == expected
