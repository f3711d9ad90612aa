"""Archives of published code: the pickles of the authors' MEND and of EasyEdit.

Such a file holds `model`: `edit_lrs`, one per layer of `inner_params`; `model_config`, a live
object; and per transform `mend.<(d_in, d_out), or the weight's name with # for .>.` the
normaliser's `u_mean`, `u_std`, `u_s`, the same of v, `k`, and blocks `mlp`, or `mlp1` and `mlp2`.
Tensors with a row per layer hold them in the order of `inner_params`.

Its conventions become settings of the native archive: the update is added, so a step size changes
its sign; 1e-7 is added to each std; the loss is one mean over all edits made at once.
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

from ..errors import ArchiveError, reason
from ..hparams import MENDHyperParams
from ..mend.archive import load_archive, save_archive
from ..mend.files import damage_named, is_finite
from ..mend.hypernetwork import MEND, PARTS, group_name, stats_name, transformed
from ..mend.normaliser import RunningMoments
from ..models.base import BaseModel
from ..models.load import load_model
from ..models.sites import Site
from ..runs import DAMAGE, atomically, user_path

EPS = 1e-7
CONVENTIONS: dict[str, Any] = {
    "update_sign": -1,
    "std_floor": 0.0,
    "std_eps": EPS,
    "z_clip": None,
    "whiten": None,
    "edit_tokens": "all",
    "loss_reduction": "batch",
}
CONFIG_CLASS = re.compile(r"transformers\.([A-Za-z0-9_]+\.)*[A-Za-z0-9_]+Config")
SETTINGS = "give all settings and `inner_params` that it was trained with"
SIZES = ("n_layer", "num_layers", "num_hidden_layers", "n_embd", "d_model", "hidden_size")

# Published names and ours, in the order of a published file.
STACKS = {"": "mlp", PARTS[0]: "mlp1", PARTS[1]: "mlp2"}
BLOCK_TENSORS = {
    "u": "U",
    "v": "V",
    "bias": "bias",
    "mode_shift.weight": "shift",
    "mode_scale.weight": "scale",
}
STATISTICS = {
    "u_mean": "u.mean",
    "v_mean": "delta.mean",
    "u_std": "u.stored_std",
    "v_std": "delta.stored_std",
    "u_s": "u.m2",
    "v_s": "delta.m2",
    "k": "u.count",
}


@dataclass(frozen=True)
class ForeignArchive:
    """What is of use in a foreign archive."""

    state: Mapping[str, Tensor]  # `edit_lrs` and `mend.…`
    config_class: str | None  # of the base model's configuration
    config: Mapping[str, Any]  # its attributes
    step: int | None


class InertConfig:
    """Stands in for a live configuration: takes its attributes and does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def read_foreign(path: str | Path) -> ForeignArchive:
    """Read a pickled archive; nothing in it is run.

    Raises ArchiveError if the file is missing or damaged, holds no MEND hypernetwork, or names any
    object besides tensors, plain containers and `transformers` configurations.
    """
    path = user_path(path)
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file")
    content: Any = None
    try:
        _check_zip(path)
        names = get_unsafe_globals_in_checkpoint(path)
        configs = [name for name in names if CONFIG_CLASS.fullmatch(name)]
        odd = sorted(set(names) - set(configs))
        if not odd:
            with safe_globals([(InertConfig, name) for name in configs]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise ArchiveError(f"{path}: not a readable archive of MEND ({reason(error)})") from None
    if odd:
        raise ArchiveError(
            f"{path}: refused, and nothing of it was run: its pickle names {', '.join(odd)}"
        )
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("edit_lrs"), Tensor):
        raise ArchiveError(f"{path}: no archive of MEND: it lacks `model` with `edit_lrs`")
    state = {name: v.detach() for name, v in model.items() if isinstance(v, Tensor)}
    config_class, step = None, content.get("step")
    if len(configs) == 1:
        config_class = configs[0].rpartition(".")[2]
    if type(step) is not int:
        step = None
    config = getattr(model.get("model_config"), "__dict__", {})
    return ForeignArchive(state, config_class, config, step)


def _check_zip(path: Path) -> None:
    """Raises ValueError or BadZipFile if a checksum is wrong, or more is declared than is held."""
    with ZipFile(path) as file:
        entries = file.infolist()
        compressed = any(entry.compress_type != ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are compressed, or larger than the file")
        if len(set(file.namelist())) < len(entries) or file.testzip() is not None:
            raise ValueError("an entry is there twice, or does not match its checksum")


# ------------------------------------------------------------------------------------------- names


def _tensor_names(mend: MEND, order: Sequence[str]) -> Iterator[tuple[str, str, Tensor | None]]:
    """Every tensor besides step sizes: its published name, ours, and `rows`.

    Where it has a row for each layer, theirs = ours[rows].
    """
    h, sites = mend.hparams, {site.name: site for site in mend.sites}
    for site in map(sites.__getitem__, order):
        key = "mend." + site.name.replace(".", "#")
        if h.shared:
            key = f"mend.{(site.d_in, site.d_out)}"
        for theirs, ours in STATISTICS.items():
            yield f"{key}.{theirs}", f"moments.{stats_name(site, h)}.{ours}", None
        group = group_name(site, h.shared)
        layers = mend.groups[group]
        rows = torch.tensor([layers.index(name) for name in order if name in layers])
        for part in transformed(site, h):
            for i, block in enumerate(mend.blocks[group + part]):
                known = dict(block.named_parameters())
                for theirs, ours in BLOCK_TENSORS.items():
                    if ours in known:
                        theirs = f"{key}.{STACKS[part]}.layers.{i}.{theirs}"
                        by_layer = rows if ours in ("shift", "scale") else None
                        yield theirs, f"blocks.{group + part}.{i}.{ours}", by_layer


# ----------------------------------------------------------------------------------------- reading


def from_foreign(state: Mapping[str, Tensor], sites: Sequence[Site], h: MENDHyperParams) -> MEND:
    """The hypernetwork of a foreign archive's tensors.

    `h` is its configuration, with `inner_params` in its order. Raises ArchiveError naming what is
    missing, is there besides, has another shape or is not finite.
    """
    order = h.inner_params
    if not isinstance(order, tuple) or {site.name for site in sites} != set(order):
        raise ArchiveError("`inner_params` must list the archive's layers in its order, not `auto`")
    h = h.replace(norm_stats="shape" if h.shared else "layer", **CONVENTIONS)
    if h.edit_lr == "auto":  # the archive's step sizes have started
        h = h.replace(edit_lr=MENDHyperParams.model_fields["edit_lr"].default)
    with torch.device("meta"):  # nothing is allocated before the archive has shown what it holds
        mend = MEND(sites, h)
    shapes = {name: value.shape for name, value in mend.state_dict().items()}
    # Step sizes change their sign, and their order becomes that of the sites.
    places = [order.index(site.name) for site in sites]
    values = {"log_edit_lr": torch.zeros(len(sites))}
    values["edit_lr_unit"] = -_take(state, "edit_lrs", (len(sites),))[places]
    taken = {"edit_lrs"}
    # Statistics are kept in float64. Rows by layer get the sites' order.
    for theirs, ours, rows in _tensor_names(mend, order):
        taken.add(theirs)
        value = _take(state, theirs, shapes[ours] or (1,))
        if ours.startswith("moments."):
            count = _take(state, f"{theirs.rpartition('.')[0]}.k", (1,)).double()
            value = value.double()
            if count.isnan():  # while there was no factor yet
                value = torch.zeros_like(value)
        if ours.endswith(".u.count"):
            value = value[0].long()
            values[ours.replace(".u.", ".delta.")] = value
        values[ours] = value if rows is None else value[rows.argsort()]
    # What is left over belongs to other settings, or to other layers.
    odd = sorted(set(state) - taken)
    odd += [name for name, value in values.items() if not is_finite(value)]
    if odd:
        raise ArchiveError(
            f"the archive's {odd[0]} belongs to no layer, or is not finite; {SETTINGS}"
        )
    mend = MEND(sites, h)
    if state["edit_lrs"].dtype == torch.float64:
        mend.double()
    mend.load_state_dict(values)
    return mend.eval()


def _take(state: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    value, found = state.get(name), "nothing"
    if value is not None:
        found = f"{value.dtype} of shape {tuple(value.shape)}"
        if tuple(value.shape) == tuple(shape) and value.is_floating_point():
            return value
    raise ArchiveError(
        f"the archive's {name}: expected real numbers of shape {tuple(shape)}, found {found}; "
        + SETTINGS
    )


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
        try:
            _check_base(foreign, base)
            mend = from_foreign(foreign.state, base.sites, hparams)
        except ArchiveError as error:
            raise ArchiveError(f"{path}: {error}") from None
    training: dict[str, Any] = {"imported_from": Path(path).name, "best": {}}
    if foreign.step is not None:
        training["best"]["step"] = foreign.step
    return save_archive(out, base, mend.to(base.device), training=training)


def _check_base(foreign: ForeignArchive, base: BaseModel) -> None:
    theirs = {"class": foreign.config_class} | dict(foreign.config)
    for name in ("class", *SIZES):
        ours = getattr(base.model.config, name, None)
        if name == "class":
            ours = type(base.model.config).__name__
        if ours is not None and theirs.get(name) not in (None, ours):
            raise ArchiveError(
                f"trained for another model than {base.name}: {name} {theirs[name]}, here {ours}"
            )


# ----------------------------------------------------------------------------------------- writing


def to_foreign(mend: MEND) -> "OrderedDict[str, Tensor]":
    """The tensors of published code, in its order.

    `from_foreign` gives the same updates back, bit for bit. Raises ArchiveError for what that
    format cannot say.
    """
    _check_expressible(mend)
    h, names = mend.hparams, [site.name for site in mend.sites]
    order = names if isinstance(h.inner_params, str) else h.inner_params
    values: dict[str, Tensor] = mend.state_dict()
    for name, by_kind in mend.moments.items():
        for kind, moments in by_kind.items():
            for what, value in _published(moments, h).items():
                values[f"moments.{name}.{kind}.{what}"] = value
    steps = dict(zip(names, h.update_sign * mend.steps().detach(), strict=True))
    state = OrderedDict(edit_lrs=torch.stack([steps[name] for name in order]))
    for theirs, ours, rows in _tensor_names(mend, order):
        value = values[ours] if rows is None else values[ours][rows]
        state[theirs] = value.clone()
    return OrderedDict((name, value.cpu()) for name, value in state.items())


def _check_expressible(mend: MEND) -> None:
    h = mend.hparams
    several = any(len(names) > 1 for names in mend.groups.values())  # layers in a transform
    cannot = {
        "whiten": h.norm and h.whiten is not None,
        "site_share": h.site_share < 1,
        "whiten_values": h.norm and h.whiten_values is not None,
        "z_clip": h.norm and h.z_clip is not None,
        "norm_stats: layer": h.norm and h.shared and several and h.norm_stats == "layer",
        "edit_on: text": h.edit_on == "text",
        "edit_tokens: scored": h.edit_tokens == "scored",
        "loss_reduction: sum": h.loss_reduction == "sum",
        f"aggregate: {h.aggregate}": h.aggregate != "sum",
    }
    named = [name for name, is_so in cannot.items() if is_so]
    if named:
        raise ArchiveError(
            f"EasyEdit's format cannot store {', '.join(named)}; train without (docs/QUESTIONS.md)"
        )


def _published(moments: RunningMoments, h: MENDHyperParams) -> dict[str, Tensor]:
    """Statistics as published code keeps them: NaN while there was no factor yet.

    They are float64 only where float32 would lose bits.
    """
    count, m2 = moments.count.double()[None], moments.m2
    if (h.std_floor, h.std_eps) == (0.0, EPS):
        std = moments.plain_std()
    else:  # published code adds EPS
        std = moments.std(h.std_floor) - EPS
        m2 = std**2 * (count - 1)
    values = {"mean": moments.mean, "stored_std": std, "m2": m2, "count": count}
    for name, value in values.items():
        narrow = value.float()
        if count == 0:
            narrow = torch.full_like(narrow, torch.nan)
        elif not torch.equal(narrow.double(), value):
            narrow = value.clone()
        values[name] = narrow
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
    # The authors' code also reads the states of its two optimisers.
    edit_lrs = torch.nn.Parameter(state["edit_lrs"].clone())
    parameters = [torch.nn.Parameter(v) for name, v in state.items() if ".layers." in name]
    optimiser = getattr(torch.optim, h.opt)
    content: dict[str, Any] = {
        "model": OrderedDict(state, model_config=loaded.base.model.config),
        "opt": optimiser([*parameters, edit_lrs], lr=h.lr).state_dict(),
        "lr_opt": optimiser([edit_lrs], lr=h.lr_lr).state_dict(),
        "val_stats": {},
        "start_time": "",
        "elapsed_time": 0.0,
        "step": 0,
    }
    return atomically(out, lambda temporary: torch.save(content, temporary))
