"""Training a hypernetwork (MEND, Algorithm 1) on cached factors, with batches of independent edits.

One step draws B examples and maps their cached factors to B low-rank updates. One suffix pass reads
each edit's prompt, paraphrases, neighbours and unrelated prompts under its own update, and the
optimiser descends the loss of objective.py. One optimiser has two parameter groups: the transforms
with `lr`, the log step sizes with `lr_lr` (CORRECTNESS row 2).
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.examples import HEADLINE_ROLES, EditExample
from ..errors import HyperParamError, MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.load import load_for_training, release_trunk
from ..models.trunk import FrozenTrunk, trunk_cache
from ..runs import Progress, append_line, open_run, provenance, return_memory, sha256, write_text
from .archive import inspect_archive, save_archive
from .batches import RIVALS, ExampleTexts, prepare_texts, training_texts
from .checkpoint import FILE as CHECKPOINT_FILE
from .checkpoint import Checkpoint, Course
from .distributed import Team
from .factors import FactorCache, capture_factors
from .files import make_folder
from .hypernetwork import MEND
from .least_squares import Memory
from .loggers import Log, check_logger, open_logger
from .objective import batch_losses, total_loss
from .preparation import continued, statistics_examples, statistics_texts, with_statistics
from .sampler import Batch, Rows, Sampler
from .updates import side_branches
from .validation import validate

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

ARCHIVE, HISTORY = "archive.safetensors", "history.jsonl"
"""Files of a run folder, beside its checkpoint (checkpoint.py)."""

MOST_SKIPPED = 10
"""Steps in a row without a finite loss and gradient at which training stops.

Batches are drawn at random. Were a text in every second batch at fault, ten in a row would come
once in a thousand steps; an editor that has gone astray fails on all.
"""


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """Where the best archive lies, what happened on the way, and its scores."""

    archive: Path
    history: tuple[dict[str, float], ...]  # one row per logged step and per validation
    best: dict[str, float]  # the validation row of the archive that was kept
    seconds: float  # wall time over all starts of the run, caches included
    stopped: str  # why training ended
    normaliser_examples: int  # that gave the statistics; 0 if an archive was trained on
    cache: dict[str, float]  # seconds and bytes of the caches
    skipped: int = 0  # steps whose loss or gradient was not finite

    def frame(self) -> "pandas.DataFrame":
        """The history: one row per logged step or validation, columns by name."""
        import pandas

        return pandas.DataFrame(self.history)

    def __repr__(self) -> str:
        score = self.best.get("val.score", math.nan)
        return (
            f"TrainingResult({self.archive}, validation score {score:.3f} at step "
            f"{self.best['step']}, {self.seconds:.0f} s: {self.stopped})"
        )


def learning_rate_factor(step: int, h: MENDHyperParams, steps: int) -> float:
    """Linear warm-up, then constant or a cosine to a tenth; `step` counts from 0."""
    warm = min(1.0, (step + 1) / max(h.warmup_iters, 1))
    if h.schedule == "constant":
        return warm
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))


def make_optimiser(mend: MEND, h: MENDHyperParams) -> torch.optim.Optimizer:
    """One optimiser, two groups: transforms (`lr`) and logarithms, such as step sizes (`lr_lr`)."""
    groups: dict[float | str, list[torch.nn.Parameter]] = {"transforms": [], "logarithms": []}
    for name, parameter in mend.named_parameters():
        groups["logarithms" if name.startswith("log_") else "transforms"].append(parameter)
    parameters = [
        {"params": groups["transforms"], "lr": h.lr, "base": h.lr},
        {"params": groups["logarithms"], "lr": h.lr_lr, "base": h.lr_lr},
    ]
    # Fused: one pass over parameters, gradients and moments.
    return getattr(torch.optim, h.opt)(parameters, fused=True)


class Trainer:
    """One training run; `run()` is the loop. `log` is told every row of the history.

    With `course`, which the run's checkpoint tells, the run goes on from there.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        train: Sequence[EditExample],
        validation: Sequence[EditExample],
        *,
        run_dir: Path,
        done_with_base: bool = False,
        log: Log = lambda row: None,
        checkpoint: Checkpoint | None = None,
        course: Course | None = None,
        team: Team | None = None,
    ) -> None:
        self.started = time.perf_counter() - (course.seconds if course else 0)
        self.run_dir, self.archive, self.log = run_dir, run_dir / ARCHIVE, log
        self.team = team or Team(hparams.device)
        self.checkpoint = checkpoint or Checkpoint(run_dir, hparams, train, validation)
        self.progress = Progress("MEND", silent=self.team.rank > 0)
        self.base, self.hparams, self.loaded = continued(base, hparams)
        h = self.hparams
        texts = training_texts(self.base, h, train)
        held_out = min(h.stats_examples, len(texts) // 2) if h.stats_held_out else 0
        self.train_texts = texts[: len(texts) - held_out]
        self.stats_texts = texts[len(texts) - held_out :]
        self.val_texts = prepare_texts(self.base, h, validation[: h.val_steps])
        self._check_team()
        disk = trunk_cache(self.base, h.cache_dir, limit=h.disk_cache_bytes)
        self.trunk = FrozenTrunk(self.base, cache=disk)
        self.factors = FactorCache(self.trunk, h)
        per_epoch = math.ceil(len(self.train_texts) / (h.batch_size * h.accumulate_bs))
        steps = h.max_iters if h.max_epochs is None else h.max_epochs * per_epoch
        self.course = course or Course(steps)
        self.saved = {} if course is None else self.checkpoint.tensors(self.base)
        self.release = h.release_trunk is True
        if h.release_trunk == "auto":
            self.release = done_with_base and self.trunk.split and not self.base.is_spread

    def _check_team(self) -> None:
        """Raise HyperParamError if several processes cannot share the batches."""
        h, count = self.hparams, len(self.train_texts)
        if h.train_on != "single" and self.team.size > 1:
            raise HyperParamError(
                f"train_on: {h.train_on} works in one process only; set `train_on: single`"
            )
        if min(h.batch_size, count) < self.team.size:
            raise HyperParamError(
                f"batch_size: {h.batch_size} of {count} training examples cannot be shared by "
                f"{self.team.size} processes; raise `batch_size`, give more examples, or start "
                "fewer processes"
            )

    # ------------------------------------------------------------------ before the first step

    def prepare(self) -> None:
        """Fill the caches and build (or load) the hypernetwork with its statistics."""
        h, start = self.hparams, time.perf_counter()
        chosen: list[ExampleTexts] = []
        if self.loaded is None or self.loaded.hparams.aggregate != h.aggregate:
            chosen = statistics_examples(self.stats_texts or self.train_texts, h)
            self.course.normaliser_examples = len(chosen)
        self.fill_trunk(self.team.share(chosen))
        filled = time.perf_counter()
        edits = [texts.edit for texts in self.train_texts]
        self.factors.fill(edits, self.progress.phase("factors"))
        return_memory()
        captured = time.perf_counter()
        self.mend = self._hypernetwork(chosen)
        self.optimiser = make_optimiser(self.mend, h)
        self.sampler = Sampler(self.train_texts, h)
        self.cache = {
            "trunk_seconds": filled - start,
            "factor_seconds": captured - filled,
            "factor_bytes": self.factors.bytes,
            "factor_examples": len(self.factors.kept),
            "statistics_seconds": time.perf_counter() - captured,
        }

    def fill_trunk(self, chosen: Sequence[ExampleTexts]) -> None:
        """Compute the trunk states of all texts; then the trunk may be released."""
        texts = {"training texts": [t for e in self.train_texts for t in e.all()]}
        texts["validation texts"] = [t for e in self.val_texts for t in e.all()]
        texts["texts for statistics"] = []
        for example in chosen:
            alike, others = statistics_texts(example, self.hparams)
            texts["texts for statistics"] += [*alike, *others]
        if self.base.released:  # the weights are read once for all of them
            texts = {"all texts": [text for part in texts.values() for text in part]}
        for name, part in texts.items():
            self.trunk.fill(part, self.progress.phase(f"trunk: {name}"))
        if self.release:
            release_trunk(self.base)
        return_memory()

    def _hypernetwork(self, chosen: Sequence[ExampleTexts]) -> MEND:
        """The checkpoint's, the archive's, or one with the statistics of the `chosen` examples."""
        settings = self.hparams.replace(archive=None)
        if self.saved:
            mend = MEND(self.base.sites, settings).to(self.base.device)
            mend.load_state_dict(_below("mend/", self.saved))
        elif chosen:
            mend = with_statistics(
                self.trunk,
                settings,
                chosen,
                loaded=self.loaded,
                team=self.team,
                progress=self.progress,
            )
        else:
            mend = self.loaded
            self.team.align(mend)
        mend.hparams = settings
        return mend

    # ------------------------------------------------------------------------------- the loop

    def run(self) -> TrainingResult:
        """Train until the steps, the time or the patience are used up; the best archive is kept.

        Raises MendkitError if an edit site has no effect, or if too many steps in a row or all
        validations were not finite.
        """
        h, course = self.hparams, self.course
        self.prepare()
        start = time.perf_counter() - course.elapsed
        if self.saved:
            self.go_on()
        else:
            self.validate()
        while (stopped := self.over()) is None:
            course.step += 1
            row = self.step()
            course.elapsed = time.perf_counter() - start
            self.progress.step(course.step, course.steps, row, course.elapsed, course.best)
            if course.step % h.log_interval == 0 or course.step == 1 or "skipped" in row:
                self.record({"step": course.step, "seconds": course.elapsed, **row})
            last = course.step == course.steps or self.out_of_time()
            if last or course.step % h.val_interval == 0:
                self.validate()
            elif h.checkpoint_interval and course.step % h.checkpoint_interval == 0:
                self.team.first(self.save)
        self.progress.close()
        return self.team.first(lambda: self.finish(stopped))

    def out_of_time(self) -> bool:
        """Whether the time budget is used up; the first process's clock counts."""
        most = self.hparams.max_seconds
        return most is not None and self.team.first(lambda: self.course.elapsed > most)

    def over(self) -> str | None:
        """Why training ends after the steps made so far; None if it does not."""
        h, course = self.hparams, self.course
        if course.step and self.out_of_time():
            return f"time budget of {h.max_seconds:g} s used up at step {course.step}"
        if course.step - course.best_step >= h.early_stop_patience:
            return f"no better {h.early_stop_key} for {h.early_stop_patience} steps"
        return "all steps done" if course.step >= course.steps else None

    def step(self) -> dict[str, float]:
        """One optimiser step (Algorithm 1); returns the mean losses and the gradient norm."""
        h, sums = self.hparams, {}
        for _ in range(h.accumulate_bs):
            # 1. Draw edits, and of each the texts that judge it.
            batch = self.sampler.draw()
            # 2. Make the edits, read the texts under them, and add up the loss's gradient.
            for name, value in self._backward(batch).items():
                sums[name] = sums.get(name, 0.0) + value / h.accumulate_bs
        # 3. Add up what the processes have of gradients and losses.
        parameters = list(self.mend.parameters())
        self.team.sum_gradients(parameters)
        values = self.team.total(torch.tensor([*sums.values()], dtype=torch.float64)).tolist()
        row = dict(zip(sums, values, strict=True))
        # 4. Skip the step if a number is not finite; else clip the gradient and descend.
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, h.grad_clip))
        if all(map(math.isfinite, row.values())):
            self._descend()
        else:
            row = self._skip()
        self.optimiser.zero_grad(set_to_none=True)
        return row

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Add the gradient of a batch's loss; returns this process's part of the mean losses."""
        rows = self.team.share(batch.rows)
        whole, here = _texts_by_role(batch.rows), _texts_by_role(rows)
        losses = {}
        for role, loss in self._losses(rows, batch.at_once, batch.earlier).items():
            losses[role] = loss * (here[role] / whole[role])  # sums to the mean over all texts
        total = total_loss(losses, self.hparams)
        (total / self.hparams.accumulate_bs).backward()
        values = {"loss": float(total.detach())}
        for role in (*HEADLINE_ROLES, RIVALS):
            if whole[role]:
                values[role] = float(losses[role].detach()) if role in losses else 0.0
        return values

    def _losses(self, rows: Rows, at_once: int, earlier: Sequence) -> dict[str, Tensor]:
        """Losses of a batch, after `earlier` edits, of which each edit has one to keep."""
        edits = [drawn[0][1] for drawn in rows]
        if not earlier:
            factors = self.factors.get(edits)
            return batch_losses(self.trunk, self.mend, factors, rows, at_once=at_once)
        memory = Memory() if self.hparams.aggregate == "least_squares" else None
        with torch.no_grad():
            known = self.factors.get(earlier)
            before = self.mend(known, len(earlier), at_once=len(earlier), memory=memory)
        if memory is not None:  # least squares takes the gradients of the unedited model
            factors = self.factors.get(edits)
        else:
            with side_branches(self.base, before):
                factors = capture_factors(self.trunk, edits, **self.factors.how)
        kept = []
        for number, drawn in enumerate(rows):
            kept.append([*drawn, ("edit", earlier[number % len(earlier)])])
        return batch_losses(self.trunk, self.mend, factors, kept, before=before, memory=memory)

    def _descend(self) -> None:
        self.course.in_a_row = 0
        if not self.optimiser.state:
            self._check_sites()
        factor = learning_rate_factor(self.course.step - 1, self.hparams, self.course.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * factor
        self.optimiser.step()

    def _skip(self) -> dict[str, float]:
        """Count a step that was not made; returns the row that tells of it."""
        course = self.course
        course.skipped, course.in_a_row = course.skipped + 1, course.in_a_row + 1
        if course.in_a_row >= MOST_SKIPPED:
            kept = "no archive"
            if course.best:
                kept = f"the archive of step {course.best_step} is kept in {self.archive}"
            raise MendkitError(
                f"step {course.step}: loss or gradient were not finite in {MOST_SKIPPED} steps in "
                f"a row; {kept}; lower `edit_lr` or `lr`"
            )
        return {"skipped": float(course.skipped)}

    def _check_sites(self) -> None:
        """Raise MendkitError if the loss does not depend on the step size of a site."""
        gradients = self.mend.log_edit_lr.grad.tolist()
        by_site = zip(self.base.sites, gradients, strict=True)
        idle = [site.name for site, gradient in by_site if gradient == 0]
        if idle:
            raise MendkitError(
                f"step {self.course.step}: the gradient is exactly zero at {', '.join(idle)}: edits"
                " there change nothing that the loss sees; leave it out of `inner_params`, or give "
                "texts and weights (`cedit`, `cloc`, …) that see it"
            )

    # ----------------------------------------------------------- validation, history, archive

    def validate(self) -> None:
        """Validate, write checkpoint and, if it is the best so far, archive.

        The first process does it for all.
        """
        if self.team.first(self._validate):
            self.course.best_step = self.course.step

    def _validate(self) -> bool:
        h, course = self.hparams, self.course
        at_once = h.most_edits if h.train_on == "batch" else 1
        scores = validate(self.trunk, self.mend, self.val_texts, h, at_once=at_once)
        row = {"step": course.step, "seconds": time.perf_counter() - self.started}
        row |= {f"val.{name}": value for name, value in scores.items()}
        self.record(row)
        better = all(map(math.isfinite, row.values())) and self._beats_best(row)
        # An untrained hypernetwork is kept only if nothing is to be trained.
        if better and (course.step > 0 or course.steps == 0):
            course.best, course.best_step = row, course.step
        self.save()
        if course.best is row:
            self.save_archive()
        return better

    def _beats_best(self, row: Mapping[str, float]) -> bool:
        if not self.course.best:
            return True
        key = f"val.{self.hparams.early_stop_key}"
        if key == "val.loss":
            return row[key] < self.course.best[key]
        return row[key] > self.course.best[key]

    def record(self, row: dict[str, float]) -> None:
        """Keep a row of the history, log it, and (the first process) write it to the folder."""
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

    def save_archive(self) -> None:
        """Write the archive."""
        save_archive(self.archive, self.base, self.mend, training=self.summary())

    def summary(self) -> dict[str, Any]:
        """What an archive tells of its training: the same for the same training, so no times."""
        keys = [t.key for e in (*self.train_texts, *self.stats_texts) for t in e.all()]
        told = {key: value for key, value in provenance().items() if key != "started"}
        return {
            "best": _without_seconds(self.course.best),
            "continued_from": self.hparams.archive,
            "examples": len(self.train_texts),
            "normaliser_examples": self.course.normaliser_examples,
            "texts_sha256": sha256(json.dumps(keys)),
            **told,
        }

    # -------------------------------------------------------------------------------- resume

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"mend/{name}": value for name, value in self.mend.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{name}": value for name, value in state.items()}
        tensors["generator"] = self.sampler.generator.get_state()
        tensors["order"] = torch.tensor(self.sampler.order).long()
        self.course.seconds = time.perf_counter() - self.started
        self.checkpoint.write(self.base, self.course, tensors)

    def go_on(self) -> None:
        """Take up optimiser, draws, history and archive as they were at the checkpoint."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimiser/", self.saved).items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        self.sampler.generator.set_state(self.saved["generator"])
        self.sampler.order = self.saved["order"].tolist()
        self.saved = {}
        self.team.first(self._restore_files)

    def _restore_files(self) -> None:
        course, folder = self.course, self.run_dir
        logger.warning(
            "going on with the run in %s from step %d of %d", folder, course.step, course.steps
        )
        for row in course.history:
            self.log(row)
        lines = "".join(json.dumps(row) + "\n" for row in course.history)
        write_text(folder / HISTORY, lines)
        if not course.best:
            return
        if course.best_step == course.step:  # it may have been stopped before the archive
            self.save_archive()
            return
        found = inspect_archive(self.archive)["training"]["best"]
        if found != _without_seconds(course.best):
            raise MendkitError(
                f"{self.archive}: not the archive that this run kept at step {course.best_step}; "
                f"put that back, or delete {self.checkpoint.path} to start anew"
            )

    def finish(self, stopped: str) -> TrainingResult:
        """Mark the run as ended."""
        course = self.course
        if not course.best:
            raise MendkitError(
                f"no validation gave finite numbers, so no archive was kept ({stopped}); "
                "lower `edit_lr` or `lr`"
            )
        course.stopped, course.cache = stopped, self.cache
        course.seconds = time.perf_counter() - self.started
        self.checkpoint.write(self.base, course, {})
        if course.skipped:
            logger.warning(
                "%d of %d steps were skipped: their loss or gradient was not finite",
                course.skipped,
                course.step,
            )
        return _result(course, self.run_dir)


def finished(
    hparams: MENDHyperParams,
    train_examples: Sequence[EditExample],
    val_examples: Sequence[EditExample],
    *,
    run_dir: str | Path,
) -> TrainingResult | None:
    """What `train` returned for this run, if `run_dir` holds it and it has ended.

    Raises MendkitError if it holds another one.
    """
    course = Checkpoint(Path(run_dir), hparams, train_examples, val_examples).read()
    return None if course is None or course.stopped is None else _result(course, Path(run_dir))


def train(
    hparams: MENDHyperParams,
    train_examples: Sequence[EditExample],
    val_examples: Sequence[EditExample],
    *,
    base: BaseModel | None = None,
    run_dir: str | Path,
    done_with_base: bool = False,
) -> TrainingResult:
    """Train a hypernetwork on `train_examples`; the archive kept is the best on `val_examples`.

    `hparams.archive` null starts anew; a path goes on from it (its sites and shape are kept).
    Writes `archive.safetensors` and `history.jsonl` into `run_dir`, and a checkpoint at every
    validation (`checkpoint_interval`). If `run_dir` holds this very run, stopped before its end,
    training goes on from there: the archive will be the same, bit for bit. A run that has ended
    starts anew. `done_with_base`: `base` serves this training alone, so `release_trunk: auto` may
    free what lies below the edits.

    Raises MendkitError if there is nothing to train or validate on, if `logger` is not installed,
    if `run_dir` holds another run that was stopped, is in use or cannot be written to, or for
    reasons of `Trainer.run`.
    """
    check_logger(hparams.logger)
    if not train_examples or not val_examples:
        raise MendkitError("training needs at least one training and one validation example")
    team = Team(hparams.device)
    run = team.first(lambda: make_folder(run_dir))
    with team.alone_in(run):
        checkpoint = Checkpoint(run, hparams, train_examples, val_examples)
        course = team.first(checkpoint.unfinished)
        team.first(lambda: _open_folder(run, hparams, anew=course is None))
        with open_logger(hparams, run, first=team.rank == 0) as log:
            trainer = Trainer(
                base or load_for_training(hparams),
                hparams,
                train_examples,
                val_examples,
                run_dir=run,
                done_with_base=done_with_base or base is None,
                log=log,
                checkpoint=checkpoint,
                course=course,
                team=team,
            )
            try:
                return trainer.run()
            except KeyboardInterrupt:
                if team.rank == 0:
                    _say_how_to_go_on(trainer)
                raise


def _open_folder(run: Path, hparams: MENDHyperParams, *, anew: bool) -> None:
    open_run(run, hparams)
    if anew:
        for name in (HISTORY, CHECKPOINT_FILE):
            (run / name).unlink(missing_ok=True)


def _say_how_to_go_on(trainer: Trainer) -> None:
    course = trainer.checkpoint.unfinished()
    advice = "nothing is lost but the preparation: no step was kept"
    if course is not None:
        advice = (
            f"{trainer.checkpoint.path} holds step {course.step}: the same call goes on from "
            "there, and so does `python -m mendkit train … --resume`"
        )
    made = trainer.course
    logger.warning("interrupted after step %d of %d; %s", made.step, made.steps, advice)


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


def _without_seconds(row: Mapping[str, float]) -> dict[str, float]:
    """A row of the history without its time."""
    return {name: value for name, value in row.items() if name != "seconds"}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _texts_by_role(rows: Rows) -> Counter[str]:
    return Counter(role for drawn in rows for role, _ in drawn)
