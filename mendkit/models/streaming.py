"""Models with some of their weights away: released after use, or read from the checkpoint one block at a time.

A *hollow* parameter has shape and dtype but no storage: it lies on the meta device, or is one zero expanded, where the
decoder's own code still reads it (the input embeddings, whose output nobody uses then). `Weights` reads a checkpoint's
safetensors files tensor by tensor; `standing_in` lets a decoder run some of its blocks only, with its own code.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ModelError
from .checkpoints import DTYPES, checked_loader, explained, is_causal, read_config
from .sites import find_blocks, probe_chain

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WHOLE = "set `stream_trunk: false` to load the model whole"


class Weights:
    """The tensors of a model folder's safetensors files by parameter name, read one at a time.

    `prefix` is what the names of some checkpoints lack, or have in addition (the base model's). Raises ModelError
    if the folder has no such files.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        if (folder / INDEX).is_file():
            files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SINGLE).is_file():
            with explained("the weights of", folder), safe_open(folder / SINGLE, "pt") as file:
                files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ModelError(
                f"{folder} has no safetensors files, so its blocks cannot be read one by one; {WHOLE}"
            )
        self._files: dict[str, str] = files

    @classmethod
    def of(cls, place: str | Path, prefix: str) -> Weights | None:
        """Those of a folder that has such files, else None."""
        held = isinstance(place, Path) and any((place / name).is_file() for name in (INDEX, SINGLE))
        return cls(place, prefix) if held else None

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of a parameter in memory of its own. Raises ModelError if it is not there."""
        key = self._key(name)
        if key is None:
            raise ModelError(
                f"the checkpoint {self.folder} has no weight {name}; give a complete one, or {WHOLE}"
            )
        try:
            with safe_open(
                self.folder / self._files[key], "pt"
            ) as file:  # opened anew: no pages stay mapped
                return file.get_tensor(key).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read {key} in {self.folder}: {error}; replace the files there"
            ) from error

    def bytes(self, dtype: torch.dtype | None) -> int:
        """Size of all tensors together, in `dtype` if given."""
        files = sum((self.folder / name).stat().st_size for name in set(self._files.values()))
        return files if dtype is None else files * dtype.itemsize // self.dtype().itemsize

    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        key = next(iter(self._files))
        with (
            explained("the weights of", self.folder),
            safe_open(self.folder / self._files[key], "pt") as file,
        ):
            return file.get_tensor(key).dtype

    def _key(self, name: str) -> str | None:
        spellings = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((key for key in spellings if key in self._files), None)


def hollow_model(
    place: str | Path, *, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Weights]:
    """A causal model of a folder or hub id with hollow parameters and real buffers, and its weights to be read.

    Raises ModelError as `read_checkpoint` does, and for a checkpoint that is not in safetensors files.
    """
    config = read_config(place, trust_remote_code=trust_remote_code)
    checked_loader(config, place)
    if not is_causal(config):
        raise ModelError(
            f"{place} is no causal language model, and only such ones can be streamed; {WHOLE}"
        )
    with explained("the weights of", place):
        folder = (
            place
            if isinstance(place, Path)
            else Path(snapshot_download(place, allow_patterns=["*.safetensors*"]))
        )
    weights = Weights(folder, "")
    kept = DTYPES.get(dtype) or config.dtype or weights.dtype()
    with explained("a model from the configuration of", place), _born_hollow():
        model = AutoModelForCausalLM.from_config(
            config, dtype=kept, trust_remote_code=trust_remote_code
        )
    weights.prefix = model.base_model_prefix
    return model, weights


@contextmanager
def _born_hollow() -> Iterator[None]:
    """Within the context new modules get their parameters on the meta device, and their buffers as ever."""

    def place(_: nn.Module, __: str, value: nn.Parameter | None) -> nn.Parameter | None:
        return (
            value
            if value is None or value.is_meta
            else nn.Parameter(value.to("meta"), requires_grad=False)
        )

    handle = register_module_parameter_registration_hook(place)
    try:
        yield
    finally:
        handle.remove()


def fill_rest(
    model: PreTrainedModel, hollow: Sequence[str], weights: Weights, device: torch.device
) -> None:
    """Read every parameter but those named `hollow`, and the buffers that the checkpoint has, onto `device`."""
    names = defaultdict(list)
    for name, value in model.named_parameters(remove_duplicate=False):
        names[id(value)].append((name, value.dtype))
    for same in names.values():
        if same[0][0] not in hollow:
            found = next(
                (name for name, _ in same if name in weights), same[0][0]
            )  # tied: kept under one name
            put(model, [name for name, _ in same], weights.read(found, same[0][1]).to(device))
    for name, value in list(model.named_buffers()):
        module, _, leaf = name.rpartition(".")
        there = weights.read(name, value.dtype) if name in weights else value
        model.get_submodule(module)._buffers[leaf] = there.to(device)


def put(model: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Make one new parameter of `value` under all these names."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._parameters[leaf] = parameter


def empty_out(model: PreTrainedModel, names: Sequence[str], device: torch.device) -> None:
    """Make these parameters hollow."""
    embedding = {id(value) for value in model.get_input_embeddings().parameters()}
    for name in names:
        value = model.get_parameter(name)
        zero = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
        put(model, [name], zero if id(value) in embedding else value.to("meta"))


def trunk_names(model: PreTrainedModel, path: str, first: int) -> list[str]:
    """The parameters that only the blocks below `first` of the list `path` use, or only the input embeddings."""
    modules = {id(module): name for name, module in model.named_modules()}
    below = (
        *(f"{path}.{i}." for i in range(first)),
        f"{modules[id(model.get_input_embeddings())]}.",
    )
    uses = defaultdict(list)
    for name, value in model.named_parameters(remove_duplicate=False):
        uses[id(value)].append(name)
    return [
        name
        for names in uses.values()
        if all(name.startswith(below) for name in names)
        for name in names
    ]


@contextmanager
def present(
    model: PreTrainedModel, names: Sequence[str], weights: Weights, device: torch.device
) -> Iterator[None]:
    """Within the context these hollow parameters have their values."""
    hollow = {name: model.get_parameter(name) for name in names}
    with ExitStack() as stack:
        for name, value in hollow.items():
            stack.callback(put, model, [name], value.data)
            put(model, [name], weights.read(name, value.dtype).to(device))
        yield


# --------------------------------------------------------------------------------------------- some blocks only


class _Handover(nn.Module):
    """Stands in for a block that does not run; with `states` it hands these on, else what it is given."""

    def __init__(self, block: nn.Module, states: Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        self._block = [block]  # a list: its parameters stay out of this module
        self._states, self._as_tuple = states, as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden if self._states is None else self._states
        return (out,) if self._as_tuple else out


@contextmanager
def standing_in(
    model: PreTrainedModel,
    path: str,
    as_tuple: bool,
    /,
    *,
    first: int,
    last: int | None = None,
    states: Any = None,
) -> Iterator[None]:
    """Within the context only the blocks `first` to `last` (None: to the end) of the list `path` run.

    What enters `first` is `states` (n, t, d), if given, else what would enter block 0.
    """
    parent_name, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_name)
    blocks = getattr(parent, name)
    end = len(blocks) if last is None else last + 1
    lower = [
        _Handover(b, states if i == 0 else None, as_tuple) for i, b in enumerate(blocks[:first])
    ]
    upper = [_Handover(b, None, as_tuple) for b in blocks[end:]]
    setattr(parent, name, nn.ModuleList([*lower, *blocks[first:end], *upper]))
    try:
        yield
    finally:
        setattr(parent, name, blocks)


def probe_hollow(model: PreTrainedModel, first: int, token: int) -> bool | None:
    """As `probe_chain`, for a model whose blocks below `first` are hollow: stand-ins run in their place."""
    path, blocks = find_blocks(model)
    if first == 0:
        return probe_chain(model, blocks, token)
    for as_tuple in (False, True):
        with standing_in(model, path, as_tuple, first=first):
            try:
                found = probe_chain(model, model.get_submodule(path), token)
            except (
                AttributeError,
                IndexError,
                RuntimeError,
                TypeError,
                ValueError,
            ):  # the other kind is expected
                continue
        if found is as_tuple:
            return found
    return None


def is_hollow(value: Tensor) -> bool:
    """Whether a parameter has no storage of its own."""
    return value.is_meta or (value.numel() > 1 and not any(value.stride()))


def guard(block: nn.Module, remedy: str) -> torch.utils.hooks.RemovableHandle:
    """Make a block raise ModelError if it runs while it is hollow."""

    def check(*_: Any) -> None:
        if any(map(is_hollow, block.parameters())):
            raise ModelError(
                f"the weights below the lowest edited block are not in memory; {remedy}"
            )

    return block.register_forward_pre_hook(check)
