"""Claims about `mendkit.hparams`: what a file may say, what it becomes, what mistakes are told."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mendkit.errors import ArchiveError, HyperParamError, MendkitError
from mendkit.hparams import EARLY_STOP_KEYS, NO_EFFECT, SYNONYMS, MENDHyperParams, parse_overrides
from mendkit.mend.archive import inspect_archive

ROOT = Path(__file__).resolve().parents[1]
FIELDS = MENDHyperParams.model_fields

# EasyEdit's MEND files in the spelling they use: what editing and training share, then the rest
SHARED = """
model_class: GPT2LMHeadModel; tokenizer_class: GPT2Tokenizer; model_name: ./hugging_cache/gpt2-xl
tokenizer_name: ./hugging_cache/gpt2-xl; lr: 1e-6; edit_lr: 1e-4; lr_lr: 1e-4; seed: 42; cedit: 0.1
cloc: 1.0; cbase: 1.0; dropout: 0.0; train_base: False; no_grad_layers: null; one_sided: False
n_hidden: 1; init: id; hidden_dim: null; norm: True; combine: True; x_only: False; rank: 1920
delta_only: False; act: relu; mlp_class: IDMLP; shared: True; batch_size: 1; model_save_pt: 5000
silent: False; max_iters: 100000; log_interval: 1000; eval_log_interval: 1000; final_eval: True
val_interval: 1000; opt: Adam; half: False; debug: False; save: False; verbose: True; val_steps: 500
early_stop_patience: 20000; val_batch_size: 5; accumulate_bs: 10; results_dir: ./results
grad_clip: 100.; inner_params:
- transformer.h.47.mlp.c_proj.weight
- transformer.h.47.mlp.c_fc.weight
"""
EDIT = """archive: ./results/gpt2-xl; alg_name: "MEND"; device: 4; lr_scale: 1.0; eval_only: True
max_length: 2048; model_parallel: true; early_stop_key: 'edit/acc_val'; max_output_length: 600"""
TRAIN = """archive: null; alg: MEND; device: cuda:0; eval_only: False
early_stop_key: loss/total_edit_val"""
EDIT, TRAIN = ((SHARED + text).replace("; ", "\n") for text in (EDIT, TRAIN))
# other values that stand in its files for text models; the runs set them all at once, one each
SEEN = {
    "archive": ["results/InstructEdit/models/MEND/llama-2-7b"],
    "device": ["0", "7", "cuda:1"],
    "model_name": ["THUDM/chatglm2-6b", "./hugging_cache/Mistral-7B-v0.1"],
    "model_class": ["AutoModelForCausalLM", "T5ForConditionalGeneration"],
    "tokenizer_class": [".", "LlamaTokenizer"],
    "tokenizer_name": [".", "THUDM/chatglm2-6b"],
    "max_iters": ["30000", "20000"],
    "max_epochs": ["1"],
    "val_batch_size": ["1", "5"],
    "accumulate_bs": ["2", "1"],
    "max_length": ["128"],
    "lr_scale": ["1"],
    "cbase": ["1"],
    "results_dir": ["./results/InstructEdit"],
}


@pytest.fixture
def write(tmp_path):
    def make(text: str | bytes, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


read = MENDHyperParams.from_hparams


def refusal(call, *args: object, **kwargs: object) -> str:
    with pytest.raises(HyperParamError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, MendkitError)
    return str(caught.value)


def test_easyedits_files_load_unmodified(write):
    h = read(write(EDIT))
    assert (h.archive, h.alg_name, h.device) == ("./results/gpt2-xl", "MEND", "cuda:4")
    assert (h.lr, h.edit_lr, h.lr_lr, h.lr_scale, h.grad_clip) == (1e-6, 1e-4, 1e-4, 1.0, 100.0)
    assert h.inner_params == tuple(f"transformer.h.47.mlp.c_{n}.weight" for n in ("proj", "fc"))
    assert (h.init, h.rank, h.accumulate_bs, h.max_length) == ("id", 1920, 10, 2048)
    assert h.early_stop_key == "edit_success"
    h = read(write(TRAIN))
    assert (h.archive, h.alg_name, h.device) == (None, "MEND", "cuda:0")
    assert (h.batch_size, h.max_iters, h.max_epochs, h.early_stop_key) == (1, 100000, None, "loss")


@pytest.mark.parametrize("turn", range(3))
def test_every_value_seen_in_easyedits_files_loads(write, turn):
    chosen = {key: spelt[turn % len(spelt)] for key, spelt in SEEN.items()}
    lines = [line for line in TRAIN.splitlines() if line.partition(":")[0] not in chosen]
    h = read(write("\n".join([*lines, *(f"{key}: {text}" for key, text in chosen.items())])))
    for key in chosen.keys() & FIELDS.keys() - {"device", "tokenizer_name"}:
        assert getattr(h, key) == yaml.safe_load(chosen[key])


STORED = {  # key -> values as spelt in YAML, and their normal form
    "device": {"0": "cuda:0", "cuda:1": "cuda:1", "cuda": "cuda", "mps": "mps"},
    "cache_bytes": {
        **{"0": 0, "1_000": 1000, "1e9": 10**9, "2KiB": 2048, "'7'": 7},
        **{"1.5GB": 1_500_000_000, "1.1 GB": 1_100_000_000},
    },
    "archive": {"null": None, "~": None, "": None, "None": None},
    "cloc": {"2": 2.0},  # an integer is accepted for a real number
    # PyYAML would call most of these text
    "lr": dict.fromkeys(("1e-6", "'1e-6'", '"1e-6"', "1E-6", "1.0e-6", "+1e-06"), 1e-6),
    "tokenizer_name": {".": None},
    "cache_dir": {"no": "no"},  # text in YAML 1.2
}


@pytest.mark.parametrize("key", STORED)
def test_values_are_stored_in_normal_form(write, key):
    for spelling, stored in STORED[key].items():
        value = getattr(read(write(f"model_name: m\n{key}: {spelling}\n")), key)
        assert value == stored and type(value) is type(stored)


def test_keys_without_effect_are_named_in_one_line_where_they_ask_for_something(write, caplog):
    with caplog.at_level(logging.INFO, logger="mendkit.hparams"):
        read(write(EDIT))
        (message,) = caplog.messages
        asking = {"model_class", "tokenizer_class", "model_parallel", "model_save_pt", "cbase"}
        asking |= {"eval_log_interval", "eval_only", "max_output_length", "final_eval", "verbose"}
        assert {key for key in NO_EFFECT if f" {key}" in message} == asking
        caplog.clear()
        read(write("model_name: m\nsilent: false\ndropout: 0\nhalf: false\n"))
        assert caplog.messages == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dropout: 0.1", "dropout must be 0.0 (other values would change the result, see docs/"),
        ("train_base: true", "train_base must be false (other values"),
        ("no_grad_layers: [a]", "no_grad_layers must be null (other values"),
        ("half: 0", "half must be false (other values"),
        ("hidden_dim: 512", "hidden_dim must be null, got 512"),
        ("act: gelu", "act must be 'relu', got 'gelu'"),
    ],
)
def test_values_that_would_change_the_result_are_refused_not_ignored(write, line, words):
    path = write(f"model_name: m\n{line}\n")
    assert refusal(read, path).startswith(f"{path}:2: {words}")


def test_unknown_key_names_line_value_and_the_nearest_key(write):
    path = write("# a comment\nmodel_name: m\n\nbatchsize: 7\n")
    told = "unknown key 'batchsize' (value 7); the nearest key is 'batch_size'; see docs/"
    assert refusal(read, path).startswith(f"{path}:4: {told}")
    for key in ("zzqq", "coco_image"):  # the other is of EasyEdit's files for image models
        assert "no key resembles it" in refusal(read, write(f"model_name: m\n{key}: 7\n"))
    assert set(SYNONYMS) <= set(FIELDS)
    others = [(key, other) for key, names in SYNONYMS.items() for other in names.split()]
    for key, other in others:
        assert f"nearest key is '{key}'" in refusal(read, write(f"model_name: m\n{other}: 1\n"))


def test_a_key_given_twice_is_a_warning_with_one_value_and_an_error_with_two(write, caplog):
    assert read(write("model_name: m\nmodel_parallel: false\nmodel_parallel: false\n"))
    assert ":3: the key 'model_parallel' is given twice, see line 2" in caplog.text
    path = write("model_name: m\nlr: 1\nrank: 4\nlr: 2\n")
    told = f"{path}:4: the key 'lr' is given twice, see line 2"
    assert refusal(read, path).startswith(told)


def test_a_tilde_is_the_home_folder_in_every_path(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("archive", "model_name", "tokenizer_name", "cache_dir", "results_dir"):
        h = read(write("model_name: m\n"), **parse_overrides([f"{key}=~/a b/x"]))
        assert getattr(h, key) == str(tmp_path / "a b" / "x")
    write("model_name: m\narchive: ~\n", "d.yaml")
    assert read("~/d.yaml").archive is None


def test_an_archive_may_be_the_run_folder_that_holds_it(write, tmp_path):
    (tmp_path / "run").mkdir()
    path = write(f"model_name: m\narchive: {tmp_path / 'run'}\n")
    assert read(path).archive == str(tmp_path / "run")
    with pytest.raises(ArchiveError, match="run: a folder without an archive"):
        inspect_archive(tmp_path / "run")
    (tmp_path / "run" / "archive.safetensors").write_bytes(b"")
    assert read(path).archive == str(tmp_path / "run" / "archive.safetensors")


def test_columns_are_names_of_a_table_by_field(write):
    h = read(write("model_name: m\ncolumns: {prompt: question, paraphrases: [a, b]}\n"))
    assert dict(h.columns) == {"prompt": ("question",), "paraphrases": ("a", "b")}
    assert h.to_dict()["columns"] == {"prompt": ["question"], "paraphrases": ["a", "b"]}
    assert MENDHyperParams(**json.loads(json.dumps(h.to_dict()))) == h and hash(h)
    for wrong in ("question", "{prompt: 3}", "[prompt]", "{prompt: ['']}", "{1: a}"):
        told = refusal(read, write(f"model_name: m\ncolumns: {wrong}\n"))
        assert ":2: columns must be names of a table by field, such as {prompt: question}" in told


WRONG = {  # key -> what the message says, and values in YAML for which it says so
    "rank": {"an integer": ["1.0", "'256'", "true"], ">= 1": ["0"]},
    "seed": {"<= 4294967295": ["4294967296"], "an integer": ["010", "1e3", ""], ">= 0": ["-1"]},
    "lr": {"a number": ["fast", "true", "", "1:30", ".nan"], "a finite number": ["'inf'"]},
    "edit_lr": {"> 0": ["0"], "a number": ["1" + "0" * 400]},
    "swap": {"<= 1": ["1.5"]},
    "z_clip": {"> 0": ["0.0"]},
    "norm": {"true or false": ["1", "no", "'true'"]},
    "init": {"'id_xavier', 'id' or 'xavier'": ["zero", "[id]", ""]},
    "update_sign": {"-1 or 1": ["0"], "a number": ["true"]},
    "alg": {"'MEND'": ["ROME", "mend", ""]},
    "device": {"auto, cpu, mps, cuda, cuda:N, or N": ["gpu", "-1", "true", "0.0", "cuda:x", ""]},
    "inner_params": {
        "auto or a list of unique names": ["[]", "[a, a]", "[a, 1]", "[[a]]", "a", "{a: 1}"],
        "non-empty text": ["['']"],
    },
    "texts_per_role": {"an integer >= 1, or three": ["0", "[1, 2]", "[1, 0, 1]", "two", "1.5"]},
    "early_stop_key": {"'score', 'loss' or 'edit_success'": ["acc", "[loss]"]},
    "cache_bytes": {"bytes, or text such as '1.5GB'": ["-1", "1.5XB", "0.5", "true", ".inf", ""]},
    "release_trunk": {"true or false or 'auto'": ["1", "no"]},
    "archive": {"non-empty text": ["7", "'  '", "[a]", "true"]},
    "model_name": {"non-empty text": ["", "''"]},
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_names_file_line_key_and_expectation(write, key):
    other = "results_dir: r" if key == "model_name" else "model_name: m"
    for expected, spellings in WRONG[key].items():
        for spelling in spellings:
            path = write(f"# first\n{other}\n{key}: {spelling}\n")
            name = key.replace("alg", "alg_name")
            start = f"{path}:3: {name} must be {expected}"
            assert refusal(read, path).startswith(start), (spelling, start)


def test_missing_model_name(write):
    path = write("lr: 1e-4\n")
    assert refusal(read, path).startswith(f"{path}: model_name is missing; add `model_name: ")
    assert read(path, model_name="m").model_name == "m"  # an override may supply it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ": no keys found; expected lines `key: value`"),
        ("smollm2\n", ": no keys found"),
        ("model_name: m\n1: x\n", ":2: a key must be text, got '1'"),
        ("model_name: m\nlr: [1\nrank: 3\n", ":3: not valid YAML: expected ',' or ']'"),
        ("model_name: m\n\tlr: 1\n", ":2: not valid YAML"),
        ("model_name: m\n---\nlr: 1\n", ":2: not valid YAML: but found another document"),
        ("model_name: m\nlr: !!python/object:os.system x\n", ":2: not valid YAML"),
        ("model_name: m\nlr: " + "9" * 5000, ": not valid YAML"),
        ("model_name: m\ninner_params: &a [*a]\n", ":2: not valid YAML"),
        (b"model_name: \xff\xfe\n", ": not valid YAML"),
    ],
)
def test_files_that_are_not_keys_with_values(write, content, words):
    path = write(content)
    assert refusal(read, path).startswith(f"{path}{words}")


def test_no_files(tmp_path):
    told = refusal(read, tmp_path)
    assert told == f"{tmp_path}: cannot be read (Is a directory); expected a YAML file"
    assert "none.yaml: cannot be read (No such file" in refusal(read, tmp_path / "none.yaml")


def test_settings_that_exclude_or_need_each_other(write):
    variant = "model_name: m\ncombine: false\none_sided: true\nn_hidden: 2\nshared: false\n"
    assert read(write(variant)).one_sided
    path = write("model_name: m\nx_only: true\n")
    assert refusal(read, path).startswith(f"{path}:2: x_only: true, but at most one of")
    path = write("model_name: m\nx_only: true\ncombine: false\ndelta_only: true\n")
    told = f"{path}:4: x_only and delta_only: true, but at most one of"
    assert refusal(read, path).startswith(told)
    told = refusal(read, write("model_name: m\n"), one_sided=True)
    assert told.startswith("override: one_sided: true, but")
    h = MENDHyperParams(model_name="m", whiten=0.1, unit_response=True)
    assert "`combine: false`" in refusal(h.replace, x_only=True)
    assert "unit_response: true needs `whiten`" in refusal(h.replace, whiten=None)
    assert "needs `edit_tokens: scored`" in refusal(h.replace, whiten_pairs=True)
    assert h.replace(whiten_pairs=True, edit_tokens="scored").whiten_pairs


def test_round_trip_through_json_and_yaml(write):
    for text in (EDIT, TRAIN, "model_name: m\ntexts_per_role: [4, 1, 2]"):
        h = read(write(text))
        data = json.loads(json.dumps(h.to_dict()))
        assert data == h.to_dict() and list(data) == list(FIELDS)
        assert MENDHyperParams(**data) == h == MENDHyperParams(model_name="other").replace(**data)
        assert read(write(yaml.safe_dump(data), "again.yaml")) == h
    assert h.texts_per_role == (4, 1, 2)


def test_frozen_and_replace_validates_and_leaves_the_original(tmp_path):
    h = MENDHyperParams(model_name="m")
    with pytest.raises(ValidationError, match="frozen"):
        h.lr = 1.0
    changed = {"lr": 3e-4, "device": "cuda:1"}
    assert h.replace(lr="3e-4", device=1).to_dict() == h.to_dict() | changed
    assert h.replace(archive=tmp_path / "a").archive == str(tmp_path / "a")
    assert h.lr == 1e-4 and len({h, MENDHyperParams(model_name="m")}) == 1
    assert refusal(h.replace, rank=0) == "rank must be >= 1, got 0"
    assert "the nearest key is 'archive'" in refusal(h.replace, archiv="x")


def test_the_last_word_on_the_length_of_training_counts(write):
    path = write("model_name: m\nmax_epochs: 3\n")
    assert read(path).max_epochs == 3
    assert read(path, max_iters=50).max_epochs is None
    assert read(path, max_iters=50, max_epochs=2).max_epochs == 2
    assert read(path).replace(max_iters=50).max_epochs is None
    assert read(path).replace(lr=1).max_epochs == 3


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (" lr = 1e-4 ", "lr", 1e-4),
        ("archive=", "archive", None),
        ("archive='null'", "archive", "null"),
        ("archive=a=b #c: d", "archive", "a=b #c: d"),
        ("model_name=1e5", "model_name", "1e5"),
        ("inner_params=[a.weight, b.weight]", "inner_params", ("a.weight", "b.weight")),
        ("rank=null", "rank", None),
        ("cache_bytes=512MiB", "cache_bytes", 512 * 2**20),
        ("alg=MEND", "alg_name", "MEND"),
    ],
)
def test_an_override_is_typed_by_the_field_it_sets_and_wins(write, text, key, value):
    path = write("model_name: file\narchive: file\nlr: 7\n")
    h = read(path, **parse_overrides([text, "silent=true"]))
    assert getattr(h, key) == value and type(getattr(h, key)) is type(value)
    assert h == read(path).replace(**{key: value})


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["archiv=x"], "override: unknown key 'archiv' (value 'x'); the nearest key is 'archive'"),
        (["LR=1"], "the nearest key is 'lr'"),
        (["add_eos=no"], "override: add_eos must be true or false, got 'no'"),
        (["lr"], "override 'lr': expected key=value, such as lr=1e-4, each once"),
        (["lr=1", "lr=2"], "override 'lr=2': expected key=value, such as lr=1e-4, each once"),
        (["lr=[1"], "override 'lr=[1': the value is not valid YAML: expected ',' or ']'"),
        (["model_name="], "override: model_name must be non-empty text, got null"),
    ],
)
def test_wrong_overrides(write, texts, words):
    path = write("model_name: m\n")
    assert words in refusal(lambda: read(path, **parse_overrides(texts)))


def table(title: str) -> dict[str, list[str]]:
    page = (ROOT / "docs" / "HYPERPARAMETERS.md").read_text()
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_page_lists_every_key_its_default_and_every_key_without_effect():
    rows = table("Keys")
    assert list(rows) == list(FIELDS)
    for key, (meaning, legal, default, origin) in rows.items():
        assert meaning and legal and origin.split()[0] in ("EasyEdit", "mendkit")
        if key == "model_name":
            assert default == "required"
        else:
            assert yaml.safe_load(default.strip("`")) == FIELDS[key].default
    without_effect = table("Keys accepted without effect")
    assert set(without_effect) == set(NO_EFFECT)
    assert all(all(row) for row in without_effect.values())  # each with its reason
    assert not set(FIELDS) & set(NO_EFFECT)
    others = table("EasyEdit's keys that are read in another way")
    assert set(others) <= {key for key, row in rows.items() if row[-1].startswith("EasyEdit")}
    assert all(len(row) == 3 and all(row) for row in others.values())
    assert set(EARLY_STOP_KEYS.values()) <= {"score", "loss", "edit_success"}
