"""What training will take: memory and time of every phase, before anything is loaded.

The model is built on the meta device from its configuration, and the training's own code runs there on the shapes of
the texts (`dryrun`): one batch of each phase, the longest for memory, and time in proportion. What is held through
training is exact: weights, trunk states, factors, hypernetwork with gradients and moments. Without the tokenizer's
files a stand-in of about four characters a token gives the lengths.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data.examples import EditExample
from ..errors import MendkitError, ModelError
from ..hparams import MENDHyperParams
from ..mend.archive import inspect_archive
from ..mend.distributed import Team
from ..mend.files import damage_named
from ..mend.hypernetwork import MEND
from ..mend.training import FACTOR_BATCH, STRUCTURE, Sampler, Trainer, make_optimiser
from ..mend.validation import validate
from ..models.base import BaseModel
from ..models.bundled import BUNDLED, bundled_model
from ..models.cache import SHARD_BYTES
from ..models.checkpoints import (
    DTYPES,
    choose_device,
    locate,
    read_config,
    read_tokenizer,
    silence_transformers,
    skeleton,
)
from ..models.families import Head
from ..models.streaming import trunk_names
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk, _chunks
from ..runs import clock, free_memory
from .architectures import published
from .dryrun import ROWS, SIZES, DryRun, Machine, Work

logger = logging.getLogger(__name__)

WORKING = "working memory"
PLANNED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The precisions that training may calculate in."""

TOLERANCE = 0.15
"""By how much predicted peaks were off, of three models (docs/LOG.md)."""

_UNTIMED = Machine(dict.fromkeys(product(PLANNED, ROWS), 1.0), dict.fromkeys(SIZES, 1.0), 1.0)


@dataclass(frozen=True)
class Phase:
    """One phase of training: what is held by then and the most that it needs, above an idle process; its time."""

    name: str
    parts: dict[
        str, int
    ]  # bytes held, by what they are, and "working memory": what comes on top at most
    mapped: int  # bytes held that are pages of the trunk cache on disk: the system takes them back if it must
    seconds: float
    times: int = 1  # how often; 0: not a part of training

    @property
    def peak(self) -> int:
        """The most resident memory, in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What training takes, phase by phase."""

    model: str
    parameters: int
    streamed: bool
    released: bool
    estimated_lengths: bool  # the tokenizer's files were not there
    texts: int
    tokens: int
    phases: tuple[Phase, ...]
    idle: int  # bytes of this process with the model's code and tokenizer, and no weights

    def phase(self, name: str) -> Phase:
        """A phase by its name."""
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> int:
        """The most resident memory of all phases, in bytes, the process itself included."""
        return self.idle + max(phase.peak for phase in self.phases if phase.times)

    @property
    def needed(self) -> int:
        """The same without the pages of the trunk cache on disk."""
        return self.idle + max(phase.peak - phase.mapped for phase in self.phases if phase.times)

    @property
    def largest(self) -> str:
        """The phase that takes it."""
        return max((p for p in self.phases if p.times), key=lambda p: p.peak - p.mapped).name

    @property
    def training_needed(self) -> int:
        """The same after the trunk pass."""
        after = [
            phase
            for phase in self.phases
            if phase.times and phase.name not in ("loading", "trunk pass")
        ]
        return self.idle + max(phase.peak - phase.mapped for phase in after)

    @property
    def seconds(self) -> float:
        """Time of the whole training."""
        return sum(phase.seconds * phase.times for phase in self.phases)


class _Shapes(BaseModel):
    """A base model on the meta device; its texts' token ids are real."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def released(self) -> int:
        return 0

    def _probe_head(self) -> Head:
        raise ModelError(
            f"{self.name} is a classifier: what its head reads shows in values only, so it has no plan"
        )


class _ShapeTrunk(FrozenTrunk):
    """A trunk that holds every text, as shapes."""

    def fill(self, texts: Sequence[Tokens], progress: object = None) -> int:
        return 0

    def holds(self, texts: Sequence[Tokens]) -> bool:
        return self.base.blocks is not None

    def states(self, texts: Sequence[Tokens], t: int) -> Float[Tensor, "n t d"]:
        return self._empty(len(texts), t)

    def references(self, texts: Sequence[Tokens]) -> Float[Tensor, "s d"]:
        return self._empty(sum(len(text.scored) for text in texts))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, state_width(self.base), dtype=self.base.dtype, device="meta")


def state_width(base: BaseModel) -> int:
    """Width of the hidden states between blocks."""
    return base.model.config.get_text_config().hidden_size


def stand_in_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Cuts text into pieces of at most four characters, those of `texts` told apart: about a model's own tokens."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<piece>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?[^\s]{1,4}|\s"), "isolated")
    special = ["<end>", "<piece>"]
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def _written(examples: Sequence[EditExample]) -> Iterator[str]:
    for e in examples:
        prompts = (e.prompt, *e.paraphrases, *(p.prompt for p in (*e.neighbours, *e.unrelated)))
        answers = (e.target_new, *(p.answer or "" for p in (*e.neighbours, *e.unrelated)))
        yield from (*prompts, *(f" {answer}" for answer in answers))


def shape_model(
    hparams: MENDHyperParams, examples: Sequence[EditExample]
) -> tuple[BaseModel, bool]:
    """The model that `hparams` name on the meta device, and whether its own tokenizer was there: else a stand-in.

    Models of the shipped configurations need no network. Raises ModelError as `skeleton` does.
    """
    name = hparams.model_name
    model = published(name)
    source = bundled_model() if name == BUNDLED else name
    with silence_transformers():
        model = model or skeleton(source, trust_remote_code=hparams.trust_remote_code)
        dtype = DTYPES.get(hparams.dtype) or model.config.dtype or torch.float32
        own = _tokenizer(source, hparams)
        tokenizer = own or stand_in_tokenizer(_written(examples))
        with DryRun():
            base = _Shapes(model.to(dtype), tokenizer, name=name, inner_params=hparams.inner_params)
    return base, own is not None


def _tokenizer(source: str | Path, hparams: MENDHyperParams) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer where its files are on this machine."""
    other = hparams.tokenizer_name
    here = [place for place in (other, source) if place is not None and Path(place).is_dir()]
    return read_tokenizer(here[0]) if here else None


def plan(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    /,
    *,
    machine: Machine | None = None,
) -> Plan:
    """The plan of `train(hparams, train, validation)`; `machine` is measured if not given (two seconds).

    Raises MendkitError if there are no examples, and ModelError as loading the model does, and for a classifier.
    """
    if not train or not validation:
        raise MendkitError("a plan needs at least one training and one validation example")
    if hparams.archive is not None:
        theirs = inspect_archive(hparams.archive)
        with damage_named(hparams.archive, "metadata"):
            kept = {key: theirs["hparams"][key] for key in STRUCTURE if key in theirs["hparams"]}
            sites = tuple(site["name"] for site in theirs["base_model"]["sites"])
            hparams = hparams.replace(archive=None, inner_params=sites, **kept)
    base, exact = shape_model(hparams, (*train, *validation))
    idle = psutil.Process().memory_info().rss
    machine = machine or Machine.measured(PLANNED)
    return _Planner(base, hparams, train, validation, machine).plan(idle, exact)


class _Planner:
    """The phases one after another, each with what is held by then."""

    def __init__(
        self, base: BaseModel, hparams: MENDHyperParams, train, validation, machine: Machine
    ) -> None:
        self.base, self.h, self.machine = base, hparams, machine
        no_disk = hparams.replace(disk_cache_bytes=0)  # which would need the weights' hash
        self.trainer = Trainer(
            base, no_disk, train, validation, Path("."), done_with_base=True, team=Team(alone=True)
        )
        self.trainer.trunk = self.trainer.factors.trunk = _ShapeTrunk(base)
        self.whole, self.below, self.block = _weight_bytes(base)
        split = base.blocks is not None and base.blocks.first > 0
        stream = hparams.stream_trunk
        on = choose_device(hparams.device)
        self.streamed = split and (
            stream is True or (stream == "auto" and self.whole > free_memory(on))
        )
        self.released = self.streamed or (split and hparams.release_trunk is not False)
        self.resident = self.whole - (self.below if self.streamed else 0)
        self.held = {"weights": self.whole - (self.below if self.released else 0)}
        self.mapped = 0
        self.phases: list[Phase] = []

    def plan(self, idle: int, exact: bool) -> Plan:
        texts = self._texts()
        again = 2 * self._reading(self.below) if self.streamed else 0.0
        hashing = 2 * self.whole / self.machine.hashed  # for the cache and for the archive
        loading = {"weights": self.resident, WORKING: 0}
        self.phases.append(
            Phase("loading", loading, 0, self._reading(self.resident) + again + hashing)
        )
        with DryRun(list(self.base.model.parameters())) as run:
            run.restart()
            self._trunk(run, texts)
            whole = {"weights": self.whole}
            edit = self._one_edit(run)
            self._factors(run)
            self._hypernetwork(run)
            self._training(run)
        whole |= {"hypernetwork": self.held["hypernetwork"], WORKING: edit[1]}
        self.phases.append(Phase("one edit", whole, 0, edit[0].seconds(self.machine), times=0))
        count = sum(value.numel() for value in self.base.model.parameters())
        return Plan(
            self.base.name, count, self.streamed, self.released, not exact, len(texts),
            sum(len(text.ids) for text in texts), tuple(self.phases), idle,
        )  # fmt: skip

    def _reading(self, size: int) -> float:
        """Seconds to read weights from files that lie in memory already."""
        return size * 2 / self.machine.bytes[SIZES[-1]]

    def _texts(self) -> list[Tokens]:
        """Every text of the trunk pass, shortest first."""
        trainer = self.trainer
        self.chosen = trainer.statistics_examples()
        own = [t for e in (*trainer.train_texts, *trainer.val_texts) for t in e.all()]
        own += [t for e in self.chosen for some in trainer.wordings(e) for t in some]
        return sorted({t.key: t for t in own}.values(), key=lambda t: (len(t.ids), t.key))

    def _add(self, name: str, working: int, seconds: float, times: int = 1) -> None:
        self.phases.append(Phase(name, self.held | {WORKING: working}, self.mapped, seconds, times))

    def _trunk(self, run: DryRun, texts: Sequence[Tokens]) -> None:
        if self.base.blocks is None:
            return
        chunks = list(_chunks(texts))
        padded = [len(chunk) * max(len(t.ids) for t in chunk) for chunk in chunks]
        largest = collate(chunks[padded.index(max(padded))], self.base.pad_id)
        with torch.no_grad():
            FrozenTrunk(self.base)._watch(largest)
        work, peak = scaled(run.work(), sum(padded) / max(padded)), run.peak
        size = self.base.dtype.itemsize * state_width(self.base)
        values = {"trunk states": size * sum(len(t.ids) for t in texts)}
        values["references"] = size * sum(len(t.scored) for t in texts)
        self.held |= values
        total, kept = sum(values.values()), self.held["weights"]
        self.mapped = total if total <= self.h.disk_cache_bytes else 0
        peak += self.resident - kept + (2 * self.block if self.streamed else 0)
        if not self.streamed and self.mapped:  # a portion in memory and as the bytes to be written
            peak += 2 * min(total, SHARD_BYTES)
        if self.released and not self.streamed:  # what is kept is copied before the file's pages go
            peak = max(peak, self.whole)
        read = self._reading(self.below) if self.streamed else 0.0
        self._add("trunk pass", peak, work.seconds(self.machine) + read)
        if self.streamed:  # all texts' states are in memory before they are on disk
            self.phases[-1] = replace(self.phases[-1], mapped=0)

    def _one_edit(self, run: DryRun) -> tuple[Work, int]:
        """An edit as the editor makes it: factors by the whole model, nothing cached."""
        text = max((e.edit for e in self.trainer.train_texts), key=lambda t: len(t.ids))
        whole = FrozenTrunk(self.base)
        return _measured(run, lambda: self._capture([text], whole))

    def _capture(self, texts: Sequence[Tokens], trunk: FrozenTrunk) -> None:
        cache = self.trainer.factors
        kept, cache.trunk = cache.trunk, trunk
        cache._compute(texts)
        cache.trunk = kept

    def _factors(self, run: DryRun) -> None:
        order = sorted(
            {e.edit for e in self.trainer.train_texts}, key=lambda t: (len(t.ids), t.key)
        )
        sizes = [self._factor_bytes(text) for text in order]
        total, budget = sum(sizes), self.h.cache_bytes
        share = min(1.0, budget / total)
        trunk = self.trainer.trunk
        work, _ = _measured(
            run, lambda: self._capture(order[len(order) // 2 :][:FACTOR_BATCH], trunk)
        )
        _, peak = _measured(run, lambda: self._capture(order[-FACTOR_BATCH:], trunk))
        self.held["factors"] = min(total, budget)
        done = scaled(
            work, share * len(order) / min(FACTOR_BATCH, max(1, len(order) - len(order) // 2))
        )
        self._add("factors", peak if budget else 0, done.seconds(self.machine))
        self.uncached = 1 - share

    def _factor_bytes(self, text: Tokens) -> int:
        scored, before = len(text.scored), max(text.scored) + 1
        few = self.h.edit_tokens == "scored"
        return sum(
            4 * (site.d_in + site.d_out) * (scored if few or site.scored_only else before)
            for site in self.base.sites
        )

    def _hypernetwork(self, run: DryRun) -> None:
        trainer, chosen = self.trainer, self.chosen
        with torch.device("meta"):
            trainer.mend = MEND(self.base.sites, self.h)
        self.held["hypernetwork"] = run.restart()

        def gather(examples: Sequence) -> tuple[Work, int]:
            pairs = trainer.paired(examples) if trainer.reads_wordings else ()
            return _measured(run, lambda: trainer.mend.warm_up(trainer.statistics(examples), pairs))

        once, peak = gather(chosen[-FACTOR_BATCH:])
        seconds, more = once.seconds(self.machine), chosen[len(chosen) // 2 :][: 2 * FACTOR_BATCH]
        if len(more) > FACTOR_BATCH:  # what each example adds, beside what is done once
            twice, half = (
                gather(some)[0].seconds(self.machine) for some in (more, more[:FACTOR_BATCH])
            )
            seconds = half + (twice - half) / (len(more) - FACTOR_BATCH) * (
                len(chosen) - FACTOR_BATCH
            )
        self._add("statistics", peak, seconds)

    def _training(self, run: DryRun) -> None:
        """Validation, steps and archives take turns, and what one frees the process keeps for the others."""
        trainer, h, steps = self.trainer, self.h, self.trainer.steps()
        texts = sorted(trainer.val_texts, key=lambda e: sum(len(t.ids) for t in e.all()))
        size = min(len(texts), h.val_batch_size)
        middle = (len(texts) - size) // 2
        reading, _ = _measured(run, lambda: self._validate(texts[middle : middle + size]))
        _measured(run, lambda: self._validate(texts[-size:]))
        optimiser, sampler = (
            make_optimiser(trainer.mend, h),
            Sampler(trainer.train_texts, h),
        )
        for value in (
            trainer.mend.parameters()
        ):  # the fused kernel knows no meta device when it makes these itself
            moments = {name: torch.zeros_like(value) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[value] = {"step": torch.zeros((), device="meta"), **moments}
        self.held["moments"] = 2 * sum(value.nbytes for value in trainer.mend.parameters())
        done: list[tuple[Work, int]] = []
        for at, drawn in zip(range(3), iter(sampler), strict=False):
            if self.uncached == 0:  # what is drawn lies in the cache already
                trainer.factors.fill([trainer.train_texts[i].edit for i in drawn[0]])
            one = partial(
                trainer.step,
                at + 1,
                optimiser,
                sampler,
                iter([drawn] * h.accumulate_bs),
                max(steps, 1),
            )
            done.append(_measured(run, one, trimmed=False))
        step = sum(work.seconds(self.machine) for work, _ in done) / len(done)
        self._add("step", max(peak for _, peak in done), step, steps)
        times = 1 + -(-steps // h.val_interval)
        _, peak = _measured(run, lambda: self._validate(texts[-size:]), trimmed=False)
        self._add("validation", peak, reading.seconds(self.machine) * len(texts) / size, times)
        _, kept = _measured(run, lambda: None, trimmed=False)
        own = self.held["hypernetwork"]
        hashing = (
            own + sum(site.d_in * site.d_out * 4 for site in self.base.sites)
        ) / self.machine.hashed
        self._add("archive", kept + own, hashing + self._reading(own), times - 1)

    def _validate(self, texts: Sequence) -> None:
        validate(self.trainer.trunk, self.trainer.mend, texts, self.h)


def _weight_bytes(base: BaseModel) -> tuple[int, int, int]:
    """Bytes of the whole model, of what only the trunk pass needs, and of its largest block."""
    sizes = {name: value.nbytes for name, value in base.model.named_parameters()}
    if base.blocks is None:
        return sum(sizes.values()), 0, 0
    path, first = base.blocks.path, base.blocks.first
    below = [name for name in trunk_names(base.model, path, first) if name in sizes]
    blocks = [sum(sizes[n] for n in below if n.startswith(f"{path}.{i}.")) for i in range(first)]
    return sum(sizes.values()), sum(sizes[name] for name in below), max(blocks, default=0)


def scaled(work: Work, factor: float) -> Work:
    """So many times the work."""
    flops = {kind: count * factor for kind, count in work.flops.items()}
    return Work(flops, {size: count * factor for size, count in work.bytes.items()})


def _measured(run: DryRun, call: Callable[[], object], *, trimmed: bool = True) -> tuple[Work, int]:
    """The work of a call and the most that it adds to what lives; see `DryRun.restart`."""
    before = run.restart(trimmed=trimmed)
    call()
    work, peak = run.work(), run.peak - before
    run.restart(trimmed=False)
    return work, peak


def fitting(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    /,
    *,
    budget: int,
    machine: Machine,
    keep_trunk: bool = False,
) -> tuple[dict[str, object], Plan]:
    """The first settings, least harmful first, with which the plan fits into `budget` bytes, and that plan.

    The last ones tried if none does. With `keep_trunk` the model stays whole.
    """
    given, tried = hparams, {}
    whole = plan(given, train, validation, machine=machine)
    for name, value in _savings(hparams, keep_trunk=keep_trunk):
        if whole.needed <= budget:
            break
        tried[name] = value
        whole = plan(given.replace(**tried), train, validation, machine=machine)
    return tried, whole


def _savings(h: MENDHyperParams, *, keep_trunk: bool) -> list[tuple[str, object]]:
    """Settings that save memory, each beside those before it."""
    out: list[tuple[str, object]] = (
        [] if keep_trunk else [("release_trunk", True), ("stream_trunk", True)]
    )
    if h.dtype in ("auto", "float32"):
        out.append(("dtype", "bfloat16"))
    out += [("cache_bytes", h.cache_bytes // 4), ("cache_bytes", 0)]
    for divisor in (2, 4, 8):
        if h.batch_size >= divisor:
            out += [
                ("batch_size", h.batch_size // divisor),
                ("accumulate_bs", h.accumulate_bs * divisor),
            ]
    out += [
        ("rank", h.rank // divisor)
        for divisor in (2, 4)
        if h.rank is not None and h.rank >= divisor
    ]
    return [(name, value) for name, value in out if value != getattr(h, name)]


def check_memory(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    /,
    *,
    keep_trunk: bool = False,
) -> None:
    """Raise MendkitError if `train` on the CPU is planned to need more memory than is free, and TOLERANCE besides.

    A warning where there is no plan. `keep_trunk`: the model is used after training, too, and so kept whole. Raises
    ModelError if the model's configuration cannot be read.
    """
    device, processes = choose_device(hparams.device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if (
        device.type != "cpu"
    ):  # which stops by itself where memory ends, and whose plans nobody has measured
        return
    if keep_trunk:
        hparams = hparams.replace(stream_trunk=False, release_trunk=hparams.release_trunk is True)
    if hparams.model_name != BUNDLED:
        read_config(locate(hparams.model_name), trust_remote_code=hparams.trust_remote_code)
    free = free_memory(device) // processes
    try:
        own = plan(hparams, train, validation, machine=_UNTIMED)
        if own.needed - own.idle <= (1 + TOLERANCE) * free:
            return
        logger.info("memory is short; looking for settings that fit")
        settings, other = fitting(
            hparams,
            train,
            validation,
            budget=free + own.idle,
            machine=_UNTIMED,
            keep_trunk=keep_trunk,
        )
    except Exception as error:  # code of a model, or of transformers, may not run on shapes alone
        logger.warning("whether memory is enough is not known: %s", error)
        return
    words = " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())
    less = other.needed - other.idle
    fits = (
        f"with {words} it fits"
        if less <= free
        else f"even with {words or 'all savings'} it does not fit"
    )
    raise MendkitError(
        f"training is planned to need {(own.needed - own.idle) / 1e9:.2f} GB ({own.largest}), {free / 1e9:.2f} GB are "
        f"free; {fits} ({less / 1e9:.2f} GB); --ignore-memory trains all the same"
    )


def table(own: Plan) -> str:
    """A plan for people."""
    how = [
        word for word, holds in (("streamed", own.streamed), ("released", own.released)) if holds
    ]
    lengths = (
        "lengths estimated at four characters a token"
        if own.estimated_lengths
        else "its own tokenizer"
    )
    lines = [
        f"{own.model}: {own.parameters / 1e6:,.0f} M parameters; trunk {' and '.join(how) or 'kept'}",
        f"{own.texts:,} texts, {own.tokens:,} tokens ({lengths})",
        f"{'':12}{'memory':>10}{'time':>16}  what takes the memory (GB)",
    ]
    for phase in own.phases:
        time = f"{phase.seconds:.2f} s" if phase.seconds < 60 else clock(phase.seconds)
        time += f" x {phase.times}" if phase.times > 1 else ""
        parts = sorted(phase.parts.items(), key=lambda part: -part[1])[:3]
        most = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts)
        lines.append(f"{phase.name:12}{(own.idle + phase.peak) / 1e9:>7.2f} GB{time:>16}  {most}")
    if any(phase.mapped for phase in own.phases):
        lines.append(
            "trunk states and references lie on disk: the system takes their pages back where memory is short"
        )
    lines.append(
        f"all in all: at least {own.needed / 1e9:.2f} GB ({own.training_needed / 1e9:.2f} GB after the trunk pass), of "
        f"it the process itself {own.idle / 1e9:.2f}; {clock(own.seconds)}"
    )
    return "\n".join(lines)
