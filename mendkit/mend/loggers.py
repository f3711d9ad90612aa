"""Training's history beyond its JSON lines: TensorBoard, trackio or Weights & Biases.

`history.jsonl` is always written (training.py); `logger` names one of these to be told the same rows. Each is an extra
of its own (`pip install -e ".[tensorboard]"`). Files of TensorBoard and wandb lie in the run folder; where trackio and
wandb send is theirs to configure (`wandb login`, `WANDB_MODE=offline`, `TRACKIO_DIR`, …).
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..errors import MendkitError
from ..hparams import MENDHyperParams

PROJECT = "mendkit"
PINNED = {"tensorboard": "-c constraints.txt ", "wandb": "-c constraints.txt ", "trackio": ""}
"""How pip is asked for each; trackio needs an older pillow than the one pinned."""

Log = Callable[[Mapping[str, float]], None]


def check_logger(name: str | None, /) -> None:
    """Raise MendkitError if the named logger is not installed."""
    if name is not None and find_spec(name) is None:
        raise MendkitError(
            f'logger: {name} is not installed; run `pip install {PINNED[name]}-e ".[{name}]"`, or set `logger: null` '
            "(history.jsonl is written in any case)"
        )


@contextmanager
def open_logger(hparams: MENDHyperParams, run_dir: Path, /, *, first: bool = True) -> Iterator[Log]:
    """A function that sends a history row to the logger of `hparams`, if it names one and this is the `first` process.

    Raises MendkitError if the logger is not installed or does not start.
    """
    check_logger(hparams.logger)
    if hparams.logger is None or not first:
        yield lambda row: None
        return
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results
            log, close = (
                _tensorboard(run_dir)
                if hparams.logger == "tensorboard"
                else _tracker(hparams, run_dir)
            )
    except Exception as error:  # whatever theirs raise: no key, no network, an old version
        raise MendkitError(
            f"logger: {hparams.logger} did not start: {error}; set it up, or `logger: null`"
        ) from error
    try:
        yield lambda row: log(
            {name: value for name, value in row.items() if name != "step"}, int(row["step"])
        )
    finally:
        with redirect_stdout(sys.stderr):
            close()


Backend = tuple[Callable[[Mapping[str, float], int], object], Callable[[], object]]
"""Log values at a step; close."""


def _tensorboard(run_dir: Path) -> Backend:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(
        run_dir / "tensorboard", ignore_errors=True
    )  # an earlier run's curves would join this one's
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _tracker(hparams: MENDHyperParams, run_dir: Path) -> Backend:
    """wandb, or trackio, which has its interface."""
    module = import_module(str(hparams.logger))
    place = {"dir": str(run_dir)} if hparams.logger == "wandb" else {}
    run = module.init(project=PROJECT, name=run_dir.name, config=hparams.to_dict(), **place)
    return lambda values, step: run.log(dict(values), step=step), module.finish
