"""Measures models on held-out rows, all in the same way: what they answer, and how likely people's answers are to them.

    python tests/benchmarks/answers.py HELDOUT.jsonl MOST_TOKENS RESULT.json MODEL [MODEL ...]

- `nll`: nats per token of the human answers, all tokens alike
- `auc`, `length`, `distinct_2`: of answers at temperature 1, as held-out play defines them
- `f1`: token F1 of greedy answers against the human's, by an lm-eval task that is made here, with its standard error; of
  the last model alone
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from axolotl_spin.game.heldout_play import measure

BATCH = 32
SEED = 11
TASK = "short_answers"


def main() -> None:
    """Measures the models of the command line."""
    held_out, most, result, *models = sys.argv[1:]
    rows = [json.loads(line)["messages"] for line in Path(held_out).read_text(encoding="utf-8").splitlines()]
    task = make_task(Path(result).parent / "task", rows, int(most))
    tasks = [*(None for _ in models[1:]), task]
    found = [measured(Path(model), rows, int(most), task) for model, task in zip(models, tasks, strict=True)]
    Path(result).write_text(json.dumps(found, indent=1))


def measured(folder: Path, rows: list[list[dict[str, str]]], most: int, task: Path | None) -> dict[str, float]:
    """Returns a model's figures.

    Args:
        folder: Of the model and its tokenizer.
        rows: Conversations, each ending with a human answer.
        most: Tokens of an answer.
        task: Folder of the lm-eval task, or None.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model.cuda()
    prompts, human = [], []
    for messages in rows:
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        end = whole.index(tokenizer.eos_token_id, len(prompt))
        prompts.append(prompt)
        human.append(whole[len(prompt) : end + 1])
    own, own_logp = sampled(model, tokenizer, prompts, most)
    human_logp = logps(model, prompts, human)
    table = pa.table({"human_ids": human, "own_ids": own, "human_logp": human_logp, "own_logp": own_logp})
    play = measure(table, [tokenizer.eos_token_id])
    return {
        "nll": -float(np.sum(human_logp)) / sum(map(len, human)),
        **{name: play[f"spin/heldout_{name}"] for name in ("auc", "length", "distinct_2")},
        "human_length": play["spin/heldout_human_length"],
        **({} if task is None else f1(model, tokenizer, task)),
    }


@torch.inference_mode()
def sampled(model: Any, tokenizer: Any, prompts: list[list[int]], most: int) -> tuple[list[list[int]], list[float]]:
    """Returns an answer to each prompt at temperature 1, its end token included, and the answers' log-probs in nats."""
    set_seed(SEED)
    end, found, sums = tokenizer.eos_token_id, [], []
    for first in range(0, len(prompts), BATCH):
        batch = tokenizer.pad({"input_ids": prompts[first : first + BATCH]}, padding_side="left", return_tensors="pt")
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": most}
        output = model.generate(**batch.to(model.device), **how, return_dict_in_generate=True, output_logits=True)
        drawn = output.sequences[:, batch["input_ids"].shape[1] :]
        logits = torch.stack(output.logits, dim=1).float()
        tokens = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        for answer, its in zip(drawn.tolist(), tokens.double(), strict=True):
            found.append(answer[: answer.index(end) + 1] if end in answer else answer)
            sums.append(its[: len(found[-1])].sum().item())
    return found, sums


@torch.inference_mode()
def logps(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Returns the log-prob of each answer after its prompt, in nats, summed over its tokens."""
    found = []
    for first in range(0, len(prompts), BATCH):
        some = range(first, min(first + BATCH, len(prompts)))
        texts = [torch.tensor(prompts[row] + answers[row], device=model.device) for row in some]
        ids = pad_sequence(texts, batch_first=True)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        predicted = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        tokens = predicted.gather(-1, ids[:, 1:, None])[..., 0]
        for index, row in enumerate(some):
            before = len(prompts[row]) - 1
            found.append(tokens[index, before : before + len(answers[row])].double().sum().item())
    return found


def make_task(folder: Path, rows: list[list[dict[str, str]]], most: int) -> Path:
    """Writes an lm-eval task: greedy answers, and their token F1 against the human's (SQuAD's definition)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    lines = [json.dumps({"question": row[-2]["content"], "answer": row[-1]["content"]}) for row in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "f1.py").write_text(
        "from transformers.data.metrics.squad_metrics import compute_f1\n\n\n"
        "def process_results(doc, results):\n"
        '    return {"f1": compute_f1(doc["answer"], results[0])}\n'
    )
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": most},
        "metric_list": [{"metric": "f1", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    text = yaml.safe_dump(task, sort_keys=False) + "process_results: !function f1.process_results\n"
    (folder / f"{TASK}.yaml").write_text(text)
    return folder


def f1(model: Any, tokenizer: Any, task: Path) -> dict[str, float]:
    """Returns the task's figure and its standard error."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # what it tells of the machine takes it seconds
    evaluator.add_env_info = lambda *_: None
    found = evaluator.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=1000,
        log_samples=False,
    )["results"][TASK]
    return {"f1": found["f1,none"], "f1_stderr": found["f1_stderr,none"]}


if __name__ == "__main__":
    main()
