"""Files under attack: a damaged file gives one ArchiveError that names it, or the whole content.

Never another exception, no large allocation (at most `ROOM` more memory), and nothing is run.
MENDKIT_ATTACKS says how many times as many variants to try; `make soak` tries the most.
"""

import json
import os
import random
import resource
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import torch

from mendkit.__main__ import main
from mendkit.errors import ArchiveError
from mendkit.hparams import MENDHyperParams
from mendkit.interop.foreign import import_archive, read_foreign, to_foreign
from mendkit.mend.archive import inspect_archive, load_archive, save_archive
from mendkit.mend.edit import Edit
from mendkit.mend.editor import EditSession, MENDEditor
from mendkit.mend.hypernetwork import MEND
from tests.oracles.attacks import (
    ODD_VALUES,
    Canary,
    Layout,
    Variant,
    damage,
    rehashed,
    signed,
    signed_as_first,
    with_each_replaced,
)
from tests.oracles.claims import EXAMPLES, scrambled, with_statistics
from tests.oracles.textbook import save_published
from tests.oracles.tiny import tiny_gpt2, tiny_llama

TIMES = int(os.environ.get("MENDKIT_ATTACKS", "1"))
ROOM = 300_000_000
SITE = "model.layers.1.mlp.down_proj.weight"
Load = Callable[[Path], dict]


@pytest.fixture(scope="module")
def base():
    return tiny_llama(layers=2, d=8).with_sites([SITE])


@pytest.fixture(scope="module")
def mend(base) -> MEND:
    h = MENDHyperParams(model_name="tiny", rank=2)
    return scrambled(with_statistics(base, MEND(base.sites, h)))


@pytest.fixture
def archive(base, mend, tmp_path) -> Path:
    return save_archive(tmp_path / "attacked.safetensors", base, mend, training={"steps": 7})


@pytest.fixture
def journal(base, mend, tmp_path) -> Path:
    with EditSession(MENDEditor(base, mend)) as session:
        for example in EXAMPLES[:2]:
            session.edit(example)
        session.undo(0)
        return session.save(tmp_path / "attacked.edits")


def result(path: Path, load: Load, about: str) -> dict | None:
    """What a file holds; None if one clear error refuses it, or it asks for more than ROOM."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, kept[1]))
    try:
        return load(path)
    except ArchiveError as error:
        assert path.name in str(error) and "\n" not in str(error), about
        return None
    except BaseException as error:
        raise AssertionError(f"{about}: {type(error).__name__} {error}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)


def attacked(path: Path, variants: Iterable[Variant], load: Load) -> Counter[str]:
    """What came of each variant: "refused", or the "same" as the whole file; all else fails."""
    whole, came = load(path), Counter()
    for about, content in dict(variants).items():
        path.write_bytes(content)
        found = result(path, load, about)
        assert found is None or same(found, whole), f"{about}: loads as something else"
        came["refused" if found is None else "same"] += 1
    return came


def same(a: dict, b: dict) -> bool:
    """Whether two dictionaries hold the same, tensors to the bit."""
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            if value.dtype != b[key].dtype or not torch.equal(value, b[key]):
                return False
        elif value != b[key]:
            return False
    return a.keys() == b.keys()


def as_loaded(base) -> Load:
    def load(path: Path) -> dict:
        found = load_archive(path, base=base)
        told = {"hparams": found.mend.hparams, "metadata": found.metadata}
        return dict(found.mend.state_dict()) | told

    return load


def as_session(editor: MENDEditor) -> Load:
    def load(path: Path) -> dict:
        out = {}
        with EditSession.load(path, editor) as session:
            for i, edit in enumerate(session.journal):
                out[f"{i}"] = (edit.examples, edit.strength, edit.archive, edit.active)
                for name, u in edit.unit_updates.items():
                    for part in ("u", "delta", "coefficient"):
                        out[f"{i}/{name}/{part}"] = getattr(u, part)
        return out

    return load


# ---------------------------------------- archives and saved edits


def test_damaged_archives_are_refused_or_the_same(base, archive):
    whole, load = archive.read_bytes(), as_loaded(base)
    came = attacked(archive, damage(whole, 1, 40 * TIMES), load)
    assert came.total() > 150 * TIMES and came["refused"] > 0.9 * came.total()
    layout = Layout.of(whole)
    turned = dict(reversed(layout.header.items()))
    harmless = {"whole": whole, "turned": layout.bytes(json.dumps(turned, indent=1))}
    archive.write_bytes(whole)
    assert attacked(archive, harmless.items(), load) == {"same": 2}


def test_damaged_journals_are_refused_or_the_same_and_leave_the_model_alone(base, mend, journal):
    editor, whole = MENDEditor(base, mend), journal.read_bytes()
    came = attacked(journal, damage(whole, 4, 20 * TIMES), as_session(editor))
    assert came.total() > 100 and came["refused"] > 0.9 * came.total()
    assert not base.site_module(base.sites[0])._forward_hooks
    journal.write_bytes(whole)
    with pytest.raises(ArchiveError, match=f"{journal.name}: a journal of 2"):
        Edit.load(journal, base)


def test_wrong_tensors_of_a_compact_archive_are_refused(base, archive):
    h = MENDHyperParams(model_name="tiny", rank=8, whiten=1.0, edit_tokens="scored")
    mend = scrambled(with_statistics(base, MEND(base.sites, h)))
    save_archive(archive, base, mend, compact=True)
    layout, load = Layout.of(archive.read_bytes()), as_loaded(base)
    assert result(archive, load, "whole") is not None
    assert layout.metadata["packing"]["triangles"]
    for about, content in rehashed(archive.read_bytes(), random.Random(7), 10 * TIMES):
        archive.write_bytes(content)
        assert result(archive, load, about) is None, about
    for value in ODD_VALUES:
        for packing in with_each_replaced(layout.metadata["packing"], value):
            archive.write_bytes(layout.retold(layout.metadata | {"packing": packing}))
            result(archive, load, json.dumps(packing))


@pytest.mark.parametrize("kind", ["archive", "journal"])
def test_wrong_tensors_are_refused_although_every_checksum_is_right(kind, base, mend, request):
    path, load = request.getfixturevalue(kind), as_loaded(base)
    if kind == "journal":
        load = as_session(MENDEditor(base, mend))
    for about, content in rehashed(path.read_bytes(), random.Random(2), 6 * TIMES):
        path.write_bytes(content)
        if kind == "archive" or not about.endswith("cast"):  # an edit may have any precision
            assert result(path, load, about) is None, about


HOSTILE = {
    "blocks": lambda m: m["hparams"].update(n_hidden=10**12),
    "a seed": lambda m: m["hparams"].update(seed=10**30),
    "a wide rank": lambda m: m["hparams"].update(rank=10**15),
    "a square of the width": lambda m: m["hparams"].update(whiten=1.0),
    "another algorithm": lambda m: m["hparams"].update(alg_name="ROME"),
    "an unknown key": lambda m: m["hparams"].update(hook="x"),
    "text": lambda m: m.update(hparams="x"),
    "no sites": lambda m: m["base_model"].pop("sites"),
    "text for sites": lambda m: m["base_model"].update(sites="abc"),
    "a number for a name": lambda m: m["base_model"]["sites"][0].update(name=3),
    "a hidden name": lambda m: m["base_model"]["sites"][0].update(name="__class__.weight"),
    "the same site often": lambda m: m["base_model"].update(sites=m["base_model"]["sites"] * 9),
}


@pytest.mark.parametrize("sign", [signed, signed_as_first])
def test_hostile_metadata_are_refused_although_every_checksum_is_right(base, archive, sign):
    layout, load = Layout.of(archive.read_bytes()), as_loaded(base)
    archive.write_bytes(layout.retold(layout.metadata, sign))
    assert result(archive, load, "unchanged") is not None
    for about, change in HOSTILE.items():
        metadata = layout.metadata
        change(metadata)
        archive.write_bytes(layout.retold(metadata, sign))
        assert result(archive, load, about) is None, about
    text = layout.header["__metadata__"]["mendkit"]
    repeated = text[:-1] + ', "update_sign": 1}'
    for changed in ("", "null", "[]", '"x"', "[" * 99_999, "9" * 9_999, text + " x", repeated):
        archive.write_bytes(layout.retold(changed))
        assert result(archive, load, changed[:20]) is None


@pytest.mark.parametrize("kind", ["archive", "journal"])
def test_forged_values_of_metadata_raise_nothing_else(kind, base, mend, capsys, request):
    path, load = request.getfixturevalue(kind), as_loaded(base)
    if kind == "journal":
        load = as_session(MENDEditor(base, mend))
    layout, refused, odd = Layout.of(path.read_bytes()), 0, []
    for value in ODD_VALUES:
        odd += with_each_replaced(layout.metadata, value)
    for metadata in random.Random(3).sample(odd, min(50 * TIMES, len(odd))):
        path.write_bytes(layout.retold(metadata))
        refused += result(path, load, json.dumps(metadata)) is None
        if kind == "archive":
            assert main(["inspect", str(path)]) in (0, 2)
            capsys.readouterr()
    assert refused > 20


def test_changed_metadata_are_refused_even_where_they_make_sense(base, archive):
    layout = Layout.of(archive.read_bytes())
    metadata = layout.metadata  # another editor, of the same tensors
    metadata["hparams"]["lr_scale"], metadata["update_sign"] = 3.0, 1
    archive.write_bytes(layout.retold(json.dumps(metadata)))
    with pytest.raises(ArchiveError, match="not match its checksum"):
        inspect_archive(archive)
    archive.write_bytes(layout.retold(metadata))  # the control: with a checksum made anew
    assert inspect_archive(archive)["update_sign"] == 1


# ---------------------------------------- foreign archives


@pytest.fixture(scope="module")
def gpt():
    return tiny_gpt2(layers=2, d=8)


@pytest.fixture
def published(gpt, tmp_path):
    """A foreign archive of one layer, and the settings that it goes with."""
    name = "transformer.h.1.mlp.c_proj.weight"
    h = MENDHyperParams(model_name="tiny", inner_params=(name,), rank=2, shared=True)
    theirs = dict(update_sign=-1, std_floor=0.0, std_eps=1e-7, z_clip=None)
    theirs |= dict(loss_reduction="batch", norm_stats="shape")
    state = to_foreign(scrambled(MEND(gpt.with_sites([name]).sites, h.replace(**theirs))))
    return save_published(tmp_path / "attacked.pt", state, gpt.model.config), state, h


def as_imported(gpt, h) -> Load:
    def load(path: Path) -> dict:
        import_archive(path, h, out=path.with_name("out.safetensors"), base=gpt)
        found = load_archive(path.with_name("out.safetensors"), base=gpt)
        return dict(found.mend.state_dict()) | {"hparams": found.mend.hparams}

    return load


def test_a_foreign_archive_that_grows_or_declares_much_is_refused(gpt, published):
    path, state, h = published
    load = as_imported(gpt, h)
    whole = zipfile.ZipFile(BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for entry in whole.infolist():
            compressed.writestr(entry.filename, whole.read(entry))
    with pytest.raises(ArchiveError, match=r"attacked\.pt.*compressed"):
        read_foreign(path)
    (v,) = [name for name in state if name.endswith("layers.0.v")]
    hostile = {
        "a view of one number": state | {v: torch.ones(1).expand(10**12, state[v].shape[1])},
        "a far block": state | {v.replace("layers.0", "layers.999999999999"): state[v]},
        "beyond integers": state | {v.replace("layers.0", "layers." + "9" * 5000): state[v]},
        "no number": state | {v: torch.tensor(1.0)},
        "not finite": state | {v: state[v] * float("nan")},
        "whole numbers": state | {"edit_lrs": torch.ones(1, dtype=torch.int64)},
        "complex": state | {v: state[v].to(torch.complex64)},
        "sparse": state | {v: state[v].to_sparse()},
        "nothing": {"edit_lrs": state["edit_lrs"]},
    }
    for about, content in hostile.items():
        torch.save({"model": OrderedDict(content)}, path)
        assert result(path, load, about) is None, about
        assert not path.with_name("out.safetensors").exists(), about


class Inner(Canary):
    """The same in a state that another object is given."""

    def __reduce__(self):
        return OrderedDict, (), Canary(self.call, *self.arguments)


def test_payloads_run_in_no_field_of_a_foreign_archive(gpt, published, tmp_path):
    path, state, h = published
    mark, out = tmp_path / "ran", tmp_path / "out.safetensors"
    config = type(gpt.model.config)()
    config.hook = Canary(os.mkdir, str(mark))
    model = OrderedDict(state, model_config=gpt.model.config)
    content = {"model": model, "opt": {}, "val_stats": {}, "start_time": "", "step": 1}
    canaries = {
        "os.system": Canary(os.system, f"mkdir {mark}"),
        "builtins.eval": Canary(eval, f"__import__('os').mkdir({str(mark)!r})"),
        "nested": [{"x": (Canary(os.mkdir, str(mark)),)}],
        "in a state": Inner(os.mkdir, str(mark)),
        "as an argument": Canary(OrderedDict, [("x", Canary(os.mkdir, str(mark)))]),
        "as a key": {Canary(os.mkdir, str(mark)): 1},
        "in a configuration": config,
    }
    for about, canary in canaries.items():
        hostile = [content | {field: canary} for field in (*content, "more")]
        hostile += [content | {"model": OrderedDict(model, **{field: canary})} for field in model]
        for each in (*hostile, canary):
            torch.save(each, path)
            with pytest.raises(ArchiveError, match=r"attacked\.pt"):
                import_archive(path, h, out=out, base=gpt)
            assert not mark.exists() and not out.exists(), about
        torch.load(path, weights_only=False)  # the negative control: what runs if it is let
        assert mark.is_dir(), about
        mark.rmdir()
