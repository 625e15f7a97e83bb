"""`axolotl spin export --format dpo` of a run on pictures: TRL and the host read the pair's tokens and pictures again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import host
import pictured
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axolotl.utils.chat_templates import get_chat_template
from click.testing import CliRunner, Result
from datasets import load_dataset
from rows import load
from transformers import AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from warm import Warm

from axolotl_spin.cli import spin
from axolotl_spin.data.images import picture_hash
from axolotl_spin.data.pairs import PICTURED, write_pairs
from axolotl_spin.disk.directory import RunDirectory

IDS = ("chosen_ids", "rejected_ids")


def export(out: Path, kind: str, output: Path, *options: str) -> Result:
    arguments = ["export", str(out), "--iteration", "0", "--format", kind, "--output", str(output), *options]
    return CliRunner().invoke(spin, arguments)


def trl_reads(name: str, folder: Path, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Returns what TRL makes of rows: both answers behind the prompt, by the model's processor."""
    processor = AutoProcessor.from_pretrained(folder / "model")
    processor.chat_template = get_chat_template(pictured.FAMILIES[name].template)
    batch = DataCollatorForVisionPreference(processor)([dict(row) for row in rows])
    read = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return list(zip(read[: len(rows)], read[len(rows) :], strict=True))


def pairs_of(name: str, folder: Path, answers: list[tuple[str, bool]], **how: Any) -> tuple[Path, list[dict[str, Any]]]:
    """Writes what a run on pictures leaves of an iteration: a pair of each row, whose own answers are given.

    Args:
        name: Of the family.
        folder: For model, data and config.
        answers: What the opponent said to each row, and whether it was cut.
        how: See `pictured.conversations`.

    Returns:
        The config, and the pairs.
    """
    pictured.conversations(folder / "data.parquet", len(answers), **how)
    settings = pictured.settings(name, folder)
    del settings["base_model"], settings["output_dir"]
    run = load(folder, **settings)[0]
    assert run.images is not None
    first = {run.tokenizer.convert_tokens_to_ids(said.split()[0]) for said in pictured.ANSWERS.values()}
    whole = run.prompts[0]["chosen_ids"]
    start = next(place for place, token in enumerate(whole) if token in first)
    before, end = whole[:start], whole[start + 3 :]  # the human says three words
    rows = []
    for index, (prompt, (words, cut)) in enumerate(zip(run.prompts, answers, strict=True)):
        rejected = [*before, *run.tokenizer(words, add_special_tokens=False)["input_ids"], *([] if cut else end)]
        logps = {"opponent_chosen_logp": -1.0, "opponent_rejected_logp": -2.0}
        texts = {"prompt": "p", "chosen": "c", "rejected": words, "finish_reason": "length" if cut else "stop"}
        images = run.images.hashes(prompt["row"])
        rows.append({**prompt, "rejected_ids": rejected, **texts, **logps, "generated_in": 0, "images": images})
        assert prompt["row"] == index
    path = RunDirectory(folder / "out").pairs(0)
    write_pairs(path, [pa.RecordBatch.from_pylist(rows, schema=PICTURED)], "mark", schema=PICTURED)
    return host.write(pictured.settings(name, folder)), rows


@pytest.mark.parametrize("name", list(pictured.FAMILIES))
def test_trl_reads_the_pairs_tokens_and_pictures(name: str, tmp_path: Path) -> None:
    """Rows with one picture, two and none; what cannot be kept is counted, and left out where that is asked for."""
    if name in architectures.ARCHITECTURES and (why := architectures.lacking(name)):
        pytest.skip(why)
    answers = [("w7", False), ("w8 w9", False), ("w9", False), ("w7 w8", True), ("", False), ("w5 w6", False)]
    config, pairs = pairs_of(name, tmp_path, answers, mixed=True)
    done = export(tmp_path / "out", "dpo", tmp_path / "set", "--config", str(config))
    assert done.exit_code == 1 and "2 of 6 pairs cannot be kept" in done.output, done.output
    assert "  1: the opponent's answer was cut" in done.output and "  1: the opponent's answer is empty" in done.output
    options = ("--config", str(config), "--inexact", "drop", "--test-rows", "1")
    done = export(tmp_path / "out", "dpo", tmp_path / "set", *options)
    assert done.exit_code == 0 and "processor_type: AutoProcessor" in done.output, done.output
    rows = [row for split in ("train", "test") for row in load_dataset(str(tmp_path / "set"), split=split)]
    kept = [pairs[place] for place in (0, 1, 2, 5)]
    assert [[picture_hash(image) for image in row["images"]] for row in rows] == [pair["images"] for pair in kept]
    assert {len(pair["images"]) for pair in kept} >= {0, 1}
    for row, pair in zip(rows, kept, strict=True):
        [read] = trl_reads(name, tmp_path, [row])
        assert read == tuple([*pair["prompt_ids"], *pair[ids]] for ids in IDS)
        assert [part["type"] for turn in row["prompt"] for part in turn["content"]].count("image") == len(row["images"])


def test_what_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    config, _ = pairs_of("gemma3", tmp_path, [("w7", False)] * 2)
    out = tmp_path / "out"
    refused = {
        ("uclaml",): "--format uclaml is text alone, without a place for them: --format dpo has them",
        ("dpo-text",): "--format dpo-text is text alone",
        ("dpo",): "name the run's YAML with --config",
        ("parquet", "--config", str(config)): "--config is for --format dpo of a run on pictures",
        ("dpo", "--config", str(config), "--tokenizer", "x"): "--tokenizer does not go with pictures",
    }
    for (kind, *options), why in refused.items():
        done = export(out, kind, tmp_path / "set", *options)
        assert done.exit_code == 1 and why in done.output and "Traceback" not in done.output, done.output
    pictured.conversations(tmp_path / "data.parquet", 2, seed=1)  # other shades
    done = export(out, "dpo", tmp_path / "set", "--config", str(config))
    assert done.exit_code == 1 and "row 0 of `datasets:`" in done.output and "does not have the pictures" in done.output
    text = host.write(host.config(tmp_path / "text"))
    done = export(out, "dpo", tmp_path / "set", "--config", str(text))
    assert done.exit_code == 1 and "is of a run on text" in done.output
    assert not (tmp_path / "set").exists()


@pytest.mark.host
@pytest.mark.skipif(host.HOST.release < (0, 21), reason="this host's `rl: dpo` takes text alone")
def test_the_hosts_dpo_trains_on_a_runs_pairs(tmp_path: Path, warm: Warm) -> None:
    settings = pictured.settings("gemma3", tmp_path)
    settings["spin"] |= {"iterations": 1}
    run = host.train(settings, by=warm)
    options = ("--config", str(tmp_path / "out.yml"), "--inexact", "keep")
    done = export(run.out, "dpo", tmp_path / "set", *options)
    assert done.exit_code == 0, done.output
    count = pq.read_metadata(tmp_path / "set" / "train.parquet").num_rows
    assert count == 12
    data = {
        "path": str(tmp_path / "set"),
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
    }
    taken = ("processor_type", "remove_unused_columns", "chat_template", "tokenizer_type", "base_model", "sequence_len")
    dpo = {key: settings[key] for key in taken} | {"rl": "dpo", "datasets": [data]}
    trained = host.train(
        {**host.config(tmp_path), **dpo, "spin": None, "plugins": None, "output_dir": str(tmp_path / "dpo")}, by=warm
    )
    assert len(trained.losses()) >= 1
