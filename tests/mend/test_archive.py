"""The archive: bits, refusals and damage (CORRECTNESS rows 1, 3, 23, 24)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mendkit.errors import ArchiveError, MendkitError
from mendkit.mend.archive import load_archive, save_archive
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.least_squares import FLOOR
from mendkit.mend.packing import BLOCK, _rounded, _widened
from tests.oracles.attacks import Layout, signed
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import tiny_gpt2, tiny_llama


@pytest.fixture
def saved(llama, tmp_path):
    mend = scrambled(with_statistics(llama, MEND(llama.sites, hparams())))
    return save_archive(tmp_path / "a.safetensors", llama, mend, training={"steps": 7}), mend


def rewrite(path, change, sign=signed):
    """The file after a change of its tensors and metadata, its checksum made anew."""
    metadata, tensors = Layout.of(path.read_bytes()).metadata, load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata={"mendkit": json.dumps(sign(metadata, tensors))})


def test_round_trip_gives_the_same_edits_bit_for_bit(llama, saved):
    path, mend = saved
    loaded = load_archive(path, base=llama)
    assert all(torch.equal(v, loaded.mend.state_dict()[k]) for k, v in mend.state_dict().items())
    a, b = (MENDEditor(llama, m).edit(EXAMPLES[0]).dense() for m in (mend, loaded.mend))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert loaded.mend.hparams == mend.hparams.replace(model_name=llama.name)


WHITE = {"whiten": 0.02, "whiten_pairs": True, "edit_tokens": "scored"}


def white(base) -> MEND:
    """An editor whose statistics are symmetric matrices, those of gate and up the same."""
    mend = scrambled(MEND(base.sites, hparams(edit_lr=1e-2, aggregate="least_squares", **WHITE)))
    seen = {}
    for site in base.sites:
        moments, key = mend.moments[mend.stats_of[site.name]], site.name.split(".mlp.")[0]
        for module in (moments["u"], mend.others[mend.stats_of[site.name]]):
            for name, value in module.named_buffers():
                if value.dim() > 1:
                    drawn = torch.randn(value.shape)
                    drawn = drawn + drawn.mT
                    if name == "moment":  # definite
                        drawn = drawn @ drawn + 9 * torch.eye(len(drawn))
                    seen.setdefault((key, name, value.shape), drawn)
                    setattr(module, name, seen[key, name, value.shape].clone())
    return mend


@pytest.fixture(scope="module")
def wide():
    return tiny_llama(d=64)


def test_equal_and_symmetric_statistics_are_stored_once_and_read_to_the_bit(wide, tmp_path):
    mend = white(wide)
    path = save_archive(tmp_path / "a.safetensors", wide, mend)
    loaded = load_archive(path, base=wide).mend
    state, again = mend.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    # each has memory of its own, for training writes to it
    assert len({value.data_ptr() for value in again.values()}) == len(again)
    # of a block's three layers gate and up have the same inputs: two of three statistics are kept
    held, kept = load_file(path), 0
    for name, value in state.items():
        if name.endswith(("matrix", "moment")) and name in held:
            n, kept = value.shape[-1], kept + 1
            assert held[name].shape == (*value.shape[:-2], n * (n + 1) // 2)
    assert kept == 2 * 2 * len(wide.sites) // 3


def test_a_compact_archive_is_small_says_so_and_gives_nearly_the_same_edits(wide, tmp_path):
    mend = white(wide)
    whole = save_archive(tmp_path / "a.safetensors", wide, mend)
    path = save_archive(tmp_path / "b.safetensors", wide, mend, compact=True)
    assert path.stat().st_size < 0.5 * whole.stat().st_size
    assert load_archive(path, base=wide).metadata["precision"] == "matrices in 8 and 12 bits"
    loaded = load_archive(path, base=wide).mend.state_dict()
    for name, value in mend.state_dict().items():
        error = float((loaded[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        is_square = value.dim() > 1 and value.shape[-1] == value.shape[-2]
        assert loaded[name].dtype == value.dtype
        assert error <= (1 / 4094 if is_square else 1 / 254) * 1.001
        assert (error > 0) == (value.dim() > 1 and bool(value.any())), name
    # what is compact already is read, and stored whole, without a further change
    again = load_archive(path, base=wide)
    save_archive(whole, wide, again.mend)
    assert all(
        torch.equal(value, loaded[name])
        for name, value in load_archive(whole, base=wide).mend.state_dict().items()
    )


def test_key_moments_that_rounding_made_indefinite_can_still_be_solved_with(wide, tmp_path):
    mend = white(wide)
    for other in mend.others.values():
        n = len(other.moment)
        axes = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]
        values = torch.linspace(-0.01, 2, n)  # rounding took the floor from the least
        other.moment = axes * values @ axes.T
    path = save_archive(tmp_path / "a.safetensors", wide, mend)
    loaded = load_archive(path, base=wide)
    for name, other in loaded.mend.others.items():
        moment = mend.others[name].moment
        values = torch.linalg.eigvalsh(other.moment.double())
        assert values.min() > 0.99 * FLOOR * moment.diagonal().mean()
        assert torch.linalg.matrix_norm(other.moment - moment, 2) < 0.035
    with MENDEditor(wide, loaded.mend).session() as session:
        session.edit(EXAMPLES[0])
        session.edit(EXAMPLES[1])


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("bits", [8, 12])
def test_rounding_is_that_of_a_naive_loop(n, bits):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 10.0 ** torch.arange(n).clamp(
        max=30
    )
    most, expected = 2 ** (bits - 1) - 1, []
    for start in range(0, n, BLOCK):
        block = x[start : start + BLOCK].tolist()
        size = max(map(abs, block))
        expected += [round(value / size * most) * size / most for value in block]
    stored, sizes = _rounded(x, bits)
    assert stored.dtype == torch.uint8 and stored.nbytes == len(sizes) * BLOCK * bits // 8
    torch.testing.assert_close(
        _widened(stored, sizes)[:n], torch.tensor(expected), rtol=1e-5, atol=0
    )


def test_zeros_stay_zeros():
    assert not _widened(*_rounded(torch.zeros(70), 12)).any()


def test_an_archive_of_the_second_format_loads(llama, saved):
    path, mend = saved

    def as_second(tensors, metadata):
        packing = metadata.pop("packing")
        tensors.update({name: tensors[same].clone() for name, same in packing["same"].items()})
        assert not packing["triangles"]
        metadata.pop("precision")
        metadata["format"] = "mendkit-2"

    rewrite(path, as_second)
    loaded = load_archive(path, base=llama).mend.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in mend.state_dict().items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny_llama(seed=5), "other weights"),
        (lambda: tiny_gpt2(), "class LlamaForCausalLM, here GPT2LMHeadModel"),
        (lambda: tiny_llama(d=48), "other shapes"),
    ],
)
def test_another_model_is_refused_by_name_of_the_difference(saved, other, words):
    with pytest.raises(ArchiveError, match=words) as error:
        load_archive(saved[0], base=other())
    assert "archive: null" in str(error.value)


def test_an_edited_model_is_another_model(saved, llama):
    weight = llama.site_module(llama.sites[0]).weight
    kept = weight.clone()
    base = tiny_llama()
    base.site_module(base.sites[0]).weight.add_(1e-3)
    with pytest.raises(ArchiveError, match="already edited"):
        load_archive(saved[0], base=base)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop("log_edit_lr"), 'Missing key.*"log_edit_lr"'),
        (lambda t, m: t.update(extra=torch.ones(1)), 'Unexpected key.*"extra"'),
        (lambda t, m: t.update(log_edit_lr=torch.zeros(1)), "size mismatch for log_edit_lr"),
        (lambda t, m: t.update(log_edit_lr=t["log_edit_lr"].half()), "is torch.float16"),
        (lambda t, m: m["packing"].update(same={"extra": "log_edit_lr"}), "KeyError: 'extra'"),
        (lambda t, m: m["packing"].update(triangles=["log_edit_lr"]), "damaged file"),
        (lambda t, m: m["packing"].update(same={"log_edit_lr": "none"}), "KeyError: 'none'"),
        (lambda t, m: m.update(packing=[]), "damaged metadata"),
        (lambda t, m: m.update(format="other"), "unknown format"),
        (lambda t, m: m["hparams"].update(rank=-3), "damaged metadata"),
    ],
)
def test_damaged_contents_are_named(llama, saved, change, words):
    rewrite(saved[0], change)
    with pytest.raises(ArchiveError, match=words):
        load_archive(saved[0], base=llama)


def test_what_is_not_finite_is_not_written(llama, tmp_path):
    mend = MEND(llama.sites, hparams())
    mend.load_state_dict(
        mend.state_dict() | {"log_edit_lr": mend.log_edit_lr.detach() + float("nan")}
    )
    with pytest.raises(ArchiveError, match=r"not written: log_edit_lr not finite"):
        save_archive(tmp_path / "a.safetensors", llama, mend)
    assert not any(tmp_path.iterdir())


def test_no_file_and_foreign_files(llama, tmp_path):
    with pytest.raises(ArchiveError, match="no such archive"):
        load_archive(tmp_path / "none.safetensors", base=llama)
    save_file({"x": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ArchiveError, match="no archive of mendkit"):
        load_archive(tmp_path / "plain.safetensors", base=llama)


def test_a_failed_write_leaves_the_old_archive_and_no_rubbish(llama, saved, monkeypatch):
    path, mend = saved
    before = path.read_bytes()
    monkeypatch.setattr(
        "mendkit.mend.files.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(
        MendkitError, match=r"cannot write the archive .*disk full; what was there is as it was"
    ):
        save_archive(path, llama, mend)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
