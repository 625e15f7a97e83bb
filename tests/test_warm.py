"""Ranks that are forked from warm processes are what a launcher would have started."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import host
import pytest
from warm import Ranks

pytestmark = [pytest.mark.host, pytest.mark.ranks, pytest.mark.once]


def test_each_is_a_process_of_its_own(warm_ranks: Ranks, tmp_path: Path) -> None:
    """With its own session, environment and hashes, and nothing distributed begun."""
    code, output = warm_ranks.run("test_warm", env=host.environment(MARK="here"), cwd=tmp_path)
    assert code == 0, output
    first, second = sorted(
        (json.loads(line) for line in output.splitlines() if line.startswith("{")), key=lambda rank: rank["RANK"]
    )
    assert (first["RANK"], second["RANK"]) == (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    for rank in (first, second):
        assert rank["session"] == rank["pid"] and rank["WORLD_SIZE"] == "2"
        assert (rank["MARK"], rank["DS_ACCELERATOR"], rank["begun"]) == ("here", None, False)
    assert first["pid"] != second["pid"]
    assert first["hash"] != second["hash"] or "PYTHONHASHSEED" in os.environ


def test_where_one_fails_the_other_is_ended(warm_ranks: Ranks, tmp_path: Path) -> None:
    started = time.monotonic()
    code, output = warm_ranks.run("test_warm", env=host.environment(FAILS="1"), cwd=tmp_path)
    assert code == 3
    [other] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert other["RANK"] == "0" and not Path(f"/proc/{other['pid']}").exists()
    assert time.monotonic() - started < 60


def test_a_group_that_ddp_lets_go_of_last_does_not_hang(warm_ranks: Ranks, tmp_path: Path) -> None:
    """With finished collectives whose tensors are yet to be freed; without `_keep_process_groups` it does, soon."""
    code, output = warm_ranks.run("test_warm", env=host.environment(GROUPS="10"), cwd=tmp_path, timeout=120)
    assert (code, output.count("let go")) == (0, 20), output


def _let_go(times: int) -> None:
    """Does what ends a run of the host on two ranks, again and again."""
    import gc

    import torch
    from torch.nn.parallel import DistributedDataParallel

    rank = int(os.environ["RANK"])
    for turn in range(times):
        store = f"file://{Path.cwd()}/store-{turn}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        model: Any = DistributedDataParallel(torch.nn.Linear(64, 64))
        model(torch.ones(2, 64)).sum().backward()
        tensors = [torch.ones(1000) for _ in range(50)]
        begun: Any = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        torch.distributed.destroy_process_group()
        del tensors, begun
        del model
        gc.collect()
        os.write(1, b"let go\n")


def _say() -> None:
    """Prints what a rank finds; the one named by FAILS ends with an error, and the other would sleep for long."""
    import torch
    from accelerate.state import PartialState

    if os.environ.get("FAILS") == os.environ["RANK"]:
        time.sleep(2)
        raise SystemExit(3)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MARK", "DS_ACCELERATOR")
    found: dict[str, Any] = {name: os.environ.get(name) for name in names}
    found |= {"pid": os.getpid(), "session": os.getsid(0), "hash": hash("a")}
    found["begun"] = torch.distributed.is_initialized() or bool(PartialState._shared_state)
    os.write(1, f"{json.dumps(found)}\n".encode())  # in one piece: both ranks write to the same file
    if "FAILS" in os.environ:
        time.sleep(600)


if __name__ == "__main__":
    _let_go(int(os.environ["GROUPS"])) if "GROUPS" in os.environ else _say()
