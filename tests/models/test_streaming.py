"""Models whose lower blocks are read from their files one at a time: the same bits, in the memory of one block."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mendkit.errors import ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.models import load as models
from mendkit.models.fingerprint import model_fingerprint, weights_sha256
from mendkit.models.load import load_for_training, load_model, load_streamed
from mendkit.models.streaming import Weights
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import every_text
from tests.oracles.families import CAUSAL
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer


def folder_of(path: Path, model, **how) -> MENDHyperParams:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path, **how)
    tiny_tokenizer().save_pretrained(path)
    return MENDHyperParams(model_name=str(path))


def assert_same_bits(streamed, whole):
    assert streamed.released == streamed.blocks.first > 0 and streamed.blocks == whole.blocks
    texts = every_text(whole)
    a, b, batch = FrozenTrunk(streamed), FrozenTrunk(whole), collate(texts, whole.pad_id)
    assert a.fill(texts) == b.fill(texts) > 0
    with torch.no_grad():
        assert torch.equal(a.suffix(texts, batch), b.suffix(texts, batch))
        assert torch.equal(a.before(texts, batch), b.before(texts, batch))
    assert torch.equal(
        a.states(texts, batch.input_ids.shape[1]), b.states(texts, batch.input_ids.shape[1])
    )
    assert model_fingerprint(streamed) == model_fingerprint(whole)
    assert weights_sha256(streamed) == weights_sha256(whole)
    assert streamed.released == whole.blocks.first  # nothing stayed


@pytest.mark.parametrize("family", CAUSAL)
def test_a_streamed_model_gives_the_whole_ones_bits(family, tmp_path):
    hparams = folder_of(tmp_path, CAUSAL[family].build(num_hidden_layers=4), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_same_bits(load_streamed(hparams), load_model(hparams))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_streamed_model_is_converted_as_the_whole_one(dtype, tmp_path):
    hparams = folder_of(tmp_path, tiny_gpt2().model).replace(dtype=dtype)
    assert load_streamed(hparams).dtype == getattr(torch, dtype)
    assert_same_bits(load_streamed(hparams), load_model(hparams))
    half = folder_of(
        tmp_path / "half", tiny_llama(dtype=getattr(torch, dtype)).model
    )  # auto: the checkpoint's own
    assert load_streamed(half).dtype == getattr(torch, dtype)
    assert_same_bits(load_streamed(half), load_model(half))


def test_names_may_lack_the_base_models_prefix(tmp_path):
    hparams = folder_of(tmp_path, tiny_gpt2().model)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()},
        tmp_path / "model.safetensors",
    )
    assert_same_bits(load_streamed(hparams), load_model(hparams))


def test_weights_stored_once_serve_embeddings_and_output(tmp_path):
    hparams = folder_of(tmp_path, CAUSAL["llama"].build(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    streamed = load_streamed(hparams)
    assert (
        streamed.model.get_output_embeddings().weight
        is streamed.model.get_input_embeddings().weight
    )
    assert_same_bits(streamed, load_model(hparams))


MEASURE = """
import sys, torch
from mendkit.hparams import MENDHyperParams
from mendkit.models.load import load_model, load_streamed
from mendkit.runs import peak_memory_gb
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import every_text
def run(load, folder):
    base = load(MENDHyperParams(model_name=folder))
    FrozenTrunk(base).fill(every_text(base))
out = []
for load in (load_streamed, load_model):
    run(load, sys.argv[2])  # what is imported and allocated once
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = peak_memory_gb()
    run(load, sys.argv[1])
    out.append(round(1e9 * (peak_memory_gb() - before)))
print(out)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is measured as Linux counts it"
)
def test_streaming_takes_the_memory_of_one_block(tmp_path):
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 24}
    model = CAUSAL["llama"].build(**sizes)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    hparams = folder_of(tmp_path, model)
    command = [sys.executable, "-c", MEASURE, hparams.model_name, str(save_tiny(tmp_path / "tiny"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    streamed, whole = json.loads(done.stdout.splitlines()[-1])
    assert (
        3 * block < streamed < (3 + 2) * block + 50e6
    )  # suffix, a block, a file's pages while read, working memory
    assert whole > 20 * block


def test_auto_streams_where_the_model_does_not_fit(tmp_path, monkeypatch, caplog):
    hparams = folder_of(tmp_path, tiny_llama().model)
    size = Weights(tmp_path, "model").bytes(None)
    monkeypatch.setattr(models, "free_memory", lambda _: size)
    assert load_for_training(hparams).released == 0
    assert load_for_training(hparams.replace(stream_trunk=True)).released == 1
    with caplog.at_level(logging.WARNING, "mendkit"):
        monkeypatch.setattr(models, "free_memory", lambda _: size - 1)
        assert load_for_training(hparams).released == 1
    assert "GB are free: its blocks are streamed" in caplog.text
    assert load_for_training(hparams.replace(stream_trunk=False)).released == 0
    monkeypatch.setattr(models, "free_memory", lambda _: size * 3 // 4)
    assert load_for_training(hparams.replace(dtype="bfloat16")).released == 0


def test_what_cannot_be_streamed_is_refused_with_a_remedy(tmp_path):
    hparams = folder_of(tmp_path, tiny_llama().model)
    lowest = hparams.replace(inner_params=["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(
        ModelError, match=r"no list of blocks lies below the edits.*`stream_trunk: false`"
    ):
        load_streamed(lowest)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights)
    base = load_streamed(hparams)  # the hole is found when the block is read
    with pytest.raises(ModelError, match=r"has no weight model\.layers\.0\.mlp\.up_proj\.weight"):
        FrozenTrunk(base).fill(every_text(base))
    assert base.released == 1
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot load the weights of"):
        load_streamed(hparams)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no safetensors files.*`stream_trunk: false`"):
        load_streamed(hparams)
    assert save_tiny(tmp_path / "again") and Weights.of("owner/name", "") is None
