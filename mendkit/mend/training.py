"""Training a hypernetwork (MEND, Algorithm 1) on cached factors, with batches of independent edits.

One step: draw B examples; map their cached factors to B low-rank updates; read, in one suffix pass, each edit's prompt,
paraphrases, neighbours and unrelated prompts under its own update; and descend

    c_edit · NLL(edit) + c_para · NLL(paraphrases) + c_neigh · KL(neighbours) + c_loc · KL(unrelated)

(equations 4 and 5, the locality term split in two), each term a mean over the batch's texts. One optimiser with two
parameter groups: the transforms with `lr`, the log step sizes with `lr_lr` (CORRECTNESS row 2).
"""

import hashlib
import json
import logging
import math
import operator
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.examples import EditExample
from ..errors import HyperParamError, MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.load import load_for_training, release_trunk
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk, trunk_cache
from ..runs import Progress, append_line, open_run, provenance, return_memory, write_text
from .archive import inspect_archive, load_archive, save_archive
from .batches import RIVALS, ROLES, ExampleTexts, prepare_texts, role_weights, training_texts
from .checkpoint import FILE as CHECKPOINT_FILE
from .checkpoint import Checkpoint, Course
from .distributed import Team
from .factors import Factors, capture_factors, capture_inputs, pack, unpack
from .files import make_folder
from .hypernetwork import MEND, Wordings
from .least_squares import Memory
from .loggers import Log, check_logger, open_logger
from .losses import edit_nll, locality_kl, margin_shortfall, wide
from .updates import Updates, side_branches
from .validation import validate

logger = logging.getLogger(__name__)

ARCHIVE, HISTORY = "archive.safetensors", "history.jsonl"
"""Files of a run folder, beside its checkpoint (resume.py)."""

FACTOR_BATCH = 32
FEW_PAIRED = 300
MOST_SKIPPED = 10
"""Steps in a row without a finite loss and gradient at which training stops. Batches are drawn at random: were it the
fault of a text in every second one, ten in a row would come once in a thousand steps; an editor that has gone astray
fails on all."""

STRUCTURE = (
    *(
        "rank",
        "n_hidden",
        "init",
        "norm",
        "combine",
        "one_sided",
        "x_only",
        "delta_only",
        "shared",
        "norm_stats",
    ),
    *("update_sign", "std_floor", "std_eps", "z_clip", "edit_tokens", "loss_reduction", "whiten"),
    *("whiten_pairs", "unit_response", "add_eos", "aggregate"),
)
"""Hyperparameters that an archive decides when training goes on from it."""


@dataclass(frozen=True)
class TrainingResult:
    """Where the best archive lies, what happened on the way, and the trained hypernetwork's scores."""

    archive: Path
    history: tuple[dict[str, float], ...]  # one row per logged step and per validation
    best: dict[str, float]  # the validation row of the archive that was kept
    seconds: float  # wall time of training, caches included, over all its starts if it was stopped
    stopped: str  # why training ended
    normaliser_examples: (
        int  # how many examples gave the statistics; 0 if an archive was trained on
    )
    cache: dict[str, float]  # seconds and bytes of the caches
    skipped: int = 0  # steps whose loss or gradient was not finite


class FactorCache:
    """Factors per text: kept in memory within a byte budget, recomputed from the trunk beyond it.

    Not on disk: they take many times the room of the trunk states that they are computed from in one suffix pass, and
    depend on sites, tokens and reduction besides. With `as_needed` what `get` computes is kept, too: of several
    processes none needs all.
    """

    def __init__(
        self, trunk: FrozenTrunk, hparams: MENDHyperParams, *, as_needed: bool = False
    ) -> None:
        self.trunk, self.as_needed = trunk, as_needed
        self.how = {"tokens": hparams.edit_tokens, "reduction": hparams.loss_reduction}
        self.budget, self.bytes = hparams.cache_bytes, 0
        self._kept: dict[Tokens, Factors] = {}

    def fill(self, texts: Sequence[Tokens], progress: Any = None) -> None:
        """Compute and keep factors, shortest texts first, until the budget is spent."""
        order = sorted(set(texts), key=lambda text: (len(text.ids), text.key))
        for at in range(0, len(order) if self.budget else 0, FACTOR_BATCH):
            chunk = order[at : at + FACTOR_BATCH]
            if not self._keep(dict(zip(chunk, self._compute(chunk), strict=True))):
                return
            if progress is not None:
                progress(min(at + FACTOR_BATCH, len(order)), len(order))

    def get(self, texts: Sequence[Tokens]) -> Factors:
        """Packed factors of some texts."""
        missing = [text for text in texts if text not in self._kept]
        fresh = dict(zip(missing, self._compute(missing), strict=True)) if missing else {}
        if self.as_needed:
            self._keep(fresh)
        return pack([self._kept.get(text) or fresh[text] for text in texts])

    def _keep(self, factors: Mapping[Tokens, Factors]) -> bool:
        """Keep those that there is room for; whether that was all."""
        sizes = {
            text: sum(f.u.nbytes + f.delta.nbytes for f in own.values())
            for text, own in factors.items()
        }
        for text, size in sizes.items():
            if self.bytes + size <= self.budget:
                self._kept[text] = factors[text]
                self.bytes += size
        return all(text in self._kept for text in factors)

    def __len__(self) -> int:
        return len(self._kept)

    def _compute(self, texts: Sequence[Tokens]) -> list[Factors]:
        return unpack(capture_factors(self.trunk, texts, **self.how), len(texts))


class Sampler:
    """Batches of example indices, reshuffled every epoch, and the texts drawn for each; all from one generator.

    `borrow` is the share of neighbours and unrelated prompts that are other examples' texts, whatever their role: of
    the same relation for neighbours, of another for unrelated prompts, and never one that names the edit's subject.
    `hard_negatives` is the share of neighbours that are an example's own hard ones (`readers.hard_negatives`).
    `swap` is the share of edits made with any of an example's wordings; its other wordings are then the paraphrases.
    """

    def __init__(self, examples: Sequence[ExampleTexts], hparams: MENDHyperParams) -> None:
        self.examples, self.hparams = examples, hparams
        self.generator = torch.Generator().manual_seed(hparams.seed)
        self.lent: list[tuple[str, str | None, Tokens]] = []  # prompt, relation, text
        for own in examples:
            e = own.example
            prompts = (
                e.prompt,
                *e.paraphrases[: len(own.paraphrases)],
                *(p.prompt for p in e.neighbours),
            )
            texts = (own.edit, *own.paraphrases, *own.neighbours)
            self.lent += [(p, e.relation, text) for p, text in zip(prompts, texts, strict=False)]
            self.lent += [
                (p.prompt, None, text) for p, text in zip(e.unrelated, own.unrelated, strict=False)
            ]
        self.by_relation: dict[str | None, list[int]] = {}
        for i, (_, relation, _) in enumerate(self.lent):
            self.by_relation.setdefault(relation, []).append(i)
        self.order: list[int] = []  # what is left of the epoch

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        while True:
            yield self._draw()

    def _draw(self) -> tuple[list[int], int]:
        """The next examples, and how many of them in a row share one update: 1, or with `train_on: batch` a number up
        to `most_edits`, its logarithm uniform."""
        h, at_once = self.hparams, 1
        most = min(h.most_edits, len(self.examples))
        if h.train_on == "batch":
            at_once = self._number(most)
        size = max(min(h.batch_size, len(self.examples)) // at_once, 1) * at_once
        while len(self.order) < size:
            self.order += torch.randperm(len(self.examples), generator=self.generator).tolist()
        batch, self.order = self.order[:size], self.order[size:]
        return batch, at_once

    def earlier(self) -> list[Tokens]:
        """Edits made before, with `train_on: sequence`: up to `most_edits` less one, its logarithm uniform."""
        if self.hparams.train_on != "sequence":
            return []
        number = self._number(min(self.hparams.most_edits, len(self.examples))) - 1
        index = torch.randperm(len(self.examples), generator=self.generator)[:number]
        return [self.examples[i].edit for i in index.tolist()]

    def _number(self, most: int) -> int:
        return min(int((most + 1) ** self._chance()), most)

    def texts(self, index: Sequence[int]) -> list[list[tuple[str, Tokens]]]:
        """For each edit the same number of (role, text); the role "" fills up and has no weight."""
        h = self.hparams
        wanted = {"paraphrases": h.paraphrases_per_edit, "neighbours": h.neighbours_per_edit}
        wanted["unrelated"] = h.unrelated_per_edit
        out = []
        for i in index:
            example = self.examples[i]
            wordings = [example.edit, *example.paraphrases]
            edit = wordings.pop(
                int(self._chance() * len(wordings)) if h.swap and self._chance() < h.swap else 0
            )
            drawn = [("edit", edit)]
            for role, count in wanted.items():
                pool = wordings if role == "paraphrases" else getattr(example, role)
                pick = torch.randperm(len(pool), generator=self.generator)[:count].tolist()
                chosen = [pool[j] for j in pick]
                if h.borrow and role != "paraphrases":
                    borrowed = [
                        self._borrowed(i, role) for _ in range(count) if self._chance() < h.borrow
                    ]
                    borrowed = [text for text in borrowed if text is not None]
                    chosen = [*borrowed, *chosen][:count]
                if h.hard_negatives and role == "neighbours":
                    number = sum(self._chance() < h.hard_negatives for _ in range(count))
                    order = torch.randperm(len(example.hard), generator=self.generator)[
                        :number
                    ].tolist()
                    chosen = [*(example.hard[j] for j in order), *chosen][:count]
                for text in chosen:
                    drawn.append((role, text))
                    if (
                        role == "neighbours" and text in example.rivals
                    ):  # next to it: `batch_losses` compares the two
                        drawn.append((RIVALS, example.rivals[text]))
            out.append(drawn)
        most = max(map(len, out))
        return [drawn + [("", drawn[0][1])] * (most - len(drawn)) for drawn in out]

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _borrowed(self, i: int, role: str) -> Tokens | None:
        """Another example's text; None where ten draws found none that may be borrowed."""
        e = self.examples[i].example
        pool = self.by_relation[e.relation] if role == "neighbours" else range(len(self.lent))
        if e.subject is None or (role == "neighbours" and e.relation is None):
            return None
        for _ in range(10):
            prompt, relation, text = self.lent[pool[int(self._chance() * len(pool))]]
            foreign = role == "neighbours" or relation is None or relation != e.relation
            if foreign and e.subject not in prompt:
                return text
        return None


def batch_losses(
    trunk: FrozenTrunk,
    mend: MEND,
    factors: Factors,
    texts: Sequence[Sequence[tuple[str, Tokens]]],
    /,
    *,
    at_once: int = 1,
    before: Updates | None = None,
    memory: Memory | None = None,
) -> dict[str, Tensor]:
    """Mean loss of each role over a batch of edits, each text read under its own edit's update: independent edits, or
    `at_once` in a row made as one; and on top of the edits `before`, which `memory` holds."""
    rows = [text for own in texts for _, text in own]
    roles = [role for own in texts for role, _ in own]
    batch = collate(rows, trunk.base.pad_id, trunk.base.device)
    if before and memory is not None:
        memory.held = {name: update.dense() for name, update in before.items()}
    updates = mend(factors, len(texts), at_once=at_once, memory=memory)
    with side_branches(trunk.base, before or {}), side_branches(trunk.base, updates):
        logits = trunk.suffix(rows, batch)
    losses: dict[str, Tensor] = {}
    keep = torch.tensor(
        [role in ("neighbours", "unrelated") for role in roles], device=logits.device
    )
    at, rivals = keep[batch.rows], [i for i, role in enumerate(roles) if role == RIVALS]
    silent = keep.clone()
    silent[[i - 1 for i in rivals]] = False
    nll = by_row = torch.zeros(len(rows), dtype=wide(logits).dtype, device=logits.device)
    if not bool(
        silent.all()
    ):  # cross entropy ignores a target of -100, at less cost than choosing rows of logits
        nll = edit_nll(
            logits, batch.targets.masked_fill(silent[batch.rows], -100), batch.rows, len(rows)
        )
        by_row = nll.masked_fill(keep, 0.0)
    if bool(keep.any()):
        kept = [row for row, k in zip(rows, keep.tolist(), strict=True) if k]
        before = trunk.before(kept, collate(kept, trunk.base.pad_id, trunk.base.device))
        by_row = by_row + locality_kl(before, logits[at], batch.rows[at], len(rows))
    for role in ROLES:
        where = [i for i, r in enumerate(roles) if r == role]
        if where:
            losses[role] = by_row[where].mean()
    if rivals:
        own = nll[[i - 1 for i in rivals]]
        losses[RIVALS] = margin_shortfall(own, nll[rivals], margin=mend.hparams.margin).mean()
    return losses


def total_loss(losses: dict[str, Tensor], h: MENDHyperParams) -> Tensor:
    """The weighted sum of the role losses."""
    weights = role_weights(h)
    return sum((weights[role] * loss for role, loss in losses.items()), torch.zeros(()))


def learning_rate_factor(step: int, h: MENDHyperParams, max_iters: int) -> float:
    """Linear warm-up, then constant or cosine to a tenth; step counts from 0."""
    warm = min(1.0, (step + 1) / max(h.warmup_iters, 1))
    if h.schedule == "constant":
        return warm
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(step / max_iters, 1.0))))


def make_optimiser(mend: MEND, h: MENDHyperParams, /) -> torch.optim.Optimizer:
    """One optimiser, two groups: transforms (`lr`) and log step sizes (`lr_lr`)."""
    logarithms = [p for n, p in mend.named_parameters() if n.startswith("log_")]
    transforms = [p for n, p in mend.named_parameters() if not n.startswith("log_")]
    groups = [
        {"params": transforms, "lr": h.lr, "base": h.lr},
        {"params": logarithms, "lr": h.lr_lr, "base": h.lr_lr},
    ]
    return getattr(torch.optim, h.opt)(
        groups, fused=True
    )  # one pass over parameters, gradients and moments


class Trainer:
    """State of one training run; `run()` is the loop. `log` is told every row of the history.

    With `course`, which the checkpoint in `run_dir` tells, the run goes on from there.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        train,
        val,
        run_dir: Path,
        *,
        done_with_base: bool = False,
        log: Log = lambda row: None,
        course: Course | None = None,
        team: Team | None = None,
    ) -> None:
        self.started, self.log = time.perf_counter() - (course.seconds if course else 0), log
        self.checkpoint = Checkpoint(run_dir, hparams, train, val)
        self.team = team or Team(hparams.device)
        self.progress = Progress("MEND", silent=self.team.rank > 0)
        self.loaded, self.new_aggregate = None, False
        if hparams.archive is not None:
            archive = load_archive(hparams.archive, base=base)
            base, self.loaded = archive.base, archive.mend
            wanted = hparams.aggregate
            hparams = hparams.replace(
                **{key: getattr(archive.mend.hparams, key) for key in STRUCTURE}
            )
            self.new_aggregate = wanted == "least_squares" and hparams.aggregate == "sum"
            hparams = hparams.replace(aggregate=wanted if self.new_aggregate else hparams.aggregate)
            self.loaded.hparams = hparams.replace(archive=None)
            logger.warning(
                "archive: going on training from %s, whose shape and sites are kept", archive.path
            )
        self.base, self.hparams, self.run_dir = base, hparams, run_dir
        if hparams.train_on != "single" and self.team.size > 1:
            raise HyperParamError(
                f"train_on: {hparams.train_on} works in one process only; set `train_on: single`"
            )
        texts = training_texts(base, hparams, train)
        held_out = min(hparams.stats_examples, len(texts) // 2) if hparams.stats_held_out else 0
        self.train_texts, self.stats_texts = (
            texts[: len(texts) - held_out],
            texts[len(texts) - held_out :],
        )
        if min(hparams.batch_size, len(self.train_texts)) < self.team.size:
            raise HyperParamError(
                f"batch_size: {hparams.batch_size} of {len(self.train_texts)} training examples cannot be shared by "
                f"{self.team.size} processes; raise `batch_size`, give more examples, or start fewer processes"
            )
        self.val_texts = prepare_texts(base, hparams, val[: hparams.val_steps])
        self.trunk = FrozenTrunk(
            base, cache=trunk_cache(base, hparams.cache_dir, limit=hparams.disk_cache_bytes)
        )
        self.factors = FactorCache(self.trunk, hparams, as_needed=self.team.size > 1)
        self.course = course or Course(self.steps())
        self.saved = {} if course is None else self.checkpoint.tensors(base)
        self.archive = run_dir / ARCHIVE
        self.release = hparams.release_trunk is True or (
            hparams.release_trunk == "auto"
            and done_with_base
            and self.trunk.split
            and not base.is_spread
        )

    def prepare(self) -> None:
        """Fill the caches and build (or load) the hypernetwork with its statistics."""
        show = self.progress.phase
        t0 = time.perf_counter()
        chosen = self.statistics_examples() if self.loaded is None or self.new_aggregate else []
        own = self.team.share(chosen)
        self.fill_trunk(own)
        t1 = time.perf_counter()
        if not self.factors.as_needed:
            self.factors.fill([t.edit for t in self.train_texts], show("factors"))
            return_memory()
        t2 = time.perf_counter()
        self.cache = {"trunk_seconds": t1 - t0, "factor_seconds": t2 - t1}
        self.cache |= {"factor_bytes": self.factors.bytes, "factor_examples": len(self.factors)}
        self._make(chosen, own)
        self.optimiser = make_optimiser(self.mend, self.hparams)
        self.sampler = Sampler(self.train_texts, self.hparams)
        self.cache["statistics_seconds"] = time.perf_counter() - t2

    def _make(self, chosen: Sequence[ExampleTexts], own: Sequence[ExampleTexts]) -> None:
        """Build the hypernetwork with the statistics of the `chosen` examples, of which this process gathers its `own`;
        or take that of the archive or the checkpoint."""
        self.mend = self.loaded or MEND(self.base.sites, self.hparams).to(self.base.device)
        if self.saved:
            self.mend = MEND(self.base.sites, self.hparams.replace(archive=None)).to(
                self.base.device
            )
            self.mend.load_state_dict(
                {n.removeprefix("mend/"): v for n, v in self.saved.items() if n[:5] == "mend/"}
            )
        if self.saved or (self.loaded is not None and not self.new_aggregate):
            return
        if self.hparams.whiten_pairs and len(chosen) < FEW_PAIRED:
            logger.warning(
                "whiten_pairs: statistics of %d examples are poor (it was tuned with 700, and 48 fail); give more "
                "training examples and `stats_examples`, or set `whiten_pairs: false`",
                len(chosen),
            )
        wordings = self.paired(own) if self.reads_wordings else ()
        if self.new_aggregate:
            ridges = {"ridge": self.hparams.ridge, "ridge_shared": self.hparams.ridge_shared}
            self.mend = self.loaded.with_least_squares(
                (inputs for inputs, *_ in wordings), **ridges
            )
        else:
            total = self.team.total if self.team.size > 1 else None
            self.mend.warm_up(self.statistics(own), wordings, total=total)
        self.team.align(self.mend)
        return_memory()

    def fill_trunk(self, chosen: Sequence[ExampleTexts]) -> None:
        """Trunk states of all texts, those of the statistics' examples included; then the trunk may be released."""
        texts = {"training texts": [t for e in self.train_texts for t in e.all()]}
        texts["validation texts"] = [t for e in self.val_texts for t in e.all()]
        texts["texts for statistics"] = [t for e in chosen for own in self.wordings(e) for t in own]
        if self.base.released:  # the checkpoint is read once for all of them
            texts = {"all texts": [text for own in texts.values() for text in own]}
        for name, own in texts.items():
            self.trunk.fill(own, self.progress.phase(f"trunk: {name}"))
        if self.release:
            release_trunk(self.base)
        return_memory()

    @property
    def reads_wordings(self) -> bool:
        """Whether statistics are gathered over all texts of an example."""
        return self.hparams.whiten_pairs or self.hparams.aggregate == "least_squares"

    def statistics_examples(self) -> list[ExampleTexts]:
        """Examples for the normaliser: held out of training, or drawn from it at random."""
        texts, h = self.stats_texts or self.train_texts, self.hparams
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(h.seed))[
            : h.stats_examples
        ].tolist()
        self.course.normaliser_examples = len(order)
        return sorted((texts[i] for i in order), key=lambda e: len(e.edit.ids))

    def wordings(self, example: ExampleTexts) -> tuple[list[Tokens], list[Tokens]]:
        """For the statistics: texts that differ in the prompt's wording only, and others (for `whiten_pairs`)."""
        if not self.reads_wordings:
            return [example.edit], []
        alike = [text for text in example.paraphrases if text.targets == example.edit.targets]
        return [example.edit, *alike], [*example.neighbours, *example.unrelated, *example.hard]

    def statistics(self, examples: Sequence[ExampleTexts]) -> Iterator[Factors]:
        """Factors of the examples' edits."""
        show, h = self.progress.phase("statistics"), self.hparams
        for at in range(0, len(examples), FACTOR_BATCH):
            texts = [e.edit for e in examples[at : at + FACTOR_BATCH]]
            yield capture_factors(
                self.trunk, texts, tokens=h.edit_tokens, reduction=h.loss_reduction
            )
            show(at + len(texts), len(examples))

    def paired(self, examples: Sequence[ExampleTexts]) -> Iterator[Wordings]:
        """Inputs at the scored positions of all texts; a group is one answer token of one example in its wordings."""
        show = self.progress.phase("statistics of wordings")
        for at in range(0, len(examples), FACTOR_BATCH):
            texts, groups, start = [], [], 0
            for alike, others in map(self.wordings, examples[at : at + FACTOR_BATCH]):
                texts += [*alike, *others]
                groups += [start + k for text in alike for k in range(len(text.scored))]
                groups += [-1 for text in others for _ in text.scored]
                start += len(alike[0].scored)
            first = [k == 0 for text in texts for k in range(len(text.scored))]
            yield capture_inputs(self.trunk, texts), torch.tensor(groups), torch.tensor(first)
            show(min(at + FACTOR_BATCH, len(examples)), len(examples))

    def steps(self) -> int:
        """Optimiser steps that the hyperparameters ask for."""
        h = self.hparams
        per_epoch = math.ceil(len(self.train_texts) / (h.batch_size * h.accumulate_bs))
        return h.max_iters if h.max_epochs is None else h.max_epochs * per_epoch

    def run(self) -> TrainingResult:
        """Train until the steps, the time or the patience are used up; the best archive is on disk at the end.

        Raises MendkitError if an edit site has no effect, or if too many steps in a row or all validations were not
        finite.
        """
        h, course = self.hparams, self.course
        self.prepare()
        start = time.perf_counter() - course.elapsed
        if self.saved:
            self.go_on()
        else:
            self.validate()
        batches = iter(self.sampler)
        while (stopped := self.over()) is None:
            course.step += 1
            row = self.step(course.step, self.optimiser, self.sampler, batches, course.steps)
            course.elapsed = time.perf_counter() - start
            self.progress.step(course.step, course.steps, row, course.elapsed, course.best)
            if course.step % h.log_interval == 0 or course.step == 1 or "skipped" in row:
                self.record({"step": course.step, "seconds": course.elapsed, **row})
            if (
                course.step % h.val_interval == 0
                or course.step == course.steps
                or self.out_of_time()
            ):
                self.validate()
            elif h.checkpoint_interval and course.step % h.checkpoint_interval == 0:
                self.team.first(self.save)
        self.progress.close()
        return self.team.first(partial(self.finish, stopped))

    def out_of_time(self) -> bool:
        """Whether the time budget is used up; the first process's clock counts."""
        h = self.hparams
        return h.max_seconds is not None and self.team.first(
            partial(operator.gt, self.course.elapsed, h.max_seconds)
        )

    def over(self) -> str | None:
        """Why training ends after the steps made so far; None if it does not."""
        h, course = self.hparams, self.course
        if course.step and self.out_of_time():
            return f"time budget of {h.max_seconds:g} s used up at step {course.step}"
        if course.step - course.best_step >= h.early_stop_patience:
            return f"no better {h.early_stop_key} for {h.early_stop_patience} steps"
        return "all steps done" if course.step >= course.steps else None

    def save(self) -> None:
        """Write the checkpoint."""
        state = self.optimiser.state_dict()["state"]
        tensors = {f"mend/{name}": value for name, value in self.mend.state_dict().items()}
        tensors |= {
            f"optimiser/{i}/{name}": value
            for i, own in state.items()
            for name, value in own.items()
        }
        tensors |= {
            "generator": self.sampler.generator.get_state(),
            "order": torch.tensor(self.sampler.order).long(),
        }
        self.course.seconds = time.perf_counter() - self.started
        self.checkpoint.write(self.base, self.course, tensors)

    def go_on(self) -> None:
        """Take up optimiser, draws, history and archive as they were when the checkpoint was written."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in self.saved.items():
            if name.startswith("optimiser/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        self.sampler.generator.set_state(self.saved["generator"])
        self.sampler.order = self.saved["order"].tolist()
        self.saved = {}
        self.team.first(self._go_on)

    def _go_on(self) -> None:
        course = self.course
        logger.warning(
            "going on with the run in %s from step %d of %d",
            self.run_dir,
            course.step,
            course.steps,
        )
        for row in course.history:
            self.log(row)
        lines = "".join(json.dumps(row) + "\n" for row in course.history)
        write_text(self.run_dir / HISTORY, lines)
        if (
            course.best and course.best_step == course.step
        ):  # the process may have ended between checkpoint and archive
            self.save_archive()
        elif course.best and inspect_archive(self.archive)["training"]["best"] != without_seconds(
            course.best
        ):
            raise MendkitError(
                f"{self.archive}: not the archive that this run kept at step {course.best_step}; put that back, or "
                f"delete {self.checkpoint.path} to start anew"
            )

    def finish(self, stopped: str) -> TrainingResult:
        """Mark the run as ended."""
        course = self.course
        if not course.best:
            raise MendkitError(
                f"no validation gave finite numbers, so no archive was kept ({stopped}); lower `edit_lr` or `lr`"
            )
        course.stopped, course.seconds, course.cache = (
            stopped,
            time.perf_counter() - self.started,
            self.cache,
        )
        self.checkpoint.write(self.base, course, {})
        if course.skipped:
            logger.warning(
                "%d of %d steps were skipped: their loss or gradient was not finite",
                course.skipped,
                course.step,
            )
        return _result(course, self.run_dir)

    def step(self, step, optimiser, sampler, batches, max_iters: int) -> dict[str, float]:
        """One optimiser step over `accumulate_bs` micro-batches; returns the mean losses and the gradient norm."""
        h, sums = self.hparams, {}
        for _ in range(h.accumulate_bs):
            drawn, at_once = next(batches)
            every = sampler.texts(drawn)
            own = self.team.share(every)
            losses = self._losses(own, at_once, sampler.earlier())
            whole, here = (
                Counter(role for rows in some for role, _ in rows) for some in (every, own)
            )
            losses = {
                role: loss * (here[role] / whole[role]) for role, loss in losses.items()
            }  # sums to the mean
            total = total_loss(losses, h) / h.accumulate_bs
            total.backward()
            values = {"loss": total * h.accumulate_bs, **losses}
            for name in ("loss", *(role for role in (*ROLES, RIVALS) if whole[role])):
                value = float(values[name].detach()) if name in values else 0.0
                sums[name] = sums.get(name, 0.0) + value / h.accumulate_bs
        self.team.sum_gradients(self.mend.parameters())
        sums = dict(
            zip(
                sums,
                self.team.total(torch.tensor([*sums.values()], dtype=torch.float64)).tolist(),
                strict=True,
            )
        )
        norm = float(torch.nn.utils.clip_grad_norm_(self.mend.parameters(), h.grad_clip))
        if not all(map(math.isfinite, (norm, *sums.values()))):
            optimiser.zero_grad(set_to_none=True)
            return self._skip(step)
        self.course.in_a_row = 0
        if not optimiser.state:
            self._check_sites(step)
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * learning_rate_factor(step - 1, h, max_iters)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return sums | {"grad_norm": norm}

    def _losses(
        self, rows: list[list[tuple[str, Tokens]]], at_once: int, earlier: Sequence[Tokens]
    ) -> dict[str, Tensor]:
        """Losses of a batch. After `earlier` edits its gradients are those of the edited model, but for least squares,
        and each edit has one of the earlier ones to keep."""
        edits = [own[0][1] for own in rows]
        if not earlier:
            return batch_losses(
                self.trunk, self.mend, self.factors.get(edits), rows, at_once=at_once
            )
        memory = Memory() if self.hparams.aggregate == "least_squares" else None
        with torch.no_grad():
            before = self.mend(
                self.factors.get(earlier), len(earlier), at_once=len(earlier), memory=memory
            )
        if memory is not None:
            factors = self.factors.get(edits)
        else:
            with side_branches(self.base, before):
                factors = capture_factors(self.trunk, edits, **self.factors.how)
        rows = [[*own, ("edit", earlier[i % len(earlier)])] for i, own in enumerate(rows)]
        return batch_losses(self.trunk, self.mend, factors, rows, before=before, memory=memory)

    def _skip(self, step: int) -> dict[str, float]:
        """Count a step that was not made; the row that tells of it."""
        course = self.course
        course.skipped, course.in_a_row = course.skipped + 1, course.in_a_row + 1
        if course.in_a_row >= MOST_SKIPPED:
            kept = (
                f"the archive of step {course.best_step} is kept in {self.archive}"
                if course.best
                else "no archive"
            )
            raise MendkitError(
                f"step {step}: loss or gradient were not finite in {MOST_SKIPPED} steps in a row; {kept}; lower "
                "`edit_lr` or `lr`"
            )
        return {"skipped": float(course.skipped)}

    def _check_sites(self, step: int) -> None:
        """Raise MendkitError if the loss does not depend on the step size of a site: its edits change nothing."""
        gradient = self.mend.log_edit_lr.grad
        idle = [
            site.name
            for site, own in zip(self.base.sites, gradient.tolist(), strict=True)
            if own == 0
        ]
        if idle:
            raise MendkitError(
                f"step {step}: the gradient is exactly zero at {', '.join(idle)}: edits there change nothing that the "
                "loss sees; leave it out of `inner_params`, or give texts and weights (`cedit`, `cloc`, …) that see it"
            )

    def validate(self) -> None:
        """Validate, write checkpoint and, if it is the best so far, archive. The first process does it for all."""
        if self.team.first(self._validate):
            self.course.best_step = self.course.step

    def _validate(self) -> bool:
        h, course, step = self.hparams, self.course, self.course.step
        at_once = h.most_edits if h.train_on == "batch" else 1
        values = validate(self.trunk, self.mend, self.val_texts, h, at_once=at_once)
        row = {
            "step": step,
            "seconds": time.perf_counter() - self.started,
            **{f"val.{k}": v for k, v in values.items()},
        }
        self.record(row)
        key = f"val.{h.early_stop_key}"
        sign = -1 if h.early_stop_key == "loss" else 1
        better = all(map(math.isfinite, row.values()))
        better = better and (not course.best or sign * row[key] > sign * course.best[key])
        if better and (step > 0 or course.steps == 0):
            course.best, course.best_step = row, step
        self.save()
        if course.best is row:
            self.save_archive()
        return better

    def save_archive(self) -> None:
        """Write the archive."""
        save_archive(self.archive, self.base, self.mend, training=self.summary())

    def summary(self) -> dict[str, Any]:
        """What an archive tells about its training: the same after the same training, so no times."""
        texts = json.dumps(
            [text.key for own in (*self.train_texts, *self.stats_texts) for text in own.all()]
        )
        return {
            "best": without_seconds(self.course.best),
            "continued_from": self.hparams.archive,
            "examples": len(self.train_texts),
            "normaliser_examples": self.course.normaliser_examples,
            "texts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            **{key: value for key, value in provenance().items() if key != "started"},
        }

    def record(self, row: dict[str, float]) -> None:
        """Keep a history row, in memory and (the first process) in the run folder, and log it."""
        self.course.history.append(row)
        self.log(row)
        if self.team.rank:
            return
        try:
            append_line(self.run_dir / HISTORY, json.dumps(row))
        except OSError as error:
            raise MendkitError(
                f"cannot write to {self.run_dir}: {error}; make room there, then go on"
            ) from None


def without_seconds(row: Mapping[str, float], /) -> dict[str, float]:
    """A row of the history without its time."""
    return {name: value for name, value in row.items() if name != "seconds"}


def finished(
    hparams: MENDHyperParams,
    train_examples: Sequence[EditExample],
    val_examples: Sequence[EditExample],
    /,
    *,
    run_dir: str | Path,
) -> TrainingResult | None:
    """What `train` returned for this run, if `run_dir` holds it and it has ended. Raises MendkitError if it holds
    another one."""
    course = Checkpoint(Path(run_dir), hparams, train_examples, val_examples).read()
    return None if course is None or course.stopped is None else _result(course, Path(run_dir))


def _result(course: Course, run_dir: Path) -> TrainingResult:
    return TrainingResult(
        archive=run_dir / ARCHIVE,
        history=tuple(course.history),
        best=course.best,
        seconds=course.seconds,
        stopped=str(course.stopped),
        normaliser_examples=course.normaliser_examples,
        cache=course.cache,
        skipped=course.skipped,
    )


def train(
    hparams: MENDHyperParams,
    train_examples: Sequence[EditExample],
    val_examples: Sequence[EditExample],
    /,
    *,
    base: BaseModel | None = None,
    run_dir: str | Path,
    done_with_base: bool = False,
) -> TrainingResult:
    """Train a hypernetwork on `train_examples` and write the archive that is best on `val_examples`.

    `hparams.archive` null starts anew, a path goes on from it (its sites and the hypernetwork's shape are kept). Writes
    `archive.safetensors` and `history.jsonl` into `run_dir`, and at every validation (`checkpoint_interval`) a
    checkpoint. Where `run_dir` holds that of this very run, which was stopped, training goes on from it: the archive
    will be the same, bit for bit. A run that has ended starts anew. `done_with_base`: `base` serves this training
    alone, so `release_trunk: auto` may free what lies below the edits.

    Raises MendkitError if there is nothing to train or validate on, if `logger` is not installed, if `run_dir` holds
    the checkpoint of another run that was stopped, is in use by another process or cannot be written to, or for reasons
    of `Trainer.run`.
    """
    check_logger(hparams.logger)
    if not train_examples or not val_examples:
        raise MendkitError("training needs at least one training and one validation example")
    team = Team(hparams.device)
    run = team.first(partial(make_folder, run_dir))
    with team.alone_in(run):
        course = team.first(Checkpoint(run, hparams, train_examples, val_examples).unfinished)
        team.first(partial(_open, run, hparams, anew=course is None))
        own = {"done_with_base": done_with_base or base is None, "course": course}
        base = base or load_for_training(hparams)
        with open_logger(hparams, run, first=team.rank == 0) as log:
            trainer = Trainer(
                base, hparams, train_examples, val_examples, run, log=log, team=team, **own
            )
            try:
                return trainer.run()
            except KeyboardInterrupt:
                if team.rank == 0:
                    _say_how_to_go_on(trainer)
                raise


def _open(run: Path, hparams: MENDHyperParams, *, anew: bool) -> None:
    open_run(run, hparams)
    for name in (HISTORY, CHECKPOINT_FILE) if anew else ():
        (run / name).unlink(missing_ok=True)


def _say_how_to_go_on(trainer: Trainer) -> None:
    course = trainer.checkpoint.unfinished()
    logger.warning(
        "interrupted after step %d of %d; %s",
        trainer.course.step,
        trainer.course.steps,
        "nothing is lost but the preparation: no step was kept"
        if course is None
        else f"{trainer.checkpoint.path} holds step {course.step}: the same call goes on from there, and so does "
        "`python -m mendkit train … --resume`",
    )
