"""Prompts with pictures, through the host's command: the game's numbers, and what only a picture tells."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import architectures
import host
import pictured
import pytest
import torch
import yaml
from axolotl.processing_strategies import get_processing_strategy
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from click.testing import CliRunner
from datasets import Dataset
from recovery import CHANGES, differences, outcome
from safetensors.torch import load_file
from warm import Ranks, Warm

from axolotl_spin.cli import spin as spin_command
from axolotl_spin.data.images import ImageRows, labels_by_headers, tokenise_row
from axolotl_spin.data.initial_pairs import read_file
from axolotl_spin.generation.backend import Sampling
from axolotl_spin.generation.chunks import Chunk
from axolotl_spin.generation.decoding import Draw
from axolotl_spin.refusals import refuse_unsupported
from axolotl_spin.run.pictures import refuse_unfit
from axolotl_spin.training.layout_check import layout_off
from axolotl_spin.training.layouts import GIVEN, Layout, PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.tried_pairs import tried_pairs

LN2 = math.log(2)


def needs(name: str) -> None:
    if name in architectures.ARCHITECTURES and (why := architectures.lacking(name)):
        pytest.skip(why)


# -- without the host's command -----------------------------------------------------------------------------------------


def source(name: str, folder: Path, **how: Any) -> ImageRows:
    """Returns rows with pictures as a run has them."""
    pictured.conversations(folder / "data.parquet", 6, **how)
    family = pictured.FAMILIES[name]
    tokenizer = pictured.tokenizer_of(family)
    processor = family.processor(tokenizer)
    strategy = get_processing_strategy(processor, get_chat_template(family.template), family.template)
    collate = MultiModalChatDataCollator(tokenizer, strategy, padding=True)
    rows = Dataset.from_parquet(str(folder / "data.parquet"))
    made = [tokenise_row(row, collate, strategy, lambda ids: ids) for row in rows]
    image = processor.tokenizer.convert_tokens_to_ids(family.special[-1] if name == "gemma3" else processor.image_token)
    return ImageRows(rows, Dataset.from_list(made), collate, [image])


def pairs_of(name: str, images: ImageRows, rows: list[int]) -> list[dict[str, Any]]:
    """Returns pairs of prompts with pictures and answers of unequal lengths."""
    found = []
    for place, row in enumerate(rows):
        ids = images.tokenised[row]["input_ids"]
        answer = [20 + place, 21, 22][: 2 + place % 2]
        pair = {"prompt_ids": ids[:-4], "chosen_ids": ids[-4:], "rejected_ids": answer, "row": row, "images": images}
        found.append(pair)
    return found


# whose attention sees all that a pair has, and a picture as it sees text
SHARED = ("qwen2_5_vl", "llava", "pixtral")
LAYOUTS = [("padded", name) for name in pictured.FAMILIES if name != "llava"] + [("shared", name) for name in SHARED]


@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_picture_counts_in_its_own_pair_and_in_no_other(
    layout: Layout, name: str, mixed: bool, tmp_path: Path
) -> None:
    """Batches of unequal numbers of pictures too; exchanged pictures move a pair's log-probs, a neighbour's do not."""
    needs(name)
    images, model = source(name, tmp_path, mixed=mixed), pictured.build(name).eval()
    pairs = pairs_of(name, images, [0, 1, 2] if mixed else [0, 1])
    padded, collator = PairCollator(0), PairCollator(0, layout)
    with torch.no_grad():
        together = completion_logps(model, collator(pairs)).view(2, -1)
        alone = torch.cat([completion_logps(model, padded([pair])).view(2, 1) for pair in pairs], dim=1)
        assert (together - alone).abs().max() < 1e-4
        rows = [dict(row) for row in images.rows]
        kept, exchanged = rows[0]["messages"], [dict(part) for part in rows[0]["messages"][0]["content"]]
        exchanged[0] = dict(
            rows[1]["messages"][0]["content"][int(mixed)]
        )  # a picture as large, and blue; the same words
        rows[0]["messages"] = [{**kept[0], "content": exchanged}, kept[1]]
        other = ImageRows(rows, images.tokenised, images.collate, images.placeholders)
        moved = completion_logps(model, collator([{**pair, "images": other} for pair in pairs])).view(2, -1)
    assert (moved - together)[:, 0].abs().min() > 1e-4 and (moved - together)[:, 1:].abs().max() < 1e-5


def test_what_the_forward_takes_stands_once_for_each_answer(tmp_path: Path) -> None:
    images = source("gemma3", tmp_path)
    batch = PairCollator(0)(pairs_of("gemma3", images, [0, 1]))
    pixels, kinds = batch[f"{GIVEN}pixel_values"], batch[f"{GIVEN}token_type_ids"]
    assert len(pixels) == 4 and torch.equal(pixels[:2], pixels[2:]) and not torch.equal(pixels[0], pixels[1])
    assert kinds.shape == batch["input_ids"].shape
    assert torch.equal(kinds.bool(), batch["input_ids"] == images.placeholders[0])


@pytest.mark.parametrize("name", SHARED)
def test_answers_share_their_prompts_pictures(name: str, tmp_path: Path) -> None:
    """In one row and in several, with a mask and without; a row's pictures come in the order of its tokens."""
    images, model = source(name, tmp_path, mixed=True), pictured.build(name).eval()
    pairs = pairs_of(name, images, [3, 0, 1, 2])
    collators = [PairCollator(0), *(PairCollator(0, "shared", hidden_size=size) for size in (1, 10**6))]
    collators[1].in_parts, collators[2].in_parts = "always", False
    batches = [collator(pairs) for collator in collators]
    pixels = [len(batch[f"{GIVEN}pixel_values"]) for batch in batches]
    assert pixels[1] == pixels[2] == pixels[0] / 2
    assert len(batches[1]["input_ids"]) > 1 and len(batches[2]["input_ids"]) == 1
    found = [completion_logps(model, batch) for batch in batches]
    assert max((found[0] - other).abs().max().item() for other in found[1:]) < 2e-5
    gradients = [torch.autograd.grad(logps.sum(), [*model.parameters()], allow_unused=True) for logps in found]
    for mine, theirs in zip(gradients[0], gradients[2], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "sound"), [*((name, True) for name in SHARED), ("gemma3", False)])
def test_numbers_tell_whether_a_model_takes_pictures_in_shared_rows(name: str, sound: bool, tmp_path: Path) -> None:
    """Gemma 3 sees a picture's tokens in both directions, which a mask of pairs does not say."""
    images, model = source(name, tmp_path), pictured.build(name).eval()
    prompts = Dataset.from_list(
        [
            {"prompt_ids": ids[:-4], "chosen_ids": ids[-4:], "row": row}
            for row, ids in enumerate(images.tokenised["input_ids"])
        ]
    )
    off, noise = layout_off(model, tried_pairs(prompts, images), PairCollator(0, "shared", hidden_size=10**6), "cpu")
    assert (off <= max(3 * noise, 1e-3)) == sound


def test_rows_that_have_changed_are_told(tmp_path: Path) -> None:
    images = source("gemma3", tmp_path)
    pair = pairs_of("gemma3", images, [0])[0]
    with pytest.raises(ValueError, match="row 1 of `datasets:` does not give the prompt that it gave"):
        images.inputs([1], [[*pair["prompt_ids"][:-1], 7]])


@pytest.mark.parametrize("name", [name for name in pictured.FAMILIES if name != "llava"])
def test_a_processor_makes_the_prompt_of_what_an_engine_is_given(name: str, tmp_path: Path) -> None:
    """Ids in which each picture has one mark, and the pictures; the answer is left out."""
    images = source(name, tmp_path, mixed=True)
    processor = images.collate.processing_strategy.processor
    for row in range(3):
        prompt = images.tokenised[row]["input_ids"][:-4]
        ids, found = images.unprocessed(row, prompt)
        assert len(found) == len(images.hashes(row)) and (len(ids) < len(prompt)) == bool(found)
        made = processor(text=processor.tokenizer.decode(ids), images=found or None, add_special_tokens=False)
        assert list(made["input_ids"][0]) == prompt


def test_hashes_tell_pictures_apart_and_texts_have_each_once(tmp_path: Path) -> None:
    images = source("gemma3", tmp_path, mixed=True)
    assert [len(images.hashes(row)) for row in range(4)] == [1, 2, 0, 1]
    assert len({mark for row in range(6) for mark in images.hashes(row)}) == 6
    image = images.placeholders[0]
    assert images.squeezed([5, image, image, 6, image, 6, 6]) == [5, image, 6, image, 6, 6]


def test_a_sound_is_refused(tmp_path: Path) -> None:
    images = source("gemma3", tmp_path)
    row = {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}]}
    with pytest.raises(ValueError, match="a part of the type `audio`"):
        tokenise_row(row, images.collate, images.collate.processing_strategy, lambda ids: ids)


def test_more_places_than_pictures_are_refused(tmp_path: Path) -> None:
    """The host fills one place from a column of pictures, whatever the column has."""
    images = source("gemma3", tmp_path)
    shown = [pictured.picture(colour, 0) for colour in ("red", "blue")]
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "w1"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}
    with pytest.raises(ValueError, match="more places for pictures than pictures: of a row's `images` the host takes"):
        tokenise_row(
            {"messages": [asked, said], "images": shown}, images.collate, images.collate.processing_strategy, list
        )


class Day:
    """Stands for `datetime` where templates ask for the date."""

    today = 3

    @classmethod
    def now(cls) -> datetime.datetime:
        return datetime.datetime(2031, 5, cls.today)


def test_rows_whose_tokens_depend_on_the_day_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template such as the host's mistral_v7_tekken, which sets the date where the data has no system message."""
    images = source("gemma3", tmp_path)
    strategy = images.collate.processing_strategy
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
    monkeypatch.setattr(Day, "today", 3)
    dated = "{% if messages[0]['role'] != 'system' %}{{ 'w' + strftime_now('%-d') + ' ' }}{% endif %}"
    strategy.chat_template = dated + strategy.chat_template
    row = images.rows[0]
    own = {**row, "messages": [{"role": "system", "content": [{"type": "text", "text": "w9"}]}, *row["messages"]]}
    with pytest.raises(ValueError, match=r"puts today's date into it.* system message .* `chat_template_jinja`"):
        tokenise_row(row, images.collate, strategy, lambda ids: ids)
    made, first = tokenise_row(own, images.collate, strategy, lambda ids: ids), images.collate([row])["input_ids"]
    monkeypatch.setattr(Day, "today", 4)
    assert tokenise_row(own, images.collate, strategy, lambda ids: ids) == made
    assert not torch.equal(images.collate([row])["input_ids"], first)  # what a run would have met at midnight
    strategy.chat_template = strategy.chat_template.replace("strftime_now('%-d')", "'3'")
    tokenise_row(row, images.collate, strategy, lambda ids: ids)
    assert torch.equal(images.collate([row])["input_ids"], first)


def test_rows_that_ranks_could_not_share_are_refused(tmp_path: Path) -> None:
    images = source("gemma3", tmp_path, mixed=True)
    prompts = Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6], "row": row} for row in (3, 2)])
    with pytest.raises(ValueError, match="`test_datasets`: row 3 cannot be used: it has a picture in or behind"):
        refuse_unfit(prompts, images, "test_datasets", sequence_len=64, sharded=False)
    ids = [images.tokenised[row]["input_ids"] for row in (3, 2)]
    prompts = prompts.remove_columns("prompt_ids").add_column("prompt_ids", [found[:-4] for found in ids])
    refuse_unfit(prompts, images, "test_datasets", sequence_len=64, sharded=False)
    with pytest.raises(ValueError, match="row 2 cannot be used: it has no picture: ranks that share weights"):
        refuse_unfit(prompts, images, "test_datasets", sequence_len=64, sharded=True)


def test_turns_by_the_headers_of_a_template() -> None:
    """Where the host's strategy labels all text: from the header to the end, which is the turn's, or to another mark."""
    ids = [9, 3, 7, 7, 2, 1, 9, 3, 8, 1, 5]
    assert labels_by_headers(ids, [(9, 3)], ends=(2,), special=(1, 2)) == [
        *(-100, -100, 7, 7, 2, -100, -100, -100, 8, -100, -100)
    ]


def test_no_answer_has_a_token_that_stands_for_a_picture(tmp_path: Path) -> None:
    images = source("gemma3", tmp_path)
    for temperature in (0, 1):
        chunk = Chunk(0, (0, 1), ((5,), (5,)), (4, 4), 3, images, (0, 1))
        logits = torch.zeros(2, 30)
        logits[:, images.placeholders[0]] = 50.0
        drawn = Draw(Sampling(temperature, 1.0, None, ()), chunk)(logits, [0, 1], [0, 0])
        assert not set(drawn.tolist()) & set(images.placeholders)


SEEN = {"processor_type": "AutoProcessor", "skip_prepare_dataset": True}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"skip_prepare_dataset": True}, "`skip_prepare_dataset: true`"),
        ({"processor_type": "AutoProcessor"}, "`skip_prepare_dataset` left out"),
        ({**SEEN, "sample_packing": True}, "`sample_packing: true`"),
        ({**SEEN, "spin": {"turns": "all"}}, "`spin.turns: all`"),
        ({**SEEN, "spin": {"initial_pairs": "x.parquet"}}, "`spin.initial_pairs`"),
        (
            {**SEEN, "deepspeed": "zero3.json", "spin": {"generation": {"gather_weights": False}}},
            "`spin.generation.gather_weights: false`",
        ),
    ],
)
def test_what_does_not_go_with_pictures_is_refused(data: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        refuse_unsupported(data)
    refuse_unsupported(SEEN)


# -- through the host's command -----------------------------------------------------------------------------------------


def check(run: host.Run, name: str, folder: Path, rows: int = 12) -> None:
    """The first loss of both iterations is ln 2, and the opponent's log-probs are those of one sequence at a time."""
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([LN2] * 2, abs=1e-5)
    model, processor = pictured.loaded(run.out / "spin" / "iteration-0" / "model")
    talks = [(pictured.shown(talk), pictured.processed(name, processor, talk)) for talk in pictured.messages_of(folder)]
    pairs = run.pairs(1).to_pylist()
    assert len(pairs) == rows
    for pair in pairs:
        ids = [*pair["prompt_ids"], *pair["chosen_ids"]]
        same = [made for shown, made in talks if shown == pair["images"]]
        [made] = [made for made in same if made["input_ids"][0][: len(ids)].tolist() == ids]
        assert pictured.off_alone(model, pictured.cut(made, len(pair["prompt_ids"])), pair) < 1e-5


@pytest.mark.host
@pytest.mark.parametrize("name", list(pictured.FAMILIES))
def test_two_iterations(name: str, tmp_path: Path, warm: Warm) -> None:
    needs(name)
    run = host.train(pictured.settings(name, tmp_path), by=warm)
    check(run, name, tmp_path)
    assert f"pairs are laid out {'shared' if name in SHARED else 'padded'}: " in run.output
    assert "padding moves" not in run.output
    hashes = [pair["images"] for pair in run.pairs(0).to_pylist()]
    assert all(len(found) == 1 for found in hashes) and hashes == [pair["images"] for pair in run.pairs(1).to_pylist()]
    # steps reach the tower as they reach the language model
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", run.out))
    moved = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
    assert any("vis" in key for key in moved) and any("lm_head" in key or "layers" in key for key in moved)
    if name == "gemma3":
        its_files_are_read(run, tmp_path, warm)


def its_files_are_read(run: host.Run, folder: Path, warm: Warm) -> None:
    """What the other commands make of a run on pictures."""
    command = ("axolotl_spin", "plan", str(host.write(pictured.settings("gemma3", folder))), "--json")
    env = host.environment(ACCELERATE_USE_CPU="true")
    code, said = warm.run(*command, env=env, cwd=folder, errors=folder / "plan.err")
    assert code == 0, said[-4000:]
    plan = json.loads(said)
    assert plan["folder"]["holds"] == "this run, complete" and "missing" not in plan["memory"]
    assert plan["lengths"]["prompt"]["max"] == max(len(ids) for ids in run.pairs(0)["prompt_ids"].to_pylist())
    for kind, refused in (("dpo", True), ("parquet", False)):
        options = ["--iteration", "0", "--format", kind, "--output", str(folder / kind)]
        done = CliRunner().invoke(spin_command, ["export", str(run.out), *options])
        assert bool(done.exit_code) == refused, done.output
        assert ("pairs of prompts with pictures, which are not in the file" in done.output) == refused
    with pytest.raises(ValueError, match="pairs of prompts with pictures"):
        read_file(folder / "parquet" / "pairs.parquet", "x")
    assert CliRunner().invoke(spin_command, ["report", str(run.out)]).exit_code == 0
    pictured.conversations(folder / "data.parquet", 12, shuffled=True)  # the same words to other pictures
    other = host.train(pictured.settings("gemma3", folder), by=warm, fails=True)
    assert "data (pictures): '" in other.output and "going on from" not in other.output


@pytest.mark.host
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_rows_with_none_one_and_two_pictures(name: str, tmp_path: Path, warm: Warm) -> None:
    pictured.conversations(tmp_path / "data.parquet", 12, mixed=True)
    run = host.train(pictured.settings(name, tmp_path), by=warm)
    check(run, name, tmp_path)
    assert sorted({len(pair["images"]) for pair in run.pairs(0).to_pylist()}) == [0, 1, 2]


@pytest.mark.host
@pytest.mark.once
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_game_is_decided_by_the_picture(shuffled: bool, tmp_path: Path, warm: Warm) -> None:
    """On pictures that it has not seen; with pictures that are handed out anew there is nothing to learn from them."""
    pictured.conversations(tmp_path / "data.parquet", 32, shuffled=shuffled, size=pictured.SQUARE)
    made = pictured.settings("pixtral", tmp_path, num_epochs=3, learning_rate=2e-3)
    made["spin"] |= {"iterations": 3, "generation": {"max_new_tokens": 4, "batch_size": 16}}
    run = host.train(made, by=warm)
    folders = [tmp_path / "model", *(run.out / "spin" / f"iteration-{i}" / "model" for i in range(3))]
    (tmp_path / "new").mkdir()
    found = [pictured.known_colours("pixtral", *pictured.loaded(folder), tmp_path / "new") for folder in folders]
    distances = [nll for _, nll in found]
    if shuffled:  # the first of three tokens is a guess between two
        assert found[-1][0] <= 0.75 and distances[-1] > LN2 / 3
    else:
        assert found[-1][0] == 1.0 and distances[-1] < LN2 / 3 and distances == sorted(distances, reverse=True)


@pytest.mark.host
@pytest.mark.once
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, warm: Warm) -> None:
    """With held-out play and a held-out loss, both of them on pictures."""
    made = {**pictured.settings("gemma3", tmp_path, rows=19), **CHANGES}
    made["spin"] = {**made["spin"], "generation": {"max_new_tokens": 6, "batch_size": 4}}
    env = host.environment(ACCELERATE_USE_CPU="true")
    for folder, kill in (("whole", ""), ("killed", "iteration 1/second epoch"), ("killed", "")):
        (tmp_path / f"{folder}.yml").write_text(yaml.safe_dump({**made, "output_dir": str(tmp_path / folder)}))
        code, output = warm.run("axolotl.cli.train", f"{folder}.yml", env={**env, "SPIN_KILL": kill}, cwd=tmp_path)
        assert bool(code) == bool(kill), output[-6000:]
    assert "going on from" in output
    found, expected = (outcome(tmp_path / folder) for folder in ("killed", "whole"))
    assert not differences({**found, "plan": None}, {**expected, "plan": None})
    assert {"eval_loss", "spin/heldout_auc"} <= {name for row in expected["logs"] for name in row}


HALF = {"bf16": None, "bfloat16": True, "plugins": ["half.HalfPlugin", *host.OURS]}
FOUR_BITS = {"adapter": "qlora", "load_in_4bit": True}


@pytest.mark.host
@pytest.mark.parametrize(("kind", "off"), [(HALF, 1e-3), (FOUR_BITS, 1e-5)], ids=["bf16", "4 bits"])
def test_an_adapter_of_the_language_model(kind: dict[str, Any], off: float, tmp_path: Path, warm: Warm) -> None:
    """What most of the host's examples are; the tower and what joins it stay as they are."""
    modules = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
    lora = {**host.LORA, "lora_target_linear": None, "lora_target_modules": modules, "lora_dropout": 0.0}
    run = host.train(pictured.settings("gemma3", tmp_path, **{**lora, **kind}), by=warm)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([LN2] * 2, abs=off)
    adapter = load_file(run.out / "spin" / "iteration-1" / "model" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7 and all("language_model.layers" in name for name in adapter)
    assert all(weight.any() for weight in adapter.values())


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.once), "zero3", "fsdp2"])
def test_on_two_ranks(kind: str, tmp_path: Path, warm_ranks: Ranks) -> None:
    changes = {**host.layout(kind, tmp_path), "gradient_accumulation_steps": 2}
    if kind == "fsdp2":
        changes["fsdp_config"] = {**changes["fsdp_config"], "transformer_layer_cls_to_wrap": "Qwen2_5_VLDecoderLayer"}
    made = pictured.settings("qwen2_5_vl", tmp_path, **changes)
    run = host.train(made, kind, by=warm_ranks)
    check(run, "qwen2_5_vl", tmp_path)


@pytest.mark.host
@pytest.mark.once
def test_rows_that_cannot_be_used_stop_a_run_before_a_model_loads(tmp_path: Path, warm: Warm) -> None:
    made = pictured.settings("gemma3", tmp_path)
    run = host.train({**made, "sequence_len": 12}, by=warm, fails=True)
    assert "`sequence_len: 12` leaves no room for an answer" in run.output and not host.loaded_a_model(run.out)
    # of held-out rows too, where nobody is asked for more than the first of the others
    pictured.conversations(tmp_path / "held.parquet", 3, behind=True)
    held = [{**made["datasets"][0], "path": str(tmp_path / "held.parquet"), "split": "train"}]
    spin = {**made["spin"], "max_prompts": 5}
    run = host.train({**made, "spin": spin, "test_datasets": held}, by=warm, fails=True)
    assert "`test_datasets`: row 0 cannot be used: it has a picture in or behind" in run.output
    assert not host.loaded_a_model(run.out) and "Processing rows with pictures: 100%|██████████| 5/5" in run.output
