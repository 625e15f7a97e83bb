"""Says before anything is loaded where a launcher could not start failed ranks again, or would start them too far back."""

from __future__ import annotations

import os
from typing import Any

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def warn_of_shared_store() -> None:
    """Warns where torchrun is to restart ranks that would find the addresses of those that failed.

    Its agent keeps one store over all restarts (PyTorch 2.13 and 2.14). Ranks of a later start read in it where those of an
    earlier one listened, as often as not before their peers have written anew, and the start hangs or fails.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        LOG.warning(
            f"`--max-restarts {restarts}`: restarted ranks would read the addresses of those that failed, and may not find "
            "each other. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun, and give it "
            "`--standalone` or `--rdzv-backend c10d`"
        )


def warn_of_going_back(cfg: Any) -> None:
    """Warns where a launcher starts a run again by itself, and its config has each start go back to the same place.

    Args:
        cfg: The host's, as it is before validation.
    """
    launcher = {name: os.environ.get(name, "0") for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT")}
    said = ", ".join(f"{name} is {count}" for name, count in launcher.items() if count not in ("", "0"))
    asked = cfg.get("resume_from_checkpoint")
    key = f"resume_from_checkpoint: {asked}" if asked else "auto_resume_from_checkpoints: false"
    if said and (asked or cfg.get("auto_resume_from_checkpoints") is False):
        LOG.warning(
            f"`{key}` holds for each start, also for those of a launcher that starts a run again by itself ({said}): what "
            "was made meanwhile is then moved to spin/replaced-N, and made again. Take the key out once the run has begun"
        )
