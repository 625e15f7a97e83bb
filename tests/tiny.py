"""A tiny randomly initialised Llama and its tokenizer, built offline, for tests that run the real host."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer with a chat template; `<|end|>` ends a turn and is the eos token."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def model(vocabulary: int, seed: int = 0, **changes) -> LlamaForCausalLM:
    """Returns a two-layer Llama with random weights."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=2, eos_token_id=6, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def save(folder: Path, seed: int = 0, **changes) -> Path:
    """Writes a tiny model with its tokenizer."""
    tok = tokenizer()
    model(len(tok), seed, **changes).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path) -> Path:
    """Writes a LoRA adapter with random weights, the same at each call."""
    torch.manual_seed(5)
    loaded = LlamaForCausalLM.from_pretrained(base)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(loaded, settings).save_pretrained(folder)
    return folder


def conversations(path: Path, rows: int, seed: int = 0, turns: int = 1) -> Path:
    """Writes `messages` rows of random words."""
    generator = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(turns):
                messages.append({"role": "user", "content": text(2, 8)})
                messages.append({"role": "assistant", "content": text(1, 6)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
