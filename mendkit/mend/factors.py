"""Gradient factors: the gradient of a linear layer is a sum of rank-one terms (MEND, section 3.1).

For y = W x a token t contributes delta_t u_tᵀ to dL/dW, with u_t = x_t the layer's input and delta_t = dL/dy_t. Both
are read by hooks on the layer, so the orientation of its weight does not matter here. Tokens are chosen by position,
never by comparing floats with zero (CORRECTNESS row 11). Of a causal model or a decoder a token counts if it precedes
or is the last scored position of its text; of an encoder, a classifier's too, every token counts; in the last block's
MLP only scored positions can receive a gradient (`Site.scored_only`).
Axes: e edits, n tokens of all edits (packed), t tokens padded, i layer input, o layer output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import HyperParamError, ModelError
from ..models.base import BaseModel
from ..models.families import CLASSIFIER
from ..models.sites import Site
from ..models.tokens import TextBatch, Tokens, collate
from ..models.trunk import FrozenTrunk
from .losses import edit_nll, wide


@dataclass(frozen=True)
class GradientFactors:
    """Rank-one factors of a linear layer's gradient (MEND, section 3.1) for one or several edits, packed.

    `rows[k]` is the edit of token k. Each edit's loss is its own mean over target tokens, so its factors have the
    scale of a single edit whatever the batch (CORRECTNESS row 12).
    """

    u: Float[Tensor, "n i"]  # layer inputs
    delta: Float[Tensor, "n o"]  # dL/d(output)
    rows: Int[Tensor, " n"]

    def weight_gradient(self) -> Float[Tensor, "o i"]:
        """dL/dW summed over all edits, in (output, input) orientation."""
        return torch.einsum("no,ni->oi", self.delta, self.u)


Factors = dict[str, GradientFactors]
"""Factors by site name."""

Inputs = dict[str, Tensor]
"""Layer inputs, (n, i), by site name."""


def pack(factors: Sequence[Mapping[str, GradientFactors]]) -> Factors:
    """Several single edits' factors as one: edit k of the result is `factors[k]`."""
    return {
        site: GradientFactors(
            torch.cat([f[site].u for f in factors]),
            torch.cat([f[site].delta for f in factors]),
            torch.repeat_interleave(
                torch.arange(len(factors)), torch.tensor([len(f[site].u) for f in factors])
            ).to(factors[0][site].u.device),
        )
        for site in factors[0]
    }


def unpack(factors: Factors, n_edits: int) -> list[Factors]:
    """One dictionary of (cloned) factors per edit."""
    out: list[Factors] = [{} for _ in range(n_edits)]
    for site, f in factors.items():
        counts = torch.bincount(f.rows, minlength=n_edits).tolist()
        for edit, u, delta in zip(out, f.u.split(counts), f.delta.split(counts), strict=True):
            edit[site] = GradientFactors(
                u.clone(), delta.clone(), torch.zeros(len(u), dtype=torch.long)
            )
    return out


def capture_factors(
    trunk: FrozenTrunk, texts: Sequence[Tokens], /, *, tokens: str = "all", reduction: str = "edit"
) -> Factors:
    """Factors of the edit loss of each text, packed in text order.

    `tokens`: "all" tokens that contribute (MEND), or only the "scored" ones, which predict the answer: a classifier's
    is the one that its head reads. `reduction`: the loss is the "sum" of a text's NLL over its target tokens, else
    their mean. Raises HyperParamError if a site has no "scored" tokens: in an encoder, or under a head that reads
    several.

    One pass through the suffix (the whole model where nothing is cached) and one backward pass to the lowest site;
    the model's parameters, their `.grad` and its hooks are left as they were (CORRECTNESS rows 13, 14).
    """
    return factors_and_losses(trunk, texts, tokens=tokens, reduction=reduction)[0]


def factors_and_losses(
    trunk: FrozenTrunk, texts: Sequence[Tokens], /, *, tokens: str = "all", reduction: str = "edit"
) -> tuple[Factors, Float[Tensor, " n"]]:
    """What `capture_factors` gives, and the loss of each text that they are of (nats)."""
    base = trunk.base
    batch = collate(texts, base.pad_id, base.device)
    counts = torch.bincount(batch.rows, minlength=len(batch))

    losses = torch.empty(0)

    def loss() -> Tensor:
        nonlocal losses
        losses = edit_nll(trunk.suffix(texts, batch), batch.targets, batch.rows, len(batch))
        if reduction == "sum":
            losses = losses * counts
        return losses.sum()

    factors: Factors = {}
    for name, (u, delta) in record_factors(base, loss).items():
        site = next(site for site in base.sites if site.name == name)
        mask = _scored(base, site, batch) if tokens == "scored" else contributing(base, site, batch)
        u, delta = (
            x.to(mask.device).reshape(*mask.shape, -1)[mask] for x in (u, delta)
        )  # some layers see (n · t, d)
        factors[name] = GradientFactors(wide(u), wide(delta), mask.nonzero()[:, 0])
    return factors, losses.detach()


@torch.no_grad()
def capture_inputs(trunk: FrozenTrunk, texts: Sequence[Tokens], /) -> Inputs:
    """Inputs u of every site at the scored positions of `texts`, packed in text order: one suffix pass.

    Raises HyperParamError as `capture_factors` of "scored" tokens.
    """
    batch = collate(texts, trunk.base.pad_id, trunk.base.device)
    with _record(trunk.base) as record:
        trunk.suffix(texts, batch)
    inputs: Inputs = {}
    for site in trunk.base.sites:
        mask, u = _scored(trunk.base, site, batch), record[site.name][0].detach()
        inputs[site.name] = wide(u.to(mask.device).reshape(*mask.shape, -1)[mask])
    return inputs


def record_factors(
    base: BaseModel, loss: Callable[[], Float[Tensor, ""]], /
) -> dict[str, tuple[Float[Tensor, "*n i"], Float[Tensor, "*n o"]]]:
    """(u, delta) of every site and every position for the scalar that `loss()` computes with the model.

    Both are (e, t, …), or (e · t, …) where a layer sees rows and positions as one axis. Raises ModelError naming the
    sites that the scalar does not depend on: an edit there would change nothing.
    """
    names = [site.name for site in base.sites]
    with torch.enable_grad(), _record(base) as record:
        value = loss()
        outputs = [record[name][1] for name in names if name in record]
        deltas = torch.autograd.grad(value, outputs, allow_unused=True) if outputs else ()
    found = dict(zip((name for name in names if name in record), deltas, strict=True))
    outside = [name for name in names if found.get(name) is None]
    if outside:
        raise ModelError(
            f"{', '.join(outside)}: the answer does not depend on it; leave it out of `inner_params`"
        )
    return {name: (record[name][0].detach(), delta) for name, delta in found.items()}


def as_one_loss(factors: Factors, texts: Sequence[Tokens], /) -> Factors:
    """Factors of the mean over all target tokens of several edits (`loss_reduction: batch`), from each edit's own."""
    counts = torch.tensor([float(len(text.targets)) for text in texts])
    share = counts / counts.sum()

    def scaled(f: GradientFactors) -> GradientFactors:
        return replace(f, delta=f.delta * share.to(f.delta)[f.rows, None])

    return {name: scaled(f) for name, f in factors.items()}


def contributing(base: BaseModel, site: Site, batch: TextBatch) -> Bool[Tensor, "n p"]:
    """The tokens, of the p positions that the site sees, whose rank-one term is not structurally zero."""
    if site.scored_only:
        return batch.scored
    if base.family == CLASSIFIER or base.sees_encoder(site):
        return batch.attention_mask.bool()
    return batch.scored.flip(1).cumsum(1).flip(1) > 0


def _scored(base: BaseModel, site: Site, batch: TextBatch) -> Bool[Tensor, "n l"]:
    several = base.head is not None and base.head.position is None
    if several or base.sees_encoder(site):
        why = (
            "the classifier's head reads several tokens"
            if several
            else "an encoder's tokens predict nothing"
        )
        remedy = "" if several else ", or `inner_params` of the decoder only"
        raise HyperParamError(
            f"edit_tokens: scored has no meaning for {site.name}: {why}; set `edit_tokens: all`{remedy}"
        )
    return batch.scored


@contextmanager
def _record(base: BaseModel) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the context every site's (input, output) is recorded; the graph starts at the lowest site's output.

    Raises ModelError for a layer that runs twice, as ALBERT's do.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []

    def hook_for(name: str):
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in seen:
                raise ModelError(
                    f"{name} is used more than once in a pass: its factors are not one layer's; edit another"
                )
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            seen[name] = (args[0], output)
            return output

        return hook

    try:
        for site in base.sites:
            handles.append(base.site_module(site).register_forward_hook(hook_for(site.name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
