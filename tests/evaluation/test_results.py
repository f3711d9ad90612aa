"""Results: flat names and back, frames, paired comparison; all by hand."""

import json
import math
from dataclasses import replace

import pytest

from mendkit.errors import MendkitError
from mendkit.evaluation.results import (
    HEADLINE,
    EditRow,
    EvaluationReport,
    Interval,
    Summary,
    compare,
    is_said,
    normalise,
    summarise,
)

FREE, KL = "edit_success.free_exact", "neighbourhood.kl_nats"


def report(editor: str, values: dict[str, tuple[float, float]], *, mode="single"):
    """Edits by id, each with its success and its KL."""
    rows = []
    for index, (name, (success, kl)) in enumerate(values.items()):
        texts = tuple(
            {"role": role, "prompt": f"{role} of {name}", "before": "old", "after": "new"}
            | {"score": success}
            for role in ("edit", "paraphrases")
        )
        numbers = {FREE: success, f"before.{FREE}": 0.0, KL: kl}
        row = EditRow(index, name, "r", f"p {name}", "new", "old", numbers, texts, "subject")
        rows.append(row)
    return EvaluationReport(editor, mode, tuple(rows), summarise(rows), {"scored": len(rows)}, 1.0)


def test_normalise():
    assert normalise(" The  Netherlands.") == "netherlands" == normalise("netherlands")
    assert normalise("New York-City") == "new yorkcity"
    assert normalise("An apple, a day") == "apple day"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("C", "C++"), ("C#", "C"), ("A", "The"), ("?", "!"), ("3.5", "35"), ("-5", "5")],
        *[
            ("Hepatitis A", "Hepatitis"),
            ("np.bool_", "np.bool"),
            ("$5", "5"),
            ("a", ""),
            ("A-", "A"),
        ],
    ],
)
def test_answers_that_differ_in_signs_or_an_article_alone_are_told_apart(one, other):
    assert is_said(one, (one,)) and is_said(f" {one} ", (one,))
    assert not is_said(other, (one,)) and not is_said(one, (other,))


def test_case_and_punctuation_count_where_they_are_all_that_an_edit_changes():
    for new, old in (("polish", "Polish"), ("Oklahoma!", "Oklahoma"), ("F-16", "F16")):
        assert is_said(old, (new,)) and is_said(old, (new,), "else")
        assert not is_said(old, (new,), old) and is_said(f"{new} ", (new,), old)
        assert is_said(old, (old,), old)


def test_signs_of_other_scripts_and_composed_letters_tell_no_answers_apart():
    for one, other in {"दिल्ली।": "दिल्ली", "ليون؟": "ليون", "Zu\u0308rich": "Z\u00fcrich"}.items():
        assert is_said(one, (other,)) and is_said(other, (one,))


def test_interval_covers_and_is_reproducible():
    interval = Interval.of([0.0, 1.0] * 50)
    assert interval.mean == 0.5 and interval.n == 100
    assert interval.low == pytest.approx(0.4, abs=0.03)
    assert interval.high == pytest.approx(0.6, abs=0.03)
    assert Interval.of([0.0, 1.0] * 50) == interval


def test_a_share_at_its_edge_has_wilsons_interval_and_two_edits_have_none():
    """The bounds solve (p - mean)² = z² p (1 - p) / n."""
    for n in (3, 14, 160):
        zero, one = (Interval.of([value] * n, share=True) for value in (0.0, 1.0))
        assert (zero.low, one.high) == (0.0, 1.0) and zero.high == pytest.approx(1 - one.low)
        assert zero.high**2 == pytest.approx(1.96**2 * zero.high * (1 - zero.high) / n)
    assert Interval.of([0.0] * 160, share=True).high == pytest.approx(0.0234, abs=1e-4)
    assert (
        Interval.of([0.5] * 9, share=True) == Interval.of([0.5] * 9) == Interval(0.5, 0.5, 0.5, 9)
    )
    few = Interval.of([1.0, 0.0], share=True)
    assert (few.mean, few.n, str(few)) == (0.5, 2, "0.500, n = 2") and math.isnan(
        few.low + few.high
    )
    assert few.to_dict("x") == {"x": 0.5, "x.n": 2}


def test_known_and_unknown_facts_are_given_apart():
    rows = [
        EditRow(i, None, None, "p", "n", None, {FREE: value, KL: 1.0}, known=known)
        for i, (value, known) in enumerate(
            [(1.0, True), (0.0, True), (1.0, True), (1.0, False), (0.0, None)]
        )
    ]
    found = summarise(rows)
    assert found[FREE].mean == 0.6 and found[FREE].n == 5
    assert found[f"known.{FREE}"] == Interval.of([1.0, 0.0, 1.0])
    assert (found[f"unknown.{FREE}"].mean, found[f"unknown.{FREE}"].n) == (1.0, 1)
    assert f"known.{KL}" not in found
    whole = [replace(row, values=dict.fromkeys(HEADLINE.values(), 0.5)) for row in rows]
    flat = EvaluationReport("MEND", "single", tuple(whole), summarise(whole), {}, 1.0).to_dict()
    for name in ("score.headline", "known.score.headline", "unknown.score.headline"):
        assert flat[f"single.{name}"] == 0.5


def test_flat_results_have_their_names_and_can_be_read_back():
    made = report("MEND", {"a": (1.0, 0.5), "b": (0.0, 0.1), "c": (1.0, 0.1), "d": (0.0, 0.2)})
    flat = made.to_dict("x.")
    assert {name for name in flat if name.startswith(f"x.single.{FREE}")} == {
        f"x.single.{FREE}{part}" for part in ("", ".n", ".low", ".high")
    }
    assert flat[f"x.single.{FREE}"] == 0.5 and flat["x.single.edits.scored"] == 4
    assert json.loads(json.dumps(flat)) == flat
    assert Summary.from_dict(flat, "x.single.") == made.summary
    del flat[f"x.single.{FREE}.n"]
    with pytest.raises(MendkitError, match=f"x.single.{FREE} has no count"):
        Summary.from_dict(flat, "x.single.")


def test_an_unknown_name_is_told_the_nearest():
    made = report("MEND", {"a": (1.0, 0.5)})
    with pytest.raises(MendkitError, match=f"'edit_succes.free'; did you mean '{FREE}'"):
        made.summary["edit_succes.free"]
    with pytest.raises(MendkitError, match=f"did you mean '{KL}'"):
        compare(made, made, "neighbourhood.kl_nat")
    assert "nothing" not in made.summary and made.summary.get("nothing") is None


def test_frames_have_a_row_an_edit_and_a_row_a_text():
    made = report("MEND", {"a": (1.0, 0.5), "b": (0.0, 0.1)})
    frame = made.frame()
    assert list(frame.index) == [0, 1] and list(frame[FREE]) == [1.0, 0.0]
    assert list(frame["subject"]) == ["subject"] * 2 and list(frame["after"]) == ["new"] * 2
    assert frame.groupby("relation")[FREE].mean()["r"] == 0.5
    texts = made.texts()
    assert list(texts["role"]) == ["edit", "paraphrases"] * 2
    assert list(texts["prompt"])[3] == "paraphrases of b" and list(texts["edit"]) == [0, 0, 1, 1]
    assert repr(made) == "<EvaluationReport of MEND, single: 2 edits, headline score 0.500>"


def test_saved_rows_are_a_report_again(tmp_path):
    made = report("MEND", {"a": (1.0, 0.5), "b": (0.0, 0.1)})
    made.save_rows(tmp_path / "02/rows.jsonl")
    for place in (tmp_path, tmp_path / "02/rows.jsonl"):
        read = EvaluationReport.load(place)
        assert read.frame().equals(made.frame()) and read.texts().equals(made.texts())
        assert read.summary == made.summary
        assert list(compare(made, read)["equal"]) == [2]
    made.save_rows(tmp_path / "03/rows.jsonl")
    with pytest.raises(MendkitError, match=r"holds 2 files rows\.jsonl"):
        EvaluationReport.load(tmp_path)


def test_two_reports_are_compared_over_the_edits_that_both_hold():
    first = report("a", {"1": (1.0, 0.5), "2": (1.0, 0.1), "3": (0.0, 0.3), "4": (1.0, 9.0)})
    second = report("b", {"3": (0.0, 0.2), "2": (0.0, 0.4), "1": (1.0, 0.6), "5": (0.0, 9.0)})
    table = compare(first, second, FREE, KL)
    success, kl = table.loc[FREE], table.loc[KL]
    assert (success["a"], success["b"], success["n"]) == (pytest.approx(2 / 3), 1 / 3, 3)
    assert success["difference"] == pytest.approx(1 / 3)
    assert (success["better"], success["worse"], success["equal"]) == (1, 0, 2)
    assert success["low"] == 0.0 and success["high"] == 1.0
    with pytest.raises(MendkitError, match="no metric 'known'"):
        compare(first, second, "known")
    # A lower KL is better: edits 1 and 2 are, edit 3 is not.
    assert (kl["better"], kl["worse"], kl["equal"]) == (2, 1, 0)
    assert kl["difference"] == pytest.approx((-0.1 - 0.3 + 0.1) / 3)
    assert list(compare(first, second).index) == [HEADLINE["edit"]]
    with pytest.raises(MendkitError, match="share no edit"):
        compare(first, report("b", {"6": (0.0, 0.0)}))


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_an_impossible_share_raises(value):
    rows = [EditRow(3, None, None, "p", "n", None, {FREE: value})]
    with pytest.raises(MendkitError, match=f"{FREE} of edit 3 is .*, expected a share"):
        summarise(rows)
