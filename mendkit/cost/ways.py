"""Ways to train: the textbook (textbook.py), or the kit with some of its four savings.

The savings are the trunk cache, the factor cache, passes over several independent edits, and logits of scored positions
only. All ways share one hypernetwork and the same B edits, take the gradient of the same loss, and end a step with the
same optimiser. The learning rate is 0, so that every step is the same step, which costs what any other does.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ..data.examples import EditExample
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.batches import prepare_texts
from ..mend.factors import FactorCache
from ..mend.hypernetwork import MEND, group_name, stats_name
from ..mend.steps import batch_losses, total_loss
from ..models.base import BaseModel
from ..models.bundled import bundled_model
from ..models.checkpoints import BUNDLED
from ..models.load import load_model
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from . import textbook

TEXTBOOK, KIT = "textbook", "kit"
GPT2_XL = "gpt2-xl-shape"
MODELS = (BUNDLED, GPT2_XL)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest error of a loss, a gradient, an edited model's logits that rounding excuses where no ReLU of the hypernetwork
is near its hinge (`clear_hinges`). Measured in float32: 3e-6."""

Row = list[tuple[str, Tokens]]
"""The texts of one edit by role; the edit itself comes first."""


@dataclass(frozen=True)
class Savings:
    """Which of its savings the kit makes use of."""

    trunk: bool = True
    factors: bool = True
    at_once: int | None = None  # independent edits in one pass; None: all of a step's


WAYS: dict[str, Savings | None] = {
    TEXTBOOK: None,
    KIT: Savings(),
    "without trunk cache": Savings(trunk=False),
    "without factor cache": Savings(factors=False),
    "one edit at a time": Savings(at_once=1),
}


@dataclass(frozen=True)
class Settings:
    """What to measure. `model` is one of MODELS or a YAML file."""

    model: str
    batch: int = 16  # edits per optimiser step
    rank: int = 1920
    repeats: int = 3  # turns
    layers: int | None = None  # of a random model, instead of the shape's own
    width: int = 1600  # of a random model

    def __post_init__(self) -> None:
        if self.model not in MODELS and not Path(self.model).is_file():
            raise MendkitError(
                f"no model {self.model!r} to measure; give {', '.join(MODELS)} or a YAML file"
            )


QUICK: dict[str, int] = {"batch": 2, "rank": 16, "repeats": 2, "layers": 4, "width": 64}
"""Settings of a trial run."""


# ------------------------------------------------------------------------------------------------------ set up


def open_base(s: Settings, /) -> BaseModel:
    """The base model: bundled, of a YAML file, or of GPT-2 XL's shape with random weights."""
    if s.model == GPT2_XL:
        return random_gpt2(layers=s.layers or 48, width=s.width)
    if s.model == BUNDLED:
        return load_model(BUNDLED)
    return load_model(MENDHyperParams.from_hparams(s.model))


def random_gpt2(*, layers: int, width: int) -> BaseModel:
    """A GPT-2 (float32, heads of 64) with random weights and the bundled model's tokenizer; edits its last 3 MLPs."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=layers, n_embd=width, n_head=max(width // 64, 1))
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float(name.endswith("weight")))
        else:
            parameter.data.uniform_(-0.035, 0.035, generator=generator)  # a std of 0.02
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    return BaseModel(model, tokenizer, name=f"{GPT2_XL}-{layers}x{width}")


def recipe(s: Settings, base: BaseModel, /) -> MENDHyperParams:
    """The published recipe: all tokens, per-feature normaliser, each edit's mean loss, locality weighing ten times."""
    sites = [site.name for site in base.sites]
    h = MENDHyperParams(model_name=s.model, inner_params=sites, rank=s.rank, batch_size=s.batch)
    return h.replace(edit_lr=3e-4, cedit=0.1, unrelated_per_edit=0, lr=0.0, lr_lr=0.0)


def draw(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample], /
) -> tuple[list[EditExample], list[Row]]:
    """`batch_size` examples at random, and of each the edit, a paraphrase and a neighbour. Raises MendkitError."""
    whole = [e for e in examples if e.paraphrases and e.neighbours]
    if len(whole) < h.batch_size:
        raise MendkitError(
            f"{len(whole)} examples have a paraphrase and a neighbour; at least {h.batch_size} are needed"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(h.seed))[
        : h.batch_size
    ].tolist()
    chosen = [whole[i] for i in order]
    return chosen, [
        [("edit", t.edit), ("paraphrases", t.paraphrases[0]), ("neighbours", t.neighbours[0])]
        for t in prepare_texts(base, h, chosen)
    ]


def make_mend(base: BaseModel, h: MENDHyperParams, rows: Sequence[Row], /) -> MEND:
    """A hypernetwork as after some training: U is not zero, so that every parameter has a gradient."""
    mend = MEND(base.sites, h).to(base.device)
    generator = torch.Generator().manual_seed(h.seed)
    for name, parameter in mend.named_parameters():
        if name.endswith(".U"):
            torch.nn.init.normal_(
                parameter, std=0.1 / parameter.shape[1] ** 0.5, generator=generator
            )
    found = [textbook.factors(base, row[0][1]) for row in rows]
    factors = {
        site.name: tuple(map(torch.cat, zip(*(own[site.name] for own in found), strict=True)))
        for site in base.sites
    }
    for site in base.sites:
        for part, values in zip(("u", "delta"), factors[site.name], strict=True):
            mend.moments[stats_name(site, h)][part].add(values)
    clear_hinges(mend, factors)
    return mend


@torch.no_grad()
def clear_hinges(mend: MEND, factors: Mapping[str, tuple[Tensor, Tensor]], /) -> None:
    """Move each ReLU's hinge (o in equation 3) to the middle of a gap between what it sees of a site's (u, δ): the
    widest gap within the middle half of the tokens.

    The gradient jumps at a hinge. Of millions of values a few are so close to it that rounding, which no two ways
    share, decides on which side they are; a whole row of the gradient then differs between ways that are both right.
    """
    for site in mend.sites:
        group, own = (
            group_name(site, mend.hparams.shared),
            [x.to(mend.log_edit_lr) for x in factors[site.name]],
        )
        layer, z = mend.groups[group].index(site.name), textbook.entering(mend, site, *own)
        quarter = len(z) // 4
        for block in mend.blocks[group] if len(z) > 1 else ():
            middle = textbook.hidden(block, layer, z).sort(0).values[quarter : len(z) - quarter]
            below = middle.diff(dim=0).argmax(0, keepdim=True)
            block.shift[layer] -= (middle.gather(0, below) + middle.gather(0, below + 1))[0] / 2
            z = z + torch.relu(textbook.hidden(block, layer, z))


class Way:
    """One way to train: `savings` None is the textbook. `optimiser` holds the hypernetwork's state."""

    def __init__(
        self,
        base: BaseModel,
        mend: MEND,
        rows: Sequence[Row],
        /,
        *,
        savings: Savings | None,
        optimiser: Any,
    ) -> None:
        self.base, self.mend, self.rows, self.savings, self.optimiser = (
            base,
            mend,
            rows,
            savings,
            optimiser,
        )
        self.seconds = {"trunk": 0.0, "factors": 0.0}
        if savings is not None:
            self.trunk = FrozenTrunk(base)
            h = mend.hparams.replace(cache_bytes=10**12 if savings.factors else 0)
            self.factors = FactorCache(self.trunk, h)
            if savings.trunk:
                texts = [text for row in rows for _, text in row]
                self.seconds["trunk"] = seconds_of(lambda: self.trunk.fill(texts))
            self.seconds["factors"] = seconds_of(
                lambda: self.factors.fill([row[0][1] for row in rows])
            )

    def backward(self) -> dict[str, float]:
        """Add the gradient of the batch's loss to the hypernetwork's; returns the mean loss of each role."""
        size = 1 if self.savings is None else self.savings.at_once or len(self.rows)
        sums: dict[str, float] = {}
        for part in (self.rows[at : at + size] for at in range(0, len(self.rows), size)):
            losses, share = self._losses(part), len(part) / len(self.rows)
            (total_loss(losses, self.mend.hparams) * share).backward()
            for role, loss in losses.items():
                sums[role] = sums.get(role, 0.0) + float(loss.detach()) * share
        return sums

    def _losses(self, part: Sequence[Row]) -> dict[str, Tensor]:
        if self.savings is None:
            return textbook.textbook_losses(self.base, self.mend, part[0])
        return batch_losses(
            self.trunk, self.mend, self.factors.get([row[0][1] for row in part]), part
        )

    def step(self) -> None:
        """One optimiser step over all edits."""
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.mend.parameters(), self.mend.hparams.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def plain_adam(mend: MEND, /) -> torch.optim.Optimizer:
    """The textbook's optimiser: Adam as torch has it by default."""
    return torch.optim.Adam(mend.parameters(), lr=0.0)


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    value = do()
    return time.perf_counter() - start, value


def seconds_of(do: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    return timed(do)[0]


# ------------------------------------------------------------------------------------------------------ equality


def gradients(way: Way, /) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses, and the gradient of every parameter of the hypernetwork."""
    way.optimiser.zero_grad(set_to_none=True)
    losses = way.backward()
    found = {name: p.grad for name, p in way.mend.named_parameters() if p.grad is not None}
    way.optimiser.zero_grad(set_to_none=True)
    return losses, found


def largest_error(
    expected: tuple[dict[str, float], dict[str, Tensor]],
    found: tuple[dict[str, float], dict[str, Tensor]],
    /,
) -> float:
    """The largest error of a loss (relative; in nats below one nat) or of a parameter's gradient (relative, in norm);
    infinite where something is missing."""
    if any(a.keys() != b.keys() for a, b in zip(expected, found, strict=True)):
        return float("inf")
    errors = [
        abs(found[0][role] - value) / max(abs(value), 1.0) for role, value in expected[0].items()
    ]
    errors += [distance(found[1][name], value) for name, value in expected[1].items()]
    return max(error if error == error else float("inf") for error in errors)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())
