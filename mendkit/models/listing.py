"""What can be edited in a model: its linear layers, and which of them `inner_params: auto` picks.

Read from the configuration alone; no weights are loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..errors import ModelError
from ..hparams import MENDHyperParams
from .checkpoints import silence_transformers
from .load import skeleton
from .sites import editable_names, find_stacks, mlp_names, resolve_sites


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weight `inner_params` may name."""

    name: str  # of the weight
    kind: str  # "Linear", stored as (d_out, d_in), or "Conv1D", stored as (d_in, d_out)
    shape: tuple[int, int]  # as stored
    block: int | None  # in its stack; None outside the blocks
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
    """The layers of the model that `hparams` name.

    Raises ModelError as loading it does, and for `inner_params` that cannot be edited.
    """
    with silence_transformers():
        model = skeleton(hparams.model_name, trust_remote_code=hparams.trust_remote_code)
    return describe(model, hparams.model_name, hparams.inner_params)


def describe(
    model: PreTrainedModel, name: str, inner_params: str | Sequence[str] = "auto"
) -> Listing:
    """The layers of a model, which may be on the meta device."""
    kind, names = type(model).__name__, editable_names(model)
    if not names:
        raise ModelError(f"{name}: {kind} has no linear layer to edit; give another model")
    mlp = set(mlp_names(model, everywhere=True))
    auto = set(mlp_names(model))
    chosen = auto
    if inner_params != "auto":
        chosen = {site.name for site in resolve_sites(model, inner_params)}
    layers = []
    for site in resolve_sites(model, names):
        rows, columns = model.get_parameter(site.name).shape
        layers.append(
            Layer(
                name=site.name,
                kind="Conv1D" if site.transposed else "Linear",
                shape=(rows, columns),
                block=site.block,
                parameters=site.d_in * site.d_out,
                mlp=site.name in mlp,
                auto=site.name in auto,
                named=site.name in chosen,
            )
        )
    stacks = {path: len(blocks) for path, blocks in find_stacks(model).items()}
    return Listing(name, kind, stacks, tuple(layers))


def table(listing: Listing, *, everything: bool) -> str:
    """For people: the MLPs' layers, or with `everything` all; `*` marks those of `auto`."""
    shown = [row for row in listing.layers if everything or row.mlp or row.named]
    stacks = ", ".join(f"{count} blocks in {path}" for path, count in listing.stacks.items())
    lines = [
        f"{listing.model}  ({listing.kind}; {stacks or 'no list of blocks'})",
        f"   {'kind':7} {'shape':>15} {'block':>5} {'parameters':>12}  name",
    ]
    auto = [row for row in listing.layers if row.auto]
    named = [row for row in listing.layers if row.named]
    for row in shown:
        mark = ("*" if row in auto else " ") + ("+" if row in named and named != auto else " ")
        shape = " × ".join(map(str, row.shape))
        block = "–" if row.block is None else row.block
        lines.append(
            f"{mark} {row.kind:7} {shape:>15} {block:>5} {row.parameters:>12,}  {row.name}"
        )
    lines.append(_layer_count("*  inner_params: auto", auto))
    if named != auto:
        lines.append(_layer_count("+  the inner_params given", named))
    hidden = len(listing.layers) - len(shown)
    if hidden:
        lines.append(f"   --all shows {hidden} more layers that may be edited")
    return "\n".join(lines)


def _layer_count(words: str, layers: Sequence[Layer]) -> str:
    total = sum(layer.parameters for layer in layers)
    return f"{words}: {len(layers)} layer{'s' * (len(layers) != 1)}, {total:,} parameters"
