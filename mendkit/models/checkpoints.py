"""Reading a checkpoint's configuration, tokenizer and weights, or one clear error.

A *place* is a model folder or a GGUF file (Path), or a hub id (str).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from ..errors import ModelError

BUNDLED = "smollm2-135m"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TRUST = "such code may do whatever you may do on this machine, with your files and in your name"

_LOADERS = {
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}

logger = logging.getLogger(__name__)


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Within the context transformers shows neither progress bars nor advice; errors still show."""

    def without_bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{**kwargs, "disable": True})

    level = transformers_logging.get_verbosity()
    hook = transformers_logging.set_tqdm_hook(without_bar)
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.set_tqdm_hook(hook)


@contextmanager
def explained(what: str, place: str | Path) -> Iterator[None]:
    """Turns what a reader raises for a missing, damaged or unknown file into one ModelError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = f"check or replace the files in {place}"
        if not isinstance(place, Path):
            remedy = (
                f"{Path.cwd()} has no such folder, so it was looked for on the hub: without a "
                f"network give a local folder, or the bundled {BUNDLED}"
            )
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which was not run"
            remedy = (
                f"{TRUST}: read it first, then set `trust_remote_code: true`, or give another model"
            )
        raise ModelError(f"cannot load {what} {str(place)!r}: {reason}; {remedy}") from error


def choose_device(device: str) -> torch.device:
    """The device of a name; "auto" is the first GPU or the CPU. Raises ModelError."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")  # one for each process
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"device {device!r} cannot be used here ({reason}); use auto, cpu, or cuda:N of a GPU"
        ) from error
    return chosen


def is_gguf(place: str | Path) -> TypeGuard[Path]:
    return isinstance(place, Path) and place.is_file()


def _source(place: str | Path) -> dict[str, Any]:
    """A place as transformers' readers take it."""
    if is_gguf(place):
        return {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    return {"pretrained_model_name_or_path": place}


def read_config(place: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a place. Raises ModelError."""
    with explained("the configuration of", place):
        config = AutoConfig.from_pretrained(**_source(place), trust_remote_code=trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None):
        logger.warning("%s: trust_remote_code: Python code from there is run; %s", place, TRUST)
    return config


def loader_of(config: PreTrainedConfig, place: str | Path) -> Any:
    """The transformers class that loads a model of this configuration.

    Raises ModelError for one that is no causal language model, sequence-to-sequence model or
    classifier.
    """
    declared = tuple(config.architectures or ())
    custom = getattr(config, "auto_map", None) or {}
    encodes = getattr(config, "is_encoder_decoder", False)

    # 1. The head that the configuration declares, in transformers or in the folder's code.
    for loader, known in _LOADERS.items():
        heads = {str(custom.get(loader.__name__)).rpartition(".")[2]}
        for value in known.values():
            heads.update((value,) if isinstance(value, str) else value)
        if heads.intersection(declared):
            return loader
    # 2. What the folder's code offers.
    for loader in reversed(_LOADERS):
        if loader.__name__ in custom:
            return loader
    # 3. Without a head an encoder-decoder writes text (BART's checkpoint declares BartModel), and
    #    what declares nothing goes by its kind.
    if encodes and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    if not (declared or encodes) and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    what = ", ".join(declared) or f"model_type {config.model_type}"
    raise ModelError(
        f"{place} is no model that can be edited: its config says {what}; give a causal language "
        "model (LlamaForCausalLM), a sequence-to-sequence model (T5ForConditionalGeneration), a "
        f"classifier with a trained head (BertForSequenceClassification), or {BUNDLED}"
    )


def read_tokenizer(
    place: str | Path, other: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a place, or of another folder or hub id. Raises ModelError."""
    if other is not None:
        place = Path(other) if Path(other).is_dir() else other
    with explained("the tokenizer of", place):
        return AutoTokenizer.from_pretrained(**_source(place), trust_remote_code=trust_remote_code)


def read_model(
    place: str | Path, loader: Any, *, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a place. `dtype` "auto" is the checkpoint's (GGUF: float32).

    Raises ModelError if it cannot be read, or if weights are missing.
    """
    default = torch.float32 if is_gguf(place) else "auto"
    with explained("the model", place):
        model, report = loader.from_pretrained(
            **_source(place),
            dtype=DTYPES.get(dtype, default),
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    if is_gguf(place):
        # The weights are plain floats now; marked as quantised, the model could not be saved.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    elif missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the checkpoint {place} lacks {len(missing)} weights ({', '.join(missing[:3])}), "
            f"which would be random; give a complete checkpoint for {loader.__name__}"
        )
    return model
