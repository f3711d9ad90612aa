"""What training will take: memory and time of every phase, before anything is loaded.

The model is built on the meta device from its configuration, and the training's own code runs there on the shapes of
the texts (`dryrun`): one batch of each phase, the longest for memory, and time in proportion. What is held through
training is exact: weights, trunk states, factors, hypernetwork with gradients and moments. Without the tokenizer's
files a stand-in of about four characters a token gives the lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .architectures import published
from .archive import inspect_archive
from .checkpoints import DTYPES, choose_device, read_tokenizer, silence_transformers, skeleton
from .data import EditExample, Tokens
from .dryrun import SIZES, DryRun, Machine, Work
from .errors import MendkitError
from .hollow import trunk_names
from .hparams import MENDHyperParams
from .mend import MEND
from .models import BUNDLED, BaseModel, bundled_model
from .runs import clock, free_memory
from .training import FACTOR_BATCH, STRUCTURE, Sampler, Trainer, make_optimiser
from .trunk import FrozenTrunk, _chunks, collate
from .validation import validate

logger = logging.getLogger(__name__)

PLANNED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The precisions that training may calculate in."""


@dataclass(frozen=True)
class Phase:
    """One phase of training: what is held when it ends and the most that it needs, above an idle process; its time."""

    name: str
    held: int  # bytes
    peak: int  # bytes
    seconds: float


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
    parts: dict[str, int]  # bytes held through training, by what they are, and of a step's working memory
    idle: int  # bytes of this process with the model's code and tokenizer, and no weights

    @property
    def peak(self) -> int:
        """The most memory of all phases, in bytes, the process itself included."""
        return self.idle + max(phase.peak for phase in self.phases)

    @property
    def training_peak(self) -> int:
        """The most memory after the trunk pass, in bytes, the process itself included."""
        after = [phase.peak for phase in self.phases if phase.name not in ("loading", "trunk pass", "one edit")]
        return self.idle + max(after)

    @property
    def seconds(self) -> float:
        """Time of the whole training."""
        return sum(phase.seconds for phase in self.phases if phase.name not in ("one step", "one edit"))


class _Shapes(BaseModel):
    """A base model on the meta device; its texts' token ids are real."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def released(self) -> int:
        return 0


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
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def _written(examples: Sequence[EditExample]) -> Iterator[str]:
    for e in examples:
        prompts = (e.prompt, *e.paraphrases, *(p.prompt for p in (*e.neighbours, *e.unrelated)))
        answers = (e.target_new, *(p.answer or "" for p in (*e.neighbours, *e.unrelated)))
        yield from (*prompts, *(f" {answer}" for answer in answers))


def shape_model(hparams: MENDHyperParams, examples: Sequence[EditExample]) -> tuple[BaseModel, bool]:
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

    Raises MendkitError if there are no examples, and ModelError as loading the model does.
    """
    if not train or not validation:
        raise MendkitError("a plan needs at least one training and one validation example")
    if hparams.archive is not None:
        theirs = inspect_archive(hparams.archive)
        kept = {key: theirs["hparams"][key] for key in STRUCTURE if key in theirs["hparams"]}
        sites = tuple(site["name"] for site in theirs["base_model"]["sites"])
        hparams = hparams.replace(archive=None, inner_params=sites, **kept)
    base, exact = shape_model(hparams, (*train, *validation))
    idle = psutil.Process().memory_info().rss
    machine = machine or Machine.measured(PLANNED)
    return _Planner(base, hparams, train, validation, machine).plan(idle, exact)


class _Planner:
    """The phases one after another, each with what is held by then."""

    def __init__(self, base: BaseModel, hparams: MENDHyperParams, train, validation, machine: Machine) -> None:
        self.base, self.h, self.machine = base, hparams, machine
        no_disk = hparams.replace(disk_cache_bytes=0)  # which would need the weights' hash
        self.trainer = Trainer(base, no_disk, train, validation, Path("."), done_with_base=True)
        self.trainer.trunk = self.trainer.factors.trunk = _ShapeTrunk(base)
        self.whole, self.below, self.block = _weight_bytes(base)
        split = base.blocks is not None and base.blocks.first > 0
        stream = hparams.stream_trunk
        on = choose_device(hparams.device)
        self.streamed = split and (stream is True or (stream == "auto" and self.whole > free_memory(on)))
        self.released = self.streamed or (split and hparams.release_trunk is not False)
        self.resident = self.whole - (self.below if self.streamed else 0)
        self.held = {"weights": self.whole - (self.below if self.released else 0)}
        self.phases: list[Phase] = []

    def plan(self, idle: int, exact: bool) -> Plan:
        texts = self._texts()
        again = 2 * self._reading(self.below) if self.streamed else 0.0
        hashing = 2 * self.whole / self.machine.hashed  # for the cache and for the archive
        loading = self._reading(self.resident) + again + hashing
        self.phases.append(Phase("loading", self.resident, self.resident, loading))
        with DryRun(list(self.base.model.parameters())) as run:
            run.restart()
            self._trunk(run, texts)
            self._one_edit(run)
            self._factors(run)
            self._hypernetwork(run)
            self._training(run)
        count = sum(value.numel() for value in self.base.model.parameters())
        return Plan(
            self.base.name, count, self.streamed, self.released, not exact, len(texts),
            sum(len(text.ids) for text in texts), tuple(self.phases), self.held, idle,
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

    def _add(self, name: str, working: int, seconds: float, *, extra: int = 0) -> None:
        held = sum(self.held.values())
        self.phases.append(Phase(name, held, held + extra + working, seconds))

    def _trunk(self, run: DryRun, texts: Sequence[Tokens]) -> None:
        if self.base.blocks is None:
            return
        chunks = list(_chunks(texts))
        padded = [len(chunk) * max(len(t.ids) for t in chunk) for chunk in chunks]
        largest = collate(chunks[padded.index(max(padded))], self.base.pad_id)
        with torch.no_grad():
            FrozenTrunk(self.base)._watch(largest)
        work, peak = scaled(run.work(), sum(padded) / max(padded)), run.peak
        run.restart()
        size = self.base.dtype.itemsize * state_width(self.base)
        self.held["trunk states"] = size * sum(len(t.ids) for t in texts)
        self.held["references"] = size * sum(len(t.scored) for t in texts)
        away = self.resident - self.held["weights"] + (2 * self.block if self.streamed else 0)
        read = self._reading(self.below) if self.streamed else 0.0
        self._add("trunk pass", peak, work.seconds(self.machine) + read, extra=away)

    def _one_edit(self, run: DryRun) -> None:
        """An edit as the editor makes it: factors by the whole model, nothing cached."""
        text = max((e.edit for e in self.trainer.train_texts), key=lambda t: len(t.ids))
        whole = FrozenTrunk(self.base)
        self.edit_work, self.edit_peak = _measured(run, lambda: self._capture([text], whole))

    def _capture(self, texts: Sequence[Tokens], trunk: FrozenTrunk) -> None:
        cache = self.trainer.factors
        kept, cache.trunk = cache.trunk, trunk
        cache._compute(texts)
        cache.trunk = kept

    def _factors(self, run: DryRun) -> None:
        order = sorted({e.edit for e in self.trainer.train_texts}, key=lambda t: (len(t.ids), t.key))
        sizes = [self._factor_bytes(text) for text in order]
        total, budget = sum(sizes), self.h.cache_bytes
        share = min(1.0, budget / total)
        trunk = self.trainer.trunk
        work, _ = _measured(run, lambda: self._capture(order[len(order) // 2 :][:FACTOR_BATCH], trunk))
        _, peak = _measured(run, lambda: self._capture(order[-FACTOR_BATCH:], trunk))
        self.held["factors"] = min(total, budget + max(sizes) * FACTOR_BATCH) if budget else 0
        done = scaled(work, share * len(order) / min(FACTOR_BATCH, max(1, len(order) - len(order) // 2)))
        self._add("factors", peak if budget else 0, done.seconds(self.machine))
        self.uncached = 1 - share

    def _factor_bytes(self, text: Tokens) -> int:
        scored, before = len(text.scored), max(text.scored) + 1
        few = self.h.edit_tokens == "scored"
        return sum(
            4 * (site.d_in + site.d_out) * (scored if few or site.scored_only else before) for site in self.base.sites
        )

    def _hypernetwork(self, run: DryRun) -> None:
        trainer, chosen = self.trainer, self.chosen
        with torch.device("meta"):
            trainer.mend = MEND(self.base.sites, self.h)
        self.held["hypernetwork"] = run.restart()

        def gather(examples: Sequence) -> tuple[Work, int]:
            pairs = trainer.paired(examples) if self.h.whiten_pairs else ()
            return _measured(run, lambda: trainer.mend.warm_up(trainer.statistics(examples), pairs))

        once, peak = gather(chosen[-FACTOR_BATCH:])
        seconds, more = once.seconds(self.machine), chosen[len(chosen) // 2 :][: 2 * FACTOR_BATCH]
        if len(more) > FACTOR_BATCH:  # what each example adds, beside what is done once
            twice, half = (gather(some)[0].seconds(self.machine) for some in (more, more[:FACTOR_BATCH]))
            seconds = half + (twice - half) / (len(more) - FACTOR_BATCH) * (len(chosen) - FACTOR_BATCH)
        self._add("statistics", peak, seconds)

    def _training(self, run: DryRun) -> None:
        trainer, h, seconds, working = self.trainer, self.h, [], 0
        steps = trainer.steps()
        validating, validation_peak = self._validation(run)
        optimiser, sampler = make_optimiser(trainer.mend, h), Sampler(trainer.train_texts, trainer.train_examples, h)
        for group in optimiser.param_groups:  # which needs real parameters
            group["fused"] = False
        for at, index in zip(range(4), iter(sampler), strict=False):
            if self.uncached == 0:  # what is drawn lies in the cache already
                trainer.factors.fill([trainer.train_texts[i].edit for i in index])
            before = run.restart()
            trainer.step(at + 1, optimiser, sampler, iter([index] * h.accumulate_bs), max(steps, 1))
            if at:  # the first one makes the moments
                seconds.append(run.work().seconds(self.machine))
                working = max(working, run.peak - before)
        step = sum(seconds) / len(seconds)
        self.held["moments"] = 2 * sum(value.nbytes for value in trainer.mend.parameters())
        self._add("one step", working, step)
        self._add("training", working, step * steps)
        self._add("validations", validation_peak, validating * (1 + -(-steps // h.val_interval)))
        edit = self.whole + self.held["hypernetwork"]
        self.phases.append(Phase("one edit", edit, edit + self.edit_peak, self.edit_work.seconds(self.machine)))
        self.held["a step's working memory"] = working

    def _validation(self, run: DryRun) -> tuple[float, int]:
        """Seconds of one validation, and the most memory of a batch."""
        texts = sorted(self.trainer.val_texts, key=lambda e: sum(len(t.ids) for t in e.all()))
        size = min(len(texts), self.h.val_batch_size)
        middle = (len(texts) - size) // 2
        work, _ = _measured(run, lambda: self._validate(texts[middle : middle + size]))
        _, peak = _measured(run, lambda: self._validate(texts[-size:]))
        return work.seconds(self.machine) * len(texts) / size, peak

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


def _measured(run: DryRun, call: Callable[[], object]) -> tuple[Work, int]:
    """The work of a call and the most that it adds to what lives."""
    before = run.restart()
    call()
    work, peak = run.work(), run.peak - before
    run.restart()
    return work, peak


def fitting(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    /,
    *,
    budget: int,
    machine: Machine,
) -> tuple[dict[str, object], Plan]:
    """The first settings, least harmful first, with which the plan fits into `budget` bytes, and that plan.

    The last ones tried if none does.
    """
    given, tried = hparams, {}
    whole = plan(given, train, validation, machine=machine)
    for name, value in _savings(hparams, whole):
        if whole.peak <= budget:
            break
        tried[name] = value
        whole = plan(given.replace(**tried), train, validation, machine=machine)
    return tried, whole


def _savings(h: MENDHyperParams, whole: Plan) -> list[tuple[str, object]]:
    """Settings that save memory, each beside those before it."""
    out: list[tuple[str, object]] = [("release_trunk", True), ("stream_trunk", True)]
    if h.dtype in ("auto", "float32"):
        out.append(("dtype", "bfloat16"))
    out += [("cache_bytes", h.cache_bytes // 4), ("cache_bytes", 0)]
    for divisor in (2, 4, 8):
        if h.batch_size >= divisor:
            out += [("batch_size", h.batch_size // divisor), ("accumulate_bs", h.accumulate_bs * divisor)]
    out += [("rank", h.rank // divisor) for divisor in (2, 4) if h.rank is not None and h.rank >= divisor]
    return [(name, value) for name, value in out if value != getattr(h, name)]


def table(own: Plan) -> str:
    """A plan for people."""
    how = [word for word, holds in (("streamed", own.streamed), ("released", own.released)) if holds]
    lengths = "lengths estimated at four characters a token" if own.estimated_lengths else "its own tokenizer"
    lines = [
        f"{own.model}: {own.parameters / 1e6:,.0f} M parameters; trunk {' and '.join(how) or 'kept'}",
        f"{own.texts:,} texts, {own.tokens:,} tokens ({lengths})",
        f"{'':14}{'memory held':>13}{'at most':>11}{'time':>10}",
    ]
    for phase in own.phases:
        time = f"{phase.seconds:.2f} s" if phase.seconds < 60 else clock(phase.seconds)
        lines.append(f"{phase.name:14}{phase.held / 1e9:>10.2f} GB{phase.peak / 1e9:>8.2f} GB{time:>10}")
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in own.parts.items())
    lines.append(f"in training (GB): {parts}")
    lines.append(
        f"the process itself takes {own.idle / 1e9:.2f} GB more: {own.peak / 1e9:.2f} GB at most, "
        f"{own.training_peak / 1e9:.2f} GB after the trunk pass; training takes {clock(own.seconds)}"
    )
    return "\n".join(lines)
