"""`axolotl spin generate`: iteration 0's pairs and nothing else, on one rank and on two, as `train` would make them."""

from __future__ import annotations

import shutil
from pathlib import Path

import host
import pyarrow.parquet as pq
import pytest
import yaml
from recovery import differences, outcome, settings_in
from warm import Ranks, Warm

pytestmark = pytest.mark.host

ENV = host.environment(ACCELERATE_USE_CPU="true")


def generate(warm: Warm | Ranks, folder: Path, env: dict[str, str] = ENV) -> tuple[int, str]:
    return warm.run("axolotl_spin", "generate", "run.yml", env=env, cwd=folder)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.once
def test_generates_goes_on_after_a_kill_and_training_goes_on_from_it(
    warm: Warm, whole: dict, shared: Path, tmp_path: Path
) -> None:
    """The pairs, and all that a later `train` ends with, are those of a run that was started as `train`."""
    settings_in(tmp_path, shared)
    code, output = generate(warm, tmp_path, {**ENV, "SPIN_KILL": "generate/chunk whole"})
    assert code != 0 and "killed at" in output
    code, output = generate(warm, tmp_path)
    assert code == 0, output[-6000:]
    assert "prompts are already answered" in output
    assert "the 16 pairs of iteration 0: out/spin/iteration-0/pairs.parquet" in output.replace(f"{tmp_path}/", "")
    assert "axolotl train run.yml" in output and "axolotl spin export" in output
    out = tmp_path / "out"
    assert pq.read_table(out / "spin" / "iteration-0" / "pairs.parquet").to_pydict() == whole["pairs 0"]
    kept = ["about.json", "iteration-0/metrics.json", "iteration-0/pairs.parquet", "log.jsonl", "plan.json", "run.lock"]
    assert files(out / "spin") == kept
    assert not list(out.glob("checkpoint-*")) and not list(out.glob("*.safetensors"))
    assert "failed" not in output and "'loss'" not in output and "eval_loss" not in output

    (out / "debug.log").unlink()
    code, output = generate(warm, tmp_path)
    assert code == 0 and "the 16 pairs of iteration 0" in output
    assert not host.loaded_a_model(out)

    code, output = warm.run("axolotl.cli.train", "run.yml", env=ENV, cwd=tmp_path)
    assert code == 0, output[-6000:]
    assert "iteration 0: using the pairs in" in output and "iteration 0: generated" not in output
    assert not differences(outcome(out), whole)


def test_what_leaves_nothing_to_generate_is_refused(warm: Warm, whole: dict, shared: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, shared)
    shutil.copytree(shared / "whole" / "out", tmp_path / "out")
    code, output = generate(warm, tmp_path)
    assert code == 0 and "the 16 pairs of iteration 0" in output
    pairs = tmp_path / "out" / "spin" / "iteration-0" / "pairs.parquet"
    given = pairs.rename(tmp_path / "pairs.parquet")
    settings["spin"] = {**settings["spin"], "iterations": 3}  # so that the run is not complete
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    code, output = generate(warm, tmp_path)
    assert code == 1 and "has trained already (a start goes on from" in output
    settings["spin"]["initial_pairs"] = str(given)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    code, output = generate(warm, tmp_path)
    assert code == 1 and "there is nothing to generate" in output
    (tmp_path / "run.yml").write_text(yaml.safe_dump({**settings, "rl": None, "spin": None}))
    code, output = generate(warm, tmp_path)
    assert code == 1 and "Error: run.yml does not say `rl: spin`" in output


@pytest.mark.once
@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp", "zero3-lora", "fsdp2"])
def test_two_ranks(name: str, warm: Warm, warm_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As `accelerate launch -m axolotl_spin generate` starts them; the answers are one rank's."""
    folder = tmp_path_factory.getbasetemp() / "generate"
    folder.mkdir(exist_ok=True)
    single = {**host.config(folder, rows=13), **host.layout("single", folder)}
    if not (folder / "single").exists():
        code, output = warm.run("axolotl_spin", "generate", str(host.write(single)), env=ENV, cwd=folder)
        assert code == 0, output[-6000:]
    settings = {**host.config(folder), **host.layout(name, folder)}
    env = host.environment(**host.rank_environment(name.partition("-")[0]))
    code, output = warm_ranks.run("axolotl_spin", "generate", str(host.write(settings)), env=env, cwd=folder)
    assert code == 0, output[-6000:]
    assert "failed" not in output and output.count("the 13 pairs of iteration 0") == 1
    one, two = (host.Run(0, "", folder / kind).pairs(0) for kind in ("single", name))
    assert two["rejected_ids"].to_pylist() == one["rejected_ids"].to_pylist()
    for column in ("opponent_chosen_logp", "opponent_rejected_logp"):
        assert two[column].to_pylist() == pytest.approx(one[column].to_pylist(), abs=1e-4)
