"""Families of models, told apart by what they are made of and by short probes, never by a class's name.

- causal: predicts a text's next token;
- seq2seq: an encoder reads the prompt, a decoder writes the answer;
- classifier: a head of a few logits instead of a vocabulary; its answer is the name of a class. One logit z counts as
  the two classes with logits [0, z] (`two_classes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError, ModelError
from .sites import Site, find_stacks

CAUSAL, SEQ2SEQ, CLASSIFIER = "causal", "seq2seq", "classifier"
ONE_LOGIT = (("REFUTES", "false", "0"), ("SUPPORTS", "true", "1"))
"""What the classes 0 and 1 of a one-logit classifier are called; the first name is the one it answers with."""


def family_of(model: PreTrainedModel) -> str:
    """`CAUSAL`, `SEQ2SEQ` or `CLASSIFIER`."""
    if model.get_output_embeddings() is None:
        return CLASSIFIER
    return SEQ2SEQ if getattr(model.config, "is_encoder_decoder", False) else CAUSAL


@dataclass(frozen=True)
class Labels:
    """The classes of a classifier by name."""

    names: tuple[str, ...]  # by class, as the model answers
    ids: Mapping[str, int]  # every spelling in lower case

    def id(self, label: str) -> int:
        """The class of a label, in any case. Raises DataError for an unknown one."""
        found = self.ids.get(label.strip().lower())
        if found is None:
            legal = ", ".join(sorted(self.ids, key=self.ids.__getitem__))
            raise DataError(
                f"label {label!r} is none of this classifier's; legal labels, in any case: {legal}"
            )
        return found


@dataclass(frozen=True)
class Head:
    """A classifier's head: its classes, and the one position of a text that it reads."""

    labels: Labels
    position: int | None  # 0 the first token, -1 the last, None if it reads several


def probe_head(model: PreTrainedModel, ids: Int[Tensor, "1 t"]) -> Head:
    """Watch a classifier read one text: how many logits does it give, and on which positions of the last block's
    output do they depend? Raises ModelError for several labels at once, or classes without names."""
    stacks, seen = find_stacks(model), []

    def start_here(_: nn.Module, __: Any, output: Any) -> Any:
        rest = output[1:] if isinstance(output, tuple) else None
        seen.append((output if rest is None else output[0]).detach().requires_grad_())
        return seen[-1] if rest is None else (seen[-1], *rest)

    handles = [list(stacks.values())[-1][-1].register_forward_hook(start_here)] if stacks else []
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            grads = (
                torch.autograd.grad(logits[0, 0], seen[-1:], allow_unused=True) if seen else [None]
            )
    finally:
        for handle in handles:
            handle.remove()
    used = (
        []
        if grads[0] is None
        else grads[0].reshape(ids.shape[1], -1).any(1).nonzero()[:, 0].tolist()
    )
    positions = {(0,): 0, (ids.shape[1] - 1,): -1} if ids.shape[1] > 1 else {}
    return Head(_labels(model, logits.shape[1]), positions.get(tuple(used)))


def _labels(model: PreTrainedModel, n: int) -> Labels:
    config = model.config
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ModelError(
            "a classifier of several labels at once is not supported; give one whose classes exclude others"
        )
    if n == 1:
        spelt = {name.lower(): i for i, names in enumerate(ONE_LOGIT) for name in names}
        return Labels(tuple(names[0] for names in ONE_LOGIT), spelt)
    named = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    if set(named) != set(range(n)):
        raise ModelError(
            f"the classifier has {n} logits, its config's id2label {len(named)} names; set one for each"
        )
    also = {
        str(name).lower(): int(i) for name, i in (config.label2id or {}).items() if 0 <= int(i) < n
    }
    return Labels(
        tuple(named[i] for i in range(n)), also | {name.lower(): i for i, name in named.items()}
    )


def start_id(model: PreTrainedModel) -> int:
    """The token that a decoder starts with. Raises ModelError if the checkpoint does not tell."""
    for settings in (model.config, model.generation_config):
        start = getattr(settings, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise ModelError(
        "the model's config has no decoder_start_token_id; set it (T5: its padding token)"
    )


@torch.no_grad()
def encoder_sites(model: PreTrainedModel, sites: Sequence[Site], token: int) -> frozenset[str]:
    """The sites of a sequence-to-sequence model that see the encoder's positions: its layers, and the decoder's keys
    and values of its output. Told by a probe of three tokens into the encoder and two into the decoder."""
    rows: dict[str, int] = {}

    def watch(site: Site) -> Any:
        return lambda _, args: rows.__setitem__(site.name, args[0].numel() // site.d_in)

    handles = [
        model.get_submodule(site.module).register_forward_pre_hook(watch(site)) for site in sites
    ]
    try:
        ids = torch.full((1, 3), token, device=model.get_input_embeddings().weight.device)
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=ids[:, :2],
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name, count in rows.items() if count == 3)


def two_classes(logits: Float[Tensor, "n 1"]) -> Float[Tensor, "n 2"]:
    """A classifier's one logit as the logits of "no" and "yes": the other losses then hold for it as they are."""
    return torch.cat([torch.zeros_like(logits), logits], 1)
