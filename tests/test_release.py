"""Freeing the trunk: what is cached gives the same bits, what needs the whole model says what to do."""

import pytest
import torch

from mendkit.errors import ModelError
from mendkit.mend import training
from mendkit.mend.archive import inspect_archive, load_archive
from mendkit.mend.training import train
from mendkit.models.base import BaseModel
from mendkit.models.fingerprint import model_fingerprint, weights_sha256
from mendkit.models.load import load_model, release_trunk
from mendkit.models.streaming import is_hollow
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, every_text, hparams
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_what_is_cached_keeps_its_bits(build):
    base, whole = build(), build()
    texts = every_text(base)
    trunk = FrozenTrunk(base)
    trunk.fill(texts)
    batch = collate(texts, base.pad_id)
    before = trunk.suffix(texts, batch), trunk.before(texts, batch)
    updates = [editor_for(base).updates(texts[:2], trunk=trunk)]
    release_trunk(base)
    after = trunk.suffix(texts, batch), trunk.before(texts, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    updates.append(scrambled_updates(base, texts[:2], trunk, whole))
    for name, update in updates[0].items():
        assert torch.equal(update.u, updates[1][name].u) and torch.equal(
            update.delta, updates[1][name].delta
        )
    assert (base.released, base.dtype, base.device) == (1, whole.dtype, whole.device)
    assert model_fingerprint(base) == model_fingerprint(whole)
    assert weights_sha256(base) == weights_sha256(whole)


def scrambled_updates(base, texts, trunk, whole):
    """Updates of the editor whose statistics come from the whole model, made with a released one."""
    editor = editor_for(whole)
    editor.base = base
    return editor.updates(texts, trunk=trunk)


def test_only_what_lies_below_is_freed():
    for base, tied in ((tiny_llama(), False), (tiny_gpt2(), True)):
        release_trunk(base)
        hollow = {name for name, value in base.model.named_parameters() if is_hollow(value)}
        table = {
            f"{n}.weight"
            for n, m in base.model.named_modules()
            if m is base.model.get_input_embeddings()
        }
        below = {
            n for n, _ in base.model.named_parameters() if n.startswith(f"{base.blocks.path}.0.")
        }
        assert below and hollow == below | (set() if tied else table)
        freed = [
            value.untyped_storage().nbytes()
            for n, value in base.model.named_parameters()
            if n in hollow
        ]
        assert sum(value.numel() for n, value in base.model.named_parameters() if n in below) > 1000
        assert all(value.is_meta for n, value in base.model.named_parameters() if n in below)
        assert tied or min(freed) == base.dtype.itemsize  # the table is one zero


def test_what_needs_the_whole_model_says_what_to_do():
    base = tiny_llama()
    texts = every_text(base)
    trunk = FrozenTrunk(base)
    trunk.fill(texts[:3])
    release_trunk(base)
    release_trunk(base)  # nothing more to do
    batch = collate(texts, base.pad_id)
    for call in (lambda: base.generate("The capital"), lambda: trunk.suffix(texts, batch)):
        with pytest.raises(ModelError, match=r"released or is streamed.*load it again$"):
            call()
    with pytest.raises(ModelError, match=r"texts are not cached; load the model again"):
        trunk.fill(texts)
    with pytest.raises(ModelError, match="other sites are asked for"):
        model_fingerprint(base.with_sites(["model.layers.3.mlp.up_proj.weight"]))
    lowest = tiny_llama().with_sites(["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(ModelError, match="nothing to release"):
        release_trunk(lowest)


def test_a_model_from_files_is_read_block_by_block(tmp_path):
    base, whole = load_model(save_tiny(tmp_path)), tiny_llama()
    texts = every_text(base)
    release_trunk(base)
    with pytest.raises(ModelError, match="load it again"):
        base.generate("The capital")
    trunk, other, batch = FrozenTrunk(base), FrozenTrunk(whole), collate(texts, base.pad_id)
    assert trunk.fill(texts) == other.fill(texts)  # streamed
    assert torch.equal(trunk.suffix(texts, batch), other.suffix(texts, batch))
    assert base.with_sites(["model.layers.3.mlp.up_proj.weight"]).released == 1


def test_training_gives_the_same_archive_released_streamed_or_not(tmp_path):
    folder = str(save_tiny(tmp_path / "model"))
    sums = {}
    for name, changes in {
        "kept": {"release_trunk": False},
        "released": {},
        "streamed": {"stream_trunk": True},
    }.items():
        h = hparams(max_iters=3, val_interval=2, batch_size=2, log_interval=1).replace(
            model_name=folder, **changes
        )
        result = train(h, EXAMPLES, EXAMPLES[:2], run_dir=tmp_path / name)
        sums[name] = (
            inspect_archive(result.archive)["sha256"],
            inspect_archive(result.archive)["base_model"],
        )
        assert load_archive(result.archive, base=load_model(folder)).mend.edit_lrs
        again = h.replace(archive=str(result.archive))
        assert train(
            again, EXAMPLES, EXAMPLES[:2], run_dir=tmp_path / f"{name}-on"
        ).archive.is_file()
    assert sums["kept"] == sums["released"] == sums["streamed"]


def test_the_trunk_is_released_where_nobody_else_uses_the_model(tmp_path, monkeypatch):
    def released(base: BaseModel | None, **how) -> int:
        own = base or tiny_llama()
        monkeypatch.setattr(training, "load_for_training", lambda _: own)
        changes = {key: how.pop(key) for key in ("release_trunk",) if key in how}
        train(
            hparams(max_iters=1, batch_size=2, **changes),
            EXAMPLES,
            EXAMPLES[:1],
            base=base,
            run_dir=tmp_path,
            **how,
        )
        return own.released

    assert released(None) == 1
    assert released(None, release_trunk=False) == 0
    assert released(tiny_llama()) == 0
    assert released(tiny_llama(), done_with_base=True) == 1
    assert released(tiny_llama(), release_trunk=True) == 1
    lowest = tiny_llama().with_sites(["model.layers.0.mlp.up_proj.weight"])
    assert released(lowest, done_with_base=True) == 0
    with pytest.raises(ModelError, match="`release_trunk: false`"):
        released(lowest, release_trunk=True)
