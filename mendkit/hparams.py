"""Hyperparameters: one frozen record, read from one strict YAML file.

The keys are those of EasyEdit's MEND files, which load unmodified, and the kit's own; meanings and
legal values stand in docs/HYPERPARAMETERS.md. Every key is honoured or refused, but for the few of
`NO_EFFECT`.
"""

import difflib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
)

from .errors import HyperParamError, shown
from .methods import METHODS
from .places import archive_file
from .strict_yaml import read_value, read_yaml

logger = logging.getLogger(__name__)

PAGE = "docs/HYPERPARAMETERS.md"

ALIASES = {"alg": "alg_name"}

# EasyEdit's names of validation scores; the kit's names mean themselves
EARLY_STOP_KEYS = {"loss/total_edit_val": "loss", "edit/acc_val": "edit_success"}

# keys of EasyEdit that change nothing here but may say only this: other values would need code
ONLY_VALUES = {"dropout": 0.0, "train_base": False, "no_grad_layers": None, "half": False}

NO_EFFECT = (
    *ONLY_VALUES,
    *("model_class", "tokenizer_class", "model_parallel", "cbase", "model_save_pt", "save"),
    *("eval_log_interval", "final_eval", "eval_only", "max_output_length"),
    *("silent", "debug", "verbose"),
)

# what other programs call a key, for the error; EasyEdit's image files say `name`, MALMEN's too
SYNONYMS = {
    "model_name": "model name name_or_path model_name_or_path base_model",
    "archive": "checkpoint editor_path",
    "dtype": "fp16 bf16 precision torch_dtype",
    "inner_params": "layers target_modules edit_modules",
    "n_hidden": "n_blocks num_layers",
    "lr": "learning_rate meta_lr",
    "batch_size": "bs train_batch_size per_device_train_batch_size n_edits",
    "accumulate_bs": "gradient_accumulation_steps",
    "max_iters": "steps max_steps num_steps iterations",
    "max_epochs": "epochs num_epochs num_train_epochs n_epochs",
    "warmup_iters": "warmup_steps",
    "schedule": "scheduler lr_scheduler lr_scheduler_type",
    "grad_clip": "max_grad_norm gradient_clip_val",
    "opt": "optimizer optim",
    "max_length": "max_len max_seq_length",
    "results_dir": "output_dir out_dir out",
}

# texts whose characters an override keeps: `model_name=1e5` is a name
PLAIN_TEXTS = ("archive", "model_name", "tokenizer_name", "cache_dir", "results_dir")

# A validator raises ValueError with what is expected; the message "KEY must be …" is made of it.


def _text(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError("non-empty text")
    return text


def _path(value: Any) -> str:
    return os.path.expanduser(_text(value))


def _archive(path: str) -> str:
    return str(archive_file(path)) if os.path.isdir(path) else path


def _columns(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...] | None:
    pairs = []
    try:
        for field, names in dict(value or {}).items():
            listed = (names,) if isinstance(names, str) else names
            pairs.append((_text(field), tuple(map(_text, listed))))
    except (TypeError, ValueError):
        raise ValueError("names of a table by field, such as {prompt: question}, or null") from None
    return tuple(pairs) or None


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def _device(value: Any) -> str:
    text = f"cuda:{value}" if type(value) is int or str(value).isdecimal() else value
    if not isinstance(text, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text):
        raise ValueError("auto, cpu, mps, cuda, cuda:N, or N for cuda:N")
    return text


def _names(value: Any) -> str | tuple[str, ...]:
    if value == "auto":
        return value
    listed = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    if not listed or not value or len(set(value)) < len(value):
        raise ValueError("auto or a list of unique names")
    return tuple(map(_text, value))


def _counts(value: Any) -> int | tuple[int, ...] | None:
    counts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    whole = all(type(count) is int and 1 <= count < 2**63 for count in counts)
    if value is not None and not (whole and len(counts) in (1, 3)):
        raise ValueError("an integer >= 1, or three, or null")
    return counts if isinstance(value, (list, tuple)) else value


def to_bytes(value: Any) -> int:
    """Bytes from a whole number, or from text such as '1.5GB'. Raises ValueError for others."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) *(?:([kKMGT])(i?))?B?", value)
        if match:
            digits, prefix, binary = match.groups()
            power = " KMGT".index((prefix or " ").upper())
            return round(float(digits) * (1024 if binary else 1000) ** power)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError("bytes, or text such as '1.5GB', >= 0")
    return value


Text = Annotated[str, BeforeValidator(_text)]
# text such as '1e-6' is what PyYAML makes of EasyEdit's numbers
Number = Annotated[float, BeforeValidator(_no_bool), Field(strict=False, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
CountFrom0 = Annotated[int, Field(ge=0, lt=2**63)]
CountFrom1 = Annotated[int, Field(ge=1, lt=2**63)]
Sign = Annotated[Literal[-1, 1], BeforeValidator(_no_bool)]
Device = Annotated[str, PlainValidator(_device)]
Names = Annotated[tuple[str, ...] | str, PlainValidator(_names)]
# for every role, or one each for paraphrases, neighbours and unrelated prompts
Counts = Annotated[tuple[int, ...] | int | None, PlainValidator(_counts)]
Bytes = Annotated[int, PlainValidator(to_bytes)]
Switch = bool | Literal["auto"]
FilePath = Annotated[str, BeforeValidator(_path)]  # `~` is the home folder
OtherTokenizer = Annotated[
    FilePath | None, BeforeValidator(lambda name: None if name == "." else name)
]
# papermill and Python write null as None
ArchivePath = Annotated[
    Annotated[FilePath, AfterValidator(_archive)] | None,
    BeforeValidator(lambda path: None if path in ("", "None") else path),
]
Columns = Annotated[tuple[tuple[str, tuple[str, ...]], ...] | None, PlainValidator(_columns)]
StopKey = Annotated[
    Literal["score", "loss", "edit_success"],
    BeforeValidator(lambda key: EARLY_STOP_KEYS.get(key, key) if isinstance(key, str) else key),
]


class MENDHyperParams(BaseModel, frozen=True, extra="forbid", strict=True):
    """All settings of a model editor: model and sites, hypernetwork, training, data and caches.

    Values are stored in normal form: `device: 0` is "cuda:0". Raises HyperParamError.
    `model_fields_set` are the keys that a caller gave, not those of a file.
    """

    # identity
    archive: ArchivePath = None
    alg_name: Literal["MEND"] = "MEND"
    method: Literal[*METHODS] | None = None  # what it sets stands in the other keys
    model_name: FilePath
    tokenizer_name: OtherTokenizer = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False
    inner_params: Names = "auto"
    # hypernetwork
    rank: CountFrom1 | None = 256
    n_hidden: CountFrom0 = 1
    hidden_dim: None = None
    init: Literal["id_xavier", "id", "xavier"] = "id_xavier"
    norm: bool = True
    combine: bool = True
    one_sided: bool = False
    x_only: bool = False
    delta_only: bool = False
    act: Literal["relu"] = "relu"
    mlp_class: Literal["IDMLP"] = "IDMLP"
    shared: bool = True
    norm_stats: Literal["layer", "shape"] = "layer"
    update_sign: Sign = -1
    std_floor: NonNegative = 0.1
    std_eps: NonNegative = 0.0
    z_clip: Positive | None = 10.0
    edit_on: Literal["answer", "text"] = "answer"
    edit_tokens: Literal["all", "scored"] = "all"
    loss_reduction: Literal["edit", "sum", "batch"] = "edit"
    whiten: Positive | None = None
    whiten_pairs: bool = False
    whiten_values: Positive | None = None
    unit_response: bool = False
    aggregate: Literal["sum", "least_squares", "normal_equation"] = "sum"
    value_coefficient: Literal["update", "key", "norm"] = "update"
    ridge: Positive = 0.003
    ridge_shared: Positive = 0.04
    stats_examples: CountFrom0 = 500
    stats_held_out: bool = False
    site_share: Annotated[Positive, Field(le=1)] = 1.0
    max_relative_norm: Positive | None = None
    lifelong_norm: bool = False
    # training
    lr: NonNegative = 1e-4
    edit_lr: Positive | Literal["auto"] = 1e-4
    lr_lr: NonNegative = 1e-2
    lr_scale: NonNegative = 1.0
    cedit: NonNegative = 1.0
    cpara: NonNegative | None = None
    cloc: NonNegative = 1.0
    cneigh: NonNegative | None = None
    cconsequence: NonNegative = 0.0
    cnegation: NonNegative = 0.0
    cmargin: NonNegative = 0.0
    cnorm: NonNegative = 0.0
    margin: NonNegative = 1.0
    train_on: Literal["single", "batch", "sequence", "episode"] = "single"
    most_edits: CountFrom1 = 16
    back_depth: CountFrom1 = 10
    time_decay: Share = 0.95
    batch_size: CountFrom1 = 16
    accumulate_bs: CountFrom1 = 1
    texts_per_role: Counts = None
    borrow: Share = 0.0
    swap: Share = 0.0
    hard_negatives: Share = 0.0
    paraphrases_per_edit: CountFrom0 = 1
    neighbours_per_edit: CountFrom0 = 1
    unrelated_per_edit: CountFrom0 = 1
    max_iters: CountFrom0 = 1000
    max_epochs: CountFrom1 | None = None
    max_seconds: Positive | None = None
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_iters: CountFrom0 = 20
    val_interval: CountFrom1 = 100
    val_steps: CountFrom1 = 100
    val_batch_size: CountFrom1 = 32
    checkpoint_interval: CountFrom1 | None = None
    early_stop_patience: CountFrom1 = 20000
    early_stop_key: StopKey = "score"
    grad_clip: Positive = 1.0
    ema_decay: Annotated[NonNegative, Field(lt=1)] = 0.0
    opt: Literal["Adam", "AdamW"] = "Adam"
    seed: Annotated[CountFrom0, Field(le=2**32 - 1)] = 42
    log_interval: CountFrom1 = 10
    logger: Literal["tensorboard", "wandb"] | None = None
    # data and caches
    columns: Columns = None
    target_prefix: str | None = None  # null: by the script
    add_eos: bool = True
    max_target_tokens: CountFrom1 = 32
    max_length: Annotated[int, Field(ge=2)] = 512
    cache_dir: FilePath | None = None
    disk_cache_bytes: Bytes = 20_000_000_000
    cache_bytes: Bytes = 1_500_000_000
    release_trunk: Switch = "auto"
    stream_trunk: Switch = "auto"
    results_dir: FilePath = "runs"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**_preset(values) | values)
        except ValidationError as error:
            raise _refusal(error, values) from None
        self.model_fields_set.intersection_update(values)
        _check_together(self)

    @classmethod
    def from_hparams(cls, path: str | os.PathLike[str], **overrides: Any) -> "MENDHyperParams":
        """Read a YAML file; `overrides` win over it.

        Raises HyperParamError naming file, line, key and value.
        """
        values, lines = read_yaml(Path(path))
        places = {ALIASES.get(key, key): f"{path}:{line}: " for key, line in lines.items()}
        places |= {ALIASES.get(key, key): "override: " for key in overrides}
        try:
            asked = _last_word(_resolve(overrides))
            made = cls(**_resolve(values) | asked)
        except HyperParamError as error:
            place = places.get(error.key or "", f"{path}: ")
            raise HyperParamError(f"{place}{error}", error.key) from None
        made.model_fields_set.intersection_update(asked)
        return made

    def replace(self, **changes: Any) -> "MENDHyperParams":
        """A copy with some keys changed, validated as a file is. Raises HyperParamError.

        A new `method` sets its keys anew.
        """
        changes = _last_word(_resolve(changes))
        made = type(self)(**self.to_dict() | _preset(changes) | changes)
        made.model_fields_set.intersection_update(self.model_fields_set | changes.keys())
        return made

    @property
    def trained_at_once(self) -> int:
        """The most edits that one weight change of training makes."""
        return {"batch": self.most_edits, "episode": self.batch_size}.get(self.train_on, 1)

    def to_dict(self) -> dict[str, Any]:
        """Every key and value in plain types, for JSON; `MENDHyperParams(**d)` equals this one."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in self}
        if self.columns is not None:
            values["columns"] = {field: list(names) for field, names in self.columns}
        return values


# words of pydantic's messages, and what a user of YAML calls that
_PLAIN_WORDS = {
    "Value error, ": "",
    "Input should be ": "",
    ", unable to parse string as a number": "",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "greater than or equal to": ">=",
    "greater than": ">",
    "less than or equal to": "<=",
    "None": "null",
}


def _refusal(error: ValidationError, values: Mapping[str, Any]) -> HyperParamError:
    """The first fault that pydantic found, in words; of a union every kind that was expected."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    key = str(faults[0]["loc"][0])
    if key not in values:
        return HyperParamError(f"{key} is missing; add `{key}: …`", key)
    if faults[0]["type"] == "extra_forbidden":
        return _unknown_key(key, values[key])
    wanted = " or ".join(fault["msg"] for fault in faults if fault["loc"][0] == key)
    for technical, plain in _PLAIN_WORDS.items():
        wanted = wanted.replace(technical, plain)
    return HyperParamError(f"{key} must be {wanted}, got {shown(values[key])}", key)


def _check_together(h: MENDHyperParams) -> None:
    """Refuse settings that exclude each other, or that need another one."""
    one_way = [key for key in ("one_sided", "x_only", "delta_only") if getattr(h, key)]
    if len(one_way) > 1 or (one_way and h.combine):
        told = "at most one of one_sided, x_only, delta_only may be, with `combine: false`"
        raise HyperParamError(f"{' and '.join(one_way)}: true, but {told}", one_way[-1])
    solved, fitted = h.aggregate == "least_squares", h.whiten is not None
    at_once = "another `aggregate`: least squares make a row of edits as if at once"
    for key, is_wrong, needed in (
        ("whiten_pairs", h.whiten_pairs and not fitted, "`whiten`, such as 0.02"),
        ("whiten_pairs", h.whiten_pairs and h.edit_tokens != "scored", "`edit_tokens: scored`"),
        ("unit_response", h.unit_response and not fitted, "`whiten`, such as 0.02"),
        (
            "stats_examples",
            h.stats_examples == 0 and (fitted or solved or not h.lifelong_norm),
            "`lifelong_norm: true`, no `whiten` and no `aggregate: least_squares`",
        ),
        (
            "value_coefficient",
            h.value_coefficient != "update" and h.aggregate == "sum",
            "`aggregate: normal_equation` or `least_squares`",
        ),
        ("site_share", solved and h.site_share < 1, at_once),
        ("train_on", solved and h.train_on == "episode", at_once),
        (
            "edit_on",
            h.edit_on == "text" and h.train_on == "sequence",
            "another `train_on` than sequence",
        ),
    ):
        if is_wrong:
            raise HyperParamError(f"{key}: {shown(getattr(h, key))} needs {needed}", key)


def _preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the method of some settings sets; an unknown one sets nothing, and is refused later."""
    return METHODS.get(str(given.get("method")), {})


def _resolve(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as fields of MENDHyperParams: aliases by their name, keys without effect left out."""
    values, without_effect = {}, []
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name in MENDHyperParams.model_fields:
            values[name] = value
        elif name in ONLY_VALUES:
            only = ONLY_VALUES[name]
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                told = f"other values would change the result, see {PAGE}"
                raise HyperParamError(
                    f"{key} must be {shown(only)} ({told}), got {shown(value)}", key
                )
        elif name not in NO_EFFECT:
            raise _unknown_key(key, value)
        elif value not in (None, False):
            without_effect.append(key)
    if without_effect:
        logger.warning("without effect: %s; see %s", ", ".join(without_effect), PAGE)
    return values


def _unknown_key(key: str, value: Any) -> HyperParamError:
    ours = [name for name, others in SYNONYMS.items() if key.lower() in others.split()]
    known = sorted({*MENDHyperParams.model_fields, *NO_EFFECT, *ALIASES})
    close = ours or difflib.get_close_matches(key.lower(), known, 1, 0.5)
    nearest = f"the nearest key is {close[0]!r}" if close else "no key resembles it"
    return HyperParamError(
        f"unknown key {key!r} (value {shown(value)}); {nearest}; see {PAGE}", key
    )


def _last_word(changes: dict[str, Any]) -> dict[str, Any]:
    """A new `max_iters` alone must not be outvoted by an older `max_epochs`."""
    return {"max_epochs": None} | changes if "max_iters" in changes else changes


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Values for `from_hparams(path, **values)`, which checks them, from texts "key=value".

    A value is YAML (`null`, `false`, `1e-4`, `[a.weight, b.weight]`), but names and paths keep
    their characters. Raises HyperParamError for a repeated key, no "=", and faulty YAML.
    """
    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or key in given:
            raise HyperParamError(
                f"override {text!r}: expected key=value, such as lr=1e-4, each once"
            )
        value = "null" if value == "None" else value  # as papermill and Python write it
        plain = key in PLAIN_TEXTS and value not in ("", "~", "null") and value[0] not in "'\""
        try:
            given[key] = value if plain else read_value(value)
        except ValueError as error:
            raise HyperParamError(f"override {text!r}: the value is {error}") from None
    return given
