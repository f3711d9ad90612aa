"""Controls: editors that an editor must beat to have learned something.

MEND at identity initialisation; plain gradient descent on the same layers, with or without a cap on the change; and
the new fact put before every prompt, which changes no weight.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, harmonic_mean

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.examples import EditExample, Probe
from ..errors import HyperParamError, LimitError, ModelError
from ..evaluation.evaluate import evaluate
from ..evaluation.many import Editor, together
from ..evaluation.metrics import PARTS, STAY
from ..evaluation.prepare import EvaluationSet
from ..evaluation.results import HARMONIC, EvaluationReport, summarise
from ..hparams import MENDHyperParams
from ..mend.batches import edit_tokens, prepare_texts, told
from ..mend.edit import Edit
from ..mend.editor import MENDEditor
from ..mend.factors import capture_factors
from ..mend.hypernetwork import MEND
from ..mend.losses import edit_nll
from ..mend.updates import (
    LowRankUpdate,
    Updates,
    padded,
    relative_norms,
    scaled,
    side_branches,
    side_by_side,
)
from ..mend.validation import validate
from ..models.base import BaseModel
from ..models.sites import mlp_names
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk

IDENTITY_EDIT_LRS = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
DENSE = 16  # independent edits with a dense ΔW that are tuned in one pass


def identity_editor(base: BaseModel, mend: MEND, /, *, edit_lr: float) -> MENDEditor:
    """MEND at identity initialisation: the normalised gradient with one step size, `mend`'s statistics, no training."""
    fresh = MEND(mend.sites, mend.hparams.replace(edit_lr=edit_lr, init="id_xavier")).to(
        base.device
    )
    fresh.moments.load_state_dict(mend.moments.state_dict())
    return MENDEditor(base, fresh, name="identity")


def tune_identity(
    base: BaseModel,
    mend: MEND,
    examples: Sequence[EditExample],
    /,
    *,
    edit_lrs: Sequence[float] = IDENTITY_EDIT_LRS,
) -> tuple[MENDEditor, tuple[dict[str, float], ...]]:
    """The identity control at the step size with the best validation score on `examples`, and one row per step size.

    Rows hold `edit_lr` and the values of `validate`.
    """
    texts, trunk = prepare_texts(base, mend.hparams, examples), FrozenTrunk(base)
    trunk.fill([text for example in texts for text in example.all()])
    unit = identity_editor(base, mend, edit_lr=1.0).mend
    rows = tuple(
        {"edit_lr": edit_lr, **validate(trunk, unit, texts, mend.hparams, strength=edit_lr)}
        for edit_lr in edit_lrs
    )
    best = max(rows, key=lambda row: row["score"])
    return identity_editor(base, mend, edit_lr=best["edit_lr"]), rows


class Baseline:
    """An editor that nothing was trained for. `settings` are the numbers that were chosen for it.

    Several edits at once are one update, or several that add up.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        name: str,
        settings: dict[str, float | str],
        /,
    ) -> None:
        self.base, self.hparams, self.name, self.settings = (
            base,
            hparams.replace(lr_scale=1.0),
            name,
            settings,
        )

    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all."""
        raise NotImplementedError

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """One edit from one example, or one from several at once."""
        several = [examples] if isinstance(examples, EditExample) else list(examples)
        texts = [edit_tokens(self.base, self.hparams, example) for example in several]
        return Edit(self.base, self.updates(texts, at_once=True), several)


class FineTuning(Baseline):
    """Gradient descent on the new answer's loss, at the edit sites: ΔW = −lr Σ_steps Σ_t delta_t u_tᵀ, so of low rank.

    `cap` bounds ‖ΔW‖_F / ‖W‖_F of every site, after each step. Several edits at once descend on the mean of their
    losses. Only texts are made by `hparams`.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        /,
        *,
        lr: float,
        steps: int = 10,
        cap: float | None = None,
    ) -> None:
        if lr <= 0 or steps < 1 or (cap is not None and cap <= 0):
            raise HyperParamError(
                f"lr, cap must be positive and steps at least 1, got {lr}, {cap}, {steps}"
            )
        settings = {"lr": lr, "steps": steps} | ({} if cap is None else {"cap": cap})
        super().__init__(
            base, hparams, "fine-tuning" if cap is None else "fine-tuning, capped", settings
        )
        self.lr, self.steps, self.cap = lr, steps, cap

    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all."""
        trunk, n = trunk or FrozenTrunk(self.base), len(texts)
        made: Updates = {}
        for _ in range(self.steps):
            with side_branches(self.base, made):
                factors = capture_factors(trunk, texts)
            step = {
                name: LowRankUpdate(padded(f.u, f.rows, n), padded(f.delta, f.rows, n), -self.lr)
                for name, f in factors.items()
            }
            if at_once:
                made = together(*([made] if made else []), scaled(step, 1 / n))
            else:
                made = {
                    name: side_by_side([made[name], u]) if made else u for name, u in step.items()
                }
            made = self._capped(made)
        return made

    def _capped(self, updates: Updates) -> Updates:
        if self.cap is None:
            return updates
        share = {
            name: (self.cap / n.clamp(min=1e-30)).clamp(max=1)
            for name, n in relative_norms(self.base, updates).items()
        }
        return {
            name: replace(u, delta=u.delta * share[name][:, None, None].to(u.delta))
            for name, u in updates.items()
        }


class LocalisedFineTuning(Baseline):
    """Adam on the new answers' mean loss, on the one weight `site` (Yang et al., 2025, arXiv 2509.22072).

    Breadth-first: epoch by epoch over shuffled mini-batches of all edits that are made at once, never each to its end
    in turn; over when the mean loss of an epoch is below `stop` nats, and a mini-batch below it makes no step.
    Independent edits are tuned each alone, as if there were no other. ΔW is dense: an update holds a matrix per edit.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        /,
        *,
        site: str,
        lr: float = 5e-4,
        epochs: int = 25,
        batch_size: int = 100,
        stop: float = 1e-2,
    ) -> None:
        if lr <= 0 or min(epochs, batch_size) < 1:
            raise HyperParamError(
                f"lr must be positive, epochs and batch_size at least 1, got {lr}, {epochs}, {batch_size}"
            )
        super().__init__(
            base.with_sites([site]), hparams, "localised fine-tuning", {"site": site, "lr": lr}
        )
        self.site, self.lr, self.epochs, self.batch_size, self.stop = (
            self.base.sites[0],
            lr,
            epochs,
            batch_size,
            stop,
        )

    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all."""
        trunk = trunk or FrozenTrunk(self.base)
        if at_once:
            return self._update(self._breadth_first(trunk, texts))
        changes = []
        for at in range(0, len(texts), DENSE):
            own = texts[at : at + DENSE]
            changes.append(
                descend(
                    self._zeros(len(own)),
                    lambda change, left, own=own: self._losses(
                        trunk, [own[k] for k in left], change
                    ),
                    lr=self.lr,
                    steps=self.epochs,
                    stop=self.stop,
                )
            )
        return self._update(torch.cat(changes))

    def _breadth_first(self, trunk: FrozenTrunk, texts: Sequence[Tokens]) -> Float[Tensor, "1 o i"]:
        change = self._zeros(1).requires_grad_()
        optimiser, generator = (
            torch.optim.Adam([change], lr=self.lr),
            torch.Generator().manual_seed(self.hparams.seed),
        )
        for _ in range(self.epochs):
            total = 0.0
            for index in torch.randperm(len(texts), generator=generator).split(self.batch_size):
                with torch.enable_grad():
                    loss = self._losses(trunk, [texts[k] for k in index.tolist()], change).mean()
                if loss.item() >= self.stop:
                    (change.grad,) = torch.autograd.grad(loss, change)
                    optimiser.step()
                total += loss.item() * len(index)
            if total / len(texts) < self.stop:
                break
        return change.detach()

    def _losses(
        self, trunk: FrozenTrunk, texts: Sequence[Tokens], change: Float[Tensor, "b o i"]
    ) -> Float[Tensor, " n"]:
        batch = collate(texts, self.base.pad_id, self.base.device)
        with side_branches(self.base, self._update(change)):
            return edit_nll(trunk.suffix(texts, batch), batch.targets, batch.rows, len(batch))

    def _update(self, change: Float[Tensor, "b o i"]) -> Updates:
        """ΔW as a sum over the rows of a unit matrix."""
        one = torch.eye(self.site.d_out, dtype=change.dtype, device=change.device)
        return {self.site.name: LowRankUpdate(change, one.expand(len(change), -1, -1), 1.0)}

    def _zeros(self, count: int) -> Float[Tensor, "{count} o i"]:
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        return torch.zeros(
            count, self.site.d_out, self.site.d_in, dtype=dtype, device=self.base.device
        )


@torch.no_grad()
def descend(
    start: Float[Tensor, "b *d"],
    losses: Callable[[Tensor, list[int]], Float[Tensor, " n"]],
    /,
    *,
    lr: float,
    steps: int,
    stop: float,
    cap: float | None = None,
) -> Float[Tensor, "b *d"]:
    """Minimise b independent losses by Adam, each over its own slice of `start`, of which it is a function.

    `losses(x, left)` are those of the slices `left`, whose values are x. One that is below `stop` is done and moves no
    more; `cap` bounds the norm of a slice after every step.
    """
    x, left = start.clone(), list(range(len(start)))
    each = list(x.unbind())  # views, so that one without a gradient is passed over
    optimiser = torch.optim.Adam(each, lr=lr)
    for _ in range(steps):
        with torch.enable_grad():
            here = x[left].requires_grad_()
            values = losses(here, left)
            (gradient,) = torch.autograd.grad(values.sum(), here)
        going = (values.detach() >= stop).tolist()
        optimiser.zero_grad(set_to_none=True)
        for k, g, on in zip(left, gradient, going, strict=True):
            each[k].grad = g if on else None
        left = [k for k, on in zip(left, going, strict=True) if on]
        if not left:
            break
        optimiser.step()
        if cap is not None:
            x.copy_(x.renorm(2, 0, cap))
    return x


def best_of(
    editors: Sequence[Editor], on: EvaluationSet, /
) -> tuple[Editor, tuple[EvaluationReport, ...]]:
    """The editor with the best headline score (harmonic mean of its shares that `on` has), and everyone's report."""
    reports = tuple(evaluate(editor, on) for editor in editors)
    scores = [
        harmonic_mean([r.summary[s].mean for s in HARMONIC["score.headline"] if s in r.summary])
        for r in reports
    ]
    return editors[scores.index(max(scores))], reports


def fact_in_context(on: EvaluationSet, /) -> EvaluationReport:
    """The control that edits nothing: every prompt is read with the new fact before it.

    Success, paraphrases and neighbours' answers are what the unedited model makes of that; agreement is with what it
    says without the fact. Raises LimitError where a prompt becomes too long.
    """
    start = time.perf_counter()
    context = EvaluationSet(
        on.base, on.hparams, [_told(e) for e in on.examples], max_new_tokens=on.max_new_tokens
    )
    if len(context) != len(on):
        raise LimitError(f"with the fact before it: {context.skipped[0]}")
    rows = []
    for i in on.to_edit:
        scores = context.before[i]
        values, agreement = dict(scores.values), {}
        for k, read in enumerate(context.read_before[i]):
            prompt = on.prompts[i][k]
            if prompt.role in STAY:
                same = _agreement(read.text.argmax, on.read_before[i][k].text.argmax)
                scores.scores[k]["score"] = scores.scores[k]["argmax_agreement"] = same
                agreement.setdefault(PARTS[prompt.role], []).append(same)
        for part, found in agreement.items():
            values[f"{part}.argmax_agreement"] = fmean(found)
        rows.append(on.row(i, replace(scores, values=values), {}))
    counts = {"scored": len(rows), "already_true": len(on) - len(rows), "skipped": len(on.skipped)}
    seconds = time.perf_counter() - start
    return EvaluationReport(
        "fact in context", "single", tuple(rows), summarise(rows), counts, seconds
    )


def _agreement(a: Sequence[int], b: Sequence[int]) -> float:
    return fmean(x == y for x, y in zip(a, b, strict=True))


def _told(e: EditExample) -> EditExample:
    """The example with the new fact before each of its prompts."""

    def probes(role: Sequence[Probe]) -> tuple[Probe, ...]:
        return tuple(replace(probe, prompt=told(e, probe.prompt)) for probe in role)

    return replace(
        e,
        prompt=told(e, e.prompt),
        paraphrases=tuple(told(e, prompt) for prompt in e.paraphrases),
        neighbours=probes(e.neighbours),
        unrelated=probes(e.unrelated),
        relation=None,
        portability=(),
        generation_prompts=(),
    )


def down_projections(base: BaseModel, /) -> list[str]:
    """The weight by which each block's MLP writes to the residual stream, lowest block first.

    Raises ModelError if the blocks have none, or several (experts).
    """
    sites = base.with_sites(mlp_names(base.model, everywhere=True)).sites
    width = base.model.get_input_embeddings().weight.shape[1]
    found = [site for site in sites if site.d_out == width != site.d_in]
    if not found or len({site.block for site in found}) != len(found):
        raise ModelError(
            f"{base.name}: found no single down-projection in each block; leave this baseline out"
        )
    return [site.name for site in found]
