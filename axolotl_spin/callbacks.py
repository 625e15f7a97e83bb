"""Where the trainer takes part in the host's events."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.about import note_start
from axolotl_spin.monitor.log import append_row, restart_log
from axolotl_spin.run.plan import Plan
from axolotl_spin.run.prepare import Launch


class SaveAtIterationEnd(TrainerCallback):
    """Asks for a checkpoint at each iteration's last step, whatever the host's interval, so that a resume can start there;
    and where the host ends training before its last step (`loss_watchdog_threshold`, say), so that nothing is lost.

    Args:
        plan: The run's.
    """

    def __init__(self, plan: Plan):
        self._ends = {entry.first_step + entry.steps for entry in plan.iterations}
        self._saved = -1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._saved = state.global_step
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        due = state.global_step in self._ends or control.should_training_stop
        if args.save_strategy != SaveStrategy.NO and due and self._saved != state.global_step:
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


class WatchUpdates(TrainerCallback):
    """Has a trainer's loop look at the weights before and after the step that it measures (with DeepSpeed the weights
    change in the last backward pass, before the Trainer's own `step`).

    Args:
        trainer: A `SpinTrainer`.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._trainer.loop.updates.before_step()
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._trainer.loop.updates.after_step()
        return control


class KeepRecord(TrainerCallback):
    """Keeps what a report needs beside pairs and metrics: `spin/log.jsonl` and `spin/about.json`.

    It must come before `TakeUp`, which logs.

    Args:
        directory: The run's.
        launch: Ranks and sharding of this start.
        file: How the user names the config.
        config: What the user wrote, without secrets.
    """

    def __init__(self, directory: RunDirectory, launch: Launch, file: str, config: dict[str, Any]):
        self._directory, self._launch, self._file, self._config = directory, launch, file, config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.is_world_process_zero:
            restart_log(self._directory.log, state.log_history)
            note_start(
                self._directory.about,
                config=self._config,
                file=self._file,
                step=state.global_step,
                ranks=self._launch.ranks,
                sharding=self._launch.sharding,
            )
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.is_world_process_zero:
            append_row(self._directory.log, state.log_history[-1])
        return control
