"""Figures show the numbers that they were given; titles tell how it went.

That they are labelled and whole is tested where notebooks draw them (test_notebooks.py).
"""

import math

import matplotlib
import pandas as pd
import pytest

from mendkit.evaluation.inspection import ALL, PER_FEATURE, SCORED, WHITENED
from mendkit.evaluation.results import Interval
from mendkit.reporting import figures, plots
from mendkit.reporting.figures import Chart

METRICS = list(plots.HEADLINE_LABELS)
SHARES = list(plots.SHARE_LABELS)


def interval(mean: float, n: int = 40) -> Interval:
    return Interval(mean=mean, low=max(mean - 0.1, 0.0), high=min(mean + 0.1, 1.0), n=n)


def summary(*means: float) -> dict[str, Interval]:
    return {name: interval(mean) for name, mean in zip(METRICS, means, strict=False)}


def history(*, good: bool = True) -> list[dict[str, float]]:
    """A run of 100 steps that learns (`good`), or does not."""
    rows: list[dict[str, float]] = []
    for step in range(0, 101, 25):
        left = math.exp(-step / 30) if good else 1.0
        losses = {"edit": 6 * left, "unrelated": 0.0, "val.loss.edit": 6 * left + 1}
        shares = {f"val.{name}": 1 - left for name in SHARES}
        rows.append({"step": step, "seconds": 60 + 3 * step, **losses, **shares})
    return rows


FACT = {
    "prompt": "What does a $5 note_in $x$ cost?",
    "new": "Lyon", "old": "Paris", "new_token": " Lyon", "old_token": " Paris",
    "before": {" Paris": 0.5, "\n": 0.2, " \x13": 0.1, " $": 0.1, "": 0.01},
    "after": {" Lyon": 0.9, " Paris": 0.05, " 東": 0.01, " the": 0.01, " a": 0.01, " an": 0.01},
}  # fmt: skip
RANKS = [{"tokens": t, "rank": t - t // 5, "full_rank": 9, "error": 1e-6} for t in range(1, 20)]


def lines(chart: Chart, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """Labelled lines of a panel: x and y."""
    drawn = chart.figure.axes[panel].get_lines()
    return {str(d.get_label()): (list(d.get_xdata()), list(d.get_ydata())) for d in drawn}


def whiskers(chart: Chart, panel: int = 0) -> list[list[list[float]]]:
    """Ends of the whiskers of a panel."""
    found = []
    for collection in chart.figure.axes[panel].collections:
        for segment in collection.get_segments():
            found.append([list(map(float, end)) for end in segment])
    return found


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    plots.ranks(RANKS).png()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("good", "said"), [(True, "raised"), (False, "did not raise")])
def test_validation_tells_whether_training_paid(good, said):
    rows = history(good=good)
    rows[1]["val.score"] = 0.75 * good
    chart = plots.validation_curves(rows, rows[-1], n=10)
    minutes, scores = [row["seconds"] / 60 for row in rows], [row["val.paraphrase"] for row in rows]
    assert lines(chart)["paraphrase"] == (minutes, scores)
    assert chart.finding.startswith(f"Training {said} the validation score: 0.00")
    reached = [row["seconds"] / 60 for row in rows if row["val.score"] >= 0.8]
    ends = f"; 0.80 after {reached[0]:.1f} minutes" if reached else "; below 0.80"
    assert bool(reached) == good and chart.finding.endswith(ends)


def test_a_loss_of_zero_is_drawn_at_the_foot_of_its_axis():
    chart = plots.loss_curves(history())
    assert lines(chart)["edit"][1] == pytest.approx([row["edit"] for row in history()])
    assert set(lines(chart, 1)["unrelated"][1]) == {plots.TINY}
    assert chart.finding.endswith("from 6.00 to 0.21, on validation edits from 7.00 to 1.21 nats")
    rows = [row | {"paraphrases": 0.3, "val.loss.paraphrases": 0.9} for row in history()]
    said = "; paraphrases ended at 0.30, on validation edits at 0.90"
    assert plots.loss_curves(rows).finding.endswith(said)


def test_strengths_that_noise_cannot_tell_apart_are_named_together():
    scores = {0.0: 0.0, 0.5: 0.6, 1.0: 0.844, 1.5: 0.855, 2.0: 0.79}
    rows = [{"strength": strength, "score": score} for strength, score in scores.items()]
    finding = plots.strengths(rows, n=100).finding
    assert finding.startswith("Score at most 0.85; within one standard error (0.05)")
    assert finding.endswith("strength 1, 1.5; as trained: 0.84")


def test_the_control_wins_a_tie_and_the_end_of_its_range_is_told():
    rows = [{"edit_lr": a, "score": s} for a, s in ((1e-5, 0.1), (1e-4, 0.4), (1e-3, 0.3))]
    won, tied = (plots.control_curve(rows, {"val.score": s}, n=1).finding for s in (0.9, 0.4))
    assert "editor beats" in won and won.endswith("0.90 against 0.40 at α = 1.0e-04")
    assert "does not beat" in tied
    assert "end of the range" in plots.control_curve(rows[:2], {"val.score": 0.9}, n=1).finding


def test_a_logarithmic_axis_has_plain_numbers_between_powers_of_ten():
    rows = [{"edit_lr": a, "score": a} for a in (2e-3, 6e-3, 2e-2)]
    chart = plots.control_curve(rows, {"val.score": 0.5}, n=1)
    chart.png()  # lays the ticks out
    texts = [tick.get_text() for tick in chart.figure.axes[0].get_xticklabels(which="both")]
    assert {"0.01", "0.003"} <= set(texts) and not any("e" in text for text in texts)


def test_editors_have_the_shares_and_intervals_they_were_given():
    summaries = {"trained": summary(0.9, 0.8, 0.9, 1.0), "control": summary(0.5, 0.2, 0.6, 0.9)}
    chart = plots.editors(summaries | {"unedited": summary(0.0)})
    rows = {(row.editor, row.metric): row.mean for row in chart.data.itertuples()}
    assert rows["trained", METRICS[1]] == 0.8 and rows["control", METRICS[3]] == 0.9
    assert ("unedited", METRICS[1]) not in rows
    ends = [[x for x, _ in segment] for segment in whiskers(chart)]
    assert ends == [pytest.approx(x) for x in ([0.8, 1.0], [0.4, 0.6], [0.0, 0.1])]
    assert chart.finding == "Headline score: trained 0.89, control 0.41, unedited 0.00"


def test_bands_are_the_intervals_over_edits_and_a_share_without_one_is_a_line():
    where = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 40, "metric": "retention.all"}
    rows = [{"editor": name, "edits": k, **where} for name in ("sum", "other") for k in (1, 25)]
    lone = {"editor": "sum", "edits": 25, "metric": "drawdown.perplexity", "mean": -0.2}
    chart = plots.many_edits([*rows, lone], name="in_a_row")
    heights = chart.figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.4, 0.6)
    assert lines(chart, 1) == {"sum": ([25], [-0.2])}
    ax = chart.figure.axes[1]
    assert ax.get_title("left") == "perplexity gained on other text"
    assert ax.get_ylabel() == "perplexity"


def test_the_unedited_model_of_a_sweep_is_a_line_and_no_point():
    minus = [{"size": s, "loss.edit": 5 - 40 * s, "loss.neighbours": s} for s in (0, 0.01, 0.1)]
    plus = [{**row, "size": -row["size"], "loss.edit": 5 + 90 * row["size"]} for row in minus]
    chart = plots.size_curves("signs", {"minus": minus, "plus": plus}, n=5)
    assert lines(chart)["minus"] == ([0.01, 0.1], [4.6, 1.0])
    assert lines(chart)["plus"] == ([0.01, 0.1], pytest.approx([5.9, 14.0]))
    assert any(list(d.get_ydata()) == [5, 5] for d in chart.figure.axes[0].get_lines())
    assert chart.finding.endswith("5.00 nats; at its lowest 1.00 by minus, 5.90 by plus")


def test_ranks_above_the_number_of_tokens_are_told():
    assert "19 gradients are sums" in plots.ranks(RANKS).finding
    wrong = [{"tokens": 3, "rank": 4, "full_rank": 9, "error": error} for error in (0.2, math.nan)]
    assert "2 gradients are not sums" in plots.ranks(wrong).finding
    assert plots.ranks(wrong).finding.endswith("2 exceed that rank")


def test_an_editor_has_the_same_colour_and_marker_in_all_figures():
    """03 draws these together; names that it does not know take the colours that are left."""
    assert {PER_FEATURE, WHITENED, ALL, SCORED, "trained", "untrained"} == set(figures.EDITORS)
    found = {}
    for names in ([ALL, WHITENED, "trained"], [PER_FEATURE, "trained", "other"], ["other", SCORED]):
        rows = [{"series": name, "directions": 1, "share": 0.5} for name in names]
        drawn = plots.spectra(rows, n=1).figure.axes[0].get_lines()
        looks = {line.get_label(): (line.get_color(), line.get_marker()) for line in drawn}
        assert len(set(looks.values())) == len(names)
        for name in names:
            if name != "other":
                assert found.setdefault(name, looks[name]) == looks[name]


def test_a_scatter_has_the_points_of_a_frame_and_their_rank_correlation():
    frame = pd.DataFrame({"x": [1.0, 2.0, 9.0, None], "y": [0.1, 0.3, 0.2, 5.0]})
    chart = plots.scatter(frame, "x", "y")
    (points,) = chart.figure.axes[0].collections
    assert points.get_offsets().tolist() == [[1.0, 0.1], [2.0, 0.3], [9.0, 0.2]]
    assert chart.finding == "Rank correlation of y with x: 0.50" and len(chart.data) == 3


def test_runs_are_points_with_whiskers_both_ways_and_keep_their_numbers():
    runs = {"Run 1": summary(0.9, 0.8, 0.9, 1.0), "Run 2": {}, "Run 3": summary(1, 0.5, 0.2, 0.6)}
    chart = plots.success_against_locality(runs, {"Run 1": 0.7, "Run 3": 0.9})
    for panel, (x, y) in enumerate(((1.0, 0.9), (0.9, 0.8))):
        across, up = whiskers(chart, panel)[:2]
        assert across == [pytest.approx([x - 0.1, y]), pytest.approx([min(x + 0.1, 1), y])]
        assert up == [pytest.approx([x, y - 0.1]), pytest.approx([x, y + 0.1])]
        assert [text.get_text().strip() for text in chart.figure.axes[panel].texts] == ["1", "3"]
    assert chart.finding == "Score of 2 runs: 0.70 (Run 1) to 0.90 (Run 3)"
    assert plots.success_against_locality({}, {}).png()


def test_a_bar_of_costs_is_what_was_measured():
    ways = {"textbook": {"seconds_per_edit": 2.0}, "kit": {"seconds_per_edit": 0.5}}
    found = {"train": ways, "train_ratio": 4.0, "equal": False}
    memory = {"memory": {"kit": {"above_gb": 1.0}}, "memory_ratio": 3.0}
    time, _ = plots.charts_of_costs({"tiny": found | memory})
    assert [bar.get_width() for bar in time.figure.axes[0].patches] == [2.0, 0.5]
    assert time.finding.endswith("over kit: 4.0 (tiny, not the same numbers)")


@pytest.mark.filterwarnings("error")  # a glyph that is missing
def test_the_next_tokens_shown_are_both_answers_and_the_most_probable():
    chart = plots.next_token_bars([FACT])
    rows = {row["token"]: row for row in chart.data.to_dict("records")}
    assert len(rows) == 7 and list(rows)[:2] == [" Lyon", " Paris"]
    assert (rows[" Lyon"]["before"], rows[" Lyon"]["after"]) == (0, 0.9)
    assert "0 of 1 facts before the edit, of 1 after" in chart.finding
    assert chart.png()
