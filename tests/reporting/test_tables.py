"""Sentences and tables tell what happened, also when it went badly, and no text can break them."""

from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean

import pandas as pd
import pytest

from mendkit.data.examples import EditExample, Probe
from mendkit.evaluation.results import HEADLINE, EditRow, EvaluationReport, Interval
from mendkit.hparams import MENDHyperParams
from mendkit.reporting import findings, tables
from tests.oracles.claims import EXAMPLES

FREE = "edit_success.free_exact"


def summary(*means: float) -> dict[str, Interval]:
    return {
        name: Interval(mean, mean, mean, 10)
        for name, mean in zip(HEADLINE.values(), means, strict=True)
    }


def report(*successes: float, mode: str = "single") -> EvaluationReport:
    rows = tuple(
        EditRow(i, None, "r", f"x {i}", "new", "old", {FREE: success})
        for i, success in enumerate(successes)
    )
    means = summary(0.5, 0.4, 0.9, 0.9) | {"edit.seconds": Interval(0.01, 0.01, 0.01, 9)}
    means[f"before.{FREE}"] = Interval(0.25, 0.0, 0.5, 9)
    counts = {"scored": 9, "already_true": 2, "skipped": 1}
    return EvaluationReport("editor", mode, rows, means, counts, 1.0)


# ---- findings


@pytest.mark.parametrize(
    ("trained", "control", "place"),
    [
        ((0.9, 0.8, 0.9, 1.0), (0.6, 0.2, 0.4, 0.9), 1),
        ((0.6, 0.2, 0.4, 0.9), (0.9, 0.8, 0.9, 1.0), 2),
        ((1.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 1.0), 2),  # a tie has learned nothing
    ],
)
def test_editors_are_ranked_by_harmonic_means(trained: tuple, control: tuple, place: int) -> None:
    text = findings.ranking({"ours": summary(*trained), "theirs": summary(*control)})
    assert text.startswith(f"ours is number {place} of 2")
    assert f"score, {harmonic_mean(trained):.2f}; the best other is theirs, " in text
    assert text.endswith(f"{harmonic_mean(control):.2f}")


@pytest.mark.parametrize(("after", "said"), [(0.8, "raised"), (0.1, "did not"), (0.2, "did not")])
def test_validation_is_compared_with_before_the_first_step(after: float, said: str) -> None:
    history = [{"step": 0, "val.score": 0.2}, {"step": 10, "val.score": after}]
    text = findings.validation(history, history[1])
    assert text.startswith(f"Training {said}") and f"{after:.2f} at step 10" in text


def test_losses_tell_both_ends_of_training_and_validation() -> None:
    history = [{"step": i, "loss": 1.0, "edit": 6.0 - i} for i in range(4)]
    assert findings.losses(history) == "The edit loss went from 6.00 to 3.00 nats"
    text = findings.losses([{"val.loss.edit": 5.0}, *history, {"val.loss.edit": 7.0}])
    assert text.endswith("on validation edits from 5.00 to 7.00 nats")


def test_the_running_mean_is_centred_and_narrower_at_the_ends() -> None:
    values = pd.Series([0.0, 1.0, 5.0, *[1.0] * 45])
    assert list(findings.smooth(values)[:3]) == [2.0, 1.75, 1.6]  # of 3, 4 and 5 values
    assert list(findings.smooth(values[:20])) == list(values[:20])


def test_the_control_wins_a_tie_and_the_end_of_its_range_is_told() -> None:
    rows = [{"edit_lr": a, "score": s} for a, s in ((1e-5, 0.1), (1e-4, 0.4), (1e-3, 0.3))]
    won, tied = (findings.control(rows, {"val.score": score}) for score in (0.9, 0.4))
    assert "editor beats" in won and won.endswith("0.90 against 0.40 at α = 1.0e-04")
    assert "does not beat" in tied
    assert "end of the range" in findings.control(rows[:2], {"val.score": 0.9})


def test_findings_about_editing() -> None:
    rows = [{"strength": s, "score": score} for s, score in ((0.5, 0.1), (1.0, 0.5), (2.0, 0.7))]
    text = "Score by the strength of the edits: 0.10 (0.5) to 0.70 (2); as trained: 0.50"
    assert findings.strength(rows) == text
    one, two = Interval(0.5, 0.4, 0.6, 9), Interval(0.9, 0.8, 1.0, 9)
    text = findings.by_relation({"us_city": one, "None": two})
    assert text.endswith("2 in all: 0.50 (us city) to 0.90 ((no relation given))")
    shift = {"before.log_p.new": -3.0, "log_p.new": -5.0}
    frame = pd.DataFrame([{**shift, "before.log_p.old": -4.0, "log_p.old": -1.0}])
    assert findings.shifts(frame).endswith("-2.0 of the new answer, +3.0 of the old answer")
    assert "old" not in findings.shifts(pd.DataFrame([shift]))
    assert "2 of 3 edits" in findings.failures(report(1, 0, 0))
    assert "paraphrase.free_exact, 0.40" in findings.weakest(report(1).summary)


def test_next_tokens_count_only_the_new_answers_own_token() -> None:
    before, after = {" Paris": 0.9, " Ly": 0.1}, {" Ly": 0.8, " Lyon": 0.1}
    fact = {"new_token": " Ly", "before": before, "after": after}
    miss = {"new_token": " T", "before": {" T": 0.1, " A": 0.9}, "after": {" The": 0.6, " T": 0.4}}
    assert "0 of 2 facts before the edit, of 1 after" in findings.next_tokens([fact, miss])


def test_neighbours_are_told_in_both_wordings_if_both_were_asked() -> None:
    means = summary(1, 1, 0.75, 1)
    assert "a paraphrase" not in findings.neighbours(means)
    means["neighbourhood.reworded_agreement"] = Interval(0.25, 0.2, 0.3, 3)
    text = "in the edit prompt's wording 0.75, their argmax in a paraphrase's wording 0.25"
    assert text in findings.neighbours(means)


def test_findings_about_the_inside_of_an_edit() -> None:
    ranks = pd.DataFrame([{"error": 1e-6, "rank": 3, "tokens": 3}])
    assert "1 gradients are sums" in findings.rank_one(ranks)
    text = findings.rank_one(ranks.assign(error=0.2, rank=4))
    assert "are not sums" in text and "1 exceed" in text
    minus = [{"size": 0, "loss.edit": 5.0}, {"size": 0.1, "loss.edit": 2.0}]
    plus = [{"size": 0, "loss.edit": 5.0}, {"size": -0.1, "loss.edit": 9.0}]
    assert "from 5.00 nats to 2.00 by minus, to 9.00 by plus" in findings.signs(minus, plus)
    low = {"edit_success": 0.2, "size": 0.01}
    half = {"edit_success": 0.5, "size": 0.1}
    text = findings.normalisers({"raw": [low], "mean": [low, half, {**half, "size": 1.0}]})
    assert text.endswith("raw none tried, mean 0.1")
    by_site = pd.DataFrame(
        [("a", "start", 0.1), ("b", "start", 0.1), ("a", "trained", 0.7), ("b", "trained", 0.05)],
        columns=["site", "series", "norm"],
    )
    text = findings.grown(by_site, {"a": 2e-3, "b": -1e-3}, start=1e-3)
    assert text == "Updates grew 0.5 (b) to 7 (a) times, step sizes 1 (b) to 2 (a) times"
    cosines = pd.DataFrame({"series": "x", "cosine": [0.2, 0.9, 0.5]})
    assert findings.cosines(cosines, to="start").endswith("x 0.50 (0.20 to 0.90)")


def test_findings_about_several_runs() -> None:
    assert findings.runs({"a": 0.2, "b": 0.9}) == "Score of 2 runs: 0.20 (a) to 0.90 (b)"
    assert findings.runs({}) == "No run was scored"
    scores = {"seed": {"1": [0.1, 0.9], "2": [0.3, 0.8]}, "rank": {"8": [0.1], "16": [0.9]}}
    assert findings.settings(scores).endswith("most on rank: mean 0.10 (8) to 0.90 (16)")
    assert "No setting" in findings.settings({"seed": {"1": [0.5], "2": [0.5]}})


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.27.mlp.up_proj.weight", "27.mlp.up_proj"),
        ("transformer.h.9.mlp.c_fc.weight", "9.mlp.c_fc"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_short_site(name: str, short: str) -> None:
    assert findings.short_site(name) == short


# ---- tables


def test_texts_of_the_data_cannot_break_a_table() -> None:
    html = tables.table([{"a <b>": "<script>x</script> $5 and $6\nnew"}]).to_html()
    assert "<script>" not in html and "a &lt;b&gt;" in html
    assert "$5" not in html and "<span>$</span>5" in html  # no mathematics between two dollar signs


def test_cells_show_intervals_and_truths_and_numbers_stand_on_the_right() -> None:
    rows = [
        {"text": "x", "n": 1920, "share": Interval(0.5, 0.4, 0.6, 9), "good": True},
        {"text": "y", "n": None, "share": 0.25, "good": False},
    ]
    html = tables.table(rows, {"n": "{:.1e}"}).to_html()
    for shown in (">1.9e+03<", ">0.500 [0.400, 0.600]<", ">0.25<", ">✓<", ">✗<", "></td>"):
        assert shown in html
    right = [rule.split("{")[0] for rule in html.split("}") if "text-align: right" in rule]
    assert [rule.split(".")[-1].strip() for rule in right] == ["col1", "col2"]


def test_before_after_ticks_the_new_answer_and_what_stayed() -> None:
    asked = tables.prompts_of(EXAMPLES[0])
    roles = ["edit", "paraphrases", "paraphrases", "neighbours", "neighbours", "unrelated"]
    assert [role for role, _, _ in asked][:6] == roles
    before = ["Paris", "Paris", "Paris", "Madrid", "Rome", *["tea"] * (len(asked) - 5)]
    after = [" lima.", "Lima and more", "Paris", "Madrid", "", *before[5:]]
    shown = tables.before_after(asked, before, after)
    good = [True, False, False, True, False, *[True] * (len(asked) - 5)]
    assert list(shown.data["good"]) == good
    assert shown.to_html().count(tables.CHANGED) == 1  # one rule for all marked cells
    marked = shown.to_html().split(tables.CHANGED)[0].rpartition("}")[2]
    assert [f"row{i}" in marked for i in range(5)] == [True, True, False, False, True]


def test_spread_takes_each_relation_once_before_any_twice() -> None:
    examples = [
        EditExample(prompt=str(i), target_new="x", relation=r) for i, r in enumerate("aaabbc")
    ]
    assert [e.prompt for e in tables.spread(examples, 4)] == ["0", "3", "5", "1"]
    assert len(tables.spread(examples, 99)) == 6 and tables.spread([], 3) == []


def test_overlap_counts_subjects_and_prompts() -> None:
    text = tables.overlap(EXAMPLES[:3], EXAMPLES[2:])
    assert text.startswith("1 of the 3 held-out subjects that are named and 1 of the 3 held-out")


def test_relations_are_counted_and_a_long_tail_is_summed_up() -> None:
    examples = [EditExample(prompt="p", target_new="x", relation=f"r{i // 2}") for i in range(60)]
    frame = tables.relations({"training": examples, "validation": EXAMPLES}).data
    assert len(frame) == tables.MOST_RELATIONS + 2 and frame["relation"][0] == "capital"
    assert list(frame.iloc[-1]) == ["all", 60, 5]
    assert list(frame.iloc[-2]) == ["6 more", 12, 0]


def test_an_example_is_shown_with_all_its_prompts() -> None:
    frame = tables.example(EXAMPLES[1]).data
    probes = (*EXAMPLES[1].neighbours, *EXAMPLES[1].unrelated)
    prompts = {EXAMPLES[1].prompt, *EXAMPLES[1].paraphrases, *(probe.prompt for probe in probes)}
    assert prompts <= set(frame["prompt"]) and frame["answer"][0] == "London"
    bare = tables.example(EditExample(prompt="p", target_new="x", neighbours=(Probe("q"),)))
    assert list(bare.data["answer"]) == [None, "x", None]


def test_editors_stand_side_by_side_with_what_they_cost() -> None:
    ours, theirs = report(1), report(0)
    del theirs.summary["edit.seconds"]
    frame = tables.editors({"ours": ours, "theirs": theirs}).data.set_index("score")
    assert frame.loc[FREE, "unedited"].mean == 0.25 and frame.loc[FREE, "ours"].mean == 0.5
    assert frame.loc["edit.seconds", "ours"].n == frame.loc["edit.seconds", "n edits"] == 9
    assert pd.isna(frame.loc["edit.seconds", "theirs"]) and f"before.{FREE}" not in frame.index
    score = harmonic_mean([0.5, 0.4, 0.9, 0.9])
    assert frame.loc["score.headline", "theirs"] == pytest.approx(score)
    assert tables.counts(ours).startswith("9 edits were scored. 2 were left out")
    assert "10 ms" in tables.counts(ours)


def test_many_has_a_row_for_every_count_and_metric() -> None:
    early, last = (replace(report(1, mode=f"sequential_{k}"), values={"norm": k}) for k in (1, 3))
    frame = tables.many({"sum": [replace(last, earlier=(early,))]})
    wide = frame.pivot(index=["editor", "edits"], columns="metric", values="value")
    assert list(wide.index) == [("sum", 1), ("sum", 3)] and list(wide["norm"]) == [1, 3]
    assert tables.table(wide.reset_index()).to_html().count("0.500 [0.500, 0.500]") == 2


def test_the_plan_says_what_will_run() -> None:
    hparams = MENDHyperParams(model_name="m", max_epochs=3, inner_params=("a.weight", "b.weight"))
    html = tables.plan(hparams, Path("runs/x"), examples={"training": EXAMPLES}).to_html()
    for text in ("3 epochs of 16 edits", "a.weight", "initialised and trained", "runs/x"):
        assert text in html
    trained = hparams.replace(archive="some/archive")
    assert "epochs" not in tables.plan(trained, Path("x"), examples={}).to_html()


def test_an_archive_without_a_summary_is_shown_all_the_same() -> None:
    base = {"name": "m", "class": "C"}
    metadata = {"base_model": base, "training": {}, "edit_lr": {"h.1.mlp.weight": 1e-4}}
    html = tables.archive(metadata).to_html()
    assert "unknown" in html and "1.mlp" in html
