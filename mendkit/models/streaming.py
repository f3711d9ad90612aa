"""Models whose lower blocks are away: released after use, or read from the checkpoint one by one.

A parameter that is away lies on the meta device. `standing_in` lets a decoder run some of its
blocks only, by its own code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ModelError
from .checkpoints import DTYPES, explained, loader_of, read_config
from .sites import Blocks, with_states

FILES = "model*.safetensors"
WHOLE = "set `stream_trunk: false` to load the model whole"


class Weights:
    """The tensors in a model folder's safetensors files, read one at a time by parameter name.

    Some checkpoints add `prefix`, the base model's, to the names; others leave it out.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob(FILES)):
            with explained("the weights of", folder), safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    @classmethod
    def of(cls, place: str | Path, prefix: str = "") -> "Weights | None":
        """Those of a folder that has such files, else None."""
        if isinstance(place, Path) and any(place.glob(FILES)):
            return cls(place, prefix)
        return None

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A copy of a parameter's tensor. Raises ModelError if it is not there."""
        key = self._key(name)
        if key is None:
            raise ModelError(
                f"the checkpoint {self.folder} has no weight {name}; "
                f"give a complete one, or {WHOLE}"
            )
        # Opened each time, so that no pages of the file stay mapped.
        with explained("a weight of", self.folder), safe_open(self._files[key], "pt") as file:
            return file.get_tensor(key).to(dtype, copy=True)

    def dtype(self) -> torch.dtype:
        return self.read(next(iter(self._files)), None).dtype

    def _key(self, name: str) -> str | None:
        spellings = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((key for key in spellings if key in self._files), None)


# ---------------------------------------------------------------------------------- weights away


def hollow_model(
    place: str | Path, *, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Weights]:
    """A causal model with real buffers whose parameters are away, and its weights.

    Raises ModelError for another model, or without safetensors files.
    """
    config = read_config(place, trust_remote_code=trust_remote_code)
    if loader_of(config, place) is not AutoModelForCausalLM:
        raise ModelError(f"{place} is no causal language model, so it cannot be streamed; {WHOLE}")
    folder = place
    if isinstance(place, str):
        with explained("the weights of", place):
            folder = Path(snapshot_download(place, allow_patterns=["*.safetensors*"]))
    weights = Weights.of(folder)
    if weights is None:
        raise ModelError(
            f"{folder} has no safetensors files, so its blocks cannot be read one by one; {WHOLE}"
        )

    def on_meta(_: nn.Module, __: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or value.is_meta:  # a tied parameter stays the same one
            return value
        return nn.Parameter(value.to("meta"), requires_grad=False)

    options: dict[str, Any] = {"dtype": DTYPES.get(dtype) or config.dtype or weights.dtype()}
    options["trust_remote_code"] = trust_remote_code
    # torch's annotation says that the hook returns nothing; what it returns is registered.
    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    with explained("a model from the configuration of", place), hook:
        model = AutoModelForCausalLM.from_config(config, **options)
    weights.prefix = model.base_model_prefix
    return model, weights


def trunk_names(model: PreTrainedModel, path: str, first: int) -> list[str]:
    """The parameters of the blocks below `first`."""
    below = tuple(f"{path}.{block}." for block in range(first))
    return [name for name, _ in model.named_parameters() if name.startswith(below)]


def fill(
    model: PreTrainedModel, names: Iterable[str], weights: Weights, device: torch.device
) -> None:
    """Read these parameters and buffers onto `device`."""
    values, tensors = model.state_dict(), {}
    for name in names:
        tensors[name] = weights.read(name, values[name].dtype).to(device)
    model.load_state_dict(tensors, strict=False, assign=True)


def fill_rest(
    model: PreTrainedModel, below: Iterable[str], weights: Weights, device: torch.device
) -> None:
    """Read all parameters but those `below`, and stored buffers, onto `device`."""
    kept_away = set(below)
    stored = [name for name in model.state_dict() if name in weights and name not in kept_away]
    fill(model, stored, weights, device)
    model.tie_weights()
    for name, value in model.named_parameters():
        if value.is_meta and name not in kept_away:
            weights.read(name, None)  # raises
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def empty(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Send these parameters away."""
    away = {name: model.get_parameter(name).to("meta") for name in names}
    model.load_state_dict(away, strict=False, assign=True)


# ------------------------------------------------------------------------------------- some blocks


@contextmanager
def running_instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the context modules run other functions in place of their `forward`."""
    replaced = [(vars(module), vars(module).get("forward")) for module in forwards]
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for attributes, before in replaced:
            del attributes["forward"]
            if before is not None:  # accelerate keeps one there, and `guard`
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

    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for i, block in enumerate(model.get_submodule(blocks.path).children()):
        if i not in chosen:
            forwards[block] = hand_on if i or states is None else begin
    return running_instead(forwards)


def guard(block: nn.Module, name: str) -> None:
    """Make a block say so if it runs while its weights are away."""
    forward = block.forward

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if is_away(block):
            raise ModelError(
                f"the weights below the lowest edited block are not in memory; {name} was "
                "released or is streamed (`release_trunk`, `stream_trunk`): load it again"
            )
        return forward(*args, **kwargs)

    vars(block)["forward"] = guarded


def is_away(block: nn.Module) -> bool:
    return any(value.is_meta for value in block.parameters())
