"""Training a hypernetwork (MEND, Algorithm 1): the loop, and what it leaves in the run folder.

`history.jsonl` has a row for each logged step and each validation. `logger` gets the same rows.
"""

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..data.examples import EditExample
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.load import load_for_training
from ..runs import append_line, make_folder, open_run, provenance, sha256, write_text
from .archive import Checkpoint, TrainingResult, inspect_archive, look_at_archive, save_archive
from .batches import Sampler, all_texts
from .distributed import Team
from .preparation import Preparation
from .steps import Learner, batches_of
from .validation import validate

logger = logging.getLogger(__name__)

HISTORY_FILE = "history.jsonl"

# Steps in a row without a finite loss and gradient at which training stops. Were a text in every
# second random batch at fault, ten in a row would come once in a thousand steps.
MOST_SKIPPED = 10

# Is told a row of the history, with its "step".
Log = Callable[[Mapping[str, float]], None]


class Trainer:
    """One training run. `log` is told every row of the history.

    With `course`, which the run's checkpoint tells, the run goes on from there.
    """

    def __init__(
        self,
        prepared: Preparation,
        checkpoint: Checkpoint,
        *,
        course: TrainingResult | None = None,
        log: Log = lambda row: None,
    ) -> None:
        self.started = time.perf_counter() - (course.seconds if course else 0)
        self.prepared, self.hparams, self.team = prepared, prepared.hparams, prepared.team
        self.checkpoint, self.run_dir, self.log = checkpoint, checkpoint.path.parent, log
        steps, h = self.hparams.max_iters, self.hparams
        if h.max_epochs is not None:
            edits = h.batch_size * h.accumulate_bs * batches_of(h)
            steps = h.max_epochs * math.ceil(len(prepared.train) / edits)
        self.goes_on = course is not None
        self.course = course or TrainingResult(checkpoint.archive, steps)

    def run(self) -> TrainingResult:
        """Train until steps, time or patience are used up.

        Raises MendkitError if a site has no effect, or if too many steps in a row or all
        validations were not finite.
        """
        h, course = self.hparams, self.course
        # 1. Caches and hypernetwork, or the checkpoint's.
        self.start()
        report = self.prepared.progress.phase("step", before=course.step)
        start = time.perf_counter() - course.elapsed
        if not self.goes_on:
            self.validate()
        while (stopped := self.over()) is None:
            # 2. A step of Algorithm 1 (steps.py).
            course.step += 1
            row = self.step()
            course.elapsed = time.perf_counter() - start
            report(course.step, course.steps, f"loss {row.get('loss', math.nan):.3f}")
            if course.step % h.log_interval == 0 or course.step == 1 or "skipped" in row:
                self.record({"step": course.step, "seconds": course.elapsed, **row})
            # 3. Validate; the best archive is kept.
            last = course.step == course.steps or self.out_of_time()
            if last or course.step % h.val_interval == 0:
                self.validate()
            elif h.checkpoint_interval and course.step % h.checkpoint_interval == 0:
                self.team.first(self.save)
        self.prepared.progress.close()
        return self.team.first(lambda: self.finish(stopped))

    def start(self) -> None:
        """Build the hypernetwork; a run that goes on takes up where it stopped."""
        prepared, course = self.prepared, self.course
        saved = self.checkpoint.tensors(prepared.base) if self.goes_on else {}
        names = [name for name in saved if name.startswith("mend/")]
        state = {name.removeprefix("mend/"): saved[name] for name in names}
        self.mend, self.cache = prepared.make(state, course.edit_lr)
        course.edit_lr = float(self.mend.hparams.edit_lr)
        course.continued_from = course.continued_from or prepared.loaded_sha256
        if prepared.statistics:
            course.normaliser_examples = len(prepared.statistics)
        sampler = Sampler(prepared.train, self.hparams)
        self.learner = Learner(self.mend, prepared.factors, sampler, h=self.hparams, team=self.team)
        if saved:
            self.learner.restore(saved)
        self.team.first(self._restore_files)

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
        raise MendkitError(
            f"step {course.step}: loss or gradient were not finite in {MOST_SKIPPED} steps in a "
            f"row; lower `edit_lr` or `lr`; the best archive is that of step {course.best_step}"
        )

    def out_of_time(self) -> bool:
        most = self.hparams.max_seconds
        return most is not None and self.team.first(lambda: self.course.elapsed > most)

    def over(self) -> str | None:
        """Why training ends now; None if it does not."""
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
        examples, at_once = prepared.validation, h.trained_at_once
        with self.learner.averaged():
            scores = validate(prepared.trunk, self.mend, examples, h, at_once=at_once)
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
        """Keep a row of the history, log it, and write it to the folder."""
        self.course.history.append(row)
        self.log(row)
        if self.team.rank:
            return
        try:
            append_line(self.run_dir / HISTORY_FILE, json.dumps(row))
        except OSError as error:
            raise MendkitError(
                f"cannot write to {self.run_dir}: {error}; make room, then go on"
            ) from None

    def save(self) -> None:
        self.course.seconds = time.perf_counter() - self.started
        self.checkpoint.write(self.prepared.base, self.course, self.learner.tensors())

    def save_archive(self) -> None:
        """Write the archive with a summary of its training, the same for the same training."""
        prepared = self.prepared
        keys = [text.key for text in all_texts((*prepared.train, *prepared.held_out))]
        told = {key: value for key, value in provenance().items() if key != "started"}
        told |= {
            "best": {key: value for key, value in self.course.best.items() if key != "seconds"},
            "continued_from": self.course.continued_from,
            "examples": len(prepared.train),
            "normaliser_examples": self.course.normaliser_examples,
            "texts_sha256": sha256(json.dumps(keys)),
        }
        with self.learner.averaged():
            save_archive(self.course.archive, prepared.base, self.mend, training=told)

    def _restore_files(self) -> None:
        """History and archive as they were at the checkpoint; a new run has no history."""
        course, folder = self.course, self.run_dir
        made, steps = course.step, course.steps
        if self.goes_on:
            logger.warning("continuing the run in %s from step %d of %d", folder, made, steps)
        for row in course.history:
            self.log(row)
        write_text(folder / HISTORY_FILE, "".join(json.dumps(row) + "\n" for row in course.history))
        if course.best and course.best_step == made:
            self.save_archive()  # the run may have been stopped before it
        elif course.best:
            inspect_archive(course.archive)  # raises if it is missing or damaged

    def finish(self, stopped: str) -> TrainingResult:
        """Mark the run as ended. Raises MendkitError if no archive was kept."""
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
        return course


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

    `hparams.archive` null starts anew; a path goes on from it. Writes into `run_dir`. If that holds
    this very run, stopped before its end, training goes on, to the same archive bit for bit.
    `done_with_base`: `base` serves this training alone, so `release_trunk: auto` may free what lies
    below the edits.

    Raises MendkitError without examples, without the `logger`, if `run_dir` holds another stopped
    run, is in use or cannot be written to, or as `Trainer.run`.
    """
    team = Team(hparams.device)
    _look_at(hparams, train_examples, val_examples, first=team.rank == 0)
    run = team.first(lambda: make_folder(run_dir))
    with team.alone_in(run):
        checkpoint = Checkpoint(run, hparams, train_examples, val_examples)
        course = team.first(checkpoint.unfinished)
        team.first(lambda: open_run(run, hparams))
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
                said = "interrupted after step %d of %d; this call, or --resume, goes on from %s"
                logger.warning(said, trainer.course.step, trainer.course.steps, checkpoint.path)
                raise


def _look_at(
    h: MENDHyperParams, train: Sequence[EditExample], val: Sequence[EditExample], *, first: bool
) -> None:
    check_logger(h.logger)
    if not train or not val:
        raise MendkitError("training needs at least one training and one validation example")
    if h.archive is not None:
        look_at_archive(h, to_train=True)
    trained = {example.subject for example in train if example.subject}
    shared = trained & {example.subject for example in val[: h.val_steps]}
    if shared and first:
        names = ", ".join(sorted(shared)[:5])
        logger.warning("%d subjects are in training and in validation: %s", len(shared), names)


# ---------------------------------------- loggers


def check_logger(name: str | None) -> None:
    """Raise MendkitError if the named logger is not installed."""
    if name is not None and find_spec(name) is None:
        raise MendkitError(
            f"logger: {name} is not installed; run "
            f'`pip install -c constraints.txt -e ".[{name}]"`, or set `logger: null`'
        )


@contextmanager
def open_logger(h: MENDHyperParams, run_dir: Path, *, first: bool = True) -> Iterator[Log]:
    """A function that sends history rows to the logger of `h`, in the `first` process only.

    Raises MendkitError if the logger does not start.
    """
    if h.logger is None or not first:
        yield lambda row: None
        return
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results
            add, close = _start_logger(h, run_dir)
    except Exception as error:  # whatever the logger raises: no key, no network, an old version
        raise MendkitError(
            f"logger: {h.logger} did not start: {error}; set it up, or `logger: null`"
        ) from error

    def log(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                add(name, value, int(row["step"]))

    try:
        yield log
    finally:
        with redirect_stdout(sys.stderr):
            close()


def _start_logger(h: MENDHyperParams, run_dir: Path) -> tuple[Callable, Callable]:
    """What takes a name, a value and a step; and what ends it."""
    if h.logger == "wandb":
        wandb = import_module("wandb")
        run = wandb.init(project="mendkit", name=run_dir.name, dir=str(run_dir), config=h.to_dict())
        return lambda name, value, step: run.log({name: value}, step=step), wandb.finish
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's curves would join this one's
    writer = SummaryWriter(str(folder))
    return writer.add_scalar, writer.close
