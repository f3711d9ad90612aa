"""Archives of published code: the pickles of the authors' MEND and of EasyEdit.

Such a file holds `model`: `edit_lrs`, one per layer of `inner_params`; a live configuration object;
and per transform `mend.<(d_in, d_out), or the weight's name with # for .>.` the normaliser's
`u_mean`, `u_s`, `u_std`, the same of v, `k`, and blocks `mlp` or `mlp1`, `mlp2`.

Its conventions become settings of the native archive. The update is added, so a step size changes
its sign. 1e-7 is added to the std. The loss is one mean over all edits made at once.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
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
CONVENTIONS: dict[str, Any] = {
    "update_sign": -1,
    "std_floor": 0.0,
    "std_eps": EPS,
    "z_clip": None,
    "whiten": None,
}
CONVENTIONS |= {"edit_tokens": "all", "loss_reduction": "batch"}
CONFIG_CLASS = re.compile(r"transformers\.([A-Za-z0-9_]+\.)*[A-Za-z0-9_]+Config")
ARCHITECTURE_SIZE = re.compile(r"layer|head|embd|hidden|intermediate|vocab|position|^d_|ffn_dim")

# A default dictionary becomes a plain one. The others are what it would call for a missing key.
AS_DICT = tuple(f"builtins.{name}" for name in ("list", "dict", "int", "float"))
AS_DICT += ("collections.defaultdict",)

TRANSFORM = re.compile(
    r"mend\.(?P<key>[^.]+)\.(?P<stack>\w+)\.layers\.(?P<block>\d+)\.(?P<tensor>.+)"
)
STACKS = {"": "mlp", PARTS[0]: "mlp1", PARTS[1]: "mlp2"}
BLOCK_TENSORS = {"U": "u", "V": "v", "bias": "bias"}
BLOCK_TENSORS |= {"shift": "mode_shift.weight", "scale": "mode_scale.weight"}
FACTOR_LETTERS = {"u": "u", "delta": "v"}


@dataclass(frozen=True)
class ForeignArchive:
    """What is of use in a foreign archive."""

    path: Path
    state: Mapping[str, Tensor]  # `edit_lrs` and `mend.…`
    config_class: str | None  # of the base model's configuration
    config: Mapping[str, Any]  # its attributes
    step: int | None


class InertConfig:
    """Stands in for a live configuration: takes its attributes and does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}  # its items follow in the pickle


def read_foreign(path: str | Path) -> ForeignArchive:
    """Read a pickled archive; nothing in it is run.

    Raises ArchiveError if the file is missing or damaged, holds no MEND hypernetwork, or names any
    object besides tensors, plain containers and `transformers` configurations.
    """
    path = Path(path)
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file")
    try:
        _check_zip(path)
        names = get_unsafe_globals_in_checkpoint(path)
        configs = [name for name in names if CONFIG_CLASS.fullmatch(name)]
        odd = sorted(set(names) - {*configs, *AS_DICT})
        allowed: list[Any] = [(InertConfig, name) for name in configs]
        allowed += [(_plain_dict, name) for name in AS_DICT]
        content = None
        if not odd:
            with safe_globals(allowed):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ArchiveError(f"{path}: not a readable archive of MEND ({first})") from None
    if odd:
        raise ArchiveError(
            f"{path}: refused, and nothing of it was run: its pickle names {', '.join(odd)}"
        )
    if not isinstance(content, dict):
        content = {}
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("edit_lrs"), Tensor):
        raise ArchiveError(f"{path}: no archive of MEND: it lacks `model` with `edit_lrs`")
    state = {name: v.detach() for name, v in model.items() if isinstance(v, Tensor)}
    config_class = configs[0].rpartition(".")[2] if len(configs) == 1 else None
    config = getattr(model.get("model_config"), "__dict__", {})
    step = content.get("step")
    return ForeignArchive(path, state, config_class, config, step if type(step) is int else None)


def _check_zip(path: Path) -> None:
    """Raises ValueError or BadZipFile if a checksum is wrong, or more is declared than is held."""
    with ZipFile(path) as file:
        entries = file.infolist()
        compressed = any(entry.compress_type != ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are compressed, or larger than the file")
        if len(set(file.namelist())) < len(entries):
            raise ValueError("an entry is there twice")
        if file.testzip() is not None:
            raise ValueError(f"{file.testzip()} does not match its checksum")


# ------------------------------------------------------------------------------------ what it says


def foreign_hparams(
    state: Mapping[str, Tensor], sites: Sequence[Site], h: MENDHyperParams
) -> MENDHyperParams:
    """`h` with the structure that the tensors show and the conventions of published code.

    What tensors do not show (`norm`, `init`, the order of `inner_params`) stays as in `h`. Raises
    ArchiveError if the transforms are none of MEND's.
    """
    transforms, blocks, ranks = set(), {0}, [0]
    for name, value in state.items():
        found = TRANSFORM.fullmatch(name)
        if found:
            transforms.add((found["key"], found["stack"]))
            blocks.add(int(found["block"]))
            ranks.append(len(value) if found["tensor"] == "v" else 0)
    if not transforms or max(blocks) >= len(state):
        raise ArchiveError("the archive holds no transforms of MEND")
    shared = all(key.startswith("(") for key, _ in transforms)
    structure: dict[str, Any] = {"shared": shared, "norm_stats": "shape" if shared else "layer"}
    structure |= {"rank": max(ranks), "n_hidden": max(blocks)}
    # Several options may give the same transforms: the configuration's word comes first.
    options = ["combine", "", "one_sided", "x_only", "delta_only"]
    for option in sorted(options, key=lambda option: not (option and getattr(h, option))):
        ways = {name: name == option for name in options if name}
        candidate = h.replace(**structure, **ways, **CONVENTIONS)
        wanted = set()
        for site in sites:
            for part in transformed(site, candidate):
                wanted.add((transform_key(site, shared), STACKS[part]))
        if wanted == transforms:
            return candidate
    raise ArchiveError(
        f"the archive's transforms are not those of the {len(sites)} layers in `inner_params`; "
        "list the layers it was trained for, in that order"
    )


def transform_key(site: Site, shared: bool) -> str:
    """The published name of a layer's transform."""
    return str((site.d_in, site.d_out)) if shared else site.name.replace(".", "#")


def _block_names(
    mend: MEND, site: Site, order: Sequence[str]
) -> Iterator[tuple[str, str, Tensor | None]]:
    """Every tensor of a layer's transform: its published name, ours, and its rows' order.

    A tensor with a row for each layer holds them in published code in the order of `inner_params`
    (`order`): theirs = ours[rows].
    """
    h = mend.hparams
    group = group_name(site, h.shared)
    layers = mend.groups[group]
    rows = torch.tensor([layers.index(name) for name in order if name in layers])
    for part in transformed(site, h):
        for i, block in enumerate(mend.blocks[group + part]):
            known = dict(block.named_parameters())
            for name, published in BLOCK_TENSORS.items():
                if name in known:
                    theirs = f"mend.{transform_key(site, h.shared)}.{STACKS[part]}.layers.{i}"
                    by_layer = rows if name in ("shift", "scale") else None
                    yield f"{theirs}.{published}", f"blocks.{group + part}.{i}.{name}", by_layer


# ----------------------------------------------------------------------------------------- reading


def from_foreign(state: Mapping[str, Tensor], sites: Sequence[Site], h: MENDHyperParams) -> MEND:
    """The hypernetwork of a foreign archive's tensors; `h.inner_params` lists the sites in order.

    Raises ArchiveError naming what is missing, has another shape or is not finite.
    """
    order = h.inner_params
    if not isinstance(order, tuple) or {site.name for site in sites} != set(order):
        raise ArchiveError("`inner_params` must list the archive's layers in its order, not `auto`")
    h = foreign_hparams(state, sites, h)
    with torch.device("meta"):  # nothing is allocated before the archive has shown what it holds
        mend = MEND(sites, h)
    places = [order.index(site.name) for site in sites]
    values = {"log_edit_lr": torch.zeros(len(sites))}
    values["edit_lr_unit"] = -_take(state, "edit_lrs", len(sites))[places]
    for site in sites:
        for theirs, ours, rows in _block_names(mend, site, order):
            tensor = _take(state, theirs, *mend.get_parameter(ours).shape)
            values[ours] = tensor if rows is None else tensor[rows.argsort()]
        for kind, width in (("u", site.d_in), ("delta", site.d_out)):
            moments = _native_moments(state, transform_key(site, h.shared), kind, width)
            for name, value in moments.items():
                values[f"moments.{stats_name(site, h)}.{kind}.{name}"] = value
    odd = [name for name, value in values.items() if not is_finite(value)]
    if odd:
        raise ArchiveError(f"the archive has numbers that are not finite: {', '.join(odd[:3])}")
    mend = MEND(sites, h)
    if state["edit_lrs"].dtype == torch.float64:
        mend.double()
    mend.load_state_dict(values)
    return mend.eval()


def _take(state: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    if name not in state:
        found = "is missing"
    elif tuple(state[name].shape) != shape:
        found = f"has shape {tuple(state[name].shape)}"
    elif not state[name].is_floating_point():
        found = f"is {state[name].dtype}"
    else:
        return state[name]
    raise ArchiveError(f"the archive's {name} {found}, expected real numbers of shape {shape}")


def _native_moments(
    state: Mapping[str, Tensor], key: str, kind: str, width: int
) -> dict[str, Tensor]:
    """The buffers of `StoredMoments`; published code has NaN while there was no factor yet."""
    count = _take(state, f"mend.{key}.k", 1).double()[0]
    values = {"count": count.nan_to_num().long()}
    for ours, theirs in {"mean": "mean", "m2": "s", "stored_std": "std"}.items():
        stored = _take(state, f"mend.{key}.{FACTOR_LETTERS[kind]}_{theirs}", width).double()
        values[ours] = stored if count > 0 else torch.zeros(width)
    return values


def import_archive(
    path: str | Path, hparams: MENDHyperParams, *, out: str | Path, base: BaseModel | None = None
) -> Path:
    """Turn an archive of the original MEND or of EasyEdit into a native one at `out`.

    `hparams` is its configuration, with `inner_params` in its order. Raises ArchiveError as
    `read_foreign` and `from_foreign`, and if the base model is another one than was recorded.
    """
    foreign = read_foreign(path)
    base = (base or load_model(hparams)).with_sites(hparams.inner_params)
    with damage_named(path):
        _check_base(foreign, base)
        try:
            mend = from_foreign(foreign.state, base.sites, hparams)
        except ArchiveError as error:
            raise ArchiveError(f"{path}: {error}") from None
    training: dict[str, Any] = {"imported_from": str(path), "best": {}}
    if foreign.step is not None:
        training["best"] = {"step": foreign.step}
    return save_archive(out, base, mend.to(base.device), training=training)


def _check_base(foreign: ForeignArchive, base: BaseModel) -> None:
    config, differs = base.model.config, []
    if foreign.config_class not in (None, type(config).__name__):
        differs.append(f"{foreign.config_class}, here {type(config).__name__}")
    elif foreign.config_class is not None:
        for name, size in foreign.config.items():
            ours = getattr(config, name, size)
            if ARCHITECTURE_SIZE.search(name) and type(size) is type(ours) is int and size != ours:
                differs.append(f"{name} {size}, here {ours}")
    if differs:
        raise ArchiveError(
            f"{foreign.path}: trained for another model than {base.name}: {', '.join(differs)}"
        )


# ----------------------------------------------------------------------------------------- writing


def to_foreign(mend: MEND) -> "OrderedDict[str, Tensor]":
    """The tensors of published code, in its order.

    `from_foreign` gives the same updates back, bit for bit. Raises ArchiveError for what that
    format cannot say.
    """
    _check_expressible(mend)
    h, sites = mend.hparams, {site.name: site for site in mend.sites}
    listed = isinstance(h.inner_params, tuple) and set(h.inner_params) == set(sites)
    order = list(h.inner_params) if listed else list(sites)
    steps = dict(zip(sites, h.update_sign * mend.steps().detach(), strict=True))
    ours = mend.state_dict()
    state = OrderedDict(edit_lrs=torch.stack([steps[name] for name in order]))
    for name in order:
        site = sites[name]
        prefix = f"mend.{transform_key(site, h.shared)}."
        if f"{prefix}k" in state:  # the transform of an earlier layer, too
            continue
        moments = mend.moments[stats_name(site, h)]
        stored = {kind: _published_moments(moments[kind], h) for kind in FACTOR_LETTERS}
        for what in ("mean", "std", "s"):
            for kind, letter in FACTOR_LETTERS.items():
                state[f"{prefix}{letter}_{what}"] = stored[kind][what]
        state[f"{prefix}k"] = stored["u"]["k"]
        for theirs, native, rows in _block_names(mend, site, order):
            tensor = ours[native] if rows is None else ours[native][rows]
            state[theirs] = tensor.detach().clone()
    return OrderedDict((name, value.cpu()) for name, value in state.items())


def _check_expressible(mend: MEND) -> None:
    h = mend.hparams
    several = any(len(names) > 1 for names in mend.groups.values())  # layers in a transform
    cannot = {
        "whiten": h.norm and h.whiten is not None,
        "z_clip": h.norm and h.z_clip is not None,
        "norm_stats: layer": h.norm and h.shared and several and h.norm_stats == "layer",
        "edit_tokens: scored": h.edit_tokens == "scored",
        "loss_reduction: sum": h.loss_reduction == "sum",
        "aggregate: least_squares": h.aggregate == "least_squares",
    }
    named = [name for name, is_so in cannot.items() if is_so]
    if named:
        raise ArchiveError(
            f"EasyEdit's format cannot say {', '.join(named)}; train without (docs/QUESTIONS.md)"
        )


def _published_moments(moments: RunningMoments, h: MENDHyperParams) -> dict[str, Tensor]:
    """Mean, std, sum of squares (`s`) and count (`k`) as published code keeps them.

    NaN while there was no factor yet; float64 only where float32 would lose bits.
    """
    count, width = moments.count.double()[None], len(moments.mean)
    if count == 0:
        empty = {name: torch.full((width,), torch.nan) for name in ("mean", "std", "s")}
        return {**empty, "k": torch.full((1,), torch.nan)}
    if (h.std_floor, h.std_eps) == (0.0, EPS):
        std, s = moments.plain_std(), moments.m2
    else:  # published code adds EPS
        std = moments.std(h.std_floor) - EPS
        s = std**2 * (count - 1)
    values = {"mean": moments.mean, "std": std, "s": s, "k": count}
    for name, value in values.items():
        narrow = value.float()
        values[name] = narrow if torch.equal(narrow.double(), value) else value.clone()
    return values


def export_archive(archive: str | Path, out: str | Path, *, base: BaseModel) -> Path:
    """Write a native archive as the pickle that EasyEdit reads; returns its path.

    Raises ArchiveError as `load_archive`, and for settings that the format cannot say.
    """
    loaded = load_archive(archive, base=base)
    try:
        state = to_foreign(loaded.mend)
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: {error}") from None
    h = loaded.mend.hparams
    optimiser = getattr(torch.optim, h.opt)
    parameters = [torch.nn.Parameter(v) for name, v in state.items() if ".layers." in name]
    edit_lrs = torch.nn.Parameter(state["edit_lrs"].clone())
    content: dict[str, Any] = {
        "model": OrderedDict(state, model_config=loaded.base.model.config),
        "opt": optimiser([*parameters, edit_lrs], lr=h.lr).state_dict(),
        "lr_opt": optimiser([edit_lrs], lr=h.lr_lr).state_dict(),
    }
    content |= {"val_stats": {}, "start_time": "", "elapsed_time": 0.0, "step": 0}
    return atomically(Path(out), lambda temporary: torch.save(content, temporary))
