"""Conformance: the published algorithm's numbers, recorded in folders, against ours.

A folder holds a tiny base model, an archive as published code writes it, and batches, factors,
updates, logits, scores and the losses of training. Texts have no offsets to tell which tokens
contribute, so the recorded rule does: those whose u and delta are not exactly zero. Axes: n texts,
t padded tokens, s scored positions, v vocabulary (or one logit).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import DataError, HyperParamError, ModelError
from ..hparams import MENDHyperParams
from ..mend.factors import Factors, GradientFactors, record_factors
from ..mend.hypernetwork import MEND
from ..mend.losses import edit_nll, locality_kl
from ..mend.updates import Updates, side_branches
from ..models.base import BaseModel
from ..models.families import two_classes
from ..models.sites import resolve_sites
from .foreign import from_foreign, read_foreign

TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-4
MISS, ROUNDING = "MISS", "rounding"
FILES = ("config.json", "base_model.safetensors", "meta.json", "vectors.safetensors", "archive.pt")

# A record in float32 is itself off by rounding. Where a tiny model amplifies that beyond the
# tolerance, an error counts as rounding up to so many times our own, and never beyond the limit.
ROUNDING_ALLOWED, ROUNDING_LIMIT, ROUNDING_SAMPLES = 4.0, 1e-3, 3

Values = dict[str, dict[str, Tensor]]
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


# ------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Batch:
    """Texts of one role, right-padded; `labels` is -100 where nothing is scored."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    labels: Tensor  # (n, t) aligned with input_ids, (n, t') of a decoder, or (n, 1) classes


@dataclass(frozen=True)
class Record:
    """What a folder holds: tensors and scalars by name, and the hyperparameters."""

    hparams: MENDHyperParams
    tensors: Mapping[str, Tensor]  # scalars are `eval_pre/…`, `eval_post/…`, `kl`, `losses/<i>/…`
    first_step: int  # the micro-batch after which the optimiser first stepped

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises KeyError or a reader's error for another layout."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        known = MENDHyperParams.model_fields
        settings = {key: value for key, value in meta["hparams"].items() if key in known}
        settings |= {"model_name": folder.name, "inner_params": tuple(meta["inner_params"])}
        rows = {f"losses/{i}": row for i, row in enumerate(meta["losses"])}
        rows |= {name: meta[name] for name in ("eval_pre", "eval_post")}
        tensors = load_file(folder / "vectors.safetensors")
        tensors["kl"] = torch.tensor(meta["eval_kl_loc"], dtype=torch.float64)
        for name, row in rows.items():
            for key, value in row.items():
                tensors[f"{name}/{key}"] = torch.tensor(value, dtype=torch.float64)
        hparams = MENDHyperParams(**settings)
        steps = meta.get("optimizer_steps_after") or [[hparams.accumulate_bs]]
        return cls(hparams, tensors, min(steps[0][0], len(meta["losses"]) - 1))

    def state(self, when: str) -> dict[str, Tensor]:
        """The hypernetwork's state, `init` or `final`."""
        names = [name for name in self.tensors if name.startswith(f"{when}/")]
        return {name.removeprefix(f"{when}/"): self.tensors[name] for name in names}

    def batch(self, role: str) -> Batch:
        names = ("input_ids", "attention_mask", "labels")
        return Batch(*(self.tensors[f"{role}/{name}"] for name in names))


class OneLogitClassifier(PreTrainedModel):
    """An encoder with one logit on its pooled output, as the authors' fact checker."""

    config_class = AutoConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        pooled = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return SequenceClassifierOutput(logits=self.classifier(pooled))


class ReferenceModel(BaseModel):
    """A base model whose texts come as batches; without a tokenizer, and so made another way."""

    def __init__(self, model: PreTrainedModel, inner_params: tuple[str, ...], *, name: str) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        self.sites, self.blocks = resolve_sites(model, inner_params), None
        self.seq2seq = bool(model.config.is_encoder_decoder)

    def logits(self, batch: Batch) -> Tensor:
        """(n, t, v), (n, t', v) of a decoder, or (n, 2) classes."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.seq2seq:
            shifted = self.model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
            inputs["decoder_input_ids"] = shifted
        return self.model(**inputs, use_cache=False).logits

    def scored(
        self, logits: Tensor, batch: Batch
    ) -> tuple[Float[Tensor, "s v"], Int[Tensor, " s"], Int[Tensor, " s"]]:
        """Logits that predict labels, these labels, and each one's text."""
        labels = batch.labels
        if logits.dim() == 2:
            return as_classes(logits), labels.flatten(), torch.arange(len(logits))
        if not self.seq2seq:  # a causal model's position predicts the next token
            logits, labels = logits[:, :-1], labels[:, 1:]
        mask = labels != -100
        return logits[mask], labels[mask], mask.nonzero()[:, 0]

    def nll(self, logits: Tensor, batch: Batch) -> Float[Tensor, ""]:
        """The recorded edit loss: one mean over all label tokens of the batch."""
        chosen, targets, rows = self.scored(logits, batch)
        return edit_nll(chosen, targets, torch.zeros_like(rows), 1)[0]

    def kl(self, before: Tensor, after: Tensor, batch: Batch) -> Float[Tensor, ""]:
        """The recorded locality loss: one mean over all positions that its mask keeps."""
        if before.dim() == 2:
            before, after = as_classes(before), as_classes(after)
        else:
            mask = batch.labels != -100 if self.seq2seq else batch.attention_mask.bool()
            before, after = before[mask], after[mask]
        return locality_kl(before, after, torch.zeros(len(before), dtype=torch.long), 1)[0]

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The recorded scores: accuracy counts texts whose every scored token is right."""
        chosen, targets, rows = self.scored(logits, batch)
        log_prob = chosen.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        wrong = torch.bincount(rows[chosen.argmax(-1) != targets], minlength=len(logits))
        return {
            "acc": (wrong == 0).double().mean(),
            "log_prob": log_prob.mean(),
            "nll": -log_prob.mean(),
            "prob": log_prob.exp().mean(),
            "n_tokens": torch.tensor(float(len(targets))),
        }

    def factors(self, batch: Batch) -> tuple[dict[str, tuple[Tensor, Tensor]], Factors]:
        """u and delta of the edit loss at every position, and as one edit where they count."""
        everywhere = record_factors(self, lambda: self.nll(self.logits(batch), batch))
        packed: Factors = {}
        for name, (u, delta) in everywhere.items():
            keep = (u != 0).any(-1) & (delta != 0).any(-1)
            edit = torch.zeros(int(keep.sum()), dtype=torch.long)
            packed[name] = GradientFactors(u[keep], delta[keep], edit)
        return everywhere, packed

    def dense(self, updates: Updates, name: str) -> dict[str, Tensor]:
        """What updates add to each parameter, as it lies in the model, by `<name>/<layer>`."""
        found = {}
        for site in self.sites:
            change = updates[site.name].dense()
            found[f"{name}/{site.name}"] = change.T if site.transposed else change
        return found


def as_classes(logits: Tensor) -> Float[Tensor, "n 2"]:
    """The logits of both classes, also of a classifier with one logit."""
    return two_classes(logits) if logits.shape[1] == 1 else logits


def load_reference_model(folder: Path, inner_params: tuple[str, ...]) -> ReferenceModel:
    """The folder's base model. Raises ModelError if the weights are not of its configuration."""
    weights = load_file(folder / "base_model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        model = AutoModelForSeq2SeqLM.from_config(config)
    elif "classifier.weight" in weights:
        model = OneLogitClassifier(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model.to(next(value.dtype for value in weights.values() if value.is_floating_point()))
    try:
        missing, odd = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{folder}: its weights do not fit config.json: {error}") from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {value.data_ptr() for name, value in parameters.items() if name in weights}
    for name in missing:
        if name in parameters and parameters[name].data_ptr() not in stored:  # tied to no other
            odd.append(name)
    if odd:
        raise ModelError(f"{folder}: its weights do not fit config.json: {odd[:3]}")
    return ReferenceModel(model, inner_params, name=folder.name)


# --------------------------------------------------------------------------------------- comparing


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
        record = Record.read(folder)
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


def _compare(name: str, ours: Mapping[str, Tensor], spread: float, record: Record) -> Check:
    known = [key for key in ours if key in record.tensors or not name.startswith("scalars")]
    error = max(relative_error(ours[key], record.tensors[key]) for key in known)
    tolerance = LOSS_TOLERANCE if name.startswith("training") else TOLERANCE
    return Check(name, error, tolerance, spread, sum(ours[key].numel() for key in known))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest of `theirs`; infinite for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    largest = theirs.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.double() - theirs.double()).abs().max() / largest)


@torch.no_grad()
def recorded_values(base: ReferenceModel, record: Record, archive: Mapping[str, Tensor]) -> Values:
    """All that a folder records, computed by us in the base model's dtype."""
    init = {name: value.to(base.dtype) for name, value in record.state("init").items()}
    trained = from_foreign(archive, base.sites, record.hparams)
    fresh = from_foreign(init, base.sites, record.hparams)
    return _evaluation(base, trained, record) | _training(base, fresh, record)


def _evaluation(base: ReferenceModel, mend: MEND, record: Record) -> Values:
    """Factors, updates, logits and scores of the trained hypernetwork."""
    outer, loc = record.batch("eval/outer"), record.batch("eval/loc")
    everywhere, factors = base.factors(record.batch("eval/inner"))
    updates = mend(factors, 1)
    values: Values = {
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


def _training(base: ReferenceModel, mend: MEND, record: Record) -> Values:
    """Losses of the micro-batches before the first optimiser step, the statistics running."""
    h = record.hparams
    values: Values = {"training edit": {}, "training loc": {}, "training total": {}}
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
    base: ReferenceModel, record: Record, archive: Mapping[str, Tensor], values: Values
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
