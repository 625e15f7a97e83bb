"""Full fine-tuning and LoRA in every layout, through the host's command: the same run, and the right opponent.

The global batch is four pairs everywhere, so single process, DDP, ZeRO and FSDP2 must generate the same answers and show
the same losses; and in each, the log-probs in `pairs.parquet` must be those of the model that the iteration started from,
computed here from the files on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import host
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from warm import Ranks, Warm

from axolotl_spin.disk.atomic import WEIGHTS

pytestmark = [pytest.mark.host, pytest.mark.ranks]

FULL = ["single", "ddp", "zero2", "zero3", "fsdp2"]
LORA = [f"{name}-lora" for name in FULL]
# that these do as a single rank does depends on the host least
ONCE = ("ddp-lora", "zero2-lora")
ALL = [pytest.param(name, marks=pytest.mark.once if name in ONCE else ()) for name in FULL + LORA]
ON_TWO = [one for one in ALL if one.values[0] not in ("single", "single-lora")]
GATHER = {"zero3-lora": False, "fsdp2": False}  # the others choose by the free memory
TILED = ("zero3", "fsdp2", "zero2-lora", "fsdp2-lora")  # log-probs are taken in tiles there, and from logits elsewhere
ITERATIONS = 3 if host.DEFAULT else 2
HELD_OUT = 9
LN2 = 0.6931472
# by the true launcher; the others are forked as it would start them
LAUNCHED = ("ddp", "zero3") if host.DEFAULT else ("ddp",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layouts")
    host.config(made)
    # one adapter to start from: hosts before 0.21 do not seed the adapter's initial weights
    tiny.adapter(made / "model", made / "adapter")
    return made


Train = Callable[..., host.Run]
RunOf = Callable[[str], host.Run]


@pytest.fixture(scope="module")
def train(warm: Warm, warm_ranks: Ranks) -> Train:
    """A function that trains with a config in a layout, in forks."""

    def run(settings: dict[str, Any], kind: str, **kwargs: Any) -> host.Run:
        return host.train(settings, kind, by=warm if kind == "single" else warm_ranks, **kwargs)

    return run


@pytest.fixture(scope="module")
def run_of(folder: Path, train: Train) -> RunOf:
    """A function that gives a layout's run, which it makes once for all tests of this module."""
    runs: dict[str, host.Run] = {}

    def run(name: str) -> host.Run:
        if name not in runs:
            kind = name.partition("-")[0]
            runs[name] = (host.train if name in LAUNCHED else train)(settings_of(name, folder), kind)
        return runs[name]

    return run


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    """Returns a layout's config."""
    changes: dict[str, Any] = host.layout(name, folder)
    if name.endswith("-lora"):
        changes["lora_model_dir"] = str(folder / "adapter")
    if name in TILED:
        changes["plugins"] = ["tiled.TiledPlugin", *changes["plugins"]]
    # of the very rows that are trained on, so that their number stays
    changes["test_datasets"] = [{**entry, "split": "train"} for entry in host.config(folder)["datasets"]]
    spin = {
        "iterations": ITERATIONS,
        "beta": [0.5, 0.5, 1.0][:ITERATIONS],
        "eval_prompts": HELD_OUT,
        "generation": {"max_new_tokens": 10, "batch_size": 8, "gather_weights": GATHER.get(name, "auto")},
    }
    return {**host.config(folder), **changes, "spin": spin}


@pytest.mark.parametrize("name", ["zero3", "zero3-lora", "fsdp2", "fsdp2-lora"])
def test_sharded_weights_are_gathered_where_they_fit_or_as_asked(name: str, folder: Path, run_of: RunOf) -> None:
    """That both ways give the same answers and log-probs is what the tests below show."""
    run = run_of(name)
    gathered = run.output.count("sharded weights are gathered for the phase")
    # answering and scoring: in each iteration, at its end on held-out prompts, and on those before the first
    assert gathered == (0 if GATHER.get(name) is False else 2 * (2 * ITERATIONS + 1))


@pytest.mark.parametrize("name", ALL)
def test_first_step_of_every_iteration_is_ln_2(name: str, folder: Path, run_of: RunOf) -> None:
    """37 prompts: 10 steps, then 74 pairs and 19 steps each time; the LoRA runs have a dropout that must be off."""
    run, firsts = run_of(name), [0, 10, 29][:ITERATIONS]
    losses = run.losses()
    assert len(losses) == 10 + 19 * (ITERATIONS - 1)
    assert [losses[step] for step in firsts] == pytest.approx([LN2] * ITERATIONS, abs=1e-5)
    assert [run.metrics(i)["loss_first"] for i in range(ITERATIONS)] == pytest.approx([LN2] * ITERATIONS, abs=1e-5)
    assert min(losses) < 0.68
    assert "is off by" not in run.output
    restarts = [row["learning_rate"] for row in run.logs() if "loss" in row]
    assert [restarts[step] for step in firsts] == [0.0] * ITERATIONS
    assert max(restarts) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ON_TWO)
def test_layouts_agree(name: str, folder: Path, run_of: RunOf) -> None:
    run = run_of(name)
    single = run_of("single-lora" if name.endswith("-lora") else "single")
    for iteration in range(ITERATIONS):
        for column in ("prompt_ids", "chosen_ids", "rejected_ids", "finish_reason", "generated_in", "row"):
            assert run.pairs(iteration)[column] == single.pairs(iteration)[column], (iteration, column)
    assert run.losses() == pytest.approx(single.losses(), abs=1e-4)
    # one sum over the bits of the start's weights, however they are sharded
    assert run.pairs(0).schema.metadata[WEIGHTS] == single.pairs(0).schema.metadata[WEIGHTS] != b""


@pytest.mark.once
def test_agreement_shows_that_every_optimizer_restarts(folder: Path, run_of: RunOf, train: Train) -> None:
    """With the moments of iteration 0 kept, iteration 1 takes other steps, far beyond the layouts' tolerance.

    On the default host alone, since it is about how sharp the comparison of the layouts is.
    """
    single = run_of("single")
    settings = {**host.config(folder), **host.layout("single", folder), "output_dir": str(folder / "kept")}
    spin = {
        "iterations": 2,
        "beta": 0.5,
        "restart_optimizer": False,
        "generation": {"max_new_tokens": 10, "batch_size": 8},
    }
    kept = train({**settings, "spin": spin}, "single")
    assert kept.losses()[:11] == pytest.approx(single.losses()[:11], abs=1e-6)
    assert max(abs(a - b) for a, b in zip(kept.losses()[11:], single.losses()[11:29], strict=True)) > 2e-3


def starting_model(name: str, folder: Path, run: host.Run, iteration: int) -> torch.nn.Module:
    """Loads the model that an iteration started from, as a user would, from disk."""
    saved = run.out / "spin" / f"iteration-{iteration - 1}" / "model"
    if name.endswith("-lora"):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        return PeftModel.from_pretrained(base, folder / "adapter" if iteration == 0 else saved).eval()
    return AutoModelForCausalLM.from_pretrained(
        folder / "model" if iteration == 0 else saved, dtype=torch.float32
    ).eval()


@torch.no_grad()
def plain_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    """The chain rule over one unpadded sequence."""
    logps = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


@pytest.mark.parametrize("name", ALL)
def test_the_opponent_is_the_model_the_iteration_started_from(name: str, folder: Path, run_of: RunOf) -> None:
    """Kept rows included; and the test could tell: the model before or after gives other values."""
    run = run_of(name)
    for iteration in range(ITERATIONS):
        model = starting_model(name, folder, run, iteration)
        rows = run.pairs(iteration).to_pylist()
        assert sorted({row["generated_in"] for row in rows}) == ([0] if iteration == 0 else [iteration - 1, iteration])
        for kind in ("chosen", "rejected"):
            expected = [plain_logp(model, row["prompt_ids"], row[f"{kind}_ids"]) for row in rows]
            found = [row[f"opponent_{kind}_logp"] for row in rows]
            assert found == pytest.approx(expected, abs=1e-3)
        after = starting_model(name, folder, run, iteration + 1)
        moved = [plain_logp(after, r["prompt_ids"], r["chosen_ids"]) - r["opponent_chosen_logp"] for r in rows]
        assert np.abs(moved).mean() > 0.05


@pytest.mark.parametrize("name", ALL)
def test_held_out_play_is_the_resulting_models(name: str, folder: Path, run_of: RunOf) -> None:
    """The same answers in every layout, with the log-probs of the model that the iteration resulted in."""
    run, single = run_of(name), run_of("single-lora" if name.endswith("-lora") else "single")
    for iteration in range(ITERATIONS):
        played, expected = run.heldout(iteration), single.heldout(iteration)
        assert played.num_rows == HELD_OUT
        for column in ("prompt_ids", "human_ids", "own_ids", "finish_reason", "row", "own"):
            assert played[column] == expected[column], (iteration, column)
        model = starting_model(name, folder, run, iteration + 1)
        for kind in ("human", "own"):
            logps = [plain_logp(model, row["prompt_ids"], row[f"{kind}_ids"]) for row in played.to_pylist()]
            assert played[f"{kind}_logp"].to_pylist() == pytest.approx(logps, abs=1e-3)
        for figure in ("margin", "auc", "distinct_2", "length"):
            key = f"spin/heldout_{figure}"
            assert run.metrics(iteration)[key] == pytest.approx(single.metrics(iteration)[key], abs=2e-2)


@pytest.mark.parametrize("name", ALL)
def test_the_final_model_is_the_last_iterations(name: str, folder: Path, run_of: RunOf) -> None:
    run = run_of(name)
    last = starting_model(name, folder, run, ITERATIONS)
    if name.endswith("-lora"):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        final = PeftModel.from_pretrained(base, run.out).eval()
    else:
        final = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32).eval()
    ids = torch.arange(7, 20)[None]
    assert torch.allclose(final(ids).logits, last(ids).logits, atol=1e-5)
    start = starting_model(name, folder, run, 0)
    assert not torch.allclose(final(ids).logits, start(ids).logits, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_answers_are_samples_that_end_where_they_should(name: str, folder: Path, run_of: RunOf) -> None:
    end = tiny.tokenizer().eos_token_id
    for row in run_of(name).pairs(ITERATIONS - 1).to_pylist():
        ids = row["rejected_ids"]
        assert 1 <= len(ids) <= 10
        assert end not in ids[:-1]
        assert (row["finish_reason"] == "stop") == (ids[-1] == end)
        assert row["chosen_ids"][-1] == end
        assert row["prompt"].endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("name", "then", "ranks"), [("ddp", "single", 1), ("zero3", "zero3", 2), ("fsdp2", "fsdp2", 1)]
)
def test_a_run_of_which_one_rank_is_killed_goes_on(
    name: str, then: str, ranks: int, folder: Path, run_of: RunOf, train: Train, warm: Warm, warm_ranks: Ranks
) -> None:
    """In mid-iteration 1, as the system does it when memory runs out; the launcher stops the other. For DDP it is the true
    one, on the default host.

    DDP's and FSDP2's go on with a single rank, where the global batch stays what it was.
    """
    whole = run_of(name)
    settings = {**settings_of(name, folder), "output_dir": str(folder / f"{name}-{then}")}
    settings["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    launched = name == "ddp" and host.DEFAULT
    fault = {"SPIN_KILL": "iteration 1/second epoch", "SPIN_KILL_RANK": "1"}
    killed = (host.train if launched else train)(settings, name, env=fault, fails=True)
    assert "killed at: iteration 1/second epoch" in killed.output
    by = warm if then == "single" else Ranks(warm_ranks.warm[:ranks])
    resumed = host.train({**settings, "micro_batch_size": 2 // ranks}, then, by=by)
    assert "going on from" in resumed.output and "using the pairs in" in resumed.output
    for iteration in range(ITERATIONS):
        for column in ("rejected_ids", "finish_reason", "generated_in", "row"):
            assert resumed.pairs(iteration)[column] == whole.pairs(iteration)[column]
        assert resumed.heldout(iteration)["own_ids"] == whole.heldout(iteration)["own_ids"]
    assert resumed.losses() == pytest.approx(whole.losses(), abs=1e-5)
