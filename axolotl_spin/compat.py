"""What differs between supported hosts, and nothing else. Each piece says for which versions and when it can go."""

from __future__ import annotations

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


class WithoutTokenPerplexity(Trainer):
    """Drops the `ppl` that the host derives from the training loss, which is no token's negative log-likelihood here.

    Hosts 0.19 and 0.20 always add it; 0.21 asks `reports_token_perplexity` (which would drop `eval_ppl` too, where it
    does have a meaning). Belongs behind the host's trainer in the bases, so that it sees what that trainer logs. Can go
    when the oldest supported host lets a trainer say that its training loss alone is not a perplexity.
    """

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs.pop("ppl", None)
        super().log(logs, *args, **kwargs)
