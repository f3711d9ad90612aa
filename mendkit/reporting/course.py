"""What checks an exercise of notebooks/course: found against expected, and what a mistake gives."""

from collections.abc import Mapping
from typing import Any

import torch
from IPython.display import Markdown, display

from ..errors import MendkitError


class ExerciseError(MendkitError):
    """An exercise that is not solved; a notebook shows the sentence without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


def check(
    what: str,
    found: Any,
    expected: Any,
    *,
    tolerance: float = 1e-5,
    mistakes: Mapping[str, Any] | None = None,
) -> None:
    """Show ✓ if ‖found − expected‖ ≤ tolerance · ‖expected‖; a text must be equal.

    `mistakes`: what a known mistake gives, by a sentence that names it. Raises ExerciseError, which
    tells the mistake, or how found and expected differ.
    """
    if found is None or (isinstance(found, list | tuple) and None in found):
        raise ExerciseError(f"{what}: nothing yet. Write the exercise above, then run this again.")
    error = _distance(found, expected)
    if isinstance(error, float) and error <= tolerance:
        display(Markdown(f"✓ {what} (relative error {error:.0e}, allowed {tolerance:.0e})"))
        return
    for mistake, value in (mistakes or {}).items():
        alike = _distance(found, value)
        if isinstance(alike, float) and alike <= tolerance:
            raise ExerciseError(f"{what}: {mistake}.")
    if isinstance(error, float):
        error = f"the relative error is {error:.1e}, allowed is {tolerance:.0e}"
    raise ExerciseError(f"{what}: {error}.")


def _distance(found: Any, expected: Any) -> float | str:
    """‖found − expected‖ / ‖expected‖, or why there is none."""
    if isinstance(expected, str):
        return 0.0 if found == expected else f"got {found!r}, expected {expected!r}"
    try:
        a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
    except (TypeError, ValueError, RuntimeError):
        return f"got {type(found).__name__}, expected numbers"
    if a.shape != b.shape:
        return f"its shape is {tuple(a.shape)}, expected is {tuple(b.shape)}"
    if not bool(a.isfinite().all()):
        return "some numbers are not finite"
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float64).tiny))
