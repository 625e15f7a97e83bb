"""`axolotl spin export`: what is written loads again, here and in the host's DPO, to the pair's very tokens."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures
import host
import played
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from click.testing import CliRunner, Result
from datasets import load_dataset
from recovery import settings_in
from rows import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from warm import Warm

from axolotl_spin.cli import spin
from axolotl_spin.commands.export.template import Answered, TemplateReader
from axolotl_spin.data.pairs import SCHEMA, write_pairs
from axolotl_spin.disk.directory import RunDirectory

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
WITH_SYSTEM = tiny.tokenizer([*tiny.WORDS, "<|system|>"])


def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML, in which a text has one tokenization and many spellings in tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello there, hello world, who is there?", "system user assistant"] * 5, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = CHATML
    return made


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(
    tokenizer: Any, turns: list[dict], chosen: str, rejected: str | list[int], cut: bool = False
) -> dict[str, Any]:
    """Makes a pair by the tokenizer's chat template, as training data and a sample are made."""
    template = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    end = tokenizer.eos_token

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return {
        "prompt_ids": ids(template),
        "chosen_ids": ids(chosen + end),
        "rejected_ids": rejected if isinstance(rejected, list) else ids(rejected + ("" if cut else end)),
        "finish_reason": "length" if cut else "stop",
    }


def run_with(folder: Path, tokenizer: Any, pairs: list[dict[str, Any]], iteration: int = 0) -> Path:
    """Makes what a run leaves of an iteration: its pairs, and the tokenizer that the host saves first."""
    out = folder / "out"
    rows = []
    for index, made in enumerate(pairs):
        texts = {name: tokenizer.decode(made[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
        logps = {"opponent_chosen_logp": -1.0 - index, "opponent_rejected_logp": -2.0}
        rows.append({"generated_in": iteration, "row": index, **texts, **logps, **made})
    write_pairs(RunDirectory(out).pairs(iteration), [pa.RecordBatch.from_pylist(rows, schema=SCHEMA)], "mark")
    tokenizer.save_pretrained(out)
    return out


def export(out: Path, kind: str, output: Path, *options: str, iteration: int = 0) -> Result:
    arguments = ["export", str(out), "--iteration", str(iteration), "--format", kind, "--output", str(output), *options]
    return CliRunner().invoke(spin, arguments)


def refused(result: Result) -> str:
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    return result.output


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def imported(folder: Path, source: Path, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Reads an exported set back through `spin.initial_pairs` and the host's config."""
    if tokenizer is not None:
        tiny.model(len(tokenizer)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [{"messages": [say("user", "hello"), say("assistant", "there")]}] * 4
        pq.write_table(pa.Table.from_pylist(rows), folder / "messages.parquet")
        data = [{"path": str(folder / "messages.parquet"), "ds_type": "parquet", "type": "chat_template"}]
        changes: dict[str, Any] = {"datasets": data, "base_model": str(folder / "model"), "sequence_len": 200}
    else:
        changes = {"sequence_len": 200}
    run, _, _ = load(folder, spin={"iterations": 1, "initial_pairs": str(source)}, **changes)
    return pa.Table.from_batches(run.given.staged()).select([*IDS, "finish_reason"]).to_pylist()


SYSTEM, ASK = say("system", "w1"), say("user", "w2 w3")
TURNS = [ASK, say("assistant", "w9"), say("user", "w4")]
# a system message, several turns, an answer that is empty, one that was cut
PAIRS = [
    pair(WITH_SYSTEM, [SYSTEM, ASK], "w5 w6", "w7"),
    pair(WITH_SYSTEM, [SYSTEM, *TURNS], "w5", "w7 w8"),
    pair(WITH_SYSTEM, TURNS, "w6", ""),
    pair(WITH_SYSTEM, [ASK], "w5", "w7 w8 w9", cut=True),
]


@pytest.mark.parametrize("kind", ["uclaml", "parquet"])
def test_export_and_import_give_the_same_pairs(kind: str, tmp_path: Path) -> None:
    out = run_with(tmp_path, WITH_SYSTEM, PAIRS)
    text = done(export(out, kind, tmp_path / "set"))
    assert "4 pairs of iteration 0" in text and f"initial_pairs: {tmp_path / 'set'}" in text
    assert imported(tmp_path, tmp_path / "set", WITH_SYSTEM) == PAIRS
    rows = load_dataset(str(tmp_path / "set"), split="train")
    if kind == "parquet":
        assert rows.column_names == SCHEMA.names and rows["opponent_chosen_logp"][:] == [-1.0, -2.0, -3.0, -4.0]
    else:
        assert rows[1]["real"] == [SYSTEM, *TURNS, say("assistant", "w5")]
        assert [row["generated"][-1]["content"] for row in rows] == ["w7", "w7 w8", "", "w7 w8 w9"]


def test_the_authors_format_is_training_data_too(tmp_path: Path) -> None:
    out = run_with(tmp_path, tiny.tokenizer(), [pair(tiny.tokenizer(), TURNS, f"w{i}", "w7") for i in range(6)])
    done(export(out, "uclaml", tmp_path / "set", "--test-rows", "2"))
    data = [{"path": str(tmp_path / "set"), "split": "train", "type": "axolotl_spin.uclaml"}]
    run, _, _ = load(tmp_path, datasets=data, spin={"iterations": 1})
    found = sorted((row["prompt_ids"], row["chosen_ids"]) for row in run.prompts)
    exported = pq.read_table(out / "spin" / "iteration-0" / "pairs.parquet").to_pylist()
    assert found == sorted((row["prompt_ids"], row["chosen_ids"]) for row in exported[:4])
    assert [len(load_dataset(str(tmp_path / "set"), split=split)) for split in ("train", "test")] == [4, 2]


HELLO = [say("system", "hello world"), say("user", " who is there?\n"), say("assistant", "hello"), say("user", "who?")]


@pytest.mark.once
def test_messages_are_found_again_with_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """White space around what is said is part of it; an answer that the text does not give again is refused by name."""
    tokenizer = bpe()
    exact = [
        pair(tokenizer, HELLO, "hello there ", " world\n"),
        pair(tokenizer, HELLO[1:2], "hello", "there, hello", cut=True),
    ]
    out = run_with(tmp_path, tokenizer, exact)
    done(export(out, "uclaml", tmp_path / "set"))
    assert imported(tmp_path, tmp_path / "set", tokenizer) == exact
    assert load_dataset(str(tmp_path / "set"), split="train")[0]["real"][:-1] == HELLO

    spelt = tokenizer.convert_tokens_to_ids([*"hello", "<|im_end|>"])
    assert spelt != exact[0]["chosen_ids"] and tokenizer.decode(spelt) == "hello<|im_end|>"
    other_end = tokenizer("there<|endoftext|>", add_special_tokens=False)["input_ids"]
    strange = pair(tokenizer, HELLO, "hello", "there")
    strange["prompt_ids"] = strange["prompt_ids"][3:]  # not the template's
    pairs = [*exact, pair(tokenizer, HELLO, "hello", spelt), pair(tokenizer, HELLO, "hello", other_end), strange]
    (tmp_path / "more").mkdir()
    out = run_with(tmp_path / "more", tokenizer, pairs)
    text = refused(export(out, "uclaml", tmp_path / "all"))
    assert "3 of 5 pairs cannot be kept token for token by --format uclaml (the first is row 2)" in text
    assert "  2: text that gives other tokens" in text and "  1: no messages give the prompt" in text
    assert not (tmp_path / "all").exists() and not list(tmp_path.glob(".all*"))
    assert "1 pairs cannot be written at all" in refused(export(out, "uclaml", tmp_path / "all", "--inexact", "keep"))
    assert "3 pairs are left out" in done(export(out, "uclaml", tmp_path / "all", "--inexact", "drop"))
    assert imported(tmp_path, tmp_path / "all", tokenizer) == exact
    done(export(out, "parquet", tmp_path / "ids"))
    assert imported(tmp_path, tmp_path / "ids", tokenizer) == pairs


def host_dpo(folder: Path, source: Path, **dataset: Any) -> list[dict[str, Any]]:
    """Loads a set by the host's `rl: dpo`."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets

    settings = {
        **host.config(folder), "rl": "dpo", "sequence_len": 200, "remove_unused_columns": False,
        "datasets": [{"path": str(source), "split": "train", **dataset}],
    }  # fmt: skip
    del settings["spin"]
    (folder / "dpo.yml").write_text(yaml.safe_dump(settings))
    cfg = load_cfg(str(folder / "dpo.yml"))
    return load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset.to_list()


@pytest.mark.parametrize(
    ("kind", "dataset"), [("dpo", {"type": "chat_template.default", "field_messages": "prompt"}), ("dpo-text", {})]
)
def test_the_hosts_dpo_loads_the_same_tokens(kind: str, dataset: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    pairs = [pair(tokenizer, TURNS if i % 2 else [ASK], f"w{i}", f"w{i + 9} w7") for i in range(6)]
    out = run_with(tmp_path, tokenizer, [*pairs, pair(tokenizer, [ASK], "w1", "w2", cut=True)])
    text = refused(export(out, kind, tmp_path / "set"))
    assert "1 of 7 pairs" in text and "  1: the opponent's answer was cut" in text
    done(export(out, kind, tmp_path / "set", "--inexact", "drop"))
    rows = host_dpo(tmp_path, tmp_path / "set", **dataset)
    found = [{f"{name}_ids": tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "chosen",
             "rejected")} for row in rows]  # fmt: skip
    assert sorted(map(str, found)) == sorted(str({name: made[name] for name in IDS}) for made in pairs)
    done(export(out, kind, tmp_path / "kept", "--inexact", "keep"))
    assert len(host_dpo(tmp_path, tmp_path / "kept", **dataset)) == 7


def test_an_empty_answer_is_not_left_to_dpo_readers(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    out = run_with(tmp_path, tokenizer, [pair(tokenizer, [ASK], "w1", "")])
    assert "  1: the opponent's answer is empty" in refused(export(out, "dpo", tmp_path / "set"))
    done(export(out, "dpo-text", tmp_path / "set"))
    assert load_dataset(str(tmp_path / "set"), split="train")[0]["rejected"] == " <|end|>"


def test_pairs_kept_from_earlier_iterations_are_no_test_split(tmp_path: Path) -> None:
    """They are the last in the file, and their prompts are among the new ones."""
    tokenizer = tiny.tokenizer()
    new = [pair(tokenizer, [ASK], f"w{index}", "w9") for index in range(3)]
    out = run_with(tmp_path, tokenizer, [*new, *({**made, "generated_in": 0} for made in new)], iteration=1)
    options = ("--test-rows", "1")
    said = refused(export(out, "dpo", tmp_path / "set", *options, iteration=1))
    assert "the last 3 pairs" in said and "add --only-new" in said
    done(export(out, "dpo", tmp_path / "set", *options, "--only-new", iteration=1))
    rows = [load_dataset(str(tmp_path / "set"), split=split)["prompt"] for split in ("train", "test")]
    assert [len(found) for found in rows] == [2, 1]
    done(export(out, "dpo", tmp_path / "all", iteration=1))


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    out = run_with(tmp_path, tokenizer, [pair(tokenizer, [ASK], "w1", "w2")], iteration=1)
    assert "--iteration can be 1" in refused(export(out, "parquet", tmp_path / "set"))
    assert "nor pairs of another iteration" in refused(export(tmp_path, "parquet", tmp_path / "set"))
    assert "name a new folder" in refused(export(out, "parquet", out, iteration=1))
    assert "a single file" in refused(export(out, "parquet", tmp_path / "set", "--test-rows", "1", iteration=1))
    assert "leaves none to train on" in refused(export(out, "dpo", tmp_path / "set", "--test-rows", "1", iteration=1))
    (out / "tokenizer.json").unlink()
    (out / "tokenizer_config.json").unlink()
    assert "name the model's with --tokenizer" in refused(export(out, "dpo", tmp_path / "set", iteration=1))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    options = ("--tokenizer", str(tmp_path / "plain"))
    assert "has no chat template" in refused(export(out, "dpo", tmp_path / "set", *options, iteration=1))
    done(export(out, "dpo-text", tmp_path / "set", *options, iteration=1))
    pairs = RunDirectory(out).pairs(1)
    pairs.write_bytes(pairs.read_bytes()[:-9])
    refused(export(out, "parquet", tmp_path / "other", iteration=1))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_a_tokenizer_brings_runs_where_it_is_trusted(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    tokenizer, mark = tiny.tokenizer(), tmp_path / "executed"
    out = run_with(tmp_path, tokenizer, [pair(tokenizer, [ASK], "w1", "w2")])
    code = f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import PreTrainedTokenizerFast\n"
    (out / "evil.py").write_text(f"{code}class Evil(PreTrainedTokenizerFast):\n    pass\n")
    path = out / "tokenizer_config.json"
    changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    ended = export(out, "dpo-text", tmp_path / "set", *(["--trust-remote-code"] if trusted else []))
    if trusted:
        done(ended)
    else:
        assert "is code that it brings along: look at it, and if you trust it add --trust-remote-code" in refused(ended)
    assert mark.exists() == trusted


@pytest.mark.parametrize("template", ["chatml", "llama3", "phi_3", "qwen_25", "gemma"])
def test_templates_of_the_host_are_read_backwards(template: str) -> None:
    """With and without a system message where the template takes one."""
    from axolotl.utils.chat_templates import get_chat_template

    tokenizer = bpe()
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    tokenizer.chat_template = get_chat_template(template)
    reader = TemplateReader(tokenizer)
    for turns in (HELLO[1:], HELLO) if template != "gemma" else (HELLO[1:],):
        answered = [*turns, say("assistant", "hello world")]
        text = tokenizer.apply_chat_template(answered, tokenize=False)
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        [read] = reader.read([Answered(whole[:start], whole[start:])])
        again = tokenizer.apply_chat_template(read, tokenize=False)
        assert again == text and [turn["role"] for turn in read] == [turn["role"] for turn in answered]


@pytest.mark.once
@pytest.mark.host
def test_a_killed_runs_iterations_can_be_exported(warm: Warm, shared: Path, tmp_path: Path) -> None:
    settings_in(tmp_path, shared)
    env = host.environment(ACCELERATE_USE_CPU="true", SPIN_KILL="iteration 1/first epoch")
    code, output = warm.run("axolotl.cli.train", "run.yml", env=env, cwd=tmp_path)
    assert code != 0 and "killed at" in output
    made = host.Run(0, "", tmp_path / "out").pairs(1).to_pylist()
    done(export(tmp_path / "out", "parquet", tmp_path / "all", iteration=1))
    done(export(tmp_path / "out", "parquet", tmp_path / "new", "--only-new", iteration=1))
    assert pq.read_table(tmp_path / "all").to_pylist() == made
    new = pq.read_table(tmp_path / "new").to_pylist()
    assert new == [row for row in made if row["generated_in"] == 1] and len(new) == 16
    text = done(export(tmp_path / "out", "uclaml", tmp_path / "real", "--inexact", "drop", iteration=1))
    exact = load_dataset(str(tmp_path / "real"), split="train")
    assert f"{len(exact)} pairs of iteration 1" in text and len(exact) > 16


@pytest.mark.once
@pytest.mark.host
def test_a_run_of_a_model_that_takes_images_too(tmp_path: Path, warm: Warm) -> None:
    """Its folder has a processor beside the tokenizer; every format gives the pairs' tokens back to its reader."""
    architectures.save("gemma3", tmp_path / "model")
    tiny.conversations(tmp_path / "data.jsonl", 12)
    run = host.train(played.settings_of(tmp_path), by=warm)
    made = run.pairs(1).select([*IDS, "finish_reason"]).to_pylist()
    assert {row["finish_reason"] for row in made} == {"stop", "length"}
    done(export(run.out, "parquet", tmp_path / "parquet", iteration=1))
    done(export(run.out, "uclaml", tmp_path / "uclaml", iteration=1))
    (tmp_path / "back").mkdir()
    for kind in ("parquet", "uclaml"):
        assert imported(tmp_path / "back", tmp_path / kind, tiny.tokenizer()) == made
    ended = [{name: row[name] for name in IDS} for row in made if row["finish_reason"] == "stop"]
    for kind in ("dpo", "dpo-text"):
        done(export(run.out, kind, tmp_path / kind, "--inexact", "drop", iteration=1))
        rows = load_dataset(str(tmp_path / kind), split="train").to_list()
        assert [trl_reads(tiny.tokenizer(), row) for row in rows] == ended


# -- as the reader reads ----------------------------------------------------------------------------------------------


def trl_reads(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """Has TRL's DPO prepare a row of text."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer, trainer._is_vision_dataset = tokenizer, False
    settings = DPOConfig(use_cpu=True, bf16=False, max_length=None, report_to=[])
    made = trainer._prepare_dataset(Dataset.from_list([row]), tokenizer, settings, "train")
    return {name: made[0][name] for name in IDS}


def with_begin(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Has a tokenizer set a begin token before each text."""
    from tokenizers.processors import TemplateProcessing

    begin = "<|endoftext|>"
    post = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.bos_token = begin
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    return tokenizer


@pytest.mark.parametrize("begins", [False, True])
def test_what_is_called_exact_is_read_so_by_trl(begins: bool, tmp_path: Path) -> None:
    """Rows whose tokens reach over the border between prompt and answer, and prompts that begin with a begin token."""
    tokenizer = with_begin(bpe()) if begins else bpe()
    ask = say("user", "who is there?")
    sound = [pair(tokenizer, [ask], f"hello{'o' * i}", "world there") for i in range(4)]
    over = pair(tokenizer, [ask], "hello", "world")
    # the prompt ends in the midst of a word: its last token and the answer's first are one to a reader
    over["prompt_ids"] = [*over["prompt_ids"], *tokenizer("he", add_special_tokens=False)["input_ids"]]
    over["chosen_ids"] = tokenizer("llo<|im_end|>", add_special_tokens=False)["input_ids"]
    out = run_with(tmp_path, tokenizer, [*sound, over])
    assert "1 of 5 pairs cannot be kept" in refused(export(out, "dpo-text", tmp_path / "all"))
    done(export(out, "dpo-text", tmp_path / "set", "--inexact", "drop"))
    rows = load_dataset(str(tmp_path / "set"), split="train").to_list()
    assert [trl_reads(tokenizer, row) for row in rows] == [{name: made[name] for name in IDS} for made in sound]


def test_what_is_called_exact_is_read_so_by_the_hosts_dpo(tmp_path: Path) -> None:
    """Hosts before 0.21 look for the answer's words in a rendered turn, and find those of `user` in the template."""
    tokenizer = bpe()
    answers = ["hello", "user", "world"]
    out = run_with(tmp_path, tokenizer, [pair(tokenizer, [say("user", "who?")], answer, "there") for answer in answers])
    if version("axolotl").startswith(("0.19", "0.20")):
        assert "1 of 3 pairs" in refused(export(out, "dpo", tmp_path / "all"))
        answers.remove("user")
    else:
        done(export(out, "dpo", tmp_path / "all"))
    done(export(out, "dpo", tmp_path / "set", "--inexact", "drop"))
    rows = load_dataset(str(tmp_path / "set"), split="train").to_list()
    assert [row["chosen"][0]["content"] for row in rows] == answers


def test_a_begin_token_that_readers_add_again(tmp_path: Path) -> None:
    tokenizer = with_begin(bpe())
    out = run_with(tmp_path, tokenizer, [pair(tokenizer, [say("user", "who?")], "hello", "there")] * 3)
    assert "3 of 3 pairs" in refused(export(out, "dpo", tmp_path / "set"))
