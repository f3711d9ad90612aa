"""Conformance with recorded numbers: the reference folders where they are, and folders of our own everywhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config, T5ForConditionalGeneration

from mendkit.__main__ import main
from mendkit.errors import DataError, ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.interop.conformance import (
    MISS,
    ROUNDING,
    Check,
    OneLogitClassifier,
    conformance,
    conformance_table,
)
from mendkit.interop.foreign import from_foreign
from mendkit.mend.factors import GradientFactors
from mendkit.models.sites import Site
from tests.oracles.textbook import (
    Classifier,
    Editor,
    Seq2Seq,
    Textbook,
    every_option,
    label,
    record,
    save_published,
)
from tests.oracles.tiny import tiny_gpt2, tiny_llama

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
FOLDERS = ("gpt2", "llama", "gpt2_one_sided", "t5", "bert")
CASES = [  # option combinations, simultaneous edits: each value of each option, each with each way of combining
    ("gpt2", dict(shared=True, way="combine", norm=True, n_hidden=1, init="id", rank=3), 5),
    ("llama", dict(shared=True, way="apart", norm=True, n_hidden=0, init="xavier", rank=None), 4),
    ("gpt2", dict(shared=False, way="one_sided", norm=True, n_hidden=2, init="id", rank=3), 1),
    ("llama", dict(shared=True, way="one_sided", norm=False, n_hidden=1, init="xavier", rank=3), 2),
    ("gpt2", dict(shared=True, way="x_only", norm=True, n_hidden=1, init="id", rank=None), 3),
    ("llama", dict(shared=False, way="x_only", norm=False, n_hidden=0, init="id", rank=3), 2),
    ("gpt2", dict(shared=False, way="delta_only", norm=True, n_hidden=2, init="xavier", rank=3), 3),
    ("llama", dict(shared=True, way="delta_only", norm=True, n_hidden=1, init="id", rank=None), 5),
    (
        "llama",
        dict(shared=False, way="combine", norm=False, n_hidden=2, init="xavier", rank=None),
        1,
    ),
    ("t5", dict(shared=True, way="combine", norm=True, n_hidden=1, init="id", rank=3), 3),
    ("t5", dict(shared=False, way="one_sided", norm=True, n_hidden=0, init="xavier", rank=None), 1),
    ("bert", dict(shared=True, way="apart", norm=True, n_hidden=1, init="id", rank=None), 5),
    ("bert", dict(shared=False, way="x_only", norm=False, n_hidden=2, init="id", rank=3), 2),
]
NAMES = {
    "gpt2": tuple(f"transformer.h.{i}.mlp.{n}.weight" for i in (2, 1) for n in ("c_proj", "c_fc")),
    "llama": tuple(
        f"model.layers.{i}.mlp.{n}_proj.weight" for i in (2, 1) for n in ("up", "down", "gate")
    ),
    "t5": tuple(
        f"{side}.block.2.layer.{i}.DenseReluDense.{n}.weight"
        for side, i in (("decoder", 2), ("encoder", 1))
        for n in ("wo", "wi_1", "wi_0")
    ),
    "bert": tuple(
        f"model.encoder.layer.{i}.{n}.dense.weight"
        for i in (2, 1)
        for n in ("output", "intermediate")
    ),
}  # not in the model's own order


def settings(way: str, **others) -> dict:
    return others | {key: key == way for key in ("combine", "one_sided", "x_only", "delta_only")}


def made(folder: Path, family: str, options: dict, n_edits: int) -> Path:
    editor = {"t5": Seq2Seq, "bert": Classifier}.get(family, Editor)
    build = {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5, "bert": tiny_bert}[family]
    model = (
        build() if family in ("t5", "bert") else build(dtype=torch.float64, layers=3, d=16).model
    )
    return record(folder, editor(model, NAMES[family], settings(**options)), n_edits=n_edits)


def tiny_t5():
    """A random T5 with gated feed-forward layers, in float64."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=60,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    config = T5Config(
        **sizes,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).double().eval().requires_grad_(False)


def tiny_bert():
    """A random BERT encoder with one logit, in float64."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
    )
    config = BertConfig(
        **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2
    )
    return OneLogitClassifier(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """One folder of our own, to be spoilt in copies."""
    return made(tmp_path_factory.mktemp("own") / "gpt2", *CASES[0])


# ----------------------------------------------------------------------------------------------- it conforms


@pytest.mark.parametrize("name", FOLDERS)
def test_the_recorded_numbers_of_the_published_code(name):
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference vectors at {REFERENCE}")
    checks = conformance(REFERENCE / name)
    assert len(checks) == 15 and [check for check in checks if not check.passed] == []
    assert sum(check.verdict == "" for check in checks) >= 12


@pytest.mark.parametrize(("family", "options", "n_edits"), CASES)
def test_a_plain_loop_in_float64_with_the_options_of_the_published_code(
    family, options, n_edits, tmp_path
):
    checks = conformance(made(tmp_path / "own", family, options, n_edits))
    assert len(checks) == 15 and max(check.error for check in checks) < 1e-8, conformance_table(
        {"own": checks}
    )


def test_a_record_in_float32_tells_its_rounding(own, tmp_path):
    shutil.copytree(own, tmp_path / "single")
    for name in ("base_model.safetensors", "vectors.safetensors"):
        tensors = load_file(own / name)
        single = {k: v.float() if v.dtype == torch.float64 else v for k, v in tensors.items()}
        save_file(single, tmp_path / "single" / name)
    state = {k.removeprefix("final/"): v for k, v in single.items() if k.startswith("final/")}
    save_published(tmp_path / "single" / "archive.pt", state, tiny_gpt2().model.config)
    checks = conformance(tmp_path / "single")
    assert all(check.passed for check in checks)
    assert all(1e-9 < check.rounding < 1e-3 for check in checks if check.name != "archive")


SHAPES = {"b.weight": (4, 6), "a.weight": (4, 6), "c.weight": (6, 4), "d.weight": (5, 5)}


@pytest.mark.parametrize("options", list(every_option()), ids=label)
def test_the_hypernetwork_is_the_textbooks_for_every_combination_of_options(options):
    book = Textbook(SHAPES, options)
    sites = tuple(
        Site(n, n[:-7], *SHAPES[n], False, None, False) for n in sorted(SHAPES)
    )  # a, b, c, d
    h = MENDHyperParams(model_name="tiny", inner_params=tuple(SHAPES), **options)
    mend = from_foreign(book.state, sites, h)
    generator = torch.Generator().manual_seed(1)
    for training in (True, True, False):
        rows = {
            n: [torch.randn(7, d, generator=generator, dtype=torch.float64) for d in s]
            for n, s in SHAPES.items()
        }
        expected = book.update(rows, training=training)
        factors = {
            n: GradientFactors(*pair, torch.tensor([0, 0, 0, 1, 1, 1, 1]))
            for n, pair in rows.items()
        }
        updates = mend(factors, 2, gather=tuple(SHAPES) if training else ())
        for name, value in expected.items():
            torch.testing.assert_close(updates[name].dense(), value, rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------------------- and it notices if not


def spoilt(own: Path, folder: Path, change) -> tuple[Check, ...]:
    shutil.copytree(own, folder)
    change(folder)
    return conformance(folder)


def scale_tensors(prefix: str, factor: float):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "vectors.safetensors")
        found = [name for name in tensors if name.startswith(prefix)]
        assert found
        save_file(
            tensors | {name: tensors[name] * factor for name in found},
            folder / "vectors.safetensors",
        )

    return change


def change_meta(path: list, factor: float):
    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        at = meta
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] *= factor
        (folder / "meta.json").write_text(json.dumps(meta))

    return change


SPOILT = {
    "factors x": scale_tensors("eval/factors/transformer.h.1.mlp.c_fc.weight/x", 1.001),
    "factors delta": scale_tensors("eval/factors/transformer.h.2.mlp.c_proj.weight/delta", -1),
    "updates": scale_tensors("eval/update/transformer.h.2.mlp.c_fc.weight", 1.001),
    "second updates": scale_tensors("eval/update_second/", 1.00002),
    "pre logits outer": scale_tensors("eval/pre_logits_outer", 1.00002),
    "post logits loc": scale_tensors("eval/post_logits_loc", 1.00002),
    "scalars post": change_meta(["eval_post", "prob"], 1.00002),
    "scalars pre": change_meta(["eval_pre", "n_tokens"], 2),
    "locality KL": change_meta(["eval_kl_loc"], 1.00002),
    "training loc": change_meta(["losses", 2, "loc"], 1.0002),
    "training edit": change_meta(["losses", 0, "edit"], 1.0002),
    "training total": change_meta(["losses", 1, "total"], 1.0002),
    "archive": scale_tensors("final/edit_lrs", 1.0001),
}


@pytest.mark.parametrize("name", SPOILT)
def test_one_wrong_number_is_the_one_miss(own, tmp_path, name):
    checks = spoilt(own, tmp_path / "spoilt", SPOILT[name])
    assert [check.name for check in checks if check.verdict == MISS] == [name]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("norm", False, "updates"),
        ("init", "xavier", "updates"),
        ("inner_params", list(NAMES["gpt2"][::-1]), "updates"),
        ("cedit", 0.2, "training total"),
    ],
)
def test_another_setting_than_the_recorded_one_misses(own, tmp_path, key, value, what):
    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (meta if key in meta else meta["hparams"])[key] = value
        (folder / "meta.json").write_text(json.dumps(meta))

    assert what in [
        check.name for check in spoilt(own, tmp_path / "spoilt", change) if check.verdict == MISS
    ]


def test_rounding_excuses_little_and_never_much():
    def verdict(error: float, rounding: float) -> str:
        return Check("x", error, 1e-5, rounding, 1).verdict

    assert [verdict(9e-6, 0.0), verdict(2e-5, 1e-6), verdict(2e-5, 1e-5)] == ["", MISS, ROUNDING]
    assert [verdict(1e-4, 1e-5), verdict(2e-3, 1.0), verdict(float("nan"), 1e-5)] == [MISS] * 3


def test_what_is_no_such_folder_is_said(own, tmp_path):
    with pytest.raises(DataError, match=r"lacks config\.json, base_model"):
        conformance(tmp_path)
    shutil.copytree(own, tmp_path / "cut")
    (tmp_path / "cut" / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="hparams"):
        conformance(tmp_path / "cut")


# ----------------------------------------------------------------------------------------------- command line


def test_the_command_prints_a_table_and_its_status_tells(own, tmp_path, capsys):
    assert main(["conformance", str(own)]) == 0
    text = capsys.readouterr().out
    assert "second updates" in text and text.endswith(
        "15 comparisons: 15 within the tolerance, 0 missed\n"
    )
    shutil.copytree(own, tmp_path / "all" / "wrong")
    scale_tensors("eval/update/", 1.1)(tmp_path / "all" / "wrong")
    assert (
        main(["conformance", str(own), str(tmp_path / "all"), "--out", str(tmp_path / "run")]) == 1
    )
    assert "29 within the tolerance, 1 missed" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["conformance.comparisons"] == 30 and results["conformance.missed"] == 1
    assert main(["conformance", str(own), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 15 and all(
        row["verdict"] == "ok" and row["error"] <= row["tolerance"] for row in rows
    )
    assert main(["conformance", str(tmp_path / "nowhere")]) == 2


def test_weights_of_another_model_are_refused(own, tmp_path):
    shutil.copytree(own, tmp_path / "cut")
    weights = load_file(own / "base_model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    fewer = {k: v for k, v in weights.items() if k != name}
    for changed in (fewer, weights | {"extra": weights[name]}, weights | {name: weights[name][1:]}):
        save_file(
            {k: v.clone() for k, v in changed.items()}, tmp_path / "cut" / "base_model.safetensors"
        )
        with pytest.raises(ModelError, match=f"(?s)does not fit config.json: .*({name}|extra)"):
            conformance(tmp_path / "cut")
