"""A run before any model is loaded: settings, prompts, plan, and what identifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger

from axolotl_spin.compat import text_config
from axolotl_spin.data.endings import Endings, count_endings, describe_endings, refuse_endless, stop_token_ids
from axolotl_spin.data.heldout import heldout_prompts
from axolotl_spin.data.images import ImageRows
from axolotl_spin.data.initial_pairs import GivenPairs, pairs_file, read_file
from axolotl_spin.data.marks import declared_ends, end_ids, special_tokens, turn_marks
from axolotl_spin.data.media import describe_unread, refuse_media
from axolotl_spin.data.prompts import prompt_dataset, token_counts
from axolotl_spin.data.slices import prompt_slice
from axolotl_spin.data.thoughts import ThinkBlock, think_block
from axolotl_spin.data.turns import Marks
from axolotl_spin.disk.atomic import DamagedFileError, read_json, write_json
from axolotl_spin.disk.directory import RunDirectory, describe_upload
from axolotl_spin.generation.frequencies import refuse_switches
from axolotl_spin.generation.vllm.served import ServedModel, served_model
from axolotl_spin.ranks.nodes import Nodes
from axolotl_spin.run.identity import Identity, identify
from axolotl_spin.run.merging import describe_merge, describe_shards
from axolotl_spin.run.pictures import image_rows, refuse_unfit
from axolotl_spin.run.plan import IterationPlan, Plan, make_plan
from axolotl_spin.settings.spin import SpinConfig

LOG = get_logger(__name__)


@dataclass(frozen=True)
class Launch:
    """How ranks share the work, as far as the host's checkpoints depend on it.

    Attributes:
        ranks: Processes.
        sharding: `ZeRO-1`, `ZeRO-2`, `ZeRO-3` or `FSDP2`; None where every rank holds everything.
    """

    ranks: int
    sharding: str | None


@dataclass
class SpinRun:
    """Everything that is known about a run before the model loads.

    Attributes:
        settings: The `spin` block.
        prompts: Prompts and human answers (`datasets.Dataset` with `prompt_ids`, `chosen_ids`, `row`).
        plan: Rows, steps, learning rates, betas.
        directory: Paths of the artifacts.
        identity: What the result depends on.
        tokenizer: The host's.
        sequence_len: The host's, in tokens.
        seed: Of shuffling and, unless `spin.generation.seed` is set, of sampling.
        shuffle: False with the host's `curriculum_sampling`.
        stops: Tokens that end an answer, as far as they are known before the model loads.
        endings: How human answers end.
        launch: Ranks and sharding.
        sample_packing: The host's key; False asks for padded batches.
        served: What vLLM serves; None with another backend.
        given: The pairs of `spin.initial_pairs`, with which iteration 0 starts; None where it answers the prompts.
        heldout: Prompts and human answers of held-out play, like `prompts`; None where there is none.
        select: The figure that tells the best iteration: `spin.select` or its default; None where nothing does.
        thoughts: What marks thoughts in answers; None where nothing does.
        benchmarks: The `spin.eval_tasks`, loaded; None where there are none.
        images: The source rows of `prompts`, where they have pictures; None where all is text.
        heldout_images: Those of `heldout`, likewise.
        regrouped: The ZeRO checkpoint to start from, where another number of ranks saved it.
        nodes: Which ranks see one `output_dir`.
    """

    settings: SpinConfig
    prompts: Any
    plan: Plan
    directory: RunDirectory
    identity: Identity
    tokenizer: Any
    sequence_len: int
    seed: int
    shuffle: bool
    stops: tuple[int, ...]
    endings: Endings
    launch: Launch
    sample_packing: bool | None
    served: ServedModel | None = None
    given: GivenPairs | None = None
    heldout: Any = None
    select: str | None = None
    thoughts: ThinkBlock | None = None
    benchmarks: Any = None
    images: ImageRows | None = None
    heldout_images: ImageRows | None = None
    regrouped: Path | None = None
    nodes: Nodes = Nodes()  # noqa: RUF009 (it is frozen)

    @property
    def sampling_seed(self) -> int:
        """Seed of all answers."""
        seed = self.settings.generation.seed
        return self.seed if seed is None else seed

    def asked(self, entry: IterationPlan) -> np.ndarray | None:
        """Returns which prompts an iteration answers, as rising indices; None where it answers all of them."""
        size = self.settings.prompts_per_iteration
        if size is None:
            return None
        answered_before = entry.iteration - int(self.given is not None)  # iterations that took a slice
        return prompt_slice(len(self.prompts), size, answered_before, self.seed)

    def prompts_of(self, entry: IterationPlan) -> Any:
        """Returns the prompts that an iteration answers, like `prompts`."""
        asked = self.asked(entry)
        return self.prompts if asked is None else self.prompts.select(asked)

    def stop_tokens(self, model: Any) -> tuple[int, ...]:
        """Returns the tokens that end an answer.

        Args:
            model: The policy, whose generation config may name more of them than were known before it was loaded.
        """
        return tuple(sorted({*self.stops, *end_ids(getattr(model, "generation_config", None))}))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Returns the texts of lists of ids, for people; what stands for a picture stands once for each."""
        images = self.images
        return self.tokenizer.batch_decode(ids if images is None else [images.squeezed(row) for row in ids])

    def write_plan(self, completed_steps: int | None = None) -> None:
        """Writes `plan.json`. Call it on one rank.

        Args:
            completed_steps: Optimizer steps with which the run is complete, its final model being saved: all of the plan's,
                or those after which `spin.patience` ended it.
        """
        value = {**self.identity.to_json(), **self.plan.to_json(), "completed_steps": completed_steps}
        write_json(self.directory.plan, value)


def prepare_run(
    cfg: Any, settings: SpinConfig, train_dataset: Any, tokenizer: Any, eval_dataset: Any = None, processor: Any = None
) -> SpinRun:
    """Makes a run from the host's normalized config and prepared SFT dataset.

    Args:
        cfg: The host's config.
        settings: Its `spin` block.
        train_dataset: `datasets.Dataset` with `input_ids` and `labels`; with a processor, of conversations with pictures.
        tokenizer: The host's.
        eval_dataset: The host's held-out rows, with the same columns, or None.
        processor: The host's, of a config with `processor_type`.

    Raises:
        ValueError: The data has images without a processor (see `refuse_media`) or such as cannot be used (see
            `image_rows`), it leaves nothing to train on (see `prompt_dataset`), no human answer has an end (see
            `refuse_endless`), the held-out rows leave nothing to play on, or sequences are too long (`refuse_switches`).
    """
    ends, special = declared_ends(cfg, tokenizer), special_tokens(tokenizer)
    marks = turn_marks(cfg, tokenizer, ends)
    images = heldout_images = None
    held_out_by = "test_datasets" if cfg.test_datasets else "datasets"
    if processor is None:
        refuse_media(train_dataset, cfg, tokenizer)
        refuse_media(eval_dataset, cfg, tokenizer, held_out_by)
    else:
        images = image_rows(cfg, train_dataset, tokenizer, processor, marks, first=settings.max_prompts)
        train_dataset = images.tokenised
        if eval_dataset is not None:
            heldout_images = image_rows(cfg, eval_dataset, tokenizer, processor, marks, key=held_out_by)
            eval_dataset = heldout_images.tokenised
        marks = Marks(blanks=marks.blanks, claimed=marks.claimed)  # the labels are an assistant's turns already
    prompts = prompt_dataset(train_dataset, turns=settings.turns, max_prompts=settings.max_prompts, marks=marks)
    known: dict[str, Any] = {"special": special, "sequence_len": int(cfg.sequence_len)}
    stops = stop_token_ids(prompts, ends=ends, claimed=marks.claimed, **known)
    endings = count_endings(prompts, train_dataset, stops=stops, first=settings.max_prompts, **known)
    refuse_endless(endings, cfg, tokenizer, stops)
    heldout = heldout_prompts(eval_dataset, settings, int(cfg.sequence_len), marks)
    for found, source, key in ((prompts, images, "datasets"), (heldout, heldout_images, held_out_by)):
        if found is not None and source is not None:
            refuse_unfit(found, source, key, sequence_len=int(cfg.sequence_len), sharded=_shares_weights(cfg))
    unread = describe_unread(cfg) if images is None else None
    notes = [unread, describe_endings(endings, cfg, tokenizer), describe_merge(cfg), describe_shards(cfg)]
    for line in filter(None, [*notes, describe_upload(cfg.hub_model_id)]):
        LOG.warning(line)
    lengths, served = token_counts(prompts, "prompt_ids"), None
    if settings.generation.backend == "vllm":
        served = served_model(cfg, settings, lengths, images.most() if images else 0, len(tokenizer))
    served_len = served.arguments(settings.generation.vllm)["max_model_len"] if served else None
    refuse_switches(cfg, settings, [prompts, heldout], pictures=images is not None, served_len=served_len)
    given = _given_pairs(cfg, settings, tokenizer)
    ranks = int(cfg.world_size or 1)
    global_batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps * ranks
    plan = make_plan(
        _prompts_of_an_iteration(settings, len(prompts)),
        global_batch=global_batch,
        num_epochs=int(cfg.num_epochs),
        history=settings.history,
        betas=settings.betas(),
        learning_rates=settings.learning_rates(float(cfg.learning_rate)),
        max_steps=cfg.max_steps,
        warmup={"warmup_steps": cfg.warmup_steps, "warmup_ratio": cfg.warmup_ratio},
        given=given.rows if given else None,
        schedule_epochs=settings.schedule_epochs,
    )
    directory = RunDirectory(cfg.output_dir)
    pictured = images.digest(prompts) if images else None
    identity = identify(cfg, settings, prompts, plan, given.digest if given else None, pictured)
    return SpinRun(
        settings=settings,
        prompts=prompts,
        plan=plan,
        directory=directory,
        identity=_as_on_disk(identity, directory),
        tokenizer=tokenizer,
        sequence_len=int(cfg.sequence_len),
        seed=int(cfg.seed if cfg.seed is not None else 42),
        shuffle=not cfg.curriculum_sampling,
        stops=stops,
        endings=endings,
        launch=Launch(ranks, _sharding(cfg)),
        sample_packing=cfg.sample_packing,
        served=served,
        given=given,
        heldout=heldout,
        images=images,
        heldout_images=heldout_images,
        select=settings.select or ("eval_loss" if eval_dataset is not None and len(eval_dataset) else None),
        thoughts=think_block(cfg, tokenizer, marks.blanks),
    )


def _prompts_of_an_iteration(settings: SpinConfig, prompts: int) -> int:
    """Returns how many prompts each iteration answers.

    Raises:
        ValueError: It would be more than there are.
    """
    size = settings.prompts_per_iteration
    if size is not None and size > prompts:
        raise ValueError(
            f"`spin.prompts_per_iteration: {size}` is more than the {prompts} prompts of the data: lower it, or leave it "
            "out, and each iteration answers all of them"
        )
    return prompts if size is None else size


def _as_on_disk(identity: Identity, directory: RunDirectory) -> Identity:
    """Returns the identity in the form of the run that is on disk, whose marks it then knows."""
    try:
        return identity.like(read_json(directory.plan))
    except (FileNotFoundError, DamagedFileError, AttributeError, TypeError):
        return identity  # what is wrong with the folder is told where a run starts in it


def _given_pairs(cfg: Any, settings: SpinConfig, tokenizer: Any) -> GivenPairs | None:
    """Reads and checks `spin.initial_pairs`.

    Raises:
        ValueError: It cannot be read or trained on; names the key.
    """
    source = settings.initial_pairs
    if source is None:
        return None
    path = pairs_file(source)
    if path is not None:
        given = read_file(path, source)
    else:
        from axolotl_spin.data.initial_messages import read_conversations

        given = read_conversations(source, cfg, tokenizer)
    given.check(vocabulary=_vocabulary(cfg, tokenizer), sequence_len=int(cfg.sequence_len))
    return given


def _vocabulary(cfg: Any, tokenizer: Any) -> int:
    """Returns how many ids the model knows, some of which the tokenizer may not (embeddings are often padded)."""
    from axolotl.loaders.utils import load_model_config

    text = text_config(load_model_config(cfg))
    return max(len(tokenizer), int(getattr(text, "vocab_size", 0) or 0))


def _shares_weights(cfg: Any) -> bool:
    return _sharding(cfg) in ("ZeRO-3", "FSDP2")


def _sharding(cfg: Any) -> str | None:
    deepspeed = cfg.get("deepspeed")
    if isinstance(deepspeed, dict):
        stage = (deepspeed.get("zero_optimization") or {}).get("stage") or 0
        return f"ZeRO-{stage}"
    return "FSDP2" if cfg.get("fsdp") or cfg.get("fsdp_config") else None
