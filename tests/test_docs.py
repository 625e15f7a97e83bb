"""The documentation holds: commands, YAML, links, keys, metrics, paths and generated tables of every page.

What a page sets as code and is none of these is not looked at.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import host
import pytest
import yaml
from documents import (
    GENERATED,
    PAGES,
    ROOT,
    Block,
    blocks,
    codes,
    commands,
    heads,
    markers,
    prose,
    spin_keys,
    with_table,
)
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from test_house import ORDER, PACKAGE

TOPICS = "configuration tuning clusters security objectives evaluation results monitoring resume vllm data models"
TOPICS += " from-uclaml how-it-works faq known-limitations"
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# -- what is there, and how long ---------------------------------------------------------------------------------------


@pytest.mark.once
def test_there_is_a_page_for_every_topic_and_the_readme_names_them() -> None:
    assert {page.stem for page in PAGES} == {"README", "CONTRIBUTING", "AGENTS", *TOPICS.split()}
    linked = re.findall(r"^\| \[([\w-]+)\]\(docs/([\w-]+)\.md\)", prose(PAGES[0]), flags=re.MULTILINE)
    assert linked == [(topic, topic) for topic in TOPICS.split()]


@pytest.mark.once
def test_the_readme_is_one_screen_and_a_map() -> None:
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 100] == []
    assert len(re.findall(r"^!\[", PAGES[0].read_text(), flags=re.MULTILINE)) == 1


@pytest.mark.once
@BY_NAME
def test_prose_is_wrapped(page: Path) -> None:
    assert [line for line in prose(page).splitlines() if len(line) > 100 and not line.startswith("|")] == []


@pytest.mark.once
@pytest.mark.parametrize("name", GENERATED)
def test_generated_table_is_what_the_code_says(name: str) -> None:
    text = (ROOT / GENERATED[name][0]).read_text()
    assert text == with_table(text, name), "run `make docs`"


@pytest.mark.once
def test_generated_tables_say_something() -> None:
    from axolotl_spin.monitor.metrics import METRICS

    text = "".join((ROOT / page).read_text() for page, _ in GENERATED.values())
    for row in (
        "| `iterations` | `3` | Self-play",
        "| `generation.vllm.offload` | `false` | Move",
        "| `ranks` | drives",
    ):
        assert f"\n{row}" in text
    for row in (
        "| `loss_first` | mean loss per pair of the first step | loss first | |",
        "| `disk/` | Files that appear",
    ):
        assert f"\n{row}" in text
    assert all(f"\n| `{metric.name}` | " in text for metric in METRICS)


@pytest.mark.once
def test_the_order_of_rooms_in_the_text_is_the_one_that_is_held() -> None:
    [block] = blocks(ROOT / "AGENTS.md", "python")
    found: dict[str, Any] = {}
    exec(block.text, found)
    assert found["ORDER"] == ORDER


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_readme_and_metadata_name_python_and_host_versions() -> None:
    """`pip show -v` prints summary and classifiers."""
    bounds = next(Requirement(text).specifier for text in PROJECT["dependencies"] if text.startswith("axolotl"))
    pinned = {path.stem.split("-")[1] for path in (ROOT / "tests" / "hosts").glob("axolotl-*.txt")}
    assert pinned and all(version in bounds for version in pinned)
    for text in (PAGES[0].read_text(), PROJECT["description"], (ROOT / "docs" / "faq.md").read_text()):
        minors = {f"0.{minor}" for minor in range(30) if f"0.{minor}.0" in bounds}
        assert set(re.findall(r"\b0\.(?:19|2\d)\b", text)) >= minors == {"0.19", "0.20", "0.21"}
        assert {"3.11", "3.12"} <= set(re.findall(r"\b3\.\d\d\b", text))
    pythons = {name.rsplit(" :: ", 1)[1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.", name)}
    assert pythons == {"3.11", "3.12"}
    assert all(Version(python) in SpecifierSet(PROJECT["requires-python"]) for python in pythons)
    assert Version("3.10") not in SpecifierSet(PROJECT["requires-python"])


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader is who has what the pages' commands name."""
    (tmp_path / "spin.yml").touch()
    for name in ("OUTPUT_DIR", "RUN_A", "RUN_B"):
        (tmp_path / name).mkdir()
    for name in ("example_configs", "tests", ".ci"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_click(command: click.Command, arguments: Sequence[str], whole: bool) -> None:
    """Parses arguments as the command would.

    Args:
        command: A click command or group.
        arguments: What stands behind it.
        whole: Nothing may be missing.
    """
    given = [argument for argument in arguments if argument != "--help"]
    while isinstance(command, click.Group):
        if not given:
            return
        name, *given = given
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{command.name} has no command {name}"
        command = found
    try:
        context = command.make_context(command.name, list(given))
    except click.MissingParameter:
        assert not whole, f"{command.name} lacks an argument"
    else:
        assert [argument for argument in context.args if argument.startswith("-")] == [], command.name


def check_module(name: str, arguments: Sequence[str], whole: bool) -> None:
    """Checks what stands behind `python -m`."""
    assert find_spec(name), name
    if name == "axolotl_spin":
        from axolotl_spin.cli import spin

        check_click(spin, arguments, whole)
    elif name == "axolotl.cli.train":
        assert len(arguments) == 1 and Path(arguments[0]).exists(), arguments
    elif name == "pytest":
        check_pytest(arguments)
    else:
        assert name == "venv" and len(arguments) == 1, (name, arguments)


def check_pytest(arguments: Sequence[str]) -> None:
    given = iter(arguments)
    for argument in given:
        if argument == "-m":
            words = set(re.findall(r"\w+", next(given))) - {"not", "and", "or"}
            assert words <= set(markers()), words
        elif argument == "-k":
            next(given)
        else:
            assert Path(argument).exists(), argument


def check_pip(arguments: Sequence[str]) -> None:
    """Installs from this checkout, what one of its extras asks for, or vLLM's plugin, which no environment here has."""
    assert arguments[0] == "install"
    extras = {Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts}
    for argument in arguments[1:]:
        if argument not in ("-e", ".", "--no-deps", f"./{PROJECT['name']}", "vllm-bnb-plugin"):
            assert Requirement(argument) in extras, argument


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, given, _ = argument.partition("=")
        pattern = rf"\b{name} \?=|\(?\bor \$\({name}\)" if given else rf"^{name}:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), argument


def check_command(line: str, whole: bool = True) -> str:
    """Checks that a command exists and takes what it is given.

    Args:
        line: As a page has it.
        whole: It could be run; in a sentence, arguments may be missing.

    Returns:
        The program's name.
    """
    if inner := re.fullmatch(r"\w+=\$\((.+)\)|for \w+ in [\w ]+; do (.+)", line):
        return check_command(inner[1] or inner[2])
    words = [word for word in shlex.split(re.sub(r"^([A-Z_]+=\w+ )+", "", line)) if word != "..."]
    program, arguments = Path(words[0]).name, words[1:]
    if program == "axolotl":
        from axolotl.cli.main import cli

        from axolotl_spin.cli import spin

        ours = arguments[0] == "spin" and cli.get_command(click.Context(cli), "spin") is not None
        check_click(spin if ours else cli, arguments[1:] if ours else arguments, whole)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments[:1] in ([], ["launch"]), line
        if arguments[1:]:
            parsed = launch_command_parser().parse_args(arguments[1:])
            assert parsed.module
            check_module(parsed.training_script, parsed.training_script_args, whole)
    elif program == "torchrun":
        from torch.distributed.run import parse_args

        parsed = parse_args(arguments)
        assert parsed.module
        check_module(parsed.training_script, parsed.training_script_args, whole)
    elif program in ("python", "python3"):
        if arguments[:1] == ["-m"]:
            check_module(arguments[1], arguments[2:], whole)
        else:  # DeepSpeed writes the one beside its checkpoints
            assert Path(arguments[0]).is_file() or arguments[0] == "zero_to_fp32.py", line
    elif program == "bash":
        assert Path(arguments[0]).is_file(), line
    elif program == "sbatch":
        assert all(Path(argument).is_file() for argument in arguments), line
    elif program == "pip":
        check_pip(arguments)
    else:
        assert program == "make", f"no test knows `{line}`"
        check_make(arguments)
    return program


def test_commands_parse(folder: Path) -> None:
    """Every line of every bash block."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in commands(block)]
    programs = {check_command(line) for line in lines if line != "break; done"}
    assert programs == {"axolotl", "accelerate", "torchrun", "python", "python3", "bash", "sbatch", "pip", "make"}
    for part in (
        "--num_machines",
        "axolotl train spin.yml",
        "axolotl spin plan",
        "make test",
        "spin generate spin.yml",
    ):
        assert any(part in line for line in lines), part


def test_commands_in_sentences_parse(folder: Path) -> None:
    found = [
        code
        for page in PAGES
        for code in codes(page)
        if re.match(r"(axolotl|make|accelerate|python|bash|pip) [\w.-]", code)
    ]
    assert len(found) > 20
    for code in found:
        check_command(code, whole=False)


@pytest.mark.parametrize(
    "line",
    [
        "axolotl spin plan spin.yml --rank 8",
        "axolotl spin tables OUTPUT_DIR",
        "axolotl trains spin.yml",
        "axolotl spin export OUTPUT_DIR --iteration 0 --format dpo_text --output DIR",
        "axolotl spin export OUTPUT_DIR --iteration 0 --output DIR",
        "axolotl merge-lora spin.yml --no-such-key=1",
        "accelerate launch --num_machine_s 2 -m axolotl.cli.train spin.yml",
        "accelerate launch -m axolotl.cli.trains spin.yml",
        "torchrun --max-restart-s 3 -m axolotl.cli.train spin.yml",
        "for try in 1 2; do axolotl trains spin.yml",
        "make tests",
        "make bench BENCHES=--quick",
        "pip install 'vllm>=0.28'",
        "python example_configs/quickstart/prepares.py",
        "python -m pytest -m rank",
        "sbatch example_configs/slurm/spin.sbatch example_configs/llama-7b-zero3.yml",
        "cat spin.yml",
    ],
)
def test_a_command_that_is_not_there_is_found(line: str, folder: Path) -> None:
    with pytest.raises((AssertionError, click.ClickException, SystemExit, ModuleNotFoundError)):
        check_command(line)


@pytest.mark.once
@BY_NAME
def test_options_in_sentences_exist(page: Path) -> None:
    """`--option` or `--option value` alone is one of `axolotl spin ...`."""
    from axolotl_spin.cli import spin

    options = {name: option for command in spin.commands.values() for option in command.params for name in option.opts}
    for code in _without_foreign(page):
        if code.startswith("--"):
            name, _, value = code.partition(" ")
            assert name in options, code
            kind = options[name].type
            assert not value or not isinstance(kind, click.Choice) or value in kind.choices, code


def _without_foreign(page: Path) -> list[str]:
    """Returns a page's code, but for names of others' programs in the first column of the page that compares with them."""
    text = prose(page)
    if page.stem == "from-uclaml":
        text = re.sub(r"^\|.*? \| ", "| ", text, flags=re.MULTILINE)
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", text)]


# -- YAML and keys -----------------------------------------------------------------------------------------------------

ALL_YAML = [block for page in PAGES for block in blocks(page, "yaml")]
TASKS = [block for block in ALL_YAML if "task" in yaml.safe_load(block.text)]  # of lm-eval
YAML_BLOCKS = [block for block in ALL_YAML if block not in TASKS]
BASE = {
    "base_model": "x/y",
    "datasets": [{"path": "d", "type": "chat_template"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-6,
    "rl": "spin",
    "plugins": ["axolotl_spin.SpinPlugin"],
}


def host_keys() -> set[str]:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    return {*AxolotlInputConfig.model_fields, "spin"}


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=lambda block: block.page.stem)
def test_yaml_passes_the_hosts_validation(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """As part of a config; and the host, which drops what it does not know, knows each key."""
    from axolotl_spin.args import spin_config

    settings = yaml.safe_load(block.text)
    assert set(settings) <= host_keys()
    assert spin_config(host.validate(yaml.safe_dump({**BASE, **settings}), monkeypatch)).active


@pytest.mark.once
@pytest.mark.parametrize("block", TASKS, ids=lambda block: block.page.stem)
def test_a_task_of_lm_eval_loads(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name that the page gives its file, over rows with the columns that it asks for."""
    from axolotl_spin.evals.tasks import asked_benchmarks

    monkeypatch.chdir(tmp_path)
    path = Path(block.text.splitlines()[0].removeprefix("# "))
    task = yaml.safe_load(block.text)
    path.parent.mkdir()
    path.write_text(block.text)
    Path(task["dataset_kwargs"]["data_files"]["test"]).write_text('{"question": "France?", "answer": "Paris"}\n')
    found = asked_benchmarks([str(path)], limit=None, chat_template=False, unsafe_code=False).load()
    assert found.wanted() == {task["task"]: 1}
    [(_, loaded)] = found.leaves()
    assert (loaded.doc_to_text(loaded.eval_docs[0]), loaded.doc_to_target(loaded.eval_docs[0])) == ("France?", "Paris")
    asked = [yaml.safe_load(other.text).get("spin", {}).get("eval_tasks", []) for other in YAML_BLOCKS]
    assert [str(path)] in asked


@pytest.mark.once
def test_there_is_yaml_to_validate() -> None:
    assert {"evaluation"} == {block.page.stem for block in TASKS}
    assert {"README", "configuration", "vllm", "data"} <= {block.page.stem for block in YAML_BLOCKS}
    known = {"bash", "yaml", "text", "python", "bibtex"}
    assert {block.language for page in PAGES for block in blocks(page)} == known


def check_spin_key(name: str) -> None:
    """Checks a key that is written with its path, from `spin.`, `generation.` or `vllm.` on."""
    path = name.removeprefix("spin.")
    path = f"generation.{path}" if path.startswith("vllm.") else path
    assert path in spin_keys() or any(key.startswith(f"{path}.") for key in spin_keys()), f"`{name}` is no key"


# names that others than the host, this package and their hooks give
OTHER_NAMES = {
    # of DeepSpeed's config, of FSDP's
    *("gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save", "forward_prefetch"),
    "reshard_after_forward",
    "max_gen_toks",  # of lm-eval's tasks
    *("field_chosen", "chat_template", "input_output", "tokenizer_default"),
    *("max_num_seqs", "hf_overrides"),  # of vLLM's engine
    "nvfp4_merge_aware",  # of one of the host's plugins
    # of a model's config, of libraries' optimizers
    *("generation_config", "output_router_logits", "optimi_adamw", "flash_adamw", "adamw_torch_8bit"),
    *("adamw_torch_fused", "adamw_apex_fused"),
    "bf16_stochastic_round",
    "attention_mask",  # of rows that come tokenised
    *("total_num_steps", "device_map", "convert_data", "run_spin", "dataset_mixer", "uclaml"),
}


def known_names() -> set[str]:
    """Returns every name with an underscore that a page may set as code."""
    from axolotl.integrations.base import BasePlugin
    from axolotl.integrations.swanlab.args import SwanLabConfig
    from axolotl.utils.schemas.datasets import SFTDataset
    from transformers import Trainer

    from axolotl_spin.data import pairs
    from axolotl_spin.game import heldout_play
    from axolotl_spin.monitor.metrics import METRICS
    from axolotl_spin.refusals import REFUSED
    from axolotl_spin.run import selected
    from axolotl_spin.set_aside import SET_ASIDE

    return {
        *host_keys(),
        *SFTDataset.model_fields,
        *(key for key, *_ in (*REFUSED, *SET_ASIDE)),  # some of them one host's
        *(key.rsplit(".", 1)[-1] for key in spin_keys()),
        *(metric.name for metric in METRICS),
        *pairs.SCHEMA.names,
        *heldout_play.SCHEMA.names,
        *(selected.EVAL_LOSS, selected.AUC),
        *SwanLabConfig.model_fields,
        *(path.stem for path in PACKAGE.rglob("*.py")),
        *dir(BasePlugin),
        *dir(Trainer),
        *OTHER_NAMES,
    }


@BY_NAME
def test_keys_exist(page: Path) -> None:
    names = known_names()
    for code in _without_foreign(page):
        name, _, _ = code.partition(":")
        if re.fullmatch(r"(spin|generation|vllm)\.[\w.]+", name):
            check_spin_key(name)
        elif re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", name) or re.fullmatch(r"[a-z]+: \S.*", code):
            assert name in names, code


@pytest.mark.once
def test_a_key_that_is_not_there_is_found() -> None:
    check_spin_key("spin.generation.vllm.offload")
    check_spin_key("vllm.python")
    for name in ("spin.iteration", "generation.max_tokens", "vllm.pythons", "spin.generation.offload"):
        with pytest.raises(AssertionError, match="is no key"):
            check_spin_key(name)


# -- metrics, files, links ---------------------------------------------------------------------------------------------


def run_files() -> set[str]:
    """Returns what a run leaves in `spin/`, iteration N standing for any."""
    from axolotl_spin.disk.directory import RunDirectory

    directory = RunDirectory("")
    whole = {directory.plan, directory.log, directory.about, directory.report, directory.lock, directory.best}
    whole |= {directory.thumbnails, directory.heldout(None), directory.eval_rows(None), directory.start_evals}
    parts = {
        directory.pairs(0),
        directory.evals(0),
        directory.metrics(0),
        directory.heldout(0),
        directory.eval_rows(0),
        directory.model(0),
        directory.chunk(0, 0).parent,
    }
    return {path.as_posix().replace("iteration-0", "iteration-N") for path in whole | parts} | {"spin/replaced-N"}


@pytest.mark.once
@BY_NAME
def test_metrics_and_files_of_a_run_exist(page: Path) -> None:
    from axolotl_spin.monitor.metrics import HELD_OUT, METRICS, START
    from axolotl_spin.monitor.trackers import NAME

    names = {metric.name for metric in METRICS}
    names |= {name.replace(HELD_OUT, START) for name in names if name.startswith(HELD_OUT)} | {f"{START}*", NAME}
    for code in codes(page):
        if match := re.fullmatch(r"(?:OUTPUT_DIR/)?(spin/\S+)", code):
            known = names | run_files()
            assert match[1].replace("(N-1)", "N") in known, code
        elif re.fullmatch(r"(rewards|logps)/\S+|eval_\w*loss|loss_\w+", code):
            assert code in names, code


@pytest.mark.once
@BY_NAME
def test_paths_of_the_repository_exist(page: Path) -> None:
    for code in codes(page):
        if re.fullmatch(r"(axolotl_spin|tests|docs|example_configs|\.ci)/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"[a-z]+/", code):
            assert any(path.is_dir() for path in PACKAGE.rglob(code[:-1])) or (ROOT / code).is_dir(), code


def local_links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page))


@pytest.mark.once
def test_every_page_is_linked_to() -> None:
    found = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in local_links(page)}
    assert set(PAGES) - found == {PAGES[0]}


@pytest.mark.once
@BY_NAME
def test_links_lead_somewhere(page: Path) -> None:
    for target in local_links(page):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert not anchor or anchor in heads((page.parent / path).resolve() if path else page), target
