"""What the blocks of the YAML have in common: a switch stands for no number."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationInfo, field_validator


class Block(BaseModel):
    """Refuses `true` and `false` for numbers, which pydantic takes for 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and any(part in (int, float) for part in (kind, *get_args(kind))):
            raise ValueError(f"expected a number, got {str(value).lower()}")
        return value
