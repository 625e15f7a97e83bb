"""Stands for vLLM where its faults are tested, not its answers: what the worker uses of it, over a random generator.

What goes wrong is named by FAKE_VLLM: `die:N`, `hang:N`, `fewer:N`, `garbage:N`, `abort:N` after N answers; `start` and
`memory` while the engine starts; `model` when it is checked. FAKE_VLLM_VERSION and FAKE_VLLM_DEVICE are what it says it is.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

from .sampling_params import SamplingParams
from .usage.usage_lib import UsageContext

__version__ = os.environ.get("FAKE_VLLM_VERSION", "0.32.0")
PICTURE = 8  # the token that stands for one
_FAULT, _, _AFTER = os.environ.get("FAKE_VLLM", "").partition(":")

if _FAULT == "import":
    raise ImportError("libcudart.so.99: cannot open shared object file")


@dataclass
class EngineArgs:
    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    disable_log_stats: bool = False
    enable_chunked_prefill: bool = True
    revision: str | None = None
    enable_lora: bool = False
    max_lora_rank: int = 16
    max_loras: int = 1
    quantization: str | None = None
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool = False
    language_model_only: bool = False
    hf_overrides: dict | None = None
    hf_config_path: str | None = None
    limit_mm_per_prompt: dict | None = None

    def create_engine_config(self, usage_context: UsageContext | None = None) -> None:
        if _FAULT == "model":
            raise ValueError("Model architectures ['WeirdForCausalLM'] are not supported for now.")
        if self.quantization == "bitsandbytes":  # as without `vllm-bnb-plugin`
            raise ValueError("Unknown quantization method: bitsandbytes. Must be one of ['awq', 'fp8'].")
        with open(os.path.join(self.model, "config.json"), encoding="utf-8") as file:
            json.load(file)


class LLMEngine:
    """Answers one token of each running request a step; an answer depends on its prompt and seed alone."""

    @classmethod
    def from_engine_args(
        cls, arguments: EngineArgs, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT
    ) -> LLMEngine:
        sys.stdout.buffer.write(b"\x00\xff\xfe garbage, as a log may hold\n")
        sys.stdout.flush()
        if _FAULT == "start":
            raise RuntimeError("planted: the engine cannot start")
        if _FAULT == "memory":
            raise ValueError(
                "Free memory on device (3.1/79.2 GiB) on startup is less than desired GPU memory utilization"
            )
        assert arguments.skip_tokenizer_init == (arguments.limit_mm_per_prompt is None)
        assert arguments.generation_config == "vllm"
        # whole weights are the opponent's, which the run has written below `spin`; an adapter is served over the base model
        assert arguments.enable_lora != ("/spin/iteration-" in arguments.model), arguments.model
        return cls(arguments, usage_context)

    def __init__(self, arguments: EngineArgs, usage_context: UsageContext):
        self.arguments = arguments
        # as the real one: where nobody says how many, it depends on what the engine is used for
        self.at_once = arguments.max_num_seqs or (8 if usage_context is UsageContext.LLM_CLASS else 4)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=self.at_once))
        self._running: dict[str, tuple[random.Random, SamplingParams, list[int]]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._ended = 0

    def add_request(self, request_id: str, prompt: dict, params: SamplingParams, lora_request: object = None) -> None:
        assert (lora_request is not None) == self.arguments.enable_lora
        assert params.ignore_eos and not params.detokenize
        ids = prompt["prompt_token_ids"]
        if pictures := prompt.get("multi_modal_data", {}).get("image"):
            # as a processor does, with a token for each column of a picture
            widths = iter([picture.width for picture in pictures])
            ids = [token for one in ids for token in [one] * (next(widths) if one == PICTURE else 1)]
        self._prompts[request_id] = ids
        assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.arguments.max_model_len
        self._running[request_id] = (random.Random(params.seed), params, [])

    def get_num_unfinished_requests(self) -> int:
        return len(self._running)

    def step(self) -> list[SimpleNamespace]:
        if _FAULT and _AFTER and self._ended >= int(_AFTER):
            self._fail()
        time.sleep(float(os.environ.get("FAKE_VLLM_STEP", "0")))
        outputs = []
        for name, (generator, params, ids) in list(self._running.items())[: self.at_once]:
            never = [token for token, bias in (params.logit_bias or {}).items() if bias == -100]
            token = generator.choice([*params.stop_token_ids, *(token for token in range(7, 47) if token not in never)])
            ids.append(token)
            reason = "stop" if token in params.stop_token_ids else "length" if len(ids) >= params.max_tokens else None
            if reason and _FAULT == "abort" and self._ended >= int(_AFTER):
                reason = "abort"
            if reason:
                del self._running[name]
                self._ended += 1
            completion = SimpleNamespace(token_ids=[token], finish_reason=reason)
            told = {"request_id": name, "prompt_token_ids": self._prompts[name]}
            outputs.append(SimpleNamespace(**told, outputs=[completion], finished=reason is not None))
        return outputs

    def _fail(self) -> None:
        print(f"planted: {_FAULT} after {self._ended} answers", flush=True)
        if _FAULT == "die":
            os.kill(os.getpid(), 9)
        if _FAULT == "hang":
            time.sleep(3600)
        if _FAULT == "garbage":
            with open(sys.argv[2], encoding="utf-8") as job, open(json.load(job)["events"], "ab") as events:
                events.write(b"\xff\xfe{not json\n")
            time.sleep(3600)
        if _FAULT == "fewer":
            with open(sys.argv[2], encoding="utf-8") as job, open(json.load(job)["events"], "ab") as events:
                events.write(b'{"event": "done"}\n')
            os._exit(0)
