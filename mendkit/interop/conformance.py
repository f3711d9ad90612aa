"""Conformance: numbers that were recorded from published code, against ours.

A folder holds a tiny base model, batches of token ids, and the vectors and scalars that the
published algorithm made of them. Under test are the import of archives, factors, hypernetwork, side
branches and losses. Batches have no offsets that tell which tokens contribute, so the recorded rule
does: those whose u and delta are not exactly zero.
Axes: n texts, t padded tokens, s scored positions, v vocabulary or classes.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import DataError, HyperParamError, ModelError
from ..hparams import MENDHyperParams
from ..mend.factors import Factors, GradientFactors, record_factors
from ..mend.losses import edit_nll, locality_kl
from ..mend.updates import Updates, side_branches
from ..models.base import BaseModel
from ..models.checkpoints import silence_transformers
from ..models.families import CLASSIFIER, SEQ2SEQ
from ..runs import user_path
from .foreign import from_foreign, read_foreign

NUMBER_TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-4
OK, ROUNDING, MISS = "ok", "rounding", "MISS"
FILES = ("config.json", "base_model.safetensors", "meta.json", "vectors.safetensors", "archive.pt")

# A record in float32 is itself off by rounding. Where a tiny model amplifies that beyond the
# tolerance, an error counts as rounding up to so many times our own, and never beyond the limit.
ROUNDING_ALLOWED, ROUNDING_LIMIT = 4.0, 1e-3

# A KL is a sum of differences of log-probabilities, each of which is rounded: so many units of the
# record's precision (in float32 9.5e-7 nats) are no error, however small the KL.
KL_FLOOR_UNITS = 8

RecordedValues = dict[str, dict[str, Tensor]]
"""By comparison: our numbers under the names that the record has for them."""


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute error relative to the largest entry recorded."""

    name: str
    error: float
    tolerance: float
    rounding: float  # how far rounding moves our numbers, by the same measure
    n: int  # numbers compared

    @property
    def verdict(self) -> str:
        """`OK` within the tolerance, else `ROUNDING` or `MISS`; NaN is a miss."""
        if self.error <= self.tolerance:
            return OK
        if self.error <= min(ROUNDING_ALLOWED * self.rounding, ROUNDING_LIMIT):
            return ROUNDING
        return MISS


def compare_folders(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each comparison of each folder, or of the folders inside; raises DataError.

    An error that is no number is None.
    """
    rows = []
    for path in paths:
        inside = sorted(file.parent for file in path.glob("*/meta.json"))
        for folder in inside or [path]:
            for check in check_folder(folder):
                row = asdict(check) | {"folder": str(folder), "verdict": check.verdict}
                if not math.isfinite(check.error):
                    row["error"] = None
                rows.append(row)
    return rows


def conformance_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare_folders` as text."""
    table = pd.DataFrame(rows).to_string(index=False, float_format="{:.1e}".format)
    count = Counter(row["verdict"] for row in rows)
    found = f"{count[OK]} within the tolerance, {count[MISS]} missed"
    rounded = f"{count[ROUNDING]} beyond it by rounding alone"
    return f"{table}\n{len(rows)} comparisons: {found}, {rounded}"


def check_folder(folder: str | Path) -> tuple[Check, ...]:
    """Compare everything that a folder records. Raises DataError for another kind of folder."""
    folder = user_path(folder)
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise DataError(f"{folder}: no folder of reference vectors, it lacks {', '.join(absent)}")
    try:
        with silence_transformers():
            record = Recording(folder)
        return tuple(record.checks(read_foreign(folder / "archive.pt").state))
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, HyperParamError) as error:
        raise DataError(f"{folder}: not the layout of reference vectors: {error!r}") from None


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest of `theirs` or `floor`, whichever is larger.

    Infinite for another shape.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    largest = theirs.double().abs().max().clamp(min=max(floor, torch.finfo(torch.float32).tiny))
    return float((ours.double() - theirs.double()).abs().max() / largest)


# ----------------------------------------------------------------------------------- the recording


class RecordedTexts(NamedTuple):
    """Texts of one role, right-padded; `labels` is -100 where nothing is scored."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    labels: Tensor  # (n, t) aligned with input_ids, (n, t') of a decoder, or (n, 1) classes


class OneLogitClassifier(PreTrainedModel):
    """An encoder with one logit on its pooled output, as the authors' fact checker."""

    config_class = PreTrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.classifier(self.model(**inputs).pooler_output))


def load_recorded_model(folder: Path, inner_params: str | Sequence[str]) -> BaseModel:
    """The folder's base model. Raises ModelError if the weights are not of its configuration."""
    weights = load_file(folder / "base_model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    if "classifier.weight" in weights:
        model = OneLogitClassifier(config)
    else:
        writer: Any = AutoModelForCausalLM
        if config.is_encoder_decoder:
            writer = AutoModelForSeq2SeqLM
        model = writer.from_config(config)
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    model.to(dtype)  # type: ignore[arg-type]  # transformers wraps `to` and loses its type
    try:
        missing, odd = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        missing, odd = [], [str(error)]
    odd += {name for name, _ in model.named_parameters()} & set(missing)  # tied to no other
    if odd:
        raise ModelError(f"{folder}: its weights do not fit config.json: {odd[:3]}")
    # Its texts are token ids, so any tokenizer will do.
    backend = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")
    return BaseModel(model, tokenizer, name=folder.name, inner_params=inner_params)


class Recording:
    """What a folder holds (its tensors, also scalars, by name), and our numbers for the same."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        known = MENDHyperParams.model_fields
        settings = {key: value for key, value in meta["hparams"].items() if key in known}
        settings |= {"model_name": folder.name, "inner_params": tuple(meta["inner_params"])}
        self.hparams = MENDHyperParams(**settings)
        self.tensors = load_file(folder / "vectors.safetensors")
        rows = {name: meta[name] for name in ("eval_pre", "eval_post")}
        rows |= {f"losses/{i}": row for i, row in enumerate(meta["losses"])}
        rows["kl"] = {"loc": meta["eval_kl_loc"]}
        for name, row in rows.items():
            for key, value in row.items():
                self.tensors[f"{name}/{key}"] = torch.tensor(value, dtype=torch.float64)
        # The micro-batch after which the optimiser first stepped.
        steps = meta.get("optimizer_steps_after") or [[self.hparams.accumulate_bs]]
        self.first_step = min(steps[0][0], len(meta["losses"]) - 1)
        self.base = load_recorded_model(folder, self.hparams.inner_params)
        self.family = self.base.family

    def state(self, when: str) -> dict[str, Tensor]:
        """The hypernetwork's state, `init` or `final`."""
        names = [name for name in self.tensors if name.startswith(f"{when}/")]
        return {name.removeprefix(f"{when}/"): self.tensors[name] for name in names}

    def batch(self, role: str) -> RecordedTexts:
        return RecordedTexts(*(self.tensors[f"{role}/{name}"] for name in RecordedTexts._fields))

    def checks(self, archive: Mapping[str, Tensor]) -> Iterator[Check]:
        """Every comparison, the archive's tensors with the recorded ones first."""
        final = self.state("final")
        differ = sum(not torch.equal(final[name], archive[name]) for name in archive)
        yield Check("archive", float(differ), 0.0, 0.0, len(archive))
        kl_floor = KL_FLOOR_UNITS * torch.finfo(self.base.dtype).eps
        values = self.values(archive)
        rounding = self.rounding(archive, values)
        for name, ours in values.items():
            tolerance, floor = NUMBER_TOLERANCE, 0.0
            if name.startswith("training"):
                tolerance = LOSS_TOLERANCE
            if name in ("locality KL", "training loc"):
                floor = kl_floor / tolerance
            # A folder records some of the scores.
            known = [key for key in ours if key in self.tensors or not name.startswith("scalars")]
            error = max(relative_error(ours[key], self.tensors[key], floor) for key in known)
            n = sum(ours[key].numel() for key in known)
            yield Check(name, error, tolerance, rounding[name], n)

    # ------------------------------------------------------------------------------ our numbers

    def logits(self, batch: RecordedTexts) -> Tensor:
        """(n, t, v), (n, t', v) of a decoder, or (n, 2) classes."""
        decoder = None
        if self.family == SEQ2SEQ:
            decoder = self.base.model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
        return self.base.forward(batch.input_ids, batch.attention_mask, decoder)

    def scored(
        self, logits: Tensor, batch: RecordedTexts
    ) -> tuple[Float[Tensor, "s v"], Int[Tensor, " s"], Int[Tensor, " s"]]:
        """Logits that predict labels, the labels, and each one's text."""
        labels = batch.labels
        if self.family == CLASSIFIER:
            return logits, labels.flatten(), torch.arange(len(logits))
        if self.family != SEQ2SEQ:  # a causal model's position predicts the next token
            logits, labels = logits[:, :-1], labels[:, 1:]
        mask = labels != -100
        return logits[mask], labels[mask], mask.nonzero()[:, 0]

    def nll(self, batch: RecordedTexts) -> Float[Tensor, ""]:
        """The recorded edit loss: one mean over all label tokens of the batch."""
        chosen, targets, rows = self.scored(self.logits(batch), batch)
        return edit_nll(chosen, targets, torch.zeros_like(rows), 1)[0]

    def kl(self, before: Tensor, after: Tensor, batch: RecordedTexts) -> Float[Tensor, ""]:
        """The recorded locality loss: one mean over all positions that its mask keeps."""
        if self.family == SEQ2SEQ:
            mask = batch.labels != -100
        elif self.family == CLASSIFIER:
            mask = torch.ones(len(before), dtype=torch.bool)
        else:
            mask = batch.attention_mask.bool()
        rows = torch.zeros(int(mask.sum()), dtype=torch.long)
        return locality_kl(before[mask], after[mask], rows, 1)[0]

    def scores(self, logits: Tensor, batch: RecordedTexts) -> dict[str, Tensor]:
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

    def factors(self, batch: RecordedTexts) -> tuple[dict[str, tuple[Tensor, Tensor]], Factors]:
        """u and delta of the edit loss at every position, and as one edit where they count."""
        everywhere, packed = record_factors(self.base, lambda: self.nll(batch)), {}
        for name, (u, delta) in everywhere.items():
            keep = (u != 0).any(-1) & (delta != 0).any(-1)
            edit = torch.zeros(int(keep.sum()), dtype=torch.long)
            packed[name] = GradientFactors(u[keep], delta[keep], edit)
        return everywhere, packed

    def dense(self, updates: Updates, name: str) -> dict[str, Tensor]:
        """What updates add to each parameter, as it lies in the model."""
        found = {}
        for site in self.base.sites:
            change = updates[site.name].dense()
            found[f"eval/{name}/{site.name}"] = change.T if site.transposed else change
        return found

    @torch.no_grad()
    def values(self, archive: Mapping[str, Tensor]) -> RecordedValues:
        """All that the folder records, computed by us in the base model's dtype."""
        mend = from_foreign(archive, self.base.sites, self.hparams)
        # 1. The update of the edits at once.
        everywhere, factors = self.factors(self.batch("eval/inner"))
        updates = mend(factors, 1)
        found: RecordedValues = {"factors x": {}, "factors delta": {}}
        for name, (u, delta) in everywhere.items():
            found["factors x"][f"eval/factors/{name}/x"] = u
            found["factors delta"][f"eval/factors/{name}/delta"] = delta
        found["updates"] = self.dense(updates, "update")
        # 2. Logits before and after, and a second update on the edited model.
        batches = {role: self.batch(f"eval/{role}") for role in ("outer", "loc")}
        logits = {f"pre {role}": self.logits(batch) for role, batch in batches.items()}
        with side_branches(self.base, updates):
            logits |= {f"post {role}": self.logits(batch) for role, batch in batches.items()}
            second = mend(self.factors(self.batch("eval/inner_second"))[1], 1)
        found["second updates"] = self.dense(second, "update_second")
        # 3. Scores of the edits, and how far other texts have moved.
        for name, value in logits.items():
            when, role = name.split()
            if role == "outer":
                scores = self.scores(value, batches[role])
                found[f"scalars {when}"] = {f"eval_{when}/{key}": x for key, x in scores.items()}
            if self.family == CLASSIFIER:  # the record has one logit, ours are 0 and it
                value = value[:, 1:]
            found[f"{when} logits {role}"] = {f"eval/{when}_logits_{role}": value}
        kl = self.kl(logits["pre loc"], logits["post loc"], batches["loc"])
        return found | {"locality KL": {"kl/loc": kl}} | self.training_losses()

    def training_losses(self) -> RecordedValues:
        """Losses of the micro-batches before the first optimiser step, the statistics running."""
        h, base = self.hparams, self.base
        init = {name: value.to(base.dtype) for name, value in self.state("init").items()}
        mend = from_foreign(init, base.sites, h)
        found: RecordedValues = {"training edit": {}, "training loc": {}, "training total": {}}
        for step in range(self.first_step + 1):
            roles = ("inner", "outer", "loc")
            inner, outer, loc = (self.batch(f"train/{step}/{role}") for role in roles)
            updates = mend(self.factors(inner)[1], 1, gather=h.inner_params)
            before = self.logits(loc)
            with side_branches(base, updates):
                edit, kl = self.nll(outer), self.kl(before, self.logits(loc), loc)
            losses = {"edit": edit, "loc": kl, "total": h.cedit * edit + h.cloc * kl}
            for name, value in losses.items():
                found[f"training {name}"][f"losses/{step}/{name}"] = value
        return found

    @torch.no_grad()
    def rounding(self, archive: Mapping[str, Tensor], values: RecordedValues) -> dict[str, float]:
        """By comparison: how far rounding moves our numbers. Changes the base model's weights.

        That is the larger of two distances from float64's numbers: that of `values`, and that of
        float64's own with weights moved by up to half a unit of the record's precision. One
        processor's rounding alone says little of another's.
        """
        half_unit = torch.finfo(self.base.dtype).eps / 2
        model, generator = self.base.model.double(), torch.Generator().manual_seed(0)
        archive = {name: value.double() for name, value in archive.items()}
        exact = self.values(archive)
        for weight in model.parameters():
            weight += weight * half_unit * (2 * torch.rand(weight.shape, generator=generator) - 1)
        errors = dict.fromkeys(exact, 0.0)
        for found in (values, self.values(archive)):
            for name, numbers in found.items():
                distances = [relative_error(numbers[key], exact[name][key]) for key in numbers]
                errors[name] = max(errors[name], *distances)
        return errors
