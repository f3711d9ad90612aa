"""What training and editing cost: the kit against a textbook MEND, in one run.

1. Each way's losses and gradients (ways.py) are held against the textbook's.
2. The ways take turns, so that other work on the machine hits all of them alike.
3. A figure is a median over turns; a ratio is the median of the ratios within a turn.
4. Memory is measured in a process of its own for each way.
"""

import logging
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..data.examples import EditExample
from ..data.files import read_examples
from ..mend.editor import MENDEditor
from ..mend.hypernetwork import MEND
from ..mend.updates import select, side_branches
from ..models.base import BaseModel
from ..models.checkpoints import silence_transformers
from ..models.load import release_trunk
from ..models.tokens import collate
from ..runs import peak_memory_gb, provenance
from . import textbook
from .ways import (
    GPT2_XL,
    KIT,
    NO_TRUNK,
    TEXTBOOK,
    WAYS,
    Settings,
    Way,
    distance,
    draw_rows,
    largest_error,
    seconds_of,
    timed,
)

logger = logging.getLogger(__name__)

KIT_ALONE = "kit_alone"
EDITS = {
    TEXTBOOK: TEXTBOOK,
    KIT: "kit, several independent ones in one pass",
    KIT_ALONE: "kit, one alone",
}
"""Ways to edit: key and name."""

TOLERANCE = {**dict.fromkeys(WAYS, 1e-4), "edit": 1e-3}
"""Largest relative error in float32 of a loss or gradient, and of an edited model's logits.

One edit brings one to three rows of logits to the output layer. Its backward pass sums over the
whole vocabulary. For so few rows, and for the rows left over by blocks of four, the machine's
product sums one by one: delta is then off by up to 6e-4 although the forward pass has the same
bits. Held against float64 on SmolLM2, textbook and kit are both off by 2e-5 to 4e-4, each on other
edits. An edit itself moves the logits by .2 to .6. In float64 all ways to train agree to 1e-10.
"""


def compare_ways(
    base: BaseModel, settings: Settings, examples: Sequence[EditExample]
) -> dict[str, Any]:
    """Equality, speed and operations of every way to train, and of an edit, on one base model."""
    hparams = settings.recipe(base)
    chosen, rows = draw_rows(base, hparams, examples)
    mend = textbook.trained_looking(base, hparams, rows)
    ways = {name: Way(name, base, mend, rows) for name in WAYS}
    expected = ways[TEXTBOOK].gradients()
    errors = {name: largest_error(expected, way.gradients()) for name, way in ways.items()}
    logger.info("%s: largest errors of the ways %s", base.name, errors)
    gflop = {}
    for name in (TEXTBOOK, KIT):  # the counter's hooks do not go with all that the others do
        with FlopCounterMode(display=False) as counter:
            ways[name].backward()
        gflop[name] = counter.get_total_flops() / len(rows) / 1e9
        ways[name].optimiser.zero_grad(set_to_none=True)
    turns, rates = [], []
    for turn in range(settings.repeats):
        turns.append({name: seconds_of(way.step) / len(rows) for name, way in ways.items()})
        rates.append(matmul_gflops())
        logger.info("%s: turn %d of %d", base.name, turn + 1, settings.repeats)
    rate = statistics.median(rates)
    train = {name: training_figures(turns, name, gflop.get(name), rate) for name in WAYS}
    edit, errors["edit"] = edit_figures(base, mend, chosen, settings.repeats)
    texts = [text for row in rows for _, text in row]
    saved = train[NO_TRUNK]["seconds_per_edit"] - train[KIT]["seconds_per_edit"]
    fill = ways[KIT].seconds / len(rows)
    return {
        "train_ratio": train[KIT]["ratio"],
        "edit_ratio": edit["kit_ratio"],
        "edit_ratio_alone": edit["kit_alone_ratio"],
        "equal": all(error <= TOLERANCE[name] for name, error in errors.items()),
        "error": errors,
        "tolerance": TOLERANCE,
        "train": train,
        "edit": edit,
        "caches": {
            "trunk_seconds_per_edit": fill,
            "trunk_pays_after_epochs": fill / saved if saved > 0 else None,
        },
        "matmul_gflop_per_s": rate,
        "threads": torch.get_num_threads(),
        "workload": {
            "parameters": sum(p.numel() for p in base.model.parameters()),
            "hypernetwork_parameters": sum(p.numel() for p in mend.parameters()),
            "sites": len(base.sites),
            "rank": mend.hparams.rank,
            "dtype": str(base.dtype).removeprefix("torch."),
            "edits_per_step": len(rows),
            "texts_per_edit": len(texts) / len(rows),
            "tokens_per_text": statistics.fmean(len(text.ids) for text in texts),
        },
    }


def training_figures(
    turns: Sequence[Mapping[str, float]], name: str, gflop: float | None, rate: float
) -> dict[str, float]:
    """Of one way to train. `ratio` is how many times as fast as the textbook it is.

    `gflop`: billions of operations an edit, counted. `rate`: the machine's GFLOP/s.
    """
    seconds = statistics.median(turn[name] for turn in turns)
    figures = {"edits_per_second": 1 / seconds, "seconds_per_edit": seconds}
    figures["ratio"] = statistics.median(turn[TEXTBOOK] / turn[name] for turn in turns)
    if gflop is not None:
        figures |= {"gflop_per_edit": gflop, "share_of_matmul_rate": gflop / seconds / rate}
    return figures


def matmul_gflops(size: int = 2048) -> float:
    """GFLOP/s that this machine reaches now in a large float32 product, with torch's threads."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    seconds = [seconds_of(lambda: a @ b) for _ in range(3)]
    return 2e-9 * size**3 / min(seconds)


def edit_figures(
    base: BaseModel, mend: MEND, examples: Sequence[EditExample], repeats: int
) -> tuple[dict[str, float], float]:
    """Medians of `edit_in_turn`, ratios of the textbook's seconds to the kit's, largest error."""
    edit_in_turn(base, mend, 0, examples)  # warms up
    turns, errors = [], []
    for turn in range(max(5, repeats)):
        seconds, error = edit_in_turn(base, mend, turn % len(examples), examples)
        turns.append(seconds)
        errors.append(error)
    figures: dict[str, float] = {"edits": len(turns)}
    for name in EDITS:
        figures[f"{name}_seconds"] = statistics.median(turn[name] for turn in turns)
        figures[f"{name}_ratio"] = statistics.median(turn[TEXTBOOK] / turn[name] for turn in turns)
    return figures, max(errors)


@torch.no_grad()
def edit_in_turn(
    base: BaseModel, mend: MEND, index: int, examples: Sequence[EditExample]
) -> tuple[dict[str, float], float]:
    """Seconds from an example to an edited model for each of EDITS, and the kit's largest error.

    The error is that of the edited model's logits at the answer against the textbook's.
    """
    editor, example = MENDEditor(base, mend), examples[index]
    text = editor.tokens(example)
    batch = collate([text], base.pad_id, base.device)
    seconds, errors = {}, []

    def answer() -> Tensor:
        return textbook.logits(base, batch, {})[batch.scored]

    # 1. The textbook writes dense weights.
    seconds[TEXTBOOK], clean = timed(
        lambda: textbook.put(base, textbook.edited_weights(base, mend, text))
    )
    expected = answer()
    textbook.put(base, clean)
    # 2. The kit, one alone.
    seconds[KIT_ALONE], edit = timed(lambda: editor.edit(example).apply())
    errors.append(distance(answer(), expected))
    edit.undo()
    # 3. All examples in one pass; the one of this turn is read under its own update.
    passed, updates = timed(lambda: editor.updates([editor.tokens(e) for e in examples]))
    seconds[KIT] = passed / len(examples)
    with side_branches(base, select(updates, [index])):
        errors.append(distance(answer(), expected))
    return seconds, max(errors)


def memory_of(settings: Settings, name: str) -> dict[str, float]:
    """Peak memory (GB) of two steps of one way to train, in a process that does nothing else.

    `above_gb` is the whole peak above the base model, caches included. `training_peak_gb` is the
    peak once the caches are filled and, for the kit, the lower blocks are freed.
    """
    base = settings.open()
    before = _restart_peak()
    hparams = settings.recipe(base)
    _, rows = draw_rows(base, hparams, read_examples("facts:train"))
    mend = textbook.trained_looking(base, hparams, rows)
    if name == TEXTBOOK:  # edit by edit: the two longest decide
        rows = sorted(rows, key=lambda row: max(len(text.ids) for _, text in row))[-2:]
    way = Way(name, base, mend, rows)
    if name == KIT:
        release_trunk(base)
    filled = peak_memory_gb()
    _restart_peak()
    for _ in range(2):
        way.step()
    after = peak_memory_gb()
    peak = max(filled, after)
    return {
        "base_gb": before,
        "peak_gb": peak,
        "above_gb": peak - before,
        "training_peak_gb": after,
    }


def _restart_peak() -> float:
    """Let the peak start again from what is resident now (GB). Off Linux the old peak stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.warning("this system cannot restart a process's peak: peaks include loading")
    return peak_memory_gb()


def depths(settings: Settings, layers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seconds and GFLOP of the kit's step for each edit, on random models of several depths."""
    ways, gflop = {}, {}
    for count in layers:
        base = replace(settings, model=GPT2_XL, layers=count).open()
        hparams = settings.recipe(base)
        _, rows = draw_rows(base, hparams, read_examples("facts:train"))
        ways[count] = Way(KIT, base, textbook.trained_looking(base, hparams, rows), rows)
        with FlopCounterMode(display=False) as counter:
            ways[count].step()
        gflop[count] = counter.get_total_flops() / settings.batch / 1e9
    turns = []
    for _ in range(settings.repeats):
        turns.append({n: seconds_of(way.step) / settings.batch for n, way in ways.items()})
    found = {}
    for count in layers:
        seconds = statistics.median(turn[count] for turn in turns)
        found[str(count)] = {"seconds_per_edit": seconds, "gflop_per_edit": gflop[count]}
    return found


def run_bench(models: Sequence[Settings], *, deep: Sequence[int] = ()) -> dict[str, Any]:
    """Measure each model in fresh processes: `compare_ways`, `memory_of`, and `depths` if told."""
    results: dict[str, Any] = {}
    for settings in models:
        found = _apart(_compare_facts, settings)
        found["memory"] = {}
        for name in WAYS:
            found["memory"][name] = _apart(memory_of, settings, name)
            logger.info("%s: memory of %s measured", settings.model, name)
        textbook_gb = found["memory"][TEXTBOOK]["above_gb"]
        found["memory_ratio"] = textbook_gb / found["memory"][KIT]["above_gb"]
        results[settings.model] = found | provenance()
    if deep:
        shape = replace(models[0], model=GPT2_XL, width=768)
        results["depths"] = _apart(depths, shape, tuple(deep))
    return results


def _compare_facts(settings: Settings) -> dict[str, Any]:
    return compare_ways(settings.open(), settings, read_examples("facts:train"))


def _apart(do: Callable[..., Any], *args: Any) -> Any:
    """`do(*args)` in a fresh process, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_logged, do, *args).result()


def _logged(do: Callable[..., Any], *args: Any) -> Any:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mendkit").setLevel(logging.INFO)
    with silence_transformers():
        return do(*args)


def bench_table(results: Mapping[str, Any]) -> str:
    """The figures for people."""
    lines = []
    for model, found in results.items():
        if model == "depths":
            lines.append("kit, by depth of the model:")
            for count, row in found.items():
                ms = 1e3 * row["seconds_per_edit"]
                lines.append(f"  {count:>4} layers {ms:8.1f} ms, {row['gflop_per_edit']:.2f} GFLOP")
            continue
        verdict = "equal" if found["equal"] else "NOT EQUAL"
        threads, rate = found["threads"], found["matmul_gflop_per_s"]
        error = max(found["error"].values())
        lines.append(f"{model}: {verdict} (error at most {error:.1e})")
        lines.append(f"  threads: {threads}; a large product of matrices: {rate:.0f} GFLOP/s")
        for name in WAYS:
            way, memory = found["train"][name], found["memory"][name]
            line = f"  train, {name:20} {way['seconds_per_edit']:7.3f} s an edit"
            line += f" {way['ratio']:5.1f} times, {memory['above_gb']:.2f} GB above the base model"
            if "share_of_matmul_rate" in way:
                line += f", {way['share_of_matmul_rate']:.0%} of the rate"
            lines.append(line)
        for key, name in EDITS.items():
            seconds, ratio = found["edit"][f"{key}_seconds"], found["edit"][f"{key}_ratio"]
            lines.append(f"  edit, {name:42} {seconds:7.3f} s {ratio:5.1f} times")
    return "\n".join(lines)
