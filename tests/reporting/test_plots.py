"""Figures: labelled, whole, drawn from the rows that are saved, with titles that tell how it went."""

import ast
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import harmonic_mean

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mendkit.evaluation.results import Interval
from mendkit.reporting import plots
from mendkit.reporting.figures import Chart

PACKAGE = Path(plots.__file__).parents[1]
SITES = [
    f"model.layers.{b}.mlp.{m}.weight"
    for b in (27, 28)
    for m in ("gate_proj", "up_proj", "down_proj")
]
METRICS = list(plots.HEADLINE_LABELS)


def interval(mean: float, n: int = 40) -> Interval:
    return Interval(mean=mean, low=max(mean - 0.1, 0.0), high=min(mean + 0.1, 1.0), n=n)


def history(*, good: bool) -> list[dict[str, float]]:
    """A run of 100 steps that learns (`good`), or does not."""
    rows: list[dict[str, float]] = []
    for step in range(0, 101, 5):
        left = math.exp(-step / 30) if good else 1.0
        if step:
            losses = {
                "edit": 6 * left,
                "paraphrases": 9 * left,
                "neighbours": 0.2,
                "unrelated": 0.0,
            }
            rows.append(
                {"step": step, "seconds": step / 2, "loss": 1.0, **losses, "grad_norm": 1.0}
            )
        if step % 25 == 0:
            shares = {
                "edit_success": 1 - left,
                "paraphrase": 0.8 * (1 - left),
                "neighbourhood": 0.9,
                "locality": 1.0,
            }
            values = {
                **shares,
                "score": harmonic_mean(shares.values()),
                "loss": 1.0,
                "loss.edit": 6 * left + 1,
            }
            rows.append(
                {
                    "step": step,
                    "seconds": 9 + step / 2,
                    **{f"val.{k}": v for k, v in values.items()},
                }
            )
    return rows


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    return [row for row in rows if "val.score" in row][-1]


SHARES = ("edit_success", "paraphrase", "neighbourhood", "locality", "score")
SWEEP = [
    {"edit_lr": a, **dict(zip(SHARES, (a * 2e3, a * 1e3, 1 - a * 2e3, 0.9, score), strict=True))}
    for a, score in ((1e-5, 0.02), (1e-4, 0.3), (4e-4, 0.2))
]
STRENGTHS = [
    {"strength": s, **dict(zip(SHARES, (s / 2, s / 2, 1 - s / 4, 1.0, s / 3), strict=True))}
    for s in (0, 0.5, 1, 2)
]
FACT = {
    "prompt": "What does a $5 note_in $x$ cost in the countries that have a very long name, as some have?",
    "new": "Lyon", "old": "Paris", "new_token": " Lyon", "old_token": " Paris",
    "before": {" Paris": 0.5, "\n": 0.2, " \x13": 0.1, " $": 0.1, "": 0.01},
    "after": {" Lyon": 0.9, " Paris": 0.05, " 東": 0.01, " the": 0.01, " a": 0.01, " an": 0.01, " of": 0.01},
}  # fmt: skip
SHIFTS = [
    {
        "before.log_p.new": -6.0 - i,
        "log_p.new": -0.1 * i,
        "before.log_p.old": -1.0,
        "log_p.old": -2.0 - i,
    }
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
    {"site": s, "series": k, "cosine": c - i / 9}
    for i, s in enumerate(SITES)
    for k, c in (("a", 0.9), ("b", 0.3))
]
ENERGY = [
    {"series": s, "directions": k, "share": 1 - x / k}
    for s, x in (("a", 0.5), ("b", 0.9))
    for k in range(1, 13)
]


def summary(*means: float) -> dict[str, Interval]:
    return {name: interval(mean) for name, mean in zip(METRICS, means, strict=True)}


RUNS = {
    "Run 1 ($rank$ 2)": summary(0.9, 0.8, 0.9, 1.0),
    "Run 2": {},
    "Run 3": summary(1.0, 0.5, 0.2, 0.6),
}


def charts() -> Iterator[Chart]:
    for good in (True, False):
        rows = history(good=good)
        yield plots.loss_curves(rows)
        yield plots.validation_curves(rows, best(rows), n=10)
        yield plots.control_curve(SWEEP, best(rows), n=10)
    yield plots.step_sizes({site: 1e-4 * 1.3**i for i, site in enumerate(SITES)}, start=1e-4)
    yield plots.step_sizes(dict.fromkeys(SITES, 1e-4), start=1e-4)
    yield plots.step_sizes({SITES[0]: 1e-7, SITES[1]: 1e-2}, start=1e-4)
    for count in (1, 2, 3, 4):
        yield plots.next_token_bars([FACT] * count)
    yield plots.headline(
        summary(0.9, 0.8, 0.9, 1.0) | {"before." + METRICS[0]: interval(0.0)},
        summary(0.5, 0.2, 0.6, 0.9),
    )
    for mean in (0.0, 0.8):
        scored = {f"edit_success.{name}": interval(mean) for name in plots.SCORES}
        yield plots.decoding(scored | {"paraphrase.free_exact": interval(0.3)})
        yield plots.editors(
            {
                "trained": summary(*[mean] * 4) | scored,
                "context": {METRICS[0]: interval(0.4)} | scored,
            }
        )
    yield plots.by_relation(
        {f"relation_{i}": interval(i / 20) for i in range(18)}, {"relation_3": interval(0.3)}
    )
    yield plots.by_relation({"None": interval(0.5)}, {})
    yield plots.probability_shifts(SHIFTS)
    yield plots.probability_shifts([{"log_p.new": -1.0, "before.log_p.new": -3.0}])
    yield plots.strength_curve(STRENGTHS, n=10)
    yield plots.ranks(RANKS)
    yield plots.signs(SIZES, UPHILL, n=5)
    yield plots.normalisers(
        {
            "gradient, scored tokens": SIZES,
            "per feature": [{"size": 0.1, "loss.edit": 1, "edit_success": 1}],
        },
        n=5,
    )
    yield plots.alignment(COSINES, n=5)
    yield plots.spectra(ENERGY, n=5)
    yield plots.success_against_locality(RUNS, {"Run 1 ($rank$ 2)": 0.7, "Run 3": 0.9})
    yield plots.curves_of_runs(
        {"Run 1 ($rank$ 2)": history(good=True), "Run 3": history(good=False), "Run 4": []}
    )
    yield plots.scores_by_setting(
        {"rank": {"2": [0.3, 0.5], "null": [0.6]}, "inner_params": {f"[{'a.w, ' * 20}]": [1]}}
    )


CHARTS = {f"{chart.name}-{i}": chart for i, chart in enumerate(charts())}


@pytest.fixture(params=CHARTS)
def chart(request: pytest.FixtureRequest) -> Chart:
    return CHARTS[request.param]


def test_both_axes_are_labelled_and_the_title_is_the_finding(chart: Chart) -> None:
    figure = chart.figure
    assert " ".join(figure.get_suptitle().split()) == chart.finding
    assert all(ax.get_xlabel() for ax in figure.axes)
    inner = [ax for ax in figure.axes if not ax.get_subplotspec().is_first_col()]
    assert all(ax.get_ylabel() for ax in figure.axes if ax not in inner)


def test_n_is_stated(chart: Chart) -> None:
    """In the note, a panel's title or the categories; losses are per batch, next tokens of one fact each."""
    texts = [chart.figure.legends[0].get_title().get_text()]
    for ax in chart.figure.axes:
        texts += [ax.get_title(loc="left"), *(tick.get_text() for tick in ax.get_yticklabels())]
    assert chart.name in ("loss_curves", "next_tokens") or any("n = " in text for text in texts)


@pytest.mark.filterwarnings("error")
def test_nothing_is_cut_off(chart: Chart) -> None:
    """All that is drawn lies within the figure (to a twentieth of an inch); no glyph is missing."""
    canvas = FigureCanvasAgg(chart.figure)
    canvas.draw()
    box, (width, height) = (
        chart.figure.get_tightbbox(canvas.get_renderer()),
        chart.figure.get_size_inches(),
    )
    assert box.x0 > -0.05 and box.y0 > -0.05 and box.x1 < width + 0.05 and box.y1 < height + 0.05


def test_saving_writes_the_picture_and_its_rows(chart: Chart, tmp_path: Path) -> None:
    assert chart.save(tmp_path / "figures") is chart
    png, table = (tmp_path / "figures" / f"{chart.name}.{kind}" for kind in ("png", "csv"))
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(chart.rows) > 0
    for saved, row in zip(rows, chart.rows, strict=True):
        assert {k: v for k, v in saved.items() if v} == {
            k: str(v) for k, v in row.items() if v not in (None, "")
        }


def test_a_notebook_shows_the_picture_and_the_finding(chart: Chart) -> None:
    data, metadata = chart._repr_mimebundle_()
    assert (
        data["text/plain"] == chart.finding
        and data["image/png"]
        and metadata["image/png"]["width"] > 600
    )


def lines(chart: Chart, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """Labelled lines of a panel: x and y."""
    drawn = chart.figure.axes[panel].get_lines()
    return {
        str(d.get_label()): ([*map(float, d.get_xdata())], [*map(float, d.get_ydata())])
        for d in drawn
    }


def test_validation_is_drawn_against_steps_and_seconds() -> None:
    rows = history(good=True)
    chart = plots.validation_curves(rows, best(rows), n=10)
    val = [row for row in rows if "val.score" in row]
    for panel, key in enumerate(("step", "seconds")):
        x, y = lines(chart, panel)["paraphrase"]
        assert x == [row[key] for row in val] and y == [row["val.paraphrase"] for row in val]


def test_losses_are_drawn_per_role_and_a_loss_of_zero_does_no_harm() -> None:
    rows = history(good=True)
    chart = plots.loss_curves(rows)
    assert {"edit", "paraphrases"} <= set(lines(chart))
    assert {"neighbours", "unrelated prompts"} <= set(lines(chart, 1))
    assert lines(chart)["edit"][1] == pytest.approx(
        [row["edit"] for row in rows if "edit" in row]
    )  # too few to smooth
    assert set(lines(chart, 1)["unrelated prompts"][1]) == {plots.TINY}


def test_the_figure_of_editors_draws_what_each_has() -> None:
    low = {"edit_success.tf_exact": interval(1.0)}
    chart = plots.editors(
        {"a": summary(0.9, 0.8, 0.9, 1.0) | low, "b": {METRICS[0]: interval(0.4)} | low}
    )
    assert [(row["editor"], row["mean"]) for row in chart.rows if row["metric"] == METRICS[0]] == [
        ("a", 0.9),
        ("b", 0.4),
    ]
    assert len(chart.rows) == 5 and chart.finding.startswith(
        "Best of 2 by the headline score: a, 0.89"
    )
    assert chart.finding.endswith("by teacher forcing: 2 share the lead, 1.00")


def test_the_headline_figure_draws_the_intervals_it_was_given() -> None:
    trained, control = summary(0.9, 0.8, 0.9, 1.0), summary(0.5, 0.2, 0.6, 0.9)
    trained["before." + METRICS[0]] = interval(0.05)
    chart = plots.headline(trained, control)
    rows = {(row["editor"], row["metric"]): row["mean"] for row in chart.rows}
    assert rows["trained editor", METRICS[1]] == 0.8 and rows["identity control", METRICS[3]] == 0.9
    assert (
        rows["unedited", METRICS[0]] == 0.05 and rows["unedited", METRICS[2]] == 1.0
    )  # compared with itself
    ends = [
        x for x, _ in (line.get_data() for line in chart.figure.axes[0].get_lines()) if len(x) == 2
    ]
    assert [pytest.approx(x) for x in ([0.8, 1.0], [0.4, 0.6])] == [ends[2], ends[1]]


def test_sizes_are_drawn_without_the_unedited_model_which_is_a_line() -> None:
    chart = plots.signs(SIZES, UPHILL, n=5)
    minus, plus = (lines(chart)[name] for name in ("minus: W − α Σ δ uᵀ", "plus: W + α Σ δ uᵀ"))
    assert (
        minus == ([0.01, 0.1], [4.6, 1.0])
        and plus[0] == [0.01, 0.1]
        and plus[1] == pytest.approx([5.9, 14.0])
    )
    assert any([*map(float, d.get_ydata())] == [5, 5] for d in chart.figure.axes[0].get_lines())
    assert len(chart.rows) == 6 and {row["series"] for row in chart.rows} == set(lines(chart)) - {
        k for k in lines(chart) if k.startswith("_")
    }


def test_runs_are_points_with_whiskers_both_ways_and_keep_their_numbers() -> None:
    chart = plots.success_against_locality(RUNS, {"a": 0.7, "b": 0.9})
    assert [(row["run"], row["settings"]) for row in chart.rows] == [
        (1, "Run 1 ($rank$ 2)"),
        (3, "Run 3"),
    ] * 2
    last = chart.rows[-1]
    assert (last[f"{METRICS[2]}.mean"], last[f"{METRICS[1]}.low"], last["n"]) == (0.2, 0.4, 40)
    for panel, (x, y) in enumerate(((1.0, 0.9), (0.9, 0.8))):
        ends = [
            tuple(map(tuple, line.get_data())) for line in chart.figure.axes[panel].get_lines()[:3]
        ]
        assert ends == [
            ((x - 0.1, min(x + 0.1, 1)), (y, y)),
            ((x, x), (y - 0.1, y + 0.1)),
            ((x,), (y,)),
        ]
        assert [text.get_text().strip() for text in chart.figure.axes[panel].texts] == ["1", "3"]


def test_every_share_has_a_line_for_each_run_that_was_validated() -> None:
    rows = history(good=True)
    chart = plots.curves_of_runs({"a": rows, "b": history(good=False), "edited only": []})
    assert chart.finding.startswith("a has the highest score of 2 runs")
    assert [ax.get_ylabel() for ax in chart.figure.axes] == [
        plots.SHARES[name][0] for name in SHARES
    ]
    for ax, name in zip(chart.figure.axes, SHARES, strict=True):
        x, y = ax.get_lines()[0].get_data()
        found = [(row["step"], row[f"val.{name}"]) for row in rows if "val.score" in row]
        assert list(zip(x, y, strict=True)) == found and len(ax.get_lines()) == 2


def test_the_findings_of_a_sweep_name_the_best_and_what_moves_the_score() -> None:
    assert (
        plots.findings.runs({"a": 0.2, "b": 0.9})
        == "b has the highest score of 2 runs, 0.90; the lowest is 0.20"
    )
    assert plots.findings.runs({"a": 0.2, "b": 0.2}) == "No run is ahead: 2 scored 0.20"
    assert plots.findings.runs({}) == "No run was scored"
    scores = {
        "seed": {"1": [0.1, 0.9], "2": [0.3, 0.8]},
        "rank": {"8": [0.1, 0.3], "16": [0.9, 0.8]},
    }
    assert plots.findings.settings(scores).startswith(
        "The score depends most on rank: 0.20 on average with 8, 0.85"
    )
    assert "No setting" in plots.findings.settings({"seed": {"1": [0.5], "2": [0.5]}})
    plots.success_against_locality({}, {}).png()
    plots.scores_by_setting({}).png()
    plots.curves_of_runs({}).png()


def test_a_metric_that_the_data_lack_is_left_out() -> None:
    few = {METRICS[0]: interval(0.9)}
    assert {row["metric"] for row in plots.headline(few, few).rows} == {METRICS[0]}
    rows = [{k: v for k, v in row.items() if "neigh" not in k} for row in history(good=True)]
    assert "neighbourhood" not in lines(plots.validation_curves(rows, best(rows), n=10))
    plots.loss_curves(
        [{k: v for k, v in row.items() if k not in ("neighbours", "unrelated")} for row in rows]
    ).png()


def test_only_plots_imports_matplotlib_and_never_pyplot() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        used = [name for name in names if name.startswith("matplotlib")]
        assert path.name == "plots.py" or not used
        assert not any("pyplot" in name for name in used)
