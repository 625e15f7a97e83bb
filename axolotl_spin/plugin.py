"""Axolotl's hooks, each handing over to one part of this package; all of them inert when SPIN is off.

On host 0.21 the plugin is registered in every environment in which it is installed, so nothing heavy may be imported at
module level or when a config does not say `rl: spin`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin, PluginManager

from axolotl_spin.args import is_on, spin_config
from axolotl_spin.launched import refuse_devices, refuse_loaded

if TYPE_CHECKING:
    from axolotl_spin.run.prepare import SpinRun


class SpinPlugin(BasePlugin):
    """Adds the RL type `spin` to Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self.run: SpinRun | None = None
        # `axolotl spin generate` sets both: it starts elsewhere, and stops earlier
        self.trainer_class: type | None = None
        self.settle: Callable[[SpinRun, Any], None] | None = None
        self._trainer: Any = None
        self._reached: int | None = None  # the step at which training returned
        self._concerned = True
        self._written: dict[str, Any] | None = None

    def register(self, cfg: dict) -> None:
        """Refuses an untested host, what another method has left, and an `output_dir` that cannot be written to.

        The host has not parsed the config yet: its schema drops from `datasets:` what tells that they hold preferences.
        """
        self._concerned = cfg.get("rl") == "spin" or cfg.get("spin") is not None
        if self._concerned:
            from axolotl_spin.monitor.ending import end_plainly

            end_plainly()
        if cfg.get("rl") == "spin":
            from axolotl_spin.compat import check_host_version
            from axolotl_spin.disk.directory import check_base_model, check_output_dir
            from axolotl_spin.monitor.about import plain_config
            from axolotl_spin.ranks.build_lock import watch_builds
            from axolotl_spin.ranks.restarts import warn_of_going_back, warn_of_shared_store
            from axolotl_spin.refusals import refuse_leftovers

            check_host_version()
            refuse_leftovers(cfg)
            watch_builds()  # DeepSpeed's extensions, from here on
            warn_of_shared_store()
            warn_of_going_back(cfg)
            self._written = plain_config(cfg)
            if isinstance(cfg.get("output_dir"), str):
                check_output_dir(cfg["output_dir"])
            if isinstance(cfg.get("base_model"), str):
                check_base_model(cfg["base_model"])

    def get_input_args(self) -> str | None:
        """Adds the `spin:` block, but not to a config without one: the host would build its schema anew for nothing."""
        return "axolotl_spin.args.SpinArgs" if self._concerned else None

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Prepares the host's SFT dataset, reads prompts from it and lays out the run; nothing is loaded yet."""
        self.run = None
        settings = spin_config(cfg)
        if settings is None:
            return None
        whole = settings.generation.backend == "vllm" and not cfg.adapter
        refuse_loaded(cfg, settings, self._other_trainers(cfg), needs_whole=whole)

        import torch
        from accelerate.utils import parse_flag_from_env
        from axolotl.common.datasets import TrainDatasetMeta
        from axolotl.loaders import load_processor, load_tokenizer
        from axolotl.utils.data import prepare_datasets

        from axolotl_spin.compat import naming_data_keys, rows_only
        from axolotl_spin.data.heldout import refuse_missing_data
        from axolotl_spin.evals.tasks import asked_benchmarks
        from axolotl_spin.run.prepare import prepare_run
        from axolotl_spin.run.selected import refuse_selection

        if not preprocess and not parse_flag_from_env("ACCELERATE_USE_CPU"):
            accelerator = torch.accelerator.current_accelerator()
            refuse_devices(cfg, torch.cuda.device_count(), accelerator.type if accelerator else None)
        refuse_missing_data(settings, cfg)
        refuse_selection(settings, cfg)
        benchmarks = settings.eval_tasks and asked_benchmarks(
            settings.eval_tasks,
            limit=settings.eval_limit,
            chat_template=settings.eval_chat_template,
            unsafe_code=settings.eval_confirm_run_unsafe_code,
        )
        if not torch.cuda.is_available():
            cfg.device_map = None  # with several ranks the host sets an accelerator's index
        tokenizer = load_tokenizer(cfg)
        processor = load_processor(cfg, tokenizer) if cfg.processor_type else None
        with rows_only(), naming_data_keys(cfg):
            train_dataset, eval_dataset, _, _ = prepare_datasets(cfg, tokenizer, processor)
        self.run = prepare_run(cfg, settings, train_dataset, tokenizer, eval_dataset, processor)
        if not preprocess:
            from axolotl_spin.report import warn_without_report
            from axolotl_spin.run.resume import settle_start
            from axolotl_spin.run.together import settle_together

            settle_together(self.run, cfg, self.settle or settle_start)
            if self.run.served:
                from axolotl_spin.generation.vllm.served import check_serving

                check_serving(self.run.served, settings.generation.vllm)
            if benchmarks and self.settle is None:  # `axolotl spin generate` stops before there is anything new
                self.run.benchmarks = benchmarks.load() if _is_main() else benchmarks
                if _is_main():
                    from axolotl.loaders.utils import load_model_config

                    benchmarks.refuse_select(settings.select)
                    benchmarks.refuse_unfit(load_model_config(cfg), tokenizer)
            if _is_main():
                warn_without_report(self.run.directory)
        return TrainDatasetMeta(train_dataset, eval_dataset, self.run.plan.total_steps)

    def pre_model_load(self, cfg: Any) -> None:
        """Seeds what the host draws while it loads a model (rows of added tokens, an adapter), as host 0.21 does itself."""
        if self.run is not None:
            from transformers import set_seed

            set_seed(self.run.seed)

    def _other_trainers(self, cfg: Any) -> list[str]:
        plugins = PluginManager.get_instance().plugins.items()
        return [name for name, plugin in plugins if plugin is not self and plugin.get_trainer_cls(cfg) is not None]

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Returns the trainer of a config with `rl: spin`; the host takes the first plugin's that returns one."""
        if not is_on(cfg):
            return None
        if self.trainer_class is not None:
            return self.trainer_class
        from axolotl_spin.trainer import SpinTrainer

        return SpinTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Spreads the host's per-epoch settings over the iterations and turns off what works on batches of SFT rows."""
        if not is_on(cfg):
            return None
        arguments: dict[str, Any] = {
            "sample_packing": False,
            "eval_sample_packing": False,
            "dataloader_drop_last": False,
            # the host's default where saves and evaluations coincide; losses of two iterations do not compare
            "load_best_model_at_end": False,
        }
        if self.run is None:  # `axolotl evaluate`
            return arguments
        plan = self.run.plan
        arguments["num_train_epochs"] = plan.total_epochs
        arguments["max_steps"] = plan.total_steps
        for setting, per_epoch in (("save_steps", cfg.saves_per_epoch), ("eval_steps", cfg.evals_per_epoch)):
            if per_epoch and cfg.get(setting):  # a fraction of the run, which the host took to be one iteration
                share = 1.0 / (per_epoch * plan.total_epochs)
                arguments[setting] = share if share < 1 else plan.total_steps  # 1 is a step, no fraction
        return arguments

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        if self.run is None:
            return []
        from axolotl_spin.callbacks import KeepRecord, SaveAtIterationEnd, TakeUp, WatchUpdates
        from axolotl_spin.monitor.about import plain_config
        from axolotl_spin.monitor.terminal import show_lines

        show_lines(trainer)
        written = plain_config(cfg) if self._written is None else self._written
        record = KeepRecord(self.run.directory, self.run.launch, _command(cfg), written)
        return [SaveAtIterationEnd(self.run.plan), record, TakeUp(trainer), WatchUpdates(trainer)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.run is not None:
            self._trainer = trainer
            trainer.attach(self.run)
            if cfg.resume_from_checkpoint:
                trainer.bring(cfg.resume_from_checkpoint)

    def post_train(self, cfg: Any, model: Any) -> None:
        if self._trainer is not None:  # the host calls a second time, once the model is saved
            self._trainer.loop.ranks.ferry.clear()
            self._reached, self._trainer = self._trainer.state.global_step, None

    def post_train_unload(self, cfg: Any) -> None:
        """Notes how far the run came and prints the table of iterations, behind everything that the host says.

        It is complete where it took its last step, or where `spin.patience` ended it: the host may end it before, for
        reasons of its own. A complete run's final model is the one that `spin.keep` names.
        """
        reached, self._reached = self._reached, None
        if reached is not None and self.run is not None and _is_main():
            from axolotl_spin.monitor.about import note_end
            from axolotl_spin.monitor.tables import End, print_table
            from axolotl_spin.report import report_at_end
            from axolotl_spin.run.keeping import keep_one
            from axolotl_spin.run.resume import is_complete

            run, complete = self.run, is_complete(self.run, reached)
            final = keep_one(run, run.plan.locate(reached - 1).iteration) if complete else ""
            why = complete if isinstance(complete, str) else None
            note_end(run.directory.about, reached, bool(complete), why)
            # before the run counts as complete, so that a kill leaves none without it
            report_at_end(run.directory, bool(complete))
            if complete:
                run.write_plan(completed_steps=reached)
            end = End(reached, complete, final)
            print_table(run.directory, run.plan, _command(cfg), cfg.adapter or None, run.settings.save_iterations, end)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _command(cfg: Any) -> str:
    """Returns how the user names this config on the command line."""
    return str(cfg.axolotl_config_path or "spin.yml")
