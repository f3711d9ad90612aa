"""An edit: the weight change that MEND makes from one example, or from several at once.

The last line of Algorithm 2 (Mitchell et al., 2022): W̃ = W + ΔW, with ΔW as updates.py holds it.
The weights are never written: undoing restores the model bit for bit (CORRECTNESS row 16).
An edit can be kept as a LoRA adapter, in a merged copy (export.py), or as the kit's own file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from pydantic import FiniteFloat, StrictBool, TypeAdapter
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..data.examples import EditExample
from ..errors import ArchiveError, MendkitError
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from ..models.sites import Site
from .export import LoRA, Merged, MergedSite, merge, write_adapter, write_model
from .files import Kind, damage_named, matching_base, read_tensors, save_tensors
from .updates import LowRankUpdate, Updates, attach, relative_norms, side_by_side

EDIT = Kind(
    format="mendkit-edit-2",
    noun="saved edit",
    made="made",
    if_missing="write one with `Edit.save`, or correct the path",
    if_another_model="load the model it was made for, or make the edit anew on this one",
)


class Edit:
    """A weight change of one base model; the updates of several examples are summed.

    `unit_updates` are those at strength 1; `archive` is the SHA-256 of the archive that made it.
    """

    def __init__(
        self,
        base: BaseModel,
        updates: Updates,
        examples: Sequence[EditExample],
        *,
        strength: float = 1.0,
        archive: str | None = None,
    ) -> None:
        self.base, self.examples = base, tuple(examples)
        self.strength, self.archive = float(strength), archive
        self.unit_updates = updates
        self._branches: list[RemovableHandle] = []  # while it is applied

    def __repr__(self) -> str:
        facts = "; ".join(f"{e.prompt[:60]!r} → {e.target_new!r}" for e in self.examples)
        state = "applied" if self.active else "not applied"
        sites = len(self.unit_updates)
        return f"Edit({facts[:120]}; {sites} sites, strength {self.strength:g}, {state})"

    @property
    def updates(self) -> Updates:
        """The updates at the edit's strength, all examples as one (b = 1)."""
        return {name: u.merged().scaled(self.strength) for name, u in self.unit_updates.items()}

    # ---------------------------------------- apply and undo

    @property
    def active(self) -> bool:
        """Whether the edit is applied now."""
        return bool(self._branches)

    def apply(self) -> "Edit":
        """Apply until `undo`. Raises MendkitError if it is applied already."""
        if self.active:
            raise MendkitError("this edit is applied already; undo it first")
        self._branches = attach(self.base, self.updates)
        return self

    def undo(self) -> None:
        """Take the edit back. Raises MendkitError if it is not applied."""
        if not self.active:
            raise MendkitError("this edit is not applied; nothing to undo")
        for branch in self._branches:
            branch.remove()
        self._branches = []

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
        """A new edit, `factor` times as strong."""
        return self.at(self.strength * factor)

    def at(self, strength: float) -> "Edit":
        """A new edit, the same at another strength."""
        return Edit(
            self.base, self.unit_updates, self.examples, strength=strength, archive=self.archive
        )

    # ---------------------------------------- weight change

    def dense(self) -> dict[str, Tensor]:
        """ΔW of every site as a matrix in the orientation of the site's weight, float32."""
        changes = {}
        for site in self.base.sites:
            if site.name in self.unit_updates:
                change = self.updates[site.name].dense()
                changes[site.name] = change.T if site.transposed else change
        return changes

    def relative_norm(self) -> dict[str, float]:
        """‖ΔW‖_F / ‖W‖_F of every site."""
        return {name: float(norm) for name, norm in relative_norms(self.base, self.updates).items()}

    def save_adapter(self, folder: str | Path, rank: int | None = None) -> tuple[LoRA, ...]:
        """Write the edit as a PEFT LoRA adapter, of `rank` at most (default: the edit's rank)."""
        if rank is not None and rank < 1:
            raise MendkitError(
                f"an adapter's rank must be at least 1, got {rank}; leave it out for the edit's"
            )
        loras = []
        for name, update in self.updates.items():
            delta = update.delta[0] * update.coefficient
            loras.append(LoRA.of(name, update.u[0], delta, rank=rank))
        write_adapter(folder, self.base, loras)
        return tuple(loras)

    def merged(self) -> Merged:
        """A new model with the edit in its weights; other edits in force stay out."""
        return merge(self.base, self.dense())

    def save_merged(self, folder: str | Path) -> tuple[MergedSite, ...]:
        """Write `merged()` as a model folder for transformers; returns what is left of the edit."""
        merged = self.merged()
        write_model(folder, merged.base)
        return merged.sites

    def save(self, path: str | Path) -> Path:
        """Write the edit with its examples as one file, from which `load` gives the same bits."""
        return save_edits(path, [self])

    @classmethod
    def load(cls, path: str | Path, base: BaseModel) -> "Edit":
        """An edit saved for `base`, not applied.

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
        base = _common_base(edits)
        each = [edit.updates for edit in edits]
        updates: Updates = {}
        for site in base.sites:
            at_site = [made[site.name] for made in each if site.name in made]
            updates[site.name] = side_by_side(at_site)
        examples = list(chain.from_iterable(edit.examples for edit in edits))
        made_by = {edit.archive for edit in edits}
        archive = made_by.pop() if len(made_by) == 1 else None
        return cls(base, updates, examples, archive=archive)


def _common_base(edits: Sequence[Edit]) -> BaseModel:
    """The model of all these edits, with the sites of any."""
    if not edits or any(edit.base.model is not edits[0].base.model for edit in edits):
        raise MendkitError(
            f"expected one edit or several of the same model, got {len(edits)}; "
            "combine those of one"
        )
    sites = dict.fromkeys(chain.from_iterable(edit.unit_updates for edit in edits))
    return edits[0].base.with_sites(tuple(sites))


# ---------------------------------------- files


@dataclass(frozen=True)
class EditRecord:
    """What a file's metadata say of one edit."""

    sites: tuple[str, ...]
    strength: FiniteFloat
    active: StrictBool  # whether it was applied
    archive_sha256: str | None
    examples: tuple[EditExample, ...]


RECORDS = TypeAdapter(tuple[EditRecord, ...])


def save_edits(path: str | Path, edits: Sequence[Edit]) -> Path:
    """Write edits of one model, in order, with their examples and whether they are applied now."""
    base = _common_base(edits)
    tensors, records = {}, []
    for index, edit in enumerate(edits):
        for site, update in edit.unit_updates.items():
            place, coefficient = f"{index}/{site}", update.coefficient
            if not isinstance(coefficient, Tensor):
                coefficient = torch.tensor(coefficient, dtype=torch.float64)
            tensors[f"{place}/u"] = update.u
            tensors[f"{place}/delta"] = update.delta
            tensors[f"{place}/coefficient"] = coefficient
        sites = tuple(edit.unit_updates)
        record = EditRecord(sites, edit.strength, edit.active, edit.archive, edit.examples)
        records.append(asdict(record))
    metadata = {"base_model": model_fingerprint(base), "edits": records}
    return save_tensors(EDIT, path, tensors, metadata)


def load_edits(path: str | Path, base: BaseModel) -> list[tuple[Edit, bool]]:
    """The edits of a file, none applied, and for each whether it was; raises as `Edit.load`."""
    metadata, tensors = read_tensors(EDIT, path)
    with damage_named(path, "metadata"):
        checked = matching_base(EDIT, path, base, metadata["base_model"])
        records = RECORDS.validate_python(metadata["edits"])
    sites = {site.name: site for site in checked.sites}
    loaded = []
    for index, record in enumerate(records):
        updates: Updates = {}
        for name in record.sites:
            with damage_named(path):
                update = _take_update(tensors, f"{index}/{name}", sites[name], base.device)
            updates[name] = update
        archive = record.archive_sha256
        edit = Edit(checked, updates, record.examples, strength=record.strength, archive=archive)
        loaded.append((edit, record.active))
    if tensors:
        raise ArchiveError(f"{path}: damaged: unknown tensors: {', '.join(sorted(tensors)[:3])}")
    return loaded


def _take_update(
    tensors: dict[str, Tensor], place: str, site: Site, device: torch.device
) -> LowRankUpdate:
    u, delta, c = (tensors.pop(f"{place}/{part}") for part in ("u", "delta", "coefficient"))
    for tensor in (u, delta, c):
        if not tensor.is_floating_point() or not tensor.numel():
            raise ValueError(f"the update of {site.name} has no real numbers")
    shapes = ((*u.shape[:2], site.d_in), (*u.shape[:2], site.d_out), ())
    if (u.shape, delta.shape, c.shape) != shapes:
        raise ValueError(f"the update of {site.name} has other shapes")
    return LowRankUpdate(u.to(device), delta.to(device), c.to(device))
