"""Edit sites: which linear layers of a model are edited, and where they lie in the module tree.

The module tree tells what a module is for, never the model's class or name. `nn.Linear` stores its
weight as (d_out, d_in), GPT-2's `Conv1D` as (d_in, d_out) (CORRECTNESS row 10). `inner_params:
auto` means the MLPs of the last three blocks, or of the last two of encoder and decoder, as in
MEND's experiments.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAST_BLOCKS = {1: 3, 2: 2}  # number of stacks -> blocks that `auto` takes from the end of each
_QKV = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q", "k", "v"},
    {"c_attn"},
    {"qkv"},
)
_BESIDE = ("adapter", "lora", "router")  # added to an MLP, or steering it


@dataclass(frozen=True)
class Site:
    """A linear layer to edit: y = W x, with x of `d_in` and y of `d_out` features."""

    name: str  # of the weight parameter
    module: str
    d_in: int
    d_out: int
    transposed: bool  # the weight is stored as (d_in, d_out)
    block: int | None  # index of its block, in its stack
    scored_only: bool  # only positions that predict a scored token can receive a gradient


def hidden_states(output: Any) -> torch.Tensor:
    """The hidden states that a block returns: alone, or first in a tuple or a dataclass."""
    if is_dataclass(output):
        return getattr(output, fields(output)[0].name)
    if isinstance(output, tuple):
        return output[0]
    return output


def with_states(output: Any, states: torch.Tensor) -> Any:
    """A block's output, or the form of one, with these hidden states in it."""
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{fields(output)[0].name: states})
    if isinstance(output, tuple) and output:
        return (states, *output[1:])
    return states


def form_of(output: Any) -> Any:
    """A block's output with None in each place; () for hidden states alone."""
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{each.name: None for each in fields(output)})
    if isinstance(output, tuple):
        return (None,) * len(output)
    return ()


@contextmanager
def only_at(
    module: nn.Module, places: Int[torch.Tensor, "r s"], shape: torch.Size
) -> Iterator[None]:
    """Within the context a module runs at these places of each row; elsewhere its output is 0.

    `shape` is that of all positions, (r, t).
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = places[..., None].expand(*places.shape, args[0].shape[2])
        return (args[0].gather(1, index), *args[1:])

    def spread(_: nn.Module, __: Any, output: Any) -> Any:
        states = hidden_states(output)
        index = places[..., None].expand(states.shape)
        whole = states.new_zeros(*shape, states.shape[2])
        return with_states(output, whole.scatter(1, index, states))

    with module.register_forward_pre_hook(select), module.register_forward_hook(spread):
        yield


@dataclass(frozen=True)
class Blocks:
    """The chain of decoder blocks that holds all sites."""

    path: str  # of the nn.ModuleList
    first: int  # lowest block with a site
    last: int  # index of the last block
    form: Any  # of what a block returns (`form_of`)


# ------------------------------------------------------------------------------------------ blocks


def embedding_matrix(model: PreTrainedModel) -> torch.Tensor:
    """The weight of the input embeddings, (vocabulary, width)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the blocks. None without such a list, or with an encoder and a decoder."""
    stacks = find_stacks(model)
    if len(stacks) != 1:
        return None
    return next(iter(stacks.items()))


def find_stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of blocks by name: none, one, or two (encoder and decoder) in module order."""
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings()
    home = next((name for name, module in modules.items() if module is embedding), "")

    # 1. The outermost lists that do not hold the embeddings. Parents come before children.
    lists: dict[str, nn.ModuleList] = {}
    for name, module in modules.items():
        inside = _inside(home, name) or any(_inside(name, outer) for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module

    # 2. The longest in the smallest part of the tree that holds the embeddings and a list.
    part = home
    while part and not any(_inside(name, part) for name in lists):
        part = part.rpartition(".")[0]
    near = [name for name in lists if not part or _inside(name, part)]
    if not near:
        return {}
    main = max(near, key=lambda name: len(lists[name]))

    # 3. Its counterpart: a list of the same name in a sibling module, such as `encoder.block` and
    #    `decoder.block`, where the blocks of one have a second attention.
    counts = {name: _attention_count(blocks[-1]) for name, blocks in lists.items()}
    for name in lists:
        if _relatives(name) == _relatives(main) and {counts[name], counts[main]} == {1, 2}:
            return {stack: lists[stack] for stack in lists if stack in (name, main)}
    return {main: lists[main]}


def _inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _relatives(path: str) -> tuple[str, str]:
    """What the paths of counterparts have in common."""
    parent, _, name = path.rpartition(".")
    return parent.rpartition(".")[0], name


def watch_chain(
    blocks: nn.ModuleList, read: Callable[[], torch.Tensor]
) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """The form of what the blocks return, the states that enter each, and what `read()` returns.

    The form is None if they are no plain chain, each called once with the states of the one before.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []

    def record(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((block, args[0] if args else kwargs.get("hidden_states"), output))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_hook(record, with_kwargs=True))
        logits = read()
    entering = [given for _, given, _ in calls]
    form = form_of(calls[0][2]) if calls else None
    states = entering[0] if entering else None
    plain = len(calls) == len(blocks) and isinstance(states, torch.Tensor)
    for block, (called, given, output) in zip(blocks, calls, strict=False):
        plain = plain and called is block and given is states and form_of(output) == form
        states = hidden_states(output)
    if not plain:
        form = None
    return form, entering, logits


# ------------------------------------------------------------------------------------------- sites


def resolve_sites(model: PreTrainedModel, inner_params: str | Sequence[str]) -> tuple[Site, ...]:
    """The edit sites that `inner_params` names ("auto" or weights), in module order.

    Raises ModelError for a name that cannot be edited, and if "auto" finds no layer.
    """
    editable, names, stacks = editable_names(model), inner_params, find_stacks(model)
    if inner_params == "auto":
        names = mlp_names(model)
        if not names:
            _refuse_auto(model, editable, stacks)
    elif isinstance(inner_params, str) or not inner_params:
        raise ModelError(
            f'inner_params must be "auto" or a list of parameter names, got {inner_params!r}'
        )
    for name in set(names) - set(editable):
        near = difflib.get_close_matches(name, editable, n=3, cutoff=0)
        raise ModelError(
            f"inner_params: {name!r} cannot be edited: it is no weight of a Linear or Conv1D in "
            "floating point that no other layer shares, or the output's; nearest: "
            f"{', '.join(near)}; or use auto"
        )
    return tuple(_site(model, name, stacks) for name in editable if name in names)


def _refuse_auto(
    model: PreTrainedModel, editable: Sequence[str], stacks: Mapping[str, nn.ModuleList]
) -> NoReturn:
    last = [f"{path}.{len(blocks) - 1}." for path, blocks in stacks.items()]
    near = [name for name in editable if name.startswith(tuple(last))] or editable
    fused = [n for n, value in model.named_parameters() if value.dim() == 3 and "expert" in n]
    why = ""
    if fused:  # transformers keeps the experts of a block as one tensor, and calls no layer
        why = f": its experts are one parameter ({fused[-1]})"
    raise ModelError(
        f"inner_params: auto found no MLP of linear layers in {type(model).__name__}{why}; give a "
        f"list of names instead, such as {', '.join(near[:6]) or 'none (nothing is editable)'}; "
        "`python -m mendkit sites MODEL --all` shows all"
    )


def editable_names(model: PreTrainedModel) -> list[str]:
    """Every weight that `inner_params` may name, in module order."""
    # A weight that several layers share is left out: an edit would change all of them.
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    names, head = [], model.get_output_embeddings()  # which reads scored positions alone
    for path, module in model.named_modules():
        if module is head or not _is_linear(module):
            continue
        # A quantised layer may have no such weight, or one of integers.
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dtype in _FLOATS and uses[id(weight)] == 1:
            names.append(f"{path}.weight")
    return names


def mlp_names(model: PreTrainedModel, *, everywhere: bool = False) -> list[str]:
    """The weights of the MLPs that `auto` means or, if `everywhere`, of all blocks."""
    stacks, editable = find_stacks(model), set(editable_names(model))
    names: list[str] = []
    for path, blocks in stacks.items():
        by_block = []
        for index, block in enumerate(blocks):
            weights = [w for w in _mlp_of_block(f"{path}.{index}", block) if w in editable]
            if weights:
                by_block.append(weights)
        if not everywhere:
            by_block = by_block[-_LAST_BLOCKS[len(stacks)] :]
        for weights in by_block:
            names += weights
    return names


def _mlp_of_block(path: str, block: nn.Module) -> list[str]:
    """The weights of what the block calls its MLP or, if nothing, of all that may be one."""
    weights = [f"{name}.weight" for name in _mlp_layers(path, block)]
    called = re.compile(re.escape(path) + r"\.[^.]*(mlp|ffn|feed_?forward|\bff\b)", re.IGNORECASE)
    return [weight for weight in weights if called.match(weight)] or weights


def _mlp_layers(path: str, module: nn.Module) -> list[str]:
    if _is_linear(module):
        return [path]
    children = dict(module.named_children())
    if any(isinstance(child, nn.Conv1d) for child in children.values()):  # mixes positions
        return []
    layers = []
    for name, child in children.items():
        routes = "experts" in children and "gate" in name and _is_linear(child)
        beside = any(word in name.lower() for word in _BESIDE)
        if not (routes or beside or _is_attention(name, child)):
            layers += _mlp_layers(f"{path}.{name}", child)
    return layers


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is called so, or has the three projections; it must hold a layer."""
    children = {child for child, _ in module.named_children()}
    named = "attn" in name.lower() or "attention" in name.lower()
    projects = any(projections <= children for projections in _QKV)
    return (named or projects) and any(map(_is_linear, module.modules()))


def _attention_count(module: nn.Module) -> int:
    """How many modules inside attend, not counting the parts of one that does."""
    count = 0
    for name, child in module.named_children():
        if _is_attention(name, child):
            count += 1
        else:
            count += _attention_count(child)
    return count


def _site(model: PreTrainedModel, name: str, stacks: dict[str, nn.ModuleList]) -> Site:
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    transposed = isinstance(module, Conv1D)
    d_out, d_in = model.get_parameter(name).shape
    if transposed:
        d_in, d_out = d_out, d_in
    index, scored_only = None, False
    for stack, blocks in stacks.items():
        if _inside(path, stack):
            number, _, inner = path.removeprefix(f"{stack}.").partition(".")
            index = int(number)
            # In the last block of a decoder nothing mixes positions behind the attention.
            decodes = len(stacks) == 1 or _attention_count(blocks[index]) == 2
            if decodes and index == len(blocks) - 1:
                scored_only = _position_wise(blocks[index], inner.partition(".")[0])
    return Site(name, path, d_in, d_out, transposed, index, scored_only)


def _position_wise(block: nn.Module, child: str) -> bool:
    """Whether this child of a block treats every position alone: no attention, no convolution."""
    # In a block without attention the tree does not tell which child mixes positions.
    children = dict(block.named_children())
    if child not in children:  # the block is itself the layer
        return False
    attends = {n: _is_attention(n, m) or _attention_count(m) > 0 for n, m in children.items()}
    convolves = any(isinstance(module, nn.Conv1d) for module in children[child].modules())
    return any(attends.values()) and not attends[child] and not convolves
