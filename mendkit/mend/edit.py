"""Edits as low-rank side branches: y += (x ũᵀ) c δ̃, one branch per edit in the batch; no dense ΔW appears.

An edit's weight change at a site is ΔW = c Σ_t δ̃_t ũ_tᵀ with c = sign · α · strength (sign −1: MEND, Algorithm 2).
While an edit is applied, a forward hook on the layer adds its branch; the weights are never written, so undoing an
edit restores the model bit for bit (CORRECTNESS row 16). Only `dense` and `merged` know a weight's orientation.

An edit leaves the process in three ways: as a LoRA adapter (`save_adapter`), merged into a copy of the weights
(`merged`, `save_merged`), and as the kit's own file with every bit (`save`, `load`).
Axes: b independent edits, t tokens of an edit, i layer input, o layer output.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.examples import EditExample, Probe
from ..errors import ArchiveError, MendkitError
from ..models.base import BaseModel
from ..models.checkpoints import silence_transformers
from ..models.fingerprint import model_fingerprint
from ..models.sites import Site
from .export import AdapterSite, LoRA, Merged, MergedSite, merge, write_adapter
from .files import (
    Kind,
    checked_tensor,
    damage_named,
    make_folder,
    matching_base,
    read_metadata,
    save_tensors,
)
from .updates import (
    LowRankUpdate,
    SideBranch,
    Updates,
    attach,
    relative_norms,
    side_by_side,
    summed,
)

EDIT = Kind(
    format="mendkit-edit-1",
    noun="saved edit",
    made="made",
    if_missing="write one with `Edit.save`, or correct the path",
    if_pickle="write one with `Edit.save`",
    if_another_model="load the model it was made for, or make the edit anew on this one",
)


class Edit:
    """A weight change of one base model, made from one example or several at once (their updates are summed).

    `applied()` is the way to use it; `apply()` and `undo()` are for interactive work. `strength` multiplies the update.
    `archive` is the SHA-256 of the archive's file that made it, None if it was made without one.
    """

    def __init__(
        self,
        base: BaseModel,
        updates: Updates,
        examples: Sequence[EditExample],
        /,
        *,
        strength: float = 1.0,
        archive: str | None = None,
    ) -> None:
        self.base, self.examples, self.strength, self.archive = (
            base,
            tuple(examples),
            float(strength),
            archive,
        )
        self._unit = updates
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def updates(self) -> Updates:
        """The updates at the edit's strength, all examples' tokens side by side as one edit (b = 1)."""
        return {name: summed(u).scaled(self.strength) for name, u in self._unit.items()}

    @property
    def active(self) -> bool:
        """Whether the edit is applied now."""
        return bool(self._handles)

    def apply(self) -> "Edit":
        """Apply until `undo`. Raises MendkitError if it is applied already."""
        if self.active:
            raise MendkitError("this edit is applied already; undo it first")
        self._handles = attach(self.base, self.updates)
        return self

    def undo(self) -> None:
        """Take the edit back: the model is bit for bit what it was. Raises MendkitError if it is not applied."""
        if not self.active:
            raise MendkitError("this edit is not applied; nothing to undo")
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def applied(self) -> Iterator["Edit"]:
        """Apply within the context."""
        self.apply()
        try:
            yield self
        finally:
            if self.active:
                self.undo()

    def scale(self, factor: float) -> "Edit":
        """A new edit, `factor` times as strong (0: none, 1: the same, 2: twice)."""
        return self.at(self.strength * factor)

    def at(self, strength: float) -> "Edit":
        """A new edit, the same at another strength, whatever its own was."""
        return Edit(self.base, self._unit, self.examples, strength=strength, archive=self.archive)

    def dense(self) -> dict[str, Tensor]:
        """ΔW of every site as a matrix in the orientation of the site's own weight, float32."""
        sites = {site.name: site for site in self.base.sites}
        return {name: _oriented(update, sites[name]) for name, update in self.updates.items()}

    def relative_norm(self) -> dict[str, float]:
        """‖ΔW‖_F / ‖W‖_F of every site."""
        return {name: float(norm) for name, norm in relative_norms(self.base, self.updates).items()}

    # ------------------------------------------------------------------------------------------------- artefacts

    def save_adapter(self, folder: str | Path, rank: int | None = None) -> tuple[AdapterSite, ...]:
        """Write the edit as a PEFT LoRA adapter, of `rank` at most (default: the edit's own, at most its tokens).

        `peft.PeftModel.from_pretrained(model, folder)` then gives the edited model's logits within rounding.
        Returns each site's rank and what truncation lost.
        """
        if rank is not None and rank < 1:
            raise MendkitError(
                f"an adapter's rank must be at least 1, got {rank}; leave it out for the edit's own"
            )
        loras = {}
        for name, update in self.updates.items():
            loras[name] = LoRA.of(update.u[0], update.delta[0] * update.coefficient, rank=rank)
        return write_adapter(folder, self.base, loras)

    def merged(self) -> Merged:
        """A new model with the edit added to its weights in float32, then rounded to the weights' dtype.

        The edit's own model stays as it is and shares all weights but the edited ones with the new one: write to
        neither. Other edits in force are not taken along. A rounding that eats the edit is reported, and warned of.
        """
        sites = {site.name: site for site in self.base.sites}
        merged = merge(
            self.base,
            ((sites[n], _oriented(update, sites[n])) for n, update in self.updates.items()),
        )
        for site in self.base.sites:
            hooks = merged.base.site_module(site)._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, SideBranch)]:
                del hooks[key]
        return merged

    def save_merged(self, folder: str | Path) -> tuple[MergedSite, ...]:
        """Write `merged()` with its tokenizer as a model folder for transformers; returns what is left of the edit.

        Raises MendkitError if the folder is a file, cannot be written to, or is the base model's own.
        """
        folder = make_folder(folder)
        if folder.resolve() == Path(self.base.model.name_or_path or "/").resolve():
            raise MendkitError(f"{folder} holds the base model itself; give another folder")
        merged = self.merged()
        try:
            with silence_transformers(), TemporaryDirectory(dir=folder, prefix=".new-") as new:
                merged.base.model.save_pretrained(new)
                merged.base.tokenizer.save_pretrained(new)
                for path in Path(new).iterdir():
                    path.replace(folder / path.name)
        except (OSError, SafetensorError) as error:
            raise MendkitError(
                f"cannot write the edited model to {folder}: {error}; make room there"
            ) from None
        return merged.sites

    def save(self, path: str | Path) -> Path:
        """Write the edit with its examples as one file, from which `load` gives the same updates bit for bit."""
        return save_edits(path, [self])

    @classmethod
    def load(cls, path: str | Path, base: BaseModel) -> "Edit":
        """An edit saved for `base`, not applied; `base` itself keeps its sites.

        Raises ArchiveError if the file is missing, damaged, a journal, or belongs to another model.
        """
        edits = load_edits(path, base)
        if len(edits) != 1:
            raise ArchiveError(
                f"{path}: a journal of {len(edits)} edits; read it with `EditSession.load`"
            )
        return edits[0][0]

    @classmethod
    def combined(cls, edits: Sequence["Edit"]) -> "Edit":
        """Several edits of one model as one: their weight changes are summed."""
        base, each = _common_base(edits), [edit.updates for edit in edits]
        updates: Updates = {}
        for site in base.sites:
            updates[site.name] = side_by_side(
                [found[site.name] for found in each if site.name in found]
            )
        examples, archives = (
            [example for edit in edits for example in edit.examples],
            {edit.archive for edit in edits},
        )
        return cls(base, updates, examples, archive=archives.pop() if len(archives) == 1 else None)


def _common_base(edits: Sequence[Edit]) -> BaseModel:
    """The model of all these edits, with the sites of any. Raises MendkitError if there is none."""
    if not edits or any(edit.base.model is not edits[0].base.model for edit in edits):
        raise MendkitError(
            f"expected one edit or several of the same model, got {len(edits)}; combine those of one"
        )
    return edits[0].base.with_sites(
        tuple(dict.fromkeys(name for edit in edits for name in edit.updates))
    )


def _oriented(update: LowRankUpdate, site: Site) -> Tensor:
    """ΔW in the orientation of the site's own weight."""
    return update.dense().T if site.transposed else update.dense()


# ------------------------------------------------------------------------------------------------------ files


_PARTS = ("u", "delta", "coefficient")


def save_edits(path: str | Path, edits: Sequence[Edit]) -> Path:
    """Write edits of one model, in order, with their examples and whether they are applied now."""
    base, tensors, described = _common_base(edits), {}, []
    for index, edit in enumerate(edits):
        for site, update in edit._unit.items():
            c = update.coefficient
            parts = (
                update.u,
                update.delta,
                c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64),
            )
            tensors |= {
                f"{index}/{site}/{part}": value for part, value in zip(_PARTS, parts, strict=True)
            }
        about = {"sites": list(edit._unit), "strength": edit.strength, "active": edit.active}
        examples = [asdict(example) for example in edit.examples]
        described.append(about | {"archive_sha256": edit.archive, "examples": examples})
    metadata = {"base_model": model_fingerprint(base), "edits": described}
    return save_tensors(EDIT, path, tensors, metadata)


def load_edits(path: str | Path, base: BaseModel) -> list[tuple[Edit, bool]]:
    """The edits of a file, none applied, and for each whether it was; raises as `Edit.load`."""
    metadata = read_metadata(EDIT, Path(path))
    with damage_named(path, "metadata"):
        checked = matching_base(EDIT, path, base, metadata["base_model"])
        described = [_about(record) for record in metadata["edits"]]
    every = _read_updates(path, metadata, checked)
    return [
        (Edit(checked, updates, examples, strength=strength, archive=archive), active)
        for updates, (examples, strength, archive, active) in zip(every, described, strict=True)
    ]


def _about(record: Mapping[str, Any]) -> tuple[list[EditExample], float, str | None, bool]:
    """An edit's examples, strength, archive, and whether it was applied. Raises TypeError or ValueError for others."""
    strength, archive, active = (
        float(record["strength"]),
        record["archive_sha256"],
        record["active"],
    )
    if (
        not math.isfinite(strength)
        or not isinstance(archive, str | None)
        or not isinstance(active, bool)
    ):
        raise ValueError(f"strength {strength}, archive {archive!r}, active {active!r}")
    return [_example(example) for example in record["examples"]], strength, archive, active


def _read_updates(path: str | Path, metadata: Mapping[str, Any], base: BaseModel) -> list[Updates]:
    """Every edit's updates, their tensors checked. Raises ArchiveError if one is missing, unknown or damaged."""
    edits, sites = list(enumerate(metadata["edits"])), {site.name: site for site in base.sites}
    with damage_named(path, "metadata"):
        names = {
            (i, sites[site]): [f"{i}/{site}/{part}" for part in _PARTS]
            for i, e in edits
            for site in e["sites"]
        }
    odd = sorted(set(metadata["tensors"]) ^ {name for parts in names.values() for name in parts})
    if odd:
        raise ArchiveError(f"{path}: damaged: tensors missing or unknown: {', '.join(odd[:3])}")
    updates: list[Updates] = [{} for _ in edits]
    with damage_named(path), safe_open(path, "pt") as file:
        for (index, site), parts in names.items():
            u, delta, c = (checked_tensor(file, path, name, metadata["sha256"]) for name in parts)
            shapes = [(*u.shape[:2], site.d_in), (*u.shape[:2], site.d_out), ()]
            real = all(x.is_floating_point() and x.numel() for x in (u, delta, c))
            if [u.shape, delta.shape, c.shape] != shapes or not real:
                raise ArchiveError(
                    f"{path}: damaged: the update of {site.name} has other shapes or no real numbers"
                )
            updates[index][site.name] = LowRankUpdate(u, delta, c)
    return [{name: update.to(base.device) for name, update in each.items()} for each in updates]


def _example(record: Mapping[str, Any]) -> EditExample:
    """An example from what `asdict` made of it, read back from JSON."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return Probe(**{field: restored(own) for field, own in value.items()})
        if isinstance(value, list):
            return tuple(map(restored, value))
        if not isinstance(value, str | None):
            raise TypeError(f"an example has {value!r} where text belongs")
        return value

    return EditExample(**{field: restored(value) for field, value in record.items()})
