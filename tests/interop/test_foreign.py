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
from mendkit.interop.conformance import Recording
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
from tests.oracles.claims import EXAMPLES, scrambled, with_statistics
from tests.oracles.textbook import (
    NAMES,
    REFERENCE,
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


class Payload:
    """What a hostile archive holds: unpickling it makes a folder."""

    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


PAYLOADS = {  # by the name in the pickle
    "posix.mkdir": lambda mark: Payload(os.mkdir, mark),
    "posix.system": lambda mark: Payload(os.system, f"mkdir {mark}"),
    "builtins.eval": lambda mark: Payload(eval, f"__import__('os').mkdir({mark!r})"),
}


@pytest.mark.parametrize(
    ("name", "place"), [*zip(PAYLOADS, ("model", "model_config", "opt"), strict=True)]
)
def test_a_payload_is_refused_by_name_and_does_not_run(gpt2, published, tmp_path, name, place):
    mark, path = tmp_path / "ran", tmp_path / "hostile.pt"
    model = OrderedDict(published[1].state, model_config=gpt2.model.config)
    content = {"model": model, "opt": {}, "lr_opt": {}, "val_stats": {}, "step": 1}
    (model if place.startswith("model") else content)[place] = PAYLOADS[name](str(mark))
    torch.save(content, path)
    with pytest.raises(ArchiveError, match=name.rpartition(".")[2]) as error:
        import_archive(path, hparams(), out=tmp_path / "out" / "a.safetensors", base=gpt2)
    assert "nothing of it was run" in str(error.value)
    assert not mark.exists() and not (tmp_path / "out").exists()
    torch.load(path, weights_only=False)  # the control: it would run
    assert mark.is_dir()


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
    for content in (pickle.dumps(Payload(os.mkdir, str(mark))), b"", b"text", b"PK\x03\x04 cut"):
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


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2_one_sided", "t5", "bert"])
def test_the_reference_archives_come_back_as_they_were(name):
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference vectors at {REFERENCE}")
    record = Recording(REFERENCE / name)
    state = read_foreign(REFERENCE / name / "archive.pt").state
    back = to_foreign(from_foreign(state, record.base.sites, record.hparams))
    assert list(back) == list(state)
    assert all(torch.equal(back[n], value) for n, value in state.items())


def test_a_native_archive_goes_out_and_comes_back_with_the_same_updates_bit_for_bit(gpt2, tmp_path):
    base = gpt2.with_sites(LAYERS)
    h = hparams(init="id_xavier", norm_stats="shape", z_clip=None, edit_lr=3e-3)
    mend = scrambled(with_statistics(base, MEND(base.sites, h)))
    native = save_archive(tmp_path / "native.safetensors", base, mend)
    pickled = export_archive(native, tmp_path / "archive.pt", base=gpt2)
    back = import_archive(pickled, h, out=tmp_path / "again.safetensors", base=gpt2)
    texts = [edit_tokens(base, h, example) for example in EXAMPLES]
    ours = MENDEditor(base, mend).updates(texts)
    again = MENDEditor(base, load_archive(back, base=gpt2).mend).updates(texts)
    for name, update in ours.items():
        assert torch.equal(again[name].u, update.u) and torch.equal(again[name].delta, update.delta)
        assert float(again[name].coefficient) == float(update.coefficient) < 0
    model = torch.load(pickled, weights_only=False)["model"]  # as EasyEdit reads it
    assert type(model["model_config"]).__name__ == "GPT2Config"
    assert (model["edit_lrs"] < 0).all()  # published code adds


CANNOT = {"z_clip": 10.0, "whiten": 0.1, "norm_stats": "layer", "edit_tokens": "scored"}


@pytest.mark.parametrize("change", [{key: value} for key, value in CANNOT.items()], ids=str)
def test_what_the_published_format_cannot_say_is_refused(gpt2, tmp_path, change):
    base = gpt2.with_sites(LAYERS)
    mend = MEND(base.sites, hparams(**{"norm_stats": "shape", "z_clip": None} | change))
    native = save_archive(tmp_path / "a.safetensors", base, mend)
    with pytest.raises(ArchiveError, match=f"cannot say {next(iter(change))}"):
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
        ({"n_hidden": 0}, r"layers\.1\.\w+ is no layer's"),
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

    torch.save({"model": Payload(os.mkdir, "ran")}, "hostile.pt")
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
