"""The hypernetwork before the first step: an archive's, or a new one with its statistics."""

import logging
from collections.abc import Iterator, Sequence

import torch

from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from ..runs import Progress, return_memory
from .archive import load_archive
from .batches import ExampleTexts
from .distributed import Team
from .factors import FACTOR_BATCH, Factors, capture_factors, capture_inputs
from .hypernetwork import MEND, Wordings

logger = logging.getLogger(__name__)

FEW_PAIRED = 300
"""Examples below which statistics with `whiten_pairs` are poor."""

STRUCTURE = (
    "add_eos",
    "aggregate",
    "combine",
    "delta_only",
    "edit_tokens",
    "init",
    "loss_reduction",
    "n_hidden",
    "norm",
    "norm_stats",
    "one_sided",
    "rank",
    "shared",
    "std_eps",
    "std_floor",
    "unit_response",
    "update_sign",
    "whiten",
    "whiten_pairs",
    "x_only",
    "z_clip",
)
"""Hyperparameters that an archive decides when training goes on from it."""


def continued(
    base: BaseModel, hparams: MENDHyperParams
) -> tuple[BaseModel, MENDHyperParams, MEND | None]:
    """Model, settings and hypernetwork that training starts with: an archive's, or None.

    An archive keeps its sites and shape; `aggregate: least_squares` may be added to it.
    """
    if hparams.archive is None:
        return base, hparams, None
    archive = load_archive(hparams.archive, base=base)
    kept = {key: getattr(archive.mend.hparams, key) for key in STRUCTURE}
    if hparams.aggregate == "least_squares":
        kept["aggregate"] = hparams.aggregate
    logger.warning(
        "archive: going on training from %s, whose shape and sites are kept", archive.path
    )
    return archive.base, hparams.replace(**kept), archive.mend


def statistics_examples(examples: Sequence[ExampleTexts], h: MENDHyperParams) -> list[ExampleTexts]:
    """Examples drawn at random for the normaliser, the shortest edits first."""
    generator = torch.Generator().manual_seed(h.seed)
    order = torch.randperm(len(examples), generator=generator)[: h.stats_examples]
    return sorted((examples[i] for i in order.tolist()), key=lambda texts: len(texts.edit.ids))


def statistics_texts(
    example: ExampleTexts, h: MENDHyperParams
) -> tuple[list[Tokens], list[Tokens]]:
    """Texts that differ in the prompt's wording only, and others (`whiten_pairs`)."""
    if not _reads_wordings(h):
        return [example.edit], []
    alike = [text for text in example.paraphrases if text.targets == example.edit.targets]
    return [example.edit, *alike], [*example.neighbours, *example.unrelated, *example.hard]


def with_statistics(
    trunk: FrozenTrunk,
    h: MENDHyperParams,
    chosen: Sequence[ExampleTexts],
    *,
    loaded: MEND | None = None,
    team: Team,
    progress: Progress,
) -> MEND:
    """A new hypernetwork with the statistics of the `chosen` examples.

    `loaded`: that one instead, with the statistics of least squares added. Each process of the team
    gathers its share.
    """
    if h.whiten_pairs and len(chosen) < FEW_PAIRED:
        logger.warning(
            "whiten_pairs: statistics of %d examples are poor (it was tuned with 700, and 48 fail)"
            "; give more training examples and `stats_examples`, or set `whiten_pairs: false`",
            len(chosen),
        )
    share = team.share(chosen)
    wordings = wording_inputs(trunk, h, share, progress) if _reads_wordings(h) else ()
    if loaded is None:
        mend = MEND(trunk.base.sites, h).to(trunk.base.device)
        total = team.total if team.size > 1 else None
        mend.warm_up(_edit_factors(trunk, h, share, progress), wordings, total=total)
    else:
        inputs = (inputs for inputs, *_ in wordings)
        mend = loaded.with_least_squares(inputs, ridge=h.ridge, ridge_shared=h.ridge_shared)
    team.align(mend)
    return_memory()
    return mend


def _edit_factors(
    trunk: FrozenTrunk, h: MENDHyperParams, examples: Sequence[ExampleTexts], progress: Progress
) -> Iterator[Factors]:
    """Factors of the examples' edits, batch by batch."""
    report = progress.phase("statistics")
    for at in range(0, len(examples), FACTOR_BATCH):
        texts = [example.edit for example in examples[at : at + FACTOR_BATCH]]
        yield capture_factors(trunk, texts, tokens=h.edit_tokens, reduction=h.loss_reduction)
        report(at + len(texts), len(examples))


def wording_inputs(
    trunk: FrozenTrunk, h: MENDHyperParams, examples: Sequence[ExampleTexts], progress: Progress
) -> Iterator[Wordings]:
    """Inputs at the scored positions of all texts of the examples, batch by batch.

    A group is one answer token of one example in all wordings of its prompt; −1 is no group.
    """
    report = progress.phase("statistics of wordings")
    for at in range(0, len(examples), FACTOR_BATCH):
        texts: list[Tokens] = []
        groups: list[int] = []
        first: list[bool] = []
        start = 0
        batch = examples[at : at + FACTOR_BATCH]
        for example in batch:
            alike, others = statistics_texts(example, h)
            answer = range(start, start + len(alike[0].scored))
            texts += [*alike, *others]
            groups += [*answer] * len(alike)
            groups += [-1] * sum(len(text.scored) for text in others)
            start = answer.stop
        for text in texts:
            first += [True] + [False] * (len(text.scored) - 1)
        yield capture_inputs(trunk, texts), torch.tensor(groups), torch.tensor(first)
        report(at + len(batch), len(examples))


def _reads_wordings(h: MENDHyperParams) -> bool:
    """Whether statistics are gathered over all texts of an example."""
    return h.whiten_pairs or h.aggregate == "least_squares"
