"""`spin.initial_pairs`: pairs from outside become those of iteration 0, token for token, through the real host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import host
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from recovery import CHANGES, differences, outcome, settings_in
from rows import PAIR, TOKENIZER, ids_file, load, words
from warm import Ranks, Warm

from axolotl_spin.run.plan import make_plan


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def authors(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(tmp_path: Path, source: Path | str, **changes: Any):
    """Returns the run, and the pairs it takes from a source as lists of ids and texts."""
    spin = {"iterations": 2, "initial_pairs": str(source), **changes.pop("spin", {})}
    run, _, _ = load(tmp_path, spin=spin, **changes)
    return run, pa.Table.from_batches(run.given.staged()).to_pylist()


def as_text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def turns(index: int, answer: str, *, system: bool = False) -> list[dict[str, str]]:
    first = [say("system", "w1")] if system else []
    return [*first, say("user", words(index)), say("assistant", answer)]


def test_the_plan_counts_what_is_given() -> None:
    """10 prompts, 7 pairs given, batch 4: 7, then 10 + 7, then 10 + 10 and, with two kept, 10 + 10 + 7."""

    def rows(history: int) -> list[tuple[int, int, int]]:
        plan = make_plan(
            10, given=7, global_batch=4, num_epochs=1, history=history, betas=[0.1] * 3, learning_rates=[1e-3] * 3
        )
        assert [entry.steps for entry in plan.iterations] == [-(-entry.rows // 4) for entry in plan.iterations]
        return [(entry.rows, entry.new_rows, entry.kept_rows) for entry in plan.iterations]

    assert rows(0) == [(7, 7, 0), (10, 10, 0), (10, 10, 0)]
    assert rows(1) == [(7, 7, 0), (17, 10, 7), (20, 10, 10)]
    assert rows(2) == [(7, 7, 0), (17, 10, 7), (27, 10, 17)]


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    """A cut answer stays without an end, whatever its text would become; other columns do not matter."""
    cut = {**PAIR, "rejected_ids": [10, 12], "finish_reason": "length", "opponent_chosen_logp": -1.0}
    path = ids_file(tmp_path / "given" / "pairs.parquet", [PAIR, cut])
    for source in (path, path.parent):
        run, pairs = given(tmp_path, source)
        assert [entry.new_rows for entry in run.plan.iterations] == [2, 37]
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "finish_reason")
        assert [{name: pair[name] for name in names} for pair in pairs] == [
            {name: row[name] for name in names} for row in (PAIR, cut)
        ]
        assert [(pair["generated_in"], pair["row"]) for pair in pairs] == [(0, 0), (0, 1)]


def test_the_authors_format(tmp_path: Path) -> None:
    """A system message, several turns, an empty `generated` in each of its forms, and an answer that is known to be cut.

    The prompts and human answers are those that the same rows give as training data.
    """
    long = [*turns(1, "w9"), *turns(3, "w10 w11")]
    rows = [
        {"real": turns(5, "w20", system=True), "generated": turns(5, "w30 w31", system=True)},
        {"real": long, "generated": [*long[:-1], say("assistant", "w32")]},
        {"real": turns(6, "w21"), "generated": []},
        {"real": turns(7, "w22"), "generated": turns(7, "")},
        {"real": turns(8, "w23"), "generated": turns(8, "w33"), "finish_reason": "length"},
    ]
    source = authors(tmp_path / "real.jsonl", rows)
    data = [{"path": str(source), "ds_type": "json", "type": "axolotl_spin.uclaml"}]
    run, pairs = given(tmp_path, source, datasets=data)
    assert [(as_text(pair["rejected_ids"]), pair["finish_reason"]) for pair in pairs] == [
        ("w30 w31 <|end|>", "stop"), ("w32 <|end|>", "stop"), ("<|end|>", "stop"), ("<|end|>", "stop"), ("w33", "length"),
    ]  # fmt: skip
    trained = {(tuple(row["prompt_ids"]), tuple(row["chosen_ids"])) for row in run.prompts}
    assert {(tuple(pair["prompt_ids"]), tuple(pair["chosen_ids"])) for pair in pairs} == trained and len(trained) == 5
    turn = "<|user|> w1 w2 <|end|> <|assistant|> w9 <|end|> <|user|> w3 w4 <|end|> <|assistant|>"
    assert as_text(pairs[1]["prompt_ids"]) == turn
    assert given(tmp_path, source, datasets=data)[0].given.digest == run.given.digest


def test_a_folder_of_parquet_files_is_read_by_its_train_split(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    rows = [{"real": turns(i, "w20"), "generated": turns(i, "w30")} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "test.parquet")
    assert len(given(tmp_path, folder)[1]) == 3
    assert len(given(tmp_path, folder / "test.parquet")[1]) == 1


def test_answers_that_do_not_fit_are_cut_and_human_ones_left_out(tmp_path: Path) -> None:
    """sequence_len 12: a prompt of 5, an answer of 3 that fits, one of 21 that is cut to 7; a human answer of 21."""
    long = " ".join(["w30"] * 20)
    rows = [
        {"real": turns(1, "w20 w21"), "generated": turns(1, long)},
        {"real": turns(2, long), "generated": turns(2, "w31")},
    ]
    _, [pair] = given(tmp_path, authors(tmp_path / "long.jsonl", rows), sequence_len=12)
    assert (len(pair["prompt_ids"]), len(pair["rejected_ids"]), pair["finish_reason"]) == (5, 7, "length")
    assert as_text(pair["rejected_ids"]) == " ".join(["w30"] * 7)


BAD: dict[str, tuple[Any, str]] = {
    "nothing there": ("nowhere.parquet", "cannot be read as a file, a folder or a dataset on the hub"),
    "a text file": ("text", "a file needs one of the names"),
    "no parquet": ("damaged", "given.parquet`: "),
    "other columns": ([{"prompt": "w1", "chosen": "w2"}], "has no column prompt_ids, chosen_ids"),
    "no rows": ([], "it holds no pair"),
    "another vocabulary": ([PAIR, {**PAIR, "rejected_ids": [47, 6]}], "row 1 has ids in rejected_ids outside"),
    "negative ids": ([{**PAIR, "chosen_ids": [-1]}], "row 0 has ids in chosen_ids outside"),
    "too long": ([{**PAIR, "rejected_ids": [7] * 60}], "up to 65 tokens, more than `sequence_len: 64`"),
    "no prompt": ([{**PAIR, "prompt_ids": []}], "row 0 has no token in prompt_ids"),
    "no answer": ([PAIR, {**PAIR, "rejected_ids": None}], "row 1 has no rejected_ids"),
    "unknown reason": ([{**PAIR, "finish_reason": "eos"}], "neither `stop` nor `length`"),
    "all identical": ([{**PAIR, "rejected_ids": PAIR["chosen_ids"]}] * 2, "all 2 answers equal the human's"),
    "all empty": ([{**PAIR, "rejected_ids": [6]}] * 2, "all 2 answers are empty"),
    "authors without real": ([{"generated": turns(1, "w2")}], "has no column"),
    "authors, no answer": ([{"real": [say("user", "w1")], "generated": []}], "row 0: "),
    "authors, another prompt": ([{"real": turns(1, "w2"), "generated": turns(2, "w2")}], "with another prompt"),
    "authors, no assistant": ([{"real": turns(1, "w2"), "generated": turns(1, "w2")[:1]}], "with another prompt"),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_bad_sets_are_refused_by_the_key(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    source = tmp_path / "given.parquet"
    if content == "text":
        source = tmp_path / "given.txt"
        source.write_text("w1")
    elif content == "damaged":
        ids_file(source, [PAIR] * 50)
        source.write_bytes(source.read_bytes()[:-20])
    elif isinstance(content, str):
        source = tmp_path / content
    elif content:
        ids_file(source, content)
    else:
        pq.write_table(pa.Table.from_pylist([PAIR]).slice(0, 0), source)
    with pytest.raises(ValueError) as refused:
        given(tmp_path, source)
    assert str(refused.value).startswith(f"`spin.initial_pairs: {source}") and message in str(refused.value)


@pytest.mark.once
def test_a_changed_file_is_another_run_and_a_moved_one_is_not(tmp_path: Path) -> None:
    path = ids_file(tmp_path / "a.parquet", [PAIR, {**PAIR, "chosen_ids": [12, 6]}])
    run, _ = given(tmp_path, path)
    run.write_plan()
    moved = path.rename(tmp_path / "b.parquet")
    assert given(tmp_path, moved)[0].identity.hash == run.identity.hash
    ids_file(moved, [PAIR, {**PAIR, "chosen_ids": [13, 6]}])
    with pytest.raises(ValueError, match=r"spin.initial_pairs \(pairs as token ids\): '"):
        given(tmp_path, moved)
    with pytest.raises(ValueError, match=r"spin.initial_pairs \(pairs as token ids\): '.* -> None"):
        load(tmp_path)


def test_a_file_exchanged_during_the_start_is_found(tmp_path: Path) -> None:
    path = ids_file(tmp_path / "a.parquet", [PAIR, {**PAIR, "chosen_ids": [12, 6]}])
    run, _ = given(tmp_path, path)
    ids_file(path, [PAIR, {**PAIR, "chosen_ids": [13, 6]}])
    with pytest.raises(ValueError, match="was changed while the run started"):
        list(run.given.staged())


def start(warm: Warm, folder: Path, shared: Path, kill: str = "") -> tuple[int, str]:
    settings_in(folder, shared)  # makes model and data
    settings = yaml.safe_load((folder / "run.yml").read_text())
    settings["spin"] = {**CHANGES["spin"], "initial_pairs": str(shared / "given")}
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    env = host.environment(ACCELERATE_USE_CPU="true", SPIN_KILL=kill)
    return warm.run("axolotl.cli.train", "run.yml", env=env, cwd=folder)


@pytest.mark.once
@pytest.mark.host
def test_training_starts_from_given_pairs_and_resumes_exactly(
    warm: Warm, whole: dict, shared: Path, tmp_path: Path
) -> None:
    """Given the answers that a run drew itself, a run trains on the very same: every loss and weight is that run's.

    Then with some left out: the plan, iteration 1's kept pairs, and the same end after kills at every phase.
    """
    drawn = pq.read_table(shared / "whole" / "out" / "spin" / "iteration-0" / "pairs.parquet")
    ids_file(shared / "given" / "pairs.parquet", drawn.to_pylist())
    code, output = start(warm, tmp_path, shared)
    assert code == 0, output[-6000:]
    assert "iteration 0: took 16 pairs from" in output and "iteration 0: generated" not in output
    assert "iteration 1: generated 16 answers" in output
    found = outcome(tmp_path / "out")
    same = [name for name in whole if name not in ("plan", "logs", "metrics 0", "pairs 0", "pairs 1")]
    assert not [name for name in differences(found, whole) if name in same]
    for iteration in range(2):
        one, other = (results[f"pairs {iteration}"] for results in (found, whole))
        assert all(one[name] == other[name] for name in one if name != "row")
    assert not [name for name in found["metrics 0"] if "generation" in name]

    ids_file(shared / "given" / "pairs.parquet", drawn.to_pylist()[:11])
    fewer, killed = tmp_path / "fewer", tmp_path / "killed"
    for folder in (fewer, killed):
        folder.mkdir()
    code, output = start(warm, fewer, shared)
    assert code == 0, output[-6000:]
    expected = outcome(fewer / "out")
    assert [entry["rows"] for entry in expected["plan"]["iterations"]] == [11, 27]
    assert expected["pairs 0"]["rejected_ids"] == drawn["rejected_ids"].to_pylist()[:11]
    assert expected["pairs 1"]["rejected_ids"][16:] == drawn["rejected_ids"].to_pylist()[:11]
    for point in ("score/first batch", "pairs/whole", "train/before the first checkpoint", "iteration 1/keeping pairs"):
        code, output = start(warm, killed, shared, point)
        assert code != 0 and f"killed at: {point}" in output, output[-3000:]
    code, output = start(warm, killed, shared)
    assert code == 0, output[-6000:]
    assert not differences(outcome(killed / "out"), expected)


@pytest.mark.once
@pytest.mark.ranks
@pytest.mark.host
def test_two_ranks_take_the_same_pairs(warm: Warm, warm_ranks: Ranks, tmp_path: Path) -> None:
    """Message lists are tokenised once for both ranks; losses are one rank's."""
    rows = [{"real": turns(i, "w20"), "generated": turns(i, f"w{i + 9} w7")} for i in range(7)]
    source = authors(tmp_path / "real.jsonl", rows)
    runs = []
    for name, by in (("single", warm), ("ddp", warm_ranks)):
        changes = host.layout(name, tmp_path)
        settings = {**host.config(tmp_path, rows=9), **changes}
        settings["spin"] = {**settings["spin"], "initial_pairs": str(source)}
        runs.append(host.train(settings, name, by=by))
    one, two = runs
    assert two.output.count("took 7 pairs from") == 1
    assert [one.pairs(0).num_rows, one.pairs(1).num_rows] == [7, 16]
    for iteration in range(2):
        for column in ("prompt_ids", "rejected_ids", "finish_reason", "generated_in"):
            assert one.pairs(iteration)[column].to_pylist() == two.pairs(iteration)[column].to_pylist()
    assert two.losses() == pytest.approx(one.losses(), abs=1e-3)
