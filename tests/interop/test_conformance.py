"""Conformance with recorded numbers: the reference folders where they are, our own everywhere."""

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
from mendkit.interop.conformance import MISS, OK, ROUNDING, Check, OneLogitClassifier, check_folder
from mendkit.interop.foreign import from_foreign
from mendkit.mend.factors import GradientFactors
from mendkit.models.sites import Site
from tests.oracles.textbook import (
    NAMES,
    REFERENCE,
    SHAPES,
    Classifier,
    Editor,
    Seq2Seq,
    Textbook,
    every_option,
    label,
    options_of,
    record,
    save_published,
)
from tests.oracles.tiny import tiny_gpt2, tiny_llama


def tiny_t5():
    """A random T5 with gated feed-forward layers, in float64."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=2)
    ids = dict(decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=False)
    config = T5Config(**sizes, **ids, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return T5ForConditionalGeneration(config).double().eval().requires_grad_(False)


def tiny_bert():
    """A random BERT encoder with one logit, in float64."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    sizes |= dict(intermediate_size=24, initializer_range=0.2)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return OneLogitClassifier(config).double().eval().requires_grad_(False)


MODELS = {
    "gpt2": (Editor, lambda: tiny_gpt2(dtype=torch.float64, layers=3, d=16).model),
    "llama": (Editor, lambda: tiny_llama(dtype=torch.float64, layers=3, d=16).model),
    "t5": (Seq2Seq, tiny_t5),
    "bert": (Classifier, tiny_bert),
}
# by family: each way of combining, each value of each option, one to five edits at once
CASES = [
    ("gpt2", 5, dict(way="combine", shared=True, norm=True, n_hidden=1, init="id", rank=3)),
    ("llama", 4, dict(way="apart", shared=True, norm=True, n_hidden=0, init="xavier", rank=None)),
    ("gpt2", 1, dict(way="one_sided", shared=False, norm=True, n_hidden=2, init="id", rank=3)),
    ("llama", 2, dict(way="delta_only", shared=True, norm=False, n_hidden=1, init="id", rank=3)),
    ("t5", 3, dict(way="combine", shared=True, norm=True, n_hidden=1, init="id", rank=3)),
    ("t5", 1, dict(way="one_sided", shared=False, norm=True, n_hidden=0, init="id", rank=None)),
    ("bert", 5, dict(way="apart", shared=True, norm=True, n_hidden=1, init="id", rank=None)),
    ("bert", 2, dict(way="x_only", shared=False, norm=False, n_hidden=2, init="id", rank=3)),
]


def made(folder: Path, family: str, n_edits: int, options: dict) -> Path:
    editor, build = MODELS[family]
    return record(folder, editor(build(), NAMES[family], options_of(**options)), n_edits=n_edits)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One folder recorded from the textbook, to be spoilt in copies."""
    return made(tmp_path_factory.mktemp("recorded") / "gpt2", *CASES[0])


# ------------------------------------------------------------------------------------- it conforms


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2_one_sided", "t5", "bert"])
def test_the_recorded_numbers_of_the_published_code(name):
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference vectors at {REFERENCE}")
    checks = check_folder(REFERENCE / name)
    assert len(checks) == 15 and [check for check in checks if check.verdict == MISS] == []
    assert sum(check.verdict == OK for check in checks) >= 12


@pytest.mark.parametrize(("family", "n_edits", "options"), CASES)
def test_a_plain_loop_in_float64_with_the_options_of_the_published_code(
    family, n_edits, options, tmp_path
):
    checks = check_folder(made(tmp_path / "made", family, n_edits, options))
    assert len(checks) == 15
    assert max(check.error for check in checks) < 1e-8


def test_a_record_in_float32_tells_its_rounding(recorded, tmp_path):
    folder = tmp_path / "single"
    shutil.copytree(recorded, folder)
    for name in ("base_model.safetensors", "vectors.safetensors"):
        single = load_file(recorded / name)
        for key, value in single.items():
            single[key] = value.float() if value.dtype == torch.float64 else value
        save_file(single, folder / name)
    state = {k.removeprefix("final/"): v for k, v in single.items() if k.startswith("final/")}
    save_published(folder / "archive.pt", state, tiny_gpt2().model.config)
    checks = check_folder(folder)
    assert all(check.verdict != MISS for check in checks)
    assert all(1e-9 < check.rounding < 1e-3 for check in checks if check.name != "archive")


@pytest.mark.parametrize("options", list(every_option()), ids=label)
def test_the_hypernetwork_is_the_textbooks_for_every_combination_of_options(options):
    book = Textbook(SHAPES, options)
    sites = [Site(name, name[:-7], *SHAPES[name], False, None, False) for name in sorted(SHAPES)]
    h = MENDHyperParams(model_name="tiny", inner_params=tuple(SHAPES), **options)
    mend = from_foreign(book.state, sites, h)
    generator, edits = torch.Generator().manual_seed(1), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    for training in (True, True, False):
        rows, factors = {}, {}
        for name, shape in SHAPES.items():
            pair = [torch.randn(7, d, generator=generator, dtype=torch.float64) for d in shape]
            rows[name], factors[name] = pair, GradientFactors(*pair, edits)
        updates = mend(factors, 2, gather=tuple(SHAPES) if training else ())
        for name, value in book.update(rows, training=training).items():
            torch.testing.assert_close(updates[name].dense(), value, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------ it notices if it does not


def scaled(prefix: str, factor: float):
    """Multiply the vectors whose names start so."""

    def change(folder: Path) -> None:
        path = folder / "vectors.safetensors"
        tensors = load_file(path)
        found = {name: x * factor for name, x in tensors.items() if name.startswith(prefix)}
        assert found
        save_file(tensors | found, path)

    return change


def changed(*keys, to):
    """Change one entry of meta.json."""

    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        place = meta
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]])
        (folder / "meta.json").write_text(json.dumps(meta))

    return change


SPOILT = {
    "factors x": scaled("eval/factors/transformer.h.1.mlp.c_fc.weight/x", 1.001),
    "factors delta": scaled("eval/factors/transformer.h.2.mlp.c_proj.weight/delta", -1),
    "updates": scaled("eval/update/transformer.h.2.mlp.c_fc.weight", 1.001),
    "second updates": scaled("eval/update_second/", 1.00002),
    "pre logits outer": scaled("eval/pre_logits_outer", 1.00002),
    "post logits loc": scaled("eval/post_logits_loc", 1.00002),
    "scalars post": changed("eval_post", "prob", to=lambda x: 1.00002 * x),
    "scalars pre": changed("eval_pre", "n_tokens", to=lambda x: 2 * x),
    "locality KL": changed("eval_kl_loc", to=lambda x: 1.00002 * x),
    "training loc": changed("losses", 2, "loc", to=lambda x: 1.0002 * x),
    "training edit": changed("losses", 0, "edit", to=lambda x: 1.0002 * x),
    "training total": changed("hparams", "cedit", to=lambda x: 2 * x),
    "archive": scaled("final/edit_lrs", 1.0001),
}


@pytest.mark.parametrize("name", SPOILT)
def test_one_wrong_number_is_the_one_miss(recorded, tmp_path, name):
    shutil.copytree(recorded, tmp_path / "spoilt")
    SPOILT[name](tmp_path / "spoilt")
    checks = check_folder(tmp_path / "spoilt")
    assert [check.name for check in checks if check.verdict == MISS] == [name]


def test_rounding_excuses_little_and_never_much():
    def verdict(error: float, rounding: float) -> str:
        return Check("x", error, 1e-5, rounding, 1).verdict

    assert [verdict(9e-6, 0.0), verdict(2e-5, 1e-6), verdict(2e-5, 1e-5)] == [OK, MISS, ROUNDING]
    assert [verdict(1e-4, 1e-5), verdict(2e-3, 1.0), verdict(float("nan"), 1e-5)] == [MISS] * 3


def test_a_kl_is_compared_with_an_absolute_floor(recorded, tmp_path):
    """In float32 a KL of 1e-9 is rounding; in float64 it is a number."""

    def verdict(dtype: torch.dtype, by: float) -> str:
        folder = tmp_path / f"{dtype}-{by}"
        shutil.copytree(recorded, folder)
        for file in ("base_model", "vectors"):
            tensors = load_file(recorded / f"{file}.safetensors")
            for name, value in tensors.items():
                # Without steps the edit changes nothing, so the KL is 0.
                value = value * 0 if name.endswith("/edit_lrs") else value
                tensors[name] = value.to(dtype) if value.dtype == torch.float64 else value
            save_file(tensors, folder / f"{file}.safetensors")
        state = {k.removeprefix("final/"): v for k, v in tensors.items() if k.startswith("final/")}
        save_published(folder / "archive.pt", state, tiny_gpt2().model.config)
        changed("eval_kl_loc", to=lambda _: by)(folder)
        return {check.name: check.verdict for check in check_folder(folder)}["locality KL"]

    assert [verdict(torch.float32, by) for by in (0.0, 9e-7, 2e-6)] == [OK, OK, MISS]
    assert [verdict(torch.float64, by) for by in (0.0, 1e-9)] == [OK, MISS]


def test_what_is_no_such_folder_is_said(recorded, tmp_path):
    with pytest.raises(DataError, match=r"lacks config\.json, base_model"):
        check_folder(tmp_path)
    folder = tmp_path / "cut"
    shutil.copytree(recorded, folder)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="hparams"):
        check_folder(folder)
    shutil.copy(recorded / "meta.json", folder)
    weights = load_file(recorded / "base_model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    fewer = {key: value for key, value in weights.items() if key != name}
    for other in (fewer, weights | {"extra": weights[name]}, fewer | {name: weights[name][1:]}):
        save_file({k: v.clone() for k, v in other.items()}, folder / "base_model.safetensors")
        with pytest.raises(ModelError, match=f"(?s)do not fit config.json: .*({name}|extra)"):
            check_folder(folder)


def test_the_command_prints_a_table_and_its_status_tells(recorded, tmp_path, capsys):
    shutil.copytree(recorded, tmp_path / "all" / "wrong")
    scaled("eval/update/", 1.1)(tmp_path / "all" / "wrong")
    words = ["conformance", str(recorded), str(tmp_path / "all"), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert "29 within the tolerance, 1 missed" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["conformance.comparisons"] == 30 and results["conformance.missed"] == 1
    assert main(["conformance", str(recorded), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 15 and all(row["verdict"] == "ok" for row in rows)
    assert main(["conformance", str(tmp_path / "nowhere")]) == 2
