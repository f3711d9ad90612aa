"""Training's history beyond its JSON lines: TensorBoard or Weights & Biases.

`history.jsonl` is always written (training.py); `logger` names one of these to get the same rows.
Both are extras (`pip install -c constraints.txt -e ".[tensorboard]"`), and both write into the run
folder. Where wandb sends its runs is set by wandb itself (`wandb login`, `WANDB_MODE=offline`).
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

# Is told a row of the history, with its "step".
Log = Callable[[Mapping[str, float]], None]

# Log values at a step; close.
Backend = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]


def check_logger(name: str | None) -> None:
    """Raise MendkitError if the named logger is not installed."""
    if name is not None and find_spec(name) is None:
        raise MendkitError(
            f"logger: {name} is not installed; run "
            f'`pip install -c constraints.txt -e ".[{name}]"`, or set `logger: null` '
            "(history.jsonl is written in any case)"
        )


@contextmanager
def open_logger(hparams: MENDHyperParams, run_dir: Path, *, first: bool = True) -> Iterator[Log]:
    """A function that sends history rows to the logger of `hparams`, in the `first` process only.

    Raises MendkitError if the logger is not installed or does not start.
    """
    check_logger(hparams.logger)
    if hparams.logger is None or not first:
        yield lambda row: None
        return
    start = {"tensorboard": _tensorboard, "wandb": _wandb}[hparams.logger]
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results
            log, close = start(hparams, run_dir)
    except Exception as error:  # whatever the logger raises: no key, no network, an old version
        raise MendkitError(
            f"logger: {hparams.logger} did not start: {error}; set it up, or `logger: null`"
        ) from error

    def send(row: Mapping[str, float]) -> None:
        values = dict(row)
        step = int(values.pop("step"))
        log(values, step)

    try:
        yield send
    finally:
        with redirect_stdout(sys.stderr):
            close()


def _tensorboard(_: MENDHyperParams, run_dir: Path) -> Backend:
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's curves would join this one's
    writer = SummaryWriter(str(folder))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(hparams: MENDHyperParams, run_dir: Path) -> Backend:
    wandb = import_module("wandb")
    run = wandb.init(
        project="mendkit", name=run_dir.name, dir=str(run_dir), config=hparams.to_dict()
    )
    return lambda values, step: run.log(values, step=step), wandb.finish
