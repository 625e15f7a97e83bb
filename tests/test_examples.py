"""Every shipped config passes the real host's validation, and the README's YAML and commands hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import host
import pytest
import yaml

CONFIGS = sorted((host.ROOT / "example_configs").rglob("*.yml"))
EIGHT_H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def validate(text: str, monkeypatch: pytest.MonkeyPatch):
    """Runs the host's own registration of plugins and validation, as on a machine with eight GPUs."""
    import torch
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(host.ROOT)  # paths in the examples are relative to the repository
    monkeypatch.setenv("WORLD_SIZE", "8")
    cfg = DictDefault(yaml.safe_load(text))
    prepare_plugins(cfg)
    version = str(torch.__version__).split("+")[0]
    return validate_config(cfg, capabilities=EIGHT_H100, env_capabilities={"torch_version": version})


def test_the_examples_are_there() -> None:
    names = {path.relative_to(host.ROOT / "example_configs").as_posix() for path in CONFIGS}
    assert {"quickstart.yml", "paper-zephyr-7b.yml", "lora.yml", "qlora.yml", "zero3.yml", "fsdp2.yml"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_passes_the_hosts_validation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_spin.args import spin_config

    cfg = validate(path.read_text(), monkeypatch)
    settings = spin_config(cfg)
    assert cfg.rl is None and settings.active
    deepspeed = yaml.safe_load(path.read_text()).get("deepspeed")
    assert deepspeed is None or (host.ROOT / deepspeed).is_file()
    assert f"{path.relative_to(host.ROOT)}" in path.read_text(), "the launch command in the comment names another file"


def test_paper_config_is_the_papers_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_spin.args import spin_config
    from axolotl_spin.run.plan import make_plan

    cfg = validate((host.ROOT / "example_configs" / "paper-zephyr-7b.yml").read_text(), monkeypatch)
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


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (host.ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_yaml_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = readme_blocks("yaml")
    assert blocks
    for block in blocks:
        settings = yaml.safe_load(block)
        base = {"base_model": "x/y", "datasets": [{"path": "d", "type": "chat_template"}], "micro_batch_size": 1,
                "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-6, "rl": "spin",
                "plugins": ["axolotl_spin.SpinPlugin"]}  # fmt: skip
        validate(yaml.safe_dump({**base, **settings}), monkeypatch)


def test_readme_table_lists_every_key() -> None:
    """Name and default of each `spin:` key, from the schema."""
    from axolotl_spin.args import GenerationConfig, SpinConfig, VllmConfig

    table = dict(
        re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", (host.ROOT / "README.md").read_text(), flags=re.MULTILINE)
    )
    expected = {}
    for prefix, model in (("", SpinConfig), ("generation.", GenerationConfig), ("generation.vllm.", VllmConfig)):
        for name, field in model.model_fields.items():
            if name not in ("active", "generation", "vllm"):
                expected[prefix + name] = yaml.safe_dump(field.default).splitlines()[0]
    assert table == expected


def test_readme_make_targets_and_files_exist() -> None:
    text = (host.ROOT / "README.md").read_text()
    makefile = (host.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", text))
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in re.findall(r"example_configs/[\w./-]+", text):
        assert (host.ROOT / name).exists(), name


def test_readme_commands_parse(tmp_path: Path) -> None:
    """Every `axolotl ...` command of the README is one that the host, or this package, knows."""
    from axolotl.cli.main import cli
    from click import Context

    context = Context(cli)
    commands = re.findall(
        r"^(?:\$ )?axolotl ([a-z-]+)(?: ([a-z]+))?", "\n".join(readme_blocks("bash")), flags=re.MULTILINE
    )
    assert {"train", "spin"} <= {name for name, _ in commands}
    for name, sub in commands:
        command = cli.get_command(context, name)
        assert command is not None, name
        if name == "spin":
            from axolotl_spin.cli import spin

            assert sub in spin.commands


def test_readme_launches_parse() -> None:
    """Every `accelerate launch` of the README is one that accelerate takes, of a module that exists."""
    from importlib.util import find_spec

    from accelerate.commands.launch import launch_command_parser

    lines = re.findall(r"^accelerate launch (.+)$", "\n".join(readme_blocks("bash")), flags=re.MULTILINE)
    assert any("--num_machines" in line for line in lines)
    for line in lines:
        arguments = launch_command_parser().parse_args(shlex.split(line, comments=True))
        assert arguments.module and find_spec(arguments.training_script), line
        assert arguments.training_script_args[-1] == "spin.yml"


def test_readme_links_lead_somewhere() -> None:
    text = (host.ROOT / "README.md").read_text()
    heads = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)
    }
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert targets
    for target in targets:
        assert target[1:] in heads if target.startswith("#") else (host.ROOT / target).exists(), target
