"""Ways to train: the textbook (textbook.py), the kit, and the kit without its trunk cache.

All ways share one base model, one hypernetwork and the same B edits. They take the gradient of the
same loss and end a step with Adam. The learning rate is 0, so every step costs the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ..data.examples import EditExample
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.batches import prepare_texts
from ..mend.factors import FactorCache
from ..mend.hypernetwork import MEND
from ..mend.steps import batch_losses, total_loss
from ..models.base import BaseModel
from ..models.checkpoints import BUNDLED, bundled_model
from ..models.load import load_model
from ..models.trunk import FrozenTrunk
from ..runs import user_path
from . import textbook
from .textbook import TextRow

TEXTBOOK, KIT, NO_TRUNK = "textbook", "kit", "without trunk cache"
WAYS = (TEXTBOOK, KIT, NO_TRUNK)

GPT2_XL = "gpt2-xl-shape"
MODELS = (BUNDLED, GPT2_XL)
QUICK: dict[str, int] = {"batch": 2, "rank": 16, "repeats": 2, "layers": 4, "width": 64}
"""Settings of a trial run."""


@dataclass(frozen=True)
class Settings:
    """What to measure. `model` is one of MODELS or a YAML file."""

    model: str
    batch: int = 16  # edits per optimiser step
    rank: int = 1920
    repeats: int = 3  # turns
    layers: int = 48  # of a random model
    width: int = 1600  # of a random model

    def __post_init__(self) -> None:
        if self.model not in MODELS and not user_path(self.model).is_file():
            known = ", ".join(MODELS)
            raise MendkitError(f"no model {self.model!r} to measure; give {known} or a YAML file")

    def open(self) -> BaseModel:
        """The base model: bundled, of a YAML file, or of GPT-2 XL's shape with random weights."""
        if self.model == GPT2_XL:
            return random_gpt2(layers=self.layers, width=self.width)
        if self.model == BUNDLED:
            return load_model(BUNDLED)
        return load_model(MENDHyperParams.from_hparams(self.model))

    def recipe(self, base: BaseModel) -> MENDHyperParams:
        """The published recipe: all tokens, per-feature normaliser, locality weighs ten times."""
        return MENDHyperParams(
            model_name=self.model,
            inner_params=[site.name for site in base.sites],
            rank=self.rank,
            batch_size=self.batch,
            edit_lr=3e-4,
            cedit=0.1,
            unrelated_per_edit=0,
            lr=0.0,
            lr_lr=0.0,
        )


def random_gpt2(*, layers: int, width: int) -> BaseModel:
    """A GPT-2 (float32, heads of 64) with random weights and the bundled model's tokenizer."""
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=max(width // 64, 1))
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
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


def draw_rows(
    base: BaseModel, hparams: MENDHyperParams, examples: Sequence[EditExample]
) -> tuple[list[EditExample], list[TextRow]]:
    """`batch_size` examples at random, and of each the edit, a paraphrase and a neighbour.

    Raises MendkitError if too few examples have both.
    """
    whole = [e for e in examples if e.paraphrases and e.neighbours]
    size = hparams.batch_size
    if len(whole) < size:
        raise MendkitError(f"{size} examples with a paraphrase and a neighbour are needed")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(hparams.seed))
    chosen = [whole[i] for i in order[:size].tolist()]
    rows = []
    for texts in prepare_texts(base, hparams, chosen):
        row = [("edit", texts.edit), ("paraphrases", texts.paraphrases[0])]
        rows.append([*row, ("neighbours", texts.neighbours[0])])
    return chosen, rows


class Way:
    """One way to train. `seconds` tells how long its caches took to fill."""

    def __init__(self, name: str, base: BaseModel, mend: MEND, rows: Sequence[TextRow]) -> None:
        self.name, self.base, self.mend, self.rows = name, base, mend, rows
        self.optimiser = torch.optim.Adam(mend.parameters(), lr=0.0, fused=name != TEXTBOOK)
        self.seconds = 0.0
        if name == TEXTBOOK:
            return
        self.trunk = FrozenTrunk(base)
        self.factors = FactorCache(self.trunk, mend.hparams.replace(cache_bytes=10**12))
        if name == KIT:
            texts = [text for row in rows for _, text in row]
            self.seconds = seconds_of(lambda: self.trunk.fill(texts))
        self.factors.fill([row[0][1] for row in rows])

    def backward(self) -> dict[str, float]:
        """Add the gradient of the batch's loss to the hypernetwork; the mean loss of each role."""
        parts = [[row] for row in self.rows] if self.name == TEXTBOOK else [list(self.rows)]
        sums: dict[str, float] = {}
        for part in parts:
            share = len(part) / len(self.rows)
            if self.name == TEXTBOOK:
                losses = textbook.textbook_losses(self.base, self.mend, part[0])
            else:
                factors = self.factors.get([row[0][1] for row in part])
                losses = batch_losses(self.trunk, self.mend, factors, part)
            (total_loss(losses, self.mend.hparams) * share).backward()
            for role, loss in losses.items():
                sums[role] = sums.get(role, 0.0) + float(loss.detach()) * share
        return sums

    def gradients(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Losses, and the gradient of every parameter of the hypernetwork."""
        self.optimiser.zero_grad(set_to_none=True)
        losses = self.backward()
        found = {n: p.grad for n, p in self.mend.named_parameters() if p.grad is not None}
        self.optimiser.zero_grad(set_to_none=True)
        return losses, found

    def step(self) -> None:
        """One optimiser step over all edits."""
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.mend.parameters(), self.mend.hparams.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    value = do()
    return time.perf_counter() - start, value


def seconds_of(do: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    return timed(do)[0]


def largest_error(
    expected: tuple[dict[str, float], dict[str, Tensor]],
    found: tuple[dict[str, float], dict[str, Tensor]],
) -> float:
    """The largest error of a loss (relative; nats below one nat) or a gradient (relative norm).

    Infinite where something is missing or not a number.
    """
    if expected[0].keys() != found[0].keys() or expected[1].keys() != found[1].keys():
        return float("inf")
    errors = [distance(found[1][name], value) for name, value in expected[1].items()]
    for role, loss in expected[0].items():
        errors.append(abs(found[0][role] - loss) / max(abs(loss), 1.0))
    return max(errors) if all(error == error for error in errors) else float("inf")


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())
