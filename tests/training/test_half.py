"""bf16 through the host's command, on a CPU, in every layout: the opponent is the policy, and steps reach the weights.

The plugin of `half` has the host compute in bf16 where there is no GPU. The paper's learning rate, 5e-7, is far below half
the spacing of bf16 around nearly every weight.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host
import pytest
import yaml
from recovery import CHANGES, differences, outcome
from warm import Ranks, Warm

pytestmark = pytest.mark.host

HALF = {"bfloat16": True, "learning_rate": 5e-7}
BETA = 1.0
# weights that a step can change: the host keeps embeddings and the head in fp32 for `sdpa`, but where it shards with FSDP2;
# DeepSpeed and LoRA have fp32 throughout
MOVED = {"single": (0.10, 0.18), "ddp": (0.10, 0.18), "fsdp2": (0.0, 0.01)}
ON_TWO = [pytest.param(name, marks=pytest.mark.ranks) for name in ("ddp", "zero2", "zero3", "fsdp2", "fsdp2-lora")]

RunOf = Callable[[str], host.Run]


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    """Returns a layout's config, in bf16."""
    layout = host.layout(name, folder)
    if "deepspeed" in layout:
        path = Path(layout["deepspeed"])
        path.write_text(json.dumps({**json.loads(path.read_text()), "bf16": {"enabled": True}}))
    first = [plugin for plugin in layout.get("plugins", []) if plugin not in host.OURS]
    changes = {**layout, **HALF, "plugins": [*first, "half.HalfPlugin", *host.OURS]}
    made = host.config(folder, rows=12, **changes)
    return {**made, "spin": {**made["spin"], "beta": BETA}}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunOf:
    """A function that gives a layout's run, which it makes once for all tests of this module."""
    folder, runs = tmp_path_factory.mktemp("half"), {}

    def run(name: str) -> host.Run:
        if name not in runs:
            kind = name.partition("-")[0]
            by: Warm | Ranks = request.getfixturevalue("warm" if kind == "single" else "warm_ranks")
            runs[name] = host.train(settings_of(name, folder), kind, by=by)
        return runs[name]

    return run


@pytest.mark.parametrize("name", ["single", "single-lora", *ON_TWO])
def test_policy_and_opponent_agree_in_bf16(name: str, run_of: RunOf) -> None:
    """A loss in bf16, where FSDP2 casts what leaves the model, would be 0.69141; with other neighbours in a pair's
    micro-batch it is another as well, which hardly shows at this size."""
    run = run_of(name)
    assert '"torch_dtype": "torch.bfloat16"' in run.output
    exact = 1e-8 if name.startswith("single") else 1e-3
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=exact)
    assert "is off by" not in run.output


@pytest.mark.parametrize("name", ["single", "single-lora", *ON_TWO])
def test_share_of_updated_weights_is_measured_once_and_warned_of(name: str, run_of: RunOf) -> None:
    run = run_of(name)
    low, high = MOVED.get(name, (0.9, 1.0))
    for iteration in range(2):
        measured = run.metrics(iteration)["spin/updated_weights"]
        assert low <= measured <= high
    # 3 steps and 6, in each the third is the first at the full rate
    assert [row["step"] for row in run.logs() if "spin/updated_weights" in row] == [3, 3 + 3]
    warned = [line for line in run.output.splitlines() if "of the weights trained in half precision" in line]
    assert len(warned) == (2 if high < 0.9 else 0)
    for line in warned:
        assert "learning rate 5e-07 changed 0." in line and "`deepspeed`" in line and "bf16_stochastic_round" in line


@pytest.mark.ranks
def test_the_example_of_fsdp2_trains(tmp_path: Path, warm_ranks: Ranks) -> None:
    """In bf16, in which the host would shard them too, hardly a weight moved at the example's learning rate."""
    example = yaml.safe_load((host.ROOT / "example_configs" / "fsdp2.yml").read_text())
    made = settings_of("fsdp2", tmp_path)
    made["learning_rate"] = example["learning_rate"]
    if not example["bf16"]:  # TF32 is a GPU's
        made |= {"bfloat16": False, "plugins": [name for name in made["plugins"] if "half" not in name]}
    run = host.train(made, "fsdp2", by=warm_ranks)
    assert [run.metrics(i)["spin/updated_weights"] > 0.9 for i in range(2)] == [True, True]


def test_a_run_in_bf16_goes_on_as_one_that_was_never_stopped(tmp_path: Path, warm: Warm) -> None:
    made = {**host.config(tmp_path, rows=19), **CHANGES, **HALF, "learning_rate": 1e-3}
    made["plugins"] = ["faults.FaultPlugin", "half.HalfPlugin", *host.OURS]
    expected = outcome(host.train(made, by=warm).out)
    shutil.rmtree(tmp_path / "out")
    host.train(made, by=warm, env={"SPIN_KILL": "iteration 1/first epoch"}, fails=True)
    resumed = host.train(made, by=warm)
    assert "going on from" in resumed.output
    assert differences(outcome(resumed.out), expected) == []
