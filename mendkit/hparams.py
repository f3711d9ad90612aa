"""Hyperparameters: one frozen, validated record read from one strict YAML file.

The keys are those of EasyEdit's MEND files, so that these load unmodified, and the kit's own; see
docs/HYPERPARAMETERS.md. Method and words: Mitchell et al., "Fast Model Editing at Scale", arXiv 2110.11309.

Every key is honoured or refused; the few that mean nothing here stand in `NO_EFFECT` and are named in one log
line when read. Scalars follow YAML 1.2, so `1e-6` is a number and `no` is text; no key comes twice.
The fields of `MENDHyperParams` are the table: a line is a key, its type, its default and what it accepts.
"""

import difflib
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args

import yaml

from .errors import HyperParamError

logger = logging.getLogger(__name__)

ALIASES = {"alg": "alg_name"}

# as written -> the validation score that picks the best archive; the last two are EasyEdit's
EARLY_STOP_KEYS = {name: name for name in ("score", "loss", "edit_success")}
EARLY_STOP_KEYS |= {"loss/total_edit_val": "loss", "edit/acc_val": "edit_success"}

# keys of EasyEdit's files for image models: such a file is refused
MULTIMODAL_KEYS = (
    "qformer_checkpoint",
    "qformer_name_or_path",
    "freeze_qformer",
    "state_dict_file",
    "iedit",
)
MULTIMODAL_KEYS += ("pretrained_ckpt", "coco_image", "rephrase_image", "exact_match")

NO_EFFECT = {  # key -> why its value changes nothing here
    "model_class": "the class follows from the model's own configuration",
    "tokenizer_class": "the class follows from the tokenizer's own files",
    "model_parallel": "the model is placed whole on the one device named by `device`; `dtype: bfloat16` halves it",
    "cbase": "it weighs a loss on the base model, which stays frozen",
    "dropout": "the base model runs without dropout, always",
    "train_base": "the base model stays frozen",
    "no_grad_layers": "everything but the hypernetwork is frozen anyway",
    "model_save_pt": "the best archive is saved at every validation that improves it",
    "eval_log_interval": "a validation is logged once, when it ends",
    "final_eval": "training always ends with a validation",
    "eval_only": "the command decides: train, edit or evaluate",
    "half": "`dtype` sets the precision of the base model: auto keeps that of the checkpoint",
    "save": "the best archive is always saved",
    "max_output_length": "free decoding for the scores has a fixed limit",
    **dict.fromkeys(("silent", "debug", "verbose"), "the level of logging decides what is shown"),
}
_ONE_VALUE = {
    "dropout": 0.0,
    "train_base": False,
    "no_grad_layers": None,
    "half": False,
}  # else refused
_UNREMARKABLE = {
    "cbase": 1.0,
    "final_eval": True,
    "verbose": True,
}  # like null and false, not worth logging


def _show(value: Any) -> str:
    """A value as a YAML user knows it, cut to fit a message."""
    try:
        text = (
            "null"
            if value is None
            else str(value).lower()
            if isinstance(value, bool)
            else repr(value)
        )
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of too many digits"
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class _Rule:
    """What a key accepts. `store` gives a value's normal form and raises for a value that is refused."""

    kind: Any
    null: bool = False
    legal: tuple = ()
    low: float | None = None
    above: float | None = None
    most: float | None = None
    store: Callable[[Any], Any] | None = None
    words: str = ""  # what `store` expects, or why so little is legal

    def expected(self) -> str:
        """What a legal value is, in words."""
        kinds = {
            int: "an integer",
            float: "a finite number",
            bool: "true or false",
            str: "non-empty text",
        }
        text = (self.store and self.words) or kinds.get(self.kind, "null")
        if self.legal:
            text = " or ".join(map(_show, self.legal)) + (f" ({self.words})" if self.words else "")
        text += "" if self.low is None else f" >= {self.low}"
        text += "" if self.above is None else f" > {self.above}"
        text += "" if self.most is None else f" and <= {self.most}"
        return text + (" or null" if self.null else "")


def _to_kind(value: Any, kind: type) -> Any:
    if kind is str:
        value = os.fspath(value)
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        value = float(value)  # text such as '1e-6' is what PyYAML makes of EasyEdit's numbers
    right = type(value) is kind and bool(str(value).strip())  # a bool is no int, blanks are no name
    if not right or (kind is float and not math.isfinite(value)):
        raise ValueError
    return value


def _to_device(value: Any) -> str:
    text = f"cuda:{value}" if type(value) is int or str(value).isdecimal() else value
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text) is None:
        raise ValueError
    return text


def _switch(value: Any) -> bool | str:
    return value if value == "auto" else _to_kind(value, bool)


def _names(value: Any) -> str | tuple[str, ...]:
    if value == "auto":
        return value
    if not isinstance(value, (list, tuple)) or not value or len(set(value)) < len(value):
        raise ValueError
    return tuple(_to_kind(name, str) for name in value)


def _counts(value: Any) -> int | tuple[int, ...]:
    """A count for every role, or one each for paraphrases, neighbours and unrelated prompts."""
    each = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(each) not in (1, 3) or any(_to_kind(count, int) < 1 for count in each):
        raise ValueError
    return each if isinstance(value, (list, tuple)) else value


def to_bytes(value: Any) -> int:
    """Bytes from a number or from text such as '1.5GB'; an error of any kind for what is neither."""
    if isinstance(value, str):
        digits, prefix, binary = re.fullmatch(
            r"(\d+(?:\.\d+)?) *(?:([kKMGT])(i?))?B?", value
        ).groups()
        power = " KMGT".index(prefix.upper()) if prefix else 0
        value = round(float(digits) * (1024 if binary else 1000) ** power)
    elif isinstance(value, bool) or value != int(value):
        raise TypeError
    return int(value)


def _key(default: Any, **rule: Any) -> Any:
    return field(default=default, metadata=rule)


@dataclass(frozen=True, kw_only=True)
class MENDHyperParams:
    """All settings of a model editor: which model and sites, the hypernetwork, its training, data and caches.

    A micro-batch is `batch_size` independent edits, each with its own update alone. The loss is their
    mean of cedit * NLL(edit) + cpara * NLL(paraphrases) + cloc * KL(unrelated) + cneigh *
    KL(neighbours) + cmargin * MARGIN: NLL of the new target under the edited model, KL(unedited || edited), both in
    nats; MARGIN is what the new target lacks of being `margin` nats a token less likely than a neighbour's own answer.
    Whatever makes one validates it (HyperParamError) and stores normal forms: `device: 0` is "cuda:0".
    """

    # identity
    archive: str | None = None  # only YAML's null is None: the text 'None' names a file
    alg_name: str = _key("MEND", legal=("MEND",), words="the one method of this kit")
    model_name: str
    tokenizer_name: str | None = _key(None, store=lambda v: None if v == "." else _to_kind(v, str))
    dtype: str = _key("auto", legal=("auto", "float32", "bfloat16", "float16"))
    device: str = _key(
        "auto", store=_to_device, words="auto, cpu, mps, cuda, cuda:N, or N for cuda:N"
    )
    trust_remote_code: bool = False
    inner_params: tuple[str, ...] | str = _key(
        "auto", store=_names, words="auto or a list of unique names"
    )
    # hypernetwork
    rank: int | None = _key(256, low=1)
    n_hidden: int = _key(1, low=0)  # n_hidden + 1 residual blocks, as the original counts
    hidden_dim: None = _key(
        None, legal=(None,), words="a residual block keeps the width of its input"
    )
    init: str = _key("id_xavier", legal=("id_xavier", "id", "xavier"))
    norm: bool = True
    combine: bool = True
    one_sided: bool = False
    x_only: bool = False
    delta_only: bool = False
    act: str = _key("relu", legal=("relu",), words="the one activation of this kit")
    mlp_class: str = _key("IDMLP", legal=("IDMLP",), words="the one kind of block of this kit")
    shared: bool = True
    norm_stats: str = _key("layer", legal=("layer", "shape"))
    update_sign: int = _key(-1, legal=(-1, 1))  # -1 descends, as Algorithm 2 of the paper does
    std_floor: float = _key(0.1, low=0)
    std_eps: float = _key(0.0, low=0)
    z_clip: float | None = _key(10.0, above=0)
    edit_tokens: str = _key("all", legal=("all", "scored"))
    loss_reduction: str = _key("edit", legal=("edit", "sum", "batch"))
    whiten: float | None = _key(None, above=0)
    whiten_pairs: bool = False
    unit_response: bool = False
    aggregate: str = _key("sum", legal=("sum", "least_squares"))
    ridge: float = _key(0.003, above=0)  # the logarithms of both are learned
    ridge_shared: float = _key(0.04, above=0)
    stats_examples: int = _key(500, low=1)
    stats_held_out: bool = False
    max_relative_norm: float | None = _key(None, above=0)
    lifelong_norm: bool = False
    # training
    lr: float = _key(1e-4, low=0)
    edit_lr: float = _key(1e-4, above=0)  # its logarithm is learned
    lr_lr: float = _key(1e-2, low=0)
    lr_scale: float = _key(1.0, low=0)
    cedit: float = _key(1.0, low=0)
    cpara: float | None = _key(None, low=0)  # null: as cedit
    cloc: float = _key(1.0, low=0)
    cneigh: float | None = _key(None, low=0)  # null: as cloc
    cmargin: float = _key(0.0, low=0)
    margin: float = _key(1.0, low=0)
    train_on: str = _key("single", legal=("single", "batch", "sequence"))
    most_edits: int = _key(16, low=1)
    batch_size: int = _key(16, low=1)
    accumulate_bs: int = _key(1, low=1)
    texts_per_role: tuple[int, ...] | int | None = _key(
        None, store=_counts, words="an integer >= 1, or three"
    )
    borrow: float = _key(0.0, low=0, most=1)
    swap: float = _key(0.0, low=0, most=1)
    hard_negatives: float = _key(0.0, low=0, most=1)
    paraphrases_per_edit: int = _key(1, low=0)
    neighbours_per_edit: int = _key(1, low=0)
    unrelated_per_edit: int = _key(1, low=0)
    max_iters: int = _key(1000, low=0)
    max_epochs: int | None = _key(None, low=1)  # where given, it decides instead of max_iters
    max_seconds: float | None = _key(None, above=0)
    schedule: str = _key("cosine", legal=("constant", "cosine"))
    warmup_iters: int = _key(20, low=0)
    val_interval: int = _key(100, low=1)
    val_steps: int = _key(100, low=1)
    val_batch_size: int = _key(32, low=1)
    checkpoint_interval: int | None = _key(None, low=1)
    early_stop_patience: int = _key(20000, low=1)
    early_stop_key: str = _key(
        "score", store=EARLY_STOP_KEYS.__getitem__, words=" or ".join(EARLY_STOP_KEYS)
    )
    grad_clip: float = _key(1.0, above=0)
    opt: str = _key("Adam", legal=("Adam", "AdamW"))
    seed: int = _key(42, low=0, most=2**32 - 1)
    log_interval: int = _key(10, low=1)
    logger: str | None = _key(
        None, legal=("tensorboard", "trackio", "wandb")
    )  # history.jsonl is written always
    # data and caches
    add_eos: bool = True
    max_target_tokens: int = _key(32, low=1)
    max_length: int = _key(512, low=2)
    cache_dir: str | None = None
    disk_cache_bytes: int = _key(
        20_000_000_000, low=0, store=to_bytes, words="bytes, or text such as '20GB',"
    )
    cache_bytes: int = _key(
        1_500_000_000, low=0, store=to_bytes, words="bytes, or text such as '1.5GB',"
    )
    release_trunk: bool | str = _key("auto", store=_switch, words="auto, true or false")
    stream_trunk: bool | str = _key("auto", store=_switch, words="auto, true or false")
    results_dir: str = "runs"

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _check(item.name, getattr(self, item.name), ""))
        _check_one_way(vars(self), lambda key: "")
        for key in ("whiten_pairs", "unit_response"):
            if getattr(self, key) and self.whiten is None:
                raise HyperParamError(
                    f"{key}: true needs `whiten`, the ridge of the normaliser; set it, such as 0.02"
                )
        if self.whiten_pairs and self.edit_tokens != "scored":
            raise HyperParamError("whiten_pairs: true needs `edit_tokens: scored`")

    @classmethod
    def from_hparams(cls, path: str | os.PathLike[str], **overrides: Any) -> "MENDHyperParams":
        """Read a YAML file; `overrides` win over it. Raises HyperParamError naming file, line, key, value."""
        values, lines = read_yaml(Path(path))
        values = _resolve(values, lambda key: f"{path}:{lines[key]}: ")
        changes = _last_word(_resolve(overrides, lambda key: "override: "))
        merged = values | changes
        if "model_name" not in merged:
            raise HyperParamError(
                f"{path}: model_name is missing; add `model_name: <name, folder or file>`"
            )
        _check_one_way(
            merged, lambda key: "override: " if key in changes else f"{path}:{lines[key]}: "
        )
        return cls(**merged)

    def replace(self, **changes: Any) -> "MENDHyperParams":
        """A copy with some keys changed, validated as a file is. Raises HyperParamError."""
        return replace(self, **_last_word(_resolve(changes, lambda key: "")))

    def to_dict(self) -> dict[str, Any]:
        """Every key and value in plain types, for JSON or YAML; `MENDHyperParams(**d)` equals this one."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }


def _rule(annotation: Any, constraints: Mapping[str, Any]) -> _Rule:
    types = get_args(annotation) or (annotation or NoneType,)
    return _Rule(types[0], null=NoneType in types[1:], **constraints)


_RULES = {item.name: _rule(item.type, item.metadata) for item in fields(MENDHyperParams)} | {
    key: _Rule(type(only), legal=(only,), words=NO_EFFECT[key]) for key, only in _ONE_VALUE.items()
}


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Values for `from_hparams(path, **values)` from texts "key=value", each typed by the key that it sets.

    A value is YAML (`null`, `false`, `1e-4`, `[a.weight, b.weight]`), except that text keeps its characters.
    Raises HyperParamError for an unknown or repeated key, a text without "=", a value that the key refuses.
    """
    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or key in given:
            raise HyperParamError(
                f"override {text!r}: expected key=value, such as lr=1e-4, each once"
            )
        plain = key in _RULES and _RULES[key].kind is str and value not in ("", "~", "null")
        try:
            given[key] = (
                value if plain and value[0] not in "'\"" else yaml.load(value, _StrictLoader)
            )
        except _YAML_ERRORS as error:
            problem = getattr(error, "problem", None) or error
            raise HyperParamError(
                f"override {text!r}: the value is not valid YAML: {problem}"
            ) from None
    return _resolve(given, lambda key: "override: ")


def _resolve(given: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Given keys and values as fields of MENDHyperParams, checked. `where(key)` opens an error's message."""
    multimodal = [key for key in given if key in MULTIMODAL_KEYS]
    if multimodal:
        reason = (
            "belongs to an image model, which this kit does not edit; use the file of a text model"
        )
        raise HyperParamError(f"{where(multimodal[0])}{' / '.join(multimodal)} {reason}")
    values, without_effect = {}, []
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name in _RULES:
            value = _check(key, value, where(key))
        if name in NO_EFFECT:
            if name not in _ONE_VALUE and value not in (None, False, _UNREMARKABLE.get(name)):
                without_effect.append(key)
        elif name in _RULES:
            values[name] = value
        else:
            close = difflib.get_close_matches(
                key.lower(), sorted({*_RULES, *NO_EFFECT, *ALIASES}), 1, 0.5
            )
            nearest = f"the nearest key is {close[0]!r}" if close else "no key resembles it"
            nearest += (
                " (`name` stands in EasyEdit's files for image models only)"
                if key == "name"
                else ""
            )
            message = f"unknown key {key!r} (value {_show(value)}); {nearest}; see docs/HYPERPARAMETERS.md"
            raise HyperParamError(where(key) + message)
    if without_effect:
        keys = ", ".join(without_effect)
        logger.warning(
            "%swithout effect: %s; see docs/HYPERPARAMETERS.md", where(without_effect[0]), keys
        )
    return values


def _last_word(changes: dict[str, Any]) -> dict[str, Any]:
    """A new `max_iters` alone must not be outvoted by an older `max_epochs`."""
    return {"max_epochs": None} | changes if "max_iters" in changes else changes


def _check(key: str, value: Any, where: str) -> Any:
    rule = _RULES[ALIASES.get(key, key)]
    if value is None and rule.null:
        return None
    try:
        stored = rule.store(value) if rule.store else _to_kind(value, rule.kind)
        in_range = (rule.low is None or stored >= rule.low) and (
            rule.above is None or stored > rule.above
        )
        in_range = in_range and (rule.most is None or stored <= rule.most)
        if in_range and (not rule.legal or stored in rule.legal):
            return stored
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        pass  # all are ways to refuse a value
    raise HyperParamError(f"{where}{key} must be {rule.expected()}, got {_show(value)}")


def _check_one_way(values: Mapping[str, Any], where: Callable[[str], str]) -> None:
    one_way = [key for key in ("one_sided", "x_only", "delta_only") if values.get(key)]
    if len(one_way) > 1 or (one_way and values.get("combine", True)):
        expected = "at most one of one_sided, x_only, delta_only may be true, and only with `combine: false`"
        raise HyperParamError(f"{where(one_way[-1])}{' and '.join(one_way)}: true, but {expected}")


# what PyYAML raises, a faulty explicit tag such as `!!int x` included
_YAML_ERRORS = (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (and `_` in integers), without merge keys."""

    yaml_implicit_resolvers: ClassVar = {
        None: [
            ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)\Z")),
            ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
            ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")),
            (
                "tag:yaml.org,2002:float",
                re.compile(r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?\Z"),
            ),
        ]
    }


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping of a YAML file, and the line of each key. Raises HyperParamError naming file and line."""
    try:
        loader = _StrictLoader(path.read_bytes())
        root = loader.get_single_node()
        nodes = root.value if isinstance(root, yaml.MappingNode) else []
        pairs = [(key, loader.construct_object(value, deep=True)) for key, value in nodes]
    except OSError as error:
        raise HyperParamError(
            f"{path}: cannot be read ({error.strerror}); expected a YAML file"
        ) from None
    except _YAML_ERRORS as error:
        mark, problem = (
            getattr(error, "problem_mark", None),
            getattr(error, "problem", None) or error,
        )
        line = f"{mark.line + 1}: " if mark else " "
        raise HyperParamError(f"{path}:{line}not valid YAML: {problem}") from None
    if not pairs:
        found = "the file is empty" if root is None else "no keys found"
        raise HyperParamError(f"{path}: {found}; expected lines `key: value`")
    values, lines = {}, {}
    for key, value in pairs:
        line, name = key.start_mark.line + 1, key.value
        if key.tag != "tag:yaml.org,2002:str":
            raise HyperParamError(f"{path}:{line}: a key must be text, got {_show(name)}")
        if name in lines:
            raise HyperParamError(
                f"{path}:{line}: the key {name!r} is given twice, see line {lines[name]}"
            )
        values[name], lines[name] = value, line
    return values, lines
