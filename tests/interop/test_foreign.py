"""Archives of published code: nothing in them runs, what they held comes through bit for bit."""

import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mendkit.__main__ import main
from mendkit.errors import ArchiveError
from mendkit.hparams import MENDHyperParams
from mendkit.interop.foreign import (
    export_archive,
    from_foreign,
    import_archive,
    read_foreign,
    to_foreign,
)
from mendkit.mend.archive import inspect_archive, load_archive, save_archive
from mendkit.mend.batches import edit_tokens
from mendkit.mend.editor import MENDEditor
from mendkit.mend.factors import capture_factors
from mendkit.mend.hypernetwork import MEND
from mendkit.models.sites import Site
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.attacks import Canary
from tests.oracles.claims import EXAMPLES
from tests.oracles.textbook import (
    NAMES,
    SHAPES,
    Editor,
    Textbook,
    as_float32,
    every_option,
    label,
    options_of,
    save_published,
)
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama

LAYERS = NAMES["gpt2"]
OPTIONS = options_of("combine", shared=True, norm=True, n_hidden=1, init="id", rank=6)


def hparams(names=LAYERS, **changes) -> MENDHyperParams:
    return MENDHyperParams(model_name="tiny", inner_params=tuple(names), **(OPTIONS | changes))


def sites_of(shapes, names) -> tuple[Site, ...]:
    return tuple(Site(n, n.removesuffix(".weight"), *shapes[n], False, None, False) for n in names)


@pytest.fixture
def published(gpt2, tmp_path):
    """A published archive for the tiny GPT-2, its statistics those of real factors; its oracle."""
    editor = Editor(gpt2.model, LAYERS, OPTIONS)
    base, h = gpt2.with_sites(LAYERS), hparams()
    for example in EXAMPLES:
        factors = capture_factors(FrozenTrunk(base), [edit_tokens(base, h, example)])
        for name in LAYERS:
            pair = (factors[name].u.double(), factors[name].delta.double())
            editor.book.observe(name, list(zip(*pair, strict=True)))
    state = as_float32(editor.book.state)
    editor.book.state = OrderedDict((name, value.double()) for name, value in state.items())
    return save_published(tmp_path / "archive.pt", state, gpt2.model.config), editor.book


# ---------------------------------------------------------------------------------- nothing is run


@pytest.mark.parametrize("name", ["transformers.Trainer", "os.XConfig", "transformers.XConfig.y"])
def test_a_name_that_only_resembles_a_configuration_is_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/data.pkl", f"\x80\x02c{module}\n{attribute}\n)R.".encode("latin1"))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    with pytest.raises(ArchiveError, match=name):
        read_foreign(tmp_path / "a.pt")


def test_a_plain_pickle_and_other_files_are_refused(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "a.pt"
    for content in (pickle.dumps(Canary(os.mkdir, str(mark))), b"", b"text", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(ArchiveError, match=r"a\.pt: not a readable archive"):
            read_foreign(path)
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(ArchiveError, match="no archive of MEND"):
        read_foreign(path)
    with pytest.raises(ArchiveError, match="no such file"):
        read_foreign(tmp_path / "none.pt")
    assert not mark.exists()


def test_a_configuration_is_never_the_live_class(published, tmp_path, monkeypatch):
    mark, module = tmp_path / "ran", "transformers.models.gone.configuration_gone"

    class GoneConfig:
        def __setstate__(self, state):
            mark.mkdir()

    GoneConfig.__module__, GoneConfig.__qualname__ = module, "GoneConfig"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(GoneConfig=GoneConfig))
    config = GoneConfig()
    config.n_layer = 7
    content = {"model": OrderedDict(published[1].state, model_config=config)}
    torch.save(content, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, module)  # as where transformers no longer has the model
    foreign = read_foreign(tmp_path / "a.pt")
    assert (foreign.config_class, foreign.config) == ("GoneConfig", {"n_layer": 7})
    assert set(foreign.state) == set(published[1].state) and not mark.exists()


# ------------------------------------------------------------------------------------------ import


def test_an_imported_archive_edits_as_the_textbook_alone_and_several_at_once(
    gpt2, published, tmp_path
):
    path, book = published
    native = import_archive(path, hparams(add_eos=False), out=tmp_path / "a.safetensors", base=gpt2)
    archive = load_archive(native, base=gpt2)
    editor = MENDEditor(archive.base, archive.mend)
    for examples in (EXAMPLES[:1], EXAMPLES[2:3], EXAMPLES):
        texts = [editor.tokens(example) for example in examples]
        total = sum(len(text.targets) for text in texts)
        rows = {name: ([], []) for name in LAYERS}
        for text in texts:
            factors = capture_factors(FrozenTrunk(archive.base), [text])
            for name, (us, deltas) in rows.items():
                us.append(factors[name].u.double())
                # of one mean over all edits' tokens
                deltas.append(factors[name].delta.double() * len(text.targets) / total)
        expected = book.update({name: [torch.cat(x) for x in pair] for name, pair in rows.items()})
        dense = editor.edit(list(examples)).dense()
        for name, value in expected.items():  # Conv1D: the weight is (d_in, d_out)
            near = {"rtol": 1e-4, "atol": 1e-5 * float(value.abs().max())}
            torch.testing.assert_close(dense[name].double(), value.T, **near)


def test_an_update_is_subtracted_and_a_step_size_keeps_its_sign(gpt2, published, tmp_path):
    path, book = published
    native = import_archive(path, hparams(), out=tmp_path / "a", base=gpt2)
    archive = load_archive(native, base=gpt2)
    assert archive.metadata["update_sign"] == -1
    assert archive.metadata["loss_reduction"] == "batch"
    lrs = dict(zip(LAYERS, (-book.state["edit_lrs"]).tolist(), strict=True))
    assert archive.mend.edit_lrs == lrs and {lr > 0 for lr in lrs.values()} == {True, False}


@pytest.mark.parametrize("options", list(every_option()), ids=label)
def test_there_and_back_keeps_every_bit(options):
    book = Textbook(SHAPES, options)
    generator = torch.Generator().manual_seed(1)
    rows = {}
    for name, shape in SHAPES.items():
        rows[name] = [torch.randn(7, d, generator=generator, dtype=torch.float64) for d in shape]
    book.update(rows, training=True)
    state, sites = as_float32(book.state), sites_of(SHAPES, sorted(SHAPES))
    h = MENDHyperParams(model_name="tiny", inner_params=tuple(SHAPES), **options)
    back = to_foreign(from_foreign(state, sites, h))
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


CANNOT = {"z_clip": 10.0, "whiten": 0.1, "norm_stats": "layer", "edit_tokens": "scored"}
CANNOT |= {"edit_on": "text"}


@pytest.mark.parametrize("change", [{key: value} for key, value in CANNOT.items()], ids=str)
def test_what_the_published_format_cannot_say_is_refused(gpt2, tmp_path, change):
    base = gpt2.with_sites(LAYERS)
    mend = MEND(base.sites, hparams(**{"norm_stats": "shape", "z_clip": None} | change))
    native = save_archive(tmp_path / "a.safetensors", base, mend)
    with pytest.raises(ArchiveError, match=f"cannot store {next(iter(change))}"):
        export_archive(native, tmp_path / "archive.pt", base=gpt2)
    assert not (tmp_path / "archive.pt").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner_params": LAYERS[:2]}, "edit_lrs: expected real numbers of shape"),
        (
            {"inner_params": ("transformer.h.1.attn.c_attn.weight", *LAYERS[1:])},
            "give all settings",
        ),
        ({"inner_params": "auto"}, "not `auto`"),
        ({"rank": 5}, r"expected real numbers of shape \(\d+, 5\), found"),
        ({"n_hidden": 0}, r"layers\.1\.\w+ belongs to no layer"),
        ({"n_hidden": 2}, r"layers\.2\.u: expected .*found nothing"),
        ({"shared": False}, "found nothing; give all settings"),
        ({"combine": False, "x_only": True}, "mlp1.*found nothing"),
    ],
    ids=str,
)
def test_other_settings_than_the_archives_are_refused(gpt2, published, tmp_path, change, words):
    h = hparams().replace(**change)
    with pytest.raises(ArchiveError, match=words):
        import_archive(published[0], h, out=tmp_path / "a.safetensors", base=gpt2)
    assert not (tmp_path / "a.safetensors").exists()


def test_another_base_model_is_refused(published, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(ArchiveError, match="class GPT2Config, here LlamaConfig"):
        import_archive(published[0], hparams(NAMES["llama"]), out=out, base=tiny_llama())
    with pytest.raises(ArchiveError, match="n_layer"):
        import_archive(published[0], hparams(), out=out, base=tiny_gpt2(layers=5))


# ------------------------------------------------------------------------------------ command line


def test_the_commands_import_and_export_write_over_nothing_and_say_what_is_wrong(
    gpt2, published, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_tiny("model", gpt2)
    settings = {"model_name": "model", "rank": 6, "init": "id", "inner_params": LAYERS}
    Path("gpt2.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML, too
    assert main(["import", "archive.pt", "gpt2.yaml", "--out", "run"]) == 0
    path = capsys.readouterr().out.strip()
    training = {"imported_from": "archive.pt", "best": {"step": 12}}
    assert inspect_archive(path)["training"] == training
    assert main(["export", path, "gpt2.yaml", "--out", "run", "--overwrite"]) == 0
    assert capsys.readouterr().out == "run/archive.pt\n"
    first, again = (read_foreign(name).state for name in ("archive.pt", "run/archive.pt"))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    model = torch.load("run/archive.pt", weights_only=False)["model"]  # as EasyEdit reads it
    assert type(model["model_config"]).__name__ == "GPT2Config"

    torch.save({"model": Canary(os.mkdir, "ran")}, "hostile.pt")
    before = {file: file.read_bytes() for file in Path("run").iterdir()}
    wrong = {
        "import archive.pt gpt2.yaml --out run": "run holds archive.safetensors",
        "export run/archive.safetensors gpt2.yaml --out run": "run holds archive.pt",
        "export archive.pt gpt2.yaml --out new": "not a readable archive",
        "evaluate gpt2.yaml archive=archive.pt": "import",
        "import hostile.pt gpt2.yaml --out run --overwrite": "posix.mkdir",
    }
    for typed, words in wrong.items():
        assert main(typed.split()) == 2, typed
        said = capsys.readouterr()
        assert said.out == "" and words in said.err.splitlines()[-1], typed
    assert not Path("ran").exists() and not Path("new").exists()
    assert {file: file.read_bytes() for file in Path("run").iterdir()} == before
