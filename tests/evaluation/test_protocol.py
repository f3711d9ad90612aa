"""The protocol of thousands of edits against sequences, groups by hand, and full scoring."""

import sys

import pytest
import torch

from mendkit.baselines.gauss_newton import GaussNewton
from mendkit.errors import HyperParamError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.evaluation.sequences import Growing, together
from mendkit.mend.edit import Edit
from mendkit.mend.updates import scaled, side_branches
from mendkit.models.text import TextModel
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, hparams

EVALUATE, SEQUENCES = (
    sys.modules[f"mendkit.evaluation.{name}"] for name in ("evaluate", "sequences")
)
TEXT = "The capital of France is Paris. The main city of Peru is not Oslo, I think. " * 4
EXACT = ("edit_success.free_exact", "paraphrase.free_exact", "edit_success.free_exact_question")
SAME = ("argmax_agreement", "kl_nats", "tf_token")


@pytest.fixture(scope="module")
def prepared(llama):
    h = hparams(disk_cache_bytes=0)  # made outside of a test, it would be in the user's folder
    return EvaluationSet(llama, h, EXAMPLES, max_new_tokens=24, text=TEXT, brief=True)


@pytest.fixture(scope="module")
def full(llama):
    return EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=24, text=TEXT)


def numbers(report) -> dict[str, float]:
    return {name: v for name, v in report.to_dict().items() if "seconds" not in name}


def test_one_after_another_is_scored_as_the_end_of_a_sequence(llama, prepared, full, monkeypatch):
    monkeypatch.setattr(EVALUATE, "LOCFT_AFTER", (1, 3, 1000))
    monkeypatch.setattr(EVALUATE, "LOCFT_SAMPLE", 2)
    asked, original = [], EvaluationSet.holds

    def holds(self, updates, index):
        held = original(self, updates, index)
        asked.append((list(index), held))
        return held

    monkeypatch.setattr(EvaluationSet, "holds", holds)
    editor = editor_for(llama)
    report = evaluate(editor, prepared, mode="locft", strength=0.4)
    whole = evaluate(editor, full, mode="sequential", strength=0.4)
    assert report.mode == "locft_5" and whole.mode == "sequential_5"
    for row, other in zip(report.rows, whole.rows, strict=True):
        assert row.values["edit_success.free_exact"] == other.values["retention.all"]
        assert row.values["neighbourhood.argmax_agreement"] == pytest.approx(
            other.values["neighbourhood.argmax_agreement"]
        )
    for name in ("norm.relative_max", "drawdown.perplexity", "before.perplexity"):
        assert report.values[name] == pytest.approx(whole.values[name], rel=1e-4)
    # The curve: a fixed sample of what was edited by then.
    results = report.to_dict()
    assert [len(index) for index, _ in asked] == [1, 2, 2] and asked[0][0] == [0]
    for end, (index, held) in zip((1, 3, 5), asked, strict=True):
        assert max(index) < end
        assert results[f"locft_5.retention.after_{end}"] == sum(held) / len(held)
        assert results[f"locft_5.retention.after_{end}.n"] == len(index)


def test_groups_are_made_at_once_on_the_model_with_all_groups_before(llama, prepared):
    editor, texts = editor_for(llama), [prompts[0].text for prompts in prepared.prompts]
    held = {}
    for at in (0, 2, 4):
        with side_branches(llama, held):
            made = editor.updates(texts[at : at + 2], trunk=prepared.trunk, at_once=True)
        held = together(held, scaled(made, 0.4))
    report = evaluate(editor, prepared, mode="locft", k=2, strength=0.4)
    assert report.mode == "locft_5_by_2"
    assert {n for n in report.values if n.startswith("retention") and n[-1] != "n"} == {
        f"retention.after_{end}" for end in (2, 5)
    } | ({"retention.after_4"} & set(report.values))
    expected = [row.values for row in prepared.score(held, range(5))]
    for row, values in zip(report.rows, expected, strict=True):
        for name, value in values.items():
            assert row.values[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    with pytest.raises(HyperParamError, match="goes with mode"):
        evaluate(editor, prepared, mode="single", k=2)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_brief_set_gives_the_scores_of_a_full_one_for_less_writing(
    llama, prepared, full, strength, monkeypatch
):
    editor, written = editor_for(llama), []
    texts = [prompts[0].text for prompts in full.prompts]
    updates = scaled(editor.updates(texts, trunk=full.trunk), strength)
    original = TextModel.write

    def write(self, prompts, **how):
        new = original(self, prompts, **how)
        written.append(sum(map(len, new)))
        return new

    monkeypatch.setattr(TextModel, "write", write)
    rows, counts = {}, {}
    for name, on in (("brief", prepared), ("full", full)):
        written.clear()
        rows[name], counts[name] = on.score(updates, range(5)), sum(written)
    for row, other in zip(rows["brief"], rows["full"], strict=True):
        compared = [n for n in row.values if n in EXACT or n.endswith(SAME)]
        compared = [n for n in compared if "before" not in n and "reworded" not in n]
        assert len(compared) > 8 and "paraphrase.free_exact_question" in row.values
        for name in compared:
            assert row.values[name] == pytest.approx(other.values[name], abs=1e-5), name
    assert counts["brief"] < counts["full"]
    assert prepared.known == full.known and prepared.to_edit == full.to_edit


def test_thousands_are_prepared_once_for_all_editors(llama, tmp_path, monkeypatch):
    passes, original = [], FrozenTrunk._compute

    def compute(self, group, states):
        passes.append(len(group))
        original(self, group, states)

    def prepared(*, brief: bool):
        passes.clear()
        h = hparams(cache_dir=str(tmp_path))
        return EvaluationSet(llama, h, EXAMPLES, max_new_tokens=4, brief=brief)

    monkeypatch.setattr(FrozenTrunk, "_compute", compute)
    prepared(brief=False)
    assert passes and not any(tmp_path.iterdir())
    first, computed = prepared(brief=True), sum(passes)
    again = prepared(brief=True)
    assert computed > 0 and not passes
    reports = [evaluate(editor_for(llama), on, mode="locft") for on in (first, again)]
    assert numbers(reports[0]) == pytest.approx(numbers(reports[1]), nan_ok=True)


def test_what_may_become_an_answer_is_written_on(prepared):
    prompt, base = prepared.prompts[2][0], prepared.base
    start = base.prompt_of(prompt.text)
    assert prompt.answers == ("New York City",)
    for text, may in (
        ("", True), (" New", True), (" New Yo", True), (" the new york", True),
        (' "New York City', True), (" New Jersey", False), (" the", True),
        (" New-", True), (" (", True), (" Tok", True), (" The only", False), (" Newark", False),
    ):  # fmt: skip
        assert prepared._may_be(prompt, start, base.encode(text)) == may, text


@pytest.mark.parametrize("kind", ["mend", "least squares", "lifelong", "Gauss-Newton"])
def test_a_sequence_that_was_stopped_goes_on_from_its_weights_and_memory(
    llama, kind, tmp_path, monkeypatch
):
    def editor():
        if kind == "Gauss-Newton":
            return GaussNewton(llama, hparams(), TEXT, keep=EXAMPLES)
        made = editor_for(llama, lifelong_norm=kind == "lifelong")
        return made.by_least_squares(EXAMPLES) if kind == "least squares" else made

    prepared = EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=4, brief=True)
    whole, path = evaluate(editor(), prepared, mode="locft"), tmp_path / "rows.jsonl"
    monkeypatch.setattr(SEQUENCES, "SAVE_SECONDS", 0.0)
    stopped, made = editor(), []
    cls, original = type(stopped), type(stopped).updates

    def updates(self, texts, **how):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(texts)
        return original(self, texts, **how)

    monkeypatch.setattr(cls, "updates", updates)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, prepared, mode="locft", rows=path)
    assert {p.name for p in tmp_path.iterdir()} == {"rows.unfinished.jsonl", "rows.unfinished.pt"}
    made[:] = [None] * 4  # from now on all are made
    report = evaluate(editor(), prepared, mode="locft", rows=path)
    assert len(made) == 4 + 2  # the last two edits
    assert numbers(report) == pytest.approx(numbers(whole), nan_ok=True)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    # Without the file of rows the state is of nothing that goes on.
    (tmp_path / "rows.unfinished.pt").write_bytes(b"of another run")
    evaluate(editor(), prepared, mode="locft", rows=path)


def test_the_held_updates_stay_small(llama):
    editor = editor_for(llama)
    texts = [editor.tokens(EXAMPLES[k % 5]) for k in range(40)]
    model = Growing(editor, texts, FrozenTrunk(llama), strength=0.01)
    model.go_on(40)
    assert model.done == 40 and model.seconds > 0
    for site in llama.sites:
        assert model.total[site.name].u.shape[1] <= 2 * min(site.d_in, site.d_out)
    with editor.session() as session:
        for k in range(40):
            session.edit(EXAMPLES[k % 5])
            session.scale(k, 0.01)
        expected = Edit.combined(session.active).dense()
    for name, change in expected.items():
        torch.testing.assert_close(model.total[name].dense(), change, rtol=1e-3, atol=1e-6)


def test_the_protocol_is_told_in_one_line_without_escapes(prepared):
    assert "at most 24 tokens" in prepared.protocol and "Question: … / Answer:" in prepared.protocol
    assert "\\n" not in prepared.protocol and "\n" not in prepared.protocol
