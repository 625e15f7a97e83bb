"""Numbers gone wrong are found where they first show, with figures and the key to change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import host
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from recovery import settings_in
from safetensors.torch import load_file, save_file
from warm import Warm

from axolotl_spin.data.pairs import SCHEMA
from axolotl_spin.game.health import (
    UnhealthyRunError,
    act_on,
    check_answers,
    check_opponent_logps,
    check_step_zero,
    count_answers,
)
from axolotl_spin.training.loss import spin_loss

END = 6


def pairs(rejected: list[list[int]], chosen: list[list[int]] | None = None, iteration: int = 0) -> pa.Table:
    count = len(rejected)
    human = chosen or [[7 + i % 30, 8 + i % 20, 9, END] for i in range(count)]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [[5]] * count,
        "chosen_ids": human,
        "rejected_ids": rejected,
        "prompt": ["p"] * count,
        "chosen": ["c"] * count,
        "rejected": ["r"] * count,
        "finish_reason": ["stop" if ids[-1:] == [END] else "length" for ids in rejected],
        "generated_in": [iteration] * count,
        "opponent_chosen_logp": [-1.0] * count,
        "opponent_rejected_logp": [-1.0] * count,
        "row": list(range(count)),
    }
    return pa.table(columns, schema=SCHEMA)


def found(table: pa.Table, iteration: int = 0, sft_weight: float = 0.0) -> list[tuple[bool, str]]:
    counts = count_answers(table, iteration, [END])
    findings = check_answers(counts, iteration, sft_weight=sft_weight, max_new_tokens=8, sample="some text")
    return [(finding.fatal, finding.text) for finding in findings]


SOUND = [[7 + i % 9, 20 + i % 7, 9, END] for i in range(20)]


def test_sound_answers_are_not_remarked_upon() -> None:
    assert found(pairs(SOUND)) == []
    assert found(pairs([[END]] * 3)) == []  # too few to say anything
    yes_or_no = [[7 + i % 2, END] for i in range(20)]
    assert found(pairs(yes_or_no, chosen=yes_or_no[1:] + yes_or_no[:1])) == []


def test_answers_that_all_equal_the_humans() -> None:
    human = pairs(SOUND)["chosen_ids"].to_pylist()
    [(fatal, text)] = found(pairs(human))
    assert fatal and "all 20 answers equal the human's" in text and "spin.generation.temperature" in text
    [(fatal, text)] = found(pairs(human), sft_weight=0.1)  # which still trains
    assert not fatal and "100.0% of 20 answers equal the human's" in text
    kept = pa.concat_tables([pairs(human, iteration=1), pairs(SOUND, iteration=0)])
    assert [fatal for fatal, _ in found(kept, iteration=1)] == [False]


def test_answers_that_are_all_empty_or_cut() -> None:
    [(fatal, text)] = found(pairs([[END]] * 20))
    assert fatal and "all 20 answers are empty" in text and "chat_template" in text
    [(fatal, text)] = found(pairs([ids[:3] for ids in SOUND]))
    assert not fatal and "100.0% of 20 answers were cut" in text and "spin.generation.max_new_tokens` (8)" in text


def test_a_collapsed_policy() -> None:
    collapsed = pairs([[7, 7, 7, END]] * 19 + [[8, 9, END]], iteration=1)
    [(fatal, text)] = found(collapsed, iteration=1)
    assert fatal and "95.0% of 20 answers repeat a single token (human: 0.0%)" in text and "spin.beta" in text
    [(fatal, text)] = found(pairs([[7, 7, 7, END]] * 20))
    assert not fatal and "check `base_model`" in text  # the start model's own


def test_shares_are_those_of_a_plain_count() -> None:
    """Ragged answers, empty ones and ones of a token included, in several pieces as a file's row groups are."""
    draw = np.random.default_rng(3)

    def answers(count: int) -> list[list[int]]:
        return [draw.integers(7, 9, draw.integers(0, 5)).tolist() for _ in range(count)]

    own, human = answers(400), answers(400)
    own[3] = [END]
    table = pairs(own, human)
    table = pa.concat_tables([table[:150], table[150:], pairs([[7, 7]] * 5, iteration=1)])
    counts = count_answers(table, 0, [END])
    repeated = [[len(ids) > 0 and len(set(ids[:-1] or ids)) == 1 for ids in each] for each in (own, human)]
    assert (counts.pairs, counts.new, counts.all_identical, counts.first) == (405, 400, False, own[0])
    assert counts.rejected_tokens == sum(map(len, own)) and counts.chosen_tokens == sum(map(len, human))
    assert counts.identical == sum(a == b for a, b in zip(own, human, strict=True)) > 0
    assert [counts.rejected_monotone, counts.chosen_monotone] == [sum(each) for each in repeated]
    assert counts.empty == sum(ids in ([], [END]) for ids in own) > 1
    assert counts.cut == 399
    assert counts.shares()["spin/rejected_length"] == counts.rejected_tokens / 400
    later = count_answers(table, 1, [END])
    assert (later.new, later.rejected_monotone, later.first) == (5, 5, [7, 7])


def test_log_probs_that_are_not_numbers() -> None:
    logps = np.full((5, 2), -3.0)
    assert check_opponent_logps(logps, 0) == []
    logps[1, 0], logps[4, 1] = np.nan, -np.inf
    [finding] = check_opponent_logps(logps, 2)
    assert (
        finding.fatal and "iteration 2" in finding.text and "2 of 5 pairs" in finding.text and "[1, 4]" in finding.text
    )


def test_step_zero() -> None:
    def check(off: float, far: float, beta: float = 1.0) -> list[bool]:
        losses, nats = torch.full((3,), 0.693147 + off), torch.full((3,), far)
        found = check_step_zero(losses, nats, expected=0.693147, beta=beta, iteration=1)
        return [finding.fatal for finding in found]

    assert check(1e-4, 9e-4) == []
    assert check(0.002, 1e-4) == [False]
    assert check(0.002, 1e-4, beta=5.0) == []  # the same nats make so much more of a loss
    assert check(0.02, 0.05) == [False]  # noise
    assert check(0.02, 0.5) == [True]  # another model, and a small beta
    assert check(float("nan"), float("nan")) == [False]  # `check_loss` speaks of those


def test_step_zero_sees_what_both_answers_have_in_common() -> None:
    """Log-probs 0.4 nats a token off on either answer: the margin, and so the loss, knows nothing of it."""
    losses = spin_loss(*torch.tensor([[-60.0], [-45.0], [-80.0], [-65.0]]), beta=0.1).losses
    found = check_step_zero(losses, torch.tensor([0.4]), expected=math.log(2), beta=0.1, iteration=1)
    assert losses.item() == pytest.approx(math.log(2))
    [finding] = found
    assert finding.fatal and "off by 0.000000 on average (log-probs by 0.4000 nats per token)" in finding.text
    [finding] = check_step_zero(losses, torch.tensor([0.01]), expected=math.log(2), beta=0.1, iteration=1)
    assert not finding.fatal and "`micro_batch_size`" in finding.text


def test_a_fatal_finding_is_raised_on_every_rank() -> None:
    findings = check_opponent_logps(np.full((1, 2), np.nan), 0)
    for main in (True, False):
        with pytest.raises(UnhealthyRunError, match="NaN or infinite"):
            act_on(findings, main)


# -- in a run ---------------------------------------------------------------------------------------------------------

ENV = host.environment(ACCELERATE_USE_CPU="true")


def start(warm: Warm, folder: Path, settings: dict[str, Any], **env: str) -> tuple[int, str]:
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    return warm.run("axolotl.cli.train", "run.yml", env={**ENV, **env}, cwd=folder)


@pytest.mark.host
def test_a_loss_that_is_nan_stops_the_run_and_spares_its_checkpoints(warm: Warm, shared: Path, tmp_path: Path) -> None:
    settings = {**settings_in(tmp_path, shared), "learning_rate": 1e25, "warmup_steps": 4, "save_steps": 1}
    code, output = start(warm, tmp_path, settings)
    assert code == 1
    assert "NaN or infinite" in output and "lower `learning_rate`" in output
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints
    for folder in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.host
def test_a_loss_that_is_nan_is_found_at_its_step(warm: Warm, shared: Path, tmp_path: Path) -> None:
    """Not only where weights are looked at, before a checkpoint and at the iteration's end."""
    settings = {**settings_in(tmp_path, shared), "learning_rate": 1e25, "warmup_steps": 4, "save_steps": 1000}
    code, output = start(warm, tmp_path, settings)
    assert code == 1 and "the loss is NaN or infinite at step" in output


@pytest.mark.host
@pytest.mark.once
def test_weights_that_are_nan_are_found_before_generation(warm: Warm, shared: Path, tmp_path: Path) -> None:
    """On the default host alone: our own look at the weights, before the host's training begins."""
    model = tiny.save(tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, output = start(warm, tmp_path, {**settings_in(tmp_path, shared), "base_model": str(model)})
    assert code == 1
    assert "1 weights are NaN or infinite" in output and "model.layers.1.mlp.up_proj.weight" in output
    assert not list((tmp_path / "out" / "spin").glob("iteration-0/*"))


@pytest.mark.host
def test_pairs_of_exchanged_weights_are_made_again(warm: Warm, shared: Path, tmp_path: Path) -> None:
    """Someone puts other weights where the base model was, between the answers and the first step."""
    model = tiny.save(tmp_path / "model")
    settings = {**settings_in(tmp_path, shared), "base_model": str(model)}
    assert start(warm, tmp_path, settings, SPIN_KILL="train/first micro-batch")[0] != 0
    tiny.save(model, seed=1)
    code, output = start(warm, tmp_path, settings)
    assert code == 0, output[-4000:]
    assert "pairs.parquet was made by other weights than the model has at this start: they are made again" in output
    metrics = json.loads((tmp_path / "out" / "spin" / "iteration-0" / "metrics.json").read_text())
    assert metrics["loss_first"] == pytest.approx(math.log(2.0), abs=1e-5)


@pytest.mark.host
@pytest.mark.once
def test_data_made_by_the_model_itself_stops_the_run(warm: Warm, shared: Path, tmp_path: Path) -> None:
    """On the default host alone: our own comparison of answers, before the host's training begins."""
    greedy = {"iterations": 1, "generation": {"max_new_tokens": 8, "batch_size": 4, "temperature": 0}}
    settings = {**settings_in(tmp_path, shared), "spin": greedy, "val_set_size": 0}
    assert start(warm, tmp_path, settings, SPIN_KILL="train/first micro-batch")[0] != 0
    answered = pq.read_table(tmp_path / "out" / "spin" / "iteration-0" / "pairs.parquet").to_pylist()
    rows = []
    for pair in answered:
        ids = pair["prompt_ids"] + pair["rejected_ids"]
        labels = [-100] * len(pair["prompt_ids"]) + pair["rejected_ids"]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [{"path": str(tmp_path / "own.jsonl"), "ds_type": "json", "type": None}]
    code, output = start(warm, tmp_path, {**settings, "datasets": own, "output_dir": str(tmp_path / "again")})
    assert code == 1 and "answers equal the human's token for token" in output
    assert not (tmp_path / "again" / "spin" / "iteration-0" / "pairs.parquet").exists()
