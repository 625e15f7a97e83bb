"""Models of a run that are on disk: the start model and each iteration's, loaded and asked after the run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_spin.compat import model_class, takes_more_than_text
from axolotl_spin.disk.atomic import read_json
from axolotl_spin.evals.tasks import BOOTSTRAP, Benchmarks
from axolotl_spin.generation.adapter import largest_rank, served_rank
from axolotl_spin.generation.vllm.engine import environment

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class SavedModel:
    """A model on disk.

    Attributes:
        name: For people.
        iteration: That it resulted from; None for the start model.
        model: Path or name of the whole model, or of the one under the adapter.
        adapter: The adapter's folder, or None.
        tokenizer: Path or name of its tokenizer.
        evals: Its `evals.json`.
        mark: What identifies it; see `Identity`.
    """

    name: str
    iteration: int | None
    model: str
    adapter: Path | None
    tokenizer: str
    evals: Path
    mark: str | None


def base_of(adapter: Path) -> str | None:
    """Returns the model under an adapter, as PEFT noted it; None where the folder holds no adapter."""
    path = adapter / "adapter_config.json"
    return str(read_json(path).get("base_model_name_or_path")) if path.exists() else None


# runs benchmarks on a model and returns what `lm_eval.evaluate` returns
Ask = Callable[[SavedModel, Benchmarks], dict[str, Any]]


def ask_by_transformers(config: dict[str, Any], batch_size: int, device: str | None) -> Ask:
    """Returns what asks models through transformers, in this process.

    Args:
        config: What the user wrote, or the host made of it: how the base is loaded.
        batch_size: Requests that are answered at once.
        device: Of torch; by default all GPUs that are there, else the CPU.
    """

    def ask(saved: SavedModel, benchmarks: Benchmarks) -> dict[str, Any]:
        import gc

        import torch
        from lm_eval.models.huggingface import HFLM

        model, tokenizer = load(saved, config, device)
        try:
            return benchmarks.run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size))
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return ask


def load(saved: SavedModel, config: dict[str, Any], device: str | None) -> tuple[Any, Any]:
    """Loads a model as it was trained: over a base that was changed or quantised as it was, with rows for added tokens.

    Args:
        saved: The model.
        config: What the user wrote.
        device: See `ask_by_transformers`.

    Returns:
        The model and its tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

    from axolotl_spin.training.quantised import compute_as_in_training

    remote = {"trust_remote_code": bool(config.get("trust_remote_code"))}
    revision = _revision(saved.model, config)
    how: dict[str, Any] = {**remote, **revision, "dtype": "auto"}
    if device is None and torch.cuda.is_available():
        how["device_map"] = "auto"
    base = _is_base(saved)
    described = (base and config.get("base_model_config")) or saved.model
    shape = AutoConfig.from_pretrained(described, **remote, **_revision(described, config))
    if base:
        for key, value in (config.get("overrides_of_model_config") or {}).items():
            setattr(shape, key, value)
        how["config"] = shape
        if config.get("load_in_4bit"):
            as_host: dict[str, Any] = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": _computed_in(config),
            }
            how["quantization_config"] = BitsAndBytesConfig(**as_host | dict(config.get("bnb_config_kwargs") or {}))
        elif config.get("load_in_8bit"):
            how["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if device is not None and "quantization_config" in how:  # which is loaded where it stays
        how["device_map"] = {"": device}
    tokenizer = AutoTokenizer.from_pretrained(saved.tokenizer, **remote, **_revision(saved.tokenizer, config))
    kind = model_class(shape, multimodal=takes_more_than_text(shape))
    model: Any = kind.from_pretrained(saved.model, **how)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:  # `tokens:` of the config; an adapter may bring what was learnt for them
        multiple = 32 if config.get("resize_token_embeddings_to_32x") else None
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    if saved.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(saved.adapter))
    if "device_map" not in how and "quantization_config" not in how:
        model = model.to(device or "cpu")
    compute_as_in_training(model)  # what the run itself measured was computed so
    return model.eval(), tokenizer


def _is_base(saved: SavedModel) -> bool:
    """Whether a model's files are the base's, on which a run's config has a say; what a run saved says all by itself."""
    return saved.iteration is None or saved.adapter is not None


def _revision(name: str, config: dict[str, Any]) -> dict[str, str]:
    """Returns the `revision` of a model or tokenizer of the hub, by the name of its argument; nothing for one on disk."""
    revision = config.get("revision_of_model")
    return {"revision": str(revision)} if revision and not Path(name).exists() else {}


def _computed_in(config: dict[str, Any]) -> Any:
    """Returns the `torch.dtype` in which the host has a model compute.

    Args:
        config: What the user wrote.
    """
    from axolotl.utils.config import resolve_dtype
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault({"bf16": "auto", **config, "use_ray": None})  # with Ray a worker settles `auto`
    resolve_dtype(cfg)
    return cfg.torch_dtype


def ask_by_vllm(config: dict[str, Any], python: str | None, arguments: dict[str, Any]) -> Ask:
    """Returns what asks models through lm-eval's vLLM model, each in a process of its own.

    Args:
        config: What the user wrote.
        python: The interpreter that has vLLM and lm-eval; None is this one.
        arguments: More of lm-eval's vLLM model, such as `gpu_memory_utilization`.

    Raises:
        ValueError: The interpreter cannot be run, or lacks one of them.
    """
    program = python or sys.executable
    _check(program)

    def ask(saved: SavedModel, benchmarks: Benchmarks) -> dict[str, Any]:
        given: dict[str, Any] = {"pretrained": saved.model, "tokenizer": saved.tokenizer}
        given |= {"trust_remote_code": bool(config.get("trust_remote_code")), **_revision(saved.model, config)}
        given |= {f"tokenizer_{key}": value for key, value in _revision(saved.tokenizer, config).items()}
        if _is_base(saved):
            read = {"hf_config_path": "base_model_config", "hf_overrides": "overrides_of_model_config"}
            given |= {name: config[key] for name, key in read.items() if config.get(key)}
        given |= arguments
        if saved.adapter is not None:
            rank = largest_rank(read_json(saved.adapter / "adapter_config.json")) or 16
            given |= {"lora_local_path": str(saved.adapter), "max_lora_rank": served_rank(rank)}
        return ask_in_a_process(program, "vllm", given, benchmarks)

    return ask


def ask_in_a_process(program: str, kind: str, model: dict[str, Any], benchmarks: Benchmarks) -> dict[str, Any]:
    """Runs benchmarks in a process of their own; see `worker.py`.

    Args:
        program: Its Python.
        kind: lm-eval's name of a kind of model.
        model: Arguments of that.
        benchmarks: Loaded; they are loaded there once more.

    Returns:
        What `lm_eval.evaluate` returns, as far as `collect` reads it.

    Raises:
        ValueError: It failed.
    """
    with tempfile.TemporaryDirectory(prefix="axolotl-spin-") as folder:
        path, report = Path(folder, "job.json"), Path(folder, "report.json")
        path.write_text(json.dumps(job_of(kind, model, benchmarks, report)))
        done = subprocess.run([program, str(WORKER), str(path)], env=environment(program, {}))
        if done.returncode or not report.exists():
            raise ValueError(f"{kind} in {program} ended with status {done.returncode}; what it said stands above")
        return json.loads(report.read_text())


def job_of(kind: str, model: dict[str, Any], benchmarks: Benchmarks, report: Path) -> dict[str, Any]:
    """Returns what `worker.py` is asked for.

    Args:
        kind, model, benchmarks: See `ask_in_a_process`; the benchmarks are loaded.
        report: Where the results are to appear.

    Returns:
        `kind`, `model` and `report` as given, the names of `tasks`, the `folders` in which those of the user's own are, and
        `how` they are asked, in the arguments of lm-eval's `simple_evaluate`.
    """
    folders = [*benchmarks.folders, *(path.parent for path in benchmarks.files)]
    how = {
        "limit": benchmarks.limit,
        "bootstrap_iters": BOOTSTRAP,
        "apply_chat_template": benchmarks.chat_template,
        "fewshot_as_multiturn": benchmarks.chat_template,
        "confirm_run_unsafe_code": benchmarks.unsafe_code,
    }
    return {
        "kind": kind,
        "model": model,
        "report": str(report),
        "tasks": [getattr(name, "group_name", name) for name in benchmarks.tasks],
        "folders": [str(folder.absolute()) for folder in dict.fromkeys(folders)],
        "how": how,
    }


def _check(program: str) -> None:
    """Raises ValueError where a Python cannot import vLLM and lm-eval."""
    code = "import vllm, lm_eval.models.vllm_causallms; vllm.LLM"
    try:
        done = subprocess.run(
            [program, "-c", code], env=environment(program, {}), capture_output=True, text=True, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(
            f"`--backend vllm`: {program} did not run ({error}): give another one with `--python`"
        ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(
            f"`--backend vllm`: {program} cannot import lm-eval's vLLM model ({said}): install what it needs there "
            f"(`{program} -m pip install vllm ray lm-eval`), name another environment's Python with `--python`, or "
            "take `--backend hf`"
        )
