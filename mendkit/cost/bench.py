"""What training and editing cost: the kit against a textbook MEND, in one run.

All ways share one base model, one hypernetwork and the same edits, and end a step with Adam, whose
learning rate is 0. They take turns, so that other work on the machine hits all of them alike. A
figure is a median over turns, a ratio the median of the ratios within a turn.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from ..data.examples import EditExample
from ..data.files import read_examples
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.batches import Sampler, prepare_texts
from ..mend.editor import MENDEditor
from ..mend.factors import FactorCache
from ..mend.hypernetwork import MEND
from ..mend.steps import batch_losses, total_loss
from ..mend.updates import select, side_branches
from ..models.base import BaseModel
from ..models.checkpoints import BUNDLED, DTYPES, bundled_model, choose_device
from ..models.load import load_model, release_trunk
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from ..runs import peak_memory_gb, provenance, return_memory, user_path
from . import textbook
from .plan import published
from .textbook import TextRow

logger = logging.getLogger(__name__)

TEXTBOOK, KIT, NO_TRUNK = "textbook", "kit", "without trunk cache"
WAYS = (TEXTBOOK, NO_TRUNK, KIT)
KIT_ALONE = "kit_alone"

# Ways to edit: key and name.
EDITS = {
    TEXTBOOK: TEXTBOOK,
    KIT: "kit, several independent ones in one pass",
    KIT_ALONE: "kit, one alone",
}

# What the name of a model with random weights ends in.
SHAPE = "-shape"

TOLERANCE = {**dict.fromkeys(WAYS, 1e-4), "edit": 1e-3}
"""Largest relative error in float32 of a loss or gradient, and of an edited model's logits.

One edit brings one to three rows of logits to the output layer, whose backward pass sums over the
vocabulary, for so few rows one by one. An edit moves the logits by .1 to .6. In float64 all ways to
train agree to 1e-10.
"""


def recipe(model: str, *, batch: int = 16, rank: int = 1920) -> MENDHyperParams:
    """The published recipe for a model: "smollm2-135m", a YAML file, or a shape of random weights.

    A shape is the last part of a name in shapes.yaml, as in "gpt2-xl-shape". Raises MendkitError.
    """
    given: dict[str, Any] = {"model_name": model}
    if user_path(model).is_file():
        keys = {"model_name", "tokenizer_name", "inner_params", "dtype", "device"}
        given = MENDHyperParams.from_hparams(model).model_dump(include=keys)
    elif model != BUNDLED and published(model.removesuffix(SHAPE)) is None:
        raise MendkitError(
            f"no model {model!r} to measure; give {BUNDLED}, gpt2-xl{SHAPE}, or a YAML file"
        )
    given |= {"edit_lr": 3e-4, "cedit": 0.1, "unrelated_per_edit": 0, "lr": 0.0, "lr_lr": 0.0}
    return MENDHyperParams(**given, rank=rank, batch_size=batch)


def open_model(hparams: MENDHyperParams) -> BaseModel:
    """The base model: read, or of a shape with random weights."""
    if not hparams.model_name.endswith(SHAPE):
        return load_model(hparams)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    shape = hparams.model_name.removesuffix(SHAPE)
    dtype, device = DTYPES.get(hparams.dtype, torch.float32), str(choose_device(hparams.device))
    model = published(shape, device=device, dtype=dtype, vocabulary=len(tokenizer))
    assert model is not None  # `recipe` knows the shape
    return BaseModel(model, tokenizer, name=hparams.model_name)


def drawn(
    base: BaseModel, hparams: MENDHyperParams, examples: Sequence[EditExample]
) -> tuple[list[EditExample], Sequence[TextRow]]:
    """`batch_size` of the examples, and of each the edit, a paraphrase and a neighbour."""
    size = hparams.batch_size
    chosen = list(examples[:: len(examples) // size or 1])[:size]
    texts = prepare_texts(base, hparams, chosen)
    return chosen, Sampler(texts, hparams).texts(range(len(texts)))


def way_to_train(
    name: str, base: BaseModel, mend: MEND, rows: Sequence[TextRow]
) -> Callable[[], dict[str, float]]:
    """A function that adds the mean loss's gradient, and returns the mean loss of each role."""

    def one_by_one() -> dict[str, float]:
        sums: dict[str, float] = {}
        for row in rows:
            losses = textbook.textbook_losses(base, mend, row)
            (total_loss(losses, mend.hparams) / len(rows)).backward()
            for role, loss in losses.items():
                sums[role] = sums.get(role, 0.0) + float(loss.detach()) / len(rows)
        return sums

    def in_one_pass() -> dict[str, float]:
        losses = batch_losses(trunk, mend, cache.get(edits), list(rows))
        total_loss(losses, mend.hparams).backward()
        return {role: float(loss.detach()) for role, loss in losses.items()}

    if name == TEXTBOOK:
        return one_by_one
    trunk, edits = FrozenTrunk(base), [row[0][1] for row in rows]
    cache = FactorCache(trunk, mend.hparams.replace(cache_bytes=10**12))
    if name == KIT:
        for row in rows:
            trunk.fill([text for _, text in row])
    cache.fill(edits)
    return in_one_pass


def gradients(mend: MEND, backward: Callable[[], dict[str, float]]) -> dict[str, Tensor]:
    """The loss of each role, and every parameter's gradient."""
    losses = backward()
    found = {role: torch.tensor(loss) for role, loss in losses.items()}
    for name, parameter in mend.named_parameters():
        assert parameter.grad is not None  # every parameter takes part
        found[name], parameter.grad = parameter.grad, None
    return found


def largest_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest `distance` of a gradient or a loss; NaN if one is not a number."""
    errors = [distance(found[name], value) for name, value in expected.items()]
    return float(torch.tensor(errors).max())


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, of a single number in units of at least 1 (nat)."""
    size = expected.norm().clamp(min=0.0 if expected.ndim else 1.0)
    return float((found - expected).norm() / size)


def step(optimiser: torch.optim.Optimizer, backward: Callable[[], Any]) -> None:
    """One optimiser step over all edits."""
    backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def timed(do: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    value = do(*args)
    return time.perf_counter() - start, value


def in_turns(turns: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """By way the median of its seconds, and of the textbook's over them within a turn."""
    frame = pd.DataFrame(turns)
    ratios = frame.rdiv(frame[TEXTBOOK], axis=0)
    medians = zip(frame.median().tolist(), ratios.median().tolist(), strict=True)
    return dict(zip(map(str, frame), medians, strict=True))


def compare_ways(
    base: BaseModel, hparams: MENDHyperParams, examples: Sequence[EditExample], *, repeats: int
) -> dict[str, Any]:
    """Equality, speed and operations of every way to train, and of an edit, on one base model."""
    # 1. Every way's losses and gradients, against the textbook's.
    chosen, rows = drawn(base, hparams, examples)
    mend = textbook.trained_looking(base, hparams, rows)
    ways = {name: way_to_train(name, base, mend, rows) for name in WAYS}
    expected = gradients(mend, ways[TEXTBOOK])
    errors = {n: largest_error(expected, gradients(mend, way)) for n, way in ways.items()}
    logger.info("%s: largest errors of the ways %s", base.name, errors)

    # 2. Operations. The counter's hooks do not go with all that the third way does.
    gflop = {}
    for name in (TEXTBOOK, KIT):
        with FlopCounterMode(display=False) as counter:
            gradients(mend, ways[name])
        gflop[name] = counter.get_total_flops() / len(rows) / 1e9

    # 3. Turns of steps, and the machine's rate in a large product.
    optimiser = torch.optim.Adam(mend.parameters(), lr=0.0, fused=True)
    turns, rate, square = [], 0.0, torch.ones(2048, 2048)
    for turn in range(repeats):
        turns.append({n: timed(step, optimiser, w)[0] / len(rows) for n, w in ways.items()})
        rate = max(rate, 2e-9 * 2048**3 / timed(torch.mm, square, square)[0])
        logger.info("%s: turn %d of %d", base.name, turn + 1, repeats)
    train: dict[str, dict[str, float]] = {}
    for name, (seconds, ratio) in in_turns(turns).items():
        train[name] = {"edits_per_second": 1 / seconds, "seconds_per_edit": seconds, "ratio": ratio}
        if name in gflop:
            train[name]["gflop_per_edit"] = gflop[name]
            train[name]["share_of_matmul_rate"] = gflop[name] / seconds / rate

    # 4. Edits.
    edit, errors["edit"] = edit_figures(base, mend, chosen, repeats)
    return {
        "train_ratio": train[KIT]["ratio"],
        "edit_ratio": edit["kit_ratio"],
        "edit_ratio_alone": edit["kit_alone_ratio"],
        "equal": all(error <= TOLERANCE[name] for name, error in errors.items()),
        "error": errors,
        "tolerance": TOLERANCE,
        "train": train,
        "edit": edit,
        "matmul_gflop_per_s": rate,
        "threads": torch.get_num_threads(),
        "workload": {
            "parameters": base.model.num_parameters(),
            "rank": hparams.rank,
            "dtype": str(base.dtype),
            "edits_per_step": len(rows),
            "texts_per_edit": len(rows[0]),
        },
    }


@torch.no_grad()
def edit_figures(
    base: BaseModel, mend: MEND, examples: Sequence[EditExample], repeats: int
) -> tuple[dict[str, float], float]:
    """Seconds from an example to an edited model for each of EDITS, and the kit's largest error.

    The error is that of the edited model's logits at the answer against the textbook's.
    """
    editor, turns, errors = MENDEditor(base, mend), [], []
    texts = [editor.tokens(example) for example in examples]
    for turn in range(max(6, repeats)):  # the first warms up
        index, seconds = turn % len(texts), {}
        text = texts[index]
        # 1. The textbook writes dense weights; to put them in place takes no time.
        seconds[TEXTBOOK], weights = timed(textbook.edited_weights, base, mend, text)
        clean = textbook.put(base, weights)
        expected = _answer(base, text)
        textbook.put(base, clean)
        # 2. The kit, one alone.
        made, edit = timed(editor.edit, examples[index])
        applied, _ = timed(edit.apply)
        seconds[KIT_ALONE] = made + applied
        errors.append(distance(_answer(base, text), expected))
        edit.undo()
        # 3. All examples in one pass; the one of this turn is read under its update.
        passed, updates = timed(editor.updates, texts)
        seconds[KIT] = passed / len(texts)
        with side_branches(base, select(updates, [index])):
            errors.append(distance(_answer(base, text), expected))
        turns.append(seconds)
    figures: dict[str, float] = {"edits": len(turns) - 1}
    for name, (middle, ratio) in in_turns(turns[1:]).items():
        figures |= {f"{name}_seconds": middle, f"{name}_ratio": ratio}
    return figures, max(errors)


def _answer(base: BaseModel, text: Tokens) -> Tensor:
    """The logits at the answer, of the model as it is."""
    batch = collate([text], base.pad_id, base.device)
    return textbook.logits(base, batch, {})[batch.scored]


def memory_of(base: BaseModel, hparams: MENDHyperParams, name: str) -> dict[str, float]:
    """Peak memory (GB) of two steps of one way to train, caches included, and what was resident.

    Of the kit it leaves a model without its lower blocks, as training does.
    """
    return_memory()
    before = _restart_peak()
    _, rows = drawn(base, hparams, read_examples("facts:train"))
    mend = textbook.trained_looking(base, hparams, rows)
    if name == TEXTBOOK:  # edit by edit: the two longest decide
        rows = sorted(rows, key=lambda row: max(len(text.ids) for _, text in row))[-2:]
    backward = way_to_train(name, base, mend, rows)
    if name == KIT:
        release_trunk(base)
    optimiser = torch.optim.Adam(mend.parameters(), lr=0.0, fused=True)
    for _ in range(2):
        step(optimiser, backward)
    peak = peak_memory_gb()
    return {"base_gb": before, "peak_gb": peak, "above_gb": peak - before}


def _restart_peak() -> float:
    """Let the peak start again from what is resident now (GB). Off Linux the old peak stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.warning("this system cannot reset a process's peak memory: peaks include loading")
    return peak_memory_gb()


def run_bench(
    models: Sequence[str], *, batch: int = 16, rank: int = 1920, repeats: int = 3
) -> dict[str, dict[str, Any]]:
    """`compare_ways` and `memory_of` of each model of `recipe`."""
    recipes = {model: recipe(model, batch=batch, rank=rank) for model in models}
    results: dict[str, dict[str, Any]] = {}
    for model, hparams in recipes.items():
        base = open_model(hparams)
        found = compare_ways(base, hparams, read_examples("facts:train"), repeats=repeats)
        memory = {name: memory_of(base, hparams, name) for name in WAYS}
        found["memory"] = memory
        found["memory_ratio"] = memory[TEXTBOOK]["above_gb"] / memory[KIT]["above_gb"]
        results[model] = found | provenance()
    return results


def bench_table(results: Mapping[str, Any]) -> str:
    """The figures for people."""
    shown = ["seconds_per_edit", "ratio", "share_of_matmul_rate", "above_gb"]
    lines = []
    for model, found in results.items():
        verdict = "equal" if found["equal"] else "NOT EQUAL"
        lines.append(f"{model}: {verdict} (error at most {max(found['error'].values()):.1e})")
        rate = found["matmul_gflop_per_s"]
        lines.append(f"threads: {found['threads']}; a large product: {rate:.0f} GFLOP/s")
        train = pd.DataFrame(found["train"]).T.join(pd.DataFrame(found["memory"]).T)
        lines.append(train[shown].to_string(float_format="%.3f", na_rep=""))
        for key, name in EDITS.items():
            seconds, ratio = found["edit"][f"{key}_seconds"], found["edit"][f"{key}_ratio"]
            lines.append(f"edit, {name}: {seconds:.3f} s, {ratio:.1f} times the textbook")
    return "\n".join(lines)
