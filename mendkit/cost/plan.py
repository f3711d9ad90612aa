"""Memory that training will take, from shapes alone, before anything is loaded.

What is held is exact: weights, trunk states, factors, and the hypernetwork with its statistics,
gradients and moments. What a phase works with is a closed form in the numbers of tokens, features
and logits. Peaks were within 25 % of those measured (docs/LOG.md). Without the tokenizer's files
four characters count as a token.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ..data.examples import HEADLINE_ROLES, EditExample, Probe, join
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.archive import inspect_archive
from ..mend.factors import FACTOR_BATCH
from ..mend.files import damage_named
from ..mend.hypernetwork import MEND
from ..mend.preparation import STRUCTURE
from ..mend.validation import POSITIONS_PER_PASS
from ..models.cache import SHARD_BYTES
from ..models.checkpoints import (
    DTYPES,
    choose_device,
    locate_tokenizer,
    read_tokenizer,
    silence_transformers,
)
from ..models.load import skeleton
from ..models.sites import embedding_matrix, find_stacks, resolve_sites
from ..models.streaming import trunk_names
from ..models.trunk import TOKENS_PER_PASS
from ..runs import free_memory
from .architectures import published

logger = logging.getLogger(__name__)

# By how much predicted peaks may be off.
PLAN_TOLERANCE = 0.25

SAVED = 3  # copies of each linear layer's output that a pass with gradients keeps
READ = 6  # copies of logits while their loss and its gradient are computed
RETAINED = 0.75  # of a step's working memory stays with the process
TRANSFORMED = 6  # copies of a token's factors in each block of the hypernetwork


@dataclass(frozen=True)
class Phase:
    """A phase of training: the bytes held by then, and its working memory, by what they are."""

    name: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """The most memory, in bytes, above an idle process."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The memory of training, phase by phase. Pages of the trunk cache on disk are not counted."""

    model: str
    parameters: int
    streamed: bool
    released: bool
    texts: int
    tokens: int
    idle: int  # bytes of this process without weights
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def needed(self) -> int:
        """The most memory, in bytes, this process included."""
        return self.idle + self.largest.peak

    def to_dict(self) -> dict[str, Any]:
        """The plan as values of JSON."""
        return asdict(self) | {"needed": self.needed, "largest": self.largest.name}


def plan(
    hparams: MENDHyperParams, train: Sequence[EditExample], validation: Sequence[EditExample]
) -> Plan:
    """The plan of `train(hparams, train, validation)`.

    Raises MendkitError if there are no examples, and ModelError as loading the model does.
    """
    if not train or not validation:
        raise MendkitError("a plan needs at least one training and one validation example")
    h = _own_settings(hparams)
    place = locate_tokenizer(h)
    with silence_transformers():
        model = published(h.model_name)
        model = model or skeleton(h.model_name, trust_remote_code=h.trust_remote_code)
        tokenizer = read_tokenizer(place) if isinstance(place, Path) else None
    texts = _Texts(tokenizer, h, train, validation)
    needs = _Needs(h, model, texts)
    return Plan(
        model=h.model_name,
        parameters=needs.parameters,
        streamed=needs.streamed,
        released=needs.released,
        texts=len(texts.lengths),
        tokens=texts.tokens,
        idle=psutil.Process().memory_info().rss,
        phases=(*needs.before_training(), *needs.while_training()),
    )


def _own_settings(h: MENDHyperParams) -> MENDHyperParams:
    """The settings, with those that an archive decides if training goes on from one."""
    if h.archive is None:
        return h
    archive = inspect_archive(h.archive)
    with damage_named(h.archive, "metadata"):
        known = archive["hparams"]
        kept = {key: known[key] for key in STRUCTURE if key in known}
        sites = tuple(site["name"] for site in archive["base_model"]["sites"])
    return h.replace(archive=None, inner_params=sites, **kept)


class _Texts:
    """How long the texts are: tokens, and scored positions (those of the answer)."""

    def __init__(
        self,
        tokenizer: Any,
        h: MENDHyperParams,
        train: Sequence[EditExample],
        validation: Sequence[EditExample],
    ) -> None:
        most = h.texts_per_role if isinstance(h.texts_per_role, tuple) else (h.texts_per_role,) * 3
        examples = [*train, *validation[: h.val_steps]]
        found: list[Probe] = []
        for example in examples:
            roles = example.roles()
            for role, limit in zip(HEADLINE_ROLES, (1, *most), strict=True):
                found += roles[role][:limit]
        texts = [join(probe.prompt, probe.answer or "") for probe in found]
        whole = _token_counts(tokenizer, texts)
        prompts = _token_counts(tokenizer, [probe.prompt for probe in found])
        self.lengths: dict[str, tuple[int, int]] = {}
        for text, long, short in zip(texts, whole, prompts, strict=True):
            self.lengths[text] = long + h.add_eos, max(long - short, 1) + h.add_eos
        edits = [join(example.prompt, example.target_new) for example in train]
        self.edits = [self.lengths[edit] for edit in edits]
        self.tokens = sum(tokens for tokens, _ in self.lengths.values())
        self.positions = sum(scored for _, scored in self.lengths.values())
        self.longest = max(tokens for tokens, _ in self.lengths.values())
        self.answer = self.positions / len(self.lengths)  # scored positions of a text, the mean
        self.per_example = len(found) / len(examples)
        # Texts that are read at once in a validation.
        self.validated = min(h.val_batch_size, len(examples) - len(train)) * self.per_example


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    if tokenizer is None:
        return [len(text) // 4 + 1 for text in texts]
    return [len(ids) for ids in tokenizer(texts)["input_ids"]]


class _Needs:
    """What each phase holds and works with, from the shapes of a model and the lengths of texts."""

    def __init__(self, h: MENDHyperParams, model: PreTrainedModel, texts: _Texts) -> None:
        self.h, self.texts, self.sites = h, texts, resolve_sites(model, h.inner_params)
        dtype = DTYPES.get(h.dtype) or model.config.dtype
        self.number: int = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
        self.width = embedding_matrix(model).shape[1]
        output = model.get_output_embeddings()
        self.vocabulary = len(output.weight) if output is not None else 2  # classes
        stacks = find_stacks(model)
        blocks = [block for stack in stacks.values() for block in stack] or [model]
        numbers = [site.block for site in self.sites if site.block is not None]
        chained = len(stacks) == 1 and len(numbers) == len(self.sites)
        first = min(numbers) if chained else 0
        counts = {name: value.numel() for name, value in model.named_parameters()}
        below = trunk_names(model, next(iter(stacks)), first) if first else []
        self.parameters, self.suffix = sum(counts.values()), len(blocks) - first
        self.below = sum(counts.get(name, 0) for name in below)  # only the trunk pass needs them
        self.block = sum(weight.numel() for weight in blocks[0].parameters())
        layers = [getattr(m, "out_features", getattr(m, "nf", 0)) for m in blocks[-1].modules()]
        self.features = sum(layers)  # of the linear layers of a block, per token
        stream = h.stream_trunk
        if stream == "auto":
            stream = self.parameters * self.number > free_memory(choose_device(h.device))
        self.streamed = bool(stream) and self.below > 0
        self.released = self.streamed or (self.below > 0 and h.release_trunk is not False)
        self.held: dict[str, int] = {}

    def _phase(self, name: str, working: float) -> Phase:
        return Phase(name, self.held | {"working memory": int(working)})

    def _reading(self, rows: int) -> float:
        """Working memory of a pass through the suffix with gradients: features, and logits."""
        tokens = rows * self.texts.longest
        features = tokens * self.features * self.suffix * self.number * SAVED
        return features + rows * self.texts.answer * self.vocabulary * 4 * READ

    def before_training(self) -> Iterator[Phase]:
        """Loading, trunk pass, factors and statistics."""
        h, texts, number = self.h, self.texts, self.number
        self.held["weights"] = (self.parameters - self.below * self.streamed) * number
        yield self._phase("loading", 0)

        # States on disk are pages that the system takes back.
        chunk = TOKENS_PER_PASS * self.features * number * SAVED
        states = (texts.tokens + texts.positions) * self.width * number
        self.held["trunk states"] = states if states > h.disk_cache_bytes else 0
        portion = 2 * self.block * number if self.streamed else 2 * SHARD_BYTES
        yield self._phase("trunk pass", chunk + portion)
        self.held["weights"] = (self.parameters - self.below * self.released) * number

        scored = h.edit_tokens == "scored"
        self.factors = 0
        for site in self.sites:
            tokens = sum(lengths[scored or site.scored_only] for lengths in texts.edits)
            self.factors += tokens * (site.d_in + site.d_out) * max(number, 4)
        self.held["factors"] = min(self.factors, h.cache_bytes)
        capturing = self._reading(FACTOR_BATCH)
        yield self._phase("factors", capturing)

        # Second moments are gathered and inverted in float64.
        gathered = (h.whiten is not None) + 2 * h.whiten_pairs + (h.aggregate == "least_squares")
        squares = [site.d_in**2 * 8 for site in self.sites]
        moments = gathered * sum(squares) + 5 * max(squares) * (gathered > 0)
        rows = FACTOR_BATCH * (texts.per_example if h.whiten_pairs else 1)
        logits = rows * texts.answer * self.vocabulary * number * 2
        with torch.device("meta"):
            self.mend = MEND(self.sites, h)
        self.held["hypernetwork"] = sum(value.nbytes for value in self.mend.state_dict().values())
        yield self._phase("statistics", moments + max(capturing, logits))

    def while_training(self) -> Iterator[Phase]:
        """Steps, validation and archives."""
        h, texts = self.h, self.texts
        learned = sum(value.nbytes for value in self.mend.parameters())
        self.held |= {"gradients": learned, "moments": 2 * learned}
        counts = (1, h.paraphrases_per_edit, h.neighbours_per_edit, h.unrelated_per_edit)
        factors = h.batch_size * self.factors / len(texts.edits)
        step = self._reading(h.batch_size * sum(counts))
        step += factors * (h.n_hidden + 1) * TRANSFORMED
        yield self._phase("step", step)
        # From now on the allocator keeps most of what a step freed.
        positions = min(POSITIONS_PER_PASS, texts.validated * texts.answer)
        validating = positions * self.vocabulary * 4 * READ
        yield self._phase("validation", max(validating, RETAINED * step))
        content = self.held["hypernetwork"] + 2 * learned  # of the file, before it is written
        yield self._phase("archive", max(content, RETAINED * step))


def fitting(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    *,
    budget: int,
    keep_trunk: bool = False,
) -> tuple[dict[str, object], Plan]:
    """The first settings, least harmful first, whose plan fits into `budget` bytes, and that plan.

    The last ones tried if none does. With `keep_trunk` the model stays whole.
    """
    tried: dict[str, object] = {}
    found = plan(hparams, train, validation)
    for name, value in _savings(hparams, keep_trunk=keep_trunk):
        if found.needed <= budget:
            break
        tried[name] = value
        found = plan(hparams.replace(**tried), train, validation)
    return tried, found


def _savings(h: MENDHyperParams, *, keep_trunk: bool) -> list[tuple[str, object]]:
    """Settings that save memory, each beside those before it."""
    savings: list[tuple[str, object]] = []
    if not keep_trunk:
        savings += [("release_trunk", True), ("stream_trunk", True)]
    if h.dtype in ("auto", "float32"):
        savings.append(("dtype", "bfloat16"))
    savings += [("cache_bytes", h.cache_bytes // 4), ("cache_bytes", 0)]
    for divisor in (2, 4, 8):
        if h.batch_size >= divisor:
            savings.append(("batch_size", h.batch_size // divisor))
            savings.append(("accumulate_bs", h.accumulate_bs * divisor))
    if h.rank is not None:
        savings += [("rank", h.rank // divisor) for divisor in (2, 4) if h.rank >= divisor]
    return [(name, value) for name, value in savings if value != getattr(h, name)]


def check_memory(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    *,
    keep_trunk: bool = False,
) -> None:
    """Raise MendkitError if `train` on the CPU is planned to need more memory than is free.

    `PLAN_TOLERANCE` is granted. `keep_trunk`: the model is used after training, so it stays whole.
    Raises ModelError if the model's configuration cannot be read.
    """
    device, processes = choose_device(hparams.device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cpu":  # a GPU stops by itself where its memory ends
        return
    if keep_trunk:
        hparams = hparams.replace(stream_trunk=False, release_trunk=hparams.release_trunk is True)
    free, found = free_memory(device) // processes, plan(hparams, train, validation)
    need = found.largest.peak
    if need <= (1 + PLAN_TOLERANCE) * free:
        return
    logger.info("memory is short; looking for settings that fit")
    settings, other = fitting(
        hparams, train, validation, budget=free + found.idle, keep_trunk=keep_trunk
    )
    words = in_words(settings) or "all savings"
    advice = f"with {words} it fits"
    if other.largest.peak > free:
        advice = f"even with {words} it does not fit"
    raise MendkitError(
        f"training is planned to need {need / 1e9:.2f} GB ({found.largest.name}), "
        f"{free / 1e9:.2f} GB are free; {advice} ({other.largest.peak / 1e9:.2f} GB); "
        "--ignore-memory trains all the same"
    )


def in_words(settings: dict[str, object]) -> str:
    """Settings as one gives them on the command line."""
    return " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())


def plan_table(found: Plan) -> str:
    """A plan for people: per phase the peak, and what takes most of it."""
    trunk = "streamed" if found.streamed else "released" if found.released else "kept"
    lines = [
        f"{found.model}: {found.parameters / 1e6:,.0f} M parameters; trunk {trunk}",
        f"{found.texts:,} texts, {found.tokens:,} tokens",
        f"{'':12}{'peak':>10}  what takes the memory (GB)",
    ]
    for phase in found.phases:
        parts = sorted(phase.parts.items(), key=lambda part: -part[1])[:4]
        most = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)
        lines.append(f"{phase.name:12}{(found.idle + phase.peak) / 1e9:>7.2f} GB  {most}")
    lines.append(
        f"at most {found.needed / 1e9:.2f} GB, ± {PLAN_TOLERANCE:.0%}; of it the process itself "
        f"{found.idle / 1e9:.2f} GB"
    )
    return "\n".join(lines)
