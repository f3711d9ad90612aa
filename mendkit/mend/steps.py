"""One step of training (MEND, Algorithm 1) with a batch of independent edits.

The loss is, with a mean over the batch's texts in each term (equations 4 and 5, locality split),

    c_edit NLL(edit) + c_para NLL(paraphrases) + c_neigh KL(neighbours) + c_loc KL(unrelated)

with c_consequence NLL(consequences) (PropMEND), c_negation KL(the edit's answer after its negated
forms), c_margin times what neighbours' answers lack of being `margin` nats a token more likely than
the edit's, and c_norm ‖ΔW‖². Adam descends it, with `lr` for the transforms and `lr_lr` for the log
step sizes (CORRECTNESS row 2).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from ..data.examples import HEADLINE_ROLES
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .batches import NORM, PASSAGES, RIVALS, DrawnBatch, DrawnRows, Sampler, role_weights
from .distributed import Team
from .factors import FactorCache, Factors, edit_factors
from .hypernetwork import MEND
from .least_squares import Memory
from .losses import edit_nll, locality_kl, margin_shortfall
from .updates import (
    LowRankUpdate,
    Updates,
    at_some_sites,
    side_branches,
    side_by_side,
    squared_norm,
    unedited,
)

# The order in which the logits of a batch come: what has an answer before what is to be kept.
ANSWERED = ("edit", "paraphrases", "consequences", RIVALS)
KEPT = ("neighbours", "unrelated", "negations")
ROLES = ANSWERED + KEPT


def batch_losses(
    trunk: FrozenTrunk,
    mend: MEND,
    factors: Factors,
    rows: DrawnRows,
    *,
    at_once: int = 1,
    before: Updates | None = None,
    memory: Memory | None = None,
) -> dict[str, Tensor]:
    """The mean loss of each role, each text read under its own edit's update.

    The edits are independent, or `at_once` in a row are made as one. They come on top of the edits
    `before`, which `memory` holds (least squares).
    """
    h, edits = mend.hparams, [row[0][1] for row in rows]
    # 1. The hypernetwork turns the factors into updates.
    if before and memory is not None:
        memory.held = {name: update.dense() for name, update in before.items()}
    updates = mend(factors, len(rows), at_once=at_once, memory=memory)
    updates = at_some_sites(updates, edits, h)

    # 2. The losses of the texts under them.
    with side_branches(trunk.base, before or {}):
        losses = read_losses(trunk, updates, rows, h)
    return losses | {NORM: squared_norm(updates)} if h.cnorm else losses


def read_losses(
    trunk: FrozenTrunk, updates: Updates, rows: DrawnRows, h: MENDHyperParams
) -> dict[str, Tensor]:
    """The mean loss of each role under updates of the rows, and under what the model holds."""
    # 1. One suffix pass reads every text with its edit's update as a side branch. Its logits come
    #    role after role; of neighbours those first that a rival stands behind.
    rows = [[each for each in row if each[0] != PASSAGES] for row in rows]
    drawn = list(chain.from_iterable(rows))
    compared = [role == RIVALS for role, _ in drawn[1:]] + [False]
    order = sorted(range(len(drawn)), key=lambda k: (ROLES.index(drawn[k][0]), not compared[k]))
    groups = [[text for _, text in row] for row in rows]
    with side_branches(trunk.base, updates):
        logits = trunk.suffix_of(groups, order)
    counts = [sum(role == each for role, _ in drawn) for each in ROLES]
    texts = [drawn[k][1] for k in order]
    parts = logits.split([len(text.scored) for text in texts])
    answered, rivals = sum(counts[: len(ANSWERED)]), counts[len(ANSWERED) - 1]

    # 2. NLL of the answers (equation 4), and what neighbours' answers lack of the margin.
    some = texts[: answered + rivals]
    batch = collate(some, trunk.base.pad_id, trunk.base.device)
    nll = edit_nll(torch.cat(parts[: len(some)]), batch.targets, batch.rows, len(some))
    *of_role, right = nll.split([*counts[: len(ANSWERED)], rivals])
    losses = dict(zip(ANSWERED, of_role, strict=True))
    losses[RIVALS] = margin_shortfall(right, losses[RIVALS], margin=h.margin)

    # 3. KL from the unedited model, of what is to be kept.
    if some := texts[answered:]:
        batch = collate(some, trunk.base.pad_id, trunk.base.device)
        with unedited(trunk.base):
            reference = trunk.before(some, batch)
        kl = locality_kl(reference, torch.cat(parts[answered:]), batch.rows, len(some))
        losses |= zip(KEPT, kl.split(counts[len(ANSWERED) :]), strict=True)
    return {role: loss.mean() for role, loss in losses.items() if len(loss)}


def batches_of(h: MENDHyperParams) -> int:
    """Batches drawn for one loss: those of an episode, else one."""
    return max(h.most_edits // h.batch_size, 1) if h.train_on == "episode" else 1


def total_loss(losses: Mapping[str, Tensor], h: MENDHyperParams) -> Tensor:
    """The weighted sum of the role losses."""
    weights = role_weights(h)
    return sum((weights[role] * loss for role, loss in losses.items()), torch.zeros(()))


def _joined(steps: Sequence[Updates]) -> Updates:
    """The sum of several updates, site by site."""
    names = steps[0] if steps else ()
    return {name: side_by_side([step[name] for step in steps]) for name in names}


def learning_rate_factor(step: int, h: MENDHyperParams, steps: int) -> float:
    """Linear warm-up, then constant or a cosine to a tenth; `step` counts from 0."""
    warm = min(1.0, (step + 1) / max(h.warmup_iters, 1))
    if h.schedule == "constant":
        return warm
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))


def make_optimiser(mend: MEND, h: MENDHyperParams) -> torch.optim.Optimizer:
    """One optimiser of two groups: transforms and logarithms."""
    transforms: list[Tensor] = []
    logarithms: list[Tensor] = []
    for name, parameter in mend.named_parameters():
        (logarithms if name.startswith("log_") else transforms).append(parameter)
    groups = [
        {"params": transforms, "lr": h.lr, "base": h.lr},
        {"params": logarithms, "lr": h.lr_lr, "base": h.lr_lr},
    ]
    return getattr(torch.optim, h.opt)(groups, fused=True)


class Learner:
    """The hypernetwork while it learns, with its optimiser and its draws."""

    def __init__(
        self, mend: MEND, factors: FactorCache, sampler: Sampler, *, h: MENDHyperParams, team: Team
    ) -> None:
        self.mend, self.factors, self.trunk = mend, factors, factors.trunk
        self.sampler, self.h, self.team = sampler, h, team
        self.optimiser = make_optimiser(mend, h)
        self.means: dict[str, Tensor] = {}  # of the parameters over the steps (`ema_decay`)
        if h.ema_decay:
            self.means = {name: p.detach().clone() for name, p in mend.named_parameters()}

    def step(self, number: int, steps: int) -> dict[str, float] | None:
        """Make step `number` (from 1) of `steps`; the mean losses and the gradient norm.

        None if one of them is not finite: then nothing has changed. Raises MendkitError in the
        first step if the loss does not depend on the step size of a site.
        """
        sums: dict[str, float] = {}
        for _ in range(self.h.accumulate_bs):
            # 1. Draw edits, and of each the texts that judge it.
            batches = [self.sampler.draw() for _ in range(batches_of(self.h))]
            # 2. Make the edits, read the texts under them, and add up the loss's gradient.
            episode = self.h.train_on == "episode"
            made = self._play(batches) if episode else self._backward(batches[0])
            for name, loss in made.items():
                sums[name] = sums.get(name, 0.0) + loss / self.h.accumulate_bs
        # 3. Add up what the processes have of gradients and losses.
        parameters = list(self.mend.parameters())
        self.team.sum_gradients(parameters)
        values = self.team.total(torch.tensor([*sums.values()], dtype=torch.float64))
        row = dict(zip(sums, values.tolist(), strict=True))
        # 4. Clip the gradient and descend.
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, self.h.grad_clip))
        finite = all(map(math.isfinite, row.values()))
        if finite:
            if not self.optimiser.state and self.h.site_share == 1:
                self._check_sites()
            factor = learning_rate_factor(number - 1, self.h, steps)
            for group in self.optimiser.param_groups:
                group["lr"] = group["base"] * factor
            self.optimiser.step()
            self._average(number)
        self.optimiser.zero_grad(set_to_none=True)
        return row if finite else None

    @torch.no_grad()
    def _average(self, number: int) -> None:
        """Let the means follow the parameters; the first steps are forgotten sooner."""
        decay = min(self.h.ema_decay, number / (number + 10))
        for name, parameter in self.mend.named_parameters():
            if name in self.means:
                self.means[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the hypernetwork has the means, if there are any."""
        parameters = dict(self.mend.named_parameters())
        latest = {name: parameters[name].data for name in self.means}
        for name, mean in self.means.items():
            parameters[name].data = mean
        try:
            yield
        finally:
            for name, value in latest.items():
                parameters[name].data = value

    def _backward(self, batch: DrawnBatch) -> dict[str, float]:
        """Add the gradient of a batch's loss; this process's part of the mean losses."""
        rows = self.team.share(batch.rows)
        losses = self.losses(rows, batch.at_once, batch.earlier)
        # The mean over a batch is the sum of the processes' means, weighed by their texts.
        whole = Counter(role for role, _ in chain.from_iterable(batch.rows))
        here = Counter(role for role, _ in chain.from_iterable(rows))
        whole[NORM], here[NORM] = len(batch.rows), len(rows)
        losses = {role: loss * (here[role] / whole[role]) for role, loss in losses.items()}
        total = total_loss(losses, self.h)
        (total / self.h.accumulate_bs).backward()
        roles = (*HEADLINE_ROLES, RIVALS, "consequences", "negations")
        told = {role: 0.0 for role in roles if whole[role]}
        told |= {role: float(loss.detach()) for role, loss in losses.items()}
        return {"loss": float(total.detach()), **told}

    def _play(self, batches: Sequence[DrawnBatch]) -> dict[str, float]:
        """Add the gradient of an episode's loss (RLEdit); the mean losses.

        Batches are made one after another. After each the losses of the last `back_depth` count,
        under all edits so far, `time_decay` a step back. Factors are constants.
        """
        h, base = self.h, self.trunk.base
        made: list[LowRankUpdate] = []  # site by site, and as leaves, which losses are read under
        leaves: list[Updates] = []
        weights = [h.time_decay**back for back in range(h.back_depth)]
        whole = sum(sum(weights[: time + 1]) for time in range(len(batches)))
        told = {"loss": 0.0} | dict.fromkeys(HEADLINE_ROLES, 0.0)
        for time, batch in enumerate(batches):
            # 1. Edit the model as edited so far.
            edits = [row[0][1] for row in batch.rows]
            with side_branches(base, _joined(leaves)), torch.no_grad():
                factors = edit_factors(self.trunk, h, edits)
            updates = self.mend(factors, len(edits), at_once=len(edits))
            leaves.append({})
            for name, update in at_some_sites(updates, edits, h).items():
                made.append(side_by_side([update]))
                u, delta = (x.detach().requires_grad_() for x in (made[-1].u, made[-1].delta))
                leaves[-1][name] = LowRankUpdate(u, delta, 1.0)
            # 2. The gradient in the updates: each pass is freed before the next.
            latest = {NORM: squared_norm(leaves[-1])} if h.cnorm else {}
            for weight, past in zip(weights, reversed(batches[: time + 1]), strict=False):
                losses = read_losses(self.trunk, _joined(leaves), past.rows, h) | latest
                total = total_loss(losses, h) * (weight / whole)
                (total / h.accumulate_bs).backward()
                told["loss"] += float(total.detach())
                for role, loss in losses.items():
                    told[role] = told.get(role, 0.0) + float(loss.detach()) * weight / whole
                latest = {}
        # 3. From there to the hypernetwork.
        ends, slopes = [], []
        for update, leaf in zip(made, chain.from_iterable(x.values() for x in leaves), strict=True):
            ends += [update.u, update.delta]
            slopes += [leaf.u.grad, leaf.delta.grad]
        learn = [k for k, end in enumerate(ends) if end.requires_grad and slopes[k] is not None]
        torch.autograd.backward([ends[k] for k in learn], [slopes[k] for k in learn])
        return told

    def losses(self, rows: DrawnRows, at_once: int, earlier: Sequence[Tokens]) -> dict[str, Tensor]:
        """Losses of a batch; each edit has one of the `earlier` edits to keep."""
        edits = [drawn[0][1] for drawn in rows]
        if not earlier:
            factors = self.factors.get(edits)
            return batch_losses(self.trunk, self.mend, factors, rows, at_once=at_once)
        memory = Memory() if self.h.aggregate == "least_squares" else None
        with torch.no_grad():
            known = self.factors.get(earlier)
            before = self.mend(known, len(earlier), at_once=len(earlier), memory=memory)
            before = at_some_sites(before, earlier, self.h)
        if memory is not None:  # least squares takes the gradients of the unedited model
            factors = self.factors.get(edits)
        else:
            with side_branches(self.trunk.base, before):
                factors = edit_factors(self.trunk, self.h, edits)
        rows = [[*r, ("edit", earlier[i % len(earlier)])] for i, r in enumerate(rows)]
        return batch_losses(self.trunk, self.mend, factors, rows, before=before, memory=memory)

    def _check_sites(self) -> None:
        gradients = self.mend.log_edit_lr.grad
        assert gradients is not None
        by_site = zip(self.mend.sites, gradients.tolist(), strict=True)
        idle = ", ".join(site.name for site, gradient in by_site if gradient == 0)
        if idle:
            raise MendkitError(
                f"the gradient is exactly zero at {idle}: no loss depends on it; leave it "
                "out of `inner_params`, or weigh texts that see it (`cedit`, …)"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        found = {f"mend/{name}": value for name, value in self.mend.state_dict().items()}
        found |= {f"mean/{name}": value for name, value in self.means.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser/{index}/{name}": value for name, value in state.items()}
        found["generator"] = self.sampler.generator.get_state()
        return found | {"order": torch.tensor(self.sampler.order).long()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take up the optimiser's state and the draws as `tensors` gave them."""
        state: dict[int, dict[str, Tensor]] = {}
        self.means = {name: saved[f"mean/{name}"].clone() for name in self.means}
        for name, value in saved.items():
            if name.startswith("optimiser/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        self.sampler.generator.set_state(saved["generator"])
        self.sampler.order = saved["order"].tolist()
