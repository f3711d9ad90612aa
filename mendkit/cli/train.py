"""The commands `train` and `plan`."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import mendkit

from ..errors import MendkitError
from . import app as cli
from .app import Data, Json, Limit, Out, Overwrite, SkipInvalid, Words, logger

if TYPE_CHECKING:
    from ..mend.archive import TrainingResult
    from ..models.base import BaseModel


@cli.command("train configs/smollm2-135m.yaml max_iters=500 --out runs/first")
def train(
    words: Words = None,
    *,
    resume: Annotated[bool, Option("--resume", help="go on with the stopped run in --out")] = False,
    ignore_memory: cli.IgnoreMemory = False,
    train_data: Data = "facts:train",
    train_limit: Limit = None,
    validation_data: Data = "facts:validation",
    validation_limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Train a hypernetwork and print the path of its archive.

    `archive: null` starts anew; a path goes on training from that archive. Without --out the run
    is written to <results_dir>/train.
    """
    from ..cost.plan import check_memory
    from ..mend.distributed import Team
    from ..mend.training import check_logger

    hparams = cli.hyperparameters(words)
    check_logger(hparams.logger)
    run = out or Path(hparams.results_dir, "train")
    team = Team(hparams.device)
    logger.setLevel(logging.ERROR if team.rank else logging.INFO)
    with team.alone_in(run):
        place = team.first(lambda: _place(run, resume=resume, overwrite=overwrite))
        read = partial(mendkit.read_examples, skip_invalid=skip_invalid, columns=hparams.columns)
        examples: Sequence[mendkit.EditExample] = read(train_data, limit=train_limit)
        validation: Sequence[mendkit.EditExample] = read(validation_data, limit=validation_limit)
        if not ignore_memory:
            team.first(lambda: check_memory(hparams, examples, validation))
        base = _model_to_train(hparams)
        if skip_invalid:
            examples, validation = _usable(base, hparams, examples, validation)
        ended = partial(_ended, hparams, examples, validation, run=run)
        result = team.first(ended) if resume else None
        if result is None:
            team.first(lambda: place.clear(keep=hparams.archive))
            logger.info("training on %d examples, in %s", len(examples), run)
            result = mendkit.train(
                hparams, examples, validation, base=base, run_dir=run, done_with_base=True
            )
    team.leave()
    if team.rank == 0:
        _tell(result, run, examples=len(examples), as_json=as_json)
    return 0


def _usable(
    base: "BaseModel",
    hparams: mendkit.MENDHyperParams,
    *lists: Sequence[mendkit.EditExample],
) -> list[Sequence[mendkit.EditExample]]:
    """The lists without the examples that are too long, which only the tokenizer can tell."""
    from ..mend.batches import usable

    return [usable(base, hparams, examples) for examples in lists]


def _tell(result: "TrainingResult", run: Path, *, examples: int, as_json: bool) -> None:
    """Write results.json and print it, or the archive's path."""
    results = _results(result) | {"train.examples": examples}
    logger.info("%s", result.stopped)
    cli.RunFolder(run, overwrite=True).write(results)
    cli.show(results, str(result.archive), as_json=as_json)


def _model_to_train(hparams: mendkit.MENDHyperParams) -> "BaseModel":
    """The model to train for. The archive that training starts from is looked at, too."""
    from ..models.load import load_for_training

    base = load_for_training(hparams)
    if hparams.archive is not None:
        mendkit.load_archive(hparams.archive, base=base)
    return base


def _ended(
    hparams: mendkit.MENDHyperParams,
    examples: Sequence[mendkit.EditExample],
    validation: Sequence[mendkit.EditExample],
    *,
    run: Path,
) -> "TrainingResult | None":
    """The result of the run in the folder, or None if it has not ended."""
    from ..mend.training import finished

    result = finished(hparams, examples, validation, run_dir=run)
    if result is not None:
        logger.info("%s is a run that has ended; nothing is left to do", run)
    return result


def _place(run: Path, *, resume: bool, overwrite: bool) -> cli.RunFolder:
    """The run's folder. Raises MendkitError if it holds a run that was not to be replaced."""
    if resume and overwrite:
        raise MendkitError("--resume needs the files that --overwrite removes; give one of them")
    stopped = (run / "checkpoint.safetensors").exists()
    names = ["archive.safetensors", "results.json"]
    if resume:
        # A stopped run goes on. Without a checkpoint the run starts anew, and replaces no result.
        return cli.RunFolder(run, *([] if stopped else names), overwrite=False)
    if stopped and not overwrite:
        raise MendkitError(
            f"{run} holds an earlier run; give another --out, --resume to go on with it, "
            "or --overwrite"
        )
    names += ["history.jsonl", "run.json", "checkpoint.safetensors"]
    return cli.RunFolder(run, *names, overwrite=overwrite)


def _results(result: "TrainingResult") -> dict[str, Any]:
    from ..runs import peak_memory_gb

    results = {
        "seconds": result.seconds,
        "best_step": result.best["step"],
        "stopped": result.stopped,
        "skipped": result.skipped,
        "peak_memory_gb": peak_memory_gb(),
        **result.cache,
    }
    for name, value in result.best.items():
        if name.startswith("val."):
            results[name.replace("val.", "validation.")] = value
    return {f"train.{name}": value for name, value in results.items()}


@cli.command("plan configs/llama-7b.yaml --memory 8GB")
def plan(
    words: Words = None,
    *,
    train_data: Annotated[
        str, Option("--train-data", "--data", metavar="FILE", help="training examples")
    ] = "facts:train",
    train_limit: Limit = None,
    validation_data: Data = "facts:validation",
    validation_limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    memory: Annotated[str, Option(metavar="SIZE", help="such as 8GB (default: all free)")] = "",
    as_json: Json = False,
) -> int:
    """Predict the memory of every phase of training before anything is loaded.

    Where it does not fit, settings are proposed that do.
    """
    from ..cost.plan import fitting, in_words, plan_table
    from ..cost.plan import plan as predict
    from ..models.checkpoints import choose_device
    from ..runs import free_memory

    hparams = cli.hyperparameters(words)
    read = partial(mendkit.read_examples, skip_invalid=skip_invalid, columns=hparams.columns)
    examples = read(train_data, limit=train_limit)
    validation = read(validation_data, limit=validation_limit)
    budget = free_memory(choose_device(hparams.device))
    if memory:
        budget = hparams.replace(cache_bytes=memory).cache_bytes
    found = predict(hparams, examples, validation)
    values, text = found.to_dict(), plan_table(found)
    if found.needed > budget:
        settings, other = fitting(hparams, examples, validation, budget=budget)
        values |= {"settings": settings, "with_settings": {"needed": other.needed}}
        fits = "fits" if other.needed <= budget else "still does not fit"
        text += f"\n\nmore than {budget / 1e9:.1f} GB; with {in_words(settings)} it {fits}:\n"
        text += plan_table(other)
    cli.show(values, text, as_json=as_json)
    return 0
