"""Every shipped config passes the real host's validation."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import host
import pytest
import torch
import yaml

CONFIGS = sorted((host.ROOT / "example_configs").rglob("*.yml"))


def test_the_examples_are_there() -> None:
    names = {path.relative_to(host.ROOT / "example_configs").as_posix() for path in CONFIGS}
    assert {
        "quickstart.yml",
        "paper-zephyr-7b.yml",
        "lora.yml",
        "qlora.yml",
        "zero3.yml",
        "fsdp2.yml",
        "llama-70b-fsdp2.yml",
        "llama-70b-zero3.yml",
        "vision-lora.yml",
    } <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_passes_the_hosts_validation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_spin.args import spin_config

    # the quickstart's model is made by its script
    text = path.read_text().replace("./quickstart/model", "example_configs")
    cfg = host.validate(text, monkeypatch)
    settings = spin_config(cfg)
    assert cfg.rl is None and settings.active
    deepspeed = yaml.safe_load(path.read_text()).get("deepspeed")
    assert deepspeed is None or (host.ROOT / deepspeed).is_file()
    assert f"{path.relative_to(host.ROOT)}" in path.read_text(), "the launch command in the comment names another file"


def test_paper_config_is_the_papers_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_spin.args import spin_config
    from axolotl_spin.run.plan import make_plan

    cfg = host.validate((host.ROOT / "example_configs" / "paper-zephyr-7b.yml").read_text(), monkeypatch)
    settings = spin_config(cfg)
    plan = make_plan(
        settings.max_prompts, global_batch=cfg.micro_batch_size * cfg.gradient_accumulation_steps * 8,
        num_epochs=int(cfg.num_epochs), history=settings.history, betas=settings.betas(),
        learning_rates=settings.learning_rates(cfg.learning_rate),
        warmup={"warmup_steps": cfg.warmup_steps, "warmup_ratio": cfg.warmup_ratio},
    )  # fmt: skip
    assert (plan.global_batch, [entry.rows for entry in plan.iterations]) == (64, [50_000] + 3 * [100_000])
    assert settings.betas() == [0.1, 0.1, 0.1, 5.0]
    assert [entry.learning_rate for entry in plan.iterations] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert plan.iterations[0].warmup_steps == 156  # 10% of 1564
    assert cfg.optimizer == "rmsprop" and cfg.lr_scheduler == "linear" and cfg.sequence_len == 2048


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_70b_on_64_gpus(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host takes the config for 64 ranks, its step is the paper's batch, and the page says what `plan` counts."""
    from axolotl.utils.config import normalize_config
    from transformers import LlamaConfig

    monkeypatch.syspath_prepend(str(host.TESTS / "benchmarks"))
    from simulation import SHAPES

    from axolotl_spin.args import spin_config
    from axolotl_spin.commands.plan.memory import Load, estimate_memory
    from axolotl_spin.commands.plan.size import model_size
    from axolotl_spin.run.prepare import _sharding

    shape = LlamaConfig(**SHAPES["Llama 3.1 70B"], architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    shape.save_pretrained(tmp_path)
    text = (host.ROOT / "example_configs" / f"llama-70b-{kind}.yml").read_text()
    cfg = host.validate(text.replace("meta-llama/Llama-3.1-70B-Instruct", str(tmp_path)), monkeypatch, ranks=64)
    normalize_config(cfg)
    assert cfg.world_size == 64 and cfg.batch_size == 64
    assert spin_config(cfg).generation.vllm.tensor_parallel_size == 8
    # held-out play would have the sharded model answer, gathering 70B parameters for each token
    assert spin_config(cfg).eval_prompts == 0 and spin_config(cfg).select in (None, "eval_loss") and cfg.val_set_size
    cfg.torch_dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    size, page = model_size(cfg), (host.ROOT / "docs" / "clusters.md").read_text()
    for gpus in (16, 64):
        load = Load(gpus, _sharding(cfg), cfg.sequence_len, 1536, 0)
        needed = estimate_memory(size, cfg, load)["training"]
        assert re.search(rf"\| `llama-70b-{kind}.yml` \| {gpus} \| {needed / 2**30:.0f} GiB \|", page), (gpus, needed)


def test_the_slurm_script_is_sound_shell() -> None:
    scripts = sorted((host.ROOT / "example_configs" / "slurm").iterdir())
    assert [script.name for script in scripts] == ["spin.sbatch"]
    checks = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for check in checks:
        done = subprocess.run([*check, *map(str, scripts)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
