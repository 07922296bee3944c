"""What measurement adds to datasheets: efficiencies and overheads, fitted by `benchmarks/time_fit.py`.

`data/constants.json` holds each constant with its unit, meaning, origin and error; `load_constants` reads and checks
it. Shares and ratios refer to the datasheet figures of `Hardware`, so that they carry over to other hardware; times are
those of Hopper. Derived from the data base of aiconfigurator-core 0.12.0 (Apache-2.0); no measured row is shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, defstruct
from msgspec.structs import asdict

from moeplan.errors import FormatError
from moeplan.io.catalogue import read_object
from moeplan.io.json import convert
from moeplan.perf.hardware import DATA

__all__ = ["Constants", "EngineFit", "GenerationFit", "for_generation", "load_constants"]

FILE = DATA / "constants.json"
FORMAT = "moeplan-constants", 1
#: Times and ratios that a kernel may lack; everything else divides.
MAY_BE_ZERO = {
    *("fill", "split_s", "convert_s", "doubling", "unit_bytes_per_s", "throttle", "decode_s", "step_s", "request_s"),
    "expert_layer_s",
}


def _value(unit: str, meaning: str) -> Any:
    return field(metadata={"unit": unit, "meaning": meaning})


@dataclass(frozen=True)
class Launched:
    """A kernel or a collective."""

    launch_s: float = _value("s", "one that has nothing to do")


@dataclass(frozen=True)
class Roofline(Launched):
    """A kernel of operations and memory traffic."""

    compute: float = _value("share of peak", "operation rate of full tiles")
    memory: float = _value("share of peak", "bandwidth of long reads")
    overlap: float = _value("exponent", "how operations and reads overlap: 1 one after the other, large fully")


@dataclass(frozen=True)
class GemmFit(Roofline):
    """One dense matrix product, of one kernel library."""

    feed: float = _value("bytes per peak bf16 operation", "what one of 132 units can load")
    fill: float = _value("elements of k", "filling and draining a tile's pipeline, as a longer k")
    split_s: float = _value("s", "adding up partial results, for each doubling of the split of k")
    quantise: float = _value("share of peak", "bandwidth of converting the input to fp8 first")
    throttle: float = _value("ratio", "slowing of a long product by the power limit")


@dataclass(frozen=True)
class PrefillFit(Roofline):
    """Attention of many new tokens."""

    softmax: float = _value("peak operations per pair", "exponentials of one (query, key) pair")
    tile_s: float = _value("s", "starting and ending one tile of 128 queries")


@dataclass(frozen=True)
class DecodeFit(Roofline):
    """Attention of one or few new tokens per request."""

    cache: float = _value("ratio to memory bandwidth", "bandwidth of keys and values that already lie in the L2 cache")
    tile_s: float = _value("s", "starting and ending one tile: one request and key-value head, 64 rows")
    split_s: float = _value("s", "adding up, where long contexts are split over units")
    convert_s: float = _value("s", "the kernels that convert fp8 latents to bf16")
    convert: float = _value("share of peak", "bandwidth of converting fp8 latents to bf16 first")


@dataclass(frozen=True)
class ExpertsFit(Roofline):
    """The routed experts of one rank: two grouped products, an activation, and their data movement."""

    moves: float = _value("share of peak", "bandwidth of permuting, activating and adding up")
    rows: float = _value("rows", "padding that each touched expert adds")


@dataclass(frozen=True)
class CollectiveFit(Launched):
    """All-reduce, all-gather and point-to-point transfers."""

    scale_up: float = _value("share of link", "bandwidth inside a node")
    scale_out: float = _value("share of link", "bandwidth between nodes")


@dataclass(frozen=True)
class DeepEPFit(CollectiveFit):
    """Dispatch or combine by DeepEP's kernels; `launch_s` is apart from the links' latency."""

    hops: float = _value("link latencies", "latencies one after the other")
    doubling: float = _value("link latencies", "more of them for each doubling of the nodes beyond two")
    unit_bytes_per_s: float = _value("bytes/s", "what one unit (SM) given to the kernel copies; 0: no such limit")
    overlap: float = _value("exponent", "how the links and the copying overlap")


@dataclass(frozen=True)
class MlaFit:
    """What a whole attention block costs beyond its kernels."""

    decode_s: float = _value("s", "small kernels of an MLA block under a CUDA graph")
    host_s: float = _value("s", "the host's time to launch an MLA block without a CUDA graph")
    host_request_s: float = _value("s", "more of it for each request of the batch")
    moves: float = _value("share of peak", "bandwidth of norms, rotation and copies")


@dataclass(frozen=True)
class EngineFit:
    """What an engine adds to its kernels in a step."""

    step_s: float = _value("s", "between two steps: scheduling and sampling that no kernel hides")
    request_s: float = _value("s", "the host's work for a decoding request; a step is no shorter than all requests'")
    expert_layer_s: float = _value(
        "s", "small kernels around the products of routed experts: sorting, conversion, adding up"
    )


@dataclass(frozen=True)
class GenerationFit:
    """What sets another generation of accelerators apart from Hopper, in two ratios."""

    overhead: float = _value("ratio to Hopper", "launches and all else that is a time")
    rates: float = _value("ratio to Hopper", "shares of peak operation rate and bandwidth that kernels reach")


@dataclass(frozen=True)
class Constants:
    """All constants; each group is one kernel family."""

    gemm_bf16: GemmFit
    gemm_fp8: GemmFit
    gemm_fp8_block: GemmFit
    prefill_bf16: PrefillFit
    prefill_fp8: PrefillFit
    decode_bf16: DecodeFit
    decode_fp8: DecodeFit
    mla_decode: DecodeFit
    mla_layer: MlaFit
    experts_deepgemm: ExpertsFit
    experts_cutlass: ExpertsFit
    low_latency_dispatch: DeepEPFit
    low_latency_combine: DeepEPFit
    normal_dispatch: DeepEPFit
    normal_combine: DeepEPFit
    collective: CollectiveFit
    engine: EngineFit
    blackwell: GenerationFit

    @classmethod
    def groups(cls) -> dict[str, type]:
        """{group: its dataclass}."""
        return {f.name: globals()[str(f.type)] for f in fields(cls)}

    def scaled(self, ratios: Mapping[str, float]) -> Constants:
        """With each constant of a name in `ratios`, of whichever group, times its ratio."""
        groups = {}
        for group, values in vars(self).items():
            changed = {name: value * ratios[name] for name, value in vars(values).items() if name in ratios}
            groups[group] = replace(values, **changed)
        return Constants(**groups)


#: Times that a generation's overhead scales; those of links are in the hardware catalogue, `request_s` is the host's.
_OVERHEADS = ("launch_s", "tile_s", "split_s", "convert_s", "decode_s", "step_s", "expert_layer_s")
_RATES = ("compute", "memory")


@lru_cache(maxsize=16)
def for_generation(constants: Constants, blackwell: bool) -> Constants:
    """Constants for a generation: as fitted on Hopper, or changed by the two ratios of Blackwell."""
    if not blackwell or constants.blackwell == GenerationFit(1.0, 1.0):
        return constants
    new = constants.blackwell
    return constants.scaled(dict.fromkeys(_OVERHEADS, new.overhead) | dict.fromkeys(_RATES, new.rates))


class ValueEntry(Struct):
    """One constant in the file, beside its unit, meaning and origin."""

    value: Annotated[float, Meta(ge=0.0, le=1e30)]


def _file_type() -> type[Struct]:
    """What the file must hold: {"groups": {group: {"values": {name: {"value": ..}}}}}, each name of them."""
    groups = []
    for name, kind in Constants.groups().items():
        values = defstruct("Values", [(f.name, ValueEntry) for f in fields(kind)], forbid_unknown_fields=True)
        groups.append((name, defstruct("Group", [("values", values)])))
    return defstruct("File", [("groups", defstruct("Groups", groups, forbid_unknown_fields=True))])


@cache
def load_constants(path: Path = FILE) -> Constants:
    """Read and check a file of constants.

    Raises:
        FormatError: the file, a group or a value is missing, unknown, or not a positive number.
    """
    data, where, hint = read_object(path), str(path), "run benchmarks/time_fit.py"
    if (data.get("format"), data.get("version")) != FORMAT:
        raise FormatError(f"is not {FORMAT[0]} version {FORMAT[1]}", where=where, hint=hint)
    stored: Any = convert(data, _file_type(), where, hint)
    groups = {}
    for name, kind in Constants.groups().items():
        values = {key: entry.value for key, entry in asdict(getattr(stored.groups, name).values).items()}
        for key in values.keys() - MAY_BE_ZERO:
            if values[key] == 0:
                raise FormatError(f"{name}.{key} is 0, and is divided by", where=where, hint=hint)
        groups[name] = kind(**values)
    return Constants(**groups)
