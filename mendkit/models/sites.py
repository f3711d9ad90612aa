"""Edit sites: which linear layers of a model are edited, and where they lie in the module tree.

What a module is good for is read from the module tree, never from the model's class or name:
- the *blocks* are the longest `nn.ModuleList` near the input embeddings; they are used as a chain only if a
  probe of two tokens runs through them one after another; a list beside it, whose blocks attend twice where the
  other's attend once, makes the two the decoder and the encoder of a sequence-to-sequence model;
- a site's orientation is that of its own module: `nn.Linear` keeps (d_out, d_in), GPT-2's `Conv1D`
  (d_in, d_out) (CORRECTNESS row 10);
- `inner_params: auto` means the MLP's linear layers in the last three blocks, or in the last two blocks of the
  encoder and of the decoder (as in MEND's experiments): all linear layers of what a block calls its MLP or, where
  it calls nothing so, of the block, but those of attention, of a convolutional mixer, of adapters and of a router.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAST_BLOCKS = {1: 3, 2: 2}  # number of stacks -> blocks that `auto` takes from the end of each
_QKV = [
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q", "k", "v"},
    {"c_attn"},
    {"qkv"},
]
_MLP = re.compile(r"mlp|ffn|feed_?forward|^ff$")
_BESIDE = ("adapter", "lora", "router")  # what such a name says is added to an MLP or steers it


@dataclass(frozen=True)
class Site:
    """A linear layer to edit: y = W x, with x of `d_in` and y of `d_out` features."""

    name: str  # of the weight parameter
    module: str
    d_in: int
    d_out: int
    transposed: bool  # the weight is stored as (d_in, d_out)
    block: int | None  # index of the block it lies in, in its own stack
    scored_only: bool  # only positions that predict a scored token can receive a gradient


@dataclass(frozen=True)
class Blocks:
    """The chain of decoder blocks that holds all sites."""

    path: str  # of the nn.ModuleList
    first: int  # lowest block with a site
    last: int  # index of the last block
    as_tuple: bool  # blocks return a tuple whose first entry is the hidden states


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the model's blocks; None if it has no such list, or has an encoder and a decoder."""
    stacks = find_stacks(model)
    return next(iter(stacks.items())) if len(stacks) == 1 else None


def find_stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of blocks by name: none, one, or two (encoder and decoder) in module order.

    One is the longest outermost `nn.ModuleList` in the smallest part of the module tree that holds both the input
    embeddings and a list without them. Two are lists of one name in sibling modules, such as `encoder.block` and
    `decoder.block`, where the blocks of one have a second attention.
    """
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings()
    home = next((name for name, module in modules.items() if module is embedding), "")
    found: dict[str, nn.ModuleList] = {}
    for name, module in modules.items():  # parents come before children
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not inside
            and not home.startswith(f"{name}.")
        ):
            found[name] = module
    part = home
    while part and not any(name.startswith(f"{part}.") for name in found):
        part = part.rpartition(".")[0]
    near = {
        name: module for name, module in found.items() if not part or name.startswith(f"{part}.")
    }
    if not near:
        return {}
    main = max(near, key=lambda name: len(near[name]))
    times = {name: _attention_count(blocks[-1]) for name, blocks in found.items()}
    for name in found:
        if _family(name) == _family(main) and {times[name], times[main]} == {1, 2}:
            return {stack: found[stack] for stack in found if stack in (name, main)}
    return {main: near[main]}


def _family(path: str) -> tuple[str, str]:
    """What a list's path has in common with those of its siblings' lists."""
    parent, _, name = path.rpartition(".")
    return parent.rpartition(".")[0], name


def resolve_sites(model: PreTrainedModel, inner_params: str | Sequence[str]) -> tuple[Site, ...]:
    """The edit sites that `inner_params` names ("auto" or weight parameters), in module order.

    Raises ModelError for a name that the model does not have, that is not the weight of a Linear or Conv1D,
    or that shares its weight with another layer; and if "auto" finds no layer.
    """
    stacks = find_stacks(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if inner_params == "auto":
        names = mlp_names(model)
        if not names:
            raise ModelError(
                f"inner_params: auto found no MLP of linear layers in {type(model).__name__}; list the weights to "
                "edit by name: `python -m mendkit sites MODEL --all` shows them"
            )
    elif isinstance(inner_params, str) or not inner_params:
        raise ModelError(
            f'inner_params must be "auto" or a list of parameter names, got {inner_params!r}'
        )
    else:
        names = list(inner_params)
    for name in names:
        _check_name(model, parameters, name)
    order = {name: position for position, name in enumerate(parameters)}
    return tuple(_site(model, name, stacks) for name in sorted(set(names), key=order.__getitem__))


def editable_names(model: PreTrainedModel) -> list[str]:
    """Every weight that `inner_params` may name, in module order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    linear = (f"{name}.weight" for name, module in model.named_modules() if _is_linear(module))
    floats = [name for name in linear if parameters[name].dtype in _FLOATS]
    return [name for name in floats if uses[id(parameters[name])] == 1]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_attention(name: str, module: nn.Module) -> bool:
    """True for a module that its parent calls so, or that holds the three projections; it must hold a layer."""
    children = {child for child, _ in module.named_children()}
    named = (
        "attn" in name.lower()
        or "attention" in name.lower()
        or any(kinds <= children for kinds in _QKV)
    )
    return named and any(map(_is_linear, module.modules()))


def _holds_attention(name: str, module: nn.Module) -> bool:
    inner = ((path.rpartition(".")[2], part) for path, part in module.named_modules() if path)
    return _is_attention(name, module) or any(_is_attention(*item) for item in inner)


def _attention_count(module: nn.Module) -> int:
    """How many modules inside attend, not counting the parts of one that does."""
    return sum(
        1 if _is_attention(*item) else _attention_count(item[1]) for item in module.named_children()
    )


def mlp_names(model: PreTrainedModel, *, everywhere: bool = False) -> list[str]:
    """The weights of the MLPs' linear layers that `auto` means or, if `everywhere`, of all blocks.

    Blocks without such a layer are passed over, as are layers that share their weight.
    """
    stacks, editable = find_stacks(model), set(editable_names(model))
    names = []
    for path, blocks in stacks.items():
        layers = [_block_layers(f"{path}.{index}", block) for index, block in enumerate(blocks)]
        found = [own for own in ([w for w in some if w in editable] for some in layers) if own]
        names += [
            name
            for own in (found if everywhere else found[-_LAST_BLOCKS[len(stacks)] :])
            for name in own
        ]
    return names


def _block_layers(path: str, block: nn.Module) -> list[str]:
    """The weights of a block's MLP: of what the block calls so or, without such names, of all that may be one."""
    weights = [f"{name}.weight" for name in _mlp_layers(path, block)]
    own = [
        weight
        for weight in weights
        if _MLP.search(weight.removeprefix(f"{path}.").partition(".")[0].lower())
    ]
    return own or weights


def _mlp_layers(path: str, module: nn.Module) -> list[str]:
    if _is_linear(module):
        return [path]
    children = dict(module.named_children())
    if any(isinstance(child, nn.Conv1d) for child in children.values()):  # mixes positions: no MLP
        return []
    layers = []
    for name, child in children.items():
        routes = "experts" in children and "gate" in name and _is_linear(child)
        if not (
            routes or _is_attention(name, child) or any(word in name.lower() for word in _BESIDE)
        ):
            layers += _mlp_layers(f"{path}.{name}", child)
    return layers


def _check_name(model: PreTrainedModel, parameters: dict[str, nn.Parameter], name: str) -> None:
    if name not in parameters:
        near = difflib.get_close_matches(name, parameters, n=3, cutoff=0.5)
        hint = (
            f"nearest: {', '.join(near)}" if near else f"names look like {next(iter(parameters))}"
        )
        raise ModelError(
            f"inner_params: the model has no parameter {name!r}; {hint}; or use `inner_params: auto`"
        )
    module_name, _, kind = name.rpartition(".")
    module, weight = model.get_submodule(module_name), parameters[name]
    if kind != "weight" or not _is_linear(module) or weight.dtype not in _FLOATS:
        raise ModelError(
            f"inner_params: {name} is the {kind} of a {type(module).__name__} in {weight.dtype}; "
            "only the `weight` of a Linear or Conv1D in floating point can be edited"
        )
    shared = [
        other for other, parameter in parameters.items() if parameter is weight and other != name
    ]
    if shared:
        raise ModelError(
            f"inner_params: {name} shares its weight with {', '.join(shared)}, so an edit would change both; "
            "choose a layer of its own"
        )


def _site(model: PreTrainedModel, name: str, stacks: dict[str, nn.ModuleList]) -> Site:
    module_name = name.rpartition(".")[0]
    module = model.get_submodule(module_name)
    transposed = isinstance(module, Conv1D)
    d_out, d_in = reversed(module.weight.shape) if transposed else module.weight.shape
    block, scored_only = None, False
    for path, blocks in stacks.items():
        if module_name.startswith(f"{path}."):
            index, _, inner = module_name.removeprefix(f"{path}.").partition(".")
            block = int(index)
            decodes = len(stacks) == 1 or _attention_count(blocks[block]) == 2
            scored_only = (
                decodes
                and block == len(blocks) - 1
                and _position_wise(blocks[block], inner.partition(".")[0])
            )
    return Site(name, module_name, d_in, d_out, transposed, block, scored_only)


def _position_wise(block: nn.Module, child: str) -> bool:
    """True if this child of a block treats every position by itself: not the attention, and no convolution.

    In a block without attention another child mixes the positions, and the module tree does not tell which.
    """
    children = dict(block.named_children())
    if child not in children:  # the block is itself the layer
        return False
    attention = {name for name, module in children.items() if _holds_attention(name, module)}
    convolves = any(isinstance(module, nn.Conv1d) for module in children[child].modules())
    return bool(attention) and child not in attention and not convolves


@torch.no_grad()
def probe_chain(model: PreTrainedModel, blocks: nn.ModuleList, token: int) -> bool | None:
    """Send two tokens through the model and watch its blocks: do they return their hidden states in a tuple?

    None if the blocks are not a plain chain, each called once with the previous one's hidden states as its
    first argument: then nothing may be cached below the lowest edited block.
    """
    calls: list[tuple[int, Any, Any]] = []

    def hook_for(index: int) -> Any:
        return lambda _, args, output: calls.append((index, args[0] if args else None, output))

    handles = [block.register_forward_hook(hook_for(index)) for index, block in enumerate(blocks)]
    try:
        ids = torch.full((1, 2), token, device=model.get_input_embeddings().weight.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if [index for index, _, _ in calls] != list(range(len(blocks))):
        return None
    states = [output[0] if isinstance(output, tuple) else output for _, _, output in calls]
    chained = all(given is before for (_, given, _), before in zip(calls[1:], states, strict=False))
    return (
        isinstance(calls[-1][2], tuple)
        if chained and isinstance(calls[0][1], torch.Tensor)
        else None
    )
