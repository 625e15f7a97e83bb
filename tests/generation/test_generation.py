"""Chunks, limits, cutting, and the transformers backend on a tiny model."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import architectures
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from axolotl_spin.generation import rows
from axolotl_spin.generation.backend import Sampling, cut
from axolotl_spin.generation.chunks import Chunk, chunk_rows, chunk_size, iteration_seed, token_limit
from axolotl_spin.generation.decoding import Draw, can_decode, worth_joining
from axolotl_spin.generation.frequencies import switch_lengths
from axolotl_spin.generation.grouped import NAME, grouped, grouped_attention
from axolotl_spin.generation.transformers import TransformersBackend
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.policy import frozen


def test_chunks_hold_every_prompt_once_longest_first() -> None:
    assert [rows.tolist() for rows in chunk_rows(np.array([3, 9, 3, 5, 9]), 2)] == [[1, 4], [3, 0], [2]]
    assert chunk_rows(np.array([], dtype=np.int64), 2) == []


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


def answers(model, prompts, *, seed=1, limits=None, batch_size=32, **sampling):
    settings = Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": None, "stop_token_ids": (6,), **sampling})
    backend = TransformersBackend(Ranks(Accelerator(cpu=True)), settings, 0, batch_size)
    limits = tuple(limits or [12] * len(prompts))
    chunk = Chunk(0, tuple(range(len(prompts))), tuple(prompts), limits, seed)
    found = []
    backend.answer(model, [chunk], lambda _, completions: found.append(completions))
    [completions] = found
    return completions


@pytest.fixture(scope="module")
def model():
    return tiny.model(20).eval()


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


MANY = [[4, *range(7, 7 + length), 5] for length in (9, 8, 8, 7, 6, 5, 4, 3, 3, 2, 1)]


def greedy_by_the_definition(model, prompt: list[int], most: int) -> list[int]:
    """Without cache, padding or batch."""
    drawn: list[int] = []
    while len(drawn) < most and 6 not in drawn:
        drawn.append(model(torch.tensor([[*prompt, *drawn]])).logits[0, -1].argmax().item())
    return drawn


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_answer_does_not_depend_on_who_comes_and_goes_beside_it(model, batch_size: int, temperature: float) -> None:
    limits = [3, 12, 1, 7, 12, 2, 9, 12, 5, 4, 12]
    alone = [
        answers(model, [prompt], limits=[limit], temperature=temperature)[0] if temperature == 0 else None
        for prompt, limit in zip(MANY, limits, strict=True)
    ]
    together = answers(model, MANY, limits=limits, temperature=temperature)
    found = answers(model, MANY, limits=limits, temperature=temperature, batch_size=batch_size)
    assert found == together
    if temperature == 0:
        assert found == alone
        assert [c.ids for c in found] == [
            greedy_by_the_definition(model, p, m) for p, m in zip(MANY, limits, strict=True)
        ]
    else:
        assert len({tuple(completion.ids) for completion in found}) > 8


def test_ended_answers_make_room_and_are_not_computed(model) -> None:
    """Five answers of 1 and one of 9 tokens, two at once: 6 prompts, then the long one's 8 more tokens and no other's."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: counts.append(len(inputs["input_ids"])), with_kwargs=True
    )
    try:
        completions = answers(model, MANY[:6], limits=[9, 1, 1, 1, 1, 1], batch_size=2, stop_token_ids=())
    finally:
        hook.remove()
    assert [len(completion.ids) for completion in completions] == [9, 1, 1, 1, 1, 1]
    # prefill of two, then one beside the long answer at a time; what remains is written alone
    assert counts == [2, 1, 1, 1, 1] + [1] * 8


@pytest.mark.parametrize(
    ("tokens", "ended", "share"), [(0, 0, 0.5), (20, 10, 0.5), (320, 10, 0.25), (20_000, 10, 0.0316)]
)
def test_rows_join_sooner_where_answers_are_longer(tokens: int, ended: int, share: float) -> None:
    """At sqrt(2 / L) of the batch, and at most a half; before one has ended L is all that was drawn."""
    assert worth_joining(tokens, ended) == pytest.approx(share, rel=1e-3)


def test_a_token_is_written_into_memory_that_is_there(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache moves once in ROOM tokens, and is never wider than the longest row and that room; answers are the same
    whether it moves at every token or never."""
    limits = [3, 12, 1, 7, 12, 2, 9, 12, 5, 4, 12]
    found = {}
    for room in (1, 4, 1000):
        monkeypatch.setattr(rows, "ROOM", room)
        moves: list[int] = []
        move, update = rows.Reserved.move, rows.Reserved.update

        def counted(self, *how, move=move, moves=moves):
            moves.append(1)
            move(self, *how)

        def bounded(self, keys, values, update=update, room=room):
            used, _ = update(self, keys, values)
            assert used.shape[-2] <= 11 + 12 and self.keys.shape[-2] <= 11 + 12 + room
            assert used.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr()
            return used, self.values[:, :, self.start : self.end]

        with monkeypatch.context() as patch:
            patch.setattr(rows.Reserved, "move", counted)
            patch.setattr(rows.Reserved, "update", bounded)
            answered = answers(model, MANY, limits=limits, batch_size=4, stop_token_ids=())
            alone = answers(model, MANY[:1], limits=[12], stop_token_ids=())
        found[room] = (answered, alone, len(moves) // 2)
    assert found[1][:2] == found[4][:2] == found[1000][:2]
    assert found[1][2] > found[4][2] > found[1000][2]
    assert [len(completion.ids) for completion in found[4][0]] == limits


def test_a_row_is_taken_over_where_it_stands(model) -> None:
    """Of four rows two end while two more wait: these get their memory, and nothing of the others moves."""
    moves: list[int] = []
    move = rows.Reserved.move
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.Reserved, "move", lambda self, *how: (moves.append(1), move(self, *how))[1])
        found = answers(model, MANY[:6], limits=[12, 4, 12, 4, 12, 12], batch_size=4, stop_token_ids=())
    assert [len(completion.ids) for completion in found] == [12, 4, 12, 4, 12, 12]
    # once for its first token, where the prompts' own memory is full, and once where only the two that came last are left
    assert len(moves) == 2 * 2


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_grouped_attention_is_that_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    query, module = torch.randn(3, 6, 1, 8), SimpleNamespace(num_key_value_groups=3, is_causal=True)
    key, value = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 4)
    mask = (torch.arange(5) >= torch.tensor([0, 2, 4])[:, None])[:, None, None]
    mask = mask if kind == "bool" else torch.zeros(3, 1, 1, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.2)
    assert found.shape == expected.shape == (3, 1, 6, 4)
    assert (found - expected).abs().max() < 1e-6
    mean = value[
        2, :, 4
    ]  # the third row sees its last column alone: its answer is that column's values, for each group
    assert torch.allclose(found[2, 0], mean.repeat_interleave(3, 0))


def test_the_models_attention_is_its_own_again(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it answers its groups of heads are not copied; what it says of itself is what it was, also after a failure."""
    seen: list[str] = []
    hook = model.register_forward_pre_hook(lambda module, _: seen.append(module.config._attn_implementation))
    try:
        answers(model, PROMPTS)
        assert set(seen) == {NAME} and model.config._attn_implementation == "sdpa"
        monkeypatch.setattr(Draw, "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answers(model, PROMPTS)
    finally:
        hook.remove()
    assert model.config._attn_implementation == "sdpa"
    eager = tiny.model(20).eval()
    eager.config._attn_implementation = "eager"
    with grouped(eager):
        assert eager.config._attn_implementation == "eager"


def test_random_states_have_no_part_in_it(model) -> None:
    torch.manual_seed(1)
    first = answers(model, MANY)
    torch.manual_seed(2)
    assert answers(model, MANY) == first


def test_top_p_and_top_k_leave_out_the_unlikely(model) -> None:
    prompt = PROMPTS[0]
    likeliest = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    two = {c.ids[0] for c in answers(model, [prompt] * 300, limits=[1] * 300, top_k=2, stop_token_ids=())}
    assert two == set(likeliest.indices[:2].tolist())
    nucleus = likeliest.indices[: int((likeliest.values.cumsum(-1) < 0.6).sum()) + 1].tolist()
    found = {c.ids[0] for c in answers(model, [prompt] * 2000, limits=[1] * 2000, top_p=0.6, stop_token_ids=())}
    assert found == set(nucleus)


def test_a_cold_temperature_is_nearly_greedy(model) -> None:
    cold = answers(model, PROMPTS, temperature=1e-4)
    assert cold == answers(model, PROMPTS, temperature=0)


def test_models_without_plain_keys_and_values_answer_by_generate(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same streams of random numbers, so the same answers; and a state-space model answers by its argmax."""
    by_decoding = answers(model, MANY)
    monkeypatch.setattr("axolotl_spin.generation.transformers.can_decode", lambda _: False)
    assert answers(model, MANY, batch_size=4) == by_decoding
    monkeypatch.undo()
    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.3)
    ).eval()
    assert can_decode(model) and not can_decode(mamba)
    [found] = answers(mamba, PROMPTS[:1], temperature=0)
    assert found.ids == greedy_by_the_definition(mamba, PROMPTS[0], 12)


@pytest.mark.parametrize(("name", "together"), [("deepseek_v4", False), ("falcon_h1", True)])
def test_what_counts_places_is_given_no_padding(name: str, together: bool) -> None:
    """DeepSeek 4 compresses the keys of every few places; the state of Falcon-H1 goes by the mask."""
    hybrid = architectures.build(name, 20, seed=1).eval()
    prompts = [[1 + (7 * row + place) % 19 for place in range(length)] for row, length in enumerate((9, 9, 7, 6, 3))]
    batches: list[int] = []
    hook = hybrid.register_forward_pre_hook(
        lambda _, __, inputs: batches.append(len(inputs["input_ids"])), with_kwargs=True
    )
    found = answers(hybrid, prompts, temperature=0, limits=[8] * 5)
    hook.remove()
    assert [answer.ids for answer in found] == [greedy_by_the_definition(hybrid, prompt, 8) for prompt in prompts]
    assert set(batches) == ({5} if together else {1, 2})


def test_the_model_is_left_in_its_training_state() -> None:
    model = tiny.model(47, seed=3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[0].eval()  # a part that a user froze
    model.lm_head.weight.requires_grad_(False)

    def state() -> tuple:
        flags = [(name, module.training) for name, module in model.named_modules()]
        trained = [(name, weight.requires_grad, weight.grad) for name, weight in model.named_parameters()]
        return (
            flags,
            trained,
            model.is_gradient_checkpointing,
            model.config.use_cache,
            model.generation_config.to_dict(),
        )

    before = state()
    with frozen(model):
        assert not any(module.training for module in model.modules())
        answers(model, [[7, 8], [9]], temperature=1.0)
    assert state() == before


def test_attention_that_slides_answers_by_its_argmax() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    mistral = MistralForCausalLM(config).eval()
    assert can_decode(mistral)
    for prompt, completion in zip(MANY, answers(mistral, MANY, temperature=0, batch_size=3), strict=True):
        assert completion.ids == greedy_by_the_definition(mistral, prompt, 12)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [2, 4, 32])
def test_an_answer_goes_on_where_longrope_takes_other_frequencies(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16 tokens on; prompts that are longer, that get there, and that never do, side by side."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 30.0]}
    config = Phi3Config(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    phi = Phi3ForCausalLM(config).eval()
    assert can_decode(phi) and switch_lengths(config) == (16,)
    prompts = [
        [1 + (7 * row + place) % 19 for place in range(n)] for row, n in enumerate((20, 17, 16, 15, 12, 9, 4, 4))
    ]
    limits = [9, 12, 12, 1, 12, 2, 30, 5]
    found = answers(phi, prompts, limits=limits, temperature=0, batch_size=batch_size, stop_token_ids=())
    sampled = answers(phi, prompts, limits=limits, batch_size=batch_size)
    for prompt, limit, answer in zip(prompts, limits, found, strict=True):
        ids = list(prompt)
        for _ in range(limit):
            ids.append(phi(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer.ids == ids[len(prompt) :]
    assert sampled == answers(phi, prompts, limits=limits)
    monkeypatch.setattr("axolotl_spin.generation.transformers.can_decode", lambda _: False)
    assert answers(phi, prompts[6:], limits=[12, 5], temperature=0)
    with pytest.raises(ValueError, match="beyond 16 tokens, where answers by `generate` cannot go on"):
        answers(phi, prompts[6:], limits=[13, 5], temperature=0)


def test_an_adapter_answers() -> None:
    adapted = get_peft_model(
        tiny.model(20), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    assert can_decode(adapted)
    for prompt, completion in zip(PROMPTS, answers(adapted, PROMPTS, temperature=0), strict=True):
        assert completion.ids == greedy_by_the_definition(adapted, prompt, 12)


@pytest.mark.parametrize("by_generate", [False, True])
def test_too_large_a_batch_is_halved(model, by_generate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_generate:
        monkeypatch.setattr("axolotl_spin.generation.transformers.can_decode", lambda _: False)
    expected = answers(model, MANY)
    whole = type(model).forward

    def of_three_at_most(self, *args, **inputs):
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("planted")
        return whole(self, *args, **inputs)

    of_three_at_most.__signature__ = inspect.signature(whole)
    monkeypatch.setattr(type(model), "forward", of_three_at_most)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert answers(model, MANY, batch_size=8) == expected


def test_logits_that_are_no_numbers_are_refused(model) -> None:
    broken = tiny.model(20)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="NaN or infinite while it answers: `fp16: true`"):
            answers(broken, PROMPTS, temperature=temperature)
