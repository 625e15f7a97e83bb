"""On one prompt's way nothing mixes devices: answers, scores, losses, gradients and figures on a GPU that is pretended.

What each gives there is what it gives on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pretended import OnGpu, a_gpu, back, moved
from test_pair_layouts import pairs
from test_scoring import dataset
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from axolotl_spin.game.schedule import OptimizerStart, restart_optimizer
from axolotl_spin.generation.backend import Sampling
from axolotl_spin.generation.chunks import Chunk
from axolotl_spin.generation.transformers import TransformersBackend
from axolotl_spin.generation.vllm.offload import device_storages
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.batches import MicroBatches
from axolotl_spin.training.evaluation import TokenMean
from axolotl_spin.training.layout_check import settle_layout
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.masks import shared_block_mask
from axolotl_spin.training.metrics import PairMetrics
from axolotl_spin.training.scoring import Scorer
from axolotl_spin.training.step import pair_losses
from axolotl_spin.training.updates import UpdateSample

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)

    def triangle(*size: int) -> Any:
        with _disable_current_modes():  # in one of which torch cannot make it
            return causal_lower_right(*size)

    monkeypatch.setattr("axolotl_spin.training.masks.causal_lower_right", triangle)
    with a_gpu() as device:
        yield device


def accelerator(device: torch.device) -> Any:
    """Returns what one process's accelerator says of itself."""
    return SimpleNamespace(
        device=device, process_index=0, num_processes=1, is_main_process=True, distributed_type=DistributedType.NO,
        reduce=lambda tensor, _: tensor, gather=lambda tensor: tensor, unwrap_model=lambda model, **_: model,
        gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=1),
    )  # fmt: skip


def model(device: torch.device, kind: torch.dtype = torch.float32, adapter: bool = False, **changes: Any) -> Any:
    made: Any = tiny.model(47, **changes)
    if adapter:
        torch.manual_seed(1)
        made = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    made = made.to(kind)
    return made if device == CPU else moved(made)


def on_cpu(tensor: Tensor) -> Tensor:
    return back(tensor) if isinstance(tensor, OnGpu) else tensor


def test_what_mixes_devices_is_found(gpu: torch.device) -> None:
    """Else the others show nothing."""
    there, here = torch.arange(6, device=gpu).view(2, 3), torch.ones(2, 3)
    assert (there + torch.tensor(1)).device == gpu
    assert torch.equal(there[torch.tensor([1])].cpu(), torch.tensor([[3, 4, 5]]))
    assert there.tolist() == [[0, 1, 2], [3, 4, 5]] and there[0, 1].item() == 1
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here[torch.tensor([0], device=gpu)],
        lambda: torch.where(there > 1, here, here),
        lambda: there.gather(1, here.long()),
        lambda: there.float() @ here.T,
        lambda: there.float().masked_fill(here > 1, 0),
    ):
        with pytest.raises(RuntimeError, match=r"device|index"):
            mixed()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()


def losses(
    device: torch.device, policy: Any, collator: PairCollator, in_head: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the losses of some pairs and all gradients."""
    rows = [{**row, "opponent_chosen_logp": -20.0, "opponent_rejected_logp": -25.0} for row in pairs(4, seed=1)]
    batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
    found = pair_losses(
        policy, batch, beta=0.1, loss_type="sigmoid", sft_weight=0.1, length_normalized=True, in_head=in_head
    )
    metrics = PairMetrics(0)
    metrics.add(0, found.spin, *found.logps.chunk(2), found.weight)
    metrics.restore(metrics.state(lambda tensor: tensor), device, main=True)
    metrics.add(0, found.spin, *found.logps.chunk(2), found.weight)
    assert metrics.take(lambda tensor: tensor)["logps/chosen"] < 0
    (found.losses * found.weight).sum().backward()
    grads = {name: on_cpu(weight.grad) for name, weight in policy.named_parameters() if weight.grad is not None}
    return on_cpu(found.losses.detach()), grads


@pytest.mark.parametrize(("in_head", "adapter"), [(False, False), (True, False), ("tiles", False), ("tiles", True)])
@pytest.mark.parametrize(
    ("layout", "attention", "in_parts"),
    [
        ("padded", "sdpa", False),
        ("padded", "eager", False),
        ("packed", "sdpa", False),
        ("shared", "sdpa", False),
        ("shared", "sdpa", "always"),
        ("shared", "eager", False),
    ],
)
def test_losses_and_gradients(
    layout: Any, attention: str, in_parts: Any, adapter: bool, in_head: Any, gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if in_head == "tiles":
        monkeypatch.setattr("axolotl_spin.training.head._HELD", 0)
        monkeypatch.setattr("axolotl_spin.training.head._CHUNK", 200)
    found = []
    for device in (CPU, gpu):
        collator = PairCollator(0, layout, hidden_size=32)
        collator.in_parts = in_parts
        policy = model(device, adapter=adapter, attn_implementation=attention)
        found.append(losses(device, policy, collator, bool(in_head)))
    (expected, its), (there, theirs) = found
    torch.testing.assert_close(there, expected)
    assert its.keys() == theirs.keys() and len(its) > (2 if adapter else 10)
    for name, grad in its.items():
        torch.testing.assert_close(theirs[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_flex_attentions_blocks(gpu: torch.device) -> None:
    collator = PairCollator(0, "shared")
    segments = collator(pairs(40, seed=2))["segments"]
    expected, there = shared_block_mask(segments), shared_block_mask(segments.to(gpu))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(back(getattr(there, name)), getattr(expected, name)), name
    place = [torch.tensor(value, device=gpu) for value in (0, 0, 3, 1)]
    assert there.mask_mod(*place).item() == expected.mask_mod(*(back(value) for value in place)).item()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "top_k": 20}])
@pytest.mark.parametrize("way", ["_decode", "_generate"])
def test_answers(way: str, sampling: dict[str, Any], gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts than rows, so that some join and some leave the batch."""
    monkeypatch.setattr("axolotl_spin.generation.transformers.can_decode", lambda _: way == "_decode")
    prompts = [row["prompt_ids"] for row in pairs(9, seed=3)]
    chunk = Chunk(0, tuple(range(9)), tuple(prompts), tuple(3 + place for place in range(9)), seed=5)
    settings = Sampling(**{"top_p": 1.0, "top_k": None, "stop_token_ids": (6,), **sampling})
    answers = []
    for device in (CPU, gpu):
        backend = TransformersBackend(Ranks(accelerator(device)), settings, 0, batch_size=4)
        found: list[Any] = []
        policy = model(device, attn_implementation="sdpa").eval()
        backend.answer(policy, [chunk], lambda _, completions, found=found: found.extend(completions))
        answers.append(found)
    assert answers[0] == answers[1]
    assert len({len(answer.ids) for answer in answers[0]}) > 2


def test_the_layout_and_the_opponents_scores(gpu: torch.device) -> None:
    scored = dataset(11)
    prompts = Dataset.from_list(pairs(6, seed=4))
    found = []
    for device in (CPU, gpu):
        collator = PairCollator(0)
        policy, here = model(device, attn_implementation="sdpa").eval(), accelerator(device)
        line = settle_layout(collator, policy, prompts, here, sample_packing=None, longest=64)
        batches = MicroBatches(len(scored), micro_batch=2, step=4, seed=3, first_epoch=0)
        found.append((line, Scorer(Ranks(here), collator, "auto").logps(policy, scored, batches)))
    assert found[0][0] == found[1][0] and "shared" in found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-5)
    assert found[1][1].device == CPU


def test_what_a_step_is_looked_at_for(gpu: torch.device) -> None:
    """The share of weights that it moves, and the optimizer's start."""
    found = []
    for device in (CPU, gpu):
        policy = model(device, torch.bfloat16)
        optimizer = torch.optim.Adagrad(policy.parameters(), lr=1e-2, foreach=False)
        start = OptimizerStart(optimizer)
        sample = UpdateSample(optimizer)
        ids = torch.arange(8, 20, device=device).view(2, 6)
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        counts = sample.counts()
        restart_optimizer(optimizer, start)
        assert all(
            state["sum"].device == device and state["sum"].sum().item() == 0 for state in optimizer.state.values()
        )
        found.append(counts)
    torch.testing.assert_close(found[1], found[0])
    assert 0 < found[0][0, 0] <= found[0][0, 1]


def test_held_out_rows(gpu: torch.device) -> None:
    labels = torch.tensor([[-100, -100, 9, 10], [-100, 8, 9, -100]])
    batch = {"input_ids": torch.tensor([[7, 8, 9, 10], [7, 8, 9, 0]]), "labels": labels}
    results = []
    for device in (CPU, gpu):
        mean, policy = TokenMean(accelerator(device)), model(device).eval()
        given = mean.once({name: tensor.to(device) for name, tensor in batch.items()})
        with torch.no_grad():
            out = policy(**given)
        mean.see(out.logits, given)
        mean.add(out.loss, given)
        results.append((mean.result(), {name: values.tolist() for name, values in mean.rows().items()}))
    assert results[0][0] == pytest.approx(results[1][0])
    assert results[0][1]["key"] == results[1][1]["key"] and len(results[1][1]["key"]) == 1
    assert results[0][1]["nll"] == pytest.approx(results[1][1]["nll"])


def test_a_gpu_without_a_number_is_the_one_that_tensors_lie_on() -> None:
    """accelerate says `cuda` where there is one process, and tensors say `cuda:0`."""
    with FakeTensorMode():
        there, here = torch.empty(5, device="cuda"), torch.empty(5)
        assert there.device != torch.device("cuda")
        [storage] = device_storages([[there, here]], torch.device("cuda"))
        assert storage._cdata == there.untyped_storage()._cdata
        assert len(device_storages([there], torch.device("cuda", 0))) == 1
        assert device_storages([there], torch.device("cuda", 1)) == []
