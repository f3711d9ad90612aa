"""Claims about `mendkit.hparams`: what a file may say, what it becomes, and what each mistake is told."""

import ast
import dataclasses
import json
import logging
import sys
from pathlib import Path

import pytest
import yaml

import mendkit.hparams as module
from mendkit.errors import HyperParamError, MendkitError
from mendkit.hparams import (
    EARLY_STOP_KEYS,
    MULTIMODAL_KEYS,
    NO_EFFECT,
    MENDHyperParams,
    parse_overrides,
)
from mendkit.mend.batches import RIVALS, ROLES, role_weights

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {item.name: item for item in dataclasses.fields(MENDHyperParams)}

# EasyEdit's MEND files in the spelling they use: what editing and training share, then each on its own
SHARED = """
model_class: GPT2LMHeadModel; tokenizer_class: GPT2Tokenizer; tokenizer_name: ./hugging_cache/gpt2-xl
model_name: ./hugging_cache/gpt2-xl; lr: 1e-6; edit_lr: 1e-4; lr_lr: 1e-4; seed: 42; cedit: 0.1; cloc: 1.0
cbase: 1.0; dropout: 0.0; train_base: False; no_grad_layers: null; one_sided: False; n_hidden: 1; init: id
hidden_dim: null; norm: True; combine: True; x_only: False; delta_only: False; act: relu; rank: 1920
mlp_class: IDMLP; shared: True; batch_size: 1; model_save_pt: 5000; silent: False; max_iters: 100000
log_interval: 1000; eval_log_interval: 1000; final_eval: True; val_interval: 1000; opt: Adam; half: False
debug: False; save: False; verbose: True; early_stop_patience: 20000; val_batch_size: 5; accumulate_bs: 10
val_steps: 500 # a comment; grad_clip: 100.; results_dir: ./results; inner_params:
- transformer.h.47.mlp.c_proj.weight
- transformer.h.47.mlp.c_fc.weight
"""
EDIT = """archive: ./results/gpt2-xl; alg_name: "MEND"; device: 4; lr_scale: 1.0; eval_only: True
max_length: 2048; model_parallel: true; early_stop_key: 'edit/acc_val'; max_output_length: 600"""
TRAIN = "archive: null; alg: MEND; device: cuda:0; eval_only: False; early_stop_key: loss/total_edit_val"
EDIT, TRAIN = ((SHARED + text).replace("; ", "\n") for text in (EDIT, TRAIN))
# every other value seen in the 29 files for text models, as it is spelt there
SEEN = {
    "archive": ["null", "results/InstructEdit/models/MEND/llama-2-7b", "./results/models/MEND/Mistral-7B-v0.1"],
    "alg_name": ['"MEND"', "MEND"], "alg": ["MEND", '"MEND"'], "device": ["0", "1", "7", "cuda:0", "cuda:1"],
    "model_name": ["THUDM/chatglm2-6b", "./hugging_cache/Mistral-7B-v0.1"],
    "model_class": ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel", "T5ForConditionalGeneration"],
    "tokenizer_class": ["AutoTokenizer", "LlamaTokenizer", "GPT2Tokenizer", "."],
    "tokenizer_name": ["THUDM/chatglm2-6b", "."], "model_parallel": ["False", "True", "true"],
    "model_save_pt": ["5000", "1000", "10"], "max_iters": ["30000", "50000", "20000"], "max_epochs": ["1"],
    "log_interval": ["100", "200", "10"], "eval_log_interval": ["1000", "5000"], "val_interval": ["5000", "10"],
    "early_stop_patience": ["30000", "4000"], "early_stop_key": ['"loss/total_edit_val"', "'edit/acc_val'"],
    "eval_only": ["False", "True"], "val_batch_size": ["5", "1"], "accumulate_bs": ["10", "2", "1"],
    "grad_clip": ["100.", "100.0"], "results_dir": ["./results", "./results/InstructEdit"],
    "max_length": ["2048", "128"], "max_output_length": ["600"], "lr_scale": ["1.0", "1"], "cbase": ["1", "1.0"],
}  # fmt: skip
IMAGE = "name: opt-2.7b\nexact_match: True\nqformer_checkpoint: .\ncoco_image: ../\n" + TRAIN


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


def test_easyedit_editing_file_loads_unmodified(write):
    h = read(write(EDIT))
    assert (h.archive, h.alg_name, h.device) == ("./results/gpt2-xl", "MEND", "cuda:4")
    assert (h.lr, h.edit_lr, h.lr_lr, h.lr_scale, h.grad_clip) == (1e-6, 1e-4, 1e-4, 1.0, 100.0)
    assert h.inner_params == (
        "transformer.h.47.mlp.c_proj.weight",
        "transformer.h.47.mlp.c_fc.weight",
    )
    assert (h.init, h.rank, h.accumulate_bs, h.max_length) == ("id", 1920, 10, 2048)
    assert h.early_stop_key == "edit_success"


def test_easyedit_training_file_loads_unmodified(write):
    h = read(write(TRAIN))
    assert (h.archive, h.alg_name, h.device) == (None, "MEND", "cuda:0")
    assert (h.batch_size, h.max_iters, h.max_epochs, h.early_stop_key) == (1, 100000, None, "loss")


@pytest.mark.parametrize("key", SEEN)
def test_every_value_seen_in_easyedits_files_loads(write, key):
    for text in (EDIT, TRAIN):
        lines = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
        lines = [
            line for line in lines if not (key in ("alg", "alg_name") and line.startswith("alg"))
        ]
        assert len(lines) >= len(text.splitlines()) - 1
        for value in SEEN[key]:
            h = read(write("\n".join([*lines, f"{key}: {value}  # seen"])))
            if key in FIELDS and key not in ("device", "tokenizer_name", "early_stop_key"):
                assert getattr(h, key) == yaml.safe_load(value)


def test_what_weighs_paraphrases_and_neighbours_follows_what_the_file_says_of_edit_and_locality(
    write,
):
    roles = (*ROLES, RIVALS)
    assert role_weights(read(write(TRAIN))) == dict(
        zip(roles, (0.1, 0.1, 1.0, 1.0, 0.0), strict=True)
    )
    own = read(write("model_name: m\ncedit: 2\ncloc: 3\ncpara: 0\ncneigh: 5\ncmargin: 0.5\n"))
    assert role_weights(own) == dict(zip(roles, (2.0, 0.0, 5.0, 3.0, 0.5), strict=True))


def test_defaults_are_those_of_the_kit_and_its_configs_train_from_nothing(write):
    assert read(write("model_name: m\n")) == MENDHyperParams(model_name="m")
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert {"gpt2.yaml", "smollm2-135m.yaml"} <= {path.name for path in paths}
    assert all(read(path).archive is None for path in paths)


def test_numbers_that_pyyaml_calls_text_are_numbers(write):
    assert yaml.safe_load("lr: 1e-6")["lr"] == "1e-6"  # the trap
    for spelling in ("1e-6", "'1e-6'", '"1e-6"', "1E-6", "1.0e-6", "0.000001", "+1e-06"):
        assert read(write(f"model_name: m\nlr: {spelling}\n")).lr == 1e-6


@pytest.mark.parametrize(
    ("key", "spelling", "stored"),
    [
        *[
            ("device", *pair)
            for pair in [("0", "cuda:0"), ("cuda:1", "cuda:1"), ("cuda", "cuda"), ("mps", "mps")]
        ],
        *[
            ("cache_bytes", *pair)
            for pair in [("0", 0), ("1_000", 1000), ("1e9", 10**9), ("2KiB", 2048)]
        ],
        *[
            ("cache_bytes", *pair)
            for pair in [("1.5GB", 1_500_000_000), ("1.1 GB", 1_100_000_000), ("'7'", 7)]
        ],
        *[
            ("archive", *pair)
            for pair in [("null", None), ("~", None), ("", None), ("None", "None")]
        ],
        ("cloc", "2", 2.0),  # an integer is accepted for a real number
        ("tokenizer_name", ".", None),
        ("cache_dir", "no", "no"),  # text in YAML 1.2
    ],
)
def test_values_are_stored_in_normal_form(write, key, spelling, stored):
    value = getattr(read(write(f"model_name: m\n{key}: {spelling}\n")), key)
    assert value == stored and type(value) is type(stored)


def test_keys_without_effect_are_named_once_in_one_line_where_they_ask_for_something(write, caplog):
    with caplog.at_level(logging.INFO, logger="mendkit.hparams"):
        read(write(EDIT))
        (message,) = caplog.messages
        asking = {
            "model_class",
            "tokenizer_class",
            "model_parallel",
            "model_save_pt",
            "eval_log_interval",
        }
        asking |= {"eval_only", "max_output_length"}
        assert {key for key in NO_EFFECT if f" {key}" in message} == asking
        caplog.clear()
        read(write("model_name: m\nsilent: false\nverbose: true\ndropout: 0\nhalf: false\n"))
        assert caplog.messages == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "dropout: 0.1",
            "dropout must be 0.0 (the base model runs without dropout, always), got 0.1",
        ),
        ("train_base: true", "train_base must be false (the base model stays frozen), got true"),
        (
            "no_grad_layers: [a]",
            "no_grad_layers must be null (everything but the hypernetwork is frozen",
        ),
        (
            "half: true",
            "half must be false (`dtype` sets the precision of the base model: auto keeps that of the",
        ),
        (
            "hidden_dim: 512",
            "hidden_dim must be null (a residual block keeps the width of its input), got 512",
        ),
        ("act: gelu", "act must be 'relu' (the one activation of this kit), got 'gelu'"),
        (
            "mlp_class: MLP",
            "mlp_class must be 'IDMLP' (the one kind of block of this kit), got 'MLP'",
        ),
    ],
)
def test_values_that_would_change_the_result_are_refused_not_ignored(write, line, words):
    path = write(f"model_name: m\n{line}\n")
    assert refusal(read, path).startswith(f"{path}:2: {words}")


def test_image_model_files_are_refused_with_the_reason(write):
    path = write(IMAGE)
    start = f"{path}:2: exact_match / qformer_checkpoint / coco_image belongs to an image model"
    assert refusal(read, path).startswith(f"{start}, which this kit does not edit")
    for key in MULTIMODAL_KEYS:
        assert "image model" in refusal(read, write(f"model_name: m\n{key}: x\n"))
    message = refusal(read, write("model_name: m\nname: x\n"))  # alone it proves nothing
    assert (
        "unknown key 'name'" in message
        and "(`name` stands in EasyEdit's files for image models" in message
    )


def test_unknown_key_names_line_value_and_the_nearest_key(write):
    path = write("# a comment\nmodel_name: m\n\nbatchsize: 7\n")
    start = (
        f"{path}:4: unknown key 'batchsize' (value 7); the nearest key is 'batch_size'; see docs/"
    )
    assert refusal(read, path).startswith(start)
    assert "no key resembles it" in refusal(read, write("model_name: m\nzzqq: 7\n"))


WRONG = {  # key -> what the message must say is expected, and values in YAML
    "rank": ("an integer >= 1 or null", ["0", "1.0", "'256'", "true"]),
    "max_iters": ("an integer >= 0", ["1e3", "-1"]),
    "seed": ("an integer >= 0 and <= 4294967295", ["010", "-1", "4294967296", ""]),
    "lr": (
        "a finite number >= 0",
        ["fast", "-1e-6", ".nan", ".inf", "'inf'", "true", "", "1:30", "[1]"],
    ),
    "edit_lr": ("a finite number > 0", ["0", "1" + "0" * 400]),
    "z_clip": ("a finite number > 0 or null", ["0.0"]),
    "norm": ("true or false", ["1", "no", "'true'"]),
    "init": ("'id_xavier' or 'id' or 'xavier'", ["zero", "[id]", ""]),
    "update_sign": ("-1 or 1", ["0", "true", "1.0"]),
    "alg": ("'MEND' (the one method of this kit)", ["ROME", "mend", ""]),
    "device": (
        "auto, cpu, mps, cuda, cuda:N, or N for cuda:N",
        ["gpu", "-1", "true", "0.0", "cuda:x", ""],
    ),
    "inner_params": (
        "auto or a list of unique names",
        ["[]", "[a, a]", "[a, 1]", "[[a]]", "a", "{a: 1}", "['']"],
    ),
    "early_stop_key": (
        "score or loss or edit_success or loss/total_edit_val or edit/acc_val",
        ["acc", "[loss]"],
    ),
    "cache_bytes": (
        "bytes, or text such as '1.5GB', >= 0",
        ["-1", "1.5XB", "0.5", "true", ".inf", ""],
    ),
    "archive": ("non-empty text or null", ["7", "'  '", "[a]", "true"]),
    "results_dir": ("non-empty text", ["", "''"]),
}


@pytest.mark.parametrize(
    ("key", "spelling"), [(key, text) for key in WRONG for text in WRONG[key][1]]
)
def test_a_wrong_value_names_file_line_key_and_expectation(write, key, spelling):
    path = write(f"# first\nmodel_name: m\n{key}: {spelling}\n")
    assert refusal(read, path).startswith(f"{path}:3: {key} must be {WRONG[key][0]}, got ")


def test_a_wrong_value_is_shown_as_yaml_knows_it_and_cut(write):
    for spelling, shown in [
        ("true", "true"),
        ("", "null"),
        ("fast", "'fast'"),
        ("-1e-6", "-1e-06"),
    ]:
        assert refusal(read, write(f"model_name: m\nlr: {spelling}\n")).endswith(f", got {shown}")
    assert len(refusal(MENDHyperParams, model_name="m", init="x" * 10_000)) < 250


def test_missing_model_name(write):
    path = write("lr: 1e-4\n")
    assert refusal(read, path).startswith(f"{path}: model_name is missing; add `model_name: ")
    assert read(path, model_name="m").model_name == "m"  # an override may supply it
    assert "model_name must be non-empty text, got null" in refusal(read, write("model_name:\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ": the file is empty; expected lines `key: value`"),
        ("- model_name\n- lr\n", ": no keys found; expected lines `key: value`"),
        ("smollm2\n", ": no keys found"),
        ("model_name: m\nlr: 1\nrank: 4\nlr: 2\n", ":4: the key 'lr' is given twice, see line 2"),
        ("model_name: m\n1: x\n", ":2: a key must be text, got '1'"),
        ("model_name: m\n? [a]\n: x\n", ":2: a key must be text"),
        ("model_name: m\nlr: [1\nrank: 3\n", ":3: not valid YAML: expected ',' or ']'"),
        ("model_name: m\n\tlr: 1\n", ":2: not valid YAML"),
        ("model_name: m\n---\nlr: 1\n", ":2: not valid YAML: but found another document"),
        ("model_name: m\nlr: !!python/object:os.system x\n", ":2: not valid YAML"),
        ("model_name: m\nlr: !!int x\n", ": not valid YAML"),
        ("model_name: m\nlr: " + "9" * 5000, ": not valid YAML"),
        ("model_name: m\ninner_params: &a [*a]\n", ":2: not valid YAML"),
        (b"model_name: \xff\xfe\n", ": not valid YAML"),
    ],
)
def test_files_that_are_not_keys_with_values_or_no_files(write, content, words):
    path = write(content)
    assert refusal(read, path).startswith(f"{path}{words}")
    assert (
        refusal(read, path.parent)
        == f"{path.parent}: cannot be read (Is a directory); expected a YAML file"
    )
    path.unlink()
    assert refusal(read, path).startswith(f"{path}: cannot be read (No such file")


def test_one_sided_variants_exclude_each_other_and_the_combined_transform(write):
    assert read(
        write("model_name: m\ncombine: false\none_sided: true\nn_hidden: 2\nshared: false\n")
    ).one_sided
    path = write("model_name: m\nx_only: true\n")
    assert refusal(read, path).startswith(f"{path}:2: x_only: true, but at most one of")
    path = write("model_name: m\nx_only: true\ncombine: false\ndelta_only: true\n")
    assert refusal(read, path).startswith(
        f"{path}:4: x_only and delta_only: true, but at most one of"
    )
    assert refusal(read, write("model_name: m\n"), one_sided=True).startswith(
        "override: one_sided: true, but"
    )
    assert "`combine: false`" in refusal(MENDHyperParams, model_name="m", one_sided=True)
    assert "`combine: false`" in refusal(MENDHyperParams(model_name="m").replace, x_only=True)


def test_round_trip_through_json_and_yaml(write):
    for text in (EDIT, TRAIN):
        h = read(write(text))
        data = json.loads(json.dumps(h.to_dict()))
        assert data == h.to_dict() and list(data) == list(FIELDS)
        assert MENDHyperParams(**data) == h == MENDHyperParams(model_name="other").replace(**data)
        assert read(write(yaml.safe_dump(data), "again.yaml")) == h


def test_frozen_and_replace_validates_and_leaves_the_original(tmp_path):
    h = MENDHyperParams(model_name="m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.lr = 1.0
    assert h.replace(lr="3e-4", device=1).to_dict() == h.to_dict() | {
        "lr": 3e-4,
        "device": "cuda:1",
    }
    assert h.replace(archive=tmp_path / "a").archive == str(tmp_path / "a")
    assert h.lr == 1e-4 and len({h, MENDHyperParams(model_name="m")}) == 1
    assert refusal(h.replace, rank=0) == "rank must be an integer >= 1 or null, got 0"
    assert "the nearest key is 'archive'" in refusal(h.replace, archiv="x")


def test_the_last_word_on_the_length_of_training_counts(write):
    path = write("model_name: m\nmax_epochs: 3\n")
    assert read(path).max_epochs == 3
    assert read(path, max_iters=50).max_epochs is None
    assert read(path, max_iters=50, max_epochs=2).max_epochs == 2
    assert read(path).replace(max_iters=50).max_epochs is None
    assert read(path).replace(lr=1).max_epochs == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" lr = 1e-4 ", {"lr": 1e-4}),
        ("archive=null", {"archive": None}),
        ("archive=", {"archive": None}),
        ("archive='null'", {"archive": "null"}),
        ("archive=runs/x.safetensors", {"archive": "runs/x.safetensors"}),
        ("archive=a=b #c: d", {"archive": "a=b #c: d"}),
        ("model_name=1e5", {"model_name": "1e5"}),
        ("inner_params=[a.weight, b.weight]", {"inner_params": ("a.weight", "b.weight")}),
        ("add_eos=false", {"add_eos": False}),
        ("rank=null", {"rank": None}),
        ("device=0", {"device": "cuda:0"}),
        ("cache_bytes=512MiB", {"cache_bytes": 512 * 2**20}),
        ("alg=MEND", {"alg_name": "MEND"}),
        ("silent=true", {}),
    ],
)
def test_an_override_is_typed_by_the_field_it_sets_and_wins(write, text, expected):
    path = write("model_name: file\narchive: file\nlr: 7\n")
    values = parse_overrides([text])
    assert values == expected and [*map(type, values.values())] == [*map(type, expected.values())]
    assert read(path, **values) == read(path).replace(**values)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["archiv=x"], "override: unknown key 'archiv' (value 'x'); the nearest key is 'archive'"),
        (["LR=1"], "the nearest key is 'lr'"),
        (["lr=abc"], "override: lr must be a finite number >= 0, got 'abc'"),
        (["add_eos=no"], "override: add_eos must be true or false, got 'no'"),
        (["rank=1.5"], "override: rank must be an integer >= 1 or null, got 1.5"),
        (["lr"], "override 'lr': expected key=value, such as lr=1e-4, each once"),
        (["lr=1", "lr=2"], "override 'lr=2': expected key=value, such as lr=1e-4, each once"),
        (["lr=[1"], "override 'lr=[1': the value is not valid YAML: expected ',' or ']'"),
        (["dropout=0.5"], "dropout must be 0.0"),
        (["qformer_checkpoint=x"], "override: qformer_checkpoint belongs to an image model"),
        (["model_name="], "override: model_name must be non-empty text, got null"),
    ],
)
def test_wrong_overrides(texts, words):
    assert words in refusal(parse_overrides, texts)


def table(title: str) -> dict[str, list[str]]:
    section = (
        (ROOT / "docs" / "HYPERPARAMETERS.md")
        .read_text()
        .split(f"## {title}\n")[1]
        .split("\n## ")[0]
    )
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_page_lists_every_key_its_default_and_every_key_without_effect():
    rows = table("Keys")
    assert list(rows) == list(FIELDS)
    for key, (_, _, default, origin) in rows.items():
        value = FIELDS[key].default
        assert (
            (default == "required")
            if key == "model_name"
            else (yaml.safe_load(default.strip("`")) == value)
        )
        assert origin.split()[0] in ("EasyEdit", "mendkit")
    assert {key: row[-1] for key, row in table("Keys accepted without effect").items()} == NO_EFFECT
    assert not set(FIELDS) & set(NO_EFFECT) and not (set(FIELDS) | set(NO_EFFECT)) & set(
        MULTIMODAL_KEYS
    )
    others = table("EasyEdit's keys that are read in another way")
    assert set(others) <= {key for key, row in rows.items() if row[-1].startswith("EasyEdit")}
    assert all(len(row) == 3 and all(row) for row in others.values())
    assert all(EARLY_STOP_KEYS[target] == target for target in EARLY_STOP_KEYS.values())


def test_level_0_imports_only_the_standard_library_yaml_and_errors():
    tree = ast.parse(Path(module.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {"." * n.level + n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n for n in names if n.split(".")[0] not in sys.stdlib_module_names} == {
        "yaml",
        ".errors",
    }


def test_options_of_whitening_say_what_they_need():
    for key in ("whiten_pairs", "unit_response"):
        assert f"{key}: true needs `whiten`" in refusal(
            MENDHyperParams, model_name="m", **{key: True}
        )
    assert "needs `edit_tokens: scored`" in refusal(
        MENDHyperParams, model_name="m", whiten=0.1, whiten_pairs=True
    )
    MENDHyperParams(
        model_name="m", whiten=0.1, whiten_pairs=True, unit_response=True, edit_tokens="scored"
    )


def test_texts_per_role_is_one_number_or_three_and_a_share_is_at_most_one():
    assert MENDHyperParams(model_name="m", texts_per_role=[4, 1, 2]).texts_per_role == (4, 1, 2)
    assert MENDHyperParams(model_name="m", texts_per_role=3).texts_per_role == 3
    for wrong in (0, [1, 2], [1, 0, 1], "two", 1.5):
        assert "texts_per_role must be an integer >= 1, or three" in refusal(
            MENDHyperParams, model_name="m", texts_per_role=wrong
        )
    assert "borrow must be a finite number >= 0 and <= 1" in refusal(
        MENDHyperParams, model_name="m", borrow=1.5
    )
