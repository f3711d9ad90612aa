"""ROME: one fact as one rank-one change of one MLP down-projection (Meng et al., 2022, arXiv 2202.05262, section 3.1).

The down-projection W is read as a memory of keys k and values v = W k. For an edit, k* is the layer's input at the last
token of the subject, averaged over contexts before the prompt (equation 3), and v* = W k* + z with the z that minimises

    mean over contexts of NLL(y) + kl · KL(edited ‖ unedited | "{subject} is a") + decay · (‖z‖ / ‖W k*‖)²  (eq. 4)

when added to the layer's output there. The least-squares solution that keeps W K = V and makes W k* = v* is then

    ΔW = z (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*),   C = E[k kᵀ] over a text         (eq. 2)

Where this is not as published: y ends with the end of text if `add_eos`; contexts are pieces of the text, one line
each, not samples from the model; z is measured in ‖W k*‖, so that one step size serves all layers; `decay` is on its
square; C has a ridge, for texts much shorter than Wikipedia. Axes: e edits, r texts of an edit, i input, o output.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError, HyperParamError, ModelError
from ..hparams import MENDHyperParams
from ..mend.losses import edit_nll, locality_kl, wide
from ..mend.updates import LowRankUpdate, Updates
from ..models.base import BaseModel
from ..models.cache import TextCache
from ..models.families import CAUSAL
from ..models.fingerprint import weights_sha256
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk, only_scored
from .base import Baseline, descend

WINDOW, KEY_TOKENS = 256, 16_384
TOGETHER = 16  # edits whose z are sought in one pass


class ROME(Baseline):
    """Rank-one editing of the weight `site`; C and the contexts come from `text`.

    Edits made at once are the sum of single ones. `clamp` bounds ‖z‖ / ‖W k*‖, an edit is done once its loss (eq. 4) is
    below `stop`. Raises ModelError for a model that is not causal, HyperParamError for a number that is not positive,
    and, when editing, DataError for a prompt that does not name its subject.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        text: str,
        /,
        *,
        site: str,
        lr: float = 1.5,
        steps: int = 12,
        clamp: float = 4.0,
        kl: float = 0.0625,
        decay: float = 5e-4,
        ridge: float = 1e-2,
        contexts: int = 2,
        stop: float = 0.1,
    ) -> None:
        if base.family != CAUSAL:
            raise ModelError(
                f"ROME edits causal models, {base.name} is of another family; use another baseline"
            )
        if min(lr, steps, clamp, ridge) <= 0 or min(kl, decay, contexts) < 0:
            raise HyperParamError(
                "lr, steps, clamp, ridge must be positive, kl, decay, contexts at least 0, got "
                f"{lr}, {steps}, {clamp}, {ridge}, {kl}, {decay}, {contexts}"
            )
        super().__init__(base.with_sites([site]), hparams, "ROME", {"site": site, "clamp": clamp})
        self.lr, self.steps, self.clamp, self.kl, self.decay, self.stop = (
            lr,
            steps,
            clamp,
            kl,
            decay,
            stop,
        )
        self.site = self.base.sites[0]
        moments = key_moments(self.base, hparams, text)[site].double()
        self.cholesky = torch.linalg.cholesky(
            moments + ridge * moments.diagonal().mean() * torch.eye(len(moments))
        )
        self.contexts = ((), *_contexts(self.base, text, contexts, seed=hparams.seed))
        self.start = 1 if _begins(self.base) else 0  # where a context goes
        self.essence = tuple(self.base.tokenizer(" is a", add_special_tokens=False)["input_ids"])

    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, also if made `at_once`. Texts with contexts have a trunk
        of their own; `trunk` is not needed."""
        for text in texts:
            if not text.subject:
                raise DataError(
                    f"ROME edits where a prompt names its subject, and {self.base.tokenizer.decode(text.ids)!r} does "
                    "not contain its example's `subject`; give examples that name it, or use another editor"
                )
        order = sorted(range(len(texts)), key=lambda k: len(texts[k].ids))
        u, z = [], []
        for at in range(0, len(order), TOGETHER):
            own = [texts[k] for k in order[at : at + TOGETHER]]
            keys, change = self._edits(own)
            solved = torch.cholesky_solve(keys.double().T, self.cholesky.to(keys.device)).T
            u.append((solved / (solved * keys).sum(1, keepdim=True)).to(keys))
            z.append(change)
        back = torch.tensor(order).argsort()
        return {
            self.site.name: LowRankUpdate(torch.cat(u)[back, None], torch.cat(z)[back, None], 1.0)
        }

    def _edits(self, texts: Sequence[Tokens]) -> tuple[Float[Tensor, "e i"], Float[Tensor, "e o"]]:
        """k* and z of every edit."""
        rows = [
            [*(self._after(c, text) for c in self.contexts), self._essence(text)] for text in texts
        ]
        count, trunk, layer = len(rows[0]), FrozenTrunk(self.base), self.base.site_module(self.site)
        trunk.fill([text for own in rows for text in own])

        def read(left: list[int], z: Float[Tensor, "e o"] | None) -> tuple[Tensor, ...]:
            """Inputs at the subjects, logits after the essence, NLL: all with z added."""
            flat = [text for k in left for text in rows[k]]
            batch, at = (
                collate(flat, self.base.pad_id, self.base.device),
                [text.subject[-1] for text in flat],
            )
            with _shifted(
                layer, at, None if z is None else z.repeat_interleave(count, 0)
            ) as inputs:
                logits = trunk.suffix(flat, batch)
            nll = edit_nll(logits, batch.targets, batch.rows, len(flat)).view(-1, count)[:, :-1]
            return (
                inputs[0].view(len(left), count, -1)[:, :-1],
                logits[batch.rows % count == count - 1],
                nll.mean(1),
            )

        with torch.no_grad():
            keys, before, _ = read(list(range(len(rows))), None)
            keys = wide(keys).mean(1)
            v = wide(layer(keys.to(self.base.dtype)[:, None])[:, 0])  # edits in force act, too
        unit, root = v.norm(dim=1, keepdim=True) / v.shape[1] ** 0.5, v.shape[1] ** 0.5

        def losses(w: Float[Tensor, "e o"], left: list[int]) -> Float[Tensor, " e"]:
            _, after, nll = read(left, unit[left] * w)
            kl = locality_kl(
                after, before[left], torch.arange(len(left), device=after.device), len(left)
            )
            return nll + self.kl * kl + self.decay * (w**2).mean(1)

        w = descend(
            torch.zeros_like(v),
            losses,
            lr=self.lr,
            steps=self.steps,
            stop=self.stop,
            cap=self.clamp * root,
        )
        return keys, unit * w

    def _after(self, context: Sequence[int], text: Tokens) -> Tokens:
        """An edit's text with a context before it."""
        n = len(context)
        scored, subject = (
            tuple(p + n for p in positions) for positions in (text.scored, text.subject)
        )
        ids = (*text.ids[: self.start], *context, *text.ids[self.start :])
        return Tokens(ids, scored, text.targets, text.ends, subject=subject)

    def _essence(self, text: Tokens) -> Tokens:
        """What the model says of the subject without the prompt."""
        begin, n = text.ids[: self.start], len(text.subject)
        ids = (*begin, *(text.ids[p] for p in text.subject), *self.essence)
        return Tokens(ids, (len(ids) - 1,), subject=tuple(range(len(begin), len(begin) + n)))


@contextmanager
def _shifted(
    layer: nn.Module, positions: Sequence[int], z: Float[Tensor, "n o"] | None
) -> Iterator[list[Float[Tensor, "n i"]]]:
    """Within the context row r's output of `layer` at `positions[r]` has z[r] added; its inputs there are noted."""
    inputs: list[Tensor] = []
    at = range(len(positions)), positions

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        def whole(x: Tensor) -> Tensor:  # some layers see (n · t, d)
            return x.reshape(len(positions), -1, x.shape[-1])

        inputs.append(whole(args[0])[at].detach())
        if z is None:
            return output
        shift = torch.zeros_like(whole(output))
        shift[at] = z.to(shift)
        return output + shift.view_as(output)

    handle = layer.register_forward_hook(add)
    try:
        yield inputs
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------ from a text


def key_moments(
    base: BaseModel, hparams: MENDHyperParams, text: str, /
) -> dict[str, Float[Tensor, "i i"]]:
    """E[k kᵀ] of the inputs k of every site over the first tokens of `text`, by site name, in float32.

    One pass through the model for all sites that are not in the cache on disk (`cache_dir`, `disk_cache_bytes`).
    """
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:KEY_TOKENS]
    if not ids:
        raise DataError("the text for ROME's covariance has no token; give a longer one")
    about = {
        "what": "key moments",
        "weights": weights_sha256(base),
        "window": WINDOW,
        "torch": torch.__version__,
    }
    cache = TextCache(hparams.cache_dir, about, limit=hparams.disk_cache_bytes)
    keys = {
        s.name: hashlib.sha256(f"{s.name} {base.dtype} {ids}".encode()).digest()[:16]
        for s in base.sites
    }
    found = cache.find(keys.values())
    moments = {name: found[key][0] for name, key in keys.items() if key in found}
    missing = [site.name for site in base.sites if site.name not in moments]
    for name, new in _moments(base.with_sites(missing), ids).items() if missing else ():
        cache.add({keys[name]: (new,)})
        moments[name] = new
    return moments


@torch.no_grad()
def _moments(base: BaseModel, ids: Sequence[int]) -> dict[str, Tensor]:
    prefix = base.tokenizer("a")["input_ids"][:1] if _begins(base) else []
    sums = {
        site.name: torch.zeros(site.d_in, site.d_in, dtype=torch.float64) for site in base.sites
    }

    def hook_for(name: str):
        def add(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            k = wide(args[0].reshape(-1, args[0].shape[-1])[len(prefix) :])
            sums[name] += (k.T @ k).cpu()

        return add

    handles = [
        base.site_module(site).register_forward_hook(hook_for(site.name)) for site in base.sites
    ]
    try:
        for at in range(0, len(ids), WINDOW):
            window = torch.tensor([[*prefix, *ids[at : at + WINDOW]]], device=base.device)
            with only_scored(base, torch.zeros_like(window, dtype=torch.bool)):
                base.forward(window, torch.ones_like(window))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / len(ids)).float() for name, total in sums.items()}


def _contexts(base: BaseModel, text: str, count: int, /, *, seed: int) -> list[tuple[int, ...]]:
    """Short pieces of the text, of different lengths, each ending with a new line."""
    words, generator = text.split(), torch.Generator().manual_seed(seed)
    starts = torch.randint(max(1, len(words) - 8), (count,), generator=generator).tolist()
    pieces = (" ".join(words[at : at + 3 + k % 4]) + ".\n" for k, at in enumerate(starts))
    return [tuple(base.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]


def _begins(base: BaseModel) -> bool:
    """Whether the tokenizer begins every text with a token of its own."""
    return base.tokenizer("a")["input_ids"][0] == base.tokenizer.bos_token_id
