"""Results as pandas data frames, where pandas is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    import pandas

__all__ = ["data_frame"]


def data_frame(table: Any, index: list[str] | None = None, name: str | None = None) -> pandas.DataFrame:
    """Columns by name, or rows as mappings, as a `pandas.DataFrame`; `index` is the lines' labels and `name` theirs.

    Raises:
        MoeplanError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MoeplanError("to_pandas needs pandas, which is not installed", hint="pip install pandas") from None
    return pandas.DataFrame(table, index=None if index is None else pandas.Index(index, name=name))
