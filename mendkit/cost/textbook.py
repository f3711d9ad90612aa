"""A textbook MEND: Algorithms 1 and 2 of the paper written plainly, to measure the kit against.

One edit at a time, four passes of the whole model in a step, dense updates, logits at every
position; nothing is kept. It shares the hypernetwork's tensors, the tokens and the losses with the
kit, and none of the code that makes the kit fast. The recipe is the published one.
Axes: t tokens, i layer input, o layer output, d = i + o, n texts, v vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.hypernetwork import MEND, group_name, stats_name
from ..mend.losses import edit_nll, locality_kl
from ..mend.normaliser import RunningMoments
from ..models.base import BaseModel
from ..models.families import CAUSAL
from ..models.sites import Site
from ..models.tokens import TextBatch, Tokens, collate

# Weights of the edit sites by name, each in the orientation that the model stores.
SiteWeights = dict[str, Tensor]

# u and delta of one site.
Pair = tuple[Float[Tensor, "t i"], Float[Tensor, "t o"]]

# The texts of one edit by role; the edit itself comes first.
TextRow = list[tuple[str, Tokens]]

RECIPE = {
    "norm": True,
    "combine": True,
    "shared": True,
    "whiten": None,
    "whiten_values": None,
    "aggregate": "sum",
    "site_share": 1.0,
    "std_eps": 0.0,
    "init": "id_xavier",
    "edit_tokens": "all",
    "loss_reduction": "edit",
}


def check_recipe(base: BaseModel, hparams: MENDHyperParams) -> None:
    """Raises MendkitError for settings that the textbook does not have, or no causal model."""
    if base.family != CAUSAL:
        raise MendkitError(f"{base.name} is a {base.family} model; the textbook edits causal ones")
    for key, value in RECIPE.items():
        given = getattr(hparams, key)
        if given != value:
            raise MendkitError(f"{key}: the textbook supports only {value!r}, got {given!r}")


def logits(base: BaseModel, batch: TextBatch, weights: SiteWeights) -> Float[Tensor, "n t v"]:
    """A full pass of the model with these weights at the sites."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return torch.func.functional_call(base.model, weights, (), inputs | {"use_cache": False}).logits


def factors(base: BaseModel, edit: Tokens) -> dict[str, Pair]:
    """(u, delta) of every site at the tokens that contribute, by the gradient on the weights."""
    batch = collate([edit], base.pad_id, base.device)
    inputs: SiteWeights = {}
    outputs: SiteWeights = {}
    leaves: SiteWeights = {}
    handles = []

    def keep(name: str):
        def hook(_, args, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach()[0], output

        return hook

    for site in base.sites:
        module = base.site_module(site)
        leaves[site.name] = module.weight.detach().requires_grad_()
        handles.append(module.register_forward_hook(keep(site.name)))
    try:
        with torch.enable_grad():
            scored = logits(base, batch, leaves)[batch.scored]
            loss = edit_nll(scored, batch.targets, batch.rows, 1).sum()
            # With the weights' gradients, as the paper computes them.
            wanted = [*outputs.values(), *leaves.values()]
            deltas = dict(zip(outputs, torch.autograd.grad(loss, wanted), strict=False))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for site in base.sites:
        # After the last scored position no gradient arrives. In the last block's MLP only the
        # scored positions have one.
        rows = list(edit.scored) if site.scored_only else list(range(edit.scored[-1] + 1))
        found[site.name] = inputs[site.name][rows], deltas[site.name][0, rows]
    return found


def normalised(
    x: Float[Tensor, "t d"], moments: RunningMoments, hparams: MENDHyperParams
) -> Float[Tensor, "t d"]:
    """(x − mean) / std of each feature, with the recipe's floor on the std and clip."""
    std = (moments.m2 / (moments.count - 1)).sqrt()
    std = torch.maximum(std, hparams.std_floor * std.median())
    z = (x - moments.mean.to(x.dtype)) / std.to(x.dtype)
    return z if hparams.z_clip is None else z.clamp(-hparams.z_clip, hparams.z_clip)


def change(mend: MEND, site: Site, u: Tensor, delta: Tensor) -> Float[Tensor, "o i"]:
    """The dense ΔW of one site (equation 3, Algorithm 2)."""
    h, moments = mend.hparams, mend.moments[stats_name(site, mend.hparams)]
    group = group_name(site, h.shared)
    layer = mend.groups[group].index(site.name)
    z = torch.cat([normalised(u, moments["u"], h), normalised(delta, moments["delta"], h)], 1)
    for block in mend.blocks[group]:
        hidden = block.scale[layer] * (z @ block.V.T @ block.U.T + block.bias) + block.shift[layer]
        z = z + torch.relu(hidden)
    alpha = mend.log_edit_lr[mend.sites.index(site)].exp()
    return h.update_sign * alpha * (z[:, site.d_in :].T @ z[:, : site.d_in])


def edited_weights(base: BaseModel, mend: MEND, edit: Tokens) -> SiteWeights:
    """The weights after one edit; gradients flow to the hypernetwork."""
    check_recipe(base, mend.hparams)
    pairs, edited = factors(base, edit), {}
    for site in base.sites:
        delta_w = change(mend, site, *pairs[site.name])
        weight = base.site_module(site).weight
        edited[site.name] = weight + (delta_w.T if site.transposed else delta_w).to(weight.dtype)
    return edited


def textbook_losses(base: BaseModel, mend: MEND, texts: TextRow) -> dict[str, Tensor]:
    """The loss of each role for one edit, the mean of its texts; the first text is the edit."""
    edited = edited_weights(base, mend, texts[0][1])
    losses: dict[str, Tensor] = {}
    for local in (False, True):
        chosen = [pair for pair in texts if (pair[0] in ("neighbours", "unrelated")) is local]
        if not chosen:
            continue
        batch = collate([text for _, text in chosen], base.pad_id, base.device)
        after = logits(base, batch, edited)[batch.scored]
        if local:
            with torch.no_grad():
                before = logits(base, batch, {})[batch.scored]
            values = locality_kl(before, after, batch.rows, len(chosen))
        else:
            values = edit_nll(after, batch.targets, batch.rows, len(chosen))
        roles = [role for role, _ in chosen]
        for role in set(roles):
            losses[role] = values[[name == role for name in roles]].mean()
    return losses


def put(base: BaseModel, weights: Mapping[str, Tensor]) -> SiteWeights:
    """Make these the model's weights at the sites; returns those that were there."""
    old = {}
    for site in base.sites:
        module = base.site_module(site)
        old[site.name], module.weight.data = module.weight.data, weights[site.name]
    return old


def trained_looking(base: BaseModel, hparams: MENDHyperParams, rows: Sequence[TextRow]) -> MEND:
    """A hypernetwork as after some training: U is not zero, so every parameter has a gradient.

    Half of the ReLUs are open and half are shut (o in equation 3), all far from their hinge. There
    the gradient jumps, and rounding would decide on which side a value is.
    """
    mend = MEND(base.sites, hparams).to(base.device)
    generator = torch.Generator(base.device).manual_seed(hparams.seed)
    for name, parameter in mend.named_parameters():
        if name.endswith(".U"):
            spread = 0.05 / parameter.shape[1] ** 0.5
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
        elif name.endswith(".shift"):
            parameter.data[:] = 1.0
            parameter.data[:, 1::2] = -1.0
    for row in rows:
        pairs = factors(base, row[0][1])
        for site in base.sites:
            moments = mend.moments[stats_name(site, hparams)]
            for kind, x in zip(("u", "delta"), pairs[site.name], strict=True):
                moments[kind].add(x)
    return mend
