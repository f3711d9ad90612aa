"""Conformance: the published algorithm's numbers, recorded in folders of reference vectors, against ours.

A folder holds a tiny base model (`config.json`, `base_model.safetensors`), an archive as published code writes it, and
`vectors.safetensors` with `meta.json`: batches, factors, updates, logits, scalars, and the losses of training from
`init/*`. Everything is read from the folder (layers, structure, number of edits); the code under test is the kit's own
import, factor capture, hypernetwork, side branches and losses. Where a text has no offsets to tell which tokens
contribute, the recorded rule selects them: a token counts if neither its u nor its delta is exactly zero.
Axes: n texts, t padded tokens, v vocabulary (or one logit), s scored positions.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .edit import Updates, side_branches
from .errors import DataError, HyperParamError, ModelError
from .factors import Factors, GradientFactors, record_factors
from .foreign import from_foreign, read_foreign
from .hparams import MENDHyperParams
from .losses import edit_nll, locality_kl, two_classes
from .mend import MEND
from .models import BaseModel
from .sites import resolve_sites

TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-4
FILES = ("config.json", "base_model.safetensors", "meta.json", "vectors.safetensors", "archive.pt")


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute error relative to the largest entry recorded."""

    name: str
    error: float
    tolerance: float
    n: int  # numbers compared

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


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

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
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
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
        return self.model(**inputs, use_cache=False).logits

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Float[Tensor, "s v"], Int[Tensor, " s"], Tensor]:
        """Logits that predict labels, these labels, and each one's text."""
        if logits.dim() == 2:  # classes
            rows = torch.arange(len(logits))
            return (two_classes(logits) if logits.shape[1] == 1 else logits), batch.labels.flatten(), rows
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
            mask: Bool[Tensor, "n t"] = batch.labels != -100 if self.seq2seq else batch.attention_mask.bool()
            before, after = before[mask], after[mask]
        return locality_kl(before, after, torch.zeros(len(before), dtype=torch.long), 1)[0]

    def scalars(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """The recorded scores: accuracy counts texts whose every scored token is right."""
        chosen, targets, rows = self.scored(logits, batch)
        log_prob = chosen.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        wrong = torch.bincount(rows[chosen.argmax(-1) != targets], minlength=len(logits)) > 0
        values = {"acc": float((~wrong).double().mean()), "log_prob": float(log_prob.mean())}
        return values | {"prob": float(log_prob.exp().mean()), "nll": -values["log_prob"], "n_tokens": len(targets)}

    def factors(self, batch: Batch) -> tuple[dict[str, tuple[Tensor, Tensor]], Factors]:
        """u and delta of the edit loss at every position, and packed as one edit from the positions that count."""
        whole = record_factors(self, lambda: self.nll(self.logits(batch), batch))
        packed: Factors = {}
        for name, (u, delta) in whole.items():
            keep = (u != 0).any(-1) & (delta != 0).any(-1)
            packed[name] = GradientFactors(u[keep], delta[keep], torch.zeros(int(keep.sum()), dtype=torch.long))
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
    model.to(next(iter(weights.values())).dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    stored = {value.data_ptr() for name, value in model.state_dict().items() if name in weights}
    absent = [name for name in missing if model.state_dict()[name].data_ptr() not in stored]  # not tied to another
    if absent or unexpected:
        raise ModelError(f"{folder}: base_model.safetensors does not fit config.json: {[*absent, *unexpected][:3]}")
    return ReferenceModel(model, inner_params, name=folder.name)


def conformance(folder: str | Path) -> tuple[Check, ...]:
    """Compare everything that a folder records. Raises DataError if it is no folder of reference vectors."""
    folder = Path(folder)
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise DataError(f"{folder}: no folder of reference vectors, it lacks {', '.join(absent)}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        vectors = load_file(folder / "vectors.safetensors")
        names, known = tuple(meta["inner_params"]), set(MENDHyperParams.__dataclass_fields__)
        settings = {key: value for key, value in meta["hparams"].items() if key in known}
        h = MENDHyperParams(model_name=folder.name, inner_params=names, **settings)
        base = load_reference_model(folder, names)
        run = _Run(base, h, vectors, meta)
        final = {name.removeprefix("final/"): v for name, v in vectors.items() if name.startswith("final/")}
        mend = from_foreign(read_foreign(folder / "archive.pt").state, base.sites, h)
        same = _state_difference(mend, from_foreign(final, base.sites, h))
        return (Check("archive", same, 0.0, len(final)), *run.evaluation(mend), *run.training())
    except (KeyError, json.JSONDecodeError, SafetensorError, HyperParamError) as error:
        raise DataError(f"{folder}: not the layout of reference vectors: {error!r}") from None


def _state_difference(a: MEND, b: MEND) -> float:
    ours, theirs = a.state_dict(), b.state_dict()
    return float(any(not torch.equal(ours[name], theirs[name]) for name in ours))


class _Run:
    """One folder's comparisons."""

    def __init__(
        self, base: ReferenceModel, h: MENDHyperParams, vectors: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> None:
        self.base, self.h, self.vectors, self.meta = base, h, vectors, meta

    def batch(self, role: str) -> Batch:
        """A batch as recorded."""
        return Batch(*(self.vectors[f"{role}/{name}"] for name in ("input_ids", "attention_mask", "labels")))

    def check(self, name: str, ours: Mapping[str, Tensor], prefix: str) -> Check:
        """Each of our tensors against the one recorded under `prefix` and its key; the worst counts."""
        errors = [relative_error(value, self.vectors[f"{prefix}{key}"]) for key, value in ours.items()]
        return Check(name, max(errors), TOLERANCE, sum(value.numel() for value in ours.values()))

    @torch.no_grad()
    def evaluation(self, mend: MEND) -> Iterator[Check]:
        """Factors, updates, logits and scalars of the trained hypernetwork."""
        base, outer, loc = self.base, self.batch("eval/outer"), self.batch("eval/loc")
        whole, factors = base.factors(self.batch("eval/inner"))
        yield self.check("factors: x", {f"{name}/x": u for name, (u, _) in whole.items()}, "eval/factors/")
        yield self.check("factors: delta", {f"{name}/delta": d for name, (_, d) in whole.items()}, "eval/factors/")
        updates = mend(factors, 1)
        yield self.check("updates", self.dense(updates), "eval/update/")
        logits = {}
        for time, edited in (("pre", {}), ("post", updates)):
            with side_branches(base, edited) if edited else nullcontext():
                logits |= {f"{time}_logits_outer": base.logits(outer), f"{time}_logits_loc": base.logits(loc)}
        for name, value in logits.items():
            yield self.check(name.replace("_", " "), {name: value}, "eval/")
        with side_branches(base, updates):
            _, second = base.factors(self.batch("eval/inner_second"))
        yield self.check("second updates", self.dense(mend(second, 1)), "eval/update_second/")
        for time in ("pre", "post"):
            ours = base.scalars(logits[f"{time}_logits_outer"], outer)
            yield _scalars(f"scalars {time}", ours, self.meta[f"eval_{time}"], TOLERANCE)
        kl = float(base.kl(logits["pre_logits_loc"], logits["post_logits_loc"], loc))
        yield _scalars("locality KL", {"kl": kl}, {"kl": self.meta["eval_kl_loc"]}, TOLERANCE)

    @torch.no_grad()
    def training(self) -> Iterator[Check]:
        """Losses of the micro-batches before the first optimiser step, from `init/*`, statistics running."""
        state = {name.removeprefix("init/"): v for name, v in self.vectors.items() if name.startswith("init/")}
        mend, base, recorded = from_foreign(state, self.base.sites, self.h), self.base, self.meta["losses"]
        steps = self.meta.get("optimizer_steps_after") or [[len(recorded) - 1]]
        ours: dict[str, list[float]] = {"edit": [], "loc": [], "total": []}
        for step in range(steps[0][0] + 1):
            inner, outer, loc = (self.batch(f"train/{step}/{role}") for role in ("inner", "outer", "loc"))
            updates = mend(base.factors(inner)[1], 1, gather=self.h.inner_params)
            before = base.logits(loc)
            with side_branches(base, updates):
                edit = float(base.nll(base.logits(outer), outer))
                kl = float(base.kl(before, base.logits(loc), loc))
            total = self.h.cedit * edit + self.h.cloc * kl
            for name, value in (("edit", edit), ("loc", kl), ("total", total)):
                ours[name].append(value)
        for name, values in ours.items():
            pairs = zip(values, (float(row[name]) for row in recorded), strict=False)
            errors = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
            yield Check(f"training loss: {name}", max(errors), LOSS_TOLERANCE, len(errors))

    def dense(self, updates: Updates) -> dict[str, Tensor]:
        """What the updates add, in each parameter's own orientation."""
        transposed = {site.name: site.transposed for site in self.base.sites}
        return {n: (u.dense().T if transposed[n] else u.dense()) for n, u in updates.items()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest entry of `theirs`; infinite for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours.double() - theirs.double()).abs().max()
    return float(difference / theirs.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _scalars(name: str, ours: Mapping[str, float], theirs: Mapping[str, float], tolerance: float) -> Check:
    """Scalars, each relative to itself."""
    errors = [abs(ours[key] - value) / (abs(value) or 1.0) for key, value in theirs.items() if key in ours]
    return Check(name, max(errors), tolerance, len(errors))


def conformance_table(results: Mapping[str, tuple[Check, ...]]) -> str:
    """Every comparison of every folder as text."""
    lines = [f"{'folder':24}{'comparison':24}{'max relative error':>18}{'tolerance':>11}{'numbers':>9}"]
    for folder, checks in results.items():
        for check in checks:
            mark = "" if check.passed else "  MISS"
            row = f"{check.error:>18.1e}{check.tolerance:>11.0e}{check.n:>9,}{mark}"
            lines.append(f"{folder:24}{check.name:24}{row}")
    misses = sum(not check.passed for checks in results.values() for check in checks)
    total = sum(map(len, results.values()))
    lines.append(f"{total - misses} of {total} comparisons within tolerance")
    return "\n".join(lines)
