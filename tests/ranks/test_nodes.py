"""Nodes that do not see each other's files: rank 0's folder is the run's, and what the others need is brought to them.

Two ranks are two nodes here: each has a working folder of its own, in which all paths of the config are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import pyarrow.parquet as pq
import pytest
import yaml
from recovery import CHANGES, differences, outcome
from torch.distributed import HashStore
from warm import Ranks

from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.lock import hold_directory
from axolotl_spin.ranks.nodes import Meeting, first_to_see
from axolotl_spin.run.together import _settle_alike

pytestmark = [pytest.mark.ranks, pytest.mark.once]


def node(folder: Path, kind: str = "ddp", **changes: Any) -> Path:
    """Makes a node's folder, with a model and data of its own, and a config in which nothing but it is named."""
    made = {
        **host.config(folder, rows=19),
        **host.layout(kind, folder),
        **CHANGES,
        "micro_batch_size": 1,
        "num_epochs": 1,
        "save_steps": 5,
    }
    made["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    made |= {"base_model": "model", "output_dir": "out", "dataset_prepared_path": "prepared", **changes}
    made["datasets"] = [{**made["datasets"][0], "path": "data.jsonl"}]
    if "deepspeed" in made:
        made["deepspeed"] = Path(made["deepspeed"]).name
    (folder / "run.yml").write_text(yaml.safe_dump(made))
    return folder


def start(ranks: Ranks, cwd: Path | list[Path], kind: str = "ddp", kill: str = "") -> tuple[int, str]:
    env = host.environment(**host.rank_environment(kind), SPIN_KILL=kill, SPIN_KILL_RANK="1")
    return ranks.run("axolotl.cli.train", "run.yml", env=env, cwd=cwd)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.host
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_two_nodes_with_folders_of_their_own_play_as_one(kind: str, warm_ranks: Ranks, tmp_path: Path) -> None:
    """Stopped while it generates and while it trains, the run ends as that of two ranks on one node."""
    one, first, second = (node(tmp_path / name, kind) for name in ("one", "first", "second"))
    code, output = start(warm_ranks, one, kind)
    assert code == 0, output[-6000:]
    assert "by the process group" not in output

    both = [first, second]
    assert start(warm_ranks, both, kind, kill="iteration 1/one chunk whole")[0] != 0
    chunks = [sorted((folder / "out/spin/iteration-1/chunks").glob("0*.parquet")) for folder in both]
    assert [path.name for path in chunks[1]] == ["000001.parquet"]
    answered = sum(pq.read_metadata(path).num_rows for path in chunks[0] + chunks[1])
    code, output = start(warm_ranks, both, kind, kill="iteration 1/resumed, after a checkpoint")
    assert code != 0 and "going on from out/checkpoint-4 " in output, output[-6000:]
    assert f"{answered} of 16 prompts are already answered" in output
    code, output = start(warm_ranks, both, kind)
    assert code == 0 and "going on from out/checkpoint-10 " in output, output[-6000:]
    assert "is not one folder for all nodes, but 2" in output

    assert not differences(outcome(first / "out"), outcome(one / "out"))
    assert files(first / "out/checkpoint-12") == files(one / "out/checkpoint-12")
    assert {"checkpoint-12/rng_state_1.pth"} < files(first / "out")
    left = files(second / "out")
    assert not [name for name in left if name.startswith(("checkpoint", "spin")) and name != "spin/run.lock"], left
    assert "model.safetensors" not in left
    if kind == "ddp":
        _refusals(warm_ranks, first, second)


def _refusals(ranks: Ranks, first: Path, second: Path) -> None:
    code, output = start(ranks, [first, second])
    assert code == 0 and output.count("this run is complete") == 1, output[-3000:]
    code, output = start(ranks, [second, first])
    assert code != 0 and "where rank 1 is there is a run too (out/spin/plan.json)" in output, output[-3000:]
    assert not (second / "out/spin/plan.json").exists()
    shutil.rmtree(second / "prepared")  # which the host knows by the config alone
    rows = (second / "data.jsonl").read_text().splitlines()
    (second / "data.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    code, output = start(ranks, [first, second])
    assert code != 0 and "rank 1 has other settings or data than rank 0" in output, output[-3000:]
    assert "data (prompts and human answers as token ids)" in output


@pytest.mark.host
def test_what_rank_0_refuses_on_a_shared_folder_every_node_learns(warm_ranks: Ranks, tmp_path: Path) -> None:
    """The nodes' launchers know nothing of each other: the second would wait for a process group without rank 0."""
    folder = node(tmp_path)
    hold_directory(RunDirectory(folder / "out"))
    env, logs = host.environment(**host.rank_environment("ddp")), [tmp_path / f"rank{rank}.log" for rank in range(2)]
    ranks = warm_ranks.start("axolotl.cli.train", "run.yml", env=env, cwd=[folder, folder], logs=logs)
    codes = [rank.wait(timeout=120) for rank in ranks]
    for code, log in zip(codes, logs, strict=True):
        assert code == 1 and "another run is writing to `output_dir: out`" in log.read_text(), log.read_text()[-4000:]


SCRIPT = """
import os, resource, time
from pathlib import Path
import torch.distributed as dist
from axolotl_spin.ranks import ferry, nodes

rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = "001"[rank]  # a node of one rank, and one of two
here = Path("011"[rank])
here.mkdir(exist_ok=True)

meeting = nodes.Meeting()
time.sleep(rank)  # the others come late to the second start, when rank 0 has found what they left at the first
again = nodes.Meeting()
words = again.together("words", [meeting.launch, again.launch], lambda said: said)
assert words == [words[0]] * 3 and words[0][0] != words[0][1]
try:
    again.agree("well?", "rank 2 is not well" if rank == 2 else "")
except ValueError as error:
    assert str(error) == "rank 2 is not well"
else:
    raise AssertionError
assert nodes.find_nodes(again, Path.cwd(), patience=60).shared
found = nodes.find_nodes(nodes.Meeting(), here, patience=1)
assert (found.folders, found.keepers, found.far(rank)) == ((0, 1, 1), [0, 1], rank > 0)

dist.init_process_group("gloo")
boat = ferry.Ferry(found, rank, dist.barrier)
assert boat.keeps == (rank < 2)
large = 256 << 20
if rank == 0:
    (here / "sent/below").mkdir(parents=True)
    (here / "sent/.metadata").write_bytes(b"parts")
    (here / "sent/below/none").touch()
    with (here / "sent/large").open("wb") as file:
        file.truncate(large)
        file.seek(ferry.PIECE - 1)
        file.write(b"ab")
    for name, content in (("both", "rank 0's"), ("mine", "")):
        (here / "made").mkdir(exist_ok=True)
        (here / "made" / name).write_text(content)
elif rank == 1:
    (here / "made/deep").mkdir(parents=True)
    (here / "made/both").write_text("rank 1's")
    (here / "made/deep/other").write_bytes(bytes(range(256)) * (1 << 16 | 1))
boat.send(here / "made" / "mine")  # some time before, so that buffers of the group are there
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
boat.send(here / "sent", keep=False)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < 96 << 10, "KiB"
if rank:
    with (here / "sent/large").open("rb") as file:
        assert file.seek(0, 2) == large and file.seek(ferry.PIECE - 2) and file.read(4) == b"\\0ab\\0"
    assert (here / "sent/.metadata").read_bytes() == b"parts" and (here / "sent/below/none").exists()
    (here / "made/mine").unlink(missing_ok=True)
boat.fetch(here / "made")
if rank == 0:
    assert (here / "made/both").read_text() == "rank 0's"
    assert (here / "made/deep/other").read_bytes() == bytes(range(256)) * (1 << 16 | 1)
dist.barrier()
boat.clear()
dist.barrier()
assert sorted(path.name for path in here.iterdir()) == ([] if rank else ["made", "sent"])
assert not list(Path.cwd().glob(".spin-*"))
dist.destroy_process_group()
"""


def test_files_go_to_and_from_rank_0_in_pieces(tmp_path: Path) -> None:
    """Three ranks on two nodes: one file of sixteen pieces takes the memory of few; what rank 0 has stays its own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = "-m torch.distributed.run --nproc_per_node 3 --rdzv-backend c10d --rdzv-endpoint localhost:0 script.py"
    done = subprocess.run(
        [sys.executable, *launch.split()],
        cwd=tmp_path,
        env=host.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_ranks_that_find_other_starts_in_one_folder_do_not_begin(tmp_path: Path) -> None:
    """As where a network's filesystem shows one of them what is there no more; two threads are the ranks here."""
    run: Any = SimpleNamespace(directory=RunDirectory(tmp_path), regrouped=None)

    def settled(finds: list[str | None]) -> list[str]:
        store = HashStore()

        def settle(run: Any, cfg: Any) -> None:
            if cfg.resume_from_checkpoint == "complete":
                raise SystemExit(0)

        def rank(index: int) -> str:
            meeting = Meeting.__new__(Meeting)  # at a store of these two's own
            meeting.rank, meeting.count, meeting._store = index, 2, store
            try:
                _settle_alike(meeting, run, SimpleNamespace(resume_from_checkpoint=finds[index]), settle)
            except (ValueError, SystemExit) as error:
                return str(error)
            return "begins"

        with ThreadPoolExecutor() as ranks:
            return list(ranks.map(rank, range(2)))

    assert settled(["a/checkpoint-8", "b/checkpoint-8"]) == ["begins"] * 2
    assert settled([None, None]) == ["begins"] * 2 and settled(["complete"] * 2) == ["0"] * 2
    for finds, said in (
        (["checkpoint-8", "checkpoint-4"], "rank 1 finds checkpoint-4 to go on from in .*, and rank 0 checkpoint-8"),
        (["checkpoint-8", None], "rank 1 finds no checkpoint to go on from in"),
        (["checkpoint-8", "complete"], "rank 1 finds a complete run in"),
    ):
        assert all(re.search(said, found) for found in settled(finds)), said


@pytest.mark.parametrize(
    ("seen", "first"),
    [
        ([[0], [1]], [0, 1]),
        ([[0, 1], [0, 1]], [0, 0]),
        ([[0], [0, 1]], [0, 0]),  # rank 0 has looked too early
        ([[0], [1, 3], [1], [2, 3]], [0, 1, 1, 1]),  # in groups, by way of another
        ([[], []], [0, 1]),
    ],
)
def test_who_keeps_a_folder(seen: list[list[int]], first: list[int]) -> None:
    assert first_to_see(seen) == first


def test_many_ranks_with_one_folder_are_looked_at_few_times() -> None:
    """Not as many times as they are: each look goes through what each rank sees."""
    looks = 0

    class Seen(list[int]):
        def __iter__(self) -> Iterator[int]:
            nonlocal looks
            looks += 1
            return super().__iter__()

    count = 64
    assert first_to_see([Seen(range(count)) for _ in range(count)]) == [0] * count
    assert looks <= 4 * count
