"""`Ranks` on two real processes: what rank 0 does alone may take longer than a collective, and what it raises all raise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import host
import pytest

SCRIPT = """
import datetime, os, pathlib, time, numpy, pyarrow, tiny, torch
from accelerate import Accelerator, InitProcessGroupKwargs
from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.ranks.peers import PeerFailedError
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.scoring import Scorer

open(f"imported-{os.environ['RANK']}", "w").close()
while len(list(pathlib.Path().glob("imported-*"))) < 2:  # which takes longer than a collective may
    time.sleep(0.05)
timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=2), backend="gloo")
ranks = Ranks(Accelerator(cpu=True, kwargs_handlers=[timeout]))
assert (ranks.count, ranks.main) == (2, ranks.rank == 0)
with ranks:
    def work():
        assert ranks.main
        time.sleep(5)
        return "done"

    assert ranks.on_main(work) == "done"
    assert ranks.sum(torch.tensor([ranks.rank + 1.0])).item() == 3.0
    started = time.perf_counter()
    for _ in range(20):
        ranks.on_main(lambda: None)
    assert time.perf_counter() - started < 8, "each wait is short where the work is"
    # three pairs for two ranks: one of them has to score one more than the other, and takes long for it
    rows = {name: [[7, 8], [7], [9]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    pairs, model = PairDataset(pyarrow.table(rows)), tiny.model(20).eval()
    if ranks.main:
        model.register_forward_pre_hook(lambda *_: time.sleep(2.5))
    alone = [numpy.array([row]) for row in range(3)]
    logps = Scorer(ranks, PairCollator(0, "padded", 1), "auto").logps(model, pairs, alone)
    assert logps.shape == (3, 2) and (logps < 0).all()
    try:
        ranks.on_main(lambda: 1 / 0)
    except ZeroDivisionError:
        open(f"raised-{ranks.rank}", "w").close()

try:
    with ranks:
        if ranks.rank == 1:
            raise ValueError("planted")
        ranks.meet("a place that rank 1 never comes to")
except (ValueError, PeerFailedError) as error:
    assert "planted" in str(error)
with Ranks(Accelerator()) as again:  # of a later start, which has the store of the earlier one
    assert again.on_main(lambda: "again") == "again"
    time.sleep(3)
    again.check()
    open(f"again-{again.rank}", "w").close()
torch.distributed.destroy_process_group()  # gloo's threads may abort an interpreter that ends with them
"""


@pytest.mark.ranks
@pytest.mark.once
def test_what_rank_0_does_alone_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    """A collective of these ranks times out after two seconds; the work takes five, and so does a rank's part of scoring.

    A failure ends the ranks of its own start, and none that come after them over the same store.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments, marks = host.launcher("ddp")
    launch, env = [sys.executable, *arguments, "script.py"], host.environment(**marks)
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(path.name for path in tmp_path.glob("raised-*")) == ["raised-0", "raised-1"]
    assert sorted(path.name for path in tmp_path.glob("again-*")) == ["again-0", "again-1"]
