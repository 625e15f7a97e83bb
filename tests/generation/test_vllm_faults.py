"""The vLLM backend through the real host, over a fake engine: what goes wrong there stops all ranks with its reason, leaves
nothing behind, and loses no finished answer. Worker, files and host are real; only the tokens are by chance.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import pytest
import yaml
from PIL import Image
from recovery import CHANGES, differences, outcome
from warm import Ranks, Warm

from axolotl_spin.generation.vllm.engine import Engine, EngineError

pytestmark = pytest.mark.host

FAKE = host.TESTS / "fake_vllm"
PICTURE = 8  # as the fake has it


def settings_in(folder: Path, shared: Path, vllm: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Returns the config of the run of `recovery` with vLLM's backend, and writes it to `run.yml`."""
    spin: Any = CHANGES["spin"]
    generation = {**spin["generation"], "backend": "vllm", "vllm": {"stall_seconds": 60, **(vllm or {})}}
    made = {**host.config(shared, rows=19), **CHANGES, "spin": {**spin, "generation": generation}, **changes}
    made["output_dir"] = str(folder / "out")
    folder.mkdir(exist_ok=True)
    (folder / "run.yml").write_text(yaml.safe_dump(made))
    return made


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(FAKE), host.environment()["PYTHONPATH"]])
    return host.environment(**{"ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **extra})


def run(warm: Warm, folder: Path, **env: str) -> tuple[int, str]:
    return warm.run("axolotl.cli.train", "run.yml", env=environment(**env), cwd=folder)


def engines(folder: Path) -> list[str]:
    """Returns the command lines of processes that work on a folder's engine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "vllm/worker.py" in line and str(folder) in line:
            found.append(line)
    return found


@pytest.mark.parametrize(("given", "expected"), [({}, 8), ({"max_num_seqs": 2}, 2)])
def test_an_engine_writes_as_many_answers_at_once_as_vllms_own_llm(
    given: dict[str, Any], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's defaults follow from what an engine is used for: without a word of it they are half as many, and on some GPUs
    an eighth."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    arguments = {"model": str(tmp_path / "spin/iteration-0/model"), "max_model_len": 8, "skip_tokenizer_init": True}
    job = {"engine": {**arguments, "generation_config": "vllm", **given}, "sampling": {"stop_token_ids": [6]}}
    asked = {"index": 0, "prompts": [[4, 5]], "limits": [3], "seeds": [1]}
    with Engine(None, tmp_path / "engine", {**job, "adapter": None}, iter([asked]), {}, stall_seconds=60) as engine:
        events = {event["event"]: event for event in engine.events(lambda: None)}
    assert events["ready"]["at_once"] == expected
    assert len(events["chunk"]["ids"]) == 1


def pictured_requests(folder: Path, count: int, most: list[int]) -> Iterator[dict[str, Any]]:
    """Yields chunks of two prompts, one of them with a picture; notes how many chunks' pictures are on disk."""
    for index in range(count):
        (folder / str(index)).mkdir(parents=True)
        most.append(len(list(folder.iterdir())))
        Image.new("RGB", (3, 5), (index, 0, 0)).save(folder / str(index) / "0.png")
        asked = {"index": index, "prompts": [[4, PICTURE, 5], [4, 5]], "limits": [3, 3], "seeds": [index, 7]}
        files = [[str(folder / str(index) / "0.png")], []]
        yield {**asked, "processed": [[4, PICTURE, PICTURE, PICTURE, 5], [4, 5]], "pictures": files}


def picture_engine(folder: Path, requests: Iterator[dict[str, Any]]) -> Engine:
    arguments = {"model": str(folder / "spin/iteration-0/model"), "max_model_len": 16, "skip_tokenizer_init": False}
    arguments |= {"generation_config": "vllm", "max_num_seqs": 2, "limit_mm_per_prompt": {"image": 1}}
    job = {"engine": arguments, "sampling": {"stop_token_ids": [6]}, "adapter": None, "never": [PICTURE]}
    return Engine(None, folder / "engine", job, requests, {}, 60, folder / "engine" / "pictures")


def test_pictures_are_on_disk_while_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    most: list[int] = []
    with picture_engine(tmp_path, pictured_requests(tmp_path / "engine" / "pictures", 12, most)) as engine:
        answers = [event for event in engine.events(lambda: None) if event["event"] == "chunk"]
        assert not list((tmp_path / "engine" / "pictures").iterdir())
    assert sorted(event["index"] for event in answers) == list(range(12))
    assert len(most) == 12 and max(most) <= 4  # three times two prompts, and the chunk that goes beyond
    assert not any(PICTURE in ids for event in answers for ids in event["ids"])


def test_pictures_that_vllm_processes_otherwise_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    requests = pictured_requests(tmp_path / "engine" / "pictures", 1, [])
    longer = ({**asked, "processed": [[4, *[PICTURE] * 4, 5], [4, 5]]} for asked in requests)
    with (
        pytest.raises(EngineError, match=r"set `spin.generation.backend: transformers`: this model's pictures"),
        picture_engine(tmp_path, longer) as engine,
    ):
        list(engine.events(lambda: None))


def answered(folder: Path, iteration: int = 0) -> int:
    return len(list((folder / f"out/spin/iteration-{iteration}/chunks").glob("0*.parquet")))


@pytest.fixture(scope="module")
def undisturbed(shared: Path, warm: Warm) -> dict[str, Any]:
    """The outcome of the run in which nothing went wrong; the run itself is in `shared/vllm`."""
    folder = shared / "vllm"
    settings_in(folder, shared)
    code, output = run(warm, folder)
    assert code == 0, output[-6000:]
    return outcome(folder / "out")


def test_engines_answer_and_leave_nothing(shared: Path, undisturbed: dict[str, Any]) -> None:
    folder = shared / "vllm"
    assert engines(folder) == []
    assert not [name for name in undisturbed["files"] if ".engine" in name or ".opponent" in name]
    for iteration in range(2):
        figures = host.Run(0, "", folder / "out").metrics(iteration)
        assert 0 < figures["spin/engine_start_seconds"] < figures["spin/generation_seconds"]
        # the second opponent is what iteration 0 ended with, which is on disk
        assert ("spin/opponent_write_seconds" in figures) == (iteration == 0)
    pairs = undisturbed["pairs 0"]
    ends = list(zip(pairs["rejected_ids"], pairs["finish_reason"], strict=True))
    assert {len(ids) for ids, why in ends if why == "length"} == {8}
    assert all((ids[-1] == 6) == (why == "stop") for ids, why in ends)


@pytest.mark.once
@pytest.mark.parametrize(
    ("fault", "says", "kept"),
    [
        ("die:9", "ended with signal SIGKILL", 1),
        ("hang:9", "made no progress for 2 s while answering; `spin.generation.vllm.stall_seconds`", 1),
        ("garbage:9", "wrote garbage to", 1),
        ("fewer:9", "chunks unanswered", 1),
        ("abort:9", "ended by 'abort'", 1),
        ("start", "ended with exit status 1", 0),
        ("memory", "lower `spin.generation.vllm.gpu_memory_utilization`, or set `spin.generation.vllm.offload: true`", 0),
    ],
)  # fmt: skip
def test_a_fault_is_said_and_the_next_start_goes_on(
    fault: str, says: str, kept: int, shared: Path, tmp_path: Path, warm: Warm, undisturbed: dict[str, Any]
) -> None:
    settings_in(tmp_path, shared, {"stall_seconds": 2})
    code, output = run(warm, tmp_path, FAKE_VLLM=fault)
    assert code == 1
    message = output.rpartition("axolotl-spin: ")[2]
    assert says in message and "engine.log" in message and "the same command goes on" in message, message[:3000]
    if fault.split(":")[0] in ("die", "hang", "start"):
        assert "  | " in message and "planted: " in message  # the log's last lines
    assert answered(tmp_path) >= kept
    assert engines(tmp_path) == []
    # prompts, answers and weights on their way are the owner's alone
    private = [tmp_path / "out/spin/iteration-0" / name for name in (".engine-0", ".opponent")]
    assert [oct(folder.stat().st_mode)[-3:] for folder in private] == ["700", "700"]
    code, output = run(warm, tmp_path)
    assert code == 0, output[-6000:]
    if kept:
        assert "prompts are already answered" in output
    assert differences(outcome(tmp_path / "out"), undisturbed) == []


@pytest.mark.once
def test_the_engine_ends_when_the_trainer_is_killed(
    shared: Path, tmp_path: Path, warm: Warm, undisturbed: dict[str, Any]
) -> None:
    settings_in(tmp_path, shared, {"max_num_seqs": 4})  # sixteen answers of up to eight steps: half a minute
    fork = warm.start("axolotl.cli.train", "run.yml", env=environment(FAKE_VLLM_STEP="1"), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not answered(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answered(tmp_path) and len(engines(tmp_path)) == 1, fork.output()[-3000:]
    fork.end(signal.SIGKILL)
    killed = time.monotonic()
    while engines(tmp_path) and time.monotonic() < killed + 20:
        time.sleep(0.1)
    assert engines(tmp_path) == [] and time.monotonic() - killed < 5
    code, output = run(warm, tmp_path)
    assert code == 0 and "prompts are already answered" in output, output[-6000:]
    assert differences(outcome(tmp_path / "out"), undisturbed) == []


@pytest.mark.once
def test_no_engine_starts_for_answers_that_are_there(shared: Path, tmp_path: Path, warm: Warm) -> None:
    settings_in(tmp_path, shared)
    code, _ = run(warm, tmp_path, SPIN_KILL="generate/all chunks whole")
    assert code == -signal.SIGKILL and answered(tmp_path) == 4
    code, output = run(warm, tmp_path, FAKE_VLLM="start")
    assert code == 1 and "iteration 0: trained" in output  # the engine that fails is the next iteration's
    assert (tmp_path / "out/spin/iteration-1/.engine-0/engine.log").exists()


@pytest.mark.once
def test_an_adapter_alone_is_served(shared: Path, tmp_path: Path, warm: Warm) -> None:
    """The fake engine refuses a folder without an adapter, and one with `enable_lora` but no adapter."""
    settings_in(tmp_path, shared, **host.LORA)
    code, output = run(warm, tmp_path, SPIN_KILL="iteration 1/generating")
    assert code == -signal.SIGKILL, output[-3000:]
    assert not list((tmp_path / "out/spin").rglob("model.safetensors"))
    code, output = run(warm, tmp_path)
    assert code == 0, output[-3000:]
    assert (tmp_path / "out/spin/iteration-1/model/adapter_model.safetensors").exists()


@pytest.mark.once
def test_offloading_changes_nothing(shared: Path, tmp_path: Path, warm: Warm, undisturbed: dict[str, Any]) -> None:
    settings_in(tmp_path, shared, {"offload": True})
    code, output = run(warm, tmp_path)
    assert code == 0 and output.count("of training moved to the CPU") == output.count("brought back") == 2, output[
        -3000:
    ]
    assert differences(outcome(tmp_path / "out"), undisturbed) == []


@pytest.mark.once
@pytest.mark.parametrize(
    ("vllm", "path", "says"),
    [
        ({}, "", "vLLM cannot be imported by"),
        ({"python": "/nowhere/python"}, None, "`spin.generation.vllm.python: /nowhere/python` is no program"),
        ({"max_num_seq": 4}, None, "did you mean `max_num_seqs`?"),
        ({"max_model_len": 9}, None, "spin.generation.vllm.max_model_len: 9` is less than"),
        ({"tensor_parallel_size": 2}, None, "spin.generation.vllm.tensor_parallel_size: 2` does not divide"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_loads(
    vllm: dict[str, Any], path: str | None, says: str, shared: Path, tmp_path: Path, warm: Warm
) -> None:
    settings_in(tmp_path, shared, vllm)
    env = {} if path is None else {"PYTHONPATH": host.environment()["PYTHONPATH"]}
    code, output = run(warm, tmp_path, **env)
    assert code == 1 and says in output, output[-3000:]
    assert not host.loaded_a_model(tmp_path / "out")
    assert not list((tmp_path / "out/spin").glob(".check*"))


# -- two ranks ----------------------------------------------------------------------------------------------------------


def on_two_ranks(
    kind: str, folder: Path, shared: Path, ranks: Ranks, vllm: dict[str, Any] | None = None, **env: str
) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    changes = host.layout(kind, folder)
    changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    settings_in(folder, shared, vllm, **changes)
    marks = {key: value for key, value in environment(**host.rank_environment(kind), **env).items()}
    if kind != "ddp":
        del marks["ACCELERATE_USE_CPU"]
    return ranks.run("axolotl.cli.train", "run.yml", env=marks, cwd=folder)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.once) for kind in ("ddp", "zero2", "zero3")), "fsdp2"]
)
def test_two_engines_and_offloading_on_two_ranks(
    kind: str, shared: Path, tmp_path: Path, warm_ranks: Ranks, undisturbed: dict[str, Any]
) -> None:
    """The same answers as one engine's on one rank; and what is offloaded and brought back trains to the same bits.

    The latter on the default host: no other host is needed to tell whether bits are brought back.
    """
    ends = []
    for offload in (False, True) if host.DEFAULT else (True,):
        folder = tmp_path / f"offload-{offload}"
        code, output = on_two_ranks(kind, folder, shared, warm_ranks, {"offload": offload})
        assert code == 0, output[-6000:]
        assert output.count("of training moved to the CPU") == output.count("brought back")
        assert ("moved to the CPU" in output) == offload
        ends.append(outcome(folder / "out"))
        assert engines(folder) == []
        for column in ("rejected_ids", "finish_reason"):
            assert ends[-1]["pairs 0"][column] == undisturbed["pairs 0"][column]
            assert ends[-1]["pairs 1"][column] == undisturbed["pairs 1"][column]
        shutil.rmtree(folder)
    assert differences(ends[0], ends[-1]) == []


@pytest.mark.once
@pytest.mark.ranks
def test_one_engine_for_two_ranks(shared: Path, tmp_path: Path, warm_ranks: Ranks, undisturbed: dict[str, Any]) -> None:
    code, output = on_two_ranks("ddp", tmp_path / "run", shared, warm_ranks, {"tensor_parallel_size": 2})
    assert code == 0, output[-6000:]
    assert output.count("vLLM 0.32.0 was ready") == 2  # one an iteration
    found = outcome(tmp_path / "run/out")
    assert found["pairs 1"]["rejected_ids"] == undisturbed["pairs 1"]["rejected_ids"]


@pytest.mark.once
@pytest.mark.ranks
def test_a_fault_of_one_engine_stops_all_ranks(shared: Path, tmp_path: Path, warm_ranks: Ranks) -> None:
    """Two ranks with an engine each; the first engine that dies ends both, and the other engine too."""
    folder = tmp_path / "run"
    folder.mkdir()
    changes = {**host.layout("ddp", folder), "plugins": ["faults.FaultPlugin", *host.OURS]}
    settings_in(folder, shared, {"max_num_seqs": 2}, **changes)  # eight answers of an engine, two at a time
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    env = environment(FAKE_VLLM="die:4", FAKE_VLLM_STEP="0.3")
    forks = warm_ranks.start("axolotl.cli.train", "run.yml", env=env, cwd=folder, logs=logs)
    try:
        assert [fork.wait(timeout=120) for fork in forks] == [1, 1]
    finally:
        for fork in forks:
            if fork.alive():
                fork.end(signal.SIGKILL)
    for log in logs:
        assert "EngineError: the vLLM engine ended with signal SIGKILL" in log.read_text(errors="replace")
    assert engines(folder) == []
