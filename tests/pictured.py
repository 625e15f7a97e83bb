"""Tiny models that see, their processors, and conversations about pictures that are drawn here: red or blue squares."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import datasets
import host
import torch
from axolotl.utils.chat_templates import get_chat_template
from datasets import Dataset, Features, List, Value
from PIL import Image
from tiny import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

COLOURS = {"red": (220, 20, 30), "blue": (20, 30, 220)}
# what the human says of each
ANSWERS = {"red": "w0 w1 w2", "blue": "w3 w4 w5"}
VOCABULARY = 80


@dataclass(frozen=True)
class Family:
    """Models of a kind.

    Attributes:
        template: The host's `chat_template`.
        special: Special tokens of that and of the processor.
        end: The one that ends a turn.
        named: What the tokenizer calls some of them.
        config: Returns the model's config, given the ids of the special tokens.
        processor: Returns the processor of a tokenizer.
        words: Other words of the template.
    """

    template: str
    special: tuple[str, ...]
    end: str
    named: dict[str, str]
    config: Callable[[dict[str, int]], Any]
    processor: Callable[[Any], Any]
    words: tuple[str, ...] = ()


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _gemma3(ids: dict[str, int]) -> Any:
    config = architectures.config_of("gemma3", VOCABULARY)
    config.image_token_index = config.image_token_id = ids["<image_soft_token>"]
    config.boi_token_index, config.eoi_token_index = ids["<start_of_image>"], ids["<end_of_image>"]
    config.eos_token_id = config.text_config.eos_token_id = ids["<end_of_turn>"]
    config.mm_tokens_per_image = 4
    return config


def _gemma3_processor(tokenizer: Any) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3Processor(Gemma3ImageProcessorPil(size=_square(16)), tokenizer, image_seq_length=4)


def _qwen(name: str) -> Callable[[dict[str, int]], Any]:
    def config(ids: dict[str, int]) -> Any:
        made = architectures.config_of(name, VOCABULARY)
        made.image_token_id, made.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        made.vision_start_token_id, made.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
        made.eos_token_id = made.text_config.eos_token_id = ids["<|im_end|>"]
        return made

    return config


def _qwen_processor(name: str) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> Any:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
        video = "Qwen3VLVideoProcessor" if name == "Qwen3VLProcessor" else "Qwen2VLVideoProcessor"
        return getattr(transformers, name)(
            image_processor=Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, video)(patch_size=8, merge_size=2),
        )

    return processor


def _llava(vision: Any, image_token: str, end: str) -> Callable[[dict[str, int]], Any]:
    def config(ids: dict[str, int]) -> Any:
        text = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=2, eos_token_id=ids[end], pad_token_id=0,
        )  # fmt: skip
        made = LlavaConfig(
            vision_config=vision(), text_config=text, image_token_index=ids[image_token], vision_feature_layer=-1,
            vision_feature_select_strategy="full" if vision is _pixtral_tower else "default", image_seq_length=4,
        )  # fmt: skip
        made.eos_token_id = ids[end]
        return made

    return config


def _clip_tower() -> Any:
    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )


def _pixtral_tower() -> Any:
    return PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )


def _llava_processor(tokenizer: Any) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_square(16)),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _pixtral_processor(tokenizer: Any) -> Any:
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    return PixtralProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=_square(8)), tokenizer, patch_size=8
    )


_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_ROLES = ("user", "assistant", "system", "model")

FAMILIES = {
    "gemma3": Family(
        "gemma3",
        ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        "<end_of_turn>",
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        _gemma3,
        _gemma3_processor,
        _ROLES,
    ),
    "qwen2_5_vl": Family(
        "qwen2_vl", _QWEN_TOKENS, "<|im_end|>", {}, _qwen("qwen2_5_vl"), _qwen_processor("Qwen2_5_VLProcessor"), _ROLES
    ),
    "qwen3_5": Family(
        "qwen3_5", _QWEN_TOKENS, "<|im_end|>", {}, _qwen("qwen3_5"), _qwen_processor("Qwen3VLProcessor"), _ROLES
    ),
    "llava": Family(
        "llava",
        ("<image>",),
        "</s>",
        {},
        _llava(_clip_tower, "<image>", "</s>"),
        _llava_processor,
        ("USER:", "ASSISTANT:"),
    ),
    "pixtral": Family(
        "pixtral",
        ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "</s>",
        {},
        _llava(_pixtral_tower, "[IMG]", "</s>"),
        _pixtral_processor,
    ),
}


def tokenizer_of(family: Family) -> Any:
    """Returns a word-level tokenizer with a family's special tokens."""
    special = ["<pad>", "<unk>", "<s>", "</s>", *family.special]
    words = [*family.words, *WORDS]
    assert len(special) + len(words) <= VOCABULARY
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token=family.end,
        additional_special_tokens=list(family.special), **family.named,
    )  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """Returns a tiny model of a family, all of whose weights are random and large."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    torch.manual_seed(seed)
    config = family.config({token: tokenizer.convert_tokens_to_ids(token) for token in (*family.special, "</s>")})
    return architectures.enlarged(AutoModelForImageTextToText.from_config(config))


def save(name: str, folder: Path) -> None:
    """Writes a tiny model of a family with its tokenizer and processor."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    build(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    family.processor(tokenizer).save_pretrained(folder)


# wide, square and high ones: of one token, of two and of four where a processor keeps their shape
SQUARE = (20, 20)
_SIZES = ((32, 32), (20, 20), (32, 20), (16, 32))


def picture(colour: str, seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Draws a rectangle of a colour, a little different for each seed."""
    size = size or _SIZES[seed // 4 % len(_SIZES)]
    generator = random.Random(seed)
    red, green, blue = (min(255, value + generator.randint(0, 25)) for value in COLOURS[colour])
    return Image.new("RGB", size, (red, green, blue))


def conversations(
    path: Path,
    rows: int,
    seed: int = 0,
    shuffled: bool = False,
    mixed: bool = False,
    behind: bool = False,
    size: tuple[int, int] | None = None,
) -> Path:
    """Writes conversations with their pictures; what the human answers, only the picture tells.

    Args:
        path: A Parquet file.
        rows: How many.
        seed: Of questions, colours and shades.
        shuffled: Pictures are handed out anew, so that they tell nothing.
        mixed: Every third row has two pictures, the last of which counts, and every third none.
        behind: A question with its picture follows the answer, and is not answered.
        size: Of all pictures, in pixels; else some are wide, and some high.
    """
    generator = random.Random(seed)
    colours = [("red", "blue")[place % 2] for place in range(rows)]
    shown = random.Random(seed + 1).sample(colours, rows) if shuffled else colours
    made = []
    for place in range(rows):
        question = " ".join(generator.choices(WORDS[10:], k=generator.randint(2, 5)))
        count = (1, 2, 0)[place % 3] if mixed else 1
        shades = [*[("blue", "red")[place % 2]] * (count - 1), *[shown[place]] * min(1, count)]
        drawn = [picture(shade, 1000 * seed + 2 * place + number, size) for number, shade in enumerate(shades)]
        content = [{"type": "image", "image": image, "text": None} for image in drawn]
        content.append({"type": "text", "image": None, "text": question})
        said = [{"type": "text", "image": None, "text": ANSWERS[colours[place]]}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
        made.append({"messages": [*turns, turns[0]] if behind else turns})
    part = {"type": Value("string"), "image": datasets.Image(), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    Dataset.from_list(made, features=features).to_parquet(path)
    return path


def settings(name: str, folder: Path, rows: int = 12, **changes: Any) -> dict[str, Any]:
    """Returns the config of a run on pictures; its model and data are made in the folder where they are missing."""
    if not (folder / "model").exists():
        save(name, folder / "model")
    if not (folder / "data.parquet").exists():
        conversations(folder / "data.parquet", rows)
    spin = {"iterations": 2, "history": 0, "generation": {"max_new_tokens": 6, "batch_size": 4, "temperature": 0}}
    base = {
        **{"processor_type": "AutoProcessor", "skip_prepare_dataset": True, "remove_unused_columns": False},
        **{"sample_packing": False, "chat_template": FAMILIES[name].template, "spin": spin, "sequence_len": 128},
        **{"gradient_accumulation_steps": 1, "learning_rate": 5e-3, "warmup_steps": 0},
        "tokenizer_type": "PreTrainedTokenizerFast",
        "datasets": [{"path": str(folder / "data.parquet"), "ds_type": "parquet", "type": "chat_template"}],
    }
    if name == "llava":  # the host's template ends no turn
        base["datasets"][0]["train_on_eos"] = "none"
    return host.config(folder, **{**base, **changes})


def messages_of(folder: Path) -> list[list[dict[str, Any]]]:
    """Returns the conversations of a run's data, as a processor takes them."""
    rows = Dataset.from_parquet(str(folder / "data.parquet"))
    return [
        [
            {**turn, "content": [{k: v for k, v in part.items() if v is not None} for part in turn["content"]]}
            for turn in row["messages"]
        ]
        for row in rows
    ]


def shown(messages: list[dict[str, Any]]) -> list[str]:
    """Returns the hashes of a conversation's pictures, as pairs keep them."""
    found = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
    return [hashlib.sha256(f"{one.mode}/{one.size}".encode() + one.tobytes()).hexdigest()[:32] for one in found]


def processed(name: str, processor: Any, messages: list[dict[str, Any]], asked: bool = False) -> dict[str, Any]:
    """Returns what a model takes for a conversation, as the processor itself makes it.

    Args:
        name: Of the family.
        processor: Of the run's model.
        messages: The conversation.
        asked: Leaves out its last turn, and asks for it.
    """
    made = processor.apply_chat_template(
        messages[:-1] if asked else messages,
        add_generation_prompt=asked,
        tokenize=True,
        return_tensors="pt",
        return_dict=True,
        chat_template=get_chat_template(FAMILIES[name].template),
    )
    return dict(made)


def cut(made: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Returns of what a processor made of a conversation the first so many tokens, and all pictures."""
    length = made["input_ids"].shape[1]
    return {key: value[:, :tokens] if tuple(value.shape) == (1, length) else value for key, value in made.items()}


@torch.no_grad()
def logps_alone(model: Any, prompt: dict[str, torch.Tensor], answer: list[int]) -> float:
    """Returns an answer's log-prob from one unpadded sequence, in nats."""
    length = prompt["input_ids"].shape[1]
    given = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
    for key, value in given.items():  # kinds of tokens; an answer is text
        if tuple(value.shape) == (1, length):
            given[key] = torch.nn.functional.pad(value, (0, len(answer)))
    ids = torch.cat([prompt["input_ids"], torch.tensor([answer])], dim=1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given, use_cache=False).logits[
        0, length - 1 : -1
    ]
    return logits.double().log_softmax(-1)[range(len(answer)), answer].sum().item()


@torch.no_grad()
def is_greedy(model: Any, prompt: dict[str, torch.Tensor], answer: list[int], never: list[int]) -> bool:
    """Returns whether each token of an answer is the likeliest, one without a cache and unpadded, but for ties."""
    length = prompt["input_ids"].shape[1]
    given = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
    for key, value in given.items():
        if tuple(value.shape) == (1, length):
            given[key] = torch.nn.functional.pad(value, (0, len(answer)))
    ids = torch.cat([prompt["input_ids"], torch.tensor([answer])], dim=1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given, use_cache=False).logits[0]
    logits = logits[length - 1 : -1]
    logits[:, never] = -torch.inf
    return bool((logits.amax(-1) - logits[range(len(answer)), answer] < 1e-3).all())


def off_alone(model: Any, prompt: dict[str, torch.Tensor], row: dict[str, Any]) -> float:
    """Returns how far the opponent's log-probs of a pair are from `logps_alone`, in nats per token."""
    worst = 0.0
    for kind in ("chosen", "rejected"):
        answer = row[f"{kind}_ids"]
        off = abs(logps_alone(model, prompt, answer) - row[f"opponent_{kind}_logp"]) / len(answer)
        worst = off if math.isnan(off) else max(worst, off)
    return worst


def loaded(folder: Path) -> tuple[Any, Any]:
    """Returns the model and the processor that a run saved."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def known_colours(name: str, model: Any, processor: Any, folder: Path, rows: int = 12) -> tuple[float, float]:
    """Returns what a model knows of pictures that it has not seen.

    Returns:
        The share of questions of which it finds the right answer likelier than the other colour's, and the right
        answers' negative log-likelihood per token, in nats.
    """
    conversations(folder / "data.parquet", rows, seed=5, size=SQUARE)
    right, nll, count = 0, 0.0, 0
    for place, messages in enumerate(messages_of(folder)):
        prompt = processed(name, processor, messages, asked=True)
        answers = [processor.tokenizer(ANSWERS[key], add_special_tokens=False)["input_ids"] for key in ("red", "blue")]
        logps = [logps_alone(model, prompt, answer) for answer in answers]
        right += logps[place % 2] > logps[1 - place % 2]
        nll, count = nll - logps[place % 2], count + len(answers[0])
    return right / rows, nll / count
