"""Reading checkpoints: a folder, a GGUF file or a hub id becomes model and tokenizer, or one clear error.

`skeleton` makes the model without its weights, from the configuration alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from ..errors import ModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

TRUST = "such code may do whatever you may do on this machine, with your files and in your name"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Within the context transformers shows neither progress bars nor advisory warnings; errors still show.

    The hub's download bars are left alone: a long download should be seen.
    """

    def without_bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{**kwargs, "disable": True})

    level, gguf_bar = transformers_logging.get_verbosity(), modeling_gguf_pytorch_utils.tqdm
    hook = transformers_logging.set_tqdm_hook(without_bar)
    transformers_logging.set_verbosity_error()
    modeling_gguf_pytorch_utils.tqdm = functools.partial(
        gguf_bar, disable=True
    )  # it ignores the hook
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.set_tqdm_hook(hook)
        modeling_gguf_pytorch_utils.tqdm = gguf_bar


def choose_device(device: str) -> torch.device:
    """The torch device of a name ("auto": the first GPU or the CPU). Raises ModelError if it is missing."""
    if device == "auto":
        own = os.environ.get("LOCAL_RANK", "0")  # of several processes each has a GPU of its own
        return torch.device(f"cuda:{own}" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"device {device!r} cannot be used here ({reason}); use auto, cpu, or cuda:N of a GPU"
        ) from error
    return chosen


def locate(source: str | Path) -> str | Path:
    """Where a model is: a folder or GGUF file as a Path, a hub id as str. Raises ModelError otherwise."""
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = ", ".join(sorted(item.name for item in path.glob("*.gguf"))[:3])
            remedy = (
                f"it holds {held}: give that file"
                if held
                else "give a folder that save_pretrained wrote"
            )
            raise ModelError(f"the folder {path} has no config.json; {remedy}")
        return path
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{path} is a file but not GGUF; give a GGUF file or a model folder"
                )
        return path
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) and not text.endswith(".gguf")
    if isinstance(source, Path) or not hub_id:
        raise ModelError(
            f"no such file or folder: {text!r} (in {Path.cwd()}); give a model folder, a GGUF file, a hub id "
            "such as owner/name, or the bundled smollm2-135m"
        )
    return text


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """De-quantise a GGUF file into an ordinary model in `dtype`, with its tokenizer; takes 15–30 s.

    Raises whatever transformers raises for a damaged or unknown file; callers say what was asked for.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # The weights are plain floats now; with these marks of the quantised file the model could not be saved.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def read_checkpoint(
    place: str | Path, *, dtype: str, trust_remote_code: bool, tokenizer: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or GGUF file (Path) or of a hub id (str).

    `dtype` "auto" is the checkpoint's own (GGUF: float32); `tokenizer` is another folder or hub id. Raises
    ModelError if anything cannot be read, if the config names no model that can be edited, or if weights are missing.
    """
    remote = {"trust_remote_code": trust_remote_code}
    is_file = isinstance(place, Path) and place.is_file()
    loader = checked_loader(read_config(place, trust_remote_code=trust_remote_code), place)
    own = None
    if tokenizer is not None or not is_file:
        own = read_tokenizer(place, tokenizer, trust_remote_code=trust_remote_code)
    with explained("the model", place):
        if is_file:
            model, found = load_gguf(place, DTYPES.get(dtype, torch.float32))
            return model, own or found
        model, report = loader.from_pretrained(
            place, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, **remote
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the checkpoint {place} lacks {len(missing)} weights ({', '.join(missing[:3])}), which would be "
            f"random; give a complete checkpoint for {loader.__name__}"
        )
    return model, own


def read_tokenizer(
    place: str | Path, tokenizer: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, or that of another one (`tokenizer`); raises ModelError."""
    where = (
        place if tokenizer is None else Path(tokenizer) if Path(tokenizer).is_dir() else tokenizer
    )
    with explained("the tokenizer of", where):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)


def read_config(place: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder or GGUF file (Path) or of a hub id (str); raises ModelError."""
    is_file = isinstance(place, Path) and place.is_file()
    folder, file = (place.parent, {"gguf_file": place.name}) if is_file else (place, {})
    with explained("the configuration of", place):
        config = AutoConfig.from_pretrained(folder, **file, trust_remote_code=trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None):
        logger.warning("%s: trust_remote_code: Python code from there is run; %s", place, TRUST)
    return config


def skeleton(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder, GGUF file or hub id without weights: every parameter is on the meta device.

    Needs the configuration only. A model that can be edited is built as it is loaded, another as the class that its
    configuration names. Raises ModelError as reading a checkpoint does, and for a configuration that builds nothing.
    """
    place = locate(source)
    config = read_config(place, trust_remote_code=trust_remote_code)
    declared = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = next((kind for kind in declared if kind is not None), None)
    with explained("a model from the configuration of", place), torch.device("meta"):
        loader = _loader(config) or (AutoModelForCausalLM if known is None else None)
        return (
            known(config)
            if loader is None
            else loader.from_config(config, trust_remote_code=trust_remote_code)
        )


@contextlib.contextmanager
def explained(what: str, place: str | Path) -> Iterator[None]:
    """Turns whatever a reader raises for a missing, damaged or unknown file into one ModelError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = f"check or replace the files in {place}; a cached model may be deleted to fetch it again"
        if not isinstance(place, Path):
            remedy = (
                f"{Path.cwd()} has no such folder, so it was looked for on the hub: without a network give a "
                "local folder, or the bundled smollm2-135m"
            )
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which was not run"
            remedy = (
                f"{TRUST}: read it first, then set `trust_remote_code: true`, or give another model"
            )
        raise ModelError(f"cannot load {what} {str(place)!r}: {reason}; {remedy}") from error


_LOADERS = {
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def _loader(config: PreTrainedConfig) -> Any | None:
    """The class that loads a model of this configuration; None if it names none that can be edited.

    What `architectures` declares decides. Without a head there, an encoder-decoder writes text (BART's and T5's own
    checkpoints declare names such as BartModel); what declares nothing, or code of its own, goes by its kind.
    """
    declared, own_code = tuple(config.architectures or ()), getattr(config, "auto_map", None) or {}
    for loader, known in _LOADERS.items():
        heads = {
            entry
            for value in known.values()
            for entry in ((value,) if isinstance(value, str) else value)
        }
        heads.add(str(own_code.get(loader.__name__)).rpartition(".")[2])
        if any(name in heads for name in declared):
            return loader
    for loader in reversed(_LOADERS):
        if loader.__name__ in own_code:
            return loader
    encodes = getattr(config, "is_encoder_decoder", False)
    if encodes and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    causal = not declared and not encodes and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else None


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration is loaded as a causal language model."""
    return _loader(config) is AutoModelForCausalLM


def checked_loader(config: PreTrainedConfig, place: str | Path) -> Any:
    """The class that loads a model of this configuration; raises ModelError if it cannot be edited."""
    loader = _loader(config)
    if loader is None:
        what = ", ".join(config.architectures or ()) or f"model_type {config.model_type}"
        raise ModelError(
            f"{place} is no model that can be edited: its config says {what}; give a causal language model "
            "(LlamaForCausalLM), a sequence-to-sequence model (T5ForConditionalGeneration), a classifier with a "
            "trained head (BertForSequenceClassification), or the bundled smollm2-135m"
        )
    return loader


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, name: str, *, needs_end: bool = True
) -> PreTrainedTokenizerBase:
    """The same tokenizer, padding with its end-of-text token if it has no padding token of its own.

    Raises ModelError unless it is fast (targets are found by its offsets) and its end-of-text token (or, if it needs
    none, its padding token) is one of the model's `vocabulary` tokens.
    """
    if not getattr(tokenizer, "is_fast", False) or not tokenizer("a")["input_ids"]:
        raise ModelError(
            f"{name}: {type(tokenizer).__name__} is not a fast tokenizer with a vocabulary, whose offsets "
            "tell where a target is; give a folder with a tokenizer.json, or set `tokenizer_name`"
        )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pads = pad is not None and pad < vocabulary
    if (needs_end or not pads) and (end is None or end >= vocabulary):
        raise ModelError(
            f"{name}: the tokenizer's end-of-text token is {tokenizer.eos_token!r} (id {end}), the model has "
            f"{vocabulary} tokens; set `eos_token` in tokenizer_config.json, or another `tokenizer_name`"
        )
    if not pads:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
