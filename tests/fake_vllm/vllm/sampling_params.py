from dataclasses import dataclass, field
from enum import Enum


class RequestOutputKind(Enum):
    DELTA = 1


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    max_tokens: int = 16
    seed: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind | None = None
    logit_bias: dict[int, float] | None = None
