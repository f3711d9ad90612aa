"""Models whose lower blocks are released, or run one at a time: the same bits."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mendkit.errors import ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.mend import training
from mendkit.mend.archive import inspect_archive
from mendkit.mend.training import train
from mendkit.models import streaming, trunk
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
    assert streamed.streamed and streamed.blocks == whole.blocks
    texts = every_text(whole)
    a, b, batch = FrozenTrunk(streamed), FrozenTrunk(whole), collate(texts, whole.pad_id)
    assert a.fill(texts) == b.fill(texts) > 0
    with torch.no_grad():
        assert torch.equal(a.suffix(texts, batch), b.suffix(texts, batch))
        assert torch.equal(a.before(texts, batch), b.before(texts, batch))
    assert model_fingerprint(streamed) == model_fingerprint(whole)
    assert weights_sha256(streamed) == weights_sha256(whole)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_streamed_model_gives_the_whole_ones_bits(family, tmp_path):
    h = folder_of(tmp_path, CAUSAL[family].build(num_hidden_layers=4), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_same_bits(load_streamed(h), load_model(h))


def test_a_streamed_model_is_converted_as_the_whole_one(tmp_path):
    h = folder_of(tmp_path, tiny_gpt2().model).replace(dtype="bfloat16")
    assert load_streamed(h).dtype == torch.bfloat16
    assert_same_bits(load_streamed(h), load_model(h))


def test_each_block_visits_the_device_once(tmp_path, monkeypatch):
    base, seen = load_streamed(folder_of(tmp_path, tiny_llama().model)), []
    monkeypatch.setattr(trunk, "TOKENS_PER_PASS", 1)
    base = base.with_sites(["model.layers.3.mlp.up_proj.weight"])

    @contextmanager
    def visiting(block, device):
        seen.append(block)
        with streaming.visiting(block, device):
            yield

    monkeypatch.setattr(trunk, "visiting", visiting)
    FrozenTrunk(base).fill(every_text(base))
    assert seen == list(base.model.model.layers[:3])


def test_what_cannot_be_streamed_is_refused_with_a_remedy(tmp_path):
    h = folder_of(tmp_path, tiny_llama().model)
    with pytest.raises(ModelError, match=r"no plain chain.*below.*`stream_trunk: false`"):
        load_streamed(h.replace(inner_params=LOWEST))


# ---------------------------------------------------------------------------------------- released


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_what_is_cached_keeps_its_bits_when_the_trunk_is_released(build):
    base, whole = build(), build()
    texts = every_text(base)
    filled, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    filled.fill(texts)
    before = filled.suffix(texts, batch), filled.before(texts, batch)
    release_trunk(base)
    after = filled.suffix(texts, batch), filled.before(texts, batch)
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


def test_what_needs_the_whole_model_says_what_to_do():
    base = tiny_llama()
    texts = every_text(base)
    filled, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    filled.fill(texts[:3])
    release_trunk(base)
    release_trunk(base)  # nothing more to do
    calls = (lambda: base.generate("A"), lambda: filled.suffix(texts, batch))
    for call in (*calls, lambda: filled.fill(texts)):
        with pytest.raises(ModelError, match=r"released or is streamed.*load it again$"):
            call()
    with pytest.raises(ModelError, match="other sites are asked for"):
        model_fingerprint(base.with_sites(["model.layers.3.mlp.up_proj.weight"]))
    with pytest.raises(ModelError, match="nothing to release"):
        release_trunk(tiny_llama().with_sites(LOWEST))


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
