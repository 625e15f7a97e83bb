"""Log-probs, loss and gradients against TRL's DPOTrainer with an explicit reference model, and against plain sums."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import host
import pytest
import tiny
import torch

from axolotl_spin.training.layouts import Layout, PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.loss import spin_loss
from axolotl_spin.training.noise import disable_dropout

DATA = host.SHARED / "data" / "dolly_openqa_short_train.jsonl"


def pairs(count: int = 6, vocabulary: int = 47) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(7, vocabulary, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(2, 12), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(count)]


def plain_logp(model, prompt: list[int], completion: list[int]) -> float:
    """One sequence, no padding, no mask, log-softmax over everything, the chain rule in a loop."""
    logps = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


@pytest.mark.parametrize("pad", [0, 6, 9])
def test_sums_over_the_completion_whatever_the_padding(pad: int) -> None:
    model, rows = tiny.model(47).eval(), pairs()
    batch = PairCollator(pad)(rows)
    found = completion_logps(model, batch)
    expected = [plain_logp(model, r["prompt_ids"], r[kind]) for kind in ("chosen_ids", "rejected_ids") for r in rows]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    # a row's value does not depend on its neighbours
    alone = [completion_logps(model, PairCollator(pad)([row])).tolist() for row in rows]
    assert found.tolist() == pytest.approx([a[0] for a in alone] + [a[1] for a in alone], abs=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_an_empty_answer_has_a_log_prob_of_0(layout: Layout) -> None:
    """An answer that is nothing but its end has no token where the end takes no part."""
    model, rows = tiny.model(47).eval(), pairs()
    rows[1]["rejected_ids"] = rows[4]["rejected_ids"] = []
    expected = [plain_logp(model, r["prompt_ids"], r[kind]) for kind in ("chosen_ids", "rejected_ids") for r in rows]
    assert expected[7] == expected[10] == 0
    assert completion_logps(model, PairCollator(0, layout)(rows)).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("in_head", [True, False])
def test_the_forward_gets_no_labels(in_head: bool) -> None:
    """Kernels in place of the host's head and loss (Liger's, cut cross entropy) give no logits where there are some."""
    model = tiny.model(47).eval()
    given: set[str] = set()
    model.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    completion_logps(model, PairCollator(0)(pairs(2)), in_head)
    assert given == {"input_ids", "attention_mask", "logits_to_keep", "use_cache"}


def real_rows(tokenizer) -> list[dict]:
    """Real questions and answers, hashed into the tiny vocabulary word by word; the other answer is the next row's."""
    if not DATA.exists():
        pytest.skip(f"the real rows are not here: {DATA}")
    lines = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()[:9]]

    def ids(text: str) -> list[int]:
        return [7 + sum(word.encode()) % 40 for word in text.split()]

    answers = [[*ids(messages[1]["content"]), 6] for messages in lines]
    return [
        {"prompt_ids": [4, *ids(messages[0]["content"]), 5], "chosen_ids": answers[i], "rejected_ids": answers[i + 1]}
        for i, messages in enumerate(lines[:8])
    ]


@pytest.mark.parametrize("rows", ["random", "real"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_equals_trl_with_a_reference_model(tmp_path: Path, loss_type: str, rows: str) -> None:
    """Same batch, same opponent: losses, rewards and gradients of TRL's DPOTrainer, to 1e-5 in fp32."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = tiny.tokenizer()
    batch_rows = pairs() if rows == "random" else real_rows(tokenizer)
    policy, opponent = tiny.model(47, seed=1).eval(), tiny.model(47, seed=2).eval()
    beta = 0.3
    config = DPOConfig(
        output_dir=str(tmp_path), beta=beta, loss_type=loss_type, per_device_train_batch_size=len(batch_rows),
        max_length=None, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_dropout=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    dummy = Dataset.from_dict({"prompt": ["w1"], "chosen": [" w2"], "rejected": [" w3"]})
    reference = copy.deepcopy(policy)
    trainer = DPOTrainer(reference, ref_model=opponent, args=config, train_dataset=dummy, processing_class=tokenizer)
    features = [
        {"prompt_ids": r["prompt_ids"], "chosen_ids": r["chosen_ids"], "rejected_ids": r["rejected_ids"]}
        for r in batch_rows
    ]
    trl_batch = trainer.data_collator(features)
    trl_loss = trainer.compute_loss(trainer.model.train(), trl_batch)
    trl_loss.backward()
    metrics = {key: sum(values) / len(values) for key, values in trainer._metrics["train"].items()}

    batch = PairCollator(0)(batch_rows)
    with torch.no_grad():
        opponent_chosen, opponent_rejected = completion_logps(opponent, batch).chunk(2)
    chosen, rejected = completion_logps(policy.train(), batch).chunk(2)
    result = spin_loss(chosen, rejected, opponent_chosen, opponent_rejected, beta=beta, loss_type=loss_type)
    result.losses.mean().backward()

    assert result.losses.mean().item() == pytest.approx(trl_loss.item(), abs=1e-5)
    assert result.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
    assert result.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"], abs=1e-5)
    assert chosen.mean().item() == pytest.approx(metrics["logps/chosen"], rel=1e-5)
    assert rejected.mean().item() == pytest.approx(metrics["logps/rejected"], rel=1e-5)
    largest = 0.0
    for (name, ours), theirs in zip(policy.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name
        largest = max(largest, theirs.grad.abs().max().item())
    assert largest > 1e-2  # the comparison is about something


def test_dropout_is_off_everywhere() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny.model(47, attention_dropout=0.2), LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear")
    )
    model.train()
    batch = PairCollator(0)(pairs())
    torch.manual_seed(0)
    assert not torch.equal(completion_logps(model, batch), completion_logps(model, batch))
    assert disable_dropout(model) == ["attention_dropout=0.2", "dropout=0.3"]
    assert torch.equal(completion_logps(model, batch), completion_logps(model, batch))
    assert disable_dropout(model) == []
