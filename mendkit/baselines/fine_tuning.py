"""Fine-tuning as an editor: gradient descent on the edit sites, or Adam on one weight.

Axes: b edits that are tuned apart, n texts, i layer input, o layer output.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..evaluation.inspection import true_gradients
from ..evaluation.sequences import together
from ..hparams import MENDHyperParams
from ..mend.losses import edit_nll
from ..mend.updates import (
    Updates,
    of_matrices,
    relative_norms,
    scaled,
    side_branches,
    side_by_side,
)
from ..models.base import BaseModel
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .base import Baseline


class FineTuning(Baseline):
    """Gradient descent on the new answer's loss, so of low rank: ΔW = −lr Σ_steps Σ_t delta_t u_tᵀ.

    `cap` bounds ‖ΔW‖_F / ‖W‖_F of every site after each step. Several edits at once descend on the
    mean of their losses.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        *,
        lr: float,
        steps: int = 10,
        cap: float | None = None,
    ) -> None:
        name = "fine-tuning"
        settings: dict[str, float | str] = {"lr": lr, "steps": steps}
        if cap is not None:
            name, settings = "fine-tuning, capped", settings | {"cap": cap}
        super().__init__(base, hparams, name, settings)
        self.lr, self.steps, self.cap = lr, steps, cap

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text, or one of all: descents of `steps` on each."""
        trunk, count = trunk or FrozenTrunk(self.base), len(texts)
        made: Updates = {}
        for _ in range(self.steps):
            # 1. Gradients of the model as tuned so far.
            with side_branches(self.base, made):
                step = scaled(true_gradients(trunk, texts, reduction="edit"), -self.lr)
            # 2. One step on top.
            if at_once:
                made = together(made, scaled(step, 1 / count))
            else:
                for name, update in step.items():
                    parts = [made[name], update] if made else [update]
                    step[name] = side_by_side(parts)
                made = step
            # 3. Back to the largest norm that is allowed.
            if self.cap is None:
                continue
            for name, norm in relative_norms(self.base, made).items():
                share = (self.cap / norm.clamp(min=1e-30)).clamp(max=1)
                delta = made[name].delta * share[:, None, None].to(made[name].delta)
                made[name] = replace(made[name], delta=delta)
        return made


class LocalisedFineTuning(Baseline):
    """Adam on the new answers' mean loss, on the one weight `site` (Yang et al., arXiv 2509.22072).

    Rate, epochs and batch size are of the authors' settings for Llama-3-8B and Qwen2.5-7B, whose
    sites are the down-projections of block 22 of 32 and 6 of 28; `stop` is ours.
    Edits made at once are tuned breadth-first: epoch by epoch over shuffled mini-batches of all of
    them. It is over when the mean loss of an epoch is below `stop` nats; a mini-batch below it
    makes no step. Independent edits are tuned each alone. ΔW is dense: a matrix an edit.
    """

    epochs, batch_size, stop = 25, 100, 1e-2

    def __init__(
        self, base: BaseModel, hparams: MENDHyperParams, *, site: str, lr: float = 5e-4
    ) -> None:
        settings: dict[str, float | str] = {"site": site, "lr": lr}
        super().__init__(base.with_sites([site]), hparams, "localised fine-tuning", settings)
        self.site, self.lr = self.base.sites[0], lr

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text, or one of all."""
        trunk = trunk or FrozenTrunk(self.base)
        groups = [texts] if at_once else [[text] for text in texts]
        changes = torch.cat([self._breadth_first(trunk, edits) for edits in groups])
        return {self.site.name: of_matrices(changes)}

    def _breadth_first(self, trunk: FrozenTrunk, texts: Sequence[Tokens]) -> Float[Tensor, "1 o i"]:
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        shape = (1, self.site.d_out, self.site.d_in)
        change = torch.zeros(shape, dtype=dtype, device=self.base.device, requires_grad=True)
        optimiser = torch.optim.Adam([change], lr=self.lr)
        generator = torch.Generator().manual_seed(self.hparams.seed)
        for _ in range(self.epochs):
            total = 0.0
            for index in torch.randperm(len(texts), generator=generator).split(self.batch_size):
                edits = [texts[k] for k in index.tolist()]
                batch = collate(edits, self.base.pad_id, self.base.device)
                held = {self.site.name: of_matrices(change)}
                with torch.enable_grad(), side_branches(self.base, held):
                    logits = trunk.suffix(edits, batch)
                    loss = edit_nll(logits, batch.targets, batch.rows, len(batch)).mean()
                    if loss.item() >= self.stop:
                        (change.grad,) = torch.autograd.grad(loss, change)
                        optimiser.step()
                total += loss.item() * len(index)
            if total / len(texts) < self.stop:
                break
        return change.detach()
