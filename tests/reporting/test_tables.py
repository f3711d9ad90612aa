"""Sentences and tables tell what happened, also when it went badly, and no text can break them."""

from dataclasses import replace
from statistics import harmonic_mean

import pandas as pd
import pytest

from mendkit.data.examples import EditExample, Probe
from mendkit.evaluation.results import HEADLINE, EditRow, EvaluationReport, Interval
from mendkit.reporting import tables
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


# ---- tables


def test_texts_of_the_data_cannot_break_a_table():
    html = tables.table([{"a <b>": "<script>x</script> $5 and $6\nnew"}]).to_html()
    assert "<script>" not in html and "a &lt;b&gt;" in html
    assert "$5" not in html and "<span>$</span>5" in html  # no mathematics between two dollar signs


def test_cells_show_intervals_and_truths():
    rows = [
        {"text": "x", "n": 1920, "share": Interval(0.5, 0.4, 0.6, 9), "good": True},
        {"text": "y", "n": None, "share": 0.25, "good": False},
    ]
    html = tables.table(rows, {"n": "{:.1e}"}).to_html()
    for shown in (">1.9e+03<", ">0.500 [0.400, 0.600], n = 9<", ">0.25<", ">✓<", ">✗<", "></td>"):
        assert shown in html


def test_before_after_ticks_the_new_answer_and_what_stayed():
    asked = tables.prompts_of(EXAMPLES[0])
    roles = ["edit", "paraphrases", "paraphrases", "neighbours", "neighbours", "unrelated"]
    assert [role for role, _, _ in asked][:6] == roles
    before = ["Paris", "Paris", "Paris", "Madrid", "Rome", *["tea"] * (len(asked) - 5)]
    after = [" lima.", "Lima and more", "Paris", "Madrid", "", *before[5:-1], "Tea."]
    shown = tables.before_after(asked, before, after)
    good = [True, False, False, True, False, *[True] * (len(asked) - 6), False]
    assert list(shown.data["good"]) == good
    for colour, rows in {tables.WANTED: [0], tables.UNWANTED: [1, 4, len(asked) - 1]}.items():
        assert shown.to_html().count(colour) == 1  # one rule for all cells of a colour
        marked = shown.to_html().split(colour)[0].rpartition("}")[2]
        assert [i for i in range(len(asked)) if f"row{i}_" in marked] == rows


def test_spread_takes_each_relation_once_before_any_twice():
    examples = [
        EditExample(prompt=str(i), target_new="x", relation=r) for i, r in enumerate("aaabbc")
    ]
    assert [e.prompt for e in tables.spread(examples, 4)] == ["0", "3", "5", "1"]
    assert len(tables.spread(examples, 99)) == 6 and tables.spread([], 3) == []


def test_an_example_is_shown_with_all_its_prompts():
    frame = tables.example(EXAMPLES[1]).data
    probes = (*EXAMPLES[1].neighbours, *EXAMPLES[1].unrelated)
    prompts = {EXAMPLES[1].prompt, *EXAMPLES[1].paraphrases, *(probe.prompt for probe in probes)}
    assert prompts <= set(frame["prompt"]) and frame["answer"][0] == "London"
    bare = tables.example(EditExample(prompt="p", target_new="x", neighbours=(Probe("q"),)))
    assert list(bare.data["answer"]) == [None, "x", None]


def test_editors_stand_side_by_side():
    ours, theirs = report(1), report(0)
    del theirs.summary["edit.seconds"]
    frame = tables.scores({"ours": ours, "theirs": theirs}).data
    assert frame.loc[f"before.{FREE}", "ours"].mean == 0.25 and frame.loc[FREE, "ours"].mean == 0.5
    assert pd.isna(frame.loc["edit.seconds", "theirs"])
    score = harmonic_mean([0.5, 0.4, 0.9, 0.9])
    assert frame.loc["score.headline", "theirs"] == pytest.approx(score)


def test_all_known_and_unknown_facts_stand_side_by_side():
    made = report(1)
    made.summary[f"known.{FREE}"] = Interval(0.7, 0.6, 0.8, 5)
    frame = tables.apart(made).data.set_index("score")
    assert (frame.loc[FREE, "all"].mean, frame.loc[FREE, "known"].n) == (0.5, 5)
    assert frame.loc[FREE, "unknown"] is None and "score.headline" in frame.index
    assert not frame.index.str.startswith("known.").any()


def test_what_was_won_or_lost_most_is_told_by_the_paired_edits():
    free, near = HEADLINE["edit"], HEADLINE["neighbours"]
    results = {"single.score.headline": 0.846, "identity.single.score.headline": 0.63}
    results |= {
        f"single.{free}.n": 160,
        f"paired.{free}.better": 14.0,
        f"paired.{free}.worse": 14.0,
    }
    results |= {f"paired.{near}.better": 142.0, f"paired.{near}.worse": 1.0}
    assert tables.won(results, "m") == (
        "MEND scores 0.85 on 160 edits of m, the untrained control 0.63; "
        "neighbours kept: better in 142 edits, worse in 1"
    )
    lost = results | {f"paired.{near}.better": 0.0, f"paired.{near}.worse": 12.0}
    assert tables.won(lost, "m").endswith("neighbours kept: better in 0 edits, worse in 12")
    del results["identity.single.score.headline"]
    assert tables.won(results, "m") == "MEND scores 0.85 on 160 edits of m"
    assert tables.won({}, "m") == "Editing m with MEND"


def test_many_has_a_row_for_every_count_and_metric():
    early, last = (replace(report(1, mode=f"sequential_{k}"), values={"norm": k}) for k in (1, 3))
    frame = tables.many({"sum": [replace(last, earlier=(early,))]})
    wide = frame.pivot(index=["editor", "edits"], columns="metric", values="value")
    assert list(wide.index) == [("sum", 1), ("sum", 3)] and list(wide["norm"]) == [1, 3]
    assert tables.table(wide.reset_index()).to_html().count("0.500 [0.500, 0.500]") == 2
