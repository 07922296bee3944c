"""How errors of the time model are written: for `time_accuracy` and `serving_accuracy`."""

from __future__ import annotations

import numpy as np

Row = tuple[str, ...]
#: Columns of `scores`.
SCORES = ("rows", "median error", "9 in 10 within", "worst", "bias", "target", "met")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{100 * value:+.1f} %"


def scores(error: np.ndarray, median_target: float | None, worst_target: float | None = None) -> Row:
    """Relative errors in words, as `SCORES` names them; a target on the median and one on every row."""
    size = abs(error)
    median, worst = float(np.median(size)), float(size.max())
    wanted = [f"median {percent(median_target)}"] if median_target else []
    wanted += [f"worst {percent(worst_target)}"] if worst_target else []
    met = (median_target is None or median <= median_target) and (worst_target is None or worst <= worst_target)
    return (
        str(len(error)), percent(median), percent(float(np.quantile(size, 0.9))), percent(worst),
        signed(float(np.median(error))), ", ".join(wanted) or "-", ("yes" if met else "**no**") if wanted else "-",
    )  # fmt: skip
