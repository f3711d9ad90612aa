"""What training and editing cost: the kit against a textbook MEND of the same model, data, rank and dtype.

First every way's losses and gradients (ways.py) are held against the textbook's. Then the ways take turns, so that
whatever else the machine does hits all of them alike; figures are medians over the turns, ratios medians of the ratios
within a turn, textbook over kit. Memory is measured in a process for each way.
"""

import logging
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..data.examples import EditExample
from ..data.files import read_examples
from ..mend.batches import edit_tokens
from ..mend.editor import MENDEditor
from ..mend.hypernetwork import MEND
from ..mend.steps import make_optimiser
from ..mend.updates import attach, select, side_branches
from ..models.base import BaseModel
from ..models.checkpoints import silence_transformers
from ..models.load import release_trunk
from ..models.tokens import collate
from ..models.trunk import FrozenTrunk
from ..runs import peak_memory_gb, provenance
from . import textbook
from .ways import (
    GPT2_XL,
    KIT,
    TEXTBOOK,
    TOLERANCE,
    WAYS,
    Row,
    Savings,
    Settings,
    Way,
    distance,
    draw,
    gradients,
    largest_error,
    make_mend,
    open_base,
    plain_adam,
    recipe,
    seconds_of,
    timed,
)

logger = logging.getLogger(__name__)

ALONE, CACHED = "kit_alone", "kit_cached"
EDITS = {
    TEXTBOOK: TEXTBOOK,
    KIT: "kit, several independent ones in one pass",
    ALONE: "kit, one alone",
    CACHED: "kit, one alone, its prompt read before",
}
"""Ways to edit: key and name."""


def compare(base: BaseModel, s: Settings, examples: Sequence[EditExample], /) -> dict[str, Any]:
    """Equality, speed and operations of every way to train, and of an edit, on one base model."""
    h = recipe(s, base)
    chosen, rows = draw(base, h, examples)
    mend = make_mend(base, h, rows)
    own = {True: plain_adam(mend), False: make_optimiser(mend, h)}
    ways = {
        n: Way(base, mend, rows, savings=use, optimiser=own[use is None]) for n, use in WAYS.items()
    }
    errors, flop, expected = {}, {}, None
    for name, way in ways.items():
        counted = name in (
            TEXTBOOK,
            KIT,
        )  # the counter's hooks do not go with all that the others do
        with FlopCounterMode(display=False) if counted else nullcontext() as counter:
            found = gradients(way)
        flop[name] = counter.get_total_flops() / len(rows) if counted else None
        expected = expected or found
        errors[name] = largest_error(expected, found)
        logger.info("%s, %s: largest error %.1e", base.name, name, errors[name])
    del expected, found
    turns, rates = [], []
    for turn in range(s.repeats):
        turns.append({name: seconds_of(way.step) / len(rows) for name, way in ways.items()})
        fresh = Way(base, mend, rows, savings=Savings(), optimiser=None)
        turns[-1] |= {
            f"{cache} cache": seconds / len(rows) for cache, seconds in fresh.seconds.items()
        }
        rates.append(matmul_rate())
        logger.info("%s: turn %d of %d", base.name, turn + 1, s.repeats)
    edit, errors["edit"] = edits(base, mend, chosen, s.repeats)
    tolerance = TOLERANCE.get(base.dtype, TOLERANCE[torch.float32])
    rate = statistics.median(rates)
    train = {name: _figures(turns, name, flop[name], rate) for name in ways}
    return {
        "train_ratio": train[KIT]["ratio"],
        "edit_ratio": edit["kit_ratio"],
        "edit_ratio_alone": edit["kit_alone_ratio"],
        "edit_ratio_cached": edit["kit_cached_ratio"],
        "equal": all(error <= tolerance for error in errors.values()),
        "error": errors,
        "tolerance": tolerance,
        "train": train,
        "edit": edit,
        "caches": _caches(turns, train),
        "matmul_gflop_per_s": rate / 1e9,
        "workload": _workload(base, mend, rows),
    }


def _figures(
    turns: Sequence[Mapping[str, float]], name: str, flop: float | None, rate: float
) -> dict[str, float]:
    """Of one way to train; `ratio` is how many times the textbook's speed it has."""
    seconds = statistics.median(turn[name] for turn in turns)
    figures = {"edits_per_second": 1 / seconds, "seconds_per_edit": seconds}
    figures["ratio"] = statistics.median(turn[TEXTBOOK] / turn[name] for turn in turns)
    if flop is not None:
        figures |= {"gflop_per_edit": flop / 1e9, "share_of_matmul_rate": flop / seconds / rate}
    return figures


def _caches(
    turns: Sequence[Mapping[str, float]], train: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Seconds per edit to fill each cache, and the epochs after which that is saved (None: never)."""
    out: dict[str, Any] = {}
    for cache in ("trunk", "factor"):
        cost = statistics.median(
            turn["trunk cache" if cache == "trunk" else "factors cache"] for turn in turns
        )
        saved = train[f"without {cache} cache"]["seconds_per_edit"] - train[KIT]["seconds_per_edit"]
        out |= {
            f"{cache}_seconds_per_edit": cost,
            f"{cache}_pays_after_epochs": cost / saved if saved > 0 else None,
        }
    return out


def _workload(base: BaseModel, mend: MEND, rows: Sequence[Row]) -> dict[str, Any]:
    texts = [text for row in rows for _, text in row]
    return {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "hypernetwork_parameters": sum(p.numel() for p in mend.parameters()),
        "sites": len(base.sites),
        "rank": mend.hparams.rank,
        "dtype": str(base.dtype).removeprefix("torch."),
        "edits_per_step": len(rows),
        "texts_per_edit": len(texts) / len(rows),
        "tokens_per_text": sum(len(text.ids) for text in texts) / len(texts),
    }


def matmul_rate(size: int = 2048) -> float:
    """Floating-point operations a second that this machine reaches now in a large float32 product."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(3))


def edits(
    base: BaseModel, mend: MEND, examples: Sequence[EditExample], repeats: int, /
) -> tuple[dict[str, float], float]:
    """Medians of `edit_in_turn` over examples, the ratios of the textbook's seconds to the kit's, the largest error."""
    edit_in_turn(base, mend, examples[0], examples)  # warms up
    found = [
        edit_in_turn(base, mend, examples[i % len(examples)], examples)
        for i in range(max(5, repeats))
    ]
    turns = [seconds for seconds, _ in found]
    figures: dict[str, float] = {"edits": len(turns)}
    for name in EDITS:
        figures[f"{name}_seconds"] = statistics.median(turn[name] for turn in turns)
        figures[f"{name}_ratio"] = statistics.median(turn[TEXTBOOK] / turn[name] for turn in turns)
    return figures, max(error for _, error in found)


@torch.no_grad()
def edit_in_turn(
    base: BaseModel, mend: MEND, example: EditExample, several: Sequence[EditExample], /
) -> tuple[dict[str, float], float]:
    """Seconds from an example to a model that answers edited, of each of EDITS, and the error of the kit's logits."""
    editor, seconds = MENDEditor(base, mend), {}
    text, trunk = editor.tokens(example), FrozenTrunk(base)
    batch = collate([text], base.pad_id, base.device)
    seconds[TEXTBOOK], clean = timed(lambda: textbook.put(base, plain_edit(base, mend, example)))
    expected = textbook.logits(base, batch, {})[batch.scored]
    textbook.put(base, clean)
    seconds[ALONE], edit = timed(lambda: editor.edit(example).apply())
    error = distance(textbook.logits(base, batch, {})[batch.scored], expected)
    edit.undo()
    trunk.fill([text])
    seconds[CACHED], handles = timed(
        lambda: attach(base, editor.updates([editor.tokens(example)], trunk=trunk))
    )
    error = max(error, distance(textbook.logits(base, batch, {})[batch.scored], expected))
    _remove(handles)
    seconds[KIT], updates = timed(lambda: editor.updates([editor.tokens(e) for e in several]))
    with side_branches(base, select(updates, [several.index(example)])):
        error = max(error, distance(textbook.logits(base, batch, {})[batch.scored], expected))
    return seconds | {KIT: seconds[KIT] / len(several)}, error


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def plain_edit(base: BaseModel, mend: MEND, example: EditExample) -> textbook.Weights:
    """The textbook's edited weights."""
    return textbook.edited_weights(base, mend, edit_tokens(base, mend.hparams, example))


def memory(s: Settings, name: str, /) -> dict[str, float]:
    """Peak memory (GB) of two steps of one way to train, in the process that runs this and nothing else.

    `above_gb` is the whole peak, caches included, above the base model; `training_peak_gb` that after the caches of
    frozen values were filled and, if the model can, everything below the edit sites was released.
    """
    base = open_base(s)
    h, before = recipe(s, base), _restart_peak()
    _, rows = draw(base, h, read_examples("facts:train"))
    use = WAYS[name]
    if use is None or use.at_once == 1:  # more edits than two take more time, not more memory
        rows = sorted(rows, key=lambda row: max(len(text.ids) for _, text in row))[-2:]
    mend = make_mend(base, h, rows)
    optimiser = plain_adam(mend) if use is None else make_optimiser(mend, h)
    way = Way(base, mend, rows, savings=use, optimiser=optimiser)
    if isinstance(base, BaseModel) and use == Savings():
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
    """Let the peak start again from what is resident now, which is returned (GB); elsewhere than on Linux the peak so
    far stays, and with it an upper bound."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.warning(
            "this system cannot restart the peak of a process's memory: peaks include loading"
        )
    return peak_memory_gb()


def depths(s: Settings, layers: Sequence[int], /) -> dict[str, dict[str, float]]:
    """Seconds and operations of the kit's step per edit on random models of several depths, the ways in turn."""
    ways, flop = {}, {}
    for count in layers:
        base = open_base(replace(s, model=GPT2_XL, layers=count))
        h = recipe(s, base)
        _, rows = draw(base, h, read_examples("facts:train"))
        mend = make_mend(base, h, rows)
        ways[count] = Way(base, mend, rows, savings=Savings(), optimiser=make_optimiser(mend, h))
        with FlopCounterMode(display=False) as counter:
            ways[count].step()
        flop[count] = counter.get_total_flops() / s.batch
    turns = [
        {count: seconds_of(way.step) / s.batch for count, way in ways.items()}
        for _ in range(s.repeats)
    ]
    return {
        str(count): {
            "seconds_per_edit": statistics.median(turn[count] for turn in turns),
            "gflop_per_edit": flop[count] / 1e9,
        }
        for count in layers
    }


# ------------------------------------------------------------------------------------------------------ in a run


def run_bench(models: Sequence[Settings], /, *, deep: Sequence[int] = ()) -> dict[str, Any]:
    """Measure each model in processes of its own; see `compare`, `memory` and (under "depths") `depths`."""
    results: dict[str, Any] = {}
    for s in models:
        logger.info("%s: textbook and kit in turn", s.model)
        own = _apart(_compare_facts, s)
        own["memory"] = {}
        for name in WAYS:
            own["memory"][name] = _apart(memory, s, name)
            logger.info("%s: memory of %s measured", s.model, name)
        above = own["memory"][TEXTBOOK]["above_gb"], own["memory"][KIT]["above_gb"]
        results[s.model] = {"memory_ratio": above[0] / above[1], **own, **provenance()}
    if deep:
        logger.info("depths: %s layers", ", ".join(map(str, deep)))
        results["depths"] = _apart(
            depths, replace(models[0], model=GPT2_XL, width=768), tuple(deep)
        )
    return results


def _compare_facts(s: Settings) -> dict[str, Any]:
    return compare(open_base(s), s, read_examples("facts:train"))


def _apart(do: Callable[..., Any], *args: Any) -> Any:
    """`do(*args)` in a fresh process, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_quietly, do, *args).result()


def _quietly(do: Callable[..., Any], *args: Any) -> Any:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mendkit").setLevel(logging.INFO)
    with silence_transformers():
        return do(*args)


def bench_table(results: Mapping[str, Any], /) -> str:
    """The figures for people."""
    lines = []
    for model, own in results.items():
        if model == "depths":
            lines.append("kit, by depth of the model: ms per edit, GFLOP per edit")
            lines += [
                f"  {n:>4} layers {r['seconds_per_edit'] * 1e3:9.1f} {r['gflop_per_edit']:9.2f}"
                for n, r in own.items()
            ]
            continue
        verdict = "equal" if own["equal"] else "NOT EQUAL"
        lines.append(
            f"{model}: {verdict} (error at most {max(own['error'].values()):.1e}); textbook over kit:"
        )
        ratios = "  training {train_ratio:.1f}, edit {edit_ratio:.1f} (alone {edit_ratio_alone:.1f}), memory"
        lines.append(f"{ratios.format(**own)} {own['memory_ratio']:.1f}")
        lines.append(
            f"  {'':26}{'edits/s':>9}{'times':>8}{'GB above base':>15}{'training peak':>15}"
        )
        for name, way in own["train"].items():
            line = f"  {name:26}{way['edits_per_second']:9.2f}{way['ratio']:8.1f}"
            if found := own["memory"].get(name):
                line += f"{found['above_gb']:15.2f}{found['training_peak_gb']:15.2f}"
            lines.append(line)
        seconds = [
            f"{name} {own['edit'][f'{key}_seconds'] * 1e3:.0f} ms" for key, name in EDITS.items()
        ]
        lines.append(f"  one edit: {'; '.join(seconds)}")
        for cache in ("trunk", "factor"):
            epochs = own["caches"][f"{cache}_pays_after_epochs"]
            pays = "never pays" if epochs is None else f"pays after {epochs:.1f} epochs"
            lines.append(
                f"  {cache} cache: {own['caches'][f'{cache}_seconds_per_edit'] * 1e3:.0f} ms per edit, {pays}"
            )
        for name in (TEXTBOOK, KIT):
            way = own["train"][name]
            share = f"{way['share_of_matmul_rate']:.0%} of {own['matmul_gflop_per_s']:.0f} GFLOP/s"
            lines.append(f"  {name}: {way['gflop_per_edit']:.1f} GFLOP per edit, {share}")
    return "\n".join(lines)
