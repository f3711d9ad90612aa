"""The command line: exit status, stdout and stderr, and that mistakes write nothing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mendkit
from mendkit.__main__ import main
from mendkit.cli.app import configuration
from mendkit.cost.plan import check_memory
from mendkit.data.examples import EditExample, Probe
from mendkit.data.files import write_examples
from tests.oracles.claims import EXAMPLES

ROOT = Path(__file__).parents[2]
DATA = ["--train-limit", "12", "--validation-limit", "4"]
EDIT = ["edit", "tiny.yaml", "archive=archive.safetensors", "--max-new-tokens", "3", "--json"]
FACT = ["--prompt", "The capital of France is", "--target", "Lima"]
SCORE = ["evaluate", "tiny.yaml", "archive=archive.safetensors", "--max-new-tokens", "4"]


def read(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_default_configuration_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, settings = configuration(["seed=1"])
    assert path == ROOT / "configs/smollm2-135m.yaml" and path.is_file()
    assert settings == ["seed=1"]


# -------------------------------------------------------------------------------------- mistakes


def test_help_and_version_answer_within_a_second_and_load_no_heavy_library():
    code = (
        "import sys, mendkit.__main__ as m; status = m.main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'{heavy} {status}' if heavy or status else 0)"
    )
    for words in (["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"]):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "mendkit" in done.stdout


COMMANDS = ["train", "plan", "edit", "evaluate", "inspect", "import", "export", "push"]
COMMANDS += ["conformance"]
COMMANDS += ["sites", "doctor", "report", "notebooks", "bench"]


def test_help_shows_the_exit_status_and_an_example_of_each_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Exit status:" in text
    listed = re.findall(r"(?m)^  (\w+)  ", text.partition("Commands:")[2])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"`mendkit (train \|[^`]+)`", readme)
    assert listed == named.split(" | ")
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Example:" in text and f"python -m mendkit {command} " in text


def test_a_mistake_ends_with_status_2_and_one_clear_line(here):
    """As a process: the other mistakes are made in this one."""
    before = files(here)
    command = [sys.executable, "-m", "mendkit", "train", "tiny.yaml", "rank=many", "--out", "run"]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(here)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: override: rank must be an integer")
    assert "Traceback" not in done.stderr and files(here) == before


MISTAKES = {  # what a user types, and a part of the last line of stderr
    "": "Missing command",
    "fly": "No such command 'fly'. See python -m mendkit --help",
    "train --limit": "No such option",
    "inspect": "Missing argument",
    "evaluate --mode all": "--mode': 'all' is not one of",
    "evaluate --editor best": "--editor must be",
    "evaluate tiny.yaml --limit 0": "--limit",
    "evaluate tiny.yaml --max-new-tokens x": "--max-new-tokens",
    "evaluate tiny.yaml --survival 3": "--survival goes with --text",
    "evaluate tiny.yaml --k 3": "--k goes with --mode batch",
    "evaluate tiny.yaml --protocol locft --mode batch": "leave out --mode",
    "evaluate tiny.yaml --tune-data F": "--tune-data goes with --editor BASELINE",
    "edit tiny.yaml --prompt P --target T --limit 1": "--limit and --skip-invalid go with --data",
    "evaluate tiny.yaml --editor context --mode sequential": "--editor context edits nothing",
    "evaluate tiny.yaml another.yaml": "expected key=value",
    "evaluate tiny.yaml": "archive is null",
    "evaluate nowhere.yaml --out run": "nowhere.yaml: cannot be read",
    "evaluate tiny.yaml archive=nowhere.safetensors": "nowhere.safetensors: no such archive",
    "evaluate tiny.yaml archive=archive.safetensors inner_params=[no.weight]": "no.weight",
    "evaluate tiny.yaml archive=archive.safetensors --data facts:all": "no such facts",
    "edit tiny.yaml": "give as many --target as --prompt, or --data",
    "edit tiny.yaml --prompt P --prompt Q --target T": "give as many --target as --prompt",
    "edit tiny.yaml --prompt P --target T --text S --text U": "give as many --text as --prompt",
    "edit tiny.yaml archive=archive.safetensors --prompt P --target T --text S": "`edit_on: text`",
    "train ..": ".. is no configuration; write model_name=..",
    "edit archive.safetensors --prompt P --target T": "write archive=archive.safetensors",
    "edit --archive archive.safetensors --prompt P --target T": "write archive=..., without --",
    "evaluate --max-length 9": "write max_length=..., without --",
    "edit tiny.yaml raank=5 --prompt P --target T": "unknown key 'raank'",
    "edit tiny.yaml --prompt P --target T --save-edit .": "give another --save-edit",
    "edit tiny.yaml --prompt P --target T --save-adapter tiny.yaml": "give another --save-adapter",
    "edit tiny.yaml --prompt P --target T --save-adapter x --save-merged x": "each its own path",
    "edit tiny.yaml --prompt P --target T --save-edit archive.safetensors": "or --overwrite",
    "edit tiny.yaml --data facts:test --save-adapter x": "give --together",
    "edit tiny.yaml archive=tiny.yaml --prompt P --target T": "not a readable archive",
    "train tiny.yaml --train-data nowhere.json --out run": "nowhere.json: no such file",
    "train tiny.yaml archive=nowhere.safetensors --out run": "no such archive",
    "train tiny.yaml --out tiny.yaml": "tiny.yaml is a file",
    "report tiny.yaml tset_limit=5 --out run": "unknown name 'tset_limit'",
    "report tiny.yaml archive=archive.safetensors rank=5 --out run": "belongs to the archive",
    "report tiny.yaml --sweep nowhere.yaml": "nowhere.yaml: cannot be read",
    "bench --models nowhere": "no model 'nowhere'",
    "inspect nowhere.safetensors": "no such archive",
    "notebooks": "Missing argument",
    "notebooks tiny.yaml": "cannot make the folder tiny.yaml",
    "inspect tiny.yaml": "not a readable archive",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_every_mistake_has_status_2_one_line_and_writes_nothing(here, typed, capsys):
    before = files(here)
    assert main(typed.split()) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert said.out == "" and last.startswith("error: ") and MISTAKES[typed] in last, last
    assert files(here) == before


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (RuntimeError, None)])
def test_an_interrupt_has_status_130_and_a_fault_of_ours_its_traceback(
    here, error, status, monkeypatch, capsys
):
    def stop(*_):
        raise error("a fault of ours")

    monkeypatch.setattr("mendkit.inspect_archive", stop)
    if status is None:
        with pytest.raises(error, match="a fault of ours"):
            main(["inspect", "archive.safetensors"])
    else:
        assert main(["inspect", "archive.safetensors"]) == status
        assert capsys.readouterr().err == "interrupted\n"


# -------------------------------------------------------------------------------------- training


def test_train_prints_the_archives_path_and_writes_over_nothing_unless_told(here, capsys):
    Path("run").mkdir()
    Path("run/archive.safetensors").write_text("precious")
    Path("run/history.jsonl").write_text("old")
    words = ["train", "tiny.yaml", "--out", "run", "lr=1e-3", *DATA]  # settings among the options
    assert main(words) == 2
    assert "run holds archive.safetensors, history.jsonl of an earlier" in capsys.readouterr().err
    for wrong in (["--train-data", "nowhere.json"], ["model_name=/nowhere"], ["archive=tiny.yaml"]):
        assert main(["train", "tiny.yaml", *wrong, "--out", "run", "--overwrite"]) == 2
    assert Path("run/archive.safetensors").read_text() == "precious"
    capsys.readouterr()
    assert main([*words, "--overwrite"]) == 0
    assert capsys.readouterr().out == "run/archive.safetensors\n"
    results = read("run/results.json")
    assert results["train.seconds"] > 0 and results["train.examples"] == 12
    assert results["train.validation.score"] >= 0
    assert "old" not in Path("run/history.jsonl").read_text()
    hparams = mendkit.inspect_archive("run/archive.safetensors")["hparams"]
    assert (hparams["lr"], hparams["rank"]) == (1e-3, 4)


def test_train_checks_memory_before_it_writes_unless_told_not_to(here, capsys, monkeypatch):
    monkeypatch.setattr("mendkit.cost.plan.check_memory", check_memory)
    monkeypatch.setattr("mendkit.cost.plan.free_memory", lambda _: 10**5)
    assert main(["train", "tiny.yaml", "--out", "run", *DATA]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "0.00 GB are free. The largest part is" in last and "--ignore-memory" in last
    assert not Path("run").exists()
    assert main(["train", "tiny.yaml", "--out", "run", "--ignore-memory", *DATA]) == 0


def test_train_goes_on_from_an_archive_even_in_its_own_folder(here, caplog):
    Path("run").mkdir()
    Path("archive.safetensors").rename("run/archive.safetensors")
    archive = "archive=run/archive.safetensors"
    assert main(["train", "tiny.yaml", archive, "--out", "run", "--overwrite", *DATA]) == 0
    assert "training continues from run/archive.safetensors" in caplog.text
    assert mendkit.inspect_archive("run/archive.safetensors")["training"]["best"]["step"] >= 1


# --------------------------------------------------------------------------- editing and scoring


def test_edits_are_each_made_alone_and_printed_as_rows_or_text(here, capsys):
    data = ["--data", "facts:test", "--limit"]
    assert main([*EDIT, *data, "3", "--out", "edits"]) == 0
    three = json.loads(capsys.readouterr().out)
    assert main([*EDIT, *data, "1"]) == 0
    assert json.loads(capsys.readouterr().out) == three[:1] and len(three) == 3
    results = read("edits/results.json")
    assert results == {"edit.free_exact": 0.0, "edit.free_exact.n": 3}
    lines = Path("edits/rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == three
    assert main([*EDIT, *FACT, "--prompt", "The capital of Spain is", "--target", "Rome"]) == 0
    told = [row["target_new"] for row in json.loads(capsys.readouterr().out)]
    assert told == ["Lima", "Rome"]


def test_a_sentence_edits_with_an_archive_that_was_trained_for_it(here, capsys):
    sizes = ["--train-limit", "6", "--validation-limit", "2", "--ignore-memory"]
    words = ["train", "tiny.yaml", "edit_on=text", "max_iters=0", *sizes, "--out", "run"]
    assert main(words) == 0
    sentence = "Lima has been the capital of France since May."
    words = ["edit", "tiny.yaml", "archive=run", *FACT, "--text", sentence, "--save-edit", "edit"]
    assert main(words) == 0
    editor = mendkit.MENDEditor.from_hparams(
        mendkit.MENDHyperParams.from_hparams("tiny.yaml", archive="run")
    )
    saved = mendkit.Edit.load("edit", editor.base)
    assert saved.relative_norm() == editor.edit(sentence).relative_norm()
    assert saved.relative_norm() != editor.edit(FACT[1], FACT[3]).relative_norm()


def test_an_edit_by_hand_tells_what_else_it_changes(here, capsys, monkeypatch):
    base = mendkit.load_model(mendkit.MENDHyperParams.from_hparams("tiny.yaml"))
    spain, peru, oslo = [f"The capital of {name} is" for name in ("Spain", "Peru", "Norway")]
    known = base.generate(spain, max_new_tokens=3)
    neighbours = Probe(spain, known), Probe(oslo, "O"), Probe(peru, base.generate(peru))
    asked = EditExample(FACT[1], FACT[3], paraphrases=("France,",), neighbours=neighbours)
    monkeypatch.setattr(
        "mendkit.data.sampling.typed_example", lambda prompt, new: replace(asked, target_new=new)
    )
    words = [*EDIT, *FACT, "--prompt", peru, "--target", "Rome", "--together", "lr_scale=30"]
    assert main([*words, "--save-edit", "edit"]) == 0
    for row in json.loads(capsys.readouterr().out):
        paraphrase, neighbour = row["beside"]  # what it does not know, and an edit, are left out
        assert (paraphrase["prompt"], neighbour["prompt"]) == ("France,", spain)
        assert neighbour["before"] == known and paraphrase["answer"] == row["target_new"]
        with mendkit.Edit.load("edit", base).applied():
            assert neighbour["after"] == base.generate(spain, max_new_tokens=3) != known
        assert not neighbour["success"]
    assert main([*EDIT[:-1], *FACT, "lr_scale=0.0001"]) == 0
    prompt, before, after, *table, count = capsys.readouterr().out.splitlines()
    assert prompt == "The capital of France is" and before.startswith("  before: ")
    assert after.startswith("  after:  ") and after.endswith("✗ expected: Lima")
    assert len(table) == 2 and table[0].index("→") == table[1].index("→")  # aligned
    assert table[0].endswith("✗ expected: Lima") and table[1].endswith("✓")
    assert count == "  1 of 2 other prompts go on as they should"


def test_a_tilde_a_run_folder_and_columns_are_understood_by_every_command(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    Path("home/run").mkdir(parents=True)
    for name in ("tiny.yaml", "archive.safetensors"):
        Path("home/run", name).write_bytes(Path(name).read_bytes())
    table = "question,answer,url\nThe capital of France is,Lima,u\n"
    Path("home/table.csv").write_text(table, encoding="utf-8")
    words = ["edit", "~/run/tiny.yaml", "archive=~/run", "--max-new-tokens", "3"]
    mapped = ["columns={prompt: question, metadata: url}"]
    saved = ["--save-edit", "~/new/one.safetensors", "--out", "~/new", "--save-merged=~/merged"]
    assert main([*words, *mapped, "--data", "~/table.csv", *saved]) == 0
    assert {path.name for path in Path("home/new").iterdir()} == {
        "one.safetensors",
        "results.json",
        "rows.jsonl",
    }
    assert Path("home/merged/config.json").is_file() and not Path("~").exists()
    assert main(["inspect", "~/run"]) == 0


def test_a_bad_record_costs_only_itself_if_told_and_is_named(here, capsys, caplog):
    good, long = EXAMPLES[0], replace(EXAMPLES[1], target_new="Rome " * 60)
    write_examples([good, long, EXAMPLES[2]], "some.jsonl")
    with Path("some.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "P", "target_new": true}\n')
    assert main([*EDIT, "--data", "some.jsonl"]) == 2
    assert "some.jsonl:4: field `target_new` must be text" in capsys.readouterr().err
    assert main([*EDIT, "--data", "some.jsonl", "--limit", "3"]) == 2
    said = capsys.readouterr()
    assert "has 61 tokens" in said.err and said.out == ""  # nothing was edited before
    caplog.clear()
    assert main([*EDIT, "--data", "some.jsonl", "--skip-invalid", "--out", "out"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == [good.prompt, EXAMPLES[2].prompt]
    assert read("out/results.json")["edit.skipped"] == 2
    assert "some.jsonl:4" in caplog.text
    assert "skipped 1 of 3 examples, first: example 2" in caplog.text
    command = ["train", "tiny.yaml", "--train-data", "some.jsonl", *DATA[2:], "--out", "run"]
    assert main(command) == 2 and not Path("run").exists()
    assert main([*command, "--skip-invalid"]) == 0
    assert read("run/results.json")["train.examples"] == 2


def test_edits_made_together_are_one_edit_that_can_be_kept(here, capsys):
    write_examples(EXAMPLES[:2], "two.jsonl")
    keep = ["--save-adapter", "lora", "--save-merged", "merged"]
    keep += ["--save-edit", "kept/edit", "--data", "two.jsonl", "--together", "--out", "out"]
    assert main([*EDIT, *keep, "lr_scale=30"]) == 0
    rows, results = json.loads(capsys.readouterr().out), read("out/results.json")
    base = mendkit.load_model("merged")  # a plain model folder
    for row in rows:
        assert base.generate(row["prompt"], max_new_tokens=3) == row["after"] != row["before"]
    h = mendkit.MENDHyperParams.from_hparams("tiny.yaml", lr_scale=30)
    hparams = h.replace(archive="archive.safetensors")
    editor = mendkit.MENDEditor.from_hparams(hparams)
    wanted = editor.edit(EXAMPLES[:2]).dense()
    kept = mendkit.Edit.load("kept/edit", editor.base)
    assert kept.archive == editor.archive is not None and len(kept.examples) == 2
    assert all(torch.equal(change, wanted[name]) for name, change in kept.dense().items())
    assert read("lora/adapter_config.json")["r"] == results["edit.adapter.rank"]
    assert results["edit.adapter.relative_error"] < 1e-3 and results["edit.saved"] == "kept/edit"
    assert results["edit.merged.kept"] == pytest.approx(1, abs=1e-3)
    # written over only if told
    before = files(here)
    assert main([*EDIT, *keep[:-2]]) == 2
    assert "give another --save-merged, or --overwrite" in capsys.readouterr().err
    assert main([*EDIT, *FACT, "--save-adapter", "merged"]) == 2  # would be read as one model
    assert files(here) == before
    assert main([*EDIT, *keep[:-2], "--overwrite"]) == 0
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed == {"adapter_model.safetensors", "model.safetensors", "edit"}


def test_evaluate_prints_a_table_or_json_and_nothing_else(here, capsys):
    assert main([*SCORE, "--limit", "4", "--out", "scores"]) == 0
    text, saved = capsys.readouterr().out, read("scores/results.json")
    name = "neighbourhood.argmax_agreement"
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    assert f"{saved[f'single.{name}']:.3f}" in line and line.split()[-1] == "4"
    assert "4 scored" in text
    assert len(Path("scores/rows.jsonl").read_text().splitlines()) == 4
    assert main([*SCORE, "--limit", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for key, value in saved.items():
        assert "seconds" in key or key == "peak_memory_gb" or printed[key] == value, key
    assert main([*SCORE, "--limit", "4", "--out", "scores"]) == 2  # nothing is written over


def test_evaluate_tunes_and_scores_a_baseline_and_the_fact_in_the_context(here, capsys):
    write_examples(EXAMPLES[:1], "one.jsonl")
    few = ["--limit", "2", "--json"]
    assert main([*SCORE, "--editor", "identity", "--tune-data", "one.jsonl", *few]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["tuning.tried"] == 4 and results["tuning.edits"] == 1
    assert "single.edit_success.free_exact" in results and results["single.edits.scored"] == 2
    without_archive = ["evaluate", "tiny.yaml", "--editor"]
    assert main([*without_archive, "context", *few]) == 0
    assert "tuning.kept" not in json.loads(capsys.readouterr().out)
    assert main([*without_archive, "identity", *few]) == 2
    assert "archive is null" in capsys.readouterr().err


def test_evaluate_names_results_by_the_number_of_edits(here, capsys):
    Path("text.txt").write_text("The capital of France is Paris. " * 9, encoding="utf-8")
    lines = (ROOT / "mendkit/data/facts/test.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    Path("data.jsonl").write_text("\n".join([*lines, '{"prompt": ""}']), encoding="utf-8")
    command = [*SCORE, "--data", "data.jsonl", "--skip-invalid"]
    assert main(command[:-1]) == 2
    assert capsys.readouterr().err.startswith("error: data.jsonl:6: ")
    options = ["--text", "text.txt", "--fluency", "--json"]
    assert main([*command, *options, "--mode", "batch", "--k", "2"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["batch_2.edits.invalid_records"] == results["batch_2.edits.left_out"] == 1
    for name in ("drawdown.perplexity", "fluency.entropy_bits", "norm.relative_max"):
        assert f"batch_2.{name}" in results
    assert main([*command, "--mode", "sequential"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sequential_1\n") and "\nsequential_5\n" in text
    protocol = ["--protocol", "locft", "--k", "2", "--out", "scores"]
    assert main([*command, "--text", "text.txt", *protocol]) == 0
    results, prefix = read("scores/results.json"), "locft_5_by_2."
    for name in ("retention.after_2", "retention.after_5.n", "paraphrase.free_exact_question"):
        assert prefix + name in results
    assert results["protocol"].endswith("never reset, scored at the end")
    assert "all edits 2 at once" in results["protocol"]


def test_inspect_is_for_people_and_for_programs(here, capsys):
    metadata = mendkit.inspect_archive("archive.safetensors")
    assert main(["inspect", "archive.safetensors"]) == 0
    text = capsys.readouterr().out
    site = metadata["base_model"]["sites"][0]["name"]
    for part in ("LlamaForCausalLM", "rank: 4", site, "precision: exact"):
        assert part in text
    size = Path("archive.safetensors").stat().st_size
    for path in ("archive=archive.safetensors", "."):
        assert main(["inspect", path, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == metadata | {"megabytes": size / 1e6}
    assert main(["export", "archive.safetensors", "tiny.yaml", "--compact", "--out", "small"]) == 0
    assert "8 and 12 bits" in mendkit.inspect_archive("small")["precision"]
    assert Path("small/archive.safetensors").stat().st_size < size
    assert main(["edit", "tiny.yaml", "archive=small", *FACT, "--max-new-tokens", "2"]) == 0


def test_bench_fails_if_the_numbers_differ(here, capsys, monkeypatch):
    found, asked = {"equal": True}, []

    def run(models, **sizes):
        asked.append((models, sizes))
        return dict.fromkeys(models, found)

    monkeypatch.setattr("mendkit.cost.bench.run_bench", run)
    monkeypatch.setattr("mendkit.cost.bench.bench_table", str)
    words = ["bench", "--models", "tiny.yaml,gpt2-xl-shape", "--repeats", "7", "--rank", "5"]
    assert main(words) == 0
    sizes = {"batch": 16, "rank": 5, "repeats": 7}
    assert asked == [(["tiny.yaml", "gpt2-xl-shape"], sizes)]
    found["equal"] = False
    assert main(["bench", "--models", "tiny.yaml"]) == 1
