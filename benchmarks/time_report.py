"""How errors of the time model are written: for `time_accuracy` and `serving_accuracy`."""

from __future__ import annotations

import numpy as np

Row = tuple[str, ...]
#: Columns of `scores`.
SCORES = ("rows", "median error", "9 in 10 within", "worst", "bias", "bar", "reached")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{100 * value:+.1f} %"


def scores(error: np.ndarray, median_bar: float | None, worst_bar: float | None = None) -> Row:
    """Relative errors in words, as `SCORES` names them; a bar on the median and one on every row."""
    size = abs(error)
    median, worst = float(np.median(size)), float(size.max())
    wanted = [f"median {percent(median_bar)}"] if median_bar else []
    wanted += [f"worst {percent(worst_bar)}"] if worst_bar else []
    reached = (median_bar is None or median <= median_bar) and (worst_bar is None or worst <= worst_bar)
    return (
        str(len(error)), percent(median), percent(float(np.quantile(size, 0.9))), percent(worst),
        signed(float(np.median(error))), ", ".join(wanted) or "-", ("yes" if reached else "**no**") if wanted else "-",
    )  # fmt: skip
