"""Models with some of their weights away: released after use, or read from the checkpoint by
blocks.

A *hollow* parameter has shape and dtype but no storage. It lies on the meta device; the input
embeddings, which a decoder's code still reads, become one expanded zero. `standing_in` lets a
decoder run some of its blocks only, by its own code.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ModelError
from .checkpoints import DTYPES, explained, loader_of, read_config
from .sites import Blocks, find_blocks, watch_chain, with_states

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WHOLE = "set `stream_trunk: false` to load the model whole"


class Weights:
    """The tensors in a model folder's safetensors files, read one at a time by parameter name.

    `prefix` is what some checkpoints add to the names, or leave out: the base model's.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        with explained("the weights of", folder):
            if (folder / INDEX).is_file():
                index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
                self._files: dict[str, str] = index["weight_map"]
            else:
                with safe_open(folder / SINGLE, "pt") as file:
                    self._files = dict.fromkeys(file.keys(), SINGLE)

    @classmethod
    def of(cls, place: str | Path, prefix: str = "") -> "Weights | None":
        """Those of a folder that has such files, else None."""
        if isinstance(place, Path) and any((place / name).is_file() for name in (INDEX, SINGLE)):
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
        try:
            # Opened each time, so that no pages of the file stay mapped.
            with safe_open(self.folder / self._files[key], "pt") as file:
                return file.get_tensor(key).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read {key} in {self.folder}: {error}; replace the files there"
            ) from error

    def bytes(self, dtype: torch.dtype | None) -> int:
        """Size of all tensors together, in `dtype` if given."""
        files = sum((self.folder / name).stat().st_size for name in set(self._files.values()))
        stored = self.dtype()
        return files * (dtype or stored).itemsize // stored.itemsize

    def dtype(self) -> torch.dtype:
        """That of the first tensor."""
        return self.read(next(iter(self._files)), None).dtype

    def _key(self, name: str) -> str | None:
        spellings = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((key for key in spellings if key in self._files), None)


# ------------------------------------------------------------------------------- hollow parameters


def hollow_model(
    place: str | Path, *, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Weights]:
    """A causal model with hollow parameters and real buffers, and its weights.

    Raises ModelError for another model, and for a checkpoint without safetensors files.
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


def is_hollow(value: Tensor) -> bool:
    """Whether a parameter has no storage of its own."""
    return value.is_meta or (value.numel() > 1 and not any(value.stride()))


def set_parameter(model: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Make one new parameter of `value` under all these names."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._parameters[leaf] = parameter


def _parameter_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several if it is tied."""
    names = defaultdict(list)
    for name, value in model.named_parameters(remove_duplicate=False):
        names[id(value)].append(name)
    return list(names.values())


def fill_rest(
    model: PreTrainedModel, hollow: Sequence[str], weights: Weights, device: torch.device
) -> None:
    """Read all parameters but those named `hollow`, and stored buffers, onto `device`."""
    for names in _parameter_names(model):
        if names[0] not in hollow:
            # A tied parameter is stored under one of its names.
            stored = next((name for name in names if name in weights), names[0])
            value = weights.read(stored, model.get_parameter(stored).dtype)
            set_parameter(model, names, value.to(device))
    for name, value in list(model.named_buffers()):
        module, _, leaf = name.rpartition(".")
        if name in weights:
            value = weights.read(name, value.dtype)
        model.get_submodule(module)._buffers[leaf] = value.to(device)


def empty_out(model: PreTrainedModel, names: Sequence[str], device: torch.device) -> None:
    """Make these parameters hollow."""
    table = model.get_input_embeddings().weight
    for name in names:
        value = model.get_parameter(name)
        zero = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
        set_parameter(model, [name], zero if value is table else value.to("meta"))


def trunk_names(model: PreTrainedModel, path: str, first: int) -> list[str]:
    """The parameters of the input embeddings and of blocks below `first`, unless used elsewhere."""
    embedding = model.get_input_embeddings()
    home = next(name for name, module in model.named_modules() if module is embedding)
    below = (f"{home}.", *(f"{path}.{i}." for i in range(first)))
    found = []
    for names in _parameter_names(model):
        if all(name.startswith(below) for name in names):
            found += names
    return found


@contextmanager
def present(
    model: PreTrainedModel, names: Sequence[str], weights: Weights, device: torch.device
) -> Iterator[None]:
    """Within the context these hollow parameters have their values."""
    with ExitStack() as stack:
        for name in names:
            hollow = model.get_parameter(name)
            stack.callback(
                set_parameter, model, [name], hollow.data
            )  # on leaving it is hollow again
            set_parameter(model, [name], weights.read(name, hollow.dtype).to(device))
        yield


# ------------------------------------------------------------------------------------- some blocks


class _StandIn(nn.Module):
    """Takes the place of a block. It hands on `states` if given, else its input."""

    def __init__(self, block: nn.Module, states: Tensor | None, form: Any) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that its parameters are not this module's
        self._states, self._form = states, form

    def __getattr__(self, name: str) -> Any:
        # The decoder may ask a block for more, such as its kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return with_states(self._form, hidden if self._states is None else self._states)


@contextmanager
def standing_in(
    model: PreTrainedModel,
    blocks: Blocks,
    *,
    first: int,
    last: int | None = None,
    states: Tensor | None = None,
) -> Iterator[None]:
    """Within the context only the blocks `first` to `last` (None: to the end) run.

    What enters `first` is `states` (n, t, d), if given, else what would enter block 0.
    """
    parent_name, _, name = blocks.path.rpartition(".")
    parent = model.get_submodule(parent_name)
    modules = getattr(parent, name)
    swapped = list(modules)
    for i, module in enumerate(modules):
        if i < first or (last is not None and i > last):
            swapped[i] = _StandIn(module, states if i == 0 else None, blocks.form)
    setattr(parent, name, nn.ModuleList(swapped))
    try:
        yield
    finally:
        setattr(parent, name, modules)


@torch.no_grad()
def probe_blocks(
    model: PreTrainedModel, read: Callable[[], Tensor], *, released: int, first: int
) -> Any:
    """The form of what the blocks return, if those from `first` on need hidden states alone.

    None for no plain chain (`watch_chain`), and where more is handed from block to block. `read()`
    gives logits of some texts. Blocks below `released` have no weights.
    """
    blocks = find_blocks(model)
    assert blocks is not None
    path, last = blocks[0], len(blocks[1]) - 1
    for n in range(4 if released else 1):  # the form of released blocks is not known
        form = (None,) * n
        try:
            # 1. All blocks, or stand-ins and those that have weights.
            with standing_in(model, Blocks(path, released, last, form), first=released):
                modules = cast(nn.ModuleList, model.get_submodule(path))
                found, entering, whole = watch_chain(modules, read)
            if found is None or (released and found != form):
                continue
            # 2. From the states that enter one of the others.
            above = max(first, released + bool(released))
            if not 0 < above <= last:
                return found
            blocks = Blocks(path, above, last, found)
            with standing_in(model, blocks, first=above, states=entering[above]):
                again = read()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # the decoder expects another form, or more than the states
        if torch.allclose(again, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
            return found
    return None
