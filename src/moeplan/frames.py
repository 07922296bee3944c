"""Results as pandas data frames, where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeplan.errors import MoeplanError

__all__ = ["data_frame"]


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A `pandas.DataFrame` of one row per mapping.

    Raises:
        MoeplanError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MoeplanError("pandas is not installed", hint="pip install pandas, or use to_dict()") from None
    return pandas.DataFrame(list(rows))
