"""The exact game: a tiny Llama over a closed vocabulary, whose distribution over answers can be tabulated.

The vocabulary is the end token and three letters; answers have at most four tokens. That makes 121 outcomes: 40 that end
by themselves (up to three letters, then the end token) and 81 that are cut (four letters). The prompt is one letter, so no
probability escapes, and total variation between two models' answers is an exact sum.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from tiny import model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

END, LETTERS, PROMPT, MOST = 0, (1, 2, 3), (1,), 4
OUTCOMES = [
    [*letters, END] if length < MOST else list(letters)
    for length in range(MOST + 1)
    for letters in itertools.product(LETTERS, repeat=length)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of exactly four tokens; the end token pads too."""
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "c": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="a")


def player(seed: int):
    """Returns the model that starts the game: random weights, close to uniform over tokens."""
    return model(4, seed, bos_token_id=None, eos_token_id=END, pad_token_id=END, initializer_range=0.1)


def teacher(seed: int):
    """Returns the model that answers as the humans: larger random weights, so that its answers are uneven."""
    return model(4, seed + 1000, bos_token_id=None, eos_token_id=END, pad_token_id=END, initializer_range=0.3)


@torch.no_grad()
def tabulate(policy: torch.nn.Module) -> torch.Tensor:
    """Returns the probability of each outcome, (121,) float64, by plain log-softmax and the chain rule."""
    policy = policy.eval().double()
    width = len(PROMPT) + MOST
    ids = torch.full((len(OUTCOMES), width), END)
    for row, outcome in enumerate(OUTCOMES):
        ids[row, : len(PROMPT) + len(outcome)] = torch.tensor([*PROMPT, *outcome])
    logps = policy(ids).logits.log_softmax(-1)
    total = torch.zeros(len(OUTCOMES), dtype=torch.float64)
    for row, outcome in enumerate(OUTCOMES):
        for position, token in enumerate(outcome, start=len(PROMPT)):
            total[row] += logps[row, position - 1, token]
    return total.exp()


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    """Returns half the L1 distance of two distributions."""
    return 0.5 * (p - q).abs().sum().item()


def deal(folder: Path, seed: int, pairs: int) -> torch.Tensor:
    """Writes a start model and human data drawn from another model, so that the game is realizable.

    Args:
        folder: Gets `model/` and `data/`, an already tokenised dataset.
        seed: Of both models and the data.
        pairs: Rows of data.

    Returns:
        (121,) the data's true distribution.
    """
    player(seed).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    truth = tabulate(teacher(seed))
    torch.manual_seed(seed + 2000)
    rows = [OUTCOMES[index] for index in torch.multinomial(truth, pairs, replacement=True).tolist()]
    folder.joinpath("data").mkdir(parents=True, exist_ok=True)
    with open(folder / "data" / "rows.jsonl", "w") as file:
        for row in rows:
            ids = [*PROMPT, *row]
            labels = [-100] * len(PROMPT) + row
            file.write(json.dumps({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}) + "\n")
    return truth


def config(folder: Path, *, iterations: int, pairs: int, epochs: int, batch: int = 256, loss: str = "sigmoid") -> dict:
    """Returns the host's config of the game."""
    return {
        "base_model": str(folder / "model"),
        "plugins": ["cpu_cluster.CpuClusterPlugin", "defects.DefectPlugin", "axolotl_spin.SpinPlugin"],
        "rl": "spin",
        "spin": {
            "iterations": iterations,
            "beta": 1,
            "loss": loss,
            "history": 0,
            "generation": {"max_new_tokens": MOST, "batch_size": 1024},
        },
        "datasets": [{"path": str(folder / "data" / "rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 16,
        "micro_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "num_epochs": epochs,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "warmup_steps": 10,
        "bf16": False,
        "fp16": False,
        "logging_steps": 64,
        "save_strategy": "no",
        "val_set_size": 0,
        "seed": 11,
    }


def distances(folder: Path, truth: torch.Tensor, iterations: int) -> list[float]:
    """Returns the total variation to the truth after each iteration, as a share of the start model's."""
    start = total_variation(tabulate(AutoModelForCausalLM.from_pretrained(folder / "model")), truth)
    models_ = [folder / "out" / "spin" / f"iteration-{i}" / "model" for i in range(iterations)]
    return [total_variation(tabulate(AutoModelForCausalLM.from_pretrained(m)), truth) / start for m in models_]
