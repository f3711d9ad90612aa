"""Folders of numbers recorded from published code: a tiny base model, its batches, its vectors.

Texts come as batches without offsets to tell which tokens contribute, so the recorded rule does:
those whose u and delta are not exactly zero. Axes: n texts, t padded tokens, s scored positions,
v vocabulary (or one logit).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import ModelError
from ..hparams import MENDHyperParams
from ..mend.factors import Factors, GradientFactors, record_factors
from ..mend.losses import edit_nll, locality_kl
from ..mend.updates import Updates
from ..models.base import BaseModel
from ..models.families import two_classes
from ..models.sites import resolve_sites


@dataclass(frozen=True)
class RecordedTexts:
    """Texts of one role, right-padded; `labels` is -100 where nothing is scored."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    labels: Tensor  # (n, t) aligned with input_ids, (n, t') of a decoder, or (n, 1) classes


@dataclass(frozen=True)
class Recording:
    """What a folder holds: tensors and scalars by name, and the hyperparameters."""

    hparams: MENDHyperParams
    tensors: Mapping[str, Tensor]  # scalars are `eval_pre/…`, `eval_post/…`, `kl`, `losses/<i>/…`
    first_step: int  # the micro-batch after which the optimiser first stepped

    @classmethod
    def read(cls, folder: Path) -> "Recording":
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

    def batch(self, role: str) -> RecordedTexts:
        names = ("input_ids", "attention_mask", "labels")
        return RecordedTexts(*(self.tensors[f"{role}/{name}"] for name in names))


class OneLogitClassifier(PreTrainedModel):
    """An encoder with one logit on its pooled output, as the authors' fact checker."""

    config_class = PreTrainedConfig

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

    def __init__(
        self, model: PreTrainedModel, inner_params: str | Sequence[str], *, name: str
    ) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        self.sites, self.blocks = resolve_sites(model, inner_params), None
        self.seq2seq = bool(model.config.is_encoder_decoder)

    def logits(self, batch: RecordedTexts) -> Tensor:
        """(n, t, v), (n, t', v) of a decoder, or (n, 2) classes."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.seq2seq:
            shifted = self.model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
            inputs["decoder_input_ids"] = shifted
        return self.model(**inputs, use_cache=False).logits

    def scored(
        self, logits: Tensor, batch: RecordedTexts
    ) -> tuple[Float[Tensor, "s v"], Int[Tensor, " s"], Int[Tensor, " s"]]:
        """Logits that predict labels, these labels, and each one's text."""
        labels = batch.labels
        if logits.dim() == 2:
            return as_classes(logits), labels.flatten(), torch.arange(len(logits))
        if not self.seq2seq:  # a causal model's position predicts the next token
            logits, labels = logits[:, :-1], labels[:, 1:]
        mask = labels != -100
        return logits[mask], labels[mask], mask.nonzero()[:, 0]

    def nll(self, logits: Tensor, batch: RecordedTexts) -> Float[Tensor, ""]:
        """The recorded edit loss: one mean over all label tokens of the batch."""
        chosen, targets, rows = self.scored(logits, batch)
        return edit_nll(chosen, targets, torch.zeros_like(rows), 1)[0]

    def kl(self, before: Tensor, after: Tensor, batch: RecordedTexts) -> Float[Tensor, ""]:
        """The recorded locality loss: one mean over all positions that its mask keeps."""
        if before.dim() == 2:
            before, after = as_classes(before), as_classes(after)
        else:
            mask = batch.labels != -100 if self.seq2seq else batch.attention_mask.bool()
            before, after = before[mask], after[mask]
        return locality_kl(before, after, torch.zeros(len(before), dtype=torch.long), 1)[0]

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


def load_reference_model(folder: Path, inner_params: str | Sequence[str]) -> ReferenceModel:
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
