"""Chunks, limits, cutting, and the transformers backend on a tiny model."""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from axolotl_spin.generation import Chunk, Sampling, chunk_rows, chunk_size, cut, iteration_seed, token_limit
from axolotl_spin.generation.transformers import TransformersBackend


def test_chunks_hold_every_prompt_once_longest_first() -> None:
    assert chunk_rows([3, 9, 3, 5, 9], 2) == [[1, 4], [3, 0], [2]]
    assert chunk_rows([], 2) == []


def test_seeds_depend_on_their_arguments_alone() -> None:
    seeds = {iteration_seed(s, i) for s in range(3) for i in range(3)}
    assert len(seeds) == 9
    assert iteration_seed(42, 1) == iteration_seed(42, 1) < 2**63


@pytest.mark.parametrize(
    ("prompts", "batch", "expected"), [(5, 4, 4), (127, 8, 8), (256, 8, 16), (50_000, 32, 256), (50_000, 64, 512)]
)
def test_a_chunk_is_several_batches_where_there_are_many(prompts: int, batch: int, expected: int) -> None:
    assert chunk_size(prompts, batch) == expected


@pytest.mark.parametrize(
    ("prompt", "most", "expected"), [(10, None, 512), (1000, None, 24), (10, 100, 100), (1000, 100, 24), (1023, 5, 1)]
)
def test_an_answer_never_goes_beyond_sequence_len(prompt: int, most: int | None, expected: int) -> None:
    assert token_limit(prompt, max_new_tokens=most, sequence_len=1024) == expected


def test_cut() -> None:
    """The first stop token ends and is kept; a cut answer is the model's sample and gets no end token."""
    assert cut([5, 6, 2, 2, 2], 9, [2]) == ([5, 6, 2], "stop")
    assert cut([5, 6, 7], 2, [2]) == ([5, 6], "length")
    assert cut([5, 6, 2], 2, [2]) == ([5, 6], "length")
    assert cut([2, 5], 2, [2]) == ([2], "stop")


def answers(model, prompts, *, seed=1, limits=None, **sampling):
    settings = Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": None, "stop_token_ids": (6,), **sampling})
    backend = TransformersBackend(Accelerator(cpu=True), settings, pad_token_id=0)
    limits = tuple(limits or [12] * len(prompts))
    chunk = Chunk(0, tuple(range(len(prompts))), tuple(prompts), limits, seed)
    [(_, completions)] = list(backend.answer(model.eval(), [chunk]))
    return completions


@pytest.fixture(scope="module")
def model():
    return tiny.model(20)


PROMPTS = [[4, 9, 10, 5], [4, 11, 5], [7, 8, 9, 10, 11, 12, 5]]


def test_greedy_answers_are_the_argmax_whatever_the_padding(model) -> None:
    """Against a loop without cache, padding or batch."""
    for prompt, completion in zip(PROMPTS, answers(model, PROMPTS, temperature=0), strict=True):
        ids, drawn = list(prompt), []
        while len(drawn) < 12 and 6 not in drawn:
            drawn.append(model(torch.tensor([ids + drawn])).logits[0, -1].argmax().item())
        assert completion.ids == drawn


def test_samples_follow_their_seed_and_leave_random_state_alone(model) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = answers(model, PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert answers(model, PROMPTS) == first
    assert answers(model, PROMPTS, seed=2) != first


def test_limits_are_each_rows_own(model) -> None:
    completions = answers(model, PROMPTS, limits=[2, 12, 5], stop_token_ids=())
    assert [len(completion.ids) for completion in completions] == [2, 12, 5]
    assert {completion.finish_reason for completion in completions} == {"length"}


def test_the_models_own_generation_config_does_not_bend_the_samples(model) -> None:
    """A model shipped with top_k 1 would answer greedily; afterwards its config is as it was."""
    plain = answers(model, PROMPTS)
    own = GenerationConfig(top_k=1, repetition_penalty=5.0, do_sample=True, suppress_tokens=[7, 8, 9])
    kept, model.generation_config = model.generation_config, own
    try:
        assert answers(model, PROMPTS) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = kept


def test_sampled_frequencies_are_the_models_probabilities(model) -> None:
    """First tokens of 4000 samples against softmax, within five standard errors."""
    prompt = PROMPTS[0]
    drawn = answers(model, [prompt] * 4000, limits=[1] * 4000, stop_token_ids=())
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in drawn]), minlength=20) / 4000
    expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-4).all()
