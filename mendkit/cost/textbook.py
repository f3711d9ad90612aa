"""A textbook MEND: Algorithms 1 and 2 of the paper written plainly, to hold the kit against and to measure it by.

One edit at a time, four passes of the whole model in a step: the gradient of the edit, with u and δ read by hooks while
autograd computes it on the weights; the edited model on the edit and its paraphrases; the base and the edited model on
the locality prompts. Updates are dense (d_out, d_in) matrices, logits are those of every position, nothing is kept. It
shares with the kit the hypernetwork's tensors, the tokens and the losses, and none of the code that makes the kit fast.

The recipe is the published one: all tokens, normalised feature by feature, one transform for all layers of a shape.
Axes: t tokens, i layer input, o layer output, d = i + o, n texts, v vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.hypernetwork import MEND, LowRankResidual, group_name, stats_name
from ..mend.losses import edit_nll, locality_kl, wide
from ..mend.normaliser import RunningMoments
from ..models.base import BaseModel
from ..models.families import CAUSAL
from ..models.sites import Site
from ..models.tokens import TextBatch, Tokens, collate

Weights = dict[str, Tensor]
"""Weights of the edit sites by name, each in the orientation that the model stores."""

LOCALITY = ("neighbours", "unrelated")
RECIPE = {
    **{"norm": True, "combine": True, "shared": True, "whiten": None, "std_eps": 0.0},
    **{"init": "id_xavier", "edit_tokens": "all", "loss_reduction": "edit"},
}


def check_recipe(base: BaseModel, h: MENDHyperParams, /) -> None:
    """Raises MendkitError if `h` asks for something that the textbook does not do, or `base` is no causal model."""
    if base.family != CAUSAL:
        raise MendkitError(
            f"{base.name} is a {base.family} model; the textbook reads and edits causal models only"
        )
    for key, value in RECIPE.items():
        if getattr(h, key) != value:
            raise MendkitError(
                f"{key}: the textbook knows {value!r} only, got {getattr(h, key)!r}; set it so"
            )


def clean_weights(base: BaseModel) -> Weights:
    """The sites' weights as they are, not copied."""
    return {site.name: base.site_module(site).weight for site in base.sites}


def logits(base: BaseModel, batch: TextBatch, weights: Weights) -> Float[Tensor, "n t v"]:
    """A full pass of the model with these weights at the sites."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    return torch.func.functional_call(base.model, weights, (), inputs).logits


def factors(
    base: BaseModel, edit: Tokens
) -> dict[str, tuple[Float[Tensor, "t i"], Float[Tensor, "t o"]]]:
    """(u, δ) of every site at the tokens that contribute, from the gradient of the edit's loss on the weights."""
    batch = collate([edit], base.pad_id, base.device)
    leaves = {
        name: weight.detach().requires_grad_() for name, weight in clean_weights(base).items()
    }
    seen: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}

    def hook_for(name: str):
        def hook(_, args, output: Tensor) -> None:
            seen[name] = args[0].detach()
            output.register_hook(lambda gradient: deltas.__setitem__(name, gradient))

        return hook

    handles = [
        base.site_module(site).register_forward_hook(hook_for(site.name)) for site in base.sites
    ]
    try:
        with torch.enable_grad():
            loss = edit_nll(
                logits(base, batch, leaves)[batch.scored], batch.targets, batch.rows, 1
            ).sum()
            torch.autograd.grad(loss, list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
    # after the last scored position nothing contributes; in the last block's MLP nothing before the first does
    keep = {
        site.name: edit.scored if site.scored_only else range(edit.scored[-1] + 1)
        for site in base.sites
    }
    return {
        name: tuple(
            wide(x.reshape(len(edit.ids), -1)[list(keep[name])]) for x in (seen[name], deltas[name])
        )
        for name in seen
    }


def normalised(
    x: Float[Tensor, "t d"], moments: RunningMoments, h: MENDHyperParams
) -> Float[Tensor, "t d"]:
    """(x − mean) / std per feature, with the recipe's floor on the std and clip on the result."""
    std = (moments.m2 / (moments.count - 1)).sqrt()
    std = torch.maximum(std, h.std_floor * std.median())
    return ((x - moments.mean.to(x.dtype)) / std.to(x.dtype)).clamp(-h.z_clip, h.z_clip)


def entering(
    mend: MEND, site: Site, u: Float[Tensor, "t i"], delta: Float[Tensor, "t o"]
) -> Float[Tensor, "t d"]:
    """What enters the hypernetwork: the normalised factors of each token of one site."""
    moments, h = mend.moments[stats_name(site, mend.hparams)], mend.hparams
    return torch.cat([normalised(u, moments["u"], h), normalised(delta, moments["delta"], h)], 1)


def hidden(block: LowRankResidual, layer: int, z: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
    """What a block clamps: s ⊙ (U V z + b) + o."""
    return block.scale[layer] * (z @ block.V.T @ block.U.T + block.bias) + block.shift[layer]


def change(
    mend: MEND, site: Site, u: Float[Tensor, "t i"], delta: Float[Tensor, "t o"]
) -> Float[Tensor, "o i"]:
    """The dense ΔW of one site (equation 3, Algorithm 2)."""
    group = group_name(site, mend.hparams.shared)
    layer, z = mend.groups[group].index(site.name), entering(mend, site, u, delta)
    for block in mend.blocks[group]:
        z = z + torch.relu(hidden(block, layer, z))
    alpha = mend.log_edit_lr[mend.sites.index(site)].exp()
    return mend.hparams.update_sign * alpha * (z[:, site.d_in :].T @ z[:, : site.d_in])


def edited_weights(base: BaseModel, mend: MEND, edit: Tokens) -> Weights:
    """The weights after one edit; gradients flow to the hypernetwork."""
    check_recipe(base, mend.hparams)
    clean, own = clean_weights(base), factors(base, edit)
    changes = {site.name: change(mend, site, *own[site.name]) for site in base.sites}
    turned = {
        site.name: changes[site.name].T if site.transposed else changes[site.name]
        for site in base.sites
    }
    return {name: weight + turned[name].to(weight.dtype) for name, weight in clean.items()}


def textbook_losses(
    base: BaseModel, mend: MEND, texts: Sequence[tuple[str, Tokens]], /
) -> dict[str, Tensor]:
    """The loss of each role for one edit, the mean of its texts; the first text is the edit."""
    edited = edited_weights(base, mend, texts[0][1])
    losses: dict[str, Tensor] = {}
    for local in (False, True):
        chosen = [(role, text) for role, text in texts if (role in LOCALITY) == local]
        if not chosen:
            continue
        batch = collate([text for _, text in chosen], base.pad_id, base.device)
        if local:
            with torch.no_grad():
                before = logits(base, batch, {})[batch.scored]
            after = logits(base, batch, edited)[batch.scored]
            values = locality_kl(before, after, batch.rows, len(chosen))
        else:
            values = edit_nll(
                logits(base, batch, edited)[batch.scored], batch.targets, batch.rows, len(chosen)
            )
        for role in dict.fromkeys(role for role, _ in chosen):
            losses[role] = values[[i for i, (r, _) in enumerate(chosen) if r == role]].mean()
    return losses


def put(base: BaseModel, weights: Mapping[str, Tensor], /) -> Weights:
    """Make these the model's weights at the sites; returns those that were there, to be put back. Nothing is copied."""
    old = {name: weight.data for name, weight in clean_weights(base).items()}
    for site in base.sites:
        base.site_module(site).weight.data = weights[site.name]
    return old
