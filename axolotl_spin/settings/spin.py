"""The `spin:` block of the YAML: its keys, bounds and defaults.

Only pydantic is imported here, as in `args.py`, which claims `rl: spin` and hands the block to the host's schema.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from axolotl_spin.settings.block import Block
from axolotl_spin.settings.generation import GenerationConfig

LossType = Literal["sigmoid", "hinge", "space"]
# the loss of a pair while policy and opponent are the same model
LOSS_AT_START: Mapping[str, float] = {"sigmoid": math.log(2), "hinge": 1.0, "space": 2 * math.log(2)}
# beta where `spin.beta` is not set; at 1 the optimum of `space` is the data's distribution
BETA: Mapping[str, float] = {"sigmoid": 0.1, "hinge": 0.1, "space": 1.0}

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
EvalTask = Annotated[str, Field(min_length=1)]


class SpinConfig(Block):
    """Self-play settings (`spin`). Everything else is the host's key with the host's meaning."""

    model_config = ConfigDict(extra="forbid")

    iterations: int = Field(
        default=3, ge=1, le=1000, description="Self-play iterations T; `num_epochs` counts per iteration."
    )
    beta: Beta | list[Beta] = Field(
        default=BETA["sigmoid"],
        description="The paper's lambda: how far the policy may move from the opponent. "
        f"A number, or one per iteration. Default with `loss: space`: {BETA['space']:g}.",
    )
    learning_rate: LearningRate | list[LearningRate] | None = Field(
        default=None,
        description="Peak learning rate: a number, or one per iteration. Default: the host's `learning_rate`.",
    )
    history: int = Field(
        default=1,
        ge=0,
        description="How many earlier iterations' generations are trained on again, 0 to "
        "iterations-1 (the paper keeps 1).",
    )
    loss: LossType = Field(
        default="sigmoid",
        description="Of the margin t: the logistic loss log(1+exp(-t)), or `hinge`, relu(1-t). `space`: a logistic loss of "
        "each answer's reward by itself.",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Adds this times the human answer's negative log-likelihood per token.",
    )
    length_normalized: bool = Field(
        default=False,
        description="Divide each answer's reward by its tokens, for data whose answers are told apart by length alone. "
        "The optimum is then not the data's distribution.",
    )
    restart_optimizer: bool = Field(
        default=True, description="Start each iteration with fresh optimizer state, as the paper does."
    )
    schedule_epochs: int | None = Field(
        default=None,
        ge=1,
        description="Epochs over which the learning rate's schedule of each iteration is laid out, warmup included; "
        "`num_epochs` of them are run. Default: `num_epochs`.",
    )
    max_prompts: int | None = Field(
        default=None, ge=1, description="Use only the first N prompts of the prepared dataset. Default: all."
    )
    prompts_per_iteration: int | None = Field(
        default=None,
        ge=1,
        description="Prompts that each iteration answers: a part of all, drawn by `seed`, other ones each time until all "
        "have had their turn. Default: all.",
    )
    initial_pairs: str | None = Field(
        default=None,
        min_length=1,
        description="Pairs for iteration 0, which then generates nothing: a `pairs.parquet`, a folder made by `axolotl "
        "spin export`, or a dataset with `real` and `generated` messages (a file, a folder, or a name on the hub).",
    )
    turns: Literal["last", "all"] = Field(
        default="last",
        description="Which assistant turns become pairs: the last of each row, or every one.",
    )
    eval_prompts: int | None = Field(
        default=None,
        ge=0,
        description="Held-out prompts that the policy answers at each iteration's end, and once before the first. "
        "Default: 64 where there is held-out data (`val_set_size`, `test_datasets`), else 0.",
    )
    eval_tasks: list[EvalTask] = Field(
        default=[],
        description="Benchmarks of lm-eval, run on the start model and at each iteration's end: names, or paths of a YAML "
        "task or of a folder of them. Default: none.",
    )
    eval_limit: int | None = Field(
        default=None, ge=1, description="Only the first N samples of each of `eval_tasks`. Default: all."
    )
    eval_chat_template: bool = Field(
        default=False,
        description="Put the samples of `eval_tasks` into the chat template. lm-eval's default is without.",
    )
    eval_confirm_run_unsafe_code: bool = Field(
        default=False,
        description="Allow `eval_tasks` that run what the model writes as code, as lm-eval's own switch of that name does.",
    )
    save_iterations: bool = Field(
        default=True,
        description="Keep each iteration's resulting model or adapter in OUTPUT_DIR/spin/iteration-N/model.",
    )
    select: str | None = Field(
        default=None,
        description="The figure that tells which iteration is the best: `eval_loss`, `heldout_auc` (its distance from "
        "0.5), or a task's metric as `task/metric`. Default: `eval_loss` where there is held-out data, else none.",
    )
    keep: Literal["best", "last"] = Field(
        default="last", description="Which iteration's model is the final one in `output_dir`: the last, or the best."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="End the run after N iterations in a row that are no better by `select`. Default: run all.",
    )
    generation: GenerationConfig = Field(
        default_factory=GenerationConfig, description="How the opponent answers the prompts."
    )
    active: bool = Field(
        default=False,
        description="Set by `rl: spin`; not for users. Keeps the claim when the host validates a config twice.",
    )

    @field_validator("beta", "learning_rate", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """Reads `5e-7`, which YAML 1.1 leaves a string, and says what was expected instead of a union's errors."""
        if value is None:
            return None
        numbers = []
        for item in value if isinstance(value, (list, tuple)) else [value]:
            try:
                number = None if isinstance(item, bool) else float(item)
            except (TypeError, ValueError):
                number = None
            if number is None:
                raise ValueError(f"expected a number or a list of numbers, got {item!r}")
            if not 0 < number < math.inf:
                raise ValueError(f"must be greater than 0 and finite, got {number}")
            numbers.append(number)
        return numbers if isinstance(value, (list, tuple)) else numbers[0]

    @field_validator("eval_tasks", mode="before")
    @classmethod
    def _one_task(cls, value: Any) -> Any:
        """Reads `eval_tasks: gsm8k` as a list of one."""
        return [value] if isinstance(value, str) else [] if value is None else value

    @model_validator(mode="after")
    def _evals(self) -> SpinConfig:
        for key in ("eval_limit", "eval_chat_template", "eval_confirm_run_unsafe_code"):
            if getattr(self, key) and not self.eval_tasks:
                raise ValueError(
                    f"spin.{key} is {getattr(self, key)}, but there are no spin.eval_tasks: name some, or remove spin.{key}"
                )
        return self

    @model_validator(mode="after")
    def _beta_of_the_loss(self) -> SpinConfig:
        if "beta" not in self.model_fields_set:
            self.beta = BETA[self.loss]
        return self

    @model_validator(mode="after")
    def _lengths(self) -> SpinConfig:
        for key in ("beta", "learning_rate"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != self.iterations:
                raise ValueError(
                    f"spin.{key} lists {len(value)} values, but spin.iterations is {self.iterations}: "
                    f"give one number, or {self.iterations} of them"
                )
        if "history" not in self.model_fields_set:
            self.history = min(self.history, self.iterations - 1)  # a single iteration has no earlier one
        if self.history > self.iterations - 1:
            raise ValueError(
                f"spin.history is {self.history}, but only 0 to {self.iterations - 1} earlier iterations "
                f"exist with spin.iterations: {self.iterations}"
            )
        return self

    def betas(self) -> list[float]:
        """Returns beta for each iteration."""
        return _per_iteration(self.beta, self.iterations)

    def learning_rates(self, default: float) -> list[float]:
        """Returns the peak learning rate for each iteration; `default` is the host's."""
        return _per_iteration(default if self.learning_rate is None else self.learning_rate, self.iterations)


def _per_iteration(value: float | list[float], iterations: int) -> list[float]:
    return list(value) if isinstance(value, list) else [value] * iterations
