"""What can be edited in a model: its linear layers, and which of them `inner_params: auto` picks.

Read from the configuration alone: the model is built without weights (`checkpoints.skeleton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..errors import ModelError
from ..hparams import MENDHyperParams
from .bundled import BUNDLED, bundled_model
from .checkpoints import silence_transformers, skeleton
from .sites import editable_names, find_stacks, mlp_names, resolve_sites


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weight `inner_params` may name."""

    name: str  # of the weight
    kind: str  # "Linear", stored as (d_out, d_in), or "Conv1D", stored as (d_in, d_out)
    shape: tuple[int, int]  # as stored
    block: int | None  # in its own stack; None outside the blocks
    parameters: int
    mlp: bool  # of the kind that `auto` chooses among
    auto: bool
    named: bool  # by the `inner_params` given


@dataclass(frozen=True)
class Listing:
    """The layers of one model."""

    model: str
    kind: str  # its class
    stacks: dict[str, int]  # number of blocks by the name of their list
    layers: tuple[Layer, ...]


def list_layers(hparams: MENDHyperParams) -> Listing:
    """The layers of the model that `hparams` name; no weights are loaded. Raises ModelError as loading it does, and
    if `inner_params` names a weight that cannot be edited."""
    source = bundled_model() if hparams.model_name == BUNDLED else hparams.model_name
    with silence_transformers():
        model = skeleton(source, trust_remote_code=hparams.trust_remote_code)
    return describe(model, hparams.model_name, hparams.inner_params)


def describe(
    model: PreTrainedModel, name: str, inner_params: str | Sequence[str] = "auto"
) -> Listing:
    """The layers of a model, which may be on the meta device."""
    stacks = find_stacks(model)
    mlp = set(mlp_names(model, everywhere=True))
    names = editable_names(model)
    if not names:
        raise ModelError(
            f"{name}: {type(model).__name__} has no linear layer of its own to edit; give another model"
        )
    auto = {site.name for site in resolve_sites(model, "auto")} if mlp else set()
    chosen = (
        auto
        if inner_params == "auto"
        else {site.name for site in resolve_sites(model, inner_params)}
    )
    layers = tuple(
        Layer(
            site.name,
            "Conv1D" if site.transposed else "Linear",
            (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in),
            site.block,
            site.d_in * site.d_out,
            site.name in mlp,
            site.name in auto,
            site.name in chosen,
        )
        for site in resolve_sites(model, names)
    )
    return Listing(
        name, type(model).__name__, {path: len(blocks) for path, blocks in stacks.items()}, layers
    )


def table(listing: Listing, *, everything: bool) -> str:
    """For people: the MLPs' layers, or with `everything` all that may be edited; `*` marks those of `auto`."""
    rows = [layer for layer in listing.layers if everything or layer.mlp or layer.named]
    own = any(layer.auto != layer.named for layer in listing.layers)
    stacks = ", ".join(f"{count} blocks in {path}" for path, count in listing.stacks.items())
    lines = [f"{listing.model}  ({listing.kind}; {stacks or 'no list of blocks'})"]
    lines.append(f"   {'kind':7} {'shape':>15} {'block':>5} {'parameters':>12}  name")
    for layer in rows:
        mark = ("*" if layer.auto else " ") + ("+" if own and layer.named else " ")
        shape, block = (
            " × ".join(map(str, layer.shape)),
            "–" if layer.block is None else layer.block,
        )
        lines.append(
            f"{mark} {layer.kind:7} {shape:>15} {block:>5} {layer.parameters:>12,}  {layer.name}"
        )
    lines.append(
        _count("*", "inner_params: auto", [layer for layer in listing.layers if layer.auto])
    )
    if own:
        lines.append(
            _count(
                "+", "the inner_params given", [layer for layer in listing.layers if layer.named]
            )
        )
    hidden = len(listing.layers) - len(rows)
    return "\n".join(
        [*lines, *([f"   --all shows {hidden} more layers that may be edited"] if hidden else [])]
    )


def _count(mark: str, words: str, layers: Sequence[Layer]) -> str:
    total = sum(layer.parameters for layer in layers)
    return f"{mark}  {words}: {len(layers)} layer{'s' * (len(layers) != 1)}, {total:,} parameters"
