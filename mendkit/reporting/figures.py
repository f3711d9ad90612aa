"""What all figures share: panels, lines, dots with whiskers, the finished chart.

Figures are plain `Figure` objects: no pyplot, no global state. `figures.mplstyle` has their look.
"""

import base64
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatter

from ..runs import user_path

WIDTH = 7.2  # inches
BLACK, GREY = "#222222", "#6B6B6B"
# An editor has the same colour and marker in all figures: its place in the style's cycle.
EDITORS = {"trained": 0, "untrained": 1, "whitened keys": 1, "normalised per feature": 2}
EDITORS |= {"gradient, all tokens": 3, "gradient, scored tokens": 4}
STYLE = Path(__file__).with_name("figures.mplstyle")
in_style = rc_context(fname=STYLE)
"""Decorates what draws; matplotlib's settings are the user's again after it."""


class PlainLog(LogFormatter):
    """Plain numbers at the ticks between powers of ten for which there is room."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


@dataclass(frozen=True)
class Chart:
    """A figure, its title (the finding) and the rows it was drawn from. A notebook shows it."""

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
        """Write `<name>.png` and `<name>.csv` into the folder; returns the chart."""
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.png").write_bytes(self.png())
        self.data.to_csv(folder / f"{self.name}.csv", index=False)
        return self

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.finding}
        return data, {"image/png": {"width": round(WIDTH * 100)}}


def panels(count: int, height: float, *, columns: int = 2) -> list[Axes]:
    """The panels of a new figure, in rows of at most `columns`; `height` of a row, in inches."""
    count = max(count, 1)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 1.2 + rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def finish(
    name: str, finding: str, axes: Sequence[Axes], data: pd.DataFrame, *, note: str, **labels: str
) -> Chart:
    """Put the finding on top, `xlabel` and `ylabel` on all panels, note and legend below."""
    figure = axes[0].get_figure()
    assert isinstance(figure, Figure)
    title = textwrap.fill(finding, 76, break_on_hyphens=False)
    figure.suptitle(title, x=0.01, ha="left")
    handles: dict[str, Any] = {}
    for ax in axes:
        ax.set(**labels)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = figure.legend(handles.values(), handles, loc="outside lower left", ncols=3, title=note)
    legend.set_alignment("left")
    return Chart(name, finding, figure, data)


def span(values: "Mapping[Any, float] | pd.Series[float]", form: str = ".2f") -> str:
    """The least and the greatest value, with their names."""
    known = dict(values)
    least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return f"{known[least]:{form}} ({least}) to {known[most]:{form}} ({most})"


def drawable(text: str) -> str:
    """Text with the characters that the font lacks (control signs, some scripts) as \\u codes."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in text)


def categories(ax: Axes, names: Sequence[str]) -> None:
    """Names down the y axis, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def mark(ax: Axes, x: float, text: str) -> None:
    """A dashed vertical line, named above the axes."""
    ax.axvline(x, color=GREY, ls="--")
    ax.set_title(f"dashed: {text}")


def logarithmic(ax: Axes, *names: str) -> None:
    """Logarithmic axes ("x", "y") with plain numbers as labels."""
    for name in names:
        ax.set(**{f"{name}scale": "log"})
        axis = getattr(ax, f"{name}axis")
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(PlainLog(labelOnlyBase=False))


def shares(ax: Axes, *names: str) -> None:
    """Axes ("x", "y") from 0 to 1."""
    for name in names:
        ax.set(**{f"{name}lim": (-0.03, 1.03), f"{name}ticks": (0, 0.2, 0.4, 0.6, 0.8, 1)})


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker by name: an editor's own, others those that are left, in their order."""
    style = list(rcParams["axes.prop_cycle"])
    taken = {EDITORS[name] for name in names if name in EDITORS}
    left = itertools.cycle([k for k in range(len(style)) if k not in taken])
    return {name: style[EDITORS[name] if name in EDITORS else next(left)] for name in names}


def lines(ax: Axes, frame: pd.DataFrame, x: str, y: str, series: str) -> None:
    """A line for each value of the column `series`, with a band if rows have `low` and `high`."""
    look = looks(list(frame[series].unique()))
    for name, part in frame.groupby(series, sort=False):
        (line,) = ax.plot(part[x], part[y], label=name, **look[name])
        if "low" in part:
            band = (part[x], part["low"], part["high"])
            ax.fill_between(*band, color=line.get_color(), alpha=0.12, lw=0)


def whiskers(frame: pd.DataFrame) -> list["pd.Series[float]"]:
    """Lengths of the whiskers of rows with `mean`, `low` and `high`."""
    # Rounding may put a bound on the wrong side of the mean.
    below, above = frame["mean"] - frame["low"], frame["high"] - frame["mean"]
    return [below.clip(lower=0), above.clip(lower=0)]


def dots(ax: Axes, frame: pd.DataFrame, rows: Mapping[str, str], series: str) -> None:
    """Means with intervals, a dot for each row of `frame`; its value is printed on the right.

    `rows` maps the values of the column `row` to names, which stand down the y axis.
    """
    order = list(rows)
    names = list(frame[series].unique())
    for k, name in enumerate(names):
        part = frame[frame[series] == name]
        y = part["row"].map(order.index) + 0.26 * (k - (len(names) - 1) / 2)
        ax.errorbar(
            part["mean"], y, xerr=whiskers(part), ls="", label=name if len(names) > 1 else ""
        )
        for mean, at in zip(part["mean"], y, strict=True):
            ax.text(1.05, at, f"{mean:.2f}", va="center")
    categories(ax, list(rows.values()))
    shares(ax, "x")
    ax.set_xlim(-0.03, 1.17)
