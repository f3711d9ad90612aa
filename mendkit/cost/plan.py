"""Memory that training will take, from shapes alone, before anything is loaded.

What is held is exact: weights, trunk states, factors, and the hypernetwork with its gradients and
moments. What a phase works with is a closed form in tokens, features and logits; four bytes of text
count as a token. Peaks were within 25 % of those measured (docs/LOG.md).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import transformers
import yaml
from transformers import PreTrainedModel

from ..data.examples import HEADLINE_ROLES, EditExample, Probe
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..mend.archive import STRUCTURE, inspect_archive
from ..mend.batches import read_beside
from ..mend.factors import FACTOR_BATCH
from ..mend.hypernetwork import MEND
from ..mend.validation import POSITIONS_PER_PASS
from ..models.checkpoints import DTYPES, choose_device, silence_transformers
from ..models.load import skeleton
from ..models.sites import embedding_matrix, find_stacks, resolve_sites
from ..models.streaming import trunk_names
from ..models.trunk import TOKENS_PER_PASS
from ..runs import free_memory

# By how much predicted peaks may be off.
PLAN_TOLERANCE = 0.25

SAVED = 3  # copies of each linear layer's output that a pass with gradients keeps
READ = 6  # copies of logits while their loss and its gradient are computed
TRANSFORMED = 6  # copies of a token's factors in each block of the hypernetwork

# What makes each part smaller.
_RANK = "lower `rank`, or edit fewer layers"
REMEDIES = {
    "weights": "set `stream_trunk: true` or `dtype: bfloat16`",
    "trunk states": "give fewer examples, or raise `disk_cache_bytes`",
    "factors": "lower `cache_bytes`",
    "hypernetwork": _RANK,
    "gradients": _RANK,
    "moments": _RANK,
    "working memory": "lower `batch_size` and raise `accumulate_bs`, or edit later layers",
}


@dataclass(frozen=True)
class Plan:
    """The memory of training: bytes above an idle process by phase, and by what they are."""

    model: str
    parameters: int
    trunk: str  # kept, released after its pass, or streamed from disk
    texts: int
    tokens: int
    idle: int  # bytes of this process without weights
    phases: dict[str, dict[str, int]]

    @property
    def largest(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """The most memory above an idle process."""
        return sum(self.phases[self.largest].values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as values of JSON; what is `needed` includes this process."""
        return asdict(self) | {"needed": self.idle + self.peak, "largest": self.largest}


def published(
    name: str, *, device: str = "meta", dtype: torch.dtype = torch.float32, vocabulary: int = 0
) -> PreTrainedModel | None:
    """A model of shapes.yaml, of which `name` is a key or its last part; None if there is none.

    Elsewhere than on the meta device its weights are random, seeded. It has at least `vocabulary`
    tokens.
    """
    shapes = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
    for key, sizes in shapes.items():
        if name.lower() in (key.lower(), key.rpartition("/")[2].lower()):
            kind = getattr(transformers, sizes.pop("class"))
            config = kind.config_class(**sizes)
            config.vocab_size = max(config.vocab_size, vocabulary)
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                return kind._from_config(config, dtype=dtype)
    return None


def plan(
    h: MENDHyperParams, train: Sequence[EditExample], validation: Sequence[EditExample]
) -> Plan:
    """The plan of `train(h, train, validation)`. Raises ModelError as loading the model does."""
    if h.archive is not None:  # which training goes on from: it decides sites and shape
        archive = inspect_archive(h.archive)
        kept = {key: archive["hparams"][key] for key in STRUCTURE if key in archive["hparams"]}
        sites = [site["name"] for site in archive["base_model"]["sites"]]
        h = h.replace(archive=None, inner_params=sites, **kept)
    with silence_transformers():
        model = published(h.model_name)
        model = model or skeleton(h.model_name, trust_remote_code=h.trust_remote_code)
    texts, shape = _Texts(h, train, validation), _Shape(h, model)
    return Plan(
        model=h.model_name,
        parameters=shape.parameters,
        trunk=shape.trunk,
        texts=len(texts.lengths),
        tokens=texts.tokens,
        idle=psutil.Process().memory_info().rss,
        phases=dict(_phases(h, shape, texts)),
    )


class _Texts:
    """How long the texts are: tokens, and scored positions (those of the answer)."""

    def __init__(
        self, h: MENDHyperParams, train: Sequence[EditExample], validation: Sequence[EditExample]
    ) -> None:
        most = h.texts_per_role if isinstance(h.texts_per_role, tuple) else (h.texts_per_role,) * 3
        examples = [*train, *validation[: h.val_steps]]
        probes: list[Probe] = []
        for example in examples:
            roles = example.roles()
            for role, limit in zip(HEADLINE_ROLES, (1, *most), strict=True):
                probes += roles[role][:limit]
            for role in read_beside(h):
                probes += roles[role]
        self.lengths = {}
        for probe in probes:
            scored = _tokens(probe.answer or "") + h.add_eos
            self.lengths[probe.prompt, probe.answer] = _tokens(probe.prompt) + scored, scored
        self.edits = [self.lengths[e.prompt, e.target_new] for e in train]
        if h.edit_on == "text":  # all tokens are scored
            texts = [(*e.passages, f"{e.prompt} {e.target_new}")[0] for e in train]
            self.edits = [(_tokens(text), _tokens(text)) for text in texts]
        self.tokens = sum(tokens for tokens, _ in self.lengths.values())
        self.positions = sum(scored for _, scored in self.lengths.values())
        self.longest = max(tokens for tokens, _ in self.lengths.values())
        self.answer = self.positions / len(self.lengths)  # scored positions of a text, the mean
        self.per_example = len(probes) / len(examples)


def _tokens(text: str) -> int:
    return len(text.encode()) // 4 + 1


class _Shape:
    """Numbers of a model: bytes a number, width, vocabulary, and parameters by where they are."""

    def __init__(self, h: MENDHyperParams, model: PreTrainedModel) -> None:
        dtype = DTYPES.get(h.dtype) or model.config.dtype
        self.number = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
        self.sites = resolve_sites(model, h.inner_params)
        self.width, output = embedding_matrix(model).shape[1], model.get_output_embeddings()
        self.vocabulary = 2 if output is None else len(output.weight)  # of a classifier: classes
        stacks = find_stacks(model)
        blocks = [block for stack in stacks.values() for block in stack] or [model]
        numbers = [site.block for site in self.sites if site.block is not None]
        # Below the lowest edited block lies a trunk, if the blocks are one chain.
        first = 0
        if len(stacks) == 1 and len(numbers) == len(self.sites):
            first = min(numbers)
        below = trunk_names(model, next(iter(stacks)), first) if first else []
        counts = {name: value.numel() for name, value in model.named_parameters()}
        self.parameters, self.suffix = sum(counts.values()), len(blocks) - first
        self.below = sum(counts.get(name, 0) for name in below)
        self.block = sum(weight.numel() for weight in blocks[0].parameters())
        layers = [getattr(m, "out_features", getattr(m, "nf", 0)) for m in blocks[-1].modules()]
        self.features = sum(layers)  # of the linear layers of a block, per token
        self.trunk = "kept"
        if self.below and h.stream_trunk is True:
            self.trunk = "streamed"
        elif self.below and h.release_trunk is not False:
            self.trunk = "released"


def _phases(
    h: MENDHyperParams, shape: _Shape, texts: _Texts
) -> Iterator[tuple[str, dict[str, int]]]:
    """The phases in their order. What is held grows, but for the trunk's weights."""
    number, vocabulary = shape.number, shape.vocabulary

    def reading(rows: int) -> float:
        """Working memory of a pass through the suffix with gradients: features, and logits."""
        features = rows * texts.longest * shape.features * shape.suffix * number * SAVED
        return features + rows * texts.answer * vocabulary * 4 * READ

    # 1. Loading, and the trunk pass. States on disk are pages that the system takes back.
    streamed = shape.trunk == "streamed"
    held = {"weights": (shape.parameters - shape.below * streamed) * number}
    states = (texts.tokens + texts.positions) * shape.width * number
    held["trunk states"] = states * (states > h.disk_cache_bytes)
    portion = 2 * number * (shape.block if streamed else TOKENS_PER_PASS * shape.width)
    working = TOKENS_PER_PASS * shape.features * number * SAVED + portion
    yield "trunk pass", held | {"working memory": working}

    # 2. Factors and statistics. Second moments are gathered and inverted in float64.
    held["weights"] = (shape.parameters - shape.below * (shape.trunk != "kept")) * number
    factors = 0
    for site in shape.sites:
        scored = h.edit_tokens == "scored" or site.scored_only
        tokens = sum(lengths[scored] for lengths in texts.edits)
        factors += tokens * (site.d_in + site.d_out) * max(number, 4)
    held["factors"] = min(factors, h.cache_bytes)
    with torch.device("meta"):
        mend = MEND(shape.sites, h)
    held["hypernetwork"] = sum(value.nbytes for value in mend.state_dict().values())
    gathered = (h.whiten is not None) + 2 * h.whiten_pairs + (h.aggregate == "least_squares")
    squares = [site.d_in**2 * 8 for site in shape.sites]
    moments = gathered * sum(squares) + 5 * max(squares) * (gathered > 0)
    if h.whiten_values is not None:  # the root of a covariance, and its eigenvectors
        moments += 4 * max(site.d_out for site in shape.sites) ** 2 * 8
    rows = FACTOR_BATCH * (texts.per_example if h.whiten_pairs else 1)
    logits = rows * texts.answer * vocabulary * number * 2
    working = moments + int(max(reading(FACTOR_BATCH), logits))
    yield "statistics", held | {"working memory": working}

    # 3. Steps, and validation.
    learned = sum(value.nbytes for value in mend.parameters())
    held |= {"gradients": learned, "moments": 2 * learned}
    counts = (1, h.paraphrases_per_edit, h.neighbours_per_edit, h.unrelated_per_edit)
    step = reading(h.batch_size * (sum(counts) + len(read_beside(h))))
    step += h.batch_size * factors / len(texts.edits) * (h.n_hidden + 1) * TRANSFORMED
    validating = h.val_batch_size * texts.per_example * texts.answer
    validating = min(POSITIONS_PER_PASS, validating) * vocabulary * 4 * READ
    yield "training", held | {"working memory": int(max(step, validating))}


def check_memory(
    hparams: MENDHyperParams,
    train: Sequence[EditExample],
    validation: Sequence[EditExample],
    *,
    keep_trunk: bool = False,
) -> None:
    """Raise MendkitError if `train` on the CPU is planned to need more memory than is free.

    `PLAN_TOLERANCE` is granted. `keep_trunk`: the model is used after training, so it stays whole.
    Raises ModelError if the model's configuration cannot be read.
    """
    device, processes = choose_device(hparams.device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cpu":  # a GPU stops by itself where its memory ends
        return
    if keep_trunk:
        hparams = hparams.replace(stream_trunk=False, release_trunk=hparams.release_trunk is True)
    free, found = free_memory(device) // processes, plan(hparams, train, validation)
    if found.peak <= (1 + PLAN_TOLERANCE) * free:
        return
    most = max(found.phases[found.largest].items(), key=lambda part: part[1])[0]
    raise MendkitError(
        f"training will need about {found.peak / 1e9:.2f} GB ({found.largest}), and "
        f"{free / 1e9:.2f} GB are free. The largest part is {most}: {REMEDIES[most]}; "
        "--ignore-memory trains anyway"
    )


def plan_table(found: Plan) -> str:
    """A plan for people: the parts of each phase, and its peak, in GB."""
    table = pd.DataFrame(found.phases).T.fillna(0) / 1e9
    table["peak"] = table.sum(axis=1) + found.idle / 1e9
    return (
        f"{found.model}: {found.parameters / 1e6:,.0f} M parameters; trunk {found.trunk}\n"
        f"{found.texts:,} texts, {found.tokens:,} tokens; memory in GB:\n"
        f"{table.to_string(float_format='%.2f')}\n"
        f"at most {(found.idle + found.peak) / 1e9:.2f} GB, ± {PLAN_TOLERANCE:.0%}, with "
        f"{found.idle / 1e9:.2f} GB of the process itself"
    )
