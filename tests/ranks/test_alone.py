"""What one of two real processes does alone: a slow save, an error that both raise, and a stop by Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import host
import pytest
from torch.distributed import HashStore

from axolotl_spin.ranks.peers import PeerFailedError, Peers

SCRIPT = """
import datetime, sys, time, torch
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from torch.distributed import distributed_c10d
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.ranks.peers import PeerFailedError
from axolotl_spin.run import saving

accelerator = Accelerator(cpu=True)
ranks = Ranks(accelerator)
ranks.wait()
distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
SLOW = 3.5

def slowly(work):
    def done(*arguments):
        time.sleep(SLOW)
        return work(*arguments)

    return done

def save_model(folder, _internal_call):
    if ranks.main:
        time.sleep(SLOW)
        Path(folder).mkdir(parents=True)
        Path(folder, "weights").touch()

saving.publish_folder, saving._complete = slowly(saving.publish_folder), slowly(saving._complete)
trainer = SimpleNamespace(
    accelerator=accelerator, loop=SimpleNamespace(ranks=ranks), save_model=save_model, is_fsdp_enabled=False,
    is_deepspeed_enabled=False, args=SimpleNamespace(output_dir="out", save_total_limit=1),
)
out, mark = Path("out").absolute(), {"step": 1, "resumable": True}
with ranks:
    saving.save_whole(trainer, out / "model")
    assert (out / "model/weights").exists()
    how = {"root": out / "spin", "mark": mark, "restarts": True, "ferry": ranks.ferry}
    with saving.saving(trainer, out / "checkpoint-1", **how):
        if ranks.main:
            time.sleep(SLOW)
    ranks.wait()  # as training's next step
    assert trainer.args.save_total_limit == 1

try:
    with ranks:
        started = time.monotonic()
        ranks.on_main(lambda: 1 / 0)
except ZeroDivisionError:
    assert time.monotonic() - started < 4, "nobody is left to be told"
else:
    raise AssertionError

try:
    with ranks:
        if ranks.main:  # as the host does at Ctrl-C
            torch.distributed.destroy_process_group()
            sys.exit(0)
        ranks.meet("a place that rank 0 never comes to")
except PeerFailedError as error:
    assert str(error) == "rank 0 was stopped", error
else:
    raise AssertionError
torch.distributed.destroy_process_group()
open("told", "w").close()
"""


@pytest.mark.ranks
@pytest.mark.once
def test_what_one_rank_does_alone(tmp_path: Path) -> None:
    """A collective of these ranks times out after two seconds; each of rank 0's writes takes three and a half.

    An error that both ranks raise is told by neither. A rank that is stopped is not called failed.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments, marks = host.launcher("ddp")
    launch, env = [sys.executable, *arguments, "script.py"], host.environment(**marks)
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "told").exists()
    told = [line for line in done.stderr.splitlines() if "telling the other ranks" in line]
    assert len(told) == 1 and "rank 0 was stopped; telling" in told[0], told


@pytest.mark.once
def test_a_rank_that_was_stopped_itself_ends_as_such() -> None:
    """At Ctrl-C all ranks are stopped, one of them first."""
    for error, raised in ((SystemExit(0), None), (KeyboardInterrupt(), None), (SystemExit(2), PeerFailedError)):
        peers = Peers(interval=0.01)
        peers._store, peers._count = HashStore(), 2
        peers.failure, peers._thread = "rank 1 was stopped", threading.Thread()
        peers._thread.start()
        if raised is None:
            peers.__exit__(type(error), error, None)
        else:
            with pytest.raises(raised, match="rank 1 was stopped"):
                peers.__exit__(type(error), error, None)
        assert not peers._store.check(["failure"])
