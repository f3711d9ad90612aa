"""What training and editing cost, against a textbook MEND of the same model, data, rank and dtype (textbook.py).

A *way* to train is the textbook, or the kit with some of its four savings: trunk cache, factor cache, batches of
independent edits, logits of scored positions only. All ways share one hypernetwork and the same B edits, take the
gradient of the same loss, and end a step with the same optimiser; the learning rate is 0, so that every step is the
same step, which costs what any other does. First every way's losses and gradients are held against the textbook's.
Then the ways take turns, so that whatever else the machine does hits all of them alike; figures are medians over the
turns, ratios medians of the ratios within a turn. Memory is measured in a process for each way.
"""

import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from . import textbook
from .bundled import BUNDLED, bundled_model
from .checkpoints import silence_transformers
from .data import EditExample, Tokens
from .edit import attach
from .editor import MENDEditor
from .errors import MendkitError
from .hparams import MENDHyperParams
from .mend import MEND
from .models import BaseModel, load_model
from .readers import read_examples
from .runs import peak_memory_gb, provenance
from .texts import edit_tokens, prepare_texts
from .training import FactorCache, batch_losses, make_optimiser, total_loss
from .trunk import FrozenTrunk

logger = logging.getLogger(__name__)

TEXTBOOK, KIT, BATCHED = "textbook", "kit", "kit_batched"
GPT2_XL = "gpt2-xl-shape"
MODELS = (BUNDLED, GPT2_XL)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
"""Largest error of a loss, a gradient, an edited model's logits that rounding excuses. In float32 the textbook rounds
most, where it adds a small update to a weight; and a ReLU may pass in one way what is just below 0 in another."""

Row = list[tuple[str, Tokens]]
"""The texts of one edit by role; the edit itself comes first."""


@dataclass(frozen=True)
class Savings:
    """Which of its savings the kit makes use of."""

    trunk: bool = True
    factors: bool = True
    batched: bool = True
    label_only: bool = True


WAYS: dict[str, Savings | None] = {
    TEXTBOOK: None,
    KIT: Savings(),
    "without trunk cache": Savings(trunk=False),
    "without factor cache": Savings(factors=False),
    "one edit at a time": Savings(batched=False),
    "logits of all positions": Savings(label_only=False),
}


EDITS = {TEXTBOOK: TEXTBOOK, KIT: KIT, BATCHED: "kit, several at once"}
"""Ways to edit: key and name."""


@dataclass(frozen=True)
class Settings:
    """What to measure. `model` is one of MODELS or a YAML file."""

    model: str
    batch: int = 16  # edits per optimiser step
    rank: int = 1920
    repeats: int = 5  # turns
    layers: int | None = None  # of a random model, instead of the shape's own
    width: int = 1600  # of a random model

    def __post_init__(self) -> None:
        if self.model not in MODELS and not Path(self.model).is_file():
            raise MendkitError(f"no model {self.model!r} to measure; give {', '.join(MODELS)} or a YAML file")


QUICK: dict[str, int] = {"batch": 2, "rank": 16, "repeats": 2, "layers": 4, "width": 64}
"""Settings of a trial run."""


# ------------------------------------------------------------------------------------------------------ set up


def open_base(s: Settings, /) -> BaseModel:
    """The base model: bundled, of a YAML file, or of GPT-2 XL's shape with random weights."""
    if s.model == GPT2_XL:
        return random_gpt2(layers=s.layers or 48, width=s.width)
    if s.model == BUNDLED:
        return load_model(BUNDLED)
    return load_model(MENDHyperParams.from_hparams(s.model))


def random_gpt2(*, layers: int, width: int) -> BaseModel:
    """A GPT-2 (float32, heads of 64) with random weights and the bundled model's tokenizer; edits its last 3 MLPs."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=max(width // 64, 1)))
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float(name.endswith("weight")))
        else:
            parameter.data.uniform_(-0.035, 0.035, generator=generator)  # a std of 0.02
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    return BaseModel(model, tokenizer, name=f"{GPT2_XL}-{layers}x{width}")


def recipe(s: Settings, base: BaseModel, /) -> MENDHyperParams:
    """The published recipe: all tokens, per-feature normaliser, each edit's mean loss, locality weighing ten times."""
    sites = [site.name for site in base.sites]
    h = MENDHyperParams(model_name=s.model, inner_params=sites, rank=s.rank, batch_size=s.batch)
    return h.replace(edit_lr=3e-4, cedit=0.1, unrelated_per_edit=0, lr=0.0, lr_lr=0.0)


def draw(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample], /
) -> tuple[list[EditExample], list[Row]]:
    """`batch_size` examples at random, and of each the edit, a paraphrase and a neighbour. Raises MendkitError."""
    whole = [e for e in examples if e.paraphrases and e.neighbours]
    if len(whole) < h.batch_size:
        raise MendkitError(
            f"{len(whole)} examples have a paraphrase and a neighbour; at least {h.batch_size} are needed"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(h.seed))[: h.batch_size].tolist()
    chosen = [whole[i] for i in order]
    return chosen, [
        [("edit", t.edit), ("paraphrases", t.paraphrases[0]), ("neighbours", t.neighbours[0])]
        for t in prepare_texts(base, h, chosen)
    ]


def make_mend(base: BaseModel, h: MENDHyperParams, rows: Sequence[Row], /) -> MEND:
    """A hypernetwork as after some training: U is not zero, so that every parameter has a gradient."""
    mend = MEND(base.sites, h).to(base.device)
    generator = torch.Generator().manual_seed(h.seed)
    for name, parameter in mend.named_parameters():
        if name.endswith(".U"):
            torch.nn.init.normal_(parameter, std=0.1 / parameter.shape[1] ** 0.5, generator=generator)
    for (_, edit), *_ in rows:
        for name, (u, delta) in textbook.factors(base, edit).items():
            moments = mend.moments[textbook.stats_name(next(s for s in base.sites if s.name == name), h)]
            moments["u"].add(u)
            moments["delta"].add(delta)
    return mend


class Way:
    """One way to train: `savings` None is the textbook. `optimiser` holds the hypernetwork's state."""

    def __init__(
        self, base: BaseModel, mend: MEND, rows: Sequence[Row], /, *, savings: Savings | None, optimiser: Any
    ) -> None:
        self.base, self.mend, self.rows, self.savings, self.optimiser = base, mend, rows, savings, optimiser
        self.seconds = {"trunk": 0.0, "factors": 0.0}
        if savings is not None:
            self.trunk = FrozenTrunk(base, label_only=savings.label_only)
            h = mend.hparams.replace(cache_bytes=10**12 if savings.factors else 0)
            self.factors = FactorCache(self.trunk, h)
            if savings.trunk:
                texts = [text for row in rows for _, text in row]
                self.seconds["trunk"] = _seconds(lambda: self.trunk.fill(texts))
            self.seconds["factors"] = _seconds(lambda: self.factors.fill([row[0][1] for row in rows]))

    def backward(self) -> dict[str, float]:
        """Add the gradient of the batch's loss to the hypernetwork's; returns the mean loss of each role."""
        each = self.savings is None or not self.savings.batched
        parts = [[row] for row in self.rows] if each else [list(self.rows)]
        sums: dict[str, float] = {}
        for part in parts:
            losses = self._losses(part)
            (total_loss(losses, self.mend.hparams) / len(parts)).backward()
            for role, loss in losses.items():
                sums[role] = sums.get(role, 0.0) + float(loss.detach()) / len(parts)
        return sums

    def _losses(self, part: list[Row]) -> dict[str, Tensor]:
        if self.savings is None:
            return textbook.textbook_losses(self.base, self.mend, part[0])
        return batch_losses(self.trunk, self.mend, self.factors.get([row[0][1] for row in part]), part)

    def step(self) -> None:
        """One optimiser step over all edits."""
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.mend.parameters(), self.mend.hparams.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def plain_adam(mend: MEND, /) -> torch.optim.Optimizer:
    """The textbook's optimiser: Adam as torch has it by default."""
    return torch.optim.Adam(mend.parameters(), lr=0.0)


def _seconds(do: Callable[[], Any]) -> float:
    return _timed(do)[0]


# ------------------------------------------------------------------------------------------------------ equality


def gradients(way: Way, /) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses, and the gradient of every parameter of the hypernetwork."""
    way.optimiser.zero_grad(set_to_none=True)
    losses = way.backward()
    found = {name: p.grad for name, p in way.mend.named_parameters() if p.grad is not None}
    way.optimiser.zero_grad(set_to_none=True)
    return losses, found


def largest_error(
    expected: tuple[dict[str, float], dict[str, Tensor]], found: tuple[dict[str, float], dict[str, Tensor]], /
) -> float:
    """The largest error of a loss (relative; in nats below one nat) or of a parameter's gradient (relative, in norm);
    infinite where something is missing."""
    if any(a.keys() != b.keys() for a, b in zip(expected, found, strict=True)):
        return float("inf")
    errors = [abs(found[0][role] - value) / max(abs(value), 1.0) for role, value in expected[0].items()]
    errors += [_distance(found[1][name], value) for name, value in expected[1].items()]
    return max(error if error == error else float("inf") for error in errors)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------ measuring


def compare(base: BaseModel, s: Settings, examples: Sequence[EditExample], /) -> dict[str, Any]:
    """Equality, speed and operations of every way to train, and of an edit, on one base model."""
    h = recipe(s, base)
    chosen, rows = draw(base, h, examples)
    mend = make_mend(base, h, rows)
    own = {True: plain_adam(mend), False: make_optimiser(mend, h)}
    ways = {n: Way(base, mend, rows, savings=use, optimiser=own[use is None]) for n, use in WAYS.items()}
    errors, flop, expected = {}, {}, None
    for name, way in ways.items():
        counted = name in (TEXTBOOK, KIT)  # the counter's hooks do not go with all that the others do
        with FlopCounterMode(display=False) if counted else nullcontext() as counter:
            found = gradients(way)
        flop[name] = counter.get_total_flops() / len(rows) if counted else None
        expected = expected or found
        errors[name] = largest_error(expected, found)
        logger.info("%s, %s: largest error %.1e", base.name, name, errors[name])
    del expected, found
    turns, rates = [], []
    for turn in range(s.repeats):
        turns.append({name: _seconds(way.step) / len(rows) for name, way in ways.items()})
        fresh = Way(base, mend, rows, savings=Savings(), optimiser=None)
        turns[-1] |= {f"{cache} cache": seconds / len(rows) for cache, seconds in fresh.seconds.items()}
        rates.append(matmul_rate())
        logger.info("%s: turn %d of %d", base.name, turn + 1, s.repeats)
    edit, errors["edit"] = edits(base, mend, chosen, s.repeats)
    tolerance = TOLERANCE.get(base.dtype, TOLERANCE[torch.float32])
    rate = statistics.median(rates)
    train = {name: _figures(turns, name, flop[name], rate) for name in ways}
    return {
        "train_ratio": train[KIT]["ratio"],
        "edit_ratio": edit["ratio"],
        "equal": all(error <= tolerance for error in errors.values()),
        "error": errors,
        "tolerance": tolerance,
        "train": train,
        "edit": edit,
        "caches": _caches(turns, train),
        "matmul_gflop_per_s": rate / 1e9,
        "workload": _workload(base, mend, rows),
    }


def _figures(turns: Sequence[Mapping[str, float]], name: str, flop: float | None, rate: float) -> dict[str, float]:
    """Of one way to train; `ratio` is how many times the textbook's speed it has."""
    seconds = statistics.median(turn[name] for turn in turns)
    figures = {"edits_per_second": 1 / seconds, "seconds_per_edit": seconds}
    figures["ratio"] = statistics.median(turn[TEXTBOOK] / turn[name] for turn in turns)
    if flop is not None:
        figures |= {"gflop_per_edit": flop / 1e9, "share_of_matmul_rate": flop / seconds / rate}
    return figures


def _caches(turns: Sequence[Mapping[str, float]], train: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Seconds per edit to fill each cache, and the epochs after which that is saved (None: never)."""
    out: dict[str, Any] = {}
    for cache in ("trunk", "factor"):
        cost = statistics.median(turn["trunk cache" if cache == "trunk" else "factors cache"] for turn in turns)
        saved = train[f"without {cache} cache"]["seconds_per_edit"] - train[KIT]["seconds_per_edit"]
        out |= {f"{cache}_seconds_per_edit": cost, f"{cache}_pays_after_epochs": cost / saved if saved > 0 else None}
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
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(3))


def edits(
    base: BaseModel, mend: MEND, examples: Sequence[EditExample], repeats: int, /
) -> tuple[dict[str, float], float]:
    """Seconds from an example to a model that answers edited: the textbook's, the kit's, and the kit's per edit where
    all examples are edited at once and independently; and the largest error of an edited model's logits."""
    edit_in_turn(base, mend, examples[0], examples)  # warms up
    found = [edit_in_turn(base, mend, examples[i % len(examples)], examples) for i in range(max(5, repeats))]
    turns = [seconds for seconds, _ in found]
    figures: dict[str, float] = {f"{name}_seconds": statistics.median(turn[name] for turn in turns) for name in EDITS}
    for ratio, name in (("ratio", KIT), ("batched_ratio", BATCHED)):
        figures[ratio] = statistics.median(turn[TEXTBOOK] / turn[name] for turn in turns)
    return figures | {"edits": len(turns)}, max(error for _, error in found)


@torch.no_grad()
def edit_in_turn(
    base: BaseModel, mend: MEND, example: EditExample, several: Sequence[EditExample], /
) -> tuple[dict[str, float], float]:
    """Seconds of each way to make one edit, and the error of the kit's edited logits."""
    editor, seconds = MENDEditor(base, mend), {}
    text = editor.tokens(example)
    batch = textbook.collate([text], base.pad_id, base.device)
    seconds[TEXTBOOK], clean = _timed(lambda: textbook.put(base, plain_edit(base, mend, example)))
    expected = textbook.logits(base, batch, {})[batch.scored]
    textbook.put(base, clean)
    seconds[KIT], edit = _timed(lambda: editor.edit(example).apply())
    error = _distance(textbook.logits(base, batch, {})[batch.scored], expected)
    edit.undo()
    taken, handles = _timed(lambda: attach(base, editor.updates([editor.tokens(e) for e in several])))
    for handle in handles:
        handle.remove()
    return seconds | {BATCHED: taken / len(several)}, error


def plain_edit(base: BaseModel, mend: MEND, example: EditExample) -> textbook.Weights:
    """The textbook's edited weights."""
    return textbook.edited_weights(base, mend, edit_tokens(base, mend.hparams, example))


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = do()
    return time.perf_counter() - start, value


def memory(s: Settings, name: str, /) -> dict[str, float]:
    """Peak memory (GB) of two steps of one way to train, in the process that runs this and nothing else.

    `above_gb` is the whole peak, caches included, above the base model; `training_peak_gb` that after the caches of
    frozen values were filled and, if the model can, everything below the edit sites was released.
    """
    base = open_base(s)
    h, before = recipe(s, base), _restart_peak()
    _, rows = draw(base, h, read_examples("facts:train"))
    textbook_way = WAYS[name] is None
    mend = make_mend(base, h, rows)
    way = Way(
        base, mend, rows, savings=WAYS[name], optimiser=plain_adam(mend) if textbook_way else make_optimiser(mend, h)
    )
    release = getattr(base, "release_trunk", None)
    if release is not None and WAYS[name] == Savings():
        release()
    filled = peak_gb()
    _restart_peak()
    for _ in range(2):
        way.step()
    after = peak_gb()
    peak = max(filled, after)
    return {"base_gb": before, "peak_gb": peak, "above_gb": peak - before, "training_peak_gb": after}


def _restart_peak() -> float:
    """Let the peak start again from what is resident now, which is returned (GB); elsewhere than on Linux the peak so
    far stays, and with it an upper bound."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.warning("this system cannot restart the peak of a process's memory: peaks include loading")
    return peak_gb()


def peak_gb() -> float:
    """Peak resident memory of this process since the last restart, in GB (10⁹ bytes)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9
    except (OSError, StopIteration):
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
    turns = [{count: _seconds(way.step) / s.batch for count, way in ways.items()} for _ in range(s.repeats)]
    return {
        str(count): {
            "seconds_per_edit": statistics.median(turn[count] for turn in turns),
            "gflop_per_edit": flop[count] / 1e9,
        }
        for count in layers
    }


# ------------------------------------------------------------------------------------------------------ in a run


def run_bench(
    models: Sequence[Settings], /, *, deep: Sequence[int] = (), ways_in_memory: Sequence[str] = tuple(WAYS)
) -> dict[str, Any]:
    """Measure each model in processes of its own; see `compare`, `memory` and (under "depths") `depths`."""
    results: dict[str, Any] = {}
    for s in models:
        logger.info("%s: textbook and kit in turn", s.model)
        own = _apart(_compare_facts, s)
        own["memory"] = {}
        for name in ways_in_memory:
            own["memory"][name] = _apart(memory, s, name)
            logger.info("%s: memory of %s measured", s.model, name)
        above = own["memory"][TEXTBOOK]["above_gb"], own["memory"][KIT]["above_gb"]
        results[s.model] = {"memory_ratio": above[0] / above[1], **own, **provenance()}
    if deep:
        logger.info("depths: %s layers", ", ".join(map(str, deep)))
        results["depths"] = _apart(depths, replace(models[0], model=GPT2_XL, width=768), tuple(deep))
    return results


def _compare_facts(s: Settings) -> dict[str, Any]:
    return compare(open_base(s), s, read_examples("facts:train"))


def _apart(do: Callable[..., Any], *args: Any) -> Any:
    """`do(*args)` in a fresh process, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
        return pool.submit(do, *args).result()


def _quiet() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mendkit").setLevel(logging.INFO)
    silence_transformers().__enter__()


def bench_table(results: Mapping[str, Any], /) -> str:
    """The figures for people."""
    lines = []
    for model, own in results.items():
        if model == "depths":
            lines.append("kit, by depth of the model: ms per edit, GFLOP per edit")
            lines += [
                f"  {n:>4} layers {r['seconds_per_edit'] * 1e3:9.1f} {r['gflop_per_edit']:9.2f}" for n, r in own.items()
            ]
            continue
        verdict = "equal" if own["equal"] else "NOT EQUAL"
        lines.append(f"{model}: {verdict} (error at most {max(own['error'].values()):.1e}); textbook over kit:")
        lines.append("  training {train_ratio:.1f}, edit {edit_ratio:.1f}, memory {memory_ratio:.1f}".format(**own))
        lines.append(f"  {'':26}{'edits/s':>9}{'times':>8}{'GB above base':>15}{'training peak':>15}")
        for name, way in own["train"].items():
            line = f"  {name:26}{way['edits_per_second']:9.2f}{way['ratio']:8.1f}"
            if found := own["memory"].get(name):
                line += f"{found['above_gb']:15.2f}{found['training_peak_gb']:15.2f}"
            lines.append(line)
        seconds = [f"{name} {own['edit'][f'{key}_seconds'] * 1e3:.0f} ms" for key, name in EDITS.items()]
        lines.append(f"  one edit: {', '.join(seconds)}")
        for cache in ("trunk", "factor"):
            epochs = own["caches"][f"{cache}_pays_after_epochs"]
            pays = "never pays" if epochs is None else f"pays after {epochs:.1f} epochs"
            lines.append(f"  {cache} cache: {own['caches'][f'{cache}_seconds_per_edit'] * 1e3:.0f} ms per edit, {pays}")
        for name in (TEXTBOOK, KIT):
            way = own["train"][name]
            share = f"{way['share_of_matmul_rate']:.0%} of {own['matmul_gflop_per_s']:.0f} GFLOP/s"
            lines.append(f"  {name}: {way['gflop_per_edit']:.1f} GFLOP per edit, {share}")
    return "\n".join(lines)
