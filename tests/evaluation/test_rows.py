"""Rows that are kept as they are made: an evaluation that was stopped goes on from them."""

import json
import subprocess
import sys

import pytest

from mendkit.errors import MendkitError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.evaluation.rows import keeping
from tests.oracles.claims import EXAMPLES, editor_for, hparams, scrambled

EVALUATE = sys.modules["mendkit.evaluation.evaluate"]


@pytest.fixture(scope="module")
def prepared(llama):
    return EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=4)


def numbers(report) -> dict[str, float]:
    return {name: v for name, v in report.to_dict().items() if "seconds" not in name}


@pytest.mark.parametrize("mode", [{}, {"mode": "batch", "k": 2}, {"mode": "sequential"}])
def test_an_evaluation_that_was_stopped_goes_on_from_its_rows(
    llama, prepared, mode, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(EVALUATE, "EDIT_BATCH", 2)
    monkeypatch.setattr(EVALUATE, "SEQUENCE_BLOCK", 2)
    editor, path = editor_for(llama), tmp_path / "new" / "rows.jsonl"
    whole, original, scored = evaluate(editor, prepared, **mode), EvaluationSet.score, []

    def score(self, updates, index):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(list(index))
        return original(self, updates, index)

    monkeypatch.setattr(EvaluationSet, "score", score)
    with pytest.raises(KeyboardInterrupt):
        evaluate(editor, prepared, rows=path, **mode)
    assert "the same call continues" in caplog.text and not path.exists()
    (kept,) = path.parent.iterdir()
    assert len(kept.read_text().splitlines()) == 2  # what it is of, and the first two edits
    with kept.open("a") as file:
        file.write('{"rows": [')  # half a line, as a power cut leaves it
    scored[:] = [None, None]
    report = evaluate(editor, prepared, rows=path, **mode)
    assert scored[2] != [0, 1] and numbers(report) == numbers(whole)
    assert list(path.parent.iterdir()) == [path]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row.prompt for row in whole.rows]


def test_rows_of_another_evaluation_are_refused_by_what_differs(llama, prepared, tmp_path):
    path, editor = tmp_path / "rows.jsonl", editor_for(llama)
    with pytest.raises(ZeroDivisionError), keeping(path, lambda: {}):
        raise ZeroDivisionError
    (tmp_path / "rows.unfinished.jsonl").unlink()

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EvaluationSet, "score", stop)
        evaluate(editor, prepared, rows=path)
    other = editor_for(llama)
    scrambled(other.mend, seed=9)
    few = EvaluationSet(llama, hparams(), EXAMPLES[:2], max_new_tokens=4)
    for made, on, how, word in (
        (editor, few, {}, "examples"),
        (editor, prepared, {"strength": 0.5}, "strength"),
        (editor, prepared, {"mode": "sequential"}, "mode"),
        (other, prepared, {}, "archive"),
    ):
        with pytest.raises(MendkitError, match=f"another evaluation .*{word}.* delete the file"):
            evaluate(made, on, rows=path, **how)
    kept = tmp_path / "rows.unfinished.jsonl"
    whole = kept.read_text()
    kept.write_text(whole + '{"rows": 3}\n')
    with pytest.raises(MendkitError, match="is damaged; delete it"):
        evaluate(editor, prepared, rows=path)
    kept.write_text(whole)
    assert len(evaluate(editor, prepared, rows=path).rows) == len(prepared.to_edit)


def test_two_at_once_on_one_folder_are_refused(tmp_path):
    code = "import sys; from mendkit.evaluation.rows import keeping\n"
    code += "with keeping(sys.argv[1], dict): pass"
    with keeping(tmp_path / "rows.jsonl", dict):
        command = [sys.executable, "-P", "-c", code, str(tmp_path / "other.jsonl")]
        other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 1 and "is in use by another run" in other.stderr
