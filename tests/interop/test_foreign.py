"""Archives of published code: nothing in them runs, and what they held comes through bit for bit (CORRECTNESS 23)."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mendkit.__main__ import main
from mendkit.errors import ArchiveError
from mendkit.evaluation.evaluate import evaluate
from mendkit.hparams import MENDHyperParams
from mendkit.interop.conformance import load_reference_model
from mendkit.interop.foreign import (
    export_archive,
    foreign_hparams,
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
from mendkit.mend.training import train
from mendkit.models.base import BaseModel
from mendkit.models.sites import Site
from mendkit.models.trunk import FrozenTrunk
from mendkit.reporting import tables
from tests.interop.test_conformance import FOLDERS, NAMES, REFERENCE, SHAPES, settings
from tests.oracles.claims import EXAMPLES, scrambled, with_statistics
from tests.oracles.textbook import Editor, Textbook, as_float32, every_option, label, save_published
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama

OPTIONS = settings("combine", shared=True, norm=True, n_hidden=1, init="id", rank=6)


def hparams(names, **changes) -> MENDHyperParams:
    return MENDHyperParams(model_name="tiny", inner_params=tuple(names), **(OPTIONS | changes))


@pytest.fixture
def published(gpt2, tmp_path):
    """An archive in the published form for the tiny GPT-2, its statistics those of real factors; and its oracle."""
    editor = Editor(gpt2.model, NAMES["gpt2"], OPTIONS)
    base, h = gpt2.with_sites(NAMES["gpt2"]), hparams(NAMES["gpt2"])
    for example in EXAMPLES:
        factors = capture_factors(FrozenTrunk(base), [edit_tokens(base, h, example)])
        for name in NAMES["gpt2"]:
            editor.book.observe(
                name, list(zip(factors[name].u.double(), factors[name].delta.double(), strict=True))
            )
    state = as_float32(editor.book.state)
    editor.book.state = OrderedDict((name, value.double()) for name, value in state.items())
    return save_published(tmp_path / "archive.pt", state, gpt2.model.config), editor.book


# --------------------------------------------------------------------------------------------- nothing is run


class Payload:
    """What a hostile archive holds: unpickling it makes a folder."""

    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


PAYLOADS = {
    "posix.mkdir": lambda mark: Payload(os.mkdir, mark),
    "posix.system": lambda mark: Payload(os.system, f"mkdir {mark}"),
    "subprocess.check_call": lambda mark: Payload(subprocess.check_call, ["mkdir", mark]),
    "builtins.exec": lambda mark: Payload(exec, f"import os; os.mkdir({mark!r})"),
    "builtins.eval": lambda mark: Payload(eval, f"__import__('os').mkdir({mark!r})"),
    "builtins.getattr": lambda mark: Payload(getattr, os, "mkdir"),
}


@pytest.mark.parametrize("place", ["model", "model_config", "top", "opt"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_is_refused_by_name_and_does_not_run(gpt2, published, tmp_path, name, place):
    mark, path = str(tmp_path / "ran"), tmp_path / "hostile.pt"
    payload = PAYLOADS[name](mark)
    if name == "builtins.getattr":
        payload = Payload(
            getattr, "text", "upper"
        )  # a module cannot be pickled; the name is what counts
    model = OrderedDict(published[1].state, model_config=gpt2.model.config)
    content = {"model": model, "opt": {}, "lr_opt": {}, "val_stats": {}, "step": 1}
    if place in ("model", "model_config"):
        model[place] = payload
    else:
        content[place] = payload
    torch.save(content, path)
    with pytest.raises(ArchiveError, match=name.rpartition(".")[2]) as error:
        import_archive(
            path, hparams(NAMES["gpt2"]), out=tmp_path / "out" / "a.safetensors", base=gpt2
        )
    assert "nothing of it was run" in str(error.value)
    assert not Path(mark).exists() and not (tmp_path / "out").exists()


def test_the_payloads_of_these_tests_would_run(tmp_path):
    for name in (
        "posix.mkdir",
        "posix.system",
        "subprocess.check_call",
        "builtins.exec",
        "builtins.eval",
    ):
        mark = tmp_path / name
        torch.save({"model": PAYLOADS[name](str(mark))}, tmp_path / "hostile.pt")
        torch.load(tmp_path / "hostile.pt", weights_only=False)
        assert mark.is_dir(), name


@pytest.mark.parametrize(
    "name",
    ["transformers.Trainer", "os.systemConfig", "transformers.x.XConfig.y", "torch.hub.load"],
)
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
    torch.save({"model": {"edit_lrs": torch.ones(1)}}, path)
    with pytest.raises(ArchiveError, match="no transforms"):
        foreign_hparams(read_foreign(path).state, (), hparams(["a.weight"]))
    with pytest.raises(ArchiveError, match="no such file"):
        read_foreign(tmp_path / "none.pt")
    assert not mark.exists()


def test_default_dictionaries_and_configurations_are_inert(gpt2, published, tmp_path):
    content = {"model": OrderedDict(published[1].state, model_config=gpt2.model.config)}
    content["val_stats"] = defaultdict(list, {"loss": [1.0]})
    torch.save(content, tmp_path / "a.pt")
    foreign = read_foreign(tmp_path / "a.pt")
    assert (
        foreign.config_class == "GPT2Config"
        and foreign.config["n_layer"] == gpt2.model.config.n_layer
    )
    assert set(foreign.state) == set(published[1].state) and foreign.step is None


def test_a_configuration_is_never_the_live_class(published, tmp_path, monkeypatch):
    mark, module = tmp_path / "ran", "transformers.models.gone.configuration_gone"

    class GoneConfig:
        def __setstate__(self, state):
            mark.mkdir()

    GoneConfig.__module__, GoneConfig.__qualname__ = module, "GoneConfig"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(GoneConfig=GoneConfig))
    config = GoneConfig()
    config.n_layer = 7
    save_published(tmp_path / "a.pt", published[1].state, config)
    assert read_foreign(tmp_path / "a.pt").config == {"n_layer": 7} and not mark.exists()
    monkeypatch.delitem(
        sys.modules, module
    )  # a model that this version of transformers no longer has
    assert read_foreign(tmp_path / "a.pt").config_class == "GoneConfig"


# ----------------------------------------------------------------------------------------------------- import


def test_an_imported_archive_edits_as_the_textbook_alone_and_several_at_once(
    gpt2, published, tmp_path
):
    path, book = published
    h = hparams(NAMES["gpt2"], add_eos=False)
    archive = load_archive(
        import_archive(path, h, out=tmp_path / "a.safetensors", base=gpt2), base=gpt2
    )
    editor = MENDEditor(archive.base, archive.mend)
    for examples in (EXAMPLES[:1], EXAMPLES[2:3], EXAMPLES):
        texts = [editor.tokens(example) for example in examples]
        total = sum(len(text.targets) for text in texts)
        parts = [capture_factors(FrozenTrunk(archive.base), [text]) for text in texts]
        rows = {
            name: [
                torch.cat([part[name].u for part in parts]).double(),
                torch.cat(
                    [
                        p[name].delta * (len(t.targets) / total)
                        for p, t in zip(parts, texts, strict=True)
                    ]
                ).double(),
            ]
            for name in NAMES["gpt2"]
        }
        expected, dense = book.update(rows), editor.edit(list(examples)).dense()
        for name, value in expected.items():  # Conv1D: the weight is (d_in, d_out)
            torch.testing.assert_close(
                dense[name].double(), value.T, rtol=1e-4, atol=1e-5 * float(value.abs().max())
            )


def test_an_update_is_subtracted_and_a_step_size_keeps_its_sign(gpt2, published, tmp_path):
    path, book = published
    archive = load_archive(
        import_archive(path, hparams(NAMES["gpt2"]), out=tmp_path / "a", base=gpt2), base=gpt2
    )
    assert archive.metadata["update_sign"] == -1 and archive.metadata["loss_reduction"].endswith(
        "made at once"
    )
    lrs = dict(zip(NAMES["gpt2"], (-book.state["edit_lrs"]).tolist(), strict=True))
    assert archive.mend.edit_lrs == lrs and {lr > 0 for lr in lrs.values()} == {True, False}


@pytest.mark.parametrize("options", list(every_option()), ids=label)
def test_there_and_back_keeps_every_bit(options, tmp_path):
    book = Textbook(SHAPES, options)
    generator = torch.Generator().manual_seed(1)
    rows = {
        n: [torch.randn(7, d, generator=generator, dtype=torch.float64) for d in s]
        for n, s in SHAPES.items()
    }
    book.update(rows, training=True)
    state = as_float32(book.state)
    sites = tuple(Site(n, n[:-7], *SHAPES[n], False, None, False) for n in sorted(SHAPES))
    h = MENDHyperParams(model_name="tiny", inner_params=tuple(SHAPES), **options)
    back = to_foreign(from_foreign(state, sites, h))
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


@pytest.mark.parametrize("name", FOLDERS)
def test_the_reference_archives_come_back_as_they_were(name, tmp_path):
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference vectors at {REFERENCE}")
    meta = json.loads((REFERENCE / name / "meta.json").read_text())
    known = {k: v for k, v in meta["hparams"].items() if k in MENDHyperParams.__dataclass_fields__}
    h = MENDHyperParams(model_name="tiny", inner_params=tuple(meta["inner_params"]), **known)
    base = load_reference_model(REFERENCE / name, h.inner_params)
    state = read_foreign(REFERENCE / name / "archive.pt").state
    back = to_foreign(from_foreign(state, base.sites, h))
    assert list(back) == list(state) and all(
        torch.equal(back[n], value) for n, value in state.items()
    )


def test_a_native_archive_goes_out_and_comes_back_with_the_same_updates_bit_for_bit(gpt2, tmp_path):
    base = gpt2.with_sites(NAMES["gpt2"])
    h = hparams(NAMES["gpt2"], init="id_xavier", norm_stats="shape", z_clip=None, edit_lr=3e-3)
    mend = scrambled(with_statistics(base, MEND(base.sites, h)))
    native = save_archive(tmp_path / "native.safetensors", base, mend)
    pickled = export_archive(native, tmp_path / "archive.pt", base=gpt2)
    archive = load_archive(
        import_archive(pickled, h, out=tmp_path / "again.safetensors", base=gpt2), base=gpt2
    )
    texts = [edit_tokens(base, h, example) for example in EXAMPLES]
    ours, again = (MENDEditor(base, m).updates(texts) for m in (mend, archive.mend))
    for name, update in ours.items():
        for kind in ("u", "delta"):
            torch.testing.assert_close(
                getattr(again[name], kind), getattr(update, kind), rtol=0, atol=0
            )
        assert float(again[name].coefficient) == float(update.coefficient) < 0
    content = torch.load(pickled, weights_only=False)  # our own file, as EasyEdit reads it
    assert type(content["model"]["model_config"]).__name__ == "GPT2Config"
    tensors = [
        torch.nn.Parameter(v)
        for k, v in content["model"].items()
        if ".layers." in k or k == "edit_lrs"
    ]
    torch.optim.Adam(tensors).load_state_dict(content["opt"])
    assert (content["model"]["edit_lrs"] < 0).all()  # published code adds


@pytest.mark.parametrize(
    "change",
    [{"z_clip": 10.0}, {"whiten": 0.1}, {"norm_stats": "layer"}, {"edit_tokens": "scored"}],
    ids=str,
)
def test_what_the_published_format_cannot_say_is_refused(gpt2, tmp_path, change):
    base = gpt2.with_sites(NAMES["gpt2"])
    mend = MEND(
        base.sites, hparams(NAMES["gpt2"], **({"norm_stats": "shape", "z_clip": None} | change))
    )
    native = save_archive(tmp_path / "a.safetensors", base, mend)
    with pytest.raises(ArchiveError, match=f"cannot say {next(iter(change))}"):
        export_archive(native, tmp_path / "archive.pt", base=gpt2)
    assert not (tmp_path / "archive.pt").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (NAMES["gpt2"][:2], "transforms|edit_lrs"),
        ((*NAMES["gpt2"], "transformer.h.0.mlp.c_fc.weight"), "edit_lrs has shape"),
        (
            ("transformer.h.1.attn.c_attn.weight", *NAMES["gpt2"][1:]),
            "are not those of the 4 layers",
        ),
    ],
)
def test_other_layers_than_the_archives_are_refused(gpt2, published, tmp_path, names, words):
    with pytest.raises(ArchiveError, match=words):
        import_archive(published[0], hparams(names), out=tmp_path / "a.safetensors", base=gpt2)
    with pytest.raises(ArchiveError, match="`auto` does not tell"):
        import_archive(
            published[0],
            hparams(names).replace(inner_params="auto"),
            out=tmp_path / "a.safetensors",
            base=gpt2,
        )
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny_llama(), "GPT2Config, here LlamaConfig"),
        (lambda: tiny_gpt2(layers=5), "n_layer"),
    ],
)
def test_another_base_model_is_refused(published, tmp_path, other, words):
    base: BaseModel = other()
    names = NAMES["llama" if "Llama" in words else "gpt2"]
    with pytest.raises(ArchiveError, match=words):
        import_archive(published[0], hparams(names), out=tmp_path / "a.safetensors", base=base)


def test_a_std_that_does_not_follow_from_its_sum_has_the_last_word(published):
    state, names = dict(published[1].state), [n for n in published[1].state if n.endswith("u_std")]
    state |= {name: state[name] * 2 for name in names}
    sites = tuple(
        Site(n, n[:-7], *published[1].shapes[n], True, None, False) for n in NAMES["gpt2"]
    )
    mend = from_foreign(state, sites, hparams(NAMES["gpt2"]))
    moments = mend.moments["{}x{}".format(*published[1].shapes[NAMES["gpt2"][0]])]["u"]
    name = published[1].prefix(NAMES["gpt2"][0])
    x = torch.randn(3, len(moments.mean), dtype=torch.float64)
    expected = (x - state[f"{name}u_mean"]) / (state[f"{name}u_std"] + 1e-7)
    torch.testing.assert_close(moments.normalise(x, floor=0.0, clip=None), expected)


def test_the_archive_decides_what_its_tensors_show(published):
    sites = tuple(
        Site(n, n[:-7], *published[1].shapes[n], True, None, False) for n in NAMES["gpt2"]
    )
    h = foreign_hparams(
        published[1].state, sites, hparams(NAMES["gpt2"], rank=99, n_hidden=4, shared=False)
    )
    assert (h.rank, h.n_hidden, h.shared, h.combine, h.norm_stats) == (6, 1, True, True, "shape")


# ----------------------------------------------------------------------------------- like a native one, and CLI


def test_an_imported_archive_trains_on_and_is_scored_like_a_native_one(gpt2, published, tmp_path):
    h = hparams(
        NAMES["gpt2"],
        max_iters=2,
        val_interval=1,
        batch_size=2,
        log_interval=1,
        warmup_iters=0,
        lr=1e-3,
    )
    path = import_archive(published[0], h, out=tmp_path / "a.safetensors", base=gpt2)
    before = load_archive(path, base=gpt2).mend
    again = train(
        h.replace(archive=str(path)), EXAMPLES, EXAMPLES[:1], base=gpt2, run_dir=tmp_path / "run"
    ).archive
    after = load_archive(again, base=gpt2)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before.parameters(), after.mend.parameters(), strict=True)
    )
    assert [v > 0 for v in after.mend.edit_lrs.values()] == [
        v > 0 for v in before.edit_lrs.values()
    ]
    for name in ("std_eps", "std_floor", "z_clip", "loss_reduction", "norm_stats"):
        assert getattr(after.mend.hparams, name) == getattr(before.hparams, name)
    assert (
        torch.equal(after.mend.edit_lr_unit, before.edit_lr_unit)
        and inspect_archive(again)["base_model"]["sites"]
    )
    report = evaluate(MENDEditor(after.base, after.mend), EXAMPLES[:2], max_new_tokens=3)
    assert report.summary["edit_success.free_exact"].n == 2
    told = str(list(tables.archive(inspect_archive(path)).data["value"]))
    assert "-" in told and "12" in told


def test_a_session_edits_the_edited_model(gpt2, published, tmp_path):
    path = import_archive(
        published[0], hparams(NAMES["gpt2"]), out=tmp_path / "a.safetensors", base=gpt2
    )
    archive = load_archive(path, base=gpt2)
    editor = MENDEditor(archive.base, archive.mend)
    alone = editor.edit(EXAMPLES[1]).dense()
    with editor.session() as session:
        session.edit(EXAMPLES[0])
        second = session.edit(EXAMPLES[1]).dense()
    assert all(not torch.equal(alone[name], second[name]) for name in alone)
    assert all(torch.equal(v, editor.edit(EXAMPLES[1]).dense()[name]) for name, v in alone.items())


@pytest.fixture
def here(gpt2, published, tmp_path, monkeypatch) -> Path:
    """A working directory with a model, its configuration file and a published archive."""
    monkeypatch.chdir(tmp_path)
    save_tiny("model", gpt2)
    sites = "\n".join(f"- {name}" for name in NAMES["gpt2"])
    text = f"alg_name: MEND\nmodel_name: model\nrank: 6\ninit: id\nn_hidden: 1\ninner_params:\n{sites}\n"
    Path("gpt2.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_commands_import_edit_inspect_and_export(here, capsys):
    assert main(["import", "archive.pt", "gpt2.yaml", "--out", "imported"]) == 0
    path = capsys.readouterr().out.strip()
    assert path == "imported/archive.safetensors"
    assert json.loads(Path("imported/results.json").read_text())["import.from"] == "archive.pt"
    assert inspect_archive(path)["training"] == {
        "imported_from": "archive.pt",
        "best": {"step": 12},
    }
    assert main(["inspect", path]) == 0 and "made at once" in capsys.readouterr().out
    edit = ["--prompt", "The capital of France is", "--target", "Lima", "--max-new-tokens", "3"]
    assert main(["edit", "gpt2.yaml", f"archive={path}", *edit]) == 0
    capsys.readouterr()
    assert main(["export", path, "gpt2.yaml", "--out", "exported", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["export.archive"] == "exported/archive.pt"
    first, again = (read_foreign(name).state for name in ("archive.pt", "exported/archive.pt"))
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_the_commands_write_over_nothing_and_say_what_is_wrong(here, capsys):
    Path("run").mkdir()
    for name in ("archive.safetensors", "archive.pt"):
        (Path("run") / name).write_text("precious")
    torch.save({"model": Payload(os.mkdir, "ran")}, "hostile.pt")
    wrong = {
        "import archive.pt gpt2.yaml --out run": "run holds archive.safetensors",
        "export run/archive.safetensors gpt2.yaml --out run": "run holds archive.pt",
        "export archive.pt gpt2.yaml --out new": "not a readable archive",
        "import nowhere.pt gpt2.yaml --out new": "no such file",
        "evaluate gpt2.yaml archive=archive.pt": "python -m mendkit import",
        "import hostile.pt gpt2.yaml --out run --overwrite": "posix.mkdir",
        "import archive.pt gpt2.yaml inner_params=auto --out run --overwrite": "auto",
        "import archive.pt nowhere.yaml --out new": "cannot be read",
    }
    for typed, words in wrong.items():
        assert main(typed.split()) == 2, typed
        said = capsys.readouterr()
        assert said.out == "" and words in said.err.splitlines()[-1], typed
    assert not Path("ran").exists() and not Path("new").exists()
    assert all(
        (Path("run") / name).read_text() == "precious"
        for name in ("archive.safetensors", "archive.pt")
    )
    assert main(["import", "archive.pt", "gpt2.yaml", "--out", "run", "--overwrite"]) == 0
    assert inspect_archive("run/archive.safetensors")["update_sign"] == -1
