"""Memory of a step with long answers and a large vocabulary, next to the newest TRL; and of long rows without a mask.

A random model of small width, so that the LM head is what a step costs. Each contestant is a process of its own, in turn:
ours is a loop of `pair_losses` and AdamW over one pair, TRL's is its DPOTrainer with its fused head and the reference's
log-probs computed before. A peak is the process's largest resident memory from the second step on, less what was resident
before the model was made; a step's time is CPU seconds. TRL lives in an environment of its own (`.ci/rival-environment`),
whose Python SPIN_RIVAL_PYTHON names.

Called by `run.py`; with `--as` it is a contestant itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 2
DEEP = 12  # layers, so that what each keeps can be seen


def measure(
    folder: Path, *, vocabularies: tuple[int, ...], tokens: int, prompt: int, repeats: int
) -> list[dict[str, Any]]:
    """Returns rows of the table.

    Args:
        folder: For what the contestants write.
        vocabularies: Sizes that are tried.
        tokens: In each of the two answers.
        prompt: Tokens of the prompt; twice an answer's where attention is what is measured.
        repeats: Of each contestant; medians count.
    """
    rows = []
    for vocabulary in vocabularies if "SPIN_RIVAL_PYTHON" in os.environ else ():
        asked = {"vocabulary": vocabulary, "tokens": tokens, "prompt": prompt}
        found: dict[str, list[dict[str, Any]]] = {"spin": [], "trl": []}
        for _ in range(repeats):
            for name, runs in found.items():
                runs.append(contestant(folder, name, asked))
        about = f"{vocabulary} tokens of vocabulary, {prompt} + {tokens} / {tokens} tokens"
        rival = f"TRL {found['trl'][0]['version']}, reference precomputed, head fused"
        for figure, unit, scale, target in (
            ("peak_bytes", "peak memory of a step, GiB", 2**30, "<= 0.9"),
            ("cpu_seconds", "CPU s of a step", 1, "<= 1"),
        ):
            ours, theirs = (median(run[figure] for run in found[name]) / scale for name in ("spin", "trl"))
            rows.append(_row(unit, about, ours, rival, theirs, target))
        if vocabulary == vocabularies[0]:
            ours, cap = (median(run["peak_bytes"] for run in found[name]) for name in ("spin", "trl"))
            longest = longest_pair(folder, asked, ours, cap)
            rows.append(_row("longest answers in a fixed memory, tokens", f"{about}: {cap / 2**30:.2f} GiB",
                             longest, rival, tokens, ">= 1.1"))  # fmt: skip
    return rows + masks(folder, prompt=2 * tokens, tokens=tokens, repeats=repeats)


def longest_pair(folder: Path, asked: dict[str, Any], peak: float, cap: float) -> int:
    """Returns the most tokens of our two answers, in steps of 64, for which a measured peak stays below a rival's.

    No more than four times the rival's are tried, of which a step takes minutes.

    Args:
        folder: For what the contestant writes.
        asked: Of it; `tokens` are those of the rival's answers.
        peak: Ours at so many tokens.
        cap: The rival's.
    """
    tokens = asked["tokens"]

    def taken(count: int) -> float:
        return contestant(folder, "spin", {**asked, "tokens": count, "steps": 2})["peak_bytes"]

    most = taken(4 * tokens)
    if most <= cap:
        return 4 * tokens
    longest = tokens + int((cap - peak) * 3 * tokens / (most - peak))  # a line, nearly
    while taken(longest := longest // 64 * 64) > cap:
        longest -= longest // 32
    return longest


def masks(folder: Path, *, prompt: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Returns the memory of one long row in parts, against the mask of tokens x tokens; with recomputation and without.

    And that of a deeper model whose checkpointed activations are elsewhere until the backward pass: in a file, since the
    host's `activation_offloading` asks torch for an accelerator, of which a CPU has none.
    """
    rows = []
    for checkpointing in (False, True):
        asked = {"vocabulary": 1024, "tokens": tokens, "prompt": prompt, "checkpointing": checkpointing}
        peaks = {
            way: median(contestant(folder, "spin", {**asked, "in_parts": way})["peak_bytes"] for _ in range(repeats))
            for way in (True, False)
        }
        about = f"{prompt} + {tokens} / {tokens} tokens in a row" + (
            ", gradient_checkpointing" if checkpointing else ""
        )
        rows.append(_row("peak memory of a step, GiB, no mask", about, peaks[True] / 2**30, "the row's mask",
                         peaks[False] / 2**30, "reported"))  # fmt: skip
    asked = {"vocabulary": 1024, "tokens": tokens, "prompt": prompt, "checkpointing": True, "layers": DEEP}
    peaks = {
        away: median(contestant(folder, "spin", {**asked, "away": away})["peak_bytes"] for _ in range(repeats))
        for away in (True, False)
    }
    rows.append(_row("peak memory of a step, GiB, what layers keep in a file",
                     f"{prompt} + {tokens} / {tokens} tokens in a row, {DEEP} layers, gradient_checkpointing",
                     peaks[True] / 2**30, "in memory", peaks[False] / 2**30, "reported"))  # fmt: skip
    return rows


def _row(figure: str, about: str, value: float, against: str, other: float, target: str) -> dict[str, Any]:
    return {"figure": figure, "workload": about, "value": value, "against": against, "other": other,
            "ratio": value / other, "target": target}  # fmt: skip


def contestant(folder: Path, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Returns what a contestant measured in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "memory.json"
    python = os.environ["SPIN_RIVAL_PYTHON"] if name == "trl" else sys.executable
    asked = {"folder": str(folder), **asked}
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [python, __file__, "--as", name, "--asked", json.dumps(asked), "--result", str(result)]
    subprocess.run(command, env=variables, check=True, capture_output=True)
    return json.loads(result.read_text())


# -- inside a contestant ----------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Steps:
    """Notes the steps of a contestant: CPU seconds of each, and the peak from the second on."""

    def __init__(self) -> None:
        self.before, self.ends = resident("VmRSS"), []

    def end(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.ends.append(used.ru_utime + used.ru_stime)
        if len(self.ends) == 1:
            Path("/proc/self/clear_refs").write_text("5")

    def figures(self) -> dict[str, float]:
        return {
            "peak_bytes": resident("VmHWM") - self.before,
            "cpu_seconds": (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1),
        }


def build(asked: dict[str, Any]) -> tuple[Any, dict[str, list[int]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=asked["vocabulary"], max_position_embeddings=65536, attn_implementation="sdpa",
                         tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                         **{**SHAPE, "num_hidden_layers": asked.get("layers", SHAPE["num_hidden_layers"])})  # fmt: skip
    kinds = {"prompt_ids": asked["prompt"], "chosen_ids": asked["tokens"], "rejected_ids": asked["tokens"]}
    pair = {kind: torch.randint(3, asked["vocabulary"], (count,)).tolist() for kind, count in kinds.items()}
    return LlamaForCausalLM(config), pair


class Away(saved_tensors_hooks):
    """Keeps what a forward pass saves in files until the backward pass asks for it, as offloading keeps it off a GPU."""

    def __init__(self, folder: Path, model: torch.nn.Module):
        super().__init__(self.put, lambda kept: kept if isinstance(kept, torch.Tensor) else torch.load(kept))
        self.folder, self.count = folder, 0
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def put(self, saved: torch.Tensor) -> torch.Tensor | Path:
        storage = saved.untyped_storage()
        if storage.data_ptr() in self.weights or not 1024 < saved.nbytes == storage.nbytes():
            return saved
        self.count += 1
        torch.save(saved.detach(), kept := self.folder / f"saved-{self.count}.pt")
        return kept


def spin(asked: dict[str, Any]) -> dict[str, float]:
    import transformers.models.llama.modeling_llama  # noqa: F401  no part of a step

    from axolotl_spin.training.layouts import PairCollator
    from axolotl_spin.training.logprobs import completion_logps
    from axolotl_spin.training.step import pair_losses

    steps = Steps()
    model, pair = build(asked)
    if asked.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    collator = PairCollator(0, "shared", SHAPE["hidden_size"])
    collator.in_parts = asked.get("in_parts", True)
    with torch.no_grad():
        opponent = completion_logps(model.eval(), collator([pair]), True).tolist()
    pair |= {"opponent_chosen_logp": opponent[0], "opponent_rejected_logp": opponent[1], "weight": 1.0}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6, fused=True)
    for _ in range(asked.get("steps", STEPS)):
        with Away(Path(asked["folder"]), model) if asked.get("away") else nullcontext():
            found = pair_losses(model, collator([pair]), beta=0.1, loss_type="sigmoid", sft_weight=0.0,
                                length_normalized=False, in_head=True)  # fmt: skip
            found.losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.end()
    return steps.figures()


def trl(asked: dict[str, Any]) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401  no part of a step
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, __version__

    measured = Steps()
    model, pair = build(asked)

    class End(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured.end()

    class OfIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the very token ids

    count = asked.get("steps", STEPS)
    config = DPOConfig(
        output_dir=str(Path(asked["folder"]) / "trl"), per_device_train_batch_size=1, max_steps=count, learning_rate=1e-6,
        optim="adamw_torch_fused", beta=0.1, max_length=None, bf16=False, use_cpu=True, remove_unused_columns=False,
        gradient_checkpointing=bool(asked.get("checkpointing")), precompute_ref_log_probs=True, report_to=[],
        save_strategy="no", logging_steps=1000,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    rows = Dataset.from_list([pair] * count)
    OfIds(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[End()]).train()
    return {**measured.figures(), "version": __version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as", dest="name", choices=("spin", "trl"), required=True)
    parser.add_argument("--asked", type=json.loads, required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.result.write_text(json.dumps({"spin": spin, "trl": trl}[arguments.name](arguments.asked)))
