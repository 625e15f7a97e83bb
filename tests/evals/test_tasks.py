"""Which benchmarks are run: names, files and folders, and what is refused before a model loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluated
import host
import pytest
import tiny
import yaml
from pydantic import ValidationError
from warm import Warm

from axolotl_spin.evals.tasks import Benchmarks, asked_benchmarks
from axolotl_spin.settings.spin import SpinConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a group of a group of one task, and a task beside it."""
    made = tmp_path_factory.mktemp("tasks")
    evaluated.write_tasks(made / "all", tiny.save(made / "model"), evaluated.ANSWERS, evaluated.CHOICES)
    group = {
        "group": "tiny_group",
        "task": ["tiny_choices"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (made / "all" / "group.yaml").write_text(yaml.safe_dump(group))
    (made / "all" / "groups.yaml").write_text(yaml.safe_dump({"group": "tiny_groups", "task": ["tiny_group"]}))
    (made / "all" / "template.yaml").write_text("output_type: generate_until\n")
    task = yaml.safe_load((made / "all" / "tiny_answers.yaml").read_text())
    tiny.conversations(made / "data.jsonl", 4)
    (made / "code.yaml").write_text(yaml.safe_dump({**task, "task": "tiny_code", "unsafe_code": True}))
    long = {**task["generation_kwargs"], "max_gen_toks": 4096}
    (made / "long.yaml").write_text(yaml.safe_dump({**task, "task": "tiny_long", "generation_kwargs": long}))
    (made / "remote.yaml").write_text(
        yaml.safe_dump({**task, "dataset_path": "nobody/nothing", "dataset_kwargs": None})
    )
    (made / "wrong.yaml").write_text(yaml.safe_dump({**task, "output_type": "guess"}))
    return made


def asked(*tasks: Any, **how: Any) -> Benchmarks:
    return asked_benchmarks(
        [str(task) for task in tasks], limit=None, chat_template=False, **{"unsafe_code": False, **how}
    )


@pytest.mark.once
def test_a_folder_is_its_groups_and_the_tasks_in_none(folder: Path) -> None:
    found = asked(folder / "all").load()
    assert found.wanted() == {"tiny_choices": 2, "tiny_answers": 1.5}
    assert sorted(map(str, found.tasks)) != ["tiny_answers", "tiny_choices"]  # the group stands in its task's place


@pytest.mark.once
def test_a_file_is_its_task(folder: Path) -> None:
    found = asked(folder / "all" / "tiny_choices.yaml", folder / "all" / "tiny_answers.yaml").load()
    assert list(found.wanted()) == ["tiny_choices", "tiny_answers"]
    assert [task.get_config("num_fewshot") for _, task in found.leaves()] == [2, 0]
    assert list(asked(folder / "code.yaml", unsafe_code=True).load().wanted()) == ["tiny_code"]


@pytest.mark.once
def test_what_selects_the_best_iteration_is_a_figure_of_theirs(folder: Path) -> None:
    found = asked(folder / "all").load()
    for select in ("tiny_answers/exact_match,word", "tiny_answers/exact_match", "tiny_choices/acc", "tiny_group/acc"):
        found.refuse_select(select)
    found.refuse_select("tiny_groups/acc")
    with pytest.raises(
        ValueError, match=r"`spin.select: tiny/acc`: `spin.eval_tasks` brings no task `tiny`; there is tiny_a"
    ):
        found.refuse_select("tiny/acc")
    with pytest.raises(ValueError, match=r"the figures of tiny_answers are exact_match, exact_match,word$"):
        found.refuse_select("tiny_answers/acc")


@pytest.mark.once
def test_what_the_model_cannot_be_asked(folder: Path) -> None:
    """Answers have three tokens at most, which lm-eval cuts from the context that a question may have."""
    found, tokenizer = asked(folder / "all").load(), tiny.tokenizer()
    for config in (SimpleNamespace(max_position_embeddings=4), SimpleNamespace()):
        found.refuse_unfit(config, tokenizer)
    with pytest.raises(
        ValueError, match=r"`spin.eval_tasks`: answers of tiny_answers may have 3 tokens .*context is 3,"
    ):
        found.refuse_unfit(SimpleNamespace(max_position_embeddings=3), tokenizer)
    found.chat_template, tokenizer.chat_template = True, None
    with pytest.raises(ValueError, match=r"`spin.eval_chat_template: true`, but the tokenizer has no chat template"):
        found.refuse_unfit(SimpleNamespace(), tokenizer)


@pytest.mark.once
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nowhere/task.yaml"], r"`spin.eval_tasks`: nowhere/task.yaml does not exist, seen from /"),
        (
            ["{}/code.yaml"],
            r"code.yaml runs what the model writes as code.*set `spin.eval_confirm_run_unsafe_code: true`",
        ),
        (
            ["{}/all", "{}/all/tiny_answers.yaml"],
            r"all/tiny_answers brings tiny_answers, which another entry has brought",
        ),
        (["{}/all/template.yaml"], r"template.yaml is no task of lm-eval: it has no `task:`"),
        (["{}/model"], r"model holds no task of lm-eval"),
        (["{}/all/rows.jsonl"], r"rows.jsonl could not be read"),
        (["{}/wrong.yaml"], r"wrong.yaml could not be loaded \(ValueError: .*invalid output_type 'guess'"),
        (
            ["{}/remote.yaml"],
            r"the data of .*remote.yaml is not on this machine, and could not be fetched \(.*start once where",
        ),
    ],
)
def test_what_is_refused(folder: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(*(name.format(folder) for name in names)).load()


@pytest.mark.once
def test_a_name_that_lm_eval_does_not_know_is_refused_with_those_near_it(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`--tasks`: lm-eval knows no task `arc_esy` \(near it: arc_easy, .*`lm-eval ls tasks`"
    ):
        asked("arc_esy", key="--tasks").load()


@pytest.mark.once
def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axolotl_spin.evals.tasks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`spin.eval_tasks` needs lm-eval.*pip install lm-eval==0.4.11"):
        asked("gsm8k")


@pytest.mark.once
def test_keys_that_say_nothing_without_tasks() -> None:
    assert SpinConfig(eval_tasks="gsm8k", eval_limit=3).eval_tasks == ["gsm8k"]
    for key in ("eval_limit", "eval_chat_template", "eval_confirm_run_unsafe_code"):
        with pytest.raises(ValidationError, match=rf"spin.{key} is \w+, but there are no spin.eval_tasks"):
            SpinConfig(**{key: 1})
    for wrong in ({"eval_limit": 0}, {"eval_tasks": [""]}, {"eval_tasks": [3]}):
        with pytest.raises(ValidationError):
            SpinConfig(**{"eval_tasks": ["gsm8k"], **wrong})


@pytest.mark.host
def test_a_run_stops_before_its_model_loads(folder: Path, warm: Warm) -> None:
    spin = {"iterations": 1, "eval_tasks": [str(folder / "long.yaml")]}
    run = host.train(host.config(folder, spin=spin), by=warm, fails=True)
    assert "answers of tiny_long may have 4096 tokens (`max_gen_toks`), and the model's context is 256" in run.output
    assert not host.loaded_a_model(run.out)
