"""Conformance: the published algorithm's numbers, recorded in folders of reference vectors, against ours.

A folder holds a tiny base model (`config.json`, `base_model.safetensors`), an archive as published code writes it, and
`vectors.safetensors` with `meta.json`: batches, factors, updates, logits, scalars, and the losses of training from
`init/*`. Everything is read from the folder (layers, structure, number of edits); the code under test is the kit's own
import, factor capture, hypernetwork, side branches and losses. Where a text has no offsets to tell which tokens
contribute, the recorded rule selects them: a token counts if neither its u nor its delta is exactly zero.
Axes: n texts, t padded tokens, v vocabulary (or one logit), s scored positions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
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
ROUNDING_ALLOWED, ROUNDING_LIMIT, ROUNDING_SAMPLES = 4.0, 1e-3, 3
"""A record in float32 is itself as far from the truth as rounding takes it. Where a tiny model amplifies that beyond
the tolerance, an error counts as rounding up to so many times our own, and never beyond the limit."""
FILES = ("config.json", "base_model.safetensors", "meta.json", "vectors.safetensors", "archive.pt")


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute error relative to the largest entry recorded."""

    name: str
    error: float
    tolerance: float
    rounding: float  # how far the record's precision may take our own numbers, by the same measure
    n: int  # numbers compared

    @property
    def verdict(self) -> str:
        """Empty if within the tolerance, else a word; NaN is a miss."""
        if self.error <= self.tolerance:
            return ""
        return (
            ROUNDING
            if self.error <= min(ROUNDING_ALLOWED * self.rounding, ROUNDING_LIMIT)
            else MISS
        )

    @property
    def passed(self) -> bool:
        """Whether the numbers agree as far as the record's precision allows."""
        return self.verdict != MISS


@dataclass(frozen=True)
class Batch:
    """Texts of one role, right-padded; `labels` is -100 where nothing is scored."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    labels: Tensor  # (n, t) aligned with input_ids, (n, t') of a decoder, or (n, 1) classes


class OneLogitClassifier(PreTrainedModel):
    """An encoder with one logit on its pooled output, as the authors' fact checker."""

    config_class = AutoConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's."""
        return self.model.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """One logit for each text."""
        pooled = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return SequenceClassifierOutput(logits=self.classifier(pooled))


class ReferenceModel(BaseModel):
    """A base model whose texts come as ready batches: it has no tokenizer, and nothing below its edits is cached."""

    def __init__(self, model: PreTrainedModel, inner_params: tuple[str, ...], *, name: str) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        self.sites, self.blocks = resolve_sites(model, inner_params), None
        self.seq2seq = bool(model.config.is_encoder_decoder)

    def logits(self, batch: Batch) -> Tensor:
        """(n, t, v), (n, t', v) of a decoder, or (n, 1)."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.seq2seq:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(
                labels=batch.labels
            )
        return self.model(**inputs, use_cache=False).logits

    def scored(
        self, logits: Tensor, batch: Batch
    ) -> tuple[Float[Tensor, "s v"], Int[Tensor, " s"], Tensor]:
        """Logits that predict labels, these labels, and each one's text."""
        if logits.dim() == 2:  # classes
            rows = torch.arange(len(logits))
            return (
                (two_classes(logits) if logits.shape[1] == 1 else logits),
                batch.labels.flatten(),
                rows,
            )
        labels = batch.labels
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
            before, after = (two_classes(x) if x.shape[1] == 1 else x for x in (before, after))
        else:
            mask: Bool[Tensor, "n t"] = (
                batch.labels != -100 if self.seq2seq else batch.attention_mask.bool()
            )
            before, after = before[mask], after[mask]
        return locality_kl(before, after, torch.zeros(len(before), dtype=torch.long), 1)[0]

    def scalars(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The recorded scores: accuracy counts texts whose every scored token is right."""
        chosen, targets, rows = self.scored(logits, batch)
        log_prob = chosen.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        right = torch.bincount(rows[chosen.argmax(-1) != targets], minlength=len(logits)) == 0
        values = {
            "acc": right.double().mean(),
            "log_prob": log_prob.mean(),
            "nll": -log_prob.mean(),
        }
        return values | {
            "prob": log_prob.exp().mean(),
            "n_tokens": torch.tensor(float(len(targets))),
        }

    def dense(self, updates: Updates) -> dict[str, Tensor]:
        """What the updates add, in each parameter's own orientation."""
        transposed = {site.name: site.transposed for site in self.sites}
        return {n: (u.dense().T if transposed[n] else u.dense()) for n, u in updates.items()}

    def factors(self, batch: Batch) -> tuple[dict[str, tuple[Tensor, Tensor]], Factors]:
        """u and delta of the edit loss at every position, and packed as one edit from the positions that count."""
        whole = record_factors(self, lambda: self.nll(self.logits(batch), batch))
        packed: Factors = {}
        for name, (u, delta) in whole.items():
            keep = (u != 0).any(-1) & (delta != 0).any(-1)
            packed[name] = GradientFactors(
                u[keep], delta[keep], torch.zeros(int(keep.sum()), dtype=torch.long)
            )
        return whole, packed


def load_reference_model(folder: Path, inner_params: tuple[str, ...]) -> ReferenceModel:
    """The folder's base model. Raises ModelError if the weights are not those of its configuration."""
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
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{folder}: base_model.safetensors does not fit config.json: {error}"
        ) from None
    own = dict(model.named_parameters(remove_duplicate=False))
    stored = {value.data_ptr() for name, value in own.items() if name in weights}
    absent = [
        name for name in missing if name in own and own[name].data_ptr() not in stored
    ]  # not tied to another
    if absent or unexpected:
        raise ModelError(
            f"{folder}: base_model.safetensors does not fit config.json: {[*absent, *unexpected][:3]}"
        )
    return ReferenceModel(model, inner_params, name=folder.name)


def reference_folders(path: Path) -> list[Path]:
    """The folders of reference vectors inside `path`, or itself if there are none."""
    inside = sorted(file.parent for file in path.glob("*/meta.json"))
    return [path] if (path / "meta.json").is_file() or not inside else inside


def conformance(folder: str | Path) -> tuple[Check, ...]:
    """Compare everything that a folder records. Raises DataError if it is no folder of reference vectors."""
    folder = Path(folder)
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise DataError(f"{folder}: no folder of reference vectors, it lacks {', '.join(absent)}")
    try:
        record = Record.read(folder)
        base = load_reference_model(folder, record.hparams.inner_params)
        archive = read_foreign(folder / "archive.pt").state
        imported = float(set(archive) != set(record.state("final")))
        imported += sum(
            not torch.equal(v, archive[k]) for k, v in record.state("final").items() if k in archive
        )
        checks = [Check("archive", imported, 0.0, 0.0, len(archive))]
        values = recorded_values(base, record, archive)
        spread = rounding(base, record, archive, values)
        checks += [_compare(name, values[name], spread[name], record) for name in values]
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, HyperParamError) as error:
        raise DataError(f"{folder}: not the layout of reference vectors: {error!r}") from None
    return tuple(checks)


@dataclass(frozen=True)
class Record:
    """What a folder holds: tensors and scalars by name, and the hyperparameters."""

    hparams: MENDHyperParams
    tensors: Mapping[
        str, Tensor
    ]  # vectors.safetensors, and `eval_pre/…`, `eval_post/…`, `kl`, `losses/…` as scalars
    first_step: int  # the micro-batch after which the optimiser first stepped

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises KeyError or a reader's own error for another layout."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        known = set(MENDHyperParams.__dataclass_fields__)
        settings = {key: value for key, value in meta["hparams"].items() if key in known}
        h = MENDHyperParams(
            model_name=folder.name, inner_params=tuple(meta["inner_params"]), **settings
        )
        scalars = {
            f"{when}/{k}": v for when in ("eval_pre", "eval_post") for k, v in meta[when].items()
        }
        scalars |= {
            f"losses/{i}/{k}": v for i, row in enumerate(meta["losses"]) for k, v in row.items()
        }
        scalars |= {"kl": meta["eval_kl_loc"]}
        tensors = load_file(folder / "vectors.safetensors")
        tensors |= {
            name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()
        }
        steps = meta.get("optimizer_steps_after") or [
            [h.accumulate_bs]
        ]  # published code: one micro-batch late
        return cls(h, tensors, min(steps[0][0], len(meta["losses"]) - 1))

    def state(self, when: str) -> dict[str, Tensor]:
        """The hypernetwork's state, `init` or `final`."""
        return {
            name.removeprefix(f"{when}/"): v
            for name, v in self.tensors.items()
            if name.startswith(f"{when}/")
        }

    def batch(self, role: str) -> Batch:
        """A batch."""
        return Batch(
            *(self.tensors[f"{role}/{name}"] for name in ("input_ids", "attention_mask", "labels"))
        )


Values = dict[str, dict[str, Tensor]]
"""By comparison: our numbers under the names that the record has for them."""


def recorded_values(base: ReferenceModel, record: Record, archive: Mapping[str, Tensor]) -> Values:
    """All that a folder records, computed by us in the base model's dtype."""
    init = {name: value.to(base.dtype) for name, value in record.state("init").items()}
    trained, fresh = (from_foreign(state, base.sites, record.hparams) for state in (archive, init))
    with torch.no_grad():
        return _evaluation(base, trained, record) | _training(base, fresh, record)


def rounding(
    base: ReferenceModel, record: Record, archive: Mapping[str, Tensor], values: Values
) -> dict[str, float]:
    """By comparison: how far float32 may take our own numbers. Turns the base model to float64.

    The largest distance from the float64 numbers of those in float32, `values`, and of float64 ones whose base weights
    are off by float32's half unit, at random.
    """
    if base.dtype == torch.float64:
        return dict.fromkeys(values, 0.0)
    archive, weights = (
        {name: value.double() for name, value in archive.items()},
        list(base.model.double().parameters()),
    )
    exact, samples, generator = (
        recorded_values(base, record, archive),
        [values],
        torch.Generator().manual_seed(0),
    )
    kept = [weight.clone() for weight in weights]
    for _ in range(ROUNDING_SAMPLES):
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(
                value
                * (1 + 2**-24 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
            )
        samples.append(recorded_values(base, record, archive))
    return {
        name: max(
            relative_error(own[name][key], value)
            for own in samples
            for key, value in exact[name].items()
        )
        for name in values
    }


def _evaluation(base: ReferenceModel, mend: MEND, record: Record) -> Values:
    """Factors, updates, logits and scalars of the trained hypernetwork."""
    outer, loc = record.batch("eval/outer"), record.batch("eval/loc")
    whole, factors = base.factors(record.batch("eval/inner"))
    updates = mend(factors, 1)
    values = {
        "factors x": {f"eval/factors/{name}/x": u for name, (u, _) in whole.items()},
        "factors delta": {
            f"eval/factors/{name}/delta": delta for name, (_, delta) in whole.items()
        },
        "updates": {f"eval/update/{name}": value for name, value in base.dense(updates).items()},
    }
    logits = {}
    for when, edited in (("pre", {}), ("post", updates)):
        with side_branches(base, edited):
            logits[when] = {"outer": base.logits(outer), "loc": base.logits(loc)}
        values |= {
            f"{when} logits {role}": {f"eval/{when}_logits_{role}": x}
            for role, x in logits[when].items()
        }
    with side_branches(base, updates):
        second = mend(base.factors(record.batch("eval/inner_second"))[1], 1)
    values["second updates"] = {
        f"eval/update_second/{name}": value for name, value in base.dense(second).items()
    }
    for when in ("pre", "post"):
        scalars = base.scalars(logits[when]["outer"], outer)
        values[f"scalars {when}"] = {
            f"eval_{when}/{name}": value for name, value in scalars.items()
        }
    return values | {
        "locality KL": {"kl": base.kl(logits["pre"]["loc"], logits["post"]["loc"], loc)}
    }


def _training(base: ReferenceModel, mend: MEND, record: Record) -> Values:
    """Losses of the micro-batches before the first optimiser step, the statistics running."""
    h, values = record.hparams, {f"training {name}": {} for name in ("edit", "loc", "total")}
    for step in range(record.first_step + 1):
        inner, outer, loc = (
            record.batch(f"train/{step}/{role}") for role in ("inner", "outer", "loc")
        )
        updates = mend(base.factors(inner)[1], 1, gather=h.inner_params)
        before = base.logits(loc)
        with side_branches(base, updates):
            edit, kl = base.nll(base.logits(outer), outer), base.kl(before, base.logits(loc), loc)
        for name, value in {"edit": edit, "loc": kl, "total": h.cedit * edit + h.cloc * kl}.items():
            values[f"training {name}"][f"losses/{step}/{name}"] = value
    return values


def _compare(name: str, ours: Mapping[str, Tensor], spread: float, record: Record) -> Check:
    known = [key for key in ours if key in record.tensors or not name.startswith("scalars")]
    return Check(
        name,
        max(relative_error(ours[key], record.tensors[key]) for key in known),
        LOSS_TOLERANCE if name.startswith("training") else TOLERANCE,
        spread,
        sum(ours[key].numel() for key in known),
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest entry of `theirs`; infinite for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours.double() - theirs.double()).abs().max()
    return float(
        difference / theirs.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    )


def conformance_table(results: Mapping[str, Sequence[Check]]) -> str:
    """Every comparison of every folder as text."""
    lines = [
        f"{'folder':20}{'comparison':20}{'max rel. error':>15}{'tolerance':>11}{'float32':>10}{'numbers':>9}"
    ]
    for folder, checks in results.items():
        for check in checks:
            row = (
                f"{check.error:>15.1e}{check.tolerance:>11.0e}{check.rounding:>10.1e}{check.n:>9,}"
            )
            lines.append(f"{folder:20}{check.name:20}{row}  {check.verdict}".rstrip())
    every = [check for checks in results.values() for check in checks]
    count = {word: sum(check.verdict == word for check in every) for word in ("", ROUNDING, MISS)}
    lines.append(
        f"{len(every)} comparisons: {count['']} within the tolerance, {count[MISS]} missed"
    )
    if count[ROUNDING]:
        lines[-1] += (
            f", {count[ROUNDING]} beyond it by rounding alone (float32: how far it takes our own numbers)"
        )
    return "\n".join(lines)
