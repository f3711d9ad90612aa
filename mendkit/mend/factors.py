"""Gradient factors: the gradient of a linear layer is a sum of rank-one terms (MEND, section 3.1).

For y = W x a token t adds delta_t u_tᵀ to dL/dW, with u_t = x_t and delta_t = dL/dy_t. Hooks read
both, so a weight's orientation does not matter. Tokens are chosen by position (CORRECTNESS row 11).
Axes: e edits, n tokens of all edits (packed), t tokens padded, i layer input, o layer output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import HyperParamError, ModelError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.families import CLASSIFIER
from ..models.sites import Site
from ..models.tokens import TextBatch, Tokens, collate
from ..models.trunk import FrozenTrunk
from .losses import edit_nll, wide

# Texts of one pass that captures factors or layer inputs.
FACTOR_BATCH = 32

# (u, delta) by site name.
SiteTensors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GradientFactors:
    """Factors of one or several edits at a layer, packed; `rows[k]` is the edit of token k.

    They have the scale of a single edit, whatever the batch (CORRECTNESS row 12).
    """

    u: Float[Tensor, "n i"]  # layer inputs
    delta: Float[Tensor, "n o"]  # dL/d(output)
    rows: Int[Tensor, " n"]

    def weight_gradient(self) -> Float[Tensor, "o i"]:
        """dL/dW summed over all edits, in (output, input) orientation."""
        return torch.einsum("no,ni->oi", self.delta, self.u)


# By site name: factors, and layer inputs (n, i).
Factors = dict[str, GradientFactors]
Inputs = dict[str, Tensor]


def capture_factors(
    trunk: FrozenTrunk, texts: Sequence[Tokens], *, tokens: str = "all", reduction: str = "edit"
) -> Factors:
    """Factors of the edit loss of each text, packed in text order: one pass through the suffix.

    `tokens`: "all" that contribute (MEND), or only the "scored" ones, which predict the answer.
    `reduction`: a text's loss is the "sum" of its NLL over the target tokens, else the mean.
    Raises HyperParamError where a site has no "scored" tokens: in an encoder, or under a head that
    reads several.
    """
    return factors_and_losses(trunk, texts, tokens=tokens, reduction=reduction)[0]


def edit_factors(trunk: FrozenTrunk, h: MENDHyperParams, texts: Sequence[Tokens]) -> Factors:
    """`capture_factors` with the tokens and the reduction of the hyperparameters."""
    return capture_factors(trunk, texts, tokens=h.edit_tokens, reduction=h.loss_reduction)


def factors_and_losses(
    trunk: FrozenTrunk, texts: Sequence[Tokens], *, tokens: str = "all", reduction: str = "edit"
) -> tuple[Factors, Float[Tensor, " e"]]:
    """What `capture_factors` gives, and each text's loss (nats)."""
    base = trunk.base
    batch = collate(texts, base.pad_id, base.device)
    losses = torch.empty(0)

    def summed_loss() -> Tensor:
        nonlocal losses
        losses = edit_nll(trunk.suffix(texts, batch), batch.targets, batch.rows, len(batch))
        if reduction == "sum":
            losses = losses * torch.bincount(batch.rows, minlength=len(batch))
        return losses.sum()

    recorded = record_factors(base, summed_loss)
    factors: Factors = {}
    for site in base.sites:
        chosen = _chosen_tokens(base, site, batch, tokens)
        u, delta = recorded[site.name]
        rows = chosen.nonzero()[:, 0]
        factors[site.name] = GradientFactors(_pick(u, chosen), _pick(delta, chosen), rows)
    return factors, losses.detach()


@torch.no_grad()
def capture_inputs(trunk: FrozenTrunk, texts: Sequence[Tokens]) -> Inputs:
    """Inputs u of every site at the scored positions of `texts`, packed; raises as above."""
    batch = collate(texts, trunk.base.pad_id, trunk.base.device)
    with _record(trunk.base) as record:
        trunk.suffix(texts, batch, head=False)  # no site is the output layer
    inputs: Inputs = {}
    for site in trunk.base.sites:
        chosen = _chosen_tokens(trunk.base, site, batch, "scored")
        inputs[site.name] = _pick(record[site.name][0].detach(), chosen)
    return inputs


def record_factors(base: BaseModel, loss: Callable[[], Float[Tensor, ""]]) -> SiteTensors:
    """(u, delta) of every site and position for the scalar that `loss()` computes.

    Raises ModelError naming the sites that the scalar does not depend on.
    """
    with torch.enable_grad(), _record(base) as record:
        scalar = loss()
        outputs = [output for _, output in record.values()]
        deltas = torch.autograd.grad(scalar, outputs, allow_unused=True) if outputs else ()
    by_name = dict(zip(record, deltas, strict=True))
    outside = [site.name for site in base.sites if by_name.get(site.name) is None]
    if outside:
        raise ModelError(
            f"{', '.join(outside)}: the answer does not depend on it; "
            "leave it out of `inner_params`"
        )
    return {site.name: (record[site.name][0].detach(), by_name[site.name]) for site in base.sites}


@contextmanager
def _record(base: BaseModel) -> Iterator[SiteTensors]:
    """Within the context every site's (input, output) is recorded, the graph starting at outputs.
    Raises ModelError for a layer that runs twice, as ALBERT's do.
    """
    seen: SiteTensors = {}

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name in seen:
            raise ModelError(
                f"{name} is used more than once in a pass: its factors are not one layer's; "
                "edit another"
            )
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        seen[name] = (args[0], output)
        return output

    with ExitStack() as stack:
        for site in base.sites:
            handle = base.site_module(site).register_forward_hook(partial(hook, site.name))
            stack.enter_context(handle)
        yield seen


def _chosen_tokens(
    base: BaseModel, site: Site, batch: TextBatch, tokens: str
) -> Bool[Tensor, "e t"]:
    """The tokens, of those that the site sees, whose terms are kept (`capture_factors`)."""
    in_encoder = base.sees_encoder(site)
    if tokens == "scored":
        pooled = base.head is not None and base.head.position is None
        if pooled or in_encoder:
            why = "an encoder's tokens predict nothing"
            if pooled:
                why = "the classifier's head reads several tokens"
            raise HyperParamError(
                f"edit_tokens: scored has no meaning for {site.name}: {why}; "
                "set `edit_tokens: all`, or edit other layers (`inner_params`)"
            )
    if tokens == "scored" or site.scored_only:
        return batch.scored
    if base.family == CLASSIFIER or in_encoder:
        return batch.attention_mask.bool()
    # A token of a causal model counts if a scored position of its text is at it or after it.
    return batch.scored.flip(1).cumsum(1).flip(1) > 0


def _pick(values: Tensor, chosen: Bool[Tensor, "e t"]) -> Float[Tensor, "n d"]:
    """The chosen tokens' values, packed; some layers see rows and positions as one axis."""
    return wide(values.to(chosen.device).reshape(*chosen.shape, -1)[chosen])


def as_one_loss(factors: Factors, texts: Sequence[Tokens]) -> Factors:
    """Factors of the mean over the target tokens of all edits (`loss_reduction: batch`)."""
    counts = torch.tensor([float(len(text.targets)) for text in texts])
    share = counts / counts.sum()
    scaled: Factors = {}
    for name, f in factors.items():
        scaled[name] = replace(f, delta=f.delta * share.to(f.delta)[f.rows, None])
    return scaled


class FactorCache:
    """Factors by text: kept within `cache_bytes`, recomputed from the trunk beyond it."""

    def __init__(self, trunk: FrozenTrunk, hparams: MENDHyperParams) -> None:
        self.trunk, self.hparams, self.budget = trunk, hparams, hparams.cache_bytes
        self.bytes = 0
        self.kept: dict[Tokens, SiteTensors] = {}

    def fill(
        self, texts: Sequence[Tokens], report: Callable[[int, int], None] = lambda done, of: None
    ) -> None:
        """Compute and keep factors, shortest texts first, until the budget is spent."""
        order = sorted(set(texts), key=lambda text: (len(text.ids), text.key))
        for at in range(0, len(order) if self.budget else 0, FACTOR_BATCH):
            for text, parts in self._compute(order[at : at + FACTOR_BATCH]).items():
                size = sum(u.nbytes + delta.nbytes for u, delta in parts.values())
                if self.bytes + size > self.budget:
                    return
                self.kept[text] = parts
                self.bytes += size
            report(min(at + FACTOR_BATCH, len(order)), len(order))

    def get(self, texts: Sequence[Tokens]) -> Factors:
        """Factors of some texts, packed: edit k of the result is `texts[k]`."""
        missing = [text for text in texts if text not in self.kept]
        known = self.kept | self._compute(missing)
        factors: Factors = {}
        for site in self.trunk.base.sites:
            us, deltas = zip(*(known[text][site.name] for text in texts), strict=True)
            counts = torch.tensor([len(u) for u in us])
            u, rows = torch.cat(us), torch.arange(len(us)).repeat_interleave(counts)
            factors[site.name] = GradientFactors(u, torch.cat(deltas), rows.to(u.device))
        return factors

    def _compute(self, texts: Sequence[Tokens]) -> dict[Tokens, SiteTensors]:
        """u and delta of each text by site: views of those of the batch."""
        by_text: dict[Tokens, SiteTensors] = {text: {} for text in texts}
        if not texts:
            return by_text
        for name, f in edit_factors(self.trunk, self.hparams, texts).items():
            counts = torch.bincount(f.rows, minlength=len(texts)).tolist()
            parts = zip(texts, f.u.split(counts), f.delta.split(counts), strict=True)
            for text, u, delta in parts:
                by_text[text][name] = u, delta
        return by_text
