"""Self-Play Fine-Tuning (SPIN, Chen et al. 2024, arXiv 2401.01335) as an RL type of Axolotl.

Importing this package is cheap: the plugin class is resolved on first use, so that the host can
discover it in every environment without paying for torch or transformers.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("axolotl-spin")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["SpinPlugin", "__version__"]


def __getattr__(name: str):
    if name == "SpinPlugin":
        from axolotl_spin.plugin import SpinPlugin

        return SpinPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
