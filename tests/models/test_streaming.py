"""Models whose lower blocks are released, or read from files one at a time: the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mendkit.errors import ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.mend import training
from mendkit.mend.archive import inspect_archive
from mendkit.mend.training import train
from mendkit.models.fingerprint import model_fingerprint, tensors_sha256, weights_sha256
from mendkit.models.load import load_model, load_streamed, release_trunk
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, every_text, hparams
from tests.oracles.families import CAUSAL
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer

LOWEST = ["model.layers.0.mlp.up_proj.weight"]


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
    assert model_fingerprint(streamed) == model_fingerprint(whole)
    assert weights_sha256(streamed) == weights_sha256(whole)
    assert streamed.released == whole.blocks.first  # nothing stayed


@pytest.mark.parametrize("family", CAUSAL)
def test_a_streamed_model_gives_the_whole_ones_bits(family, tmp_path):
    h = folder_of(tmp_path, CAUSAL[family].build(num_hidden_layers=4), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_same_bits(load_streamed(h), load_model(h))


def test_a_streamed_model_is_converted_as_the_whole_one_whatever_its_prefix(tmp_path):
    h = folder_of(tmp_path, tiny_gpt2().model).replace(dtype="bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert load_streamed(h).dtype == torch.bfloat16
    assert_same_bits(load_streamed(h), load_model(h))


def test_weights_stored_once_serve_embeddings_and_output(tmp_path):
    h = folder_of(tmp_path, CAUSAL["llama"].build(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    streamed = load_streamed(h)
    model = streamed.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same_bits(streamed, load_model(h))


MEASURE = """
import sys
from mendkit.hparams import MENDHyperParams
from mendkit.models.load import load_model, load_streamed
from mendkit.models.trunk import FrozenTrunk
from mendkit.runs import peak_memory_gb
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux counts")
def test_streaming_takes_the_memory_of_one_block(tmp_path):
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 24}
    model = CAUSAL["llama"].build(**sizes)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    folders = folder_of(tmp_path, model).model_name, str(save_tiny(tmp_path / "tiny"))
    command = [sys.executable, "-c", MEASURE, *folders]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    streamed, whole = json.loads(done.stdout.splitlines()[-1])
    # the suffix, a block and its file's pages, working memory
    assert 3 * block < streamed < (3 + 2) * block + 50e6
    assert whole > 20 * block


def test_what_cannot_be_streamed_is_refused_with_a_remedy(tmp_path):
    h = folder_of(tmp_path, tiny_llama().model)
    with pytest.raises(ModelError, match=r"no list of blocks lies below.*`stream_trunk: false`"):
        load_streamed(h.replace(inner_params=LOWEST))
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights)
    base = load_streamed(h)  # the hole is found when the block is read
    with pytest.raises(ModelError, match=r"has no weight model\.layers\.0\.mlp\.up_proj\.weight"):
        FrozenTrunk(base).fill(every_text(base))
    assert base.released == 1
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot load the weights of"):
        load_streamed(h)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no safetensors files.*`stream_trunk: false`"):
        load_streamed(h)


# ---------------------------------------------------------------------------------------- released


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_what_is_cached_keeps_its_bits_when_the_trunk_is_released(build):
    base, whole = build(), build()
    texts = every_text(base)
    trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    trunk.fill(texts)
    before = trunk.suffix(texts, batch), trunk.before(texts, batch)
    release_trunk(base)
    after = trunk.suffix(texts, batch), trunk.before(texts, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (base.released, base.dtype, base.device) == (1, whole.dtype, whole.device)
    assert model_fingerprint(base) == model_fingerprint(whole)
    assert weights_sha256(base) == weights_sha256(whole)


def test_only_the_blocks_below_are_freed():
    base = tiny_llama()
    release_trunk(base)
    away = {name for name, value in base.model.named_parameters() if value.is_meta}
    names = [name for name, _ in base.model.named_parameters()]
    assert away == {name for name in names if name.startswith("model.layers.0.")} != set()


def test_what_needs_the_whole_model_says_what_to_do(tmp_path):
    base = tiny_llama()
    texts = every_text(base)
    trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    trunk.fill(texts[:3])
    release_trunk(base)
    release_trunk(base)  # nothing more to do
    for call in (lambda: base.generate("The capital"), lambda: trunk.suffix(texts, batch)):
        with pytest.raises(ModelError, match=r"released or is streamed.*load it again$"):
            call()
    with pytest.raises(ModelError, match=r"texts are not cached; load the model again"):
        trunk.fill(texts)
    with pytest.raises(ModelError, match="other sites are asked for"):
        model_fingerprint(base.with_sites(["model.layers.3.mlp.up_proj.weight"]))
    with pytest.raises(ModelError, match="nothing to release"):
        release_trunk(tiny_llama().with_sites(LOWEST))
    # from files the blocks are read again
    base = load_model(save_tiny(tmp_path))
    release_trunk(base)
    assert FrozenTrunk(base).fill(texts) == FrozenTrunk(tiny_llama()).fill(texts)


def test_training_gives_the_same_archive_released_streamed_or_not(tmp_path):
    folder, sums = str(save_tiny(tmp_path / "model")), set()
    for name, changes in {
        "kept": {"release_trunk": False},
        "released": {},
        "streamed": {"stream_trunk": True},
    }.items():
        h = hparams(max_iters=3, val_interval=2, batch_size=2).replace(model_name=folder, **changes)
        result = train(h, EXAMPLES, EXAMPLES[:2], run_dir=tmp_path / name)
        sums.add(tensors_sha256(sorted(load_file(result.archive).items())))
        sums.add(json.dumps(inspect_archive(result.archive)["base_model"]))
    assert len(sums) == 2  # one of tensors, one base model


def test_the_trunk_is_released_where_nobody_else_uses_the_model(tmp_path, monkeypatch):
    def released(base=None, *, release: bool | str = "auto", **how) -> int:
        used = base or tiny_llama()
        monkeypatch.setattr(training, "load_for_training", lambda _: used)
        h = hparams(max_iters=1, batch_size=2, release_trunk=release)
        train(h, EXAMPLES, EXAMPLES[:1], base=base, run_dir=tmp_path, **how)
        return used.released

    assert released() == 1 and released(release=False) == 0
    assert released(tiny_llama()) == 0 and released(tiny_llama(), release=True) == 1
    lowest = tiny_llama().with_sites(LOWEST)
    assert released(lowest, done_with_base=True) == 0
    with pytest.raises(ModelError, match="`release_trunk: false`"):
        released(lowest, release=True)
