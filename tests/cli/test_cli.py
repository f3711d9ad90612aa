"""Claims about the command line: exit status, stdout and stderr, and that mistakes write nothing."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mendkit.__main__ import COMMANDS, main
from mendkit.cost.plan import check_memory
from mendkit.data.examples import EditExample
from mendkit.data.files import write_examples
from mendkit.hparams import MENDHyperParams
from mendkit.mend.archive import inspect_archive
from mendkit.mend.edit import Edit
from mendkit.mend.editor import MENDEditor
from mendkit.models.load import load_model
from mendkit.reporting.tables import CHANGED, escape
from tests.oracles.claims import EXAMPLES
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[2]
DATA = ["--train-limit", "12", "--validation-limit", "4"]
SIZES = "rank: 4\nbatch_size: 4\nmax_iters: 2\nval_interval: 1\n"


def read(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a config for a tiny model, and an archive trained from the command line."""
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny(folder / "model")
    (folder / "tiny.yaml").write_text(f"model_name: {model}\n{SIZES}", encoding="utf-8")
    assert main(["train", str(folder / "tiny.yaml"), *DATA, "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A working directory with the config of `trained`, and its archive at `archive.safetensors`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mendkit.cli.commands.check_memory", lambda *_: None
    )  # takes seconds; has tests of its own
    Path("tiny.yaml").write_bytes((trained / "tiny.yaml").read_bytes())
    Path("archive.safetensors").write_bytes((trained / "run" / "archive.safetensors").read_bytes())
    return tmp_path


# -------------------------------------------------------------------------------------------- mistakes

EDIT = "--prompt P --target T"
MISTAKES = {  # what a user types -> the beginning of the last line of stderr
    f"edit tiny.yaml raank=5 {EDIT}": "error: override: unknown key 'raank'",
    "train tiny.yaml rank=many --out run": "error: override: rank must be an integer",
    "evaluate nowhere.yaml --out run": "error: nowhere.yaml: cannot be read",
    "evaluate tiny.yaml archive=nowhere.safetensors": "error: nowhere.safetensors: no such archive",
    f"edit tiny.yaml {EDIT} --out run": "error: archive is null: there is nothing to edit with",
    "report tiny.yaml tset_limit=5 --out run": "error: unknown name 'tset_limit'",
    "evaluate tiny.yaml --limit 0": "python -m mendkit evaluate: error: argument --limit: expected an",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_ends_with_status_2_and_one_clear_line(here, typed):
    before = sorted(here.rglob("*"))
    command = [sys.executable, "-m", "mendkit", *typed.split()]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "HOME": str(here)}
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert last.startswith(MISTAKES[typed]), last
    assert sorted(here.rglob("*")) == before


MORE = {
    "train tiny.yaml --train-data nowhere.json --out run": "nowhere.json: no such file",
    "train tiny.yaml archive=nowhere.safetensors --out run": "nowhere.safetensors: no such archive",
    "train tiny.yaml --out tiny.yaml": "tiny.yaml is a file",
    f"edit tiny.yaml archive=tiny.yaml {EDIT}": "not a readable archive",
    "evaluate tiny.yaml archive=archive.safetensors inner_params=[no.weight]": "no.weight",
    "evaluate tiny.yaml archive=archive.safetensors --data facts:all": "no such split",
    "evaluate tiny.yaml": "archive is null",
    "evaluate tiny.yaml another.yaml": "expected key=value",
    f"edit tiny.yaml {EDIT} --save-edit .": "is a folder; give --save-edit a file",
    "report tiny.yaml --sweep nowhere.yaml": "nowhere.yaml: cannot be read",
    f"edit tiny.yaml {EDIT} --save-adapter tiny.yaml": "tiny.yaml is a file; give --save-adapter a folder",
    f"edit tiny.yaml {EDIT} --save-adapter x --save-merged x": "give each a folder of its own",
    f"edit tiny.yaml {EDIT} --save-edit archive.safetensors": "give another --save-edit, or --overwrite",
    "edit tiny.yaml --data facts:test --save-adapter x": "--save-adapter: one edit can be written, these are",
    "inspect nowhere.safetensors": "no such archive",
    "inspect tiny.yaml": "not a readable archive",
}


@pytest.mark.parametrize("typed", MORE)
def test_other_mistakes_as_well(here, typed, capsys):
    before = sorted(here.rglob("*"))
    assert main(typed.split()) == 2
    said = capsys.readouterr()
    error = said.err.splitlines()[-1]
    assert said.out == "" and error.startswith("error: ") and MORE[typed] in error
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "typed",
    [
        "", "fly", "edit tiny.yaml", "edit tiny.yaml --prompt P", "inspect", "report --overwrite", "train --limit",
        "edit tiny.yaml --data f --prompt P --target T", "evaluate --mode all", "evaluate --max-new-tokens x",
        "evaluate tiny.yaml --editor context --mode sequential", "evaluate --editor best",
        "evaluate tiny.yaml --k 3", f"edit tiny.yaml {EDIT} --adapter-rank 3", f"edit tiny.yaml {EDIT} --strength nan",
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_status_2(here, typed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and "error: " in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_the_exit_status(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"python -m mendkit {command} " in text
    assert "example:" in text and "exit status:" in text


def test_an_interrupt_ends_with_status_130(here, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mendkit.cli.commands.inspect_archive", stop)
    assert main(["inspect", "archive.safetensors"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_is_no_users_mistake_shows_its_traceback(here, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("mendkit.cli.commands.inspect_archive", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["inspect", "archive.safetensors"])


# -------------------------------------------------------------------------------------------- training


def test_train_prints_the_archives_path_and_writes_results(here, capsys):
    assert (
        main(["train", "tiny.yaml", "--out", "run", "lr=1e-3", *DATA]) == 0
    )  # options may stand between
    assert capsys.readouterr().out == "run/archive.safetensors\n"
    results = read("run/results.json")
    assert results["train.seconds"] > 0 and results["train.examples"] == 12
    assert results["train.validation.score"] >= 0
    assert inspect_archive("run/archive.safetensors")["hparams"]["lr"] == 1e-3


def test_train_writes_over_nothing_unless_told(here, capsys):
    Path("run").mkdir()
    Path("run/archive.safetensors").write_text("precious")
    Path("run/history.jsonl").write_text("old")
    assert main(["train", "tiny.yaml", "--out", "run", *DATA]) == 2
    assert (
        "run holds archive.safetensors, history.jsonl of an earlier run" in capsys.readouterr().err
    )
    assert Path("run/archive.safetensors").read_text() == "precious"
    assert main(["train", "tiny.yaml", "--out", "run", "--overwrite", *DATA]) == 0
    assert "old" not in Path("run/history.jsonl").read_text()
    assert inspect_archive("run/archive.safetensors")["hparams"]["rank"] == 4


def test_train_checks_memory_before_it_writes_unless_told_not_to(here, capsys, monkeypatch):
    monkeypatch.setattr("mendkit.cli.commands.check_memory", check_memory)
    monkeypatch.setattr("mendkit.cost.plan.free_memory", lambda _: 10**5)
    least = [
        "release_trunk=true",
        "stream_trunk=true",
        "dtype=bfloat16",
        "cache_bytes=0",
        "batch_size=1",
        "rank=1",
    ]
    assert main(["train", "tiny.yaml", *least, "--out", "run", *DATA]) == 2
    assert (
        "0.00 GB are free; even with all savings it does not fit"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert not Path("run").exists()
    assert main(["train", "tiny.yaml", "--out", "run", "--ignore-memory", *DATA]) == 0


def test_a_mistake_writes_over_nothing_even_if_told(here):
    Path("run").mkdir()
    Path("run/archive.safetensors").write_text("precious")
    for wrong in (["--train-data", "nowhere.json"], ["model_name=/nowhere"], ["archive=tiny.yaml"]):
        assert main(["train", "tiny.yaml", *wrong, "--out", "run", "--overwrite"]) == 2
    assert Path("run/archive.safetensors").read_text() == "precious"


def test_train_goes_on_from_an_archive_even_in_its_own_folder(here, caplog):
    Path("run").mkdir()
    Path("archive.safetensors").rename("run/archive.safetensors")
    archive = "archive=run/archive.safetensors"
    assert main(["train", "tiny.yaml", archive, "--out", "run", "--overwrite", *DATA]) == 0
    assert "going on training from run/archive.safetensors" in caplog.text
    assert inspect_archive("run/archive.safetensors")["training"]["best"]["step"] >= 1


# ------------------------------------------------------------------------------------ editing and scoring


def test_edit_prints_before_and_after(here, capsys):
    command = ["edit", "tiny.yaml", "archive=archive.safetensors", "--max-new-tokens", "5"]
    command += ["--prompt", "The capital of France is", "--target", "Lima"]
    assert main([*command, "--out", "edits"]) == 0
    prompt, before, after = capsys.readouterr().out.splitlines()
    assert prompt == "The capital of France is"
    assert (
        before.startswith("  before: ")
        and after.startswith("  after:  ")
        and after.endswith("(told: Lima)")
    )
    assert read("edits/results.json") == {"edit.free_exact": 0.0, "edit.free_exact.n": 1}
    assert read("edits/rows.jsonl")["target_new"] == "Lima"
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert before == f"  before: {row['before'].strip()}" and row["success"] is False


def test_edits_from_data_are_each_made_alone(here, capsys):
    command = ["edit", "tiny.yaml", "archive=archive.safetensors", "--data", "facts:test", "--json"]
    command += ["--max-new-tokens", "5"]
    assert main([*command, "--limit", "3"]) == 0
    three = json.loads(capsys.readouterr().out)
    assert main([*command, "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == three[:1] and len(three) == 3


LINES = [
    '{"prompt": "The capital of France is", "target_new": "Lima"}',
    "",
    "The capital of Norway is\tBern\r",
]


def edit(*words: str) -> int:
    return main(
        [
            "edit",
            "tiny.yaml",
            "archive=archive.safetensors",
            "--max-new-tokens",
            "3",
            "--json",
            *words,
        ]
    )


def test_edits_come_from_standard_input_too(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(LINES)))
    assert edit("--data", "-") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["prompt"], row["target_new"]) for row in rows] == [
        ("The capital of France is", "Lima"), ("The capital of Norway is", "Bern"),
    ]  # fmt: skip
    for text, words in (
        ("P\tT\nP T\n", "standard input:2: expected JSON or prompt<TAB>target, got 'P T'"),
        ("P\tT\tU\n", "standard input:1: expected JSON or prompt<TAB>target"),
        (
            'P\tT\n{"prompt": "P", "target_new": 3}\n',
            "standard input:2: field `target_new` must be text",
        ),
        ("\n", "standard input: no valid example"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert edit("--data", "-") == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {words}")


def test_a_bad_record_costs_only_itself_if_told_and_is_named(here, capsys, caplog):
    good, long = EXAMPLES[0], replace(EXAMPLES[1], target_new="Rome " * 60)
    write_examples([good, long, EXAMPLES[2]], "some.jsonl")
    with Path("some.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "P", "target_new": 3}\n')
    assert edit("--data", "some.jsonl") == 2
    assert "some.jsonl:4: field `target_new` must be text" in capsys.readouterr().err
    assert edit("--data", "some.jsonl", "--limit", "3") == 2  # and nothing was edited before
    said = capsys.readouterr()
    assert "has 62 tokens" in said.err and said.out == ""
    caplog.clear()
    assert edit("--data", "some.jsonl", "--skip-invalid", "--out", "out") == 0
    assert [row["prompt"] for row in json.loads(capsys.readouterr().out)] == [
        good.prompt,
        EXAMPLES[2].prompt,
    ]
    assert read("out/results.json")["edit.skipped"] == 2
    assert (
        "some.jsonl:4" in caplog.text and "skipped 1 of 3 examples, first: example 2" in caplog.text
    )
    command = ["train", "tiny.yaml", "--train-data", "some.jsonl", *DATA[2:], "--out", "run"]
    assert main(command) == 2 and not Path("run").exists()
    assert main([*command, "--skip-invalid"]) == 0
    assert read("run/results.json")["train.examples"] == 2


def test_edits_made_together_are_one_edit_that_can_be_kept(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(LINES)))
    keep = [
        "--save-adapter",
        "lora",
        "--adapter-rank",
        "2",
        "--save-merged",
        "merged",
        "--save-edit",
        "kept/edit",
    ]
    assert edit("--data", "-", "--together", "--strength", "30", *keep, "--out", "out") == 0
    rows, results = json.loads(capsys.readouterr().out), read("out/results.json")
    base = load_model("merged")  # a plain model folder
    assert [base.generate(row["prompt"], max_new_tokens=3) for row in rows] == [
        row["after"] for row in rows
    ]
    assert all(row["after"] != row["before"] for row in rows)
    editor = MENDEditor.from_hparams(
        MENDHyperParams.from_hparams("tiny.yaml", archive="archive.safetensors")
    )
    examples = [EditExample(prompt=row["prompt"], target_new=row["target_new"]) for row in rows]
    wanted, kept = editor.edit(examples).scale(30.0), Edit.load("kept/edit", editor.base)
    assert kept.examples == tuple(examples) and kept.archive == editor.archive is not None
    assert all(torch.equal(change, wanted.dense()[name]) for name, change in kept.dense().items())
    assert read("lora/adapter_config.json")["r"] == results["edit.adapter.rank"] == 2
    assert 0 < results["edit.adapter.relative_error"] < 1 and results["edit.saved"] == "kept/edit"
    assert results["edit.merged.kept"] == pytest.approx(1, abs=1e-3)


def test_edits_can_be_told_on_a_page(here, capsys):
    example = {
        "prompt": "The capital of <b>France</b> is",
        "target_new": "Lima",
        "neighbours": [{"prompt": "Chad is"}],
    }
    example["paraphrases"] = ["France's capital is"]
    Path("two.jsonl").write_text(json.dumps(example) + "\n" + LINES[0], encoding="utf-8")
    assert edit("--data", "two.jsonl", "--strength", "30", "--save-report", "pages/edits.html") == 0
    rows, page = (
        json.loads(capsys.readouterr().out),
        Path("pages/edits.html").read_text(encoding="utf-8"),
    )
    assert "0 of 2 new answers are written as told" in page and len(rows) == 2
    for row in rows:
        cell = f">{escape(row['after'].strip())}</td>"
        assert row["after"] != row["before"] and cell in page and CHANGED in page
    assert (
        page.count("<tr>") == 2 + 3 + 1
        and "<b>France" not in page
        and "France&#x27;s capital is" in page
    )
    assert all(
        f"<h2>{text}" in page
        for text in ("The capital of &lt;b&gt;France", "The capital of France is → Lima")
    )
    assert edit("--data", "two.jsonl", "--save-report", "pages/edits.html") == 2
    assert "give another --save-report, or --overwrite" in capsys.readouterr().err
    assert edit("--data", "two.jsonl", "--save-report", "pages") == 2


def test_an_edit_is_written_over_nothing_unless_told(here, capsys):
    example = ["--prompt", "The capital of France is", "--target", "Lima"]
    keep = [*example, "--save-adapter", "lora", "--save-merged", "merged", "--save-edit", "edit"]
    assert edit(*keep) == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert edit(*keep, "--strength", "2") == 2
    assert (
        "of an earlier run; give another --save-merged, or --overwrite" in capsys.readouterr().err
    )
    assert (
        edit(*example, "--save-adapter", "merged", "--overwrite") == 2
    )  # an adapter beside a model
    assert edit(*example, "--save-merged", "lora", "--overwrite") == 2
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    assert edit(*keep, "--strength", "2", "--overwrite") == 0
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed == {"adapter_model.safetensors", "model.safetensors", "edit"}


def test_evaluate_prints_a_table_or_json_and_nothing_else(here, capsys):
    command = [
        "evaluate",
        "tiny.yaml",
        "archive=archive.safetensors",
        "--limit",
        "4",
        "--max-new-tokens",
        "4",
    ]
    assert main([*command, "--out", "scores"]) == 0
    table = capsys.readouterr().out
    saved = read("scores/results.json")
    mean = saved["single.neighbourhood.argmax_agreement"]
    line = next(
        line for line in table.splitlines() if line.startswith("neighbourhood.argmax_agreement")
    )
    assert f"{mean:.3f}" in line and line.split()[-1] == "4" and "4 scored" in table
    assert len(Path("scores/rows.jsonl").read_text().splitlines()) == 4
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    unsteady = {"seconds", "peak_memory_gb"}
    steady = {k: v for k, v in saved.items() if k not in unsteady and "edit.seconds" not in k}
    assert printed.items() >= steady.items() and steady["single.edits.scored"] == 4
    assert main([*command, "--out", "scores"]) == 2  # nothing is written over


def test_evaluate_tunes_and_scores_a_baseline_without_an_archive(here, capsys):
    few = ["--limit", "2", "--max-new-tokens", "2", "--tune-limit", "1", "--json"]
    assert main(["evaluate", "tiny.yaml", "--editor", "finetune_capped", *few]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (
        results["tuning.tried"] == 4
        and results["tuning.edits"] == 1
        and "cap 0.00" in results["tuning.kept"]
    )
    assert results["single.edits.scored"] == 2 and results["single.norm.relative_max"] <= 0.0021
    assert main(["evaluate", "tiny.yaml", "--editor", "context", *few]) == 0
    assert "tuning.kept" not in json.loads(capsys.readouterr().out)
    assert main(["evaluate", "tiny.yaml", "--editor", "identity", *few]) == 2
    assert "archive is null" in capsys.readouterr().err


def test_evaluate_names_results_by_the_number_of_edits(here, capsys):
    Path("text.txt").write_text("The capital of France is Paris. " * 9, encoding="utf-8")
    Path("nq.jsonl").write_text('{"question": "who is y", "answer": ["Z"]}\n' * 3, encoding="utf-8")
    data = (ROOT / "mendkit/data/facts/test.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    Path("data.jsonl").write_text("\n".join([*data, '{"prompt": ""}']), encoding="utf-8")
    command = [
        "evaluate",
        "tiny.yaml",
        "archive=archive.safetensors",
        "--max-new-tokens",
        "4",
        "--data",
        "data.jsonl",
    ]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: data.jsonl:6: ")
    options = ["--skip-invalid", "--text", "text.txt", "--text-tokens", "40", "--fluency", "--json"]
    assert main([*command, *options, "--mode", "batch", "--k", "2"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["batch_2.edits.invalid_records"] == 1 and results["batch_2.edits.left_out"] == 1
    for name in (
        "drawdown.perplexity",
        "before.perplexity",
        "fluency.entropy_bits",
        "norm.relative_max",
    ):
        assert f"batch_2.{name}" in results
    assert (
        main([*command, "--skip-invalid", "--mode", "sequential", "--unrelated", "nq.jsonl"]) == 2
    )
    assert "give more questions" in capsys.readouterr().err
    assert main([*command, "--skip-invalid", "--mode", "sequential"]) == 0
    table = capsys.readouterr().out
    assert (
        table.startswith("sequential_1\n")
        and "\nsequential_5\n" in table
        and "retention.first_10" in table
    )


def test_inspect_is_for_people_and_for_programs(here, capsys):
    assert main(["inspect", "archive.safetensors"]) == 0
    text = capsys.readouterr().out
    metadata = inspect_archive("archive.safetensors")
    for part in (
        "mendkit-1",
        "LlamaForCausalLM",
        "rank: 4",
        metadata["base_model"]["sites"][0]["name"],
    ):
        assert part in text
    assert main(["inspect", "archive.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metadata


# ------------------------------------------------------------------------------------------- benchmark

MEASURED = {  # the form of what `run_bench` returns, with figures that no machine has
    "train_ratio": 4.0,
    "edit_ratio": 2.0,
    "edit_ratio_alone": 1.5,
    "memory_ratio": 0.5,
    "equal": True,
    "error": {"kit": 1e-6},
    "train": {
        way: {"edits_per_second": n, "seconds_per_edit": 1 / n, "ratio": n, "gflop_per_edit": 3.0}
        | {"share_of_matmul_rate": 0.5}
        for way, n in (("textbook", 1.0), ("kit", 4.0))
    },
    "edit": {f"{k}_seconds": 0.1 for k in ("textbook", "kit", "kit_alone", "kit_cached")},
    "memory": {way: {"above_gb": 1.5, "training_peak_gb": 2.5} for way in ("textbook", "kit")},
    "caches": {
        f"{c}_{k}": 1.0
        for c in ("trunk", "factor")
        for k in ("seconds_per_edit", "pays_after_epochs")
    },
    "matmul_gflop_per_s": 100.0,
    "workload": {"edits_per_step": 3},
}


@pytest.fixture
def measured(monkeypatch):
    """What the command asked to be measured; its answer is MEASURED for every model."""
    asked = []

    def run(settings, deep=()):
        asked.append((settings, deep))
        return {s.model: MEASURED for s in settings}

    monkeypatch.setattr("mendkit.cli.commands.run_bench", run)
    return asked


def test_bench_prints_one_object_with_every_models_ratios(here, capsys, measured):
    words = [
        "bench",
        "--models",
        "tiny.yaml,gpt2-xl-shape",
        "--repeats",
        "7",
        "--rank",
        "5",
        "--depths",
        "4,6",
    ]
    assert main([*words, "--json", "--out", "costs"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed == read("costs/results.json") == {"tiny.yaml": MEASURED, "gpt2-xl-shape": MEASURED}
    )
    ((settings, deep),) = measured
    assert [(s.model, s.repeats, s.rank, s.batch) for s in settings] == [
        ("tiny.yaml", 7, 5, 16), ("gpt2-xl-shape", 7, 5, 16)
    ]  # fmt: skip
    assert deep == (4, 6)
    assert {p.name for p in Path("costs/figures").glob("*.png")} == {
        "costs_of_training.png",
        "memory_of_training.png",
    }
    assert main([*words, "--out", "costs"]) == 2  # nothing is written over


def test_bench_is_for_people_too_and_fails_if_the_numbers_differ(
    here, capsys, measured, monkeypatch
):
    assert main(["bench", "--models", "tiny.yaml", "--quick"]) == 0
    assert "training 4.0, edit 2.0 (alone 1.5), memory 0.5" in capsys.readouterr().out
    assert measured[0][0][0].rank < 100
    monkeypatch.setitem(MEASURED, "equal", False)
    assert main(["bench", "--models", "tiny.yaml"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    assert main(["bench", "--models", "nowhere"]) == 2
