"""What differs between supported hosts, and nothing else. Each piece says for which versions and when it can go."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from transformers import Trainer

OLDEST, FIRST_UNSUPPORTED = Version("0.19"), Version("0.22")


def check_host_version() -> None:
    """Refuses a host that this plugin was not tested with.

    Raises:
        RuntimeError: Names the version found and the versions that work.
    """
    found = Version(version("axolotl"))
    if not OLDEST <= Version(found.base_version) < FIRST_UNSUPPORTED:
        raise RuntimeError(
            f"axolotl {found} is installed, but axolotl-spin works with axolotl >={OLDEST},<{FIRST_UNSUPPORTED}: "
            "install one of those, or an axolotl-spin made for yours"
        )


def text_config(config: Any) -> Any:
    """Returns a model's config (`transformers.PretrainedConfig`), or the part of it that is its language model's.

    Models with code of their own may bring a config that knows no parts.
    """
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def model_class(config: Any, *, multimodal: bool) -> Any:
    """Returns the class that the host's loader takes for a model (contract test:
    test_host_contract.py::test_the_class_of_a_model_that_takes_more_than_text).

    Args:
        config: The model's (`transformers.PretrainedConfig`).
        multimodal: The host's `is_multimodal`.
    """
    from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if not multimodal:
        return AutoModelForCausalLM
    kind = MULTIMODAL_AUTO_MODEL_MAPPING.get(config.model_type, AutoModelForImageTextToText)
    return AutoModelForImageTextToText if isinstance(kind, str) else kind


def takes_more_than_text(config: Any) -> bool:
    """Whether a model is one for which the host sets `is_multimodal`, by its config (`transformers.PretrainedConfig`)."""
    from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING

    return getattr(config, "model_type", None) in MULTIMODAL_AUTO_MODEL_MAPPING


def empty_model(config: Any, *, multimodal: bool, trusted: bool) -> Any:
    """Returns a model of the host's class for it, not loaded.

    Args:
        config: See `model_class`.
        multimodal: See `model_class`.
        trusted: The host's `trust_remote_code`.
    """
    kind = model_class(config, multimodal=multimodal)
    if not hasattr(kind, "from_config"):
        return kind(config)
    return kind.from_config(config, trust_remote_code=trusted)


@contextmanager
def naming_data_keys(cfg: Any) -> Iterator[None]:
    """Names the keys where the host and `datasets` fail on the data in words of their own, deep in a map over processes.

    Raises:
        ValueError: In place of whatever they raised.
    """
    try:
        yield
    except Exception as error:
        if "test_size" in str(error):
            raise ValueError(f"`val_set_size: {cfg.val_set_size}` leaves nothing to train on: {error}") from error
        words = str(error).strip()
        if not isinstance(error, ValueError) or not words:
            words = f"{type(error).__name__}: {words}".removesuffix(": ")
        hint = " (a file without a row?)" if isinstance(error, StopIteration) else _preferences(cfg)
        told = ValueError(
            f"the host could not prepare the data: {words}{hint}\nLook at `path`, `type` and the fields under `datasets:` "
            "and `test_datasets:`"
        )
        # a note: commands that only look have no log
        told.add_note(f"the traceback is in {cfg.output_dir}/debug.log")
        raise told from error


def _preferences(cfg: Any) -> str:
    """Says which dataset that the host could not prepare holds preferences, as its columns show; else nothing."""
    from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config

    for entry in datasets_with_name_generator(cfg.datasets or []):
        try:
            rows = load_dataset_with_config(entry, cfg.hf_use_auth_token, streaming=False)
        except Exception:  # what the host could not read, it has told already
            continue
        if isinstance(rows, dict):
            rows = rows.get(entry.split or "train")
        if rows is not None and {"chosen", "rejected"} <= set(rows.column_names):
            return (
                f" (`{entry.path}` has the columns `chosen` and `rejected`, which are preferences: SPIN needs no rejected "
                "answers and makes its own; `field_messages: chosen` takes conversations from the one)"
            )
    return ""


@contextmanager
def rows_only() -> Iterator[None]:
    """Has the host prepare rows without estimating an SFT run's steps from them.

    The estimate runs through the packed dataset and refuses small held-out sets, which concerns packed SFT alone. The
    host leaves it out for `axolotl preprocess`, which it tells by this variable (contract test:
    test_host_contract.py::test_prepare_datasets_stops_before_counting_steps).
    """
    kept = os.environ.get("AXOLOTL_IS_PREPROCESS")
    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"
    try:
        yield
    finally:
        if kept is None:
            os.environ.pop("AXOLOTL_IS_PREPROCESS", None)
        else:
            os.environ["AXOLOTL_IS_PREPROCESS"] = kept


class PairTrainer(Trainer):
    """What a trainer whose loss is a mean over pairs has to say to the host.

    Belongs behind the host's trainer in the bases, so that it sees what that trainer logs.

    Attributes:
        loss_is_scaled_for_ga: None: the Trainer divides the loss by the accumulation steps. transformers 5.20 asks this;
            before, the same follows from `_get_num_items_in_batch` giving None. Can go with host 0.21's transformers.
    """

    loss_is_scaled_for_ga: bool | None = None

    def resume_folder(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Returns the checkpoint among the arguments of `_init_training_state`, which the Trainer gives by place or name.

        transformers 5.16 to 5.20 give it by place. Can go when the Trainer keeps the folder where one can ask for it.
        """
        return kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)

    @property
    def averages_over_this_start(self) -> bool:
        """Whether the Trainer's mean training loss counts from this start's first step (transformers 5.20), or from step 0.

        Can go when the oldest supported host has transformers 5.20.
        """
        return hasattr(self, "_initial_global_step")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Drops the `ppl` that the host derives from the training loss, which is no token's negative log-likelihood here.

        Hosts 0.19 and 0.20 always add it; 0.21 asks `reports_token_perplexity` (which would drop `eval_ppl` too, where it
        does have a meaning). Can go when the oldest supported host lets a trainer say that its training loss alone is not
        a perplexity.
        """
        logs.pop("ppl", None)
        super().log(logs, *args, **kwargs)
