"""`axolotl spin plan`: the figures it tells are those of the run that follows, or say where they come from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import host
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from axolotl.loaders import ModelLoader
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from optimi import StableAdamW
from rows import PAIR, ids_file, load
from warm import Warm

from axolotl_spin.commands.plan.advice import Facts, advise
from axolotl_spin.commands.plan.estimate import _disk, _pure_half, _tokens
from axolotl_spin.commands.plan.lengths import describe_lengths, heaviest, limits, repeated
from axolotl_spin.commands.plan.memory import Load, estimate_memory, saved_bytes
from axolotl_spin.commands.plan.size import ModelSize, model_size
from axolotl_spin.commands.plan.timing import Rate, Tokens, estimate_time, measure
from axolotl_spin.data.prompts import token_counts
from axolotl_spin.data.slices import prompt_slice
from axolotl_spin.disk.atomic import write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.run.plan import make_plan
from axolotl_spin.settings.spin import SpinConfig
from axolotl_spin.training.layouts import PairCollator, shared_mask_size

ENV = host.environment(ACCELERATE_USE_CPU="true")
DATA = host.SHARED / "data"


def planned(warm: Warm, settings: dict[str, Any], *options: str) -> dict[str, Any]:
    """Returns the plan, which is all that the command prints to standard output."""
    path = host.write(settings)
    command = ("axolotl_spin", "plan", str(path), "--json", *options)
    code, output = warm.run(*command, env=ENV, cwd=path.parent, errors=path.parent / "plan.err")
    assert code == 0, output[-5000:]
    return json.loads(output)


def agrees(plan: dict[str, Any], run: host.Run) -> None:
    """Checks rows, steps, epochs, betas and learning rates against `plan.json`, the pairs and what the trainer logged."""
    kept = json.loads((run.out / "spin" / "plan.json").read_text())
    assert plan["iterations"] == kept["iterations"] and plan["total_steps"] == kept["completed_steps"]
    rows = [row for row in run.logs() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, plan["total_steps"] + 1))
    for entry in plan["iterations"]:
        steps = rows[entry["first_step"] : entry["first_step"] + entry["steps"]]
        assert max(row["learning_rate"] for row in steps) == entry["learning_rate"]
        assert {row["spin/iteration"] for row in steps} == {entry["iteration"]}
        pairs = run.pairs(entry["iteration"])
        assert len(pairs) == entry["rows"]
        new = pairs["generated_in"].to_numpy() == entry["iteration"]
        assert (new.sum(), (~new).sum()) == (entry["new_rows"], entry["kept_rows"])
        begun = [
            row["spin/beta"]
            for row in run.logs()
            if row.get("spin/beta") and row["spin/iteration"] == entry["iteration"]
        ]
        assert begun[0] == entry["beta"]


@pytest.mark.host
def test_what_is_planned_is_what_is_run(warm: Warm, tmp_path: Path) -> None:
    """Rows and steps before; afterwards also speed, tokens as drawn, and that the run is complete."""
    settings = {
        **host.config(tmp_path, rows=13), "num_epochs": 2, "spin": {"iterations": 3, "beta": [0.1, 0.2, 5.0],
        "learning_rate": [1e-3, 5e-4, 1e-4], "history": 2, "generation": {"max_new_tokens": 6, "batch_size": 8}},
    }  # fmt: skip
    settings["spin"]["initial_pairs"] = str(ids_file(tmp_path / "given.parquet", [PAIR] * 9))
    plan = planned(warm, settings)
    assert [entry["rows"] for entry in plan["iterations"]] == [9, 22, 35]
    said = (tmp_path / "plan.err").read_text()
    assert "[axolotl.cli.config] config:" in said and "Tokenizing Prompts" in said and '"global_batch"' not in said
    assert plan["folder"]["holds"] == "no run" and not list((tmp_path / "out").iterdir())
    assert plan["time"]["total_seconds"] is None
    run = host.train(settings, by=warm)
    agrees(plan, run)
    log = (run.out / "debug.log").read_bytes()
    after = planned(warm, settings, "--generation-tokens-per-second", "100")
    assert after["folder"]["holds"] == "this run, complete"
    rates = after["time"]["rates"]
    assert rates["generation"] == {"tokens_per_second": 100, "source": "given"}
    assert rates["training"]["source"].startswith("measured in iteration 2 of ")
    pairs, seconds = run.pairs(2), run.metrics(2)["spin/training_seconds"]
    tokens = sum(len(row) for name in ("prompt_ids", "chosen_ids", "rejected_ids") for row in pairs[name].to_pylist())
    assert rates["training"]["tokens_per_second"] == pytest.approx(2 * tokens / seconds)
    # as drawn in iteration 2; the given pairs are 10 tokens each and draw nothing
    drawn = run.metrics(2)["spin/rejected_length"] * 13
    assert after["tokens"][0] == {"iteration": 0, "drawn": [0.0, 0.0], "pairs": [90.0, 90.0]}
    assert after["tokens"][1]["drawn"] == pytest.approx([drawn, drawn])
    assert after["time"]["iterations"][1]["generation_seconds"] == pytest.approx([drawn / 100] * 2)
    changed = planned(warm, {**settings, "seed": 8}, "--ranks", "2")
    assert changed["global_batch"] == 8 and changed["folder"]["holds"] == "another run"
    assert "seed: 7 -> 8" in changed["folder"]["changes"]
    assert (run.out / "debug.log").read_bytes() == log and b"Loading model" in log


@pytest.mark.once
@pytest.mark.host
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data is not in {DATA}")
def test_real_data(warm: Warm, tmp_path: Path) -> None:
    """300 questions and answers that people wrote, in words of a tiny vocabulary."""
    data = [{"path": str(DATA / "dolly_openqa_short_heldout.jsonl"), "ds_type": "json", "type": "chat_template"}]
    settings = {
        **host.config(tmp_path), "datasets": data, "sequence_len": 160, "micro_batch_size": 16, "warmup_steps": 3,
        "spin": {"iterations": 2, "history": 1, "generation": {"max_new_tokens": 3, "batch_size": 64}},
    }  # fmt: skip
    plan = planned(warm, settings)
    agrees(plan, host.train(settings, by=warm))
    assert plan["lengths"]["prompt"]["total"] + plan["lengths"]["human_answer"]["total"] > 5000
    # nearly every human answer has more than three tokens
    assert any(item["key"] == "spin.generation.max_new_tokens" for item in plan["advice"])


@pytest.mark.once
@pytest.mark.host
def test_human_answers_without_an_end_are_counted(warm: Warm, tmp_path: Path) -> None:
    """Rows are cut at 12 tokens: a prompt of 2 words leaves room for an answer of 6 and its end, one of 8 does not. One
    more row has no answer."""
    cut = {"sequence_len": 12, "excess_length_strategy": "truncate"}
    settings = {**host.config(tmp_path), **cut}
    with (tmp_path / "data.jsonl").open("a") as data:
        turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": ""}]
        data.write(json.dumps({"messages": turns}) + "\n")
    endings = planned(warm, settings)["endings"]
    assert (endings["rows"], endings["unanswered"]) == (38, 1)
    assert endings["answers"] == 37 and 0 < endings["without"] == endings["cut"] < 37
    assert f"{endings['cut']} are cut by `sequence_len: 12`" in endings["text"]
    code, output = warm.run("axolotl_spin", "plan", str(tmp_path / "out.yml"), env=ENV, cwd=tmp_path)
    assert code == 0 and f"{endings['without']} of 37 human answers have no end token among their labels" in output
    assert "1 of 38 rows have no trained answer" in output


def test_tokens_are_those_of_the_prompts_that_are_answered(tmp_path: Path) -> None:
    """As many as the human answers have, or all 10 that there is room for; the second iteration has both's pairs."""
    spin = {"iterations": 2, "prompts_per_iteration": 5, "generation": {"max_new_tokens": 10}}
    run = load(tmp_path, spin=spin)[0]
    prompts, answers = (token_counts(run.prompts, name) for name in ("prompt_ids", "chosen_ids"))
    found = _tokens(run, prompts, answers, np.full(37, 10), None)
    parts = [prompt_slice(37, 5, number, seed=7) for number in range(2)]
    asked = [float((prompts + answers)[part].sum()) for part in parts]
    human = [float(answers[part].sum()) for part in parts]
    assert [tokens.drawn for tokens in found] == [(human[0], 50.0), (human[1], 50.0)]
    assert found[0].pairs == (asked[0] + human[0], asked[0] + 50)
    assert found[1].pairs == (sum(asked) + sum(human), sum(asked) + 100)
    assert _tokens(run, prompts, answers, np.full(37, 10), 3.0)[1].drawn == (15.0, 15.0)  # as measured


@pytest.mark.once
@pytest.mark.host
def test_for_people(warm: Warm, tmp_path: Path) -> None:
    """20 of 37 prompts each time: 5, then 10 steps; a schedule three times as long."""
    settings = {**host.config(tmp_path), **host.LORA}
    settings["spin"] |= {"prompts_per_iteration": 20, "schedule_epochs": 3, "loss": "space"}
    (tmp_path / "model" / "model.safetensors").unlink()  # weights are not read
    path = host.write(settings)
    speeds = [
        "--generation-tokens-per-second",
        "50",
        "--scoring-tokens-per-second",
        "1e3",
        "--training-tokens-per-second",
    ]
    code, output = warm.run("axolotl_spin", "plan", str(path), *speeds, "100", env=ENV, cwd=tmp_path)
    assert code == 0, output[-3000:]
    for phrase in (
        "Plan: 15 steps of 4 pairs",
        "each iteration answers 20 of 37 prompts, others each time until all have had their turn, after 2 iterations",
        "over 3 epochs of an iteration, of which 1 are run: in iteration 1 over 30 steps, of which 10 are taken",
        "tokens of a human answer: ",
        "an answer has at most 10 tokens and ends at sequence_len 64: 0 human answers are longer, 0 prompts",
        "25,696 parameters, 4,096 trained",
        "generation: 50 tokens/s (given)",
        "holds no run",
        "gradient_accumulation_steps: iteration 0 has 5 steps of 4 pairs",
    ):
        assert phrase in output, phrase


@pytest.mark.host
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spin": {"iterations": 0}}, "spin.iterations"),
        ({"rl": None, "spin": None}, "does not say `rl: spin`"),
        ({"spin": {"initial_pairs": "nowhere"}}, "`spin.initial_pairs: nowhere` cannot be read"),
        ({"sequence_len": 2}, "sequence_len"),
    ],
)
def test_bad_configs_are_told_without_a_traceback(change: dict, message: str, warm: Warm, tmp_path: Path) -> None:
    settings = {key: value for key, value in {**host.config(tmp_path), **change}.items() if value is not None}
    path = host.write(settings)
    code, output = warm.run("axolotl_spin", "plan", str(path), env=ENV, cwd=tmp_path)
    assert code == 1 and "Error: " in output and message in output[output.rindex("Error: ") :], output[-2000:]


@pytest.mark.host
@pytest.mark.skipif(not host.OURS, reason="this host finds the plugin by itself")
def test_a_config_that_does_not_load_the_plugin(warm: Warm, tmp_path: Path) -> None:
    """The host then knows no `rl: spin`, and lists the types that it knows."""
    settings = host.config(tmp_path)
    del settings["plugins"]
    path = host.write(settings)
    code, output = warm.run("axolotl_spin", "plan", str(path), env=ENV, cwd=tmp_path)
    said = output[output.rindex("Error: ") :]
    assert code == 1 and said.startswith(
        f"Error: {path}: the host has not loaded the plugin: add `plugins: [axolotl_spin."
    )


def test_lengths_by_hand() -> None:
    """1, 2, 3, 3, 8, 20: bins 1, 2-3, 4-7, 8-15, 16-31."""
    found = describe_lengths(np.array([3, 1, 20, 2, 8, 3]))
    assert [(entry["from"], entry["to"], entry["count"]) for entry in found["histogram"]] == [
        (1, 1, 1), (2, 3, 3), (4, 7, 0), (8, 15, 1), (16, 31, 1),
    ]  # fmt: skip
    assert (found["total"], found["min"], found["median"], found["p95"], found["max"]) == (37, 1, 3, 20, 20)
    assert limits(np.array([5, 60, 64, 70]), max_new_tokens=10, sequence_len=64).tolist() == [10, 4, 1, 1]
    assert limits(np.array([5]), max_new_tokens=None, sequence_len=2048).tolist() == [512]


@pytest.mark.parametrize(
    ("layout", "longest", "both"),
    # 10 + 3 + 5 tokens and 4 + 9 + 2; a prompt more each; rows of 10 + 5 and of 4 + 9, as wide as the first
    [("shared", 18, 18 + 15), ("packed", 28, 28 + 19), ("padded", 2 * 15, 4 * 15)],
)
def test_tokens_of_a_micro_batch_are_those_of_its_layout(layout: Any, longest: int, both: int) -> None:
    prompts, answers, most = np.array([4, 10]), np.array([9, 3]), np.array([2, 5])
    first, tokens = heaviest(prompts, answers, most, layout=layout, pairs=1)
    assert (first.tolist(), tokens) == ([1], longest)
    assert heaviest(prompts, answers, most, layout=layout, pairs=2)[1] == both
    pairs = [
        {"prompt_ids": [1] * asked, "chosen_ids": [2] * human, "rejected_ids": [3] * own}
        for asked, human, own in zip(prompts, answers, most, strict=True)
    ]
    collate = PairCollator(0, layout, hidden_size=10**6)
    assert [collate(rows)["input_ids"].numel() for rows in (pairs[1:], pairs)] == [longest, both]


def test_what_repeats() -> None:
    """Lists of the same tokens cut elsewhere are others."""
    rows = [([5, 6], [7]), ([5], [6, 7]), ([5, 6], [7]), ([5, 6], [8]), ([5, 6, 7], [])]
    columns = dict(zip(("prompt_ids", "chosen_ids"), map(list, zip(*rows, strict=True)), strict=True))
    assert repeated(Dataset.from_dict(columns)) == (2, 1)


class Cfg(dict):
    """A config as the host gives it: missing keys are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def test_models_are_counted_from_their_config_alone(tmp_path: Path) -> None:
    """Embeddings and head 47 x 32 each; a layer 2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 64 + 2 x 32; the last norm 32.

    LoRA of rank 4 adds to a layer 4 x (in + out): 64 + 48 + 48 + 64 for attention, 3 x 96 for the rest.
    """
    folder = tiny.save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    base = Cfg(base_model=str(folder), base_model_config=str(folder), torch_dtype=torch.float32)
    size = model_size(base)
    count = 2 * 47 * 32 + 2 * layer + 32
    both = dict.fromkeys(("outside", "trained_outside", "upcast", "trained_upcast"), 2 * 47 * 32)
    assert size == ModelSize(count, count, 0, 2, 32, 47, 2 * 2 * 2 * 8, 64, head=47 * 32, embedding=47 * 32, **both)
    lora = model_size(Cfg(base, **host.LORA))
    assert lora.trainable == 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96) == 4096
    assert lora.parameters == size.parameters + 4096
    quantised = model_size(Cfg(base, **{**host.LORA, "adapter": "qlora", "load_in_4bit": True}))
    assert quantised.quantised == 2 * (layer - 2 * 32)
    # of all that is not named nothing is trained; an adapter's weights have names of their own
    part = model_size(Cfg(base, unfrozen_parameters=["^lm_head.weight$", "model.layers.1"]))
    assert (part.parameters, part.trainable, part.trained_outside) == (count, 47 * 32 + layer, 47 * 32)
    assert (part.upcast, part.trained_upcast, part.embedding) == (2 * 47 * 32, 47 * 32, 0)
    mixed = model_size(Cfg(base, **host.LORA, unfrozen_parameters=["base_model.model.model.layers.0"]))
    assert (mixed.parameters, mixed.trainable) == (count + 4096, layer + 2048)
    layouts = {"eager": "shared", "fp8": "shared", "flash_attention_2": "packed", "xformers": "padded"}
    assert {name: model_size(Cfg(base, attn_implementation=name)).layout for name in layouts} == layouts
    assert model_size(Cfg(base, sample_packing=False)).layout == "padded"


@pytest.mark.parametrize(
    ("changes", "width"),
    [({}, 4), ({"attn_needs_dtype_cast": True}, 2), ({"cut_cross_entropy": True}, 2), ({"fsdp_config": {}}, 2)],
)
def test_embeddings_are_as_wide_as_the_host_loads_them(changes: dict[str, Any], width: int, tmp_path: Path) -> None:
    """In bf16 its loader takes them to fp32, and back where something asks for it. Norms too, which are not counted."""
    folder = tiny.save(tmp_path / "model")
    base = {"base_model": str(folder), "base_model_config": str(folder), "torch_dtype": torch.bfloat16, "bf16": True}
    loader: Any = ModelLoader.__new__(ModelLoader)
    loader.cfg, loader.model = DictDefault({**base, **changes}), tiny.model(47).bfloat16()
    loader.model_config = loader.model.config
    loader._configure_embedding_dtypes()
    assert loader.model.lm_head.weight.itemsize == loader.model.model.embed_tokens.weight.itemsize == width
    held = {name: weight.numel() * weight.itemsize for name, weight in loader.model.named_parameters()}
    norms = {name: weight.numel() * 2 for name, weight in loader.model.named_parameters() if "norm" in name}
    expected = sum({**held, **norms}.values())
    sharding = "FSDP2" if "fsdp_config" in changes else None
    found = estimate_memory(model_size(loader.cfg), loader.cfg, Load(1, sharding, 10, 4, 6))
    assert (
        found["weights"] == found["gradients"] == expected == saved_bytes(model_size(loader.cfg), loader.cfg, sharding)
    )


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3", "gemma3n_text"])
def test_the_cache_of_keys_and_values_is_counted_as_it_is_kept(name: str, tmp_path: Path) -> None:
    """By one layer of two, the other's being linear; as latent vectors; by two layers of four, which share theirs."""
    if why := architectures.lacking(name):
        pytest.skip(why)
    model = architectures.save(name, tmp_path)
    cache = model(input_ids=torch.tensor([[7, 8, 9]]), use_cache=True).past_key_values
    kept = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    numbers = sum(part.numel() for part in kept if isinstance(part, torch.Tensor))
    base = Cfg(base_model=str(tmp_path), base_model_config=str(tmp_path), is_multimodal=name == "qwen3_5")
    assert model_size(base).kv_per_token * 3 == numbers > 0


def test_experts_are_quantised_where_that_is_asked_for(tmp_path: Path) -> None:
    """Two layers of four experts, each 2 x 32 x 32 and 32 x 32, in tensors of their own, which no linear layer is."""
    if why := architectures.lacking("qwen3_moe"):
        pytest.skip(why)
    architectures.save("qwen3_moe", tmp_path)
    base = Cfg(base_model=str(tmp_path), base_model_config=str(tmp_path), load_in_4bit=True)
    plain, packed = model_size(base), model_size(Cfg(base, quantize_moe_experts=True))
    assert plain.experts == packed.experts == 2 * 4 * 3 * 32 * 32
    assert packed.quantised == plain.quantised + plain.experts


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_of_a_model_that_takes_more_the_language_model_is_trained(name: str, tmp_path: Path) -> None:
    model = architectures.save(name, tmp_path)
    parts = [model.get_decoder(), model.get_output_embeddings()]
    text = {id(weight): weight.numel() for part in parts for weight in part.parameters()}
    base = Cfg(base_model=str(tmp_path), base_model_config=str(tmp_path), is_multimodal=True)
    size = model_size(base)
    assert (size.parameters, size.trainable) == (model.num_parameters(), sum(text.values()))
    assert size.parameters > size.trainable and (size.layers, size.hidden, size.vocabulary) == (2, 32, 47)
    longer = model_size(Cfg(base, sequence_len=64)).layout  # a window of 8 tokens in the one, none in the other
    assert (size.layout, longer) == ("shared", {"gemma3": "padded", "mistral3": "shared"}[name])


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("adamw_torch", torch.optim.AdamW, torch.float32),
        ("rmsprop", torch.optim.RMSprop, torch.float32),
        ("sgd", torch.optim.SGD, torch.float32),
        ("stable_adamw", partial(StableAdamW, triton=False), torch.bfloat16),
    ],
)
def test_optimizer_state_is_what_is_kept(name: str, make: Any, kind: torch.dtype) -> None:
    model = tiny.model(47).to(kind)
    optimizer = make(model.parameters(), lr=1e-3)
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    expected = sum(value.numel() * value.element_size() for value in kept if value.dim())
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    count = sum(weight.numel() for weight in model.parameters())
    size = ModelSize(count, count, 0, 2, 32, 47, 64)
    found = estimate_memory(size, Cfg(optimizer=name, torch_dtype=kind), Load(1, None, 100, 40, 80))
    assert (found["optimizer"], found["weights"], found["gradients"]) == (expected, weights, weights)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        # 1000 weights in bf16, of which 150 are an embedding; bitsandbytes keeps 32 bits of that
        ({"optimizer": "adamw_bnb_8bit"}, 2 * (850 + 4 * 150)),
        ({"optimizer": "lion_8bit"}, 850 + 4 * 150),
        ({"optimizer": "adamw_torch_8bit"}, 2 * 1000),
        ({"optimizer": "ao_adamw_8bit"}, 2 * 1000),
        # and 32 bits of all where the name says so, or nothing
        ({"optimizer": "paged_adamw_32bit"}, 2 * 4 * 1000),
        ({"optimizer": "lion_32bit"}, 4 * 1000),
        ({"optimizer": "rmsprop_bnb"}, 4 * 1000),
        ({"optimizer": "rmsprop"}, 2 * 1000),
        ({"optimizer": "rmsprop", "optim_args": "momentum=0.9, centered=true"}, 3 * 2 * 1000),
        ({"optimizer": "sgd", "optim_args": {"momentum": 0.9}}, 2 * 1000),
        ({"optimizer": "sgd", "optim_args": {"momentum": 0}}, 0),
        ({"optimizer": "came_pytorch"}, 4 * 1000),
        ({"optimizer": "adafactor"}, 0),
        ({"optimizer": "grokadamw"}, 0),
        # two moments, and what rounding took
        ({"optimizer": "stable_adamw"}, 3 * 2 * 1000),
        ({"optimizer": "optimi_adamw", "optim_args": {"kahan_sum": False}}, 2 * 2 * 1000),
        ({"optimizer": "stable_adamw", "torch_dtype": torch.float32}, 2 * 4 * 1000),
        ({"optimizer": "flash_adamw"}, None),
        ({"optimizer": "ademamix_8bit"}, None),
    ],
)
def test_optimizer_state_by_hand(cfg: dict[str, Any], expected: int | None) -> None:
    size = ModelSize(1000, 1000, 0, 2, 10, 50, 40, embedding=150)
    found = estimate_memory(size, Cfg({"torch_dtype": torch.bfloat16, **cfg}), Load(1, None, 10, 4, 6))
    assert found["optimizer"] == expected


SIZE = ModelSize(1000, 1000, 0, 2, 10, 50, 40)
ADAPTED = ModelSize(1000, 100, 800, 2, 10, 50, 40)
TOWER = ModelSize(1000, 600, 0, 2, 10, 50, 40, towers=400)
ENDS = {"outside": 300, "trained_outside": 300, "upcast": 300, "trained_upcast": 300}
EXPERTS = ModelSize(1000, 100, 200, 2, 10, 50, 40, experts=600)
QLORA = {"adapter": "qlora", "load_in_4bit": True}
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
AWAY = {"fsdp_config": {"offload_params": True}}


@pytest.mark.parametrize(
    ("size", "sharding", "cfg", "expected", "beside"),
    [
        # bf16 weights, gradients and state, on every rank; DDP's buckets hold the gradients once more
        (SIZE, None, {}, (2000, 2 * 2000, 4000), 13000 + 2000),
        # a frozen tower of 400 is held, and nothing of it but the weights
        (TOWER, None, {}, (2000, 2 * 1200, 2400), 13000 + 1200),
        # 300 of embeddings and head in fp32, unless something casts them back
        (ModelSize(1000, 1000, 0, 2, 10, 50, 40, **ENDS), None, {}, (2600, 2 * 2600, 5200), 13000 + 2600),
        (ModelSize(1000, 1000, 0, 2, 10, 50, 40, **ENDS), "ZeRO-2", {}, (2000, 500, 3000), 13000),
        # 2 bytes of weights and gradients, 12 of copy and moments; ZeRO-1 shares the last, 2 the gradients, 3 all
        (SIZE, "ZeRO-1", {}, (2000, 2000, 3000), 13000),
        (SIZE, "ZeRO-2", {}, (2000, 500, 3000), 13000),
        (SIZE, "ZeRO-3", {}, (500, 500, 3000), 13000),
        # three layers' weights and gradients of 500, and the first of 10 x 40 in the MLP
        (SIZE, "FSDP2", {}, (500, 500, 1000), 13000 + 2 * (3 * 500 + 400)),
        # shared by two ranks, of which there are two pairs
        (SIZE, "FSDP2", {"dp_shard_size": 2}, (1000, 1000, 2000), 13000 + 2 * (3 * 500 + 400)),
        (SIZE, "FSDP2", {"dp_replicate_size": 2}, (1000, 1000, 2000), 13000 + 2 * (3 * 500 + 400)),
        # and of several micro-batches the whole gradients, of the earlier ones, beside all that
        (SIZE, "FSDP2", {"gradient_accumulation_steps": 2}, (500, 2000, 1000), 13000 + 2 * (3 * 500 + 400) + 2000),
        (SIZE, None, {"optimizer": "adamw_bnb_8bit"}, (2000, 2 * 2000, 2000), 13000 + 2000),
        (SIZE, None, {"optimizer": "muon"}, (2000, 2 * 2000, None), 13000 + 2000),
        # gradients are where the optimizer takes its step
        (SIZE, "ZeRO-1", {"deepspeed": OFFLOADED}, (2000, 2000, 0), 13000),
        (SIZE, "ZeRO-2", {"deepspeed": OFFLOADED}, (2000, 0, 0), 13000),
        (SIZE, "ZeRO-3", {"deepspeed": OFFLOADED}, (500, 0, 0), 13000),
        (SIZE, "FSDP2", AWAY, (0, 0, 0), 13000 + 2 * (3 * 500 + 400)),
        (SIZE, "FSDP2", {**AWAY, "gradient_accumulation_steps": 2}, (0, 2000, 0), 13000 + 2 * (3 * 500 + 400) + 2000),
        # 100 frozen in bf16, 800 in 4 bits, 100 trained in fp32; two numbers less of each norm
        (ADAPTED, None, QLORA, (200 + 412 + 400, 2 * 400, 800), 13000 - 2 * 2 * 200 + 400),
        # 100 frozen in bf16, 200 in 4 bits, 100 trained and 600 of experts in fp32; in bf16 where PEFT does not cast them
        (EXPERTS, None, QLORA, (200 + 103 + 400 + 2400, 2 * 400, 800), 13000 - 2 * 2 * 200 + 400),
        (EXPERTS, "ZeRO-3", QLORA, ((200 + 103 + 400 + 1200) // 4, 50, 300), 13000 - 2 * 2 * 200),
    ],
)  # fmt: skip
def test_memory_of_each_layout_by_hand(
    size: ModelSize, sharding: str | None, cfg: dict, expected: tuple, beside: int
) -> None:
    """10 tokens, 10 wide, 40 in the MLP. A layer keeps 2 x 100 numbers in fp32 and 8 x 100 + 4 x 400 in bf16, 5600 bytes.
    The backward pass makes 100 + 2 x 400 more, 1800. Both layers are kept when it begins, and no gradient is there yet."""
    settings = Cfg({"optimizer": "adamw_torch", "torch_dtype": torch.bfloat16, "bf16": True, **cfg})
    found = estimate_memory(size, settings, Load(4, sharding, 10, 4, 6))
    assert (found["weights"], found["gradients"], found["optimizer"]) == tuple(expected)
    assert found["activations"] + found["gradients"] == beside
    assert (found["training"] is None) == (expected[2] is None)
    whole = 0 if sharding not in ("ZeRO-3", "FSDP2") else 2000 if size is SIZE else 200 + 103 + 400 + 1200
    assert found["answering"] == 6 * 40 * 2 + whole
    by_engine = estimate_memory(size, settings, Load(4, sharding, 10, 4, None))
    assert by_engine["answering"] is None and by_engine["training"] == found["training"]


def test_weights_that_stay_gathered_by_hand() -> None:
    """Four layers of 250: 4 x 5600 bytes are kept and 1800 made, beside three weights of a layer and 400 in the MLP.

    Two of the four layers' weights are among those; the others', 2 x 250, stay without resharding.
    """
    size = ModelSize(1000, 1000, 0, 4, 10, 50, 40)
    for reshard, stay in ((True, 0), (None, 0), (False, 2 * 2 * 250)):
        settings = Cfg(torch_dtype=torch.bfloat16, bf16=True, fsdp_config={"reshard_after_forward": reshard})
        found = estimate_memory(size, settings, Load(4, "FSDP2", 10, 4, 6))
        assert found["activations"] + found["gradients"] == 4 * 5600 + 1800 + 2 * (3 * 250 + 400) + stay


@pytest.mark.parametrize(
    ("stage", "ranks", "beside"),
    # beside 2 bytes of its part, 4; ZeRO-1 has let go of the other half then, which is counted with the gradients
    [(1, 1, 4000), (2, 1, 4000), (2, 4, 1000), (1, 2, (2 + 4) * 500 - 2000)],
)
def test_zeros_step_by_hand(stage: int, ranks: int, beside: int) -> None:
    """A token in a layer of one number: next to nothing is kept, but a step has its part of the gradients in fp32 too."""
    size = ModelSize(1000, 1000, 0, 1, 1, 2, 4, inner=1)
    settings = Cfg(optimizer="adamw_torch", torch_dtype=torch.bfloat16, bf16=True)
    assert estimate_memory(size, settings, Load(ranks, f"ZeRO-{stage}", 1, 1, 6))["activations"] == beside
    offloaded = estimate_memory(size, Cfg(settings, deepspeed=OFFLOADED), Load(ranks, f"ZeRO-{stage}", 1, 1, 6))
    assert offloaded["activations"] < 100


def test_numbers_are_as_wide_as_the_forward_has_them() -> None:
    """`bfloat16: true` is bf16 without autocast. In fp32 all takes twice as much, but for norms, which are fp32 anyway."""
    found = [
        estimate_memory(SIZE, Cfg(torch_dtype=kind, **asked), Load(1, None, 10, 4, 6))
        for kind, asked in ((torch.bfloat16, {"bf16": True}), (torch.bfloat16, {"bfloat16": True}), (torch.float32, {}))
    ]
    assert found[0]["activations"] == found[1]["activations"] == 13000 - 2000
    assert found[2]["activations"] == 2 * (800 + 2 * 4800) + 2 * 1800 - 4000
    assert [part["answering"] for part in found] == [480, 480, 960]


def test_what_iterations_take_on_disk(tmp_path: Path) -> None:
    """Two iterations, of which the first is on disk: as wide as the weights are, or an adapter's fp32."""
    run = load(tmp_path)[0]
    size = ModelSize(1000, 100, 0, 2, 10, 50, 40, upcast=300)
    cast = Cfg(torch_dtype=torch.bfloat16, attn_needs_dtype_cast=True)
    for cfg, each in (
        (cast, 2000), (Cfg(torch_dtype=torch.bfloat16), 2600), (Cfg(torch_dtype=torch.float32), 4000),
        (Cfg(cast, adapter="lora"), 400),
    ):  # fmt: skip
        assert _disk(run, cfg, size)[0] == 2 * each  # type: ignore[index]
    run.directory.model(0).mkdir(parents=True)
    assert _disk(run, cast, size)[0] == 2000  # type: ignore[index]


def test_checkpointing_keeps_what_enters_a_layer() -> None:
    """At the last layer all gradients are there, 100 numbers that entered it, and 5600 + 1800 bytes that it makes."""
    settings = Cfg(optimizer="adamw_torch", torch_dtype=torch.bfloat16, bf16=True, gradient_checkpointing=True)
    found = estimate_memory(SIZE, settings, Load(1, None, 10, 4, 6))
    assert found["activations"] == 200 + 5600 + 1800


@pytest.mark.parametrize(
    ("layout", "cfg", "mask", "expected"),
    [
        # a bool a token, and its copy in bf16 that each of two layers keeps
        ("shared", {}, 2**20, 2**20 * (1 + 2 * 2)),
        ("shared", {"gradient_checkpointing": True}, 2**20, 2**20 * (1 + 2)),
        ("shared", {"fsdp_config": {"activation_checkpointing": True}}, 2**20, 2**20 * (1 + 2)),
        # computed in parts from there on
        ("shared", {}, 2**20 + 1, 0),
        ("shared", {"attn_implementation": "sdpa", "torch_compile": True}, 2**21, 2**21 * (1 + 2 * 2)),
        ("shared", {"attn_implementation": "eager"}, 2**21, 2**21 * (1 + 2)),
        ("shared", {"attn_implementation": "flex_attention"}, 2**20, 0),
        ("packed", {"attn_implementation": "flash_attention_2"}, 2**20, 0),
        # padding always needs one
        ("padded", {"sample_packing": False}, 2**21, 2**21 * (1 + 2 * 2)),
        ("padded", {"attn_implementation": "flash_attention_2"}, 2**21, 0),
    ],
)
def test_the_mask_of_a_layout_by_hand(layout: Any, cfg: dict[str, Any], mask: int, expected: int) -> None:
    settings = Cfg({"optimizer": "adamw_torch", "torch_dtype": torch.bfloat16, "bf16": True, **cfg})
    found, without = (
        estimate_memory(SIZE, settings, Load(1, None, 10, 4, 6, pairs=8, mask=size, layout=layout))["activations"]
        for size in (mask, 0)
    )
    assert found - without == expected


def test_the_size_of_a_shared_mask() -> None:
    """One row of 800 tokens, or eight of 100."""
    assert [shared_mask_size([100] * 8, hidden) for hidden in (10**6, 1)] == [800**2, 8 * 100**2]


def test_time_by_hand(tmp_path: Path) -> None:
    """10 and 20 pairs, two epochs of 3 and 5 steps, the second cut to 9 steps by `max_steps`."""
    plan = make_plan(
        10, global_batch=4, num_epochs=2, history=1, betas=[0.1] * 2, learning_rates=[1e-3] * 2, max_steps=15
    )
    tokens = [Tokens((20, 100), (60, 140)), Tokens((20, 100), (120, 280))]
    rates = {"generation": Rate(10, "given"), "scoring": Rate(20, "given"), "training": Rate(5, "given")}
    nothing = measure(RunDirectory(tmp_path), plan)
    assert nothing.training.value is None and nothing.answer_tokens is None
    found = estimate_time(plan, tokens, SimpleNamespace(**rates))  # type: ignore[arg-type]
    assert found["iterations"][0] == {
        "iteration": 0, "generation_seconds": [2, 10], "scoring_seconds": [3, 7], "training_seconds": [24, 56],
    }  # fmt: skip
    assert found["iterations"][1]["training_seconds"] == pytest.approx([1.8 * 120 / 5, 1.8 * 280 / 5])
    assert found["total_seconds"] == pytest.approx([2 + 3 + 24 + 2 + 6 + 43.2, 10 + 7 + 56 + 10 + 14 + 100.8])
    unknown = estimate_time(plan, tokens, nothing)
    assert unknown["total_seconds"] is None and unknown["rates"]["scoring"]["source"] == "neither given nor measured"


def test_a_run_in_the_folder_is_measured_as_far_as_it_got(tmp_path: Path) -> None:
    """Iteration 1 has only generated; its speed is taken, and the others' from iteration 0: 7 + 3 tokens in 2 and 5 s."""
    directory = RunDirectory(tmp_path)
    row = {**PAIR, "prompt": "", "prompt_ids": [5, 6, 7], "chosen_ids": [8, 6], "rejected_ids": [9, 9]}
    ids_file(directory.pairs(0), [row, {**row, "rejected_ids": [9], "prompt_ids": [4], "chosen_ids": [6]}])
    assert pq.read_metadata(directory.pairs(0)).num_rows == 2
    first = {"spin/generation_tokens_per_second": 5.0, "spin/scoring_seconds": 2.0, "spin/training_seconds": 5.0}
    write_json(directory.metrics(0), {**first, "spin/rejected_length": 1.5})
    write_json(directory.metrics(1), {"spin/generation_tokens_per_second": 6.0, "spin/rejected_length": 2.5})
    plan = make_plan(2, global_batch=1, num_epochs=3, history=0, betas=[0.1] * 2, learning_rates=[1e-3] * 2)
    found = measure(directory, plan)
    assert (found.generation.value, found.scoring.value, found.training.value) == (6.0, 10 / 2, 3 * 10 / 5)
    assert "iteration 1" in found.generation.source and "iteration 0" in found.training.source
    assert found.answer_tokens == 2.5 and "rank" not in found.training.source
    # whatever is planned now: a trial of one of an epoch's two steps, on a rank and then on two
    trial = make_plan(2, global_batch=1, num_epochs=1, history=0, betas=[0.1], learning_rates=[1e-3], max_steps=1)
    write_json(directory.plan, trial.to_json())
    write_json(directory.about, {"starts": [{"ranks": 2}, {"ranks": 1}]})
    found = measure(directory, plan)
    assert (found.scoring.value, found.training.value) == (10 / 2, 10 / 2 / 5)
    assert found.training.source.endswith(" on 1 or 2 rank(s)")


def facts(rows: int = 1000, **changes: Any) -> Facts:
    """A run about which nothing is unusual, with changes to it."""
    block = {"iterations": 2, "beta": 0.1, **changes.pop("spin", {})}
    settings = SpinConfig(**block)
    batch, rate = changes.pop("batch", 8), changes.pop("rate", 5e-7)
    plan = make_plan(
        rows, global_batch=batch, num_epochs=1, history=settings.history, betas=settings.betas(),
        learning_rates=[rate] * settings.iterations, warmup=changes.pop("warmup", None),
    )  # fmt: skip
    usual: dict[str, Any] = {
        "settings": settings, "plan": plan, "prompts": np.full(rows, 50), "answers": np.full(rows, 80),
        "limits": np.full(rows, 512), "repeated": (0, 0), "adapter": None, "pure_half": False, "trained_for": 2048,
        "sequence_len": 2048, "disk": (1, 2),
    }  # fmt: skip
    return Facts(**{**usual, **changes})


def some(rows: int, usual: int, other: int, count: int) -> np.ndarray:
    return np.array([other] * count + [usual] * (rows - count))


@pytest.mark.parametrize(
    ("changes", "key", "figure"),
    [
        ({"spin": {"history": 0}}, "spin.history", "beta 0.1 with `history: 0`"),
        ({"spin": {"loss": "space"}}, "spin.beta", "at 0.1 it lies beyond it"),
        ({"spin": {"generation": {"temperature": 0.7}}}, "spin.generation", "temperature 0.7"),
        ({"spin": {"generation": {"top_k": 9}}}, "spin.generation", "top_k 9"),
        ({"rate": 2e-5}, "learning_rate", "2e-05 is high for full fine-tuning"),
        ({"rate": 2e-3, "adapter": "lora"}, "learning_rate", "high for `adapter: lora`"),
        ({"pure_half": True}, "bf16", "a step of 5e-07"),
        ({"pure_half": True, "rate": 2e-5}, "bf16", "a step of 2e-05"),
        ({"answers": some(1000, 80, 600, 60)}, "spin.generation.max_new_tokens", "60 of 1000 human answers (6%)"),
        ({"limits": some(1000, 512, 9, 3)}, "sequence_len", "3 of 1000 prompts leave fewer than 32"),
        ({"trained_for": 1024}, "sequence_len", "2048 is more than the 1024"),
        ({"repeated": (30, 30)}, "dataset_exact_deduplication", "30 of 1000 rows repeat"),
        ({"repeated": (30, 2)}, "datasets", "28 of 1000 rows have the prompt"),
        ({"answers": some(1000, 80, 2, 20)}, "datasets", "20 of 1000 human answers have at most 2"),
        ({"batch": 100}, "gradient_accumulation_steps", "iteration 0 has 10 steps of 100"),
        (
            {"warmup": {"warmup_steps": 100, "warmup_ratio": None}},
            "warmup_steps",
            "100 of the 125 steps of iteration 0",
        ),
        ({"batch": 37}, "spin.max_prompts", "iteration 0 has 1 pairs instead of 37"),
        ({"disk": (3 * 2**30, 2**30)}, "spin.save_iterations", "take 3.0 GiB, and 1.0 GiB are free"),
    ],
)
def test_advice_names_the_key_and_the_figures(changes: dict[str, Any], key: str, figure: str) -> None:
    assert advise(facts()) == [] == advise(facts(spin={"loss": "space", "beta": 1, "history": 0}))
    found = [item for item in advise(facts(**changes)) if item["key"] == key]
    assert found and figure in found[0]["text"], advise(facts(**changes))


def test_a_larger_rate_makes_up_for_few_steps() -> None:
    """Six steps may take 20/6 of the rate that many may, and are far from an optimum, which needs the history."""
    short = {"rows": 48, "spin": {"beta": 0.5, "history": 0}}
    assert advise(facts(**short, rate=2e-5)) == []
    assert [item["key"] for item in advise(facts(**short, rate=1e-5))] == ["gradient_accumulation_steps"]
    [high] = advise(facts(**short, rate=4e-5))
    assert high["key"] == "learning_rate" and "above 3.33e-05 models break easily" in high["text"]


KEPT = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
HALVED = {**KEPT, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"bf16": True}, True),
        ({"bfloat16": True}, True),
        ({}, False),
        ({"bf16": True, "adapter": "lora"}, False),
        ({"bf16": True, "fsdp_config": {"fsdp_version": 2}}, True),  # the host shards what it loaded
        ({"bf16": True, "deepspeed": KEPT}, False),
        ({"bf16": True, "deepspeed": HALVED}, True),
        ({"bf16": True, "optimizer": "optimi_adamw"}, False),
        ({"bf16": True, "optimizer": "adamw_torch_8bit"}, True),
        ({"bf16": True, "optimizer": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}, False),
        ({"bf16": True, "optimizer": "adamw_torch_8bit", "optim_args": {"bf16_stochastic_round": True}}, False),
    ],
)
def test_plan_knows_where_rounding_loses_steps(changes: dict[str, Any], lost: bool) -> None:
    from axolotl.utils.dict import DictDefault

    assert _pure_half(DictDefault(changes)) is lost
