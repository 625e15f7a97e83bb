"""Every kind of dataset that the host prepares for SFT, through the host's own config and data code, to pairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, Features
from rows import TOKENIZER, jsonl, load, words

from axolotl_spin.disk.atomic import read_json, write_json
from axolotl_spin.run.resume import set_aside

ROWS = 12


def texts(run, column: str) -> list[str]:
    return TOKENIZER.batch_decode(run.prompts[column][:])


def test_chat_template_pairs_are_token_exact(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": words(i)}, {"role": "assistant", "content": f"w{i + 20}"}]}
        for i in range(ROWS)
    ]
    run, meta, _ = load(tmp_path, datasets=[{**jsonl(tmp_path / "c.jsonl", rows), "type": "chat_template"}])
    pairs = set(zip(texts(run, "prompt_ids"), texts(run, "chosen_ids"), strict=True))
    assert pairs == {(f"<|user|> {words(i)} <|end|> <|assistant|>", f"w{i + 20} <|end|>") for i in range(ROWS)}
    assert meta.total_num_steps == run.plan.total_steps == 3 + 6
    for index, row in enumerate(run.prompts["row"][:]):
        source = meta.train_dataset[row]
        assert source["input_ids"][: len(run.prompts[index]["prompt_ids"])] == run.prompts[index]["prompt_ids"]


@pytest.mark.parametrize(("turns", "count"), [("last", ROWS), ("all", 2 * ROWS)])
def test_turns(tmp_path: Path, turns: str, count: int) -> None:
    tiny.conversations(tmp_path / "two.jsonl", ROWS, turns=2)
    data = [{"path": str(tmp_path / "two.jsonl"), "ds_type": "json", "type": "chat_template"}]
    run, _, _ = load(tmp_path, datasets=data, sequence_len=128, spin={"iterations": 1, "turns": turns})
    prompts = texts(run, "prompt_ids")
    assert len(prompts) == count == run.plan.iterations[0].rows
    assert sum(prompt.count("<|user|>") == 2 for prompt in prompts) == ROWS


def test_alpaca(tmp_path: Path) -> None:
    rows = [{"instruction": words(i), "input": "", "output": f"w{i + 20}"} for i in range(ROWS)]
    run, _, _ = load(tmp_path, datasets=[{**jsonl(tmp_path / "a.jsonl", rows), "type": "alpaca"}], chat_template=None)
    # the template's own English is unknown to the tiny tokenizer; the instruction's words stand in it
    prompts = [" ".join(token for token in prompt.split() if token[0] == "w") for prompt in texts(run, "prompt_ids")]
    found = set(zip(prompts, texts(run, "chosen_ids"), strict=True))
    assert found == {(words(i), f"w{i + 20} <|end|>") for i in range(ROWS)}


def test_input_output(tmp_path: Path) -> None:
    rows = [
        {"segments": [{"label": False, "text": words(i)}, {"label": True, "text": f"w{i + 20} <|end|>"}]}
        for i in range(ROWS)
    ]
    run, _, _ = load(
        tmp_path, datasets=[{**jsonl(tmp_path / "i.jsonl", rows), "type": "input_output"}], chat_template=None
    )
    pairs = set(zip(texts(run, "prompt_ids"), texts(run, "chosen_ids"), strict=True))
    assert pairs == {(words(i), f"w{i + 20} <|end|>") for i in range(ROWS)}


def test_user_defined(tmp_path: Path) -> None:
    rows = [{"q": words(i), "a": f"w{i + 20}"} for i in range(ROWS)]
    kind = {"field_instruction": "q", "field_output": "a", "format": "<|user|> {instruction} <|assistant|>",
            "no_input_format": "<|user|> {instruction} <|assistant|>"}  # fmt: skip
    run, _, _ = load(tmp_path, datasets=[{**jsonl(tmp_path / "u.jsonl", rows), "type": kind}], chat_template=None)
    found = set(zip(texts(run, "prompt_ids"), texts(run, "chosen_ids"), strict=True))
    prompts = {prompt.removeprefix("<s> ") for prompt, _ in found}
    assert prompts == {f"<|user|> {words(i)} <|assistant|>" for i in range(ROWS)}
    assert {answer for _, answer in found} == {f"w{i + 20} <|end|>" for i in range(ROWS)}


def test_several_datasets_one_already_tokenised_and_a_test_set(tmp_path: Path) -> None:
    """Already tokenised rows merge with others where they have the types that the host gives its own."""
    tokens = [
        {
            "input_ids": [0] * (i % 3) + [7, 8 + i, 9, 6],  # some are padded on the left
            "attention_mask": [0] * (i % 3) + [1] * 4,
            "labels": [-100] * (i % 3) + [-100, -100, 9, 6],
        }
        for i in range(ROWS)
    ]
    tiny.conversations(tmp_path / "chat.jsonl", ROWS)
    chat = {"path": str(tmp_path / "chat.jsonl"), "ds_type": "json", "type": "chat_template"}
    _, prepared, _ = load(tmp_path, datasets=[chat])
    kinds = Features({name: prepared.train_dataset.features[name] for name in tokens[0]})
    Dataset.from_list(tokens, features=kinds).to_parquet(tmp_path / "t.parquet")
    data = [chat, {"path": str(tmp_path / "t.parquet"), "ds_type": "parquet", "type": None}]
    run, meta, _ = load(tmp_path, datasets=data, test_datasets=[{**chat, "split": "train"}])
    assert len(run.prompts) == 2 * ROWS
    tokenised = [prompt for prompt in run.prompts["prompt_ids"][:] if prompt[0] in (0, 7)]
    assert sorted(tokenised) == [[7, 8 + i] for i in range(ROWS)]
    assert len(meta.eval_dataset) == ROWS


def test_authors_format_with_system_message_turns_and_empty_generated(tmp_path: Path) -> None:
    system, question = {"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}
    answer, again = {"role": "assistant", "content": "w4"}, {"role": "assistant", "content": "w5 w6"}
    rows = [
        {"real": [system, question, answer], "generated": [system, question, {"role": "assistant", "content": "w9"}]},
        {"real": [question, answer, question, again], "generated": []},
    ] * 4
    data = [{**jsonl(tmp_path / "r.jsonl", rows), "type": "axolotl_spin.uclaml"}]
    run, _, _ = load(tmp_path, datasets=data, spin={"iterations": 1})
    pairs = set(zip(texts(run, "prompt_ids"), texts(run, "chosen_ids"), strict=True))
    turn = "<|user|> w2 w3 <|end|> <|assistant|>"
    expected = {(f"{turn} w4 <|end|> {turn}", "w5 w6 <|end|>")}
    # the tiny tokenizer has no word for the system role's marker
    assert {p for p in pairs if "w5" in p[1]} == expected
    assert {answer for _, answer in pairs} == {"w4 <|end|>", "w5 w6 <|end|>"}
    rows[0]["generated"][1] = {"role": "user", "content": "w8"}
    bad = [{**jsonl(tmp_path / "bad.jsonl", rows), "type": "axolotl_spin.uclaml"}]
    with pytest.raises(Exception, match="another prompt"):
        load(tmp_path, datasets=bad)


def test_packing_and_held_out_rows_do_not_change_the_pairs(tmp_path: Path) -> None:
    plain, meta, _ = load(tmp_path, val_set_size=4)
    packed, packed_meta, cfg = load(tmp_path, val_set_size=4, sample_packing=True, attn_implementation="sdpa")
    assert packed.prompts["prompt_ids"][:] == plain.prompts["prompt_ids"][:]
    assert packed.prompts["chosen_ids"][:] == plain.prompts["chosen_ids"][:]
    assert packed.plan == plain.plan and len(plain.prompts) == 33
    assert len(meta.eval_dataset) == len(packed_meta.eval_dataset) == 4
    assert "AXOLOTL_IS_PREPROCESS" not in os.environ
    assert cfg.rl is None


def test_max_prompts(tmp_path: Path) -> None:
    run, _, _ = load(tmp_path, spin={"iterations": 1, "max_prompts": 5})
    assert len(run.prompts) == run.plan.iterations[0].rows == 5


def test_other_data_is_another_run(tmp_path: Path) -> None:
    """The hash of a run follows the tokens, the settings and the batch, and nothing else."""
    base = load(tmp_path)[0].identity.hash
    assert load(tmp_path)[0].identity.hash == base
    harmless = {"output_dir": str(tmp_path / "elsewhere"), "logging_steps": 9, "save_steps": 5}
    assert load(tmp_path, **harmless)[0].identity.hash == base
    for change in (
        {"spin": {"iterations": 3}},
        {"seed": 8},
        {"micro_batch_size": 1},
        {"learning_rate": 1e-4},
        {"val_set_size": 2},
        {"adam_beta2": 0.99},
    ):
        assert load(tmp_path, **change)[0].identity.hash != base, change


def test_only_the_run_in_the_folder_may_go_on(tmp_path: Path) -> None:
    run, _, _ = load(tmp_path)
    run.write_plan()
    load(tmp_path)
    with pytest.raises(ValueError, match=r"seed: 7 -> 8"):
        load(tmp_path, seed=8)


def test_what_lies_beyond_a_start_is_set_aside_not_deleted(tmp_path: Path) -> None:
    run, _, _ = load(tmp_path, spin={"iterations": 3})
    for iteration in range(3):
        run.directory.model(iteration).mkdir(parents=True)
        run.directory.metrics(iteration).write_text(str(iteration))
    for step in (10, 12):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir()
    write_json(run.directory.best, {"iterations": [{}, {}], "says": ["best: iteration 1"], "alone": 0})
    assert set_aside(run, run.plan.total_steps) == []
    moved = set_aside(run, 10)  # iteration 0's last step: iteration 1 starts
    assert [path.relative_to(run.directory.root).as_posix() for path in moved] == [
        "replaced-1/checkpoint-12",
        "replaced-1/iteration-2",
        "replaced-1/iteration-1/model",
        "replaced-1/best.json",  # it judges an iteration that is to come
    ]
    assert read_json(run.directory.best) == {"alone": 0}
    assert (moved[1] / "metrics.json").read_text() == "2"
    assert run.directory.model(0).exists() and run.directory.metrics(1).exists()
    assert (tmp_path / "out" / "checkpoint-10").exists()
    assert [path.name for path in set_aside(run, 0)] == ["checkpoint-10", "iteration-1", "model"]
    assert (run.directory.root / "replaced-2" / "iteration-0" / "model").exists()
