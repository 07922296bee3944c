"""What a user adds to a source, and the way of its requests into a trace: shared by all importers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError
from moeplan.importers.sources import domain_of
from moeplan.model.spec import ModelSpec
from moeplan.trace.format import Request, layers_kept
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.retention import RetentionPolicy
from moeplan.trace.writer import TraceWriter
from moeplan.types import ModelShape

__all__ = ["ImportOptions", "write_trace"]


@dataclass(frozen=True)
class ImportOptions:
    """What importers are told beside the source.

    Attributes:
        model: the model, as its config.json and its user describe it; a name goes before the source's own.
        dense_layers: hidden layers without experts; None where the source or the config tells.
        domain: the label of every request; None for the source's own, or the file's name up to its trailing number.
        without_layers: the model's own indices of layers to leave out of the trace.
        retention: which requests are stored, and in what form.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    dense_layers: tuple[int, ...] | None = None
    domain: str | None = None
    without_layers: tuple[int, ...] = ()
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)

    def label(self, path: Path) -> str:
        """The domain of the requests of a file."""
        return domain_of(path) if self.domain is None else self.domain

    def shape(
        self, *, top_k: int, layer_ids: Sequence[int], where: str, num_experts: int | None = None, name: str = ""
    ) -> ModelShape:
        """The model of a source.

        Args:
            num_experts: as the source says it; None where it does not, and the user must.

        Raises:
            UsageError: nothing says the number of experts.
            FormatError: the source contradicts the user, or describes an impossible model.
        """
        facts = (("experts", num_experts, self.model.num_experts), ("picks per token", top_k, self.model.top_k))
        for label, found, known in facts:
            if found is not None and known is not None and found != known:
                raise FormatError(f"has {found} {label}, but the config or a flag says {known}", where=where)
        return self.model.moe_shape(name=name, num_experts=num_experts, top_k=top_k, layer_ids=layer_ids, where=where)


def write_trace(
    out: Path,
    stored: ModelShape,
    requests: Iterable[Request],
    options: ImportOptions,
    source: dict[str, Any],
    *,
    synthetic: bool = False,
    weights: bool = False,
) -> Trace:
    """Write requests as they come, without the layers that the options leave out.

    Args:
        stored: the model of the requests, all layers.
        source: how the trace came about. What `requests` adds to it while they are read, such as notes, is written too.
        synthetic, weights: see `TraceWriter`.

    Raises:
        UsageError: a layer to leave out that is not there.
        OutputError: `out` exists or cannot be written.
    """
    shape, kept = layers_kept(stored, options.without_layers)
    how: Any = {"synthetic": synthetic, "weights": weights, "retention": options.retention}
    with TraceWriter(out, shape, source=source, **how) as writer:
        for request in requests:
            writer.add_request(request if kept is None else replace(request, experts=request.experts[:, kept]))
    return open_trace(out)
