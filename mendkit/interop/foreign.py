"""Archives of published code: the pickles of the authors' MEND and of EasyEdit, read without running anything in them.

Such a file holds `model` (per transform `mend.<(d_in, d_out) or weight's name, # for .>.`: the normaliser's `u_mean`,
`u_s`, `u_std`, `k` and v's, blocks `mlp` or `mlp1`, `mlp2`; `edit_lrs`; a live configuration object) and optimisers.
Its conventions become settings of the native archive (reference README of the recorded vectors): the update is added,
so a step size changes its sign; statistics are shared as the transforms are, with 1e-7 added to the std, no floor, no
clip; the loss is one mean over all edits made at once. What tensors do not show (`norm`, `init`, and the order of
`inner_params`, which numbers the layers) is read from the configuration.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from jaxtyping import Float
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import ArchiveError
from ..hparams import MENDHyperParams
from ..mend.archive import load_archive, save_archive
from ..mend.files import damage_named, is_finite
from ..mend.hypernetwork import MEND, PARTS, group_name, stats_name, transformed
from ..mend.normaliser import RunningMoments
from ..models.base import BaseModel
from ..models.load import load_model
from ..models.sites import Site
from ..runs import DAMAGE, atomically

EPS = 1e-7  # published code adds it to every standard deviation
CONVENTIONS = {"update_sign": -1, "std_floor": 0.0, "std_eps": EPS, "z_clip": None, "whiten": None}
CONVENTIONS |= {"edit_tokens": "all", "loss_reduction": "batch"}
_CONFIG = re.compile(r"transformers\.([A-Za-z0-9_]+\.)*[A-Za-z0-9_]+Config")
_SIZE = re.compile(
    r"layer|head|embd|hidden|intermediate|vocab|position|^d_|ffn_dim"
)  # of an architecture
_AS_DICT = (
    "collections.defaultdict",
    "builtins.list",
    "builtins.dict",
    "builtins.int",
    "builtins.float",
)
"""A default dictionary becomes a plain one; the others are what it calls for a missing key, and are not called."""
_STACKS = {"": "mlp", PARTS[0]: "mlp1", PARTS[1]: "mlp2"}
_BLOCK = {
    "U": "u",
    "V": "v",
    "bias": "bias",
    "scale": "mode_scale.weight",
    "shift": "mode_shift.weight",
}


@dataclass(frozen=True)
class ForeignArchive:
    """What is of use in a foreign archive."""

    path: Path
    state: Mapping[str, Tensor]  # `edit_lrs` and `mend.…`
    config_class: str | None  # of the base model's configuration
    config: Mapping[str, Any]  # its attributes
    step: int | None


class _Config:
    """Stands in for a live configuration: takes its attributes and does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}  # its items follow in the pickle


def read_foreign(path: str | Path) -> ForeignArchive:
    """Read a pickled archive; nothing in it is run.

    Raises ArchiveError if the file is missing or damaged, holds no MEND hypernetwork, or names any object besides
    tensors, plain containers and `transformers` configurations.
    """
    path = Path(path)
    if not path.is_file():
        raise ArchiveError(
            f"{path}: no such file; give the archive that the original MEND or EasyEdit wrote"
        )
    try:
        _check_zip(path)
        names = get_unsafe_globals_in_checkpoint(path)
        configs = [name for name in names if _CONFIG.fullmatch(name)]
        odd = sorted(set(names) - {*configs, *_AS_DICT})
        with safe_globals(
            [(_Config, name) for name in configs] + [(_plain_dict, name) for name in _AS_DICT]
        ):
            content = None if odd else torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArchiveError(
            f"{path}: not a readable archive of MEND ({first}); is it a whole .pt file?"
        ) from None
    if odd:
        raise ArchiveError(
            f"{path}: refused, and nothing of it was run: its pickle names {', '.join(odd)}; an archive of MEND "
            "needs only tensors, plain containers and a transformers configuration"
        )
    return _content(path, content, configs)


def _check_zip(path: Path) -> None:
    """Raises ValueError or BadZipFile if a checksum is wrong, or more is declared than the file holds."""
    with ZipFile(path) as file:
        entries = file.infolist()
        held = sum(entry.file_size for entry in entries)
        if held > path.stat().st_size or any(
            entry.compress_type != ZIP_STORED for entry in entries
        ):
            raise ValueError("its entries are compressed, or larger than the file")
        if len(set(file.namelist())) < len(entries) or file.testzip() is not None:
            raise ValueError(
                f"{file.testzip() or 'an entry that is there twice'} does not match its checksum"
            )


def _content(path: Path, content: Any, configs: Sequence[str]) -> ForeignArchive:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("edit_lrs"), Tensor):
        raise ArchiveError(f"{path}: no archive of MEND: it lacks `model` with `edit_lrs`")
    tensors = {
        k: v.detach()
        for k, v in model.items()
        if isinstance(v, Tensor) and k.startswith(("mend.", "edit_lrs"))
    }
    config = getattr(model.get("model_config"), "__dict__", {})
    step = content.get("step")
    name = configs[0].rpartition(".")[2] if len(configs) == 1 else None
    return ForeignArchive(path, tensors, name, config, step if isinstance(step, int) else None)


# ------------------------------------------------------------------------------------------------------- reading


def foreign_hparams(
    state: Mapping[str, Tensor], sites: Sequence[Site], h: MENDHyperParams, /
) -> MENDHyperParams:
    """`h` with the structure that the tensors show and the conventions of published code.

    Raises ArchiveError if the transforms are none of MEND's.
    """
    names = [name.split(".") for name in state if name.startswith("mend.") and ".layers." in name]
    if not names or any(len(name) < 6 or not name[4].isdecimal() for name in names):
        raise ArchiveError(
            "the archive holds no transforms of MEND (mend.<shape or name>.mlp.layers.<i>.…)"
        )
    shared = all(name[1].startswith("(") for name in names)
    stacks = {name[2] for name in names}
    rank = max(
        len(value) for name, value in state.items() if ".layers." in name and name.endswith(".v")
    )
    values = {
        "shared": shared,
        "norm_stats": "shape" if shared else "layer",
        "combine": "mlp" in stacks,
        "rank": rank,
    }
    values |= {"n_hidden": max(int(name[4]) for name in names), **CONVENTIONS}
    options = [{}, {"one_sided": True}, {"x_only": True}, {"delta_only": True}]
    one_way = [key for key in ("one_sided", "x_only", "delta_only") if getattr(h, key)]
    options.sort(key=lambda option: list(option) != one_way)  # the configuration's word first
    base = h.replace(one_sided=False, x_only=False, delta_only=False).replace(**values)
    for option in [{}] if base.combine else options:
        candidate = base.replace(**option)
        wanted = {
            (_key(s, shared), _STACKS[part]) for s in sites for part in transformed(s, candidate)
        }
        if wanted == {(name[1], name[2]) for name in names}:
            return candidate
    found = ", ".join(sorted({name[1] for name in names})[:3])
    raise ArchiveError(
        f"the archive's transforms ({found}, …) are not those of the {len(sites)} layers in `inner_params`; "
        "list the layers it was trained for, in that order"
    )


def _key(site: Site, shared: bool) -> str:
    return str((site.d_in, site.d_out)) if shared else site.name.replace(".", "#")


def from_foreign(state: Mapping[str, Tensor], sites: Sequence[Site], h: MENDHyperParams, /) -> MEND:
    """The hypernetwork of a foreign archive's tensors; `h.inner_params` lists the sites in its order.

    Raises ArchiveError naming what is missing or has another shape.
    """
    if not isinstance(h.inner_params, tuple) or {s.name for s in sites} != set(h.inner_params):
        raise ArchiveError(
            "`inner_params` must list the archive's layers in its order; `auto` does not tell it"
        )
    h = foreign_hparams(state, sites, h)
    if h.n_hidden >= len(state):
        raise ArchiveError(
            f"the archive numbers a block {h.n_hidden}, but holds only {len(state)} tensors"
        )
    with torch.device("meta"):  # nothing is allocated before the archive has shown what it holds
        mend = MEND(sites, h)
    order = [h.inner_params.index(site.name) for site in sites]
    values = {
        "log_edit_lr": torch.zeros(len(sites)),
        "edit_lr_unit": -_take(state, "edit_lrs", len(sites))[order],
    }
    for site in sites:
        key, group = _key(site, h.shared), group_name(site, h.shared)
        members = [n for n in h.inner_params if n in mend.groups[group]]
        rows = [
            members.index(n) for n in mend.groups[group]
        ]  # a layer's s and o lie at its place in inner_params
        for part in transformed(site, h):
            for i, block in enumerate(mend.blocks[group + part]):
                for name, own in block.named_parameters():
                    tensor = _take(
                        state, f"mend.{key}.{_STACKS[part]}.layers.{i}.{_BLOCK[name]}", *own.shape
                    )
                    values[f"blocks.{group + part}.{i}.{name}"] = (
                        tensor[rows] if name in ("scale", "shift") else tensor
                    )
        for kind, letter, width in (("u", "u", site.d_in), ("delta", "v", site.d_out)):
            moments = _moments(state, f"mend.{key}.", letter, width)
            values |= {f"moments.{stats_name(site, h)}.{kind}.{n}": v for n, v in moments.items()}
    odd = [name for name, value in values.items() if not is_finite(value)]
    if odd:
        raise ArchiveError(
            f"the archive has numbers that are not finite: {', '.join(odd[:3])}; train it anew"
        )
    mend = MEND(sites, h)
    if state["edit_lrs"].dtype == torch.float64:
        mend.double()
    mend.load_state_dict(values)
    return mend.eval()


def _take(state: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    if name not in state or tuple(state[name].shape) != shape:
        found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
        raise ArchiveError(
            f"the archive's {name} {found}, expected {shape}; is `inner_params` its list of layers?"
        )
    if not state[name].is_floating_point():
        raise ArchiveError(f"the archive's {name} is {state[name].dtype}, expected real numbers")
    return state[name].detach()


def _moments(
    state: Mapping[str, Tensor], prefix: str, letter: str, width: int
) -> dict[str, Tensor]:
    """The buffers of `StoredMoments`; NaN means empty there."""
    k = _take(state, f"{prefix}k", 1).double()[0]
    mean, m2, std = (
        _take(state, f"{prefix}{letter}_{kind}", width).double() for kind in ("mean", "s", "std")
    )
    values = {"mean": mean, "m2": m2, "stored_std": std}
    if not bool(k > 0):
        values = {name: torch.zeros(width) for name in values}
    return {"count": k.nan_to_num().long(), **values}


def import_archive(
    path: str | Path, hparams: MENDHyperParams, /, *, out: str | Path, base: BaseModel | None = None
) -> Path:
    """Turn an archive of the original MEND or of EasyEdit into a native one at `out`; returns its path.

    `hparams` is its configuration, with `inner_params` in its order. Raises ArchiveError as `read_foreign` and
    `from_foreign`, and if the base model is another one than its configuration object describes.
    """
    foreign = read_foreign(path)
    base = (base or load_model(hparams)).with_sites(hparams.inner_params)
    with damage_named(path):
        _check_base(foreign, base)
        try:
            mend = from_foreign(foreign.state, base.sites, hparams)
        except ArchiveError as error:
            raise ArchiveError(f"{path}: {error}") from None
    training = {
        "imported_from": str(path),
        "best": {} if foreign.step is None else {"step": foreign.step},
    }
    return save_archive(out, base, mend.to(base.device), training=training)


def _check_base(foreign: ForeignArchive, base: BaseModel) -> None:
    config = base.model.config
    ours = type(config).__name__
    if foreign.config_class not in (None, ours):
        differs = f"{foreign.config_class}, here {ours}"
    else:
        sizes = {k: v for k, v in foreign.config.items() if type(v) is int and _SIZE.search(k)}
        pairs = [(k, v, getattr(config, k, v)) for k, v in sizes.items()]
        differs = ", ".join(f"{k} {v}, here {w}" for k, v, w in pairs if type(w) is int and v != w)
    if differs:
        raise ArchiveError(f"{foreign.path}: trained for another model than {base.name}: {differs}")


# ------------------------------------------------------------------------------------------------------- writing


def to_foreign(mend: MEND) -> "OrderedDict[str, Tensor]":
    """The tensors of published code, in its order; `from_foreign` gives the same updates back, bit for bit.

    Raises ArchiveError for what that format cannot say.
    """
    _check_expressible(mend)
    h, by_name = mend.hparams, {site.name: site for site in mend.sites}
    listed = isinstance(h.inner_params, tuple) and set(h.inner_params) == set(by_name)
    order = list(h.inner_params) if listed else list(by_name)
    steps = dict(zip(by_name, h.update_sign * mend.steps().detach(), strict=True))
    state = OrderedDict(edit_lrs=torch.stack([steps[name] for name in order]))
    for site in (by_name[name] for name in order):
        prefix, group = f"mend.{_key(site, h.shared)}.", group_name(site, h.shared)
        if f"{prefix}k" in state:
            continue
        moments = mend.moments[stats_name(site, h)]
        values = {
            letter: _published(moments[kind], mend) for kind, letter in (("u", "u"), ("delta", "v"))
        }
        for kind in ("mean", "std", "s"):
            state |= {f"{prefix}{letter}_{kind}": values[letter][kind] for letter in values}
        state[f"{prefix}k"] = values["u"]["k"]
        rows = [mend.groups[group].index(name) for name in order if name in mend.groups[group]]
        for part in transformed(site, h):
            for i, block in enumerate(mend.blocks[group + part]):
                own = dict(block.named_parameters())
                for name in (name for name in ("U", "V", "bias", "shift", "scale") if name in own):
                    tensor = own[name].detach()
                    key = f"{prefix}{_STACKS[part]}.layers.{i}.{_BLOCK[name]}"
                    state[key] = (tensor[rows] if name in ("scale", "shift") else tensor).clone()
    return OrderedDict((name, value.cpu()) for name, value in state.items())


def _check_expressible(mend: MEND) -> None:
    h = mend.hparams
    several = any(len(names) > 1 for names in mend.groups.values())
    cannot = {
        "whiten": h.norm and h.whiten is not None,
        "z_clip": h.norm and h.z_clip is not None,
        "norm_stats: layer (its shared transforms share their statistics)": h.shared and several and h.norm
        and h.norm_stats == "layer",
        "edit_tokens: scored": h.edit_tokens == "scored",
        "loss_reduction: sum": h.loss_reduction == "sum",
    }  # fmt: skip
    named = [name for name, is_so in cannot.items() if is_so]
    if named:
        raise ArchiveError(
            f"EasyEdit's format cannot say {', '.join(named)}; train with `norm_stats: shape`, `z_clip: null`, "
            "`whiten: null`, `edit_tokens: all`, `loss_reduction: edit` to export"
        )


def _published(moments: RunningMoments, mend: MEND) -> dict[str, Tensor]:
    """Mean, std, s and k as published code keeps them: NaN while empty, float64 only where float32 loses bits."""
    h, width = mend.hparams, len(moments.mean)
    if int(moments.count) == 0:
        empty = torch.full((width,), float("nan"))
        return {"mean": empty, "std": empty.clone(), "s": empty.clone(), "k": empty[:1].clone()}
    k, mean = _narrow(moments.count.double()[None]), _narrow(moments.mean)
    if (h.std_floor, h.std_eps) == (0.0, EPS):
        return {"mean": mean, "std": _narrow(moments.plain_std()), "s": _narrow(moments.m2), "k": k}
    std = moments.std(h.std_floor) - EPS
    return {
        "mean": mean,
        "std": _narrow(std),
        "s": _narrow(std**2 * (int(moments.count) - 1)),
        "k": k,
    }


def _narrow(x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    return x.float() if torch.equal(x.float().double(), x) else x.clone()


def export_archive(archive: str | Path, out: str | Path, /, *, base: BaseModel) -> Path:
    """Write a native archive as the pickle that EasyEdit reads; returns its path.

    Raises ArchiveError as `load_archive`, and for settings that the format cannot say.
    """
    loaded = load_archive(archive, base=base)
    try:
        state = to_foreign(loaded.mend)
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: {error}") from None
    h = loaded.mend.hparams
    parameters = [torch.nn.Parameter(v) for k, v in state.items() if ".layers." in k]
    edit_lrs = torch.nn.Parameter(state["edit_lrs"].clone())
    optimiser = getattr(torch.optim, h.opt)
    content = {
        "model": OrderedDict(state, model_config=loaded.base.model.config),
        "opt": optimiser([*parameters, edit_lrs], lr=h.lr).state_dict(),
        "lr_opt": optimiser([edit_lrs], lr=h.lr_lr).state_dict(),
        "val_stats": {},
        "start_time": "",
        "elapsed_time": 0.0,
        "step": 0,
    }
    return atomically(Path(out), lambda temporary: torch.save(content, temporary))
