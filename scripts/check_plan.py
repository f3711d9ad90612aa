"""Hold a plan against the training that it plans: memory and time of every phase, predicted and measured.

    python scripts/check_plan.py configs/smollm2-135m.yaml --examples 200 batch_size=8
    python scripts/check_plan.py configs/gpt2-xl.yaml --examples 40 --random DIR

Each phase's peak of resident memory is measured by itself (Linux). `--random` takes the model in DIR, which it first
writes if it is not there: of the config's published shape, with random weights and the bundled model's tokenizer.
"""

import argparse
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from mendkit import MENDHyperParams, read_examples
from mendkit.cost.architectures import published
from mendkit.cost.plan import Plan, plan
from mendkit.hparams import parse_overrides
from mendkit.mend import training
from mendkit.models.bundled import bundled_model
from mendkit.models.load import load_for_training
from mendkit.runs import peak_memory_gb

STEPS = 6


class Watch:
    """Peaks of resident memory (bytes) and seconds by phase."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens within the context; a phase that comes again counts with its most memory, least time."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = time.perf_counter()
        yield
        peak, seconds = peak_memory_gb() * 1e9, time.perf_counter() - start
        most, least = self.rows.get(name, (peak, seconds))
        self.rows[name] = max(peak, most), min(seconds, least)

    def around(self, name: str, call: Callable) -> Callable:
        """The same function, measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return measured


def random_model(hparams: MENDHyperParams, folder: Path) -> MENDHyperParams:
    """Hyperparameters of a random model in `folder`, of the published shape."""
    if not (folder / "config.json").is_file():
        model = published(hparams.model_name).to_empty(device="cpu")
        model.tie_weights()
        generator = torch.Generator().manual_seed(0)
        for value in model.parameters():
            value.data.fill_(1.0) if value.ndim == 1 else value.data.uniform_(
                -0.035, 0.035, generator=generator
            )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(bundled_model()).save_pretrained(folder)
    return hparams.replace(model_name=str(folder))


def measure(
    hparams: MENDHyperParams, examples: list, validation: list
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Train a few steps; resident memory before anything is loaded, and each phase's peak and time."""
    watch, idle = Watch(), psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        with watch.phase("loading"):
            base = load_for_training(hparams)
            own = training.Trainer(
                base, hparams, examples, validation, Path(folder), done_with_base=True
            )
        own.fill_trunk = watch.around("trunk pass", own.fill_trunk)
        own.factors.fill = watch.around("factors", own.factors.fill)
        training.MEND.warm_up = watch.around("statistics", training.MEND.warm_up)
        training.save_archive = watch.around("archive", training.save_archive)
        training.validate = watch.around("validation", training.validate)
        own.step = watch.around("step", own.step)
        own.run()
    return idle, watch.rows


def compare(own: Plan, idle: float, rows: dict[str, tuple[float, float]]) -> str:
    """A table of both."""
    lines = [
        f"{'':12}{'GB planned':>12}{'measured':>10}{'ratio':>7}{'s planned':>12}{'measured':>10}{'ratio':>7}"
    ]
    for phase in own.phases:
        if phase.name in rows:
            most, seconds = rows[phase.name]
            a, b = (own.idle + phase.peak) / 1e9, most / 1e9
            lines.append(
                f"{phase.name:12}{a:12.2f}{b:10.2f}{a / b:7.2f}{phase.seconds:12.2f}{seconds:10.2f}"
                f"{phase.seconds / seconds:7.2f}"
            )
    lines.append(f"idle{own.idle / 1e9:20.2f}{idle / 1e9:10.2f}")
    return "\n".join(lines)


def main() -> None:
    """Plan, then train, then compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--examples", type=int, default=200, help="training examples; a fifth of it validates"
    )
    parser.add_argument("--random", type=Path, metavar="DIR")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        changes = {
            "max_iters": STEPS,
            "val_interval": STEPS,
            "cache_dir": cache,
            **parse_overrides(args.overrides),
        }
        hparams = MENDHyperParams.from_hparams(args.config, **changes)
        if args.random is not None:
            hparams = random_model(hparams, args.random)
        examples = read_examples("facts:train", limit=args.examples)
        validation = read_examples("facts:validation", limit=args.examples // 5)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            idle, rows = fresh.submit(measure, hparams, examples, validation).result()
        sys.stdout.write(compare(plan(hparams, examples, validation), idle, rows) + "\n")


if __name__ == "__main__":
    main()
