"""What all figures share: the style sheet, panels, dots with whiskers, and the finished chart.

Figures are plain `Figure` objects: no pyplot, no global state. Colours are those of Okabe and Ito, and
markers differ, too.
"""

import base64
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pandas as pd
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatter

WIDTH, DPI = 7.2, 150  # inches, dots per inch
BLACK, GREY, BLUE, ORANGE = "#222222", "#8A8A8A", "#0072B2", "#E69F00"
GREEN, RED, PURPLE = "#009E73", "#D55E00", "#CC79A7"
SHARE_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)

STYLE: dict[str, Any] = {
    "font.size": 8,
    "text.parse_math": False,  # a dollar sign in a prompt is a dollar sign
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.08,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PURPLE, RED, BLACK])
    + cycler(marker=["o", "s", "^", "D", "v", "X"]),
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "errorbar.capsize": 0,
    "legend.frameon": False,
    "savefig.dpi": DPI,
}

P, R = ParamSpec("P"), TypeVar("R")


def in_style(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw under the style sheet; matplotlib's settings stay as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@dataclass(frozen=True)
class Chart:
    """A figure, its title (the finding) and the rows it was drawn from. Shows itself in a notebook."""

    name: str
    finding: str
    figure: Figure
    data: pd.DataFrame

    @in_style
    def png(self) -> bytes:
        """The figure as PNG; the finding is its title."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", metadata={"Title": self.finding})
        return buffer.getvalue()

    def save(self, folder: str | Path) -> "Chart":
        """Write `<name>.png` and `<name>.csv` into the folder (made if need be); returns the chart."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.png").write_bytes(self.png())
        self.data.to_csv(folder / f"{self.name}.csv", index=False)
        return self

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.finding}
        return data, {"image/png": {"width": round(WIDTH * 100)}}


def panels(count: int, height: float, *, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `height` inches with `count` panels in rows of at most `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def finish(
    name: str, finding: str, figure: Figure, data: Any, *, note: str, legend: bool = True
) -> Chart:
    """Put the finding on top, and below the note and the legend of the first panel."""
    title = textwrap.fill(finding.replace(" = ", "\u00a0=\u00a0"), 80)
    figure.suptitle(title, x=0.01, ha="left")
    handles, labels = [], []
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
    below = figure.legend(handles, labels, loc="outside lower left", ncol=3, title=note)
    below.set_alignment("left")
    below.get_title().set_color("#555555")
    return Chart(name, finding, figure, pd.DataFrame(data))


def drawable(text: str) -> str:
    """Text with the characters that the font lacks (control signs, some scripts) as \\u codes."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in text)


def categories(ax: Axes, names: Sequence[str]) -> None:
    """Names down the y axis, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")


def mark(ax: Axes, x: float, text: str) -> None:
    """A dashed vertical line, named above the axes."""
    ax.axvline(x, color=GREY, lw=1, ls="--")
    above = ax.get_xaxis_transform()
    ax.text(x, 1, text, transform=above, ha="center", va="bottom", color=GREY)


def logarithmic(ax: Axes, *names: str) -> None:
    """Logarithmic axes ("x", "y") with plain numbers as labels."""
    for name in names:
        ax.set(**{f"{name}scale": "log"})
        axis = getattr(ax, f"{name}axis")
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def whiskers(frame: pd.DataFrame) -> list["pd.Series[float]"]:
    """Lengths of the whiskers of rows with `mean`, `low` and `high`; none where these are missing."""
    # Rounding may put a bound on the wrong side of the mean.
    return [
        (frame["mean"] - frame["low"]).clip(lower=0),
        (frame["high"] - frame["mean"]).clip(lower=0),
    ]


def dots(
    ax: Axes,
    frame: pd.DataFrame,
    names: Sequence[str],
    series: Mapping[str, tuple[str, str]],
    *,
    apart: float = 0.26,
) -> None:
    """Shares with their intervals, a dot for each row; its value is printed on the right.

    Rows have `category` (one of `names`, down the y axis), `series`, `mean`, `low` and `high`.
    `series` gives colour and marker; its members stand `apart`.
    """
    for k, (name, (colour, marker)) in enumerate(series.items()):
        part = frame[frame["series"] == name]
        y = part["category"].map(list(names).index) + apart * (k - (len(series) - 1) / 2)
        style = {"fmt": marker, "color": colour, "ms": 5.5, "label": name}
        ax.errorbar(part["mean"], y, xerr=whiskers(part), **style)
        for mean, at in zip(part["mean"], y, strict=True):
            ax.text(1.05, at, f"{mean:.2f}", color=colour, va="center")
    categories(ax, names)
    ax.set(xlim=(-0.03, 1.17), xticks=SHARE_TICKS)
