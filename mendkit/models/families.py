"""Three families of models, told apart by what they are made of, never by a class's name.

- causal: predicts the next token of a text;
- seq2seq: an encoder reads the prompt, a decoder writes the answer;
- classifier: a head of a few logits instead of a vocabulary; an answer is the name of a class.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError, ModelError
from .sites import Site, embedding_matrix, find_stacks, hidden_states, with_states

CAUSAL, SEQ2SEQ, CLASSIFIER = "causal", "seq2seq", "classifier"
ONE_LOGIT = (("REFUTES", "false", "0"), ("SUPPORTS", "true", "1"))
"""What the two classes of a one-logit classifier are called; it answers with the first name."""


def family_of(model: PreTrainedModel) -> str:
    """`CAUSAL`, `SEQ2SEQ` or `CLASSIFIER`. Raises ModelError for a model that reads no tokens."""
    try:
        embedding_matrix(model)
    except (AttributeError, NotImplementedError):
        raise ModelError(f"{type(model).__name__} has no table of token embeddings") from None
    if model.get_output_embeddings() is None:
        return CLASSIFIER
    if getattr(model.config, "is_encoder_decoder", False):
        return SEQ2SEQ
    return CAUSAL


def two_classes(logits: Float[Tensor, "n 1"]) -> Float[Tensor, "n 2"]:
    """One logit z of a classifier as the logits [0, z] of "no" and "yes"."""
    return torch.cat([torch.zeros_like(logits), logits], 1)


@dataclass(frozen=True)
class Labels:
    """The classes of a classifier by name."""

    names: tuple[str, ...]  # by class, as the model answers
    ids: Mapping[str, int]  # every spelling, in lower case

    def id(self, label: str) -> int:
        """The class of a label, in any case. Raises DataError for an unknown label."""
        found = self.ids.get(label.strip().lower())
        if found is None:
            legal = ", ".join(sorted(self.ids, key=self.ids.__getitem__))
            raise DataError(
                f"label {label!r} is none of this classifier's; legal labels, in any case: {legal}"
            )
        return found


@dataclass(frozen=True)
class Head:
    """A classifier's head: its classes, and the position of a text that it reads."""

    labels: Labels
    position: int | None  # 0 the first token, -1 the last, None if it reads several


def probe_head(model: PreTrainedModel, ids: Int[Tensor, "1 t"]) -> Head:
    """Let a classifier read one text, and see on which positions its logits depend.

    Raises ModelError for several labels at once, and for classes without names.
    """
    stacks = find_stacks(model)
    hidden: list[Tensor] = []

    def restart_graph(_: nn.Module, __: Any, output: Any) -> Any:
        # From here on the graph begins anew, at the block's output.
        hidden.append(hidden_states(output).detach().requires_grad_())
        return with_states(output, hidden[-1])

    gradient, length, position = None, ids.shape[1], None
    with ExitStack() as stack, torch.enable_grad():
        if stacks:
            last_block = list(stacks.values())[-1][-1]
            stack.enter_context(last_block.register_forward_hook(restart_graph))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ModelError(f"{type(model).__name__} does not answer with one row of classes")
        if hidden:
            (gradient,) = torch.autograd.grad(logits[0, 0], hidden[-1:], allow_unused=True)
    if gradient is not None and gradient.shape[:2] == (1, length) and length > 1:
        used = gradient[0].any(1).nonzero()[:, 0].tolist()
        position = {(0,): 0, (length - 1,): -1}.get(tuple(used))
    return Head(_labels(model, logits.shape[1]), position)


def _labels(model: PreTrainedModel, count: int) -> Labels:
    config = model.config
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ModelError(
            "a classifier of several labels at once is not supported; "
            "give one whose classes exclude each other"
        )
    if count == 1:
        no, yes = ONE_LOGIT
        ids = dict.fromkeys(map(str.lower, no), 0) | dict.fromkeys(map(str.lower, yes), 1)
        return Labels((no[0], yes[0]), ids)
    named = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    if set(named) != set(range(count)):
        raise ModelError(
            f"the classifier has {count} logits, its config's id2label {len(named)} names; "
            "set one name for each"
        )
    ids = {}
    for name, i in [*(config.label2id or {}).items(), *((name, i) for i, name in named.items())]:
        if 0 <= int(i) < count:
            ids[str(name).lower()] = int(i)
    return Labels(tuple(named[i] for i in range(count)), ids)


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
def seen_lengths(
    model: PreTrainedModel,
    sites: Sequence[Site],
    read: Callable[[int], Any],
    possible: Sequence[int],
) -> dict[str, int]:
    """How many of the `possible` numbers of positions of a text each site sees.

    `read(n)` reads the first n of two texts. Raises ModelError for a site that does not see texts ×
    positions in order: where a model pads, pools, reorders or routes them.
    """
    seen: list[dict[str, Tensor]] = [{}, {}]
    # 1. What each site sees of the first text alone, and of both.
    for n, rows in enumerate(seen, start=1):
        with ExitStack() as stack:
            for site in sites:
                keep = partial(_keep_input, rows, site.name)
                module = model.get_submodule(site.module)
                stack.enter_context(module.register_forward_pre_hook(keep))
            read(n)
    # 2. The rows of the first text must be the same in both.
    lengths = {}
    for site in sites:
        alone, both = (rows.get(site.name) for rows in seen)
        for length in possible:
            if alone is not None and both is not None and _in_order(alone, both, length, site.d_in):
                lengths[site.name] = length
        if site.name not in lengths:
            shape = None if both is None else tuple(both.shape)
            raise ModelError(
                f"{site.name}: {type(model).__name__} does not give this layer texts × positions "
                f"in order (two texts of 3 tokens came as {shape}): it pads, pools, reorders or "
                "routes them; edit other layers, or another model"
            )
    return lengths


def _keep_input(rows: dict[str, Tensor], name: str, _: nn.Module, args: Sequence[Tensor]) -> None:
    if args:
        rows[name] = args[0]


def _in_order(alone: Tensor, both: Tensor, length: int, width: int) -> bool:
    """Whether the rows of two texts begin with those of the first text by itself."""
    # 1. Texts and positions may be one axis.
    if both.shape[:-1] not in ((2, length), (2 * length,)) or alone.numel() != length * width:
        return False
    # 2. Rounding depends on the batch, and half precision rounds by a hundredth.
    first, by_itself = both.reshape(2, length, width)[0], alone.reshape(length, width)
    return bool((first - by_itself).abs().max() <= 0.05 * by_itself.abs().max())
