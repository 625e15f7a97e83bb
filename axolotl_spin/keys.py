"""Where a key of the `spin:` block belongs that stands elsewhere, or is misspelt.

The host drops a key that it does not know without a word, and the run would take the default in its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

Levels = Mapping[str, Collection[str]]
# an engine argument of vLLM's own, beside the key of `spin.generation`
_ENGINES_OWN = {"spin.generation.vllm": {"seed"}}


def levels(block: type[BaseModel], path: str = "spin") -> dict[str, list[str]]:
    """Returns the keys that users write in a block and in the blocks within it, by the block's path."""
    found = {path: sorted(block.model_fields.keys() - {"active"})}
    for name, field in block.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= levels(field.annotation, f"{path}.{name}")
    return found


def refuse_misplaced(
    data: Mapping[str, Any], ours: Levels, host: Collection[str], refused: Mapping[str, str | None]
) -> None:
    """Refuses keys that nothing would read.

    Args:
        data: The config as the user wrote it.
        ours: The keys of each block of ours, by the block's path (`spin`, `spin.generation`, ...).
        host: Keys that the host or another plugin reads at the top.
        refused: Those of them that are refused there, each with the key of ours in its place, where there is one.

    Raises:
        ValueError: Names the place where each belongs, or the key that was probably meant.
    """
    found = []
    for key, value in data.items():
        if value is None or key in host:
            continue
        if places := _places(key, ours):
            found.append(f"`{key}` stands at the top of the config, where nothing reads it: write {places}")
        elif isinstance(value, Mapping) and difflib.get_close_matches(str(key).lower(), ["spin"]):
            found.append(f"`{key}` is a block that nothing reads: did you mean `spin`?")
    if data.get("vllm") and _block(data, "spin.generation").get("backend") == "vllm":
        found.append("`vllm` at the top is the host's, for other RL types: SPIN's engines read `spin.generation.vllm`")
    for path, known in ours.items():
        block = _block(data, path)
        for key in block:
            if key in known or key in _ENGINES_OWN.get(path, ()):
                continue
            places = _places(key, ours)
            open_ended = path in _ENGINES_OWN
            if key in refused and not open_ended:
                places = places or (f"`{refused[key]}`" if refused[key] else "")
            elif key in host and not open_ended:
                places = f"{places} or the host's `{key}`, at the top" if places else f"the host's `{key}`, at the top"
            if places:
                found.append(f"`{path}.{key}` stands in the wrong place: write {places}")
            elif not open_ended:
                found.append(f"there is no key `{path}.{key}`: {_meant(key, path, ours)}")
    if found:
        raise ValueError("\n".join(found))


def _block(data: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    block: Any = data
    for name in path.split("."):
        block = block.get(name) if isinstance(block, Mapping) else None
    return block if isinstance(block, Mapping) else {}


def _places(key: str, ours: Levels) -> str:
    return " or ".join(f"`{path}.{key}`" for path, known in ours.items() if key in known)


def _meant(key: str, path: str, ours: Levels) -> str:
    """Returns the key of ours that is spelt most like another, in the same block or elsewhere, or the block's keys."""
    for place in (path, *ours):
        if close := difflib.get_close_matches(str(key).lower(), ours[place], n=1):
            return f"did you mean `{place}.{close[0]}`?"
    return f"`{path}` has {', '.join(ours[path])}"
