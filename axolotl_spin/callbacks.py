"""Where the trainer takes part in the host's events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from axolotl_spin.plan import Plan


class SaveAtIterationEnd(TrainerCallback):
    """Asks for a checkpoint at each iteration's last step, whatever the host's interval, so that a resume can start there.

    Args:
        plan: The run's.
    """

    def __init__(self, plan: Plan):
        self._ends = {entry.first_step + entry.steps for entry in plan.iterations}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        saved = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}").exists()
        if args.save_strategy != SaveStrategy.NO and state.global_step in self._ends and not saved:
            control.should_save = True
        return control


class TakeUp(TrainerCallback):
    """Has a resumed trainer take up what its checkpoint kept, once weights and counters are the checkpoint's.

    Args:
        trainer: A `SpinTrainer`.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._trainer.take_up()
        return control
