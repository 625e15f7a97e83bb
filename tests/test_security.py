"""A whole run over files that somebody else has made: nothing in them is executed, and nothing outside the run is touched.

What each room does with such files is tested in its own room; `docs/security.md` has the table.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import host
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from datasets import config as datasets_config
from jinja2.exceptions import SecurityError
from rows import load
from transformers import AutoModelForCausalLM
from warm import Warm

from axolotl_spin.data.initial_pairs import read_file
from axolotl_spin.disk.directory import RunDirectory

pytestmark = pytest.mark.host

# texts of the data, and, being tokens, of the answers too
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img/src=x/onerror=alert(1)>",
    "\x1b]0;owned\x07\x1b[2J",
    "{{''.__class__.__mro__[1].__subclasses__()}}",
    "{%include(config)%}",
    "../../../../victim/precious",
    "[/bold]",
    "\u202egnp.exe",
]


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


CODE = "from pathlib import Path\nPath({mark!r}).mkdir(exist_ok=True)\nclass Evil:\n    pass\n"


def hostile_model(folder: Path, marks: Path) -> Path:
    """A model folder that brings code for its config, model and tokenizer, and pickles beside its weights."""
    words = tiny.tokenizer([*tiny.WORDS, *HOSTILE])
    tiny.model(len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "evil.py").write_text(CODE.format(mark=str(marks / "code of the model")))
    for name, key in (("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
                      ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]})):  # fmt: skip
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": key}))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marks / name)))
    return folder


def hostile_data(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{HOSTILE[i % 8]} w{i}"},
                      {"role": "assistant", "content": f"w{i} {HOSTILE[(i + 3) % 8]}"}]} for i in range(16)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plant_pickles(directory: RunDirectory, marks: Path) -> None:
    """Puts a pickle wherever a run looks for a file of its own."""
    paths = [
        *(directory.plan, directory.about, directory.best, directory.log, directory.report, directory.lock),
        *(directory.start_evals, directory.heldout(None), directory.eval_rows(None), directory.staged(0)),
        *(directory.pairs(0), directory.metrics(0), directory.chunk(0, 0), directory.chunk(0, 1), directory.evals(0)),
        *(directory.heldout(0), directory.eval_rows(0)),
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(Bomb(marks / path.name)))


# where a run's own worker processes hand on what they made: the pickles that come through their pipes are its own
PIPES = {"queues.py:get", "connection.py:recv"}


def notes(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def touched(found: list[list[str]]) -> set[Path]:
    """Returns the files and folders that were written, made, renamed or removed."""
    kinds = ("open", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod",
             "shutil.rmtree")  # fmt: skip
    return {Path(path) for event, *paths in found if event in kinds for path in paths}


def check(found: list[list[str]], folder: Path) -> None:
    """Nothing was unpickled; of the test's folder no code was run, and nothing was touched but the run's own places.

    Args:
        found: What `watched` noted.
        folder: The test's.
    """
    assert any(event == "exec" for event, *_ in found), "nothing was watched"
    assert [note for note in found if note[0] == "pickle.find_class" and not PIPES & set(note)] == []
    assert [note for note in found if note[0] == "exec" and note[1].startswith(str(folder))] == []
    own = [folder / name for name in ("out", "prepared", "exported")]
    # of the host and its libraries: caches, and temporary files
    theirs = [Path(tempfile.gettempdir()), Path(datasets_config.HF_DATASETS_CACHE), Path(os.devnull)]
    for path in touched(found):
        within = own if path.is_relative_to(folder) else theirs
        allowed = any(path.is_relative_to(place) for place in within) or "__pycache__" in path.parts
        assert allowed, path


class Page(HTMLParser):
    """Counts what a page could run."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.handlers: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.handlers += [name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = str(dict(attrs)["content"])


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the run that is at the test's end what it was at its start."""
    made = tmp_path / "victim"
    made.mkdir()
    names = ("precious", ".hidden", "model.safetensors")
    for name in names:
        (made / name).write_text("precious")
    yield made
    assert {path.name: path.read_text() for path in made.iterdir()} == dict.fromkeys(names, "precious")


@pytest.mark.once
def test_a_run_over_hostile_files(tmp_path: Path, victim: Path, warm: Warm) -> None:
    """Refused with links in its folder; without them it is trained, resumed, shown and exported."""
    marks = tmp_path / "marks"  # where whatever is executed leaves a folder
    marks.mkdir()
    settings = host.config(
        tmp_path / "made",
        base_model=str(hostile_model(tmp_path / "model", marks)),
        datasets=[{"path": str(hostile_data(tmp_path / "data.jsonl")), "ds_type": "json", "type": "chat_template"}],
        output_dir=str(tmp_path / "out"),
        dataset_prepared_path=str(tmp_path / "prepared"),
        plugins=["watched.WatchPlugin", *host.OURS],
        val_set_size=4,
        spin={"iterations": 1, "eval_prompts": 4, "generation": {"max_new_tokens": 10, "batch_size": 4}},
    )
    directory = RunDirectory(tmp_path / "out")
    plant_pickles(directory, marks)
    shutil.rmtree(directory.iteration(1), ignore_errors=True)
    directory.iteration(1).symlink_to(victim)

    refused = host.train(settings, env={"SPIN_WATCH": str(tmp_path / "notes0")}, fails=True, by=warm)
    assert f"{directory.iteration(1)} is a link or a special file" in refused.output
    assert not host.loaded_a_model(refused.out)
    check(notes(tmp_path / "notes0"), tmp_path)

    directory.iteration(1).unlink()
    first = host.train(settings, env={"SPIN_WATCH": str(tmp_path / "notes1")}, by=warm)
    settings["spin"]["iterations"] = 2
    second = host.train(settings, env={"SPIN_WATCH": str(tmp_path / "notes2")}, by=warm)
    assert "plan.json is damaged" in first.output and "000000.parquet is damaged" in first.output
    assert "going on from" in second.output
    answers = " ".join(row["rejected"] for row in second.pairs(1).to_pylist())
    assert sum(text in answers for text in HOSTILE) >= 4, answers  # else nothing of what follows is shown of answers
    for name in ("notes1", "notes2"):
        check(notes(tmp_path / name), tmp_path)

    commands = (["table", str(second.out)], ["report", str(second.out)],
                ["export", str(second.out), "--iteration", "1", "--format", "dpo-text", "--inexact", "keep",
                 "--output", str(tmp_path / "exported" / "set")])  # fmt: skip
    outputs = [first.output, second.output]
    for number, command in enumerate(commands):
        env = host.environment(SPIN_WATCH=str(tmp_path / f"command{number}"))
        code, output = warm.run("watched", *command, env=env, cwd=tmp_path)
        assert code == 0, output[-3000:]
        check(notes(tmp_path / f"command{number}"), tmp_path)
        outputs.append(output)
    for output in outputs:
        assert not [text for text in ("\x1b]0;", "\x07", "\x1b[2J", "\u202e") if text in output]

    page = Page()
    page.feed(directory.report.read_text(encoding="utf-8"))
    assert page.scripts == 3 and not page.handlers  # the data, Plotly and our own
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")
    assert HOSTILE[1] in json.dumps(pq.read_table(tmp_path / "exported" / "set" / "train.parquet").to_pylist())
    assert list(marks.iterdir()) == []


def test_a_checkpoint_whose_optimizer_is_a_pickle_is_refused(tmp_path: Path, warm: Warm) -> None:
    """Its mark is forged to fit, which who writes a folder can do; the host reads it without unpickling."""
    settings = host.config(tmp_path / "made", rows=12, output_dir=str(tmp_path / "copy"), spin={"iterations": 1})
    settings["spin"]["generation"] = {"max_new_tokens": 6}
    run = host.train(settings, by=warm)
    [checkpoint] = run.out.glob("checkpoint-*")
    bomb = pickle.dumps(Bomb(tmp_path / "unpickled"))
    mark = json.loads((checkpoint / "spin.json").read_text())
    (checkpoint / "optimizer.pt").write_bytes(bomb)
    mark["files"] |= {"optimizer.pt": len(bomb)}
    (checkpoint / "spin.json").write_text(json.dumps(mark))
    settings["spin"]["iterations"] = 2
    again = host.train(settings, fails=True, by=warm)
    assert "going on from" in again.output and "Weights only load failed" in again.output
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("torch_zip", [False, True])
def test_weights_that_are_pickles_are_refused(torch_zip: bool, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    path = tmp_path / "model" / "pytorch_model.bin"
    if torch_zip:
        torch.save(Bomb(tmp_path / "unpickled"), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "unpickled").exists()


def test_a_chat_template_that_reaches_for_python_is_refused() -> None:
    words = tiny.tokenizer()
    words.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        words.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)


@pytest.mark.once
@pytest.mark.parametrize("model_id", [None, "me/model"])
def test_an_upload_of_the_data_is_said(model_id: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The host's upload takes all of `output_dir` but its checkpoints."""
    load(tmp_path, hub_model_id=model_id)
    assert ("the host uploads `output_dir` with its `spin` folder" in caplog.text) == bool(model_id)


@pytest.mark.once
def test_the_tests_that_the_page_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (host.ROOT / "docs" / "security.md").read_text())
    assert len(named) > 20
    assert [(file, name) for file, name in named if f"def {name}(" not in (host.ROOT / file).read_text()] == []


@pytest.mark.once
def test_what_a_whole_run_is_watched_for_is_seen(tmp_path: Path, victim: Path, warm: Warm) -> None:
    """The hook notes pickles, code and writes; with `trust_remote_code` the model's code does run."""
    marks = tmp_path / "marks"
    marks.mkdir()
    code = (
        f"import pickle, pathlib, runpy, watched\nwatched.watch(pathlib.Path({str(tmp_path / 'notes')!r}))\n"
        f"pickle.loads(pathlib.Path({str(tmp_path / 'model' / 'optimizer.pt')!r}).read_bytes())\n"
        "from transformers import AutoTokenizer\n"
        f"try:\n    AutoTokenizer.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "except Exception as error:\n    print(error)\n"
    )
    hostile_model(tmp_path / "model", marks)
    (tmp_path / "trusting.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), host.environment()["PYTHONPATH"]])
    env = host.environment(PYTHONPATH=path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    done, output = warm.run("trusting", env=env, cwd=tmp_path)
    assert done == 0, output
    found = notes(tmp_path / "notes")
    assert ["pickle.find_class", "posix", "mkdir"] in [note[:3] for note in found]
    assert marks / "optimizer.pt" in touched(found)
    assert {path.name for path in marks.iterdir()} == {"optimizer.pt", "code of the model"}, output


@pytest.mark.once
def test_a_pickle_in_the_schema_of_a_parquet_file_stays_one(tmp_path: Path) -> None:
    """Arrow had an extension type that unpickled what a file said; pairs that name it are data."""
    ids = pa.array([[4, 5]], type=pa.list_(pa.int32()))
    said = {b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(Bomb(tmp_path / "unpickled"))}  # fmt: skip
    fields = [pa.field(name, ids.type, metadata=said) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    schema = pa.schema([*fields, pa.field("finish_reason", pa.string())])
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table([ids, ids, pa.array([[4, 6]], type=ids.type), pa.array(["stop"])], schema=schema), path)
    given = read_file(path, str(path))
    given.check(vocabulary=10, sequence_len=8)
    assert given.rows == 1 and not (tmp_path / "unpickled").exists()
    columns = pa.table({"\x1b[2Jprompt": [1]})
    pq.write_table(columns, path)
    with pytest.raises(ValueError, match=r"it has \\x1b\[2Jprompt"):
        read_file(path, str(path))
