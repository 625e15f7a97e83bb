"""Saves a checkpoint at each iteration's end, whatever the host's save interval, so that a resume can start there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from axolotl_spin.plan import Plan


class SaveAtIterationEnd(TrainerCallback):
    """Asks for a checkpoint at the last step of each iteration but the last, before the next one's generation.

    Args:
        plan: The run's.
    """

    def __init__(self, plan: Plan):
        self._ends = {entry.first_step + entry.steps for entry in plan.iterations[:-1]}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        saved = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}").exists()
        if args.save_strategy != SaveStrategy.NO and state.global_step in self._ends and not saved:
            control.should_save = True
        return control
