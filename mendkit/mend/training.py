"""Training a hypernetwork (MEND, Algorithm 1): the loop, and what it leaves in the run folder."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.examples import EditExample
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.load import load_for_training
from ..runs import append_line, make_folder, open_run, provenance, sha256, user_path, write_text
from .archive import inspect_archive, save_archive
from .batches import Sampler
from .checkpoint import FILE as CHECKPOINT_FILE
from .checkpoint import Checkpoint, Course
from .distributed import Team
from .loggers import Log, check_logger, open_logger
from .preparation import Preparation
from .steps import Learner
from .validation import validate

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

# Files of a run folder, beside its checkpoint (checkpoint.py).
ARCHIVE, HISTORY = "archive.safetensors", "history.jsonl"

# Steps in a row without a finite loss and gradient at which training stops. Were a text in every
# second random batch at fault, ten in a row would come once in a thousand steps.
MOST_SKIPPED = 10


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """Where the best archive lies, and how training went."""

    archive: Path
    history: tuple[dict[str, float], ...]  # one row per logged step and per validation
    best: dict[str, float]  # the validation row of the archive
    seconds: float  # wall time over all starts of the run
    stopped: str  # why training ended
    normaliser_examples: int  # 0 if an archive was trained on
    cache: dict[str, float]  # seconds and bytes of the caches
    skipped: int = 0  # steps whose loss or gradient was not finite

    def frame(self) -> "pandas.DataFrame":
        """The history: one row per logged step or validation, columns by name."""
        import pandas

        return pandas.DataFrame(self.history)

    def __repr__(self) -> str:
        score, step = self.best.get("val.score", math.nan), self.best["step"]
        return f"TrainingResult({self.archive}, score {score:.3f} at step {step}: {self.stopped})"


class Trainer:
    """One training run. `log` is told every row of the history.

    With `course`, which the run's checkpoint tells, the run goes on from there.
    """

    def __init__(
        self,
        prepared: Preparation,
        checkpoint: Checkpoint,
        *,
        course: Course | None = None,
        log: Log = lambda row: None,
    ) -> None:
        self.started = time.perf_counter() - (course.seconds if course else 0)
        self.prepared, self.hparams, self.team = prepared, prepared.hparams, prepared.team
        self.checkpoint, self.run_dir, self.log = checkpoint, checkpoint.path.parent, log
        self.archive = self.run_dir / ARCHIVE
        steps, h = self.hparams.max_iters, self.hparams
        if h.max_epochs is not None:
            steps = h.max_epochs * math.ceil(len(prepared.train) / (h.batch_size * h.accumulate_bs))
        self.goes_on, self.course = course is not None, course or Course(steps)

    def start(self) -> None:
        """Build the hypernetwork and, if the run goes on, take up where it stopped."""
        prepared, course = self.prepared, self.course
        saved = self.checkpoint.tensors(prepared.base) if self.goes_on else {}
        names = [name for name in saved if name.startswith("mend/")]
        state = {name.removeprefix("mend/"): saved[name] for name in names}
        self.mend, self.cache = prepared.make(state)
        if prepared.statistics:
            course.normaliser_examples = len(prepared.statistics)
        sampler = Sampler(prepared.train, self.hparams)
        self.learner = Learner(self.mend, prepared.factors, sampler, h=self.hparams, team=self.team)
        if saved:
            self.learner.restore(saved)
            self.team.first(self._restore_files)

    def run(self) -> TrainingResult:
        """Train until the steps, the time or the patience are used up; the best archive is kept.

        Raises MendkitError if an edit site has no effect, or if too many steps in a row or all
        validations were not finite.
        """
        h, course = self.hparams, self.course
        self.start()
        report = self.prepared.progress.phase("step", before=course.step)
        start = time.perf_counter() - course.elapsed
        if not self.goes_on:
            self.validate()
        while (stopped := self.over()) is None:
            course.step += 1
            row = self.step()
            course.elapsed = time.perf_counter() - start
            report(course.step, course.steps, f"loss {row.get('loss', math.nan):.3f}")
            if course.step % h.log_interval == 0 or course.step == 1 or "skipped" in row:
                self.record({"step": course.step, "seconds": course.elapsed, **row})
            last = course.step == course.steps or self.out_of_time()
            if last or course.step % h.val_interval == 0:
                self.validate()
            elif h.checkpoint_interval and course.step % h.checkpoint_interval == 0:
                self.team.first(self.save)
        self.prepared.progress.close()
        return self.team.first(lambda: self.finish(stopped))

    def step(self) -> dict[str, float]:
        """Make the step that is due; its mean losses, or how many steps were skipped."""
        course = self.course
        row = self.learner.step(course.step, course.steps)
        if row is not None:
            course.in_a_row = 0
            return row
        course.skipped, course.in_a_row = course.skipped + 1, course.in_a_row + 1
        if course.in_a_row < MOST_SKIPPED:
            return {"skipped": float(course.skipped)}
        kept = "no archive"
        if course.best:
            kept = f"the archive of step {course.best_step} is kept in {self.archive}"
        raise MendkitError(
            f"step {course.step}: loss or gradient were not finite in {MOST_SKIPPED} steps in a "
            f"row; {kept}; lower `edit_lr` or `lr`"
        )

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

    def validate(self) -> None:
        """Validate, and write checkpoint and best archive, in the first process."""
        if self.team.first(self._validate):
            self.course.best_step = self.course.step

    def _validate(self) -> bool:
        h, course, prepared = self.hparams, self.course, self.prepared
        at_once = h.most_edits if h.train_on == "batch" else 1
        scores = validate(prepared.trunk, self.mend, prepared.validation, h, at_once=at_once)
        row = {"step": course.step, "seconds": time.perf_counter() - self.started}
        row |= {f"val.{name}": value for name, value in scores.items()}
        self.record(row)
        key, sign = f"val.{h.early_stop_key}", -1 if h.early_stop_key == "loss" else 1
        better = all(map(math.isfinite, row.values()))
        better = better and (not course.best or sign * row[key] > sign * course.best[key])
        # An untrained hypernetwork is kept only if nothing is to be trained.
        if better and (course.step > 0 or course.steps == 0):
            course.best, course.best_step = row, course.step
        self.save()
        if course.best is row:
            self.save_archive()
        return better

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

    def save(self) -> None:
        """Write the checkpoint."""
        self.course.seconds = time.perf_counter() - self.started
        self.checkpoint.write(self.prepared.base, self.course, self.learner.tensors())

    def save_archive(self) -> None:
        """Write the archive, with what tells of its training: the same for the same training."""
        prepared = self.prepared
        keys = [t.key for e in (*prepared.train, *prepared.held_out) for t in e.all()]
        told = {key: value for key, value in provenance().items() if key != "started"}
        told |= {
            "best": _without_seconds(self.course.best),
            "continued_from": self.hparams.archive,
            "examples": len(prepared.train),
            "normaliser_examples": self.course.normaliser_examples,
            "texts_sha256": sha256(json.dumps(keys)),
        }
        save_archive(self.archive, prepared.base, self.mend, training=told)

    def _restore_files(self) -> None:
        """History and archive as they were at the checkpoint."""
        course, folder = self.course, self.run_dir
        made, steps = course.step, course.steps
        logger.warning("going on with the run in %s from step %d of %d", folder, made, steps)
        for row in course.history:
            self.log(row)
        write_text(folder / HISTORY, "".join(json.dumps(row) + "\n" for row in course.history))
        if course.best and course.best_step == course.step:
            self.save_archive()  # the run may have been stopped before it
        elif course.best:
            found = inspect_archive(self.archive)["training"]["best"]
            if found != _without_seconds(course.best):
                raise MendkitError(
                    f"{self.archive}: not the archive that this run kept at step "
                    f"{course.best_step}; put that back, or delete {self.checkpoint.path}"
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
        self.checkpoint.write(self.prepared.base, course, {})
        if course.skipped:
            count, made = course.skipped, course.step
            logger.warning("%d of %d steps were not finite and skipped", count, made)
        return _result(course, self.run_dir)


def finished(
    hparams: MENDHyperParams,
    train_examples: Sequence[EditExample],
    val_examples: Sequence[EditExample],
    *,
    run_dir: str | Path,
) -> TrainingResult | None:
    """What `train` returned for this run if it has ended; raises MendkitError for another run."""
    course = Checkpoint(user_path(run_dir), hparams, train_examples, val_examples).read()
    return None if course is None or course.stopped is None else _result(course, user_path(run_dir))


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

    `hparams.archive` null starts anew; a path goes on from it. Writes `archive.safetensors` and
    `history.jsonl` into `run_dir`, and a checkpoint at every validation (`checkpoint_interval`). If
    `run_dir` holds this very run, stopped before its end, training goes on: the archive will be the
    same, bit for bit. `done_with_base`: `base` serves this training alone, so `release_trunk: auto`
    may free what lies below the edits.

    Raises MendkitError without examples, if `logger` is not installed, if `run_dir` holds another
    run that was stopped, is in use or cannot be written to, or for reasons of `Trainer.run`.
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
            prepared = Preparation(
                base or load_for_training(hparams),
                hparams,
                train_examples,
                val_examples,
                team=team,
                done_with_base=done_with_base or base is None,
            )
            trainer = Trainer(prepared, checkpoint, course=course, log=log)
            try:
                return trainer.run()
            except KeyboardInterrupt:
                if team.rank == 0:
                    _say_how_to_go_on(trainer)
                raise


def _open_folder(run: Path, hparams: MENDHyperParams, *, anew: bool) -> None:
    open_run(run, hparams)
    for name in (HISTORY, CHECKPOINT_FILE) if anew else ():
        (run / name).unlink(missing_ok=True)


def _say_how_to_go_on(trainer: Trainer) -> None:
    saved, made = trainer.checkpoint.unfinished(), trainer.course
    advice = "nothing is lost but the preparation: no step was kept"
    if saved is not None:
        advice = (
            f"{trainer.checkpoint.path} holds step {saved.step}: the same call goes on from there, "
            "and so does `python -m mendkit train … --resume`"
        )
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
