"""Flags of the verbs that model times: numeric types, drafts, prices, hardware."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli.files import File

if TYPE_CHECKING:
    from moeplan.perf.hardware import Hardware


@Parameter(name="*", group=Group("Numeric types", sort_key=8))
@dataclass(frozen=True)
class PrecisionFlags:
    """Numeric types of weights and cache."""

    weights_dtype: str | None = None
    """Numeric type of attention, dense and shared-expert weights: bf16, fp8, fp4 .. Default: as in the checkpoint."""
    experts_dtype: str | None = None
    """Numeric type of the routed experts. Default: as in the checkpoint."""
    kv_dtype: str = "bf16"
    """Numeric type of the KV cache: bf16 or fp8."""

    def values(self) -> dict[str, Any]:
        """The same by the names of the library's settings."""
        return {"weights": self.weights_dtype, "experts": self.experts_dtype, "kv": self.kv_dtype}


@Parameter(name="*", group=Group("Speculative decoding", sort_key=9))
@dataclass(frozen=True)
class DraftFlags:
    """Drafts of the MTP (NextN) layers."""

    mtp: o.Int = 0
    """Draft tokens per step, from the MTP (NextN) layers."""
    accepted: float | None = None
    """Mean acceptance length: tokens per step, the verified one included. Default: 1 + 0.8 x drafts."""

    @property
    def tokens(self) -> float:
        """The mean acceptance length: as given, else 1 + 0.8 x drafts."""
        return 1 + 0.8 * self.mtp if self.accepted is None else self.accepted


@Parameter(name="*", group=Group("Prices", sort_key=10))
@dataclass(frozen=True)
class PriceFlags:
    """Hardware that the catalogue does not have, and prices."""

    hardware_file: Annotated[Path | None, File("input"), Parameter(metavar="JSON")] = None
    """A file with further hardware, or with other prices."""
    usd_per_hour: float | None = None
    """Price of one GPU in USD per hour. Default: the catalogue's."""
    watts: float | None = None
    """Power of one GPU in watts. Default: the catalogue's."""

    def hardware(self, names: str) -> list[Hardware]:
        """The hardware of a list of names, or all of the catalogue."""
        from moeplan.perf.hardware import hardware_list

        return hardware_list(names, self.hardware_file, self.usd_per_hour, self.watts)

    def one(self, name: str) -> Hardware:
        """One kind of hardware."""
        from moeplan.perf.hardware import load_hardware

        return load_hardware(name, self.hardware_file).priced(self.usd_per_hour, self.watts)


Milliseconds: TypeAlias = Annotated[float, Parameter(metavar="MS")]
HardwareList: TypeAlias = Annotated[str, Parameter(metavar="A,B,..", help="Hardware: catalogue names, or all.")]
ModelIn: TypeAlias = Annotated[str, File("input"), Parameter(help="The model: a catalogue name, or a config.json.")]
GpusPerNode: TypeAlias = Annotated[
    int | None,
    Parameter(
        converter=o.whole,
        group=o.CLUSTER,
        help="GPUs in each node, on one scale-up network. Default: the hardware's.",
    ),
]
