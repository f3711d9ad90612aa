"""Reading checkpoints: a folder, a GGUF file or a hub id becomes model and tokenizer, or one clear error.

`skeleton` makes the model without its weights, from the configuration alone.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from .errors import ModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


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
    modeling_gguf_pytorch_utils.tqdm = functools.partial(gguf_bar, disable=True)  # it ignores the hook
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.set_tqdm_hook(hook)
        modeling_gguf_pytorch_utils.tqdm = gguf_bar


def choose_device(device: str) -> torch.device:
    """The torch device of a name ("auto": the first GPU or the CPU). Raises ModelError if it is missing."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
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
            remedy = f"it holds {held}: give that file" if held else "give a folder that save_pretrained wrote"
            raise ModelError(f"the folder {path} has no config.json; {remedy}")
        return path
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is a file but not GGUF; give a GGUF file or a model folder")
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
    ModelError if anything cannot be read, if it is no causal language model, or if weights are missing.
    """
    remote = {"trust_remote_code": trust_remote_code}
    is_file = isinstance(place, Path) and place.is_file()
    check_causal(read_config(place, trust_remote_code=trust_remote_code), place)
    own = None
    if tokenizer is not None or not is_file:
        own = read_tokenizer(place, tokenizer, trust_remote_code=trust_remote_code)
    with explained("the model", place):
        if is_file:
            model, found = load_gguf(place, DTYPES.get(dtype, torch.float32))
            return model, own or found
        model, report = AutoModelForCausalLM.from_pretrained(
            place, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, **remote
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the checkpoint {place} lacks {len(missing)} weights ({', '.join(missing[:3])}), which would be "
            "random; give a complete checkpoint of a causal language model"
        )
    return model, own


def read_tokenizer(
    place: str | Path, tokenizer: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, or that of another one (`tokenizer`); raises ModelError."""
    where = place if tokenizer is None else Path(tokenizer) if Path(tokenizer).is_dir() else tokenizer
    with explained("the tokenizer of", where):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)


def read_config(place: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder or GGUF file (Path) or of a hub id (str); raises ModelError."""
    is_file = isinstance(place, Path) and place.is_file()
    folder, file = (place.parent, {"gguf_file": place.name}) if is_file else (place, {})
    with explained("the configuration of", place):
        return AutoConfig.from_pretrained(folder, **file, trust_remote_code=trust_remote_code)


def skeleton(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder, GGUF file or hub id without weights: every parameter is on the meta device.

    Needs the configuration only. A causal language model is built as it is loaded, another as the class that its
    configuration names. Raises ModelError as reading a checkpoint does, and for a configuration that builds nothing.
    """
    place = locate(source)
    config = read_config(place, trust_remote_code=trust_remote_code)
    declared = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = next((kind for kind in declared if kind is not None), None)
    with explained("a model from the configuration of", place), torch.device("meta"):
        if _is_causal(config) or known is None:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return known(config)


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
        raise ModelError(f"cannot load {what} {str(place)!r}: {reason}; {remedy}") from error


def _is_causal(config: PreTrainedConfig) -> bool:
    declared, known = tuple(config.architectures or ()), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal = {entry for value in known.values() for entry in ((value,) if isinstance(value, str) else value)}
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    fits = any(entry in causal for entry in declared) if declared else config.model_type in known
    return not getattr(config, "is_encoder_decoder", False) and (fits or own_code)


def check_causal(config: PreTrainedConfig, place: str | Path) -> None:
    if not _is_causal(config):
        what = ", ".join(config.architectures or ()) or f"model_type {config.model_type}"
        raise ModelError(
            f"{place} is no causal language model: its config says {what}; this version edits causal models "
            "such as LlamaForCausalLM or GPT2LMHeadModel: give one, or the bundled smollm2-135m"
        )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int, name: str) -> PreTrainedTokenizerBase:
    """The same tokenizer, padding with its end-of-text token if it has no padding token of its own.

    Raises ModelError unless it is fast (targets are found by its offsets) and its end-of-text token is one of
    the model's `vocabulary` tokens.
    """
    if not getattr(tokenizer, "is_fast", False) or not tokenizer("a")["input_ids"]:
        raise ModelError(
            f"{name}: {type(tokenizer).__name__} is not a fast tokenizer with a vocabulary, whose offsets "
            "tell where a target is; give a folder with a tokenizer.json, or set `tokenizer_name`"
        )
    end = tokenizer.eos_token_id
    if end is None or end >= vocabulary:
        raise ModelError(
            f"{name}: the tokenizer's end-of-text token is {tokenizer.eos_token!r} (id {end}), the model has "
            f"{vocabulary} tokens; set `eos_token` in tokenizer_config.json, or another `tokenizer_name`"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
