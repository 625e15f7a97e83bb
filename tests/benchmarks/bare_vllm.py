"""vLLM alone: `LLM.generate` over the prompts of a job. Run by the Python of vLLM's environment."""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    started = time.perf_counter()
    engine = LLM(**job["engine"])
    start = time.perf_counter() - started
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    tokens, seconds = [], []
    for repeat in range(job["repeats"]):
        params = [
            SamplingParams(**job["sampling"], max_tokens=job["most"], seed=repeat * len(prompts) + row, ignore_eos=True,
                           detokenize=False)
            for row in range(len(prompts))
        ]  # fmt: skip
        started = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(output.outputs[0].token_ids) for output in outputs))
    with open(job["report"], "w", encoding="utf-8") as file:
        json.dump({"start": start, "tokens": tokens, "seconds": seconds}, file)


if __name__ == "__main__":  # vLLM's own processes import this file too
    main(sys.argv[1])
