"""Models that many tests share. They are built once: a test that writes to one builds its own."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

import tests.oracles.typechecker  # noqa: F401

# Before the first import of the package. Hyperparameters have their own check at all times; the
# command line and the reading of data, which would become six times slower, have no tensors.
PACKAGE = Path(__file__).parents[1] / "mendkit"
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "hparams") and path.parent.name not in ("cli", "data")
]
install_import_hook(MODULES, "tests.oracles.typechecker.check")

from mendkit.models.base import BaseModel  # noqa: E402
from mendkit.models.load import load_model  # noqa: E402
from tests.oracles.tiny import tiny_gpt2, tiny_llama  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """No test reads what another test or the user has computed, unless it starts processes."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("mendkit.models.cache.default_folder", lambda: folder)
    return folder


@pytest.fixture(scope="session")
def llama() -> BaseModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def gpt2() -> BaseModel:
    return tiny_gpt2()


@pytest.fixture(scope="session")
def llama64() -> BaseModel:
    return tiny_llama(dtype=torch.float64)


@pytest.fixture(scope="session")
def gpt264() -> BaseModel:
    return tiny_gpt2(dtype=torch.float64)


@pytest.fixture(params=["llama", "gpt2"])
def base32(request) -> BaseModel:
    """Linear layers of both orientations, in float32."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["llama64", "gpt264"])
def base64(request) -> BaseModel:
    """The same in float64."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def llama_bf16() -> BaseModel:
    return tiny_llama(dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def smollm2() -> BaseModel:
    """The bundled SmolLM2-135M-Instruct, fetched into the cache if it is not there."""
    return load_model("smollm2-135m")
