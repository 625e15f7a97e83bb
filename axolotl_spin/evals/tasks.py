"""Which benchmarks are run: tasks of lm-eval by name, or from YAML files, loaded with their data before a model is.

lm-eval is imported where it is needed: it takes seconds, and most runs do without.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# lm-eval's own, of the few-shot examples
_FEWSHOT_SEED = 1234
# draws for a standard error that has no closed form (lm-eval's own default of 100,000 takes minutes)
BOOTSTRAP = 1000
# lm-eval's names of the most tokens of an answer, the first that is set counts; and what it takes where none is
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_USUAL_TOKENS = 256


@dataclass
class Benchmarks:
    """The benchmarks that are asked for, and how they are run.

    Attributes:
        names: Of lm-eval's tasks, groups and tags.
        files: Of tasks in YAML.
        folders: Of such files.
        limit: Samples of each task; None for all.
        chat_template: Whether samples are put into the chat template.
        unsafe_code: Whether tasks may run what the model writes.
        key: What the user calls the list of tasks.
        tasks: As lm-eval loads them, by name; groups hold dictionaries. Empty until `load`.
    """

    names: tuple[str, ...]
    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    limit: int | None
    chat_template: bool
    unsafe_code: bool
    key: str = "spin.eval_tasks"
    tasks: dict[Any, Any] = field(default_factory=dict)

    def load(self) -> Benchmarks:
        """Loads the tasks and their data, and readies them to be run. Call it on one rank.

        Raises:
            ValueError: A name is unknown, a task cannot be loaded or may not be run; names the key and the task.
        """
        from lm_eval.tasks import TaskManager

        entries: list[tuple[str, Any]] = [(str(path), self._config(path)) for path in self.files]
        inside = [(folder, *self._names_in(folder)) for folder in self.folders]
        entries += [(str(folder / name), name) for folder, names, _ in inside for name in names]
        # the index of lm-eval's own tasks takes seconds; a group in YAML may name some of them
        own = bool(self.names) or any("group" in config for _, config in entries if isinstance(config, dict))
        own = own or any(elsewhere for _, _, elsewhere in inside)
        manager = TaskManager(include_defaults=own, include_path=[str(folder) for folder in self.folders])
        for name in self.names:
            if name not in manager.all_tasks:
                raise ValueError(self._unknown(name, manager.all_tasks))
            entries.append((name, name))
        for shown, entry in entries:
            self._add(shown, self._load(shown, entry, manager))
        for name, task in self.leaves():
            self._refuse(name, task)
            for key, usual in (("num_fewshot", 0), ("task", name)):
                if task.get_config(key) is None:
                    task.set_config(key=key, value=usual)
        return self

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yields each task, of groups too, with its name."""
        return ((name, task) for name, task in self._entries(self.tasks) if not isinstance(task, dict))

    def _entries(self, tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        """Yields each group and each task with its name; a group is a dictionary."""
        for entry, inside in tasks.items():
            yield str(getattr(entry, "group", entry)), inside
            if isinstance(inside, dict):
                yield from self._entries(inside)

    def run(self, lm: Any) -> dict[str, Any]:
        """Runs the loaded tasks on a model as lm-eval sees it.

        Args:
            lm: An `lm_eval.api.model.LM`.

        Returns:
            What `lm_eval.evaluate` returns.
        """
        from lm_eval.evaluator import evaluate

        for _, task in self.leaves():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # each time the same examples
        found = evaluate(
            lm,
            self.tasks,
            limit=self.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            apply_chat_template=self.chat_template,
            fewshot_as_multiturn=self.chat_template,
            confirm_run_unsafe_code=self.unsafe_code,
        )
        assert found is not None
        return found

    def wanted(self) -> dict[str, Any]:
        """Returns the version of each task, by name: what results must hold."""
        return {name: task.VERSION for name, task in self.leaves()}

    def refuse_select(self, select: str | None) -> None:
        """Refuses a `spin.select` that names none of the figures that the loaded tasks give.

        Args:
            select: A task's metric as `task/metric`; what is none is no matter of theirs.

        Raises:
            ValueError: Names the key, and what there is.
        """
        name, slash, metric = (select or "").partition("/")
        if not slash:
            return
        if name in {group for group, inside in self._entries(self.tasks) if isinstance(inside, dict)}:
            return  # what a group adds up is known once it is run
        leaves = dict(self.leaves())
        if name not in leaves:
            raise ValueError(
                f"`spin.select: {select}`: `{self.key}` brings no task `{name}`; there is {', '.join(sorted(leaves))}"
            )
        filters = [kind.name for kind in leaves[name]._filters]
        known = [key if kind == "none" else f"{key},{kind}" for key in leaves[name].aggregation() for kind in filters]
        if metric not in known:
            raise ValueError(f"`spin.select: {select}`: the figures of {name} are {', '.join(known)}")

    def refuse_unfit(self, config: Any, tokenizer: Any) -> None:
        """Refuses what a model cannot be asked.

        Args:
            config: The model's (`transformers.PretrainedConfig`).
            tokenizer: The host's.

        Raises:
            ValueError: No chat template to put samples into, or an answer may fill the whole context; names the key.
        """
        if self.chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`spin.eval_chat_template: true`, but the tokenizer has no chat template: set `chat_template`, or remove "
                "the key"
            )
        lengths = [getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
        context = next((length for length in lengths if length), None)  # as lm-eval finds it
        for name, task in self.leaves():
            how = task.get_config("generation_kwargs") or {}
            most = next((int(how[key]) for key in _MOST_TOKENS if how.get(key) is not None), _USUAL_TOKENS)
            if context and task.OUTPUT_TYPE == "generate_until" and most >= context:
                raise ValueError(
                    f"`{self.key}`: answers of {name} may have {most} tokens (`max_gen_toks`), and the model's context is "
                    f"{context}, question included: remove the task"
                )

    def _add(self, shown: str, loaded: dict[Any, Any]) -> None:
        known = {name for name, _ in self.leaves()}
        before, self.tasks = self.tasks, loaded
        twice = known & {name for name, _ in self.leaves()}
        if twice:
            raise ValueError(
                f"`{self.key}`: {shown} brings {', '.join(sorted(twice))}, which another entry has brought already: remove "
                "one of them, or give the task another name (`task:` in its YAML)"
            )
        self.tasks = {**before, **loaded}

    def _unknown(self, name: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(name, known, n=3)
        meant = f" (near it: {', '.join(near)})" if near else ""
        return (
            f"`{self.key}`: lm-eval knows no task `{name}`{meant}: `lm-eval ls tasks` lists them. A path is told by a `/` "
            "in it or by its end, `.yaml`"
        )

    def _config(self, path: Path) -> dict[str, Any]:
        from lm_eval.utils import load_yaml_config

        try:
            config = load_yaml_config(str(path), mode="full")
        except Exception as error:  # YAML, an import of the task's own functions, an `include:` that is not there
            raise ValueError(f"`{self.key}`: {path} could not be read ({type(error).__name__}: {error})") from error
        if not isinstance(config, dict) or "task" not in config:
            raise ValueError(f"`{self.key}`: {path} is no task of lm-eval: it has no `task:`")
        return config

    def _names_in(self, folder: Path) -> tuple[list[str], bool]:
        """Returns what a folder holds (its groups, and tasks that are in none), and whether a group looks elsewhere."""
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import load_yaml_config

        try:
            index = TaskManager(include_defaults=False, include_path=str(folder)).task_index
            grouped: set[str] = set()
            for entry in index.values():
                if entry["type"] == "group":
                    members = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
                    grouped |= {str(m.get("task", "")) if isinstance(m, dict) else str(m) for m in members}
        except Exception as error:
            raise ValueError(
                f"`{self.key}`: the tasks in {folder} could not be read ({type(error).__name__}: {error})"
            ) from error
        names = [name for name, entry in index.items() if entry["type"] != "tag" and name not in grouped]
        if not names:
            raise ValueError(f"`{self.key}`: {folder} holds no task of lm-eval (`*.yaml` with `task:`)")
        return names, not grouped <= index.keys()

    def _load(self, shown: str, entry: Any, manager: Any) -> dict[Any, Any]:
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        self._refuse_code(shown, entry, manager)
        unreached = (
            ConnectionError,
            DatasetNotFoundError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        )
        try:
            return manager.load_config(entry) if isinstance(entry, dict) else manager.load_task_or_group([entry])
        except unreached as error:
            raise ValueError(
                f"`{self.key}`: the data of {shown} is not on this machine, and could not be fetched ({error}): start once "
                "where there is a network, so that it is in the cache, or give tasks with data of your own"
            ) from error
        except ImportError as error:
            raise ValueError(f"`{self.key}`: {shown} needs a package that is not installed: {error}") from error
        except Exception as error:  # whatever a task's YAML, its functions or its data make of it
            raise ValueError(f"`{self.key}`: {shown} could not be loaded ({type(error).__name__}: {error})") from error

    def _refuse_code(self, shown: str, entry: Any, manager: Any) -> None:
        """Refuses a task that runs code before it is loaded: loading fetches what runs it."""
        from lm_eval.utils import load_yaml_config

        path = None if isinstance(entry, dict) else manager.task_index[entry]["yaml_path"]
        config = entry if isinstance(entry, dict) else {} if path == -1 else load_yaml_config(path, mode="simple")
        if config.get("unsafe_code"):
            self._refuse_unsafe(shown)

    def _refuse(self, name: str, task: Any) -> None:
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(
                f"`{self.key}`: {name} takes images or sound, and models are asked with text alone: remove it"
            )
        if getattr(task, "UNSAFE_CODE", False):
            self._refuse_unsafe(name)

    def _refuse_unsafe(self, name: str) -> None:
        if not self.unsafe_code:
            switch = "spin.eval_confirm_run_unsafe_code: true"
            how = f"set `{switch}`" if self.key.startswith("spin.") else "add `--confirm-run-unsafe-code`"
            raise ValueError(
                f"`{self.key}`: {name} runs what the model writes as code, on this machine: where that is meant, {how}"
            )


def asked_benchmarks(
    tasks: Sequence[str], *, limit: int | None, chat_template: bool, unsafe_code: bool, key: str = "spin.eval_tasks"
) -> Benchmarks:
    """Tells names from paths, and checks what can be told without lm-eval.

    Args:
        tasks: As the user wrote them: a path has a `/` in it, or ends in `.yaml` or `.yml`.
        limit, chat_template, unsafe_code: See `Benchmarks`.
        key: What the user calls `tasks`.

    Raises:
        ValueError: lm-eval is not installed, or a path does not exist; names the key.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"`{key}` needs lm-eval, which comes with Axolotl: `pip install lm-eval==0.4.11`, or remove the key"
        )
    names: list[str] = []
    files: list[Path] = []
    folders: list[Path] = []
    for task in dict.fromkeys(tasks):
        if "/" not in task and not task.endswith((".yaml", ".yml")):
            names.append(task)
            continue
        path = Path(task).expanduser()
        if not path.exists():
            raise ValueError(f"`{key}`: {task} does not exist, seen from {Path.cwd()}")
        (folders if path.is_dir() else files).append(path)
    return Benchmarks(tuple(names), tuple(files), tuple(folders), limit, chat_template, unsafe_code, key)
