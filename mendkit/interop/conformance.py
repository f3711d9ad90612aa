"""Conformance: the published algorithm's numbers, recorded in folders, against ours.

Under test are the import of archives, factors, hypernetwork, side branches and losses.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import DataError, HyperParamError
from ..mend.hypernetwork import MEND
from ..mend.updates import side_branches
from .foreign import from_foreign, read_foreign
from .reference import Recording, ReferenceModel, load_reference_model

NUMBER_TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-4
MISS, ROUNDING = "MISS", "rounding"
FILES = ("config.json", "base_model.safetensors", "meta.json", "vectors.safetensors", "archive.pt")

# A record in float32 is itself off by rounding. Where a tiny model amplifies that beyond the
# tolerance, an error counts as rounding up to so many times our own, and never beyond the limit.
ROUNDING_ALLOWED, ROUNDING_LIMIT, ROUNDING_SAMPLES = 4.0, 1e-3, 3

RecordedValues = dict[str, dict[str, Tensor]]
"""By comparison: our numbers under the names that the record has for them."""


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute error relative to the largest entry recorded."""

    name: str
    error: float
    tolerance: float
    rounding: float  # how far the record's precision may take our numbers, by the same measure
    n: int  # numbers compared

    @property
    def verdict(self) -> str:
        """Empty if within the tolerance, else a word; NaN is a miss."""
        if self.error <= self.tolerance:
            return ""
        allowed = min(ROUNDING_ALLOWED * self.rounding, ROUNDING_LIMIT)
        return ROUNDING if self.error <= allowed else MISS

    @property
    def passed(self) -> bool:
        """Whether the numbers agree as far as the record's precision allows."""
        return self.verdict != MISS


def reference_folders(path: Path) -> list[Path]:
    """The folders of reference vectors inside `path`, or itself if there are none."""
    inside = sorted(file.parent for file in path.glob("*/meta.json"))
    return [path] if (path / "meta.json").is_file() or not inside else inside


def conformance(folder: str | Path) -> tuple[Check, ...]:
    """Compare everything that a folder records. Raises DataError for another kind of folder."""
    folder = Path(folder)
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise DataError(f"{folder}: no folder of reference vectors, it lacks {', '.join(absent)}")
    try:
        record = Recording.read(folder)
        base = load_reference_model(folder, record.hparams.inner_params)
        archive, final = read_foreign(folder / "archive.pt").state, record.state("final")
        same = [name for name in final if torch.equal(final[name], archive[name])]
        checks = [Check("archive", float(len(archive) - len(same)), 0.0, 0.0, len(archive))]
        values = recorded_values(base, record, archive)
        spread = rounding(base, record, archive, values)
        for name, ours in values.items():
            checks.append(_compare(name, ours, spread[name], record))
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, HyperParamError) as error:
        raise DataError(f"{folder}: not the layout of reference vectors: {error!r}") from None
    return tuple(checks)


def _compare(name: str, ours: Mapping[str, Tensor], spread: float, record: Recording) -> Check:
    known = [key for key in ours if key in record.tensors or not name.startswith("scalars")]
    error = max(relative_error(ours[key], record.tensors[key]) for key in known)
    tolerance = LOSS_TOLERANCE if name.startswith("training") else NUMBER_TOLERANCE
    return Check(name, error, tolerance, spread, sum(ours[key].numel() for key in known))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest of `theirs`; infinite for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    largest = theirs.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.double() - theirs.double()).abs().max() / largest)


@torch.no_grad()
def recorded_values(
    base: ReferenceModel, record: Recording, archive: Mapping[str, Tensor]
) -> RecordedValues:
    """All that a folder records, computed by us in the base model's dtype."""
    init = {name: value.to(base.dtype) for name, value in record.state("init").items()}
    trained = from_foreign(archive, base.sites, record.hparams)
    fresh = from_foreign(init, base.sites, record.hparams)
    return _evaluation(base, trained, record) | _training(base, fresh, record)


def _evaluation(base: ReferenceModel, mend: MEND, record: Recording) -> RecordedValues:
    """Factors, updates, logits and scores of the trained hypernetwork."""
    outer, loc = record.batch("eval/outer"), record.batch("eval/loc")
    everywhere, factors = base.factors(record.batch("eval/inner"))
    updates = mend(factors, 1)
    values: RecordedValues = {
        "factors x": {f"eval/factors/{name}/x": u for name, (u, _) in everywhere.items()},
        "factors delta": {f"eval/factors/{name}/delta": d for name, (_, d) in everywhere.items()},
        "updates": base.dense(updates, "eval/update"),
    }
    before = {"outer": base.logits(outer), "loc": base.logits(loc)}
    with side_branches(base, updates):
        after = {"outer": base.logits(outer), "loc": base.logits(loc)}
        second = mend(base.factors(record.batch("eval/inner_second"))[1], 1)
    for when, logits in {"pre": before, "post": after}.items():
        for role, value in logits.items():
            values[f"{when} logits {role}"] = {f"eval/{when}_logits_{role}": value}
    values["second updates"] = base.dense(second, "eval/update_second")
    for when, logits in {"pre": before, "post": after}.items():
        scores = base.scores(logits["outer"], outer)
        values[f"scalars {when}"] = {f"eval_{when}/{name}": x for name, x in scores.items()}
    values["locality KL"] = {"kl": base.kl(before["loc"], after["loc"], loc)}
    return values


def _training(base: ReferenceModel, mend: MEND, record: Recording) -> RecordedValues:
    """Losses of the micro-batches before the first optimiser step, the statistics running."""
    h = record.hparams
    values: RecordedValues = {"training edit": {}, "training loc": {}, "training total": {}}
    for step in range(record.first_step + 1):
        roles = ("inner", "outer", "loc")
        inner, outer, loc = (record.batch(f"train/{step}/{role}") for role in roles)
        updates = mend(base.factors(inner)[1], 1, gather=h.inner_params)
        before = base.logits(loc)
        with side_branches(base, updates):
            edit = base.nll(base.logits(outer), outer)
            kl = base.kl(before, base.logits(loc), loc)
        losses = {"edit": edit, "loc": kl, "total": h.cedit * edit + h.cloc * kl}
        for name, value in losses.items():
            values[f"training {name}"][f"losses/{step}/{name}"] = value
    return values


@torch.no_grad()
def rounding(
    base: ReferenceModel, record: Recording, archive: Mapping[str, Tensor], values: RecordedValues
) -> dict[str, float]:
    """By comparison: how far float32 may take our numbers. Turns the base model to float64.

    It is the largest distance from the float64 numbers of `values` in float32, and of float64
    numbers whose base weights are off by float32's half unit, at random.
    """
    if base.dtype == torch.float64:
        return dict.fromkeys(values, 0.0)
    archive = {name: value.double() for name, value in archive.items()}
    weights = list(base.model.double().parameters())
    kept = [weight.clone() for weight in weights]
    exact, samples = recorded_values(base, record, archive), [values]
    generator = torch.Generator().manual_seed(0)
    for _ in range(ROUNDING_SAMPLES):
        for weight, value in zip(weights, kept, strict=True):
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            weight.copy_(value * (1 + 2**-24 * noise))
        samples.append(recorded_values(base, record, archive))
    spread = dict.fromkeys(values, 0.0)
    for sample in samples:
        for name in values:
            for key, value in exact[name].items():
                spread[name] = max(spread[name], relative_error(sample[name][key], value))
    return spread


def conformance_table(results: Mapping[str, Sequence[Check]]) -> str:
    """Every comparison of every folder as text."""
    heads = ("folder", "comparison", "max rel. error", "tolerance", "float32", "numbers")
    lines = ["{:20}{:20}{:>15}{:>11}{:>10}{:>9}".format(*heads)]
    count: Counter[str] = Counter()
    for folder, checks in results.items():
        for check in checks:
            count[check.verdict] += 1
            line = f"{folder:20}{check.name:20}{check.error:>15.1e}{check.tolerance:>11.0e}"
            line += f"{check.rounding:>10.1e}{check.n:>9,}  {check.verdict}"
            lines.append(line.rstrip())
    total = f"{count.total()} comparisons: {count['']} within the tolerance, {count[MISS]} missed"
    if count[ROUNDING]:
        total += f", {count[ROUNDING]} beyond it by rounding alone"
        total += " (float32: how far it takes our own numbers)"
    return "\n".join([*lines, total])
