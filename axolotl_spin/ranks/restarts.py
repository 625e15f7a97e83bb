"""Says before anything is loaded where a launcher could not start failed ranks again."""

from __future__ import annotations

import os

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
