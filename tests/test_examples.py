"""Every shipped config passes the real host's validation."""

from __future__ import annotations

from pathlib import Path

import host
import pytest
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
