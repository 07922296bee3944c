"""One self-contained HTML page: a title, notices, and sections of one sentence with figures and a table.

Nothing is loaded from elsewhere, so a page can be mailed and read offline; it fits a phone as well as a desk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplan import __version__
from moeplan.report.figures import Image

__all__ = ["Section", "Table", "render", "write_page"]


@dataclass(frozen=True)
class Table:
    """A table of texts. Columns whose cells all begin with a digit, a sign or a dash are set to the right.

    Attributes:
        head: column names.
        rows: cells, as they should read.
        caption: one line above it, or "".
        strong: indices of rows to set in bold.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[int] = ()

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether it reads as figures."""
        columns = zip(*self.rows, strict=True) if self.rows else ([] for _ in self.head)
        return [all(not cell or cell[0] in "0123456789+-−–.<>×±" for cell in column) for column in columns]


@dataclass(frozen=True)
class Section:
    """One finding.

    Attributes:
        heading: what it is about.
        sentence: what it shows here, with numbers; or, with `skipped`, why it cannot be shown.
        figures: images, set side by side where there is room.
        table: beside or under the figures, or None; it scrolls inside its own box when it is wide.
        note: how the figure is defined, small, or "".
        skipped: the sentence is a reason, not a finding.
    """

    heading: str
    sentence: str
    figures: Sequence[Image] = ()
    table: Table | None = None
    note: str = ""
    skipped: bool = False


def render(title: str, subtitle: str, notices: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as HTML. All texts are escaped; labels from a trace cannot become markup.

    Args:
        title: of the page and the window.
        subtitle: one line under it (model, size, seed).
        notices: what a reader must know before any figure, each one line.
        sections: in order.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moeplan.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("template.html")
    return template.render(title=title, subtitle=subtitle, notices=notices, sections=sections, version=__version__)


def write_page(path: str | Path, html: str) -> None:
    """Write the page under a temporary name, then rename.

    Raises:
        OutputError: the place cannot be written to.
    """
    from moeplan.io.files import atomic_path

    with atomic_path(Path(path)) as temporary:
        temporary.write_text(html, encoding="utf-8")
