"""The files in configs/ against the real architectures, without weights (meta device)."""

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mendkit.cost.plan import published
from mendkit.hparams import MENDHyperParams
from mendkit.mend.hypernetwork import MEND
from mendkit.models.sites import resolve_sites

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# file -> (d_in, d_out) of one block's sites in module order, blocks edited per stack, stacks
_GATED = [(4096, 14336), (4096, 14336), (14336, 4096)]
ARCHITECTURES = {
    "gpt2": ([(768, 3072), (3072, 768)], (9, 10, 11), 1),
    "gpt2-xl": ([(1600, 6400), (6400, 1600)], (45, 46, 47), 1),
    "gpt-j-6b": ([(4096, 16384), (16384, 4096)], (25, 26, 27), 1),
    "llama-7b": ([(4096, 11008), (4096, 11008), (11008, 4096)], (29, 30, 31), 1),
    "llama-3-8b": (_GATED, (29, 30, 31), 1),
    "mistral-7b": (_GATED, (29, 30, 31), 1),
    "qwen2.5-7b": ([(3584, 18944), (3584, 18944), (18944, 3584)], (25, 26, 27), 1),
    "llama-3.2-1b": ([(2048, 8192), (2048, 8192), (8192, 2048)], (13, 14, 15), 1),
    "qwen3-0.6b": ([(1024, 3072), (1024, 3072), (3072, 1024)], (25, 26, 27), 1),
    "qwen2.5-0.5b": ([(896, 4864), (896, 4864), (4864, 896)], (21, 22, 23), 1),
    "smollm2-360m": ([(960, 2560), (960, 2560), (2560, 960)], (29, 30, 31), 1),
    "gemma-3-270m": ([(640, 2048), (640, 2048), (2048, 640)], (15, 16, 17), 1),
    "gemma-3-1b": ([(1152, 6912), (1152, 6912), (6912, 1152)], (23, 24, 25), 1),
    "smollm2-135m": ([(576, 1536), (576, 1536), (1536, 576)], (27, 28, 29), 1),
    "t5-3b": ([(1024, 16384), (16384, 1024)], (22, 23), 2),
    "bart-base": ([(768, 3072), (3072, 768)], (4, 5), 2),
    "bert-base": ([(768, 3072), (3072, 768)], (9, 10, 11), 1),
}


def build(name: str) -> PreTrainedModel:
    return published(read(name).model_name)


def read(name: str) -> MENDHyperParams:
    return MENDHyperParams.from_hparams(CONFIGS / f"{name}.yaml")


def close(stated: str, exact: float) -> bool:
    """Whether a number as written in a comment is the exact one, rounded to its digits."""
    value, unit = stated.split()
    digits = len(value.partition(".")[2])
    return round(exact / {"B": 1e9, "M": 1e6, "GB": 1e9}[unit], digits) == float(value)


def test_every_file_is_checked_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sites_are_the_mlps_of_the_real_architecture(name):
    model, hparams = build(name), read(name)
    assert all(value.is_meta for value in model.parameters())
    sites = resolve_sites(model, hparams.inner_params)
    shapes, blocks, stacks = ARCHITECTURES[name]
    assert [(site.d_in, site.d_out) for site in sites] == shapes * (len(blocks) * stacks)
    assert [site.block for site in sites] == [block for block in blocks for _ in shapes] * stacks
    assert sites == resolve_sites(model, "auto")
    assert all(hparams.rank < site.d_in + site.d_out for site in sites)
    assert hparams.archive is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_numbers_in_the_comments_are_true(name):
    model, hparams = build(name), read(name)
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    if name not in ("gpt2", "smollm2-135m"):  # the large files state their sites and sizes
        assert re.search(r" [BM] parameters\. Every key", text) and "# Hypernetwork: " in text
        assert re.search(r"[\d.]+ GB of weights in", text)
        assert isinstance(hparams.inner_params, tuple)
    count = sum(value.numel() for value in model.parameters())
    bytes_of = {"float32": 4, "bfloat16": 2}
    for stated in re.findall(r", ([\d.]+ [BM]) parameters\. Every", text):
        assert close(stated, count)
    for stated, dtype in re.findall(r"([\d.]+ GB) (?:of weights )?in (\w+)", text):
        assert close(stated, count * bytes_of[dtype])
    for stated in re.findall(r"# Hypernetwork: ([\d.]+ M) parameters", text):
        with torch.device("meta"):
            mend = MEND(resolve_sites(model, hparams.inner_params), hparams)
        assert close(stated, sum(value.numel() for value in mend.parameters()))
