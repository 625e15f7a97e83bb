"""`spin.keep: best`: the best iteration's model in place of the last one's, once the host has saved that."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from axolotl_spin.disk.atomic import DamagedFileError, explained, flush, path_aside, read_json, remove_folder
from axolotl_spin.disk.directory import remove_signs
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.selected import stand, write_best
from axolotl_spin.run.selection import Standing

# what a saved model or adapter consists of, beside what is the same in every iteration
_WEIGHTS = (
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("adapter_model*.safetensors", "adapter_model*.bin", "adapter_config.json"),
)


def keep_one(run: SpinRun, last: int) -> str:
    """Makes the final model in `output_dir` the one that `spin.keep` names, and writes `best.json`. Call it on one rank.

    Every file is replaced whole. A run that is killed meanwhile is not complete yet: its next start has the host save the
    last model again, and then comes here.

    Args:
        run: The run, with the host's final save behind it.
        last: The last iteration that was run.

    Returns:
        Whose model the final one is, in words; nothing where it is the last iteration's as always.

    Raises:
        OSError: The disk is full or the folder is read-only; names the file.
    """
    standing = stand(run, last)
    if standing is None:
        return ""
    best, kept, said = standing.best, last, ""
    if run.settings.keep == "best" and best is not None:
        model = run.directory.model(best)
        if best == last:
            said = f"iteration {best}'s, the best and the last"
        elif any(_weights(model)):
            replace_weights(model, run.directory.root.parent)
            kept, said = best, f"iteration {best}'s, the best"
        else:
            said = f"iteration {last}'s, the last: the best is iteration {best}, but {model} is not there"
    elif run.settings.keep == "best":
        said = f"iteration {last}'s, the last: no iteration has a figure of `{standing.select}`"
    write_best(run, standing, kept=kept, alone=alone(run))
    return said


def replace_weights(model: Path, output_dir: Path) -> None:
    """Puts an iteration's weights where the host has saved the last one's.

    Args:
        model: The iteration's folder, which stays as it is.
        output_dir: The host's; what it holds of weights beside those goes.
    """
    with explained(output_dir):
        ready: list[tuple[Path, Path]] = []
        try:
            for source in _weights(model):
                target = output_dir / source.name
                ready.append((path_aside(target), target))
                shutil.copyfile(source, ready[-1][0])
                flush(ready[-1][0])
            for aside, target in ready:
                os.replace(aside, target)
        finally:
            for aside, _ in ready:
                aside.unlink(missing_ok=True)
        names = {target.name for _, target in ready}
        for spare in _weights(output_dir):
            if spare.name not in names:
                spare.unlink()
        flush(output_dir)


def remove_asides(output_dir: Path) -> None:
    """Removes what a killed `replace_weights` left half copied, and what killed starts left of finding their folder."""
    for pattern in _WEIGHTS:
        for path in output_dir.glob(f".{pattern}.????????"):
            path.unlink(missing_ok=True)
    remove_signs(output_dir)


def alone(run: SpinRun) -> int | None:
    """Returns the iteration whose model alone an earlier end of an iteration kept; see `keep_alone`."""
    try:
        found = read_json(run.directory.best).get("alone")
    except (FileNotFoundError, DamagedFileError):
        return None
    return found if isinstance(found, int) else None


def keep_alone(run: SpinRun, standing: Standing) -> None:
    """Removes the model of the iteration that led before, once the new leader's is saved. Call it on one rank.

    Only with `save_iterations: false` and `keep: best`; a model that was saved under other settings stays.
    """
    before = alone(run)
    if before is not None and before != standing.best and run.directory.model(before).exists():
        remove_folder(run.directory.model(before), run.directory.root)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file())
