"""What training needs before its first step: texts, caches, and the hypernetwork.

The hypernetwork is the checkpoint's, an archive's, or a new one with its statistics.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..data.examples import EditExample
from ..errors import HyperParamError, ModelError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.load import release_trunk
from ..models.sites import Site, mlp_names
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk, trunk_cache
from ..runs import Progress, file_sha256, return_memory
from .archive import STRUCTURE, load_archive
from .batches import ExampleTexts, all_texts, prepare_texts, training_texts
from .distributed import Team
from .factors import FACTOR_BATCH, FactorCache, Factors, capture_inputs, edit_factors
from .hypernetwork import MEND, Wordings
from .normaliser import Whitening
from .validation import best_edit_lr

logger = logging.getLogger(__name__)

# What a scan compares with an edit's prompt.
SCANNED = ("paraphrases", "neighbours", "unrelated")


class Preparation:
    """The texts, caches and hypernetwork of one training run.

    `loaded` is an archive's hypernetwork to go on from: it keeps its sites and shape, and
    `aggregate: least_squares` may be added to it.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        train: Sequence[EditExample],
        validation: Sequence[EditExample],
        *,
        team: Team,
        done_with_base: bool = False,
    ) -> None:
        self.team, self.loaded, self.loaded_sha256 = team, None, None
        self.progress = Progress("MEND", silent=team.rank > 0)
        if hparams.archive is not None:
            archive = load_archive(hparams.archive, base=base)
            kept = {key: getattr(archive.mend.hparams, key) for key in STRUCTURE}
            if (kept["aggregate"], hparams.aggregate) == ("sum", "least_squares"):
                kept["aggregate"] = hparams.aggregate
            if hparams.edit_lr == "auto":  # the archive's step sizes have started
                kept["edit_lr"] = archive.mend.hparams.edit_lr
            base, self.loaded, hparams = archive.base, archive.mend, hparams.replace(**kept)
            self.loaded_sha256 = file_sha256(archive.path)
            logger.warning(
                "archive: training continues from %s; its shape and sites are kept", archive.path
            )
        self.base, self.hparams = base, hparams
        texts = training_texts(base, hparams, train)
        held_out = min(hparams.stats_examples, len(texts) // 2) if hparams.stats_held_out else 0
        self.train = texts[: len(texts) - held_out]
        self.held_out = texts[len(texts) - held_out :]  # of training, for statistics
        self.validation = prepare_texts(base, hparams, validation[: hparams.val_steps])
        _check_team(hparams, len(self.train), team.size)
        disk = trunk_cache(base, hparams.cache_dir, limit=hparams.disk_cache_bytes)
        self.trunk = FrozenTrunk(base, cache=disk)
        self.factors = FactorCache(self.trunk, hparams)
        self.release = hparams.release_trunk is True
        if hparams.release_trunk == "auto":
            self.release = done_with_base and self.trunk.split and not base.is_spread
        # Statistics over all texts of an example, not of its edit alone.
        self.reads_wordings = hparams.whiten_pairs or hparams.aggregate == "least_squares"

    def make(
        self, saved: Mapping[str, Tensor], edit_lr: float | None = None
    ) -> tuple[MEND, dict[str, float]]:
        """The hypernetwork, and seconds and bytes of the caches, which are filled first.

        `saved`: what a checkpoint holds of the hypernetwork, else empty. `edit_lr`: where its step
        sizes started, which is measured or given.
        """
        start, h = time.perf_counter(), self.hparams.replace(archive=None)
        if edit_lr is not None:
            h = h.replace(edit_lr=edit_lr)
        self.statistics = self.statistics_examples()
        # 1. Trunk states of all texts; then the trunk may be released.
        self._fill_trunk(self.team.share(self.statistics))
        filled = time.perf_counter()
        # 2. Factors of the edits.
        self.factors.fill([texts.inner for texts in self.train], self.progress.phase("factors"))
        return_memory()
        captured = time.perf_counter()
        # 3. The hypernetwork.
        if saved:
            mend = MEND(self.base.sites, h).to(self.base.device)
            mend.load_state_dict(saved)
        elif self.statistics or self.loaded is None:
            mend = self._with_statistics(h)
        else:
            mend = self.loaded
        if h.edit_lr == "auto":
            mend.start_at(self.team.first(lambda: self._measure_edit_lr(mend, h)))
            h = h.replace(edit_lr=mend.hparams.edit_lr)
        mend.hparams = h
        return mend, {
            "trunk_seconds": filled - start,
            "factor_seconds": captured - filled,
            "factor_bytes": self.factors.bytes,
            "factor_examples": len(self.factors.kept),
            "statistics_seconds": time.perf_counter() - captured,
        }

    def _fill_trunk(self, chosen: Sequence[ExampleTexts]) -> None:
        training, validation = all_texts(self.train), all_texts(self.validation)
        statistics: list[Tokens] = []
        for example, (alike, others) in zip(chosen, map(self.wordings, chosen), strict=True):
            statistics += [example.inner, *alike, *others]
        parts = [training, validation, statistics]
        if self.base.streamed:  # each block runs once for all of them
            parts = [training + validation + statistics]
        for part in parts:
            self.trunk.fill(part, self.progress.phase("trunk"))
        if self.release:
            release_trunk(self.base)
        return_memory()

    def _measure_edit_lr(self, mend: MEND, h: MENDHyperParams) -> float:
        start, generator = time.perf_counter(), torch.Generator().manual_seed(h.seed)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        texts = [self.train[i] for i in order]
        edit_lr = best_edit_lr(self.trunk, mend, texts, h, at_once=h.trained_at_once)
        seconds = time.perf_counter() - start
        logger.info("edit_lr: auto is %.3g, measured in %.0f s", edit_lr, seconds)
        return edit_lr

    # ---------------------------------------- statistics

    def statistics_examples(self) -> list[ExampleTexts]:
        """Examples drawn at random for the statistics, shortest edits first; none if not needed."""
        h, texts = self.hparams, self.held_out or self.train
        if self.loaded is not None and self.loaded.hparams.aggregate == h.aggregate:
            return []
        generator = torch.Generator().manual_seed(h.seed)
        order = torch.randperm(len(texts), generator=generator)[: h.stats_examples].tolist()
        return sorted((texts[i] for i in order), key=lambda example: len(example.inner.ids))

    def _with_statistics(self, h: MENDHyperParams) -> MEND:
        """A new hypernetwork, or the archive's with least squares."""
        share = self.team.share(self.statistics)
        wordings = self.wording_inputs(share) if self.reads_wordings else ()
        if self.loaded is None:
            mend = MEND(self.base.sites, h).to(self.base.device)
            total = self.team.total if self.team.size > 1 else None
            mend.warm_up(self._edit_factors(share), wordings, total=total)
        else:
            keys = (inputs for inputs, *_ in wordings)
            mend = self.loaded.with_least_squares(keys, ridge=h.ridge, ridge_shared=h.ridge_shared)
        self.team.align(mend)
        return_memory()
        return mend

    def _edit_factors(self, examples: Sequence[ExampleTexts]) -> Iterator[Factors]:
        for batch in self._batches(examples, "statistics"):
            edits = [example.inner for example in batch]
            yield edit_factors(self.trunk, self.hparams, edits)

    def wordings(self, example: ExampleTexts) -> tuple[list[Tokens], list[Tokens]]:
        """Texts for statistics: those that differ in the prompt's wording only, and others."""
        if not self.reads_wordings:
            return [example.edit], []
        alike = [text for text in example.paraphrases if text.targets == example.edit.targets]
        return [example.edit, *alike], [*example.neighbours, *example.unrelated, *example.hard]

    def wording_inputs(self, examples: Sequence[ExampleTexts]) -> Iterator[Wordings]:
        """Inputs at the scored positions of all texts of the examples, batch by batch.

        A group is one answer token of one example in all wordings of its prompt; −1 is no group.
        """
        for batch in self._batches(examples, "statistics of wordings"):
            texts: list[Tokens] = []
            groups: list[int] = []
            start = 0
            for alike, others in map(self.wordings, batch):
                answer = range(start, start + len(alike[0].scored))
                groups += [*answer] * len(alike)
                groups += [-1] * sum(len(text.scored) for text in others)
                texts += [*alike, *others]
                start = answer.stop
            first = [place == 0 for text in texts for place in range(len(text.scored))]
            yield capture_inputs(self.trunk, texts), torch.tensor(groups), torch.tensor(first)

    def _batches(
        self, examples: Sequence[ExampleTexts], name: str
    ) -> Iterator[Sequence[ExampleTexts]]:
        report = self.progress.phase(name)
        for at in range(0, len(examples), FACTOR_BATCH):
            batch = examples[at : at + FACTOR_BATCH]
            yield batch
            report(at + len(batch), len(examples))


def _check_team(h: MENDHyperParams, examples: int, processes: int) -> None:
    if h.train_on != "single" and processes > 1:
        raise HyperParamError(
            f"train_on: {h.train_on} works in one process only; set `train_on: single`"
        )
    if min(h.batch_size, examples) < processes:
        raise HyperParamError(
            f"batch_size: {h.batch_size} of {examples} examples cannot be shared by {processes} "
            "processes; raise `batch_size`, give more examples, or fewer processes"
        )


def scan_blocks(
    base: BaseModel,
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
) -> list[dict[str, Any]]:
    """How the keys of each block's MLP tell an edit's paraphrases from its neighbours.

    A text's response to an edit is xᵀ M x_e / x_eᵀ M x_e, the share of the edit's shift that it
    gets. x and x_e are the MLP's inputs where the answer's first token is predicted; M is that of
    `whiten_pairs`, from `train`. A row for each block: the median of each role's texts, and `auc`,
    the share of pairs in which a paraphrase responds more than a neighbour; None where the data
    have no such texts. Raises ModelError without a chain of blocks.
    """
    inputs = _mlp_inputs(base)
    h = hparams.replace(archive=None, inner_params=[*inputs], aggregate="sum")
    ridge = h.whiten or 0.02
    h = h.replace(edit_tokens="scored", whiten=ridge, whiten_pairs=True)
    prepared = Preparation(base.with_sites([*inputs]), h, train, validation, team=Team(h.device))
    # 1. M of each block.
    keys = {name: Whitening(site.d_in, ridge, pairs=True) for name, site in inputs.items()}
    for seen, groups, first in prepared.wording_inputs(prepared.statistics_examples()):
        for name, whitening in keys.items():
            whitening.add(seen[name], groups, first)
    for whitening in keys.values():
        whitening.fit()
    # 2. The responses of every edit's texts, and which of two is larger.
    found: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in keys}
    for example in prepared.validation:
        roles = {role: getattr(example, role) for role in SCANNED}
        texts = [example.edit, *chain.from_iterable(roles.values())]
        starts = torch.tensor([0, *(len(text.scored) for text in texts)]).cumsum(0)[:-1]
        for name, x in capture_inputs(prepared.trunk, texts).items():
            response = x[starts] @ (keys[name].matrix[1] @ x[0])
            parts = (response[1:] / response[0]).split([len(each) for each in roles.values()])
            for role, part in zip(roles, parts, strict=True):
                found[name][role].append(part)
            found[name]["auc"].append((parts[0][:, None] > parts[1]).flatten().float())
    rows: list[dict[str, Any]] = []
    for name, site in inputs.items():
        rows.append({"block": site.block, "auc": None, **dict.fromkeys(SCANNED)})
        for column, parts in found[name].items():
            if len(values := torch.cat(parts)):
                value = values.mean() if column == "auc" else values.quantile(0.5)
                rows[-1][column] = float(value)
    return rows


def _mlp_inputs(base: BaseModel) -> dict[str, Site]:
    """A site of each block that has the MLP's input, the narrowest one, lowest block first."""
    if base.blocks is None:
        raise ModelError(f"{base.name} is no plain chain of blocks, so none can be compared")
    found: dict[int, Site] = {}
    for site in base.with_sites(mlp_names(base.model, everywhere=True)).sites:
        block = site.block or 0
        found[block] = min(found.get(block, site), site, key=lambda each: each.d_in)
    return {site.name: site for _, site in sorted(found.items())}
