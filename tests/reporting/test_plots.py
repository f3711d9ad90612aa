"""Figures are labelled, whole, and drawn from the rows that are saved; titles tell how it went."""

import ast
import math
from collections.abc import Callable
from pathlib import Path
from statistics import harmonic_mean

import matplotlib
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mendkit.evaluation.results import Interval
from mendkit.reporting import comparison_plots, figures, plots
from mendkit.reporting.figures import Chart

PACKAGE = Path(plots.__file__).parents[1]
SITES = [
    f"model.layers.{b}.mlp.{m}.weight"
    for b in (27, 28)
    for m in ("gate_proj", "up_proj", "down_proj")
]
METRICS = list(plots.HEADLINE_LABELS)
SHARES = list(plots.SHARES)


def interval(mean: float, n: int = 40) -> Interval:
    return Interval(mean=mean, low=max(mean - 0.1, 0.0), high=min(mean + 0.1, 1.0), n=n)


def summary(*means: float) -> dict[str, Interval]:
    return {name: interval(mean) for name, mean in zip(METRICS, means, strict=False)}


def history(*, good: bool = True) -> list[dict[str, float]]:
    """A run of 100 steps that learns (`good`), or does not."""
    rows: list[dict[str, float]] = []
    for step in range(0, 101, 5):
        left = math.exp(-step / 30) if good else 1.0
        where = {"step": step, "seconds": step / 2}
        if step:
            losses = {"edit": 6 * left, "paraphrases": 9 * left, "neighbours": 0.2}
            rows.append({**where, "loss": 1.0, **losses, "unrelated": 0.0})
        if step % 25 == 0:
            shares = [1 - left, 0.8 * (1 - left), 0.9, 1.0]
            values = dict(zip(SHARES, [*shares, harmonic_mean(shares)], strict=True))
            values |= {"loss.edit": 6 * left + 1}
            rows.append({**where, **{f"val.{name}": value for name, value in values.items()}})
    return rows


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    return [row for row in rows if "val.score" in row][-1]


def sweep(key: str, scores: dict[float, float]) -> list[dict[str, float]]:
    flat = dict.fromkeys(SHARES, 0.5)
    return [{key: x, **flat, "score": score} for x, score in scores.items()]


ALPHAS = sweep("edit_lr", {1e-5: 0.02, 1e-4: 0.3, 4e-4: 0.2})
STRENGTHS = sweep("strength", {0: 0.0, 0.5: 0.2, 1: 0.4, 2: 0.6})
FACT = {
    "prompt": "What does a $5 note_in $x$ cost in countries whose name is a very long one?",
    "new": "Lyon", "old": "Paris", "new_token": " Lyon", "old_token": " Paris",
    "before": {" Paris": 0.5, "\n": 0.2, " \x13": 0.1, " $": 0.1, "": 0.01},
    "after": {" Lyon": 0.9, " Paris": 0.05, " 東": 0.01, " the": 0.01, " a": 0.01, " an": 0.01},
}  # fmt: skip
SHIFTS = [
    {"before.log_p.new": -6.0 - i, "log_p.new": -0.1 * i, "before.log_p.old": -1.0, "log_p.old": -i}
    for i in range(9)
]
RANKS = [
    {"site": SITES[0], "tokens": t, "rank": t - t // 5, "full_rank": 576, "error": 1e-6}
    for t in range(1, 20)
]
SIZES = [
    {"size": s, "loss.edit": 5 - 40 * s, "loss.neighbours": s, "edit_success": 9 * s}
    for s in (0, 0.01, 0.1)
]
UPHILL = [{**row, "size": -row["size"], "loss.edit": 5 + 90 * row["size"]} for row in SIZES]
COSINES = [
    {"site": site, "series": series, "cosine": cosine}
    for site in SITES
    for series, cosine in (("a", 0.9), ("b", -0.3))
]
ENERGY = [{"series": "a", "directions": k, "share": 1 - 0.5 / k} for k in range(1, 13)]
RUNS = {
    "Run 1 ($rank$ 2)": summary(0.9, 0.8, 0.9, 1.0),
    "Run 2": {},
    "Run 3": summary(1.0, 0.5, 0.2, 0.6),
}
MANY = [
    {"editor": editor, "edits": k, "metric": metric, "mean": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    for editor in ("sum", "least squares")
    for k in (1, 25)
    for metric in (*METRICS, "retention.all", "norm.relative_max")
] + [{"editor": "sum", "edits": 25, "metric": "drawdown.perplexity", "mean": -0.2}]
WAYS = {"textbook": (2.0, 4.0), "kit": (0.5, 1.0), "kit without trunk cache": (1.0, 1.0)}
COSTS = {
    "tiny": {
        "workload": {"edits_per_step": 2},
        "train": {way: {"seconds_per_edit": s} for way, (s, _) in WAYS.items()},
        "memory": {way: {"above_gb": gb} for way, (_, gb) in WAYS.items()},
        "train_ratio": 4.0, "memory_ratio": 4.0, "equal": True,
    },
    "depths": {"2": {"seconds_per_edit": 1.0, "gflop_per_edit": 3.0},
               "4": {"seconds_per_edit": 1.1, "gflop_per_edit": 3.0}},
}  # fmt: skip
SCORED = {f"edit_success.{name}": interval(0.8) for name in plots.SCORES}
SETTINGS = {"rank": {"2": [0.3, 0.5], "null": [0.6]}, "inner_params": {f"[{'a.w, ' * 20}]": [1.0]}}

MAKE: dict[str, Callable[[], Chart]] = {
    "losses": lambda: plots.loss_curves(history()),
    "validation": lambda: plots.validation_curves(history(), best(history()), n=10),
    "control": lambda: plots.control_curve(ALPHAS, best(history()), n=10),
    "steps": lambda: plots.step_sizes({SITES[0]: 1e-7, SITES[1]: -1e-2}, start=1e-4),
    "one fact": lambda: plots.next_token_bars([FACT]),
    "three facts": lambda: plots.next_token_bars([FACT] * 3),
    "editors": lambda: plots.editors(
        {"trained": summary(0.9, 0.8, 0.9, 1.0), "control": summary(0.5, 0.2, 0.6, 0.9),
         "unedited": summary(0.0)}
    ),
    "decoding": lambda: plots.decoding(SCORED | {"paraphrase.free_exact": interval(0.3)}),
    "relations": lambda: plots.by_relation(
        {f"relation_{i}": interval(i / 20) for i in range(18)}, {"relation_3": interval(0.3)}
    ),
    "one relation": lambda: plots.by_relation({"None": interval(0.5)}, {}),
    "at once": lambda: plots.many_edits(MANY, at_once=True),
    "in a row": lambda: plots.many_edits(MANY, at_once=False),
    "shifts": lambda: plots.probability_shifts(SHIFTS),
    "one shift": lambda: plots.probability_shifts([{"log_p.new": -1.0, "before.log_p.new": -3.0}]),
    "strength": lambda: plots.strength_curve(STRENGTHS, n=10),
    "ranks": lambda: comparison_plots.ranks(RANKS),
    "signs": lambda: comparison_plots.signs(SIZES, UPHILL, n=5),
    "normalisers": lambda: comparison_plots.normalisers({"raw": SIZES, "whitened": SIZES[:2]}, n=5),
    "alignment": lambda: comparison_plots.alignment(COSINES, n=5),
    "spectra": lambda: comparison_plots.spectra(ENERGY, n=5),
    "costs": lambda: plots.charts_of_costs(COSTS)[0],
    "memory": lambda: plots.charts_of_costs(COSTS)[1],
    "depth": lambda: plots.charts_of_costs(COSTS)[2],
    "runs": lambda: comparison_plots.success_against_locality(RUNS, {"Run 1": 0.7, "Run 3": 0.9}),
    "curves": lambda: comparison_plots.curves_of_runs(
        {"Run 1": history(), "Run 3": history(good=False), "Run 4": []}
    ),
    "settings": lambda: comparison_plots.scores_by_setting(SETTINGS),
}  # fmt: skip


@pytest.fixture(params=MAKE)
def chart(request: pytest.FixtureRequest) -> Chart:
    return MAKE[request.param]()


@pytest.mark.filterwarnings("error")
def test_a_chart_is_labelled_and_whole_and_saved_with_its_rows(
    chart: Chart, tmp_path: Path
) -> None:
    """Title, labels, n; all that is drawn lies within the figure; no glyph is missing."""
    figure = chart.figure
    assert " ".join(figure.get_suptitle().split()) == chart.finding
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    texts = [figure.legends[0].get_title().get_text()]
    for ax in figure.axes:
        texts += [ax.get_title(loc="left"), *(tick.get_text() for tick in ax.get_yticklabels())]
    assert chart.name in ("loss_curves", "next_tokens") or any("n = " in text for text in texts)

    with matplotlib.rc_context(figures.STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.05  # inches

    assert chart.save(tmp_path / "figures") is chart
    assert (tmp_path / f"figures/{chart.name}.png").read_bytes()[:4] == b"\x89PNG"
    saved = pd.read_csv(tmp_path / f"figures/{chart.name}.csv", keep_default_na=False)
    assert len(saved) == len(chart.data) > 0 and list(saved) == list(chart.data)
    data, metadata = chart._repr_mimebundle_()
    assert data["text/plain"] == chart.finding and metadata["image/png"]["width"] > 600


def lines(chart: Chart, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """Labelled lines of a panel: x and y."""
    drawn = chart.figure.axes[panel].get_lines()
    return {str(d.get_label()): (list(d.get_xdata()), list(d.get_ydata())) for d in drawn}


def whiskers(chart: Chart, panel: int = 0) -> list[list[list[float]]]:
    """Ends of the whiskers of a panel."""
    return [
        [list(map(float, end)) for end in segment]
        for collection in chart.figure.axes[panel].collections
        for segment in collection.get_segments()
    ]


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    MAKE["ranks"]().png()
    assert dict(matplotlib.rcParams) == before


def test_validation_is_drawn_against_steps_and_seconds() -> None:
    chart = MAKE["validation"]()
    rows = [row for row in history() if "val.score" in row]
    for panel, key in enumerate(("step", "seconds")):
        x, y = lines(chart, panel)["paraphrase"]
        assert x == [row[key] for row in rows] and y == [row["val.paraphrase"] for row in rows]


def test_a_loss_of_zero_is_drawn_at_the_foot_of_its_axis() -> None:
    chart = MAKE["losses"]()
    edit = [row["edit"] for row in history() if "edit" in row]
    assert lines(chart)["edit"][1] == pytest.approx(edit)  # too few to smooth
    assert set(lines(chart, 1)["unrelated"][1]) == {plots.TINY}


def test_editors_have_the_shares_and_intervals_they_were_given() -> None:
    chart = MAKE["editors"]()
    rows = {(row.editor, row.metric): row.mean for row in chart.data.itertuples()}
    assert rows["trained", METRICS[1]] == 0.8 and rows["control", METRICS[3]] == 0.9
    assert ("unedited", METRICS[1]) not in rows
    ends = [[x for x, _ in segment] for segment in whiskers(chart)]
    assert ends == [pytest.approx(x) for x in ([0.8, 1.0], [0.4, 0.6], [0.0, 0.1])]
    assert chart.finding.startswith("trained is number 1 of 3 by headline score, 0.89")
    assert chart.finding.endswith("the best other is control, 0.41")


def test_bands_are_the_intervals_over_edits_and_a_share_without_one_is_a_line() -> None:
    chart = MAKE["in a row"]()
    (band, _) = chart.figure.axes[1].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.4, 0.6)
    assert lines(chart, 4) == {"sum": ([25], [-0.2])}


def test_the_unedited_model_of_a_sweep_is_a_line_and_no_point() -> None:
    chart = MAKE["signs"]()
    minus, plus = (lines(chart)[name] for name in chart.data["series"].unique())
    assert minus == ([0.01, 0.1], [4.6, 1.0])
    assert plus[0] == [0.01, 0.1] and plus[1] == pytest.approx([5.9, 14.0])
    assert any(list(d.get_ydata()) == [5, 5] for d in chart.figure.axes[0].get_lines())


def test_runs_are_points_with_whiskers_both_ways_and_keep_their_numbers() -> None:
    chart = MAKE["runs"]()
    for panel, (x, y) in enumerate(((1.0, 0.9), (0.9, 0.8))):
        across, up = whiskers(chart, panel)[:2]
        assert across == [pytest.approx([x - 0.1, y]), pytest.approx([min(x + 0.1, 1), y])]
        assert up == [pytest.approx([x, y - 0.1]), pytest.approx([x, y + 0.1])]
        assert [text.get_text().strip() for text in chart.figure.axes[panel].texts] == ["1", "3"]


def test_every_share_has_a_line_for_each_run_that_was_validated() -> None:
    chart = MAKE["curves"]()
    rows = [row for row in history() if "val.score" in row]
    for panel, name in enumerate(SHARES):
        drawn = lines(chart, panel)
        assert list(drawn) == ["Run 1", "Run 3"]
        assert drawn["Run 1"][1] == [row[f"val.{name}"] for row in rows]


def test_figures_of_nothing_can_be_drawn() -> None:
    comparison_plots.success_against_locality({}, {}).png()
    comparison_plots.scores_by_setting({}).png()
    comparison_plots.curves_of_runs({}).png()


def test_the_next_tokens_shown_are_both_answers_and_the_most_probable() -> None:
    rows = {row["token"]: row for row in MAKE["one fact"]().data.to_dict("records")}
    assert len(rows) == 7 and list(rows)[:2] == [" Lyon", " Paris"]
    assert (rows[" Lyon"]["before"], rows[" Lyon"]["after"]) == (0, 0.9)


def test_only_the_drawing_modules_import_matplotlib_and_none_pyplot() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        names = []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
        used = any(name.startswith("matplotlib") for name in names)
        assert not used or path.name in ("comparison_plots.py", "figures.py", "plots.py")
        assert "pyplot" not in text.replace("no pyplot", "")
