"""`axolotl spin plan` of a run on pictures: what a tower holds is what the model itself keeps over the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import host
import numpy as np
import pictured
import pytest
import torch
from transformers import AutoModelForImageTextToText

from axolotl_spin.commands.plan.estimate import Given, plan_run
from axolotl_spin.commands.plan.memory import Load, estimate_memory
from axolotl_spin.commands.plan.show import plan_lines
from axolotl_spin.commands.plan.size import ModelSize
from axolotl_spin.commands.plan.towers import Pictures, count_pictures

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def needs(name: str) -> None:
    if name in architectures.ARCHITECTURES and (why := architectures.lacking(name)):
        pytest.skip(why)


def given(name: str, folder: Path) -> dict[str, Any]:
    """Returns what a family's processor makes of a row's picture."""
    pictured.conversations(folder / "data.parquet", 1)
    processor = pictured.FAMILIES[name].processor(pictured.tokenizer_of(pictured.FAMILIES[name]))
    made = pictured.processed(name, processor, pictured.messages_of(folder)[0])
    return {key: value for key, value in made.items() if key not in OF_TEXT}


def kept_by(model: Any, pictures: dict[str, Any]) -> int:
    """Returns the bytes that autograd keeps of a real forward over pictures, which is on the CPU."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    found, held = {value.untyped_storage()._cdata: value.nbytes for value in pictures.values()}, []

    def keep(value: torch.Tensor) -> torch.Tensor:
        held.append(value)
        if (key := value.untyped_storage()._cdata) not in weights:
            found[key] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model.train().get_image_features(**pictures)
    return sum(found.values())


@pytest.mark.parametrize("name", list(pictured.FAMILIES))
def test_a_tower_is_counted_as_it_runs(name: str, tmp_path: Path) -> None:
    """Up to what kernels of the CPU keep otherwise; a frozen one keeps nothing; a layer's own is made again."""
    needs(name)
    real, pictures = pictured.build(name), given(name, tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(real.config)
    found = count_pictures(model, pictures, checkpointing=False)
    assert found.kept == pytest.approx(kept_by(real, pictures), rel=0.03) and found.again == 0
    again = count_pictures(model, pictures, checkpointing=True)  # the only layer's input is kept beside it
    assert again.again > 0 and again.kept + again.again == found.kept
    for weight in model.parameters():
        weight.requires_grad_(False)
    batch = sum(value.nbytes for value in pictures.values())
    assert count_pictures(model, pictures, checkpointing=False) == Pictures(batch) and batch < again.kept


def test_attention_is_counted_without_its_weights(tmp_path: Path) -> None:
    """Four times the patches keep four times as much, not sixteen times."""
    real = pictured.build("pixtral")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(real.config)
    sizes = {
        side: {"pixel_values": torch.empty(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
        for side in (512, 1024)
    }
    small, large = (count_pictures(model, pixels, checkpointing=False).kept for pixels in sizes.values())
    assert large / small == pytest.approx(4, rel=0.02)


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(ValueError, match="Linear has no `get_image_features`"):
        count_pictures(torch.nn.Linear(1, 1), {}, checkpointing=False)

    class Broken(torch.nn.Linear):
        def get_image_features(self, pixels: Any) -> Any:
            return pixels.sum().item()

    with torch.device("meta"):
        model = Broken(1, 1)
    with pytest.raises(ValueError, match="Broken: "):
        count_pictures(model, {"pixels": torch.zeros(3)}, checkpointing=False)


class Cfg(dict):
    """A config as the host gives it: missing keys are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def test_the_moments_of_pictures_by_hand() -> None:
    """200 of 1000 parameters in a tower. What it keeps is there at every moment; what is made again, beside all gradients.

    A layer keeps 5600 bytes and its backward pass 1800 (see test_planning), and of 4 layers the first are gone at the end.
    """
    settings = Cfg(optimizer="adamw_torch", torch_dtype=torch.bfloat16, bf16=True)
    text = ModelSize(1000, 1000, 0, 2, 10, 50, 40, towers=200, trained_towers=200)

    def beside(pictures: Pictures | None) -> int:
        size = ModelSize(1000, 1000, 0, 2, 10, 50, 40, towers=200, trained_towers=200, pictures=pictures)
        return estimate_memory(size, settings, Load(1, None, 10, 4, 6))["activations"]

    assert beside(None) == estimate_memory(text, settings, Load(1, None, 10, 4, 6))["activations"] == 13000 - 2000
    assert beside(Pictures(700)) == 13000 - 2000 + 700
    assert beside(Pictures(700, again=20_000)) == 700 + 20_000  # its own moment is the highest
    said = estimate_memory(ModelSize(*[1] * 7, pictures="X: y"), settings, Load(1, None, 10, 4, 6))
    assert said["pictures"] is None and any("not known here: X: y" in note for note in said["notes"])


@pytest.mark.host
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_the_plan_of_a_run_on_pictures(name: str, tmp_path: Path) -> None:
    """Of two pairs, the pictures of both answers; parameters as the model has them; a frozen tower has the batch alone."""
    needs(name)
    settings = pictured.settings(name, tmp_path)
    real = pictured.build(name)
    found = {}
    for frozen in (False, True):
        config = host.write({**settings, "freeze_mm_modules": frozen})
        run, figures = plan_run(str(config), Given())
        found[frozen] = memory = figures["memory"]
        text = {
            id(weight) for part in (real.get_decoder(), real.get_output_embeddings()) for weight in part.parameters()
        }
        towers = sum(weight.numel() for weight in real.parameters() if id(weight) not in text)
        whole = real.num_parameters()
        assert memory["towers"] == towers > 0
        assert (memory["parameters"], memory["trainable"]) == (whole, whole - towers * frozen)
        assert f"{towers:,} parameters are beside" in "\n".join(map(str, plan_lines(run.plan, figures)))
    prompts = run.prompts["prompt_ids"][:]
    longest = np.argsort([len(ids) for ids in prompts], kind="stable")[::-1][:2].tolist()
    assert run.images is not None
    asked = [int(run.prompts[place]["row"]) for place in longest]
    pixels = run.images.inputs(asked * 2, [prompts[place] for place in longest] * 2).of_images
    assert found[True]["pictures"] == sum(value.nbytes for value in pixels.values())
    assert found[False]["pictures"] == pytest.approx(kept_by(real, pixels), rel=0.03)
