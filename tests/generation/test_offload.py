"""What training holds is put aside and brought back bit for bit, and its memory is free meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from axolotl_spin.generation.vllm.offload import device_storages, offloaded

CPU = torch.device("cpu")


def trained(adapter: bool = False) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Returns a model and optimizer, wrapped as the trainer wraps them, after a step and another backward pass."""
    model: Any = tiny.model(20)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameters, lr=1e-3))
    ids = torch.arange(12).view(2, 6)
    for step in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter
        if parameter.grad is not None:
            found[f"{name}.grad"] = parameter.grad
    found |= dict(model.named_buffers())
    for index, values in enumerate(optimizer.state.values()):
        found |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return found


@pytest.mark.parametrize("adapter", [False, True])
def test_all_of_training_leaves_and_comes_back(adapter: bool) -> None:
    model, optimizer = trained(adapter)
    tensors = state_of(model, optimizer)
    kinds = ("grad", "exp_avg", "exp_avg_sq", "inv_freq", "weight")
    assert all(any(kind in name for name in tensors) for kind in kinds)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    ids = torch.arange(12).view(2, 6)
    loss = model(input_ids=ids, labels=ids).loss.item()
    with offloaded([model, optimizer], CPU) as size:
        held = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in before.values()}
        assert size >= sum(held.values()) > 0
        left = [name for name, tensor in tensors.items() if tensor.untyped_storage().nbytes()]
        assert left == []
    for name, tensor in state_of(model, optimizer).items():
        assert tensor is tensors[name] and torch.equal(tensor, before[name]), name
    assert model(input_ids=ids, labels=ids).loss.item() == loss
    optimizer.step()  # the gradients are where the optimizer looks for them


def test_views_of_one_buffer_stay_views_of_it() -> None:
    """As DeepSpeed's parameters are of its flat buffers."""
    flat = torch.arange(10.0)
    model = torch.nn.Module()
    model.first, model.second = torch.nn.Parameter(flat[:4]), torch.nn.Parameter(flat[4:].view(2, 3))
    with offloaded([model], CPU) as size:
        assert size == flat.nbytes == 40
    assert torch.equal(flat, torch.arange(10.0))
    flat[0], flat[5] = -1, -2
    assert model.first[0] == -1 and model.second[0, 1] == -2


def test_a_failure_within_brings_everything_back() -> None:
    model, optimizer = trained()
    before = {name: tensor.detach().clone() for name, tensor in state_of(model, optimizer).items()}
    with pytest.raises(RuntimeError, match="the engine died"), offloaded([model, optimizer], CPU):
        raise RuntimeError("the engine died")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model, optimizer).items())


def test_too_little_memory_is_said_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    monkeypatch.setattr(
        "axolotl_spin.generation.vllm.offload.psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})
    )
    with pytest.raises(MemoryError, match=r"spin\.generation\.vllm\.offload"), offloaded([model, optimizer], CPU):
        pass
    assert model.lm_head.weight.untyped_storage().nbytes() > 0


def test_only_what_training_holds_on_the_device_is_found() -> None:
    model = tiny.model(20)
    on_meta = torch.nn.Linear(3, 3, device="meta")
    storages = device_storages([model, on_meta, {"rows": [torch.zeros(3)]}], CPU)
    expected = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert len(storages) == len(expected) + 1
