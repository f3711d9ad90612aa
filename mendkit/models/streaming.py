"""Some blocks of a model alone, by the model's code; and weights that are elsewhere.

A block is *away* if its parameters are on another device than the model's embeddings: on the meta
device once it is released, on the CPU beside a model on a GPU whose trunk is streamed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .sites import Blocks, embedding_matrix, with_states


def trunk_names(model: PreTrainedModel, path: str, first: int) -> list[str]:
    """The parameters of the blocks below `first`."""
    below = tuple(f"{path}.{block}." for block in range(first))
    return [name for name, _ in model.named_parameters() if name.startswith(below)]


def move(module: nn.Module, names: Iterable[str], device: torch.device | str) -> None:
    """Put these parameters on a device; one that is on the meta device stays there."""
    values = {name: module.get_parameter(name) for name in names}
    # What is already on the device stays the same parameter, tied or mapped as it was.
    moved = {name: v if v.is_meta else v.to(device) for name, v in values.items()}
    module.load_state_dict(moved, strict=False, assign=True)


@contextmanager
def visiting(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the context a block's parameters are on `device`."""
    home = dict(block.named_parameters())
    move(block, home, device)
    try:
        yield
    finally:
        block.load_state_dict(home, strict=False, assign=True)


def is_away(block: nn.Module, device: torch.device) -> bool:
    return any(value.device != device for value in block.parameters())


def guard(model: PreTrainedModel, block: nn.Module, name: str) -> None:
    """Let a block raise ModelError if it runs while it is away."""
    forward = block.forward

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if is_away(block, embedding_matrix(model).device):
            raise ModelError(
                f"the weights below the lowest edited block are not in memory; {name} was "
                "released or is streamed (`release_trunk`, `stream_trunk`): load it again"
            )
        return forward(*args, **kwargs)

    vars(block)["forward"] = guarded


@contextmanager
def running_instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the context modules run other functions in place of their `forward`."""
    # `forward` in an object's dictionary goes before its class's.
    replaced = [(vars(module), vars(module).get("forward")) for module in forwards]
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for attributes, before in replaced:
            del attributes["forward"]
            if before is not None:  # accelerate and `guard` keep one there
                attributes["forward"] = before


def standing_in(
    model: PreTrainedModel, blocks: Blocks, chosen: range, states: Tensor | None = None
) -> AbstractContextManager[None]:
    """Within the context only the blocks `chosen` run; the others hand on what enters them.

    What enters the lowest one is `states` (n, t, d), if given, else what enters block 0.
    """

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return with_states(blocks.form, args[0] if args else kwargs["hidden_states"])

    def begin(*_: Any, **__: Any) -> Any:
        assert states is not None
        return hand_on(states)

    # The places stay, because a decoder's code may count its blocks or ask each for its kind.
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for i, block in enumerate(model.get_submodule(blocks.path).children()):
        if i not in chosen:
            forwards[block] = hand_on if i or states is None else begin
    return running_instead(forwards)
