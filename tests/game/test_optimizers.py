"""Every optimizer that the host knows starts afresh at an iteration's start, or is refused."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.trainers.mixins.optimizer import OptimizerMixin
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import CustomSupportedOptimizers
from transformers import Trainer
from transformers.training_args import OptimizerNames

from axolotl_spin.game.schedule import OptimizerStart, restart_optimizer
from axolotl_spin.refusals import refuse_unsupported

NAMES = sorted({kind.value for names in (OptimizerNames, CustomSupportedOptimizers) for kind in names})
# what an optimizer needs that is not here
NEEDS = {
    "adamw_anyprecision": "torchdistx", "apollo_adamw": "apollo_torch", "galore_adafactor": "galore_torch",
    "galore_adamw": "galore_torch", "galore_adamw_8bit": "galore_torch", "grokadamw": "grokadamw",
    "stable_adamw": "optimi", "adamw_torch_xla": "torch_xla", "adamw_torch_npu_fused": "torch_npu",
    "optimi_adamw": "optimi", "came_pytorch": "came_pytorch", "q_galore_adamw8bit": "q_galore_torch", "scao": "scao",
    "polora": "polora",
    **{f"flash_{kind}": "flashoptim" for kind in ("adamw", "adam", "sgd", "sgdw", "lion")},
}  # fmt: skip
# the host has the names, but its builder has no branch for them
UNKNOWN_TO_THE_BUILDER = ("ao_adamw_4bit", "ao_adamw_8bit")
ON_AN_ACCELERATOR = {
    "ao_adamw_fp8": "computes in fp8 on a GPU",
    **{name: "keeps its state by a GPU's kernels" for name in NAMES if name.startswith("flash_")},
    "galore_adamw_8bit": "takes GaLore's own 8-bit kernels, which are a GPU's",
}


class Host(OptimizerMixin, Trainer):
    """The host's trainer, as far as it makes an optimizer."""


def make(name: str, model: torch.nn.Module, folder: Path) -> torch.optim.Optimizer:
    """Returns the optimizer that the host makes of a config."""
    settings = {"optimizer": name, "optim_target_modules": ["self_attn", "mlp"], "qgalore_rank": 4}
    kwargs: dict[str, Any] = {
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "dion_learning_rate": 1e-2,
        "dion_momentum": 0.9,
    }
    trainer: dict[str, Any] = {}
    builder = SimpleNamespace(cfg=DictDefault(settings), model=model)
    HFCausalTrainerBuilder._configure_optimizer(builder, kwargs, trainer)
    arguments = {key: kwargs[key] for key in ("learning_rate", "weight_decay", "optim") if key in kwargs}
    targets = {"optim_target_modules": ["self_attn", "mlp"]} if name.startswith(("galore", "apollo")) else {}
    args = AxolotlTrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **arguments, **targets)
    host = Host(model=model, args=args, **trainer)
    return host.create_optimizer()


# keeps its state in its groups by the parameters themselves, which no state that was saved finds again
LOST_BY_A_CHECKPOINT = ("grokadamw",)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> torch.Tensor:
    """Takes steps on the same batches, with the same random numbers; returns all weights."""
    for index in range(count):
        torch.manual_seed(index)
        ids = torch.randint(7, 40, (2, 9))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def missing(name: str) -> str:
    """Returns why an optimizer cannot be made here."""
    library = NEEDS.get(name)
    if library and importlib.util.find_spec(library) is None:
        return f"`{library}`, which brings it, is not installed"
    if name in UNKNOWN_TO_THE_BUILDER:
        return "the host's builder does not know it"
    return ON_AN_ACCELERATOR.get(name, "")


def refused(name: str) -> bool:
    try:
        refuse_unsupported({"optimizer": name})
    except ValueError:
        return True
    return False


def pages_of(optimizer: torch.optim.Optimizer) -> list[int]:
    """Returns where a paged optimizer's state lies: on a GPU in memory that is never freed, so it has to stay the same."""
    if not getattr(optimizer, "is_paged", False):
        return []
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert tensors
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("name", [name for name in NAMES if not refused(name)])
def test_every_optimizer_restarts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps from the weights that it has brought about as a new one does, bit for bit."""
    if why := missing(name):
        pytest.skip(why)
    if name == "stable_adamw":  # it would take Triton's kernels where Triton is installed, whatever the device is
        monkeypatch.setattr(importlib.import_module("optimi.stableadamw"), "_default_to_triton", lambda _: False)
    model = tiny.model(47)
    torch.manual_seed(0)
    optimizer = make(name, model, tmp_path)
    start = OptimizerStart(optimizer)
    steps(model, optimizer)
    fresh_model, kept_model = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(0)
    fresh = steps(fresh_model, make(name, fresh_model, tmp_path))
    kept_optimizer = make(name, kept_model, tmp_path)
    kept_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = steps(kept_model, kept_optimizer)
    if name in LOST_BY_A_CHECKPOINT:
        assert torch.equal(kept, fresh)
        kept = steps(*copy.deepcopy((model, optimizer)))
    pages = pages_of(optimizer)
    restart_optimizer(optimizer, start)
    assert pages_of(optimizer) == pages
    assert torch.equal(steps(model, optimizer), fresh)
    if name not in ("sgd", "sinkgd"):  # which keep nothing from step to step
        assert not torch.equal(kept, fresh)  # else the comparison shows nothing


def test_refused_optimizers_are_those_that_cannot_restart() -> None:
    assert [name for name in NAMES if refused(name)] == sorted(
        name for name in NAMES if "layerwise" in name or "lomo" in name or name.startswith("schedule_free")
    )
