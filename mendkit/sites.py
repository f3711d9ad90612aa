"""Edit sites: which linear layers of a model are edited, and where they lie in the module tree.

What a module is good for is read from the module tree, never from the model's class or name:
- the *blocks* are the longest `nn.ModuleList` near the input embeddings; they are used as a chain only if a
  probe of two tokens runs through them one after another;
- a site's orientation is that of its own module: `nn.Linear` keeps (d_out, d_in), GPT-2's `Conv1D`
  (d_in, d_out) (CORRECTNESS row 10);
- `inner_params: auto` means the linear layers of the last three blocks that are not part of the attention.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ModelError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAST_BLOCKS = 3


@dataclass(frozen=True)
class Site:
    """A linear layer to edit: y = W x, with x of `d_in` and y of `d_out` features."""

    name: str  # of the weight parameter
    module: str
    d_in: int
    d_out: int
    transposed: bool  # the weight is stored as (d_in, d_out)
    block: int | None  # index of the decoder block it lies in
    scored_only: bool  # only positions that predict a scored token can receive a gradient


@dataclass(frozen=True)
class Blocks:
    """The chain of decoder blocks that holds all sites."""

    path: str  # of the nn.ModuleList
    first: int  # lowest block with a site
    last: int  # index of the last block
    as_tuple: bool  # blocks return a tuple whose first entry is the hidden states


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the decoder blocks; None if the model has no such list.

    They are the longest outermost `nn.ModuleList` in the smallest part of the module tree that holds both the
    input embeddings and a list without them.
    """
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings()
    home = next((name for name, module in modules.items() if module is embedding), "")
    found: dict[str, nn.ModuleList] = {}
    for name, module in modules.items():  # parents come before children
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and not home.startswith(f"{name}."):
            found[name] = module
    part = home
    while part and not any(name.startswith(f"{part}.") for name in found):
        part = part.rpartition(".")[0]
    near = {name: module for name, module in found.items() if not part or name.startswith(f"{part}.")}
    return max(near.items(), key=lambda item: len(item[1])) if near else None


def resolve_sites(model: PreTrainedModel, inner_params: str | Sequence[str]) -> tuple[Site, ...]:
    """The edit sites that `inner_params` names ("auto" or weight parameters), in module order.

    Raises ModelError for a name that the model does not have, that is not the weight of a Linear or Conv1D,
    or that shares its weight with another layer; and if "auto" finds no layer.
    """
    found = find_blocks(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if inner_params == "auto":
        names = _auto_names(found)
        if not names:
            raise ModelError(
                f"inner_params: auto found no linear layers outside the attention in {type(model).__name__}; "
                "list the weights to edit by name"
            )
    elif isinstance(inner_params, str) or not inner_params:
        raise ModelError(f'inner_params must be "auto" or a list of parameter names, got {inner_params!r}')
    else:
        names = list(inner_params)
    for name in names:
        _check_name(model, parameters, name)
    order = {name: position for position, name in enumerate(parameters)}
    return tuple(_site(model, name, found) for name in sorted(set(names), key=order.__getitem__))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_attention(name: str, module: nn.Module) -> bool:
    names = [name, *(inner for inner, _ in module.named_modules())]
    return any("attn" in part or "attention" in part for part in names)


def _auto_names(found: tuple[str, nn.ModuleList] | None) -> list[str]:
    path, blocks = found or ("", nn.ModuleList())
    names = []
    for index in range(len(blocks))[-_LAST_BLOCKS:]:
        for child_name, child in blocks[index].named_children():
            if not _is_attention(child_name, child):
                for inner, module in child.named_modules(prefix=f"{path}.{index}.{child_name}"):
                    names += [f"{inner}.weight"] if _is_linear(module) else []
    return names


def _check_name(model: PreTrainedModel, parameters: dict[str, nn.Parameter], name: str) -> None:
    if name not in parameters:
        near = difflib.get_close_matches(name, parameters, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"names look like {next(iter(parameters))}"
        raise ModelError(f"inner_params: the model has no parameter {name!r}; {hint}; or use `inner_params: auto`")
    module_name, _, kind = name.rpartition(".")
    module, weight = model.get_submodule(module_name), parameters[name]
    if kind != "weight" or not _is_linear(module) or weight.dtype not in _FLOATS:
        raise ModelError(
            f"inner_params: {name} is the {kind} of a {type(module).__name__} in {weight.dtype}; "
            "only the `weight` of a Linear or Conv1D in floating point can be edited"
        )
    shared = [other for other, parameter in parameters.items() if parameter is weight and other != name]
    if shared:
        raise ModelError(
            f"inner_params: {name} shares its weight with {', '.join(shared)}, so an edit would change both; "
            "choose a layer of its own"
        )


def _site(model: PreTrainedModel, name: str, found: tuple[str, nn.ModuleList] | None) -> Site:
    module_name = name.rpartition(".")[0]
    module = model.get_submodule(module_name)
    transposed = isinstance(module, Conv1D)
    d_out, d_in = reversed(module.weight.shape) if transposed else module.weight.shape
    block, scored_only = None, False
    if found and module_name.startswith(f"{found[0]}."):
        index, _, inner = module_name.removeprefix(f"{found[0]}.").partition(".")
        block = int(index)
        last = block == len(found[1]) - 1
        scored_only = last and _position_wise(found[1][block], inner.partition(".")[0])
    return Site(name, module_name, d_in, d_out, transposed, block, scored_only)


def _position_wise(block: nn.Module, child: str) -> bool:
    """True if this child of a block treats every position by itself: not the attention, and no convolution.

    In a block without attention another child mixes the positions, and the module tree does not tell which.
    """
    children = dict(block.named_children())
    if child not in children:  # the block is itself the layer
        return False
    attention = {name for name, module in children.items() if _is_attention(name, module)}
    attends = any(_is_linear(module) for name in attention for module in children[name].modules())
    convolves = any(isinstance(module, nn.Conv1d) for module in children[child].modules())
    return attends and child not in attention and not convolves


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
    return isinstance(calls[0][2], tuple) if chained and isinstance(calls[0][1], torch.Tensor) else None
