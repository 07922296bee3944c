"""A plan on disk: a directory of `plan.json` and plain `.npy` arrays (never pickled)."""

from __future__ import annotations

import operator
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moeplan import __version__
from moeplan.cluster import Cluster, Dispatch, Home, ReplicaRule, routes
from moeplan.errors import FormatError, MoeplanError, OutputError
from moeplan.io.files import cannot_write, read_json, write_json
from moeplan.io.paths import check_input
from moeplan.planning.problem import Problem
from moeplan.planning.router import ClusterRouter, LinearRouter, LocalityRouter
from moeplan.planning.solver import Result
from moeplan.types import ModelShape, Placement

T = TypeVar("T")

__all__ = ["FORMAT", "VERSION", "StoredPlan", "load_plan", "save_plan"]

FORMAT, VERSION = "moeplan-plan", 1
#: Router -> what plan.json calls it.
_ROUTERS: dict[type[Any], str] = {ClusterRouter: "clusters", LinearRouter: "linear", LocalityRouter: "locality"}
_MAX_ARRAY_BYTES = 8 * 1024**3


@dataclass(frozen=True)
class StoredPlan:
    """A plan read back.

    Attributes:
        result: as `solve` gave it.
        shape, cluster, redundant, rule, dispatch: the problem it is for.
        trace_checksum: the rows that it was fitted on.
        head: all of plan.json.
    """

    result: Result
    shape: ModelShape
    cluster: Cluster
    redundant: int
    rule: ReplicaRule
    dispatch: Dispatch
    trace_checksum: str
    head: dict[str, Any]


def save_plan(
    path: str | Path,
    result: Result,
    problem: Problem,
    *,
    trace_checksum: str,
    synthetic: bool,
    expected: dict[str, Any] | None,
    stands_in: str | None,
) -> None:
    """Write a plan; the directory appears whole or not at all.

    Raises:
        OutputError: the place exists, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise OutputError("already exists", where=str(path), hint="choose another place, or remove it")
    arrays: dict[str, npt.NDArray[Any]] = {"slots": result.placement.slots}
    if isinstance(result.router, ClusterRouter):
        arrays |= {"centroids": result.router.centroids, "serves": result.router.serves}
    elif isinstance(result.router, LinearRouter):
        arrays |= {"weights": result.router.weights, "intercept": result.router.intercept}
    elif not isinstance(result.router, LocalityRouter):
        raise OutputError(f"plans do not store a {type(result.router).__name__} yet", where=str(path))
    cluster = problem.cluster
    head = {
        "format": FORMAT,
        "version": VERSION,
        "moeplan": __version__,
        "synthetic": synthetic,
        "strategy": result.strategy,
        "objective": problem.options.objective if result.strategy == "moeplan" else None,
        "guard": problem.options.guard if np.isfinite(problem.options.guard) else None,
        "seed": result.seed,
        "model": problem.shape.to_dict(),
        "cluster": {"nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node, "home": cluster.home.value},
        "redundant": problem.redundant,
        "replica_rule": problem.rule.value,
        "dispatch": problem.dispatch.value,
        "router": _ROUTERS[type(result.router)],
        "equal_groups": result.equal_groups,
        "fit_seconds": result.seconds,
        "fit_requests": len(problem.use),
        "signature_stands_in": stands_in,
        "trace_checksum": trace_checksum,
        "notes": list(result.notes),
        "expected": expected,
        "arrays": {name: _crc(array) for name, array in arrays.items()},
    }
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        write_json(temporary / "plan.json", head)
        temporary.rename(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def load_plan(path: str | Path) -> StoredPlan:
    """Read a plan and check it whole.

    Raises:
        FormatError: not a plan, a newer version, a wrong checksum, an impossible placement.
    """
    root = Path(path)
    head_path = root / "plan.json"
    if not root.exists():
        raise FormatError("does not exist", where=str(root), hint="check the path")
    if not head_path.is_file():
        raise FormatError(
            "is not a moeplan plan (a directory with plan.json)", where=str(root), hint="make one: moeplan plan"
        )
    head, where = read_json(head_path), str(head_path)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError(f"is not a {FORMAT} file", where=where)
    if not isinstance(head.get("version"), int) or head["version"] > VERSION:
        raise FormatError(f"is of version {head.get('version')}, this moeplan reads up to {VERSION}", where=where)
    shape = ModelShape.from_dict(head.get("model"), where=where)
    layout, sums = _field(head, "cluster", _mapping, where), _field(head, "arrays", _mapping, where)
    size = [_field(layout, name, operator.index, where) for name in ("nodes", "gpus_per_node")]
    home = _field(layout, "home", Home, where)
    rule, dispatch = _field(head, "replica_rule", ReplicaRule, where), _field(head, "dispatch", Dispatch, where)
    seed, strategy = _field(head, "seed", operator.index, where), _field(head, "strategy", str, where)
    kind, equal = _field(head, "router", str, where), _field(head, "equal_groups", _truth, where)
    seconds = _field(head, "fit_seconds", float, where)
    try:
        cluster = Cluster(size[0], size[1], home)
    except MoeplanError as error:
        raise FormatError(error.what, where=where, hint=error.hint) from None
    try:
        placement = Placement(
            _array(root, "slots", sums, 2), shape.num_experts, cluster.nodes, cluster.gpus_per_node
        )  # fmt: skip
    except MoeplanError as error:
        raise FormatError(error.what, where=error.where or str(root / "slots.npy"), hint=error.hint) from None
    if placement.num_layers != shape.num_layers:
        raise FormatError(f"{placement.num_layers} layers of slots for {shape.num_layers} layers", where=str(root))
    who = routes(placement, cluster, rule, seed)
    router = _router(root, kind, sums, shape, cluster) or LocalityRouter.of(who)
    result = Result(
        strategy, seed, placement, who, router, equal, (), seconds,
    )  # fmt: skip
    return StoredPlan(
        result, shape, cluster, placement.redundant, rule, dispatch, str(head.get("trace_checksum", "")), head
    )  # fmt: skip


def _field(fields: dict[str, Any], name: str, read: Callable[[Any], T], where: str) -> T:
    """One field as what it must be, or an error that names it."""
    if name not in fields:
        raise FormatError(f"has no {name!r}", where=where, hint="plan again")
    try:
        return read(fields[name])
    except (TypeError, ValueError, OverflowError):
        raise FormatError(f"has a wrong {name!r}: {str(fields[name])[:40]!r}", where=where, hint="plan again") from None


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _router(
    root: Path, kind: str, sums: dict[str, Any], shape: ModelShape, cluster: Cluster
) -> ClusterRouter | LinearRouter | None:
    """The stored router; None for the one that every placement brings along."""
    width, groups = shape.num_layers * shape.num_experts, cluster.num_groups
    router: ClusterRouter | LinearRouter
    if kind == "locality":
        return None
    if kind == "clusters":
        first, second = _array(root, "centroids", sums, 2), _array(root, "serves", sums, 2)
        good = first.shape == (len(second), width) and second.shape[1] == groups
        router = ClusterRouter(first.astype(np.float32), second.astype(np.bool_))
    elif kind == "linear":
        first, second = _array(root, "weights", sums, 2), _array(root, "intercept", sums, 1)
        good = first.shape == (groups, width) and second.shape == (groups,) and bool(np.isfinite(second).all())
        router = LinearRouter(first.astype(np.float32), second.astype(np.float64))
    else:
        raise FormatError(f"has a router of an unknown kind {kind[:40]!r}", where=str(root / "plan.json"))
    if not good or not np.isfinite(first).all():
        raise FormatError("the router's arrays do not fit the plan", where=str(root))
    return router


def _array(root: Path, name: str, sums: dict[str, Any], dimensions: int) -> npt.NDArray[Any]:
    path = root / f"{name}.npy"
    try:
        if check_input(path) > _MAX_ARRAY_BYTES:
            raise FormatError("is larger than any plan", where=str(path))
        array = np.load(path, allow_pickle=False, mmap_mode="r")  # mapped: a header that lies about its size fails here
        array = np.array(array)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"is not a whole array ({str(error)[:80]})", where=str(path), hint="plan again") from None
    if array.ndim != dimensions or array.dtype.kind not in "iufb":
        raise FormatError(f"holds {array.dtype} of {array.ndim} dimensions", where=str(path))
    if sums.get(name) != _crc(array):
        raise FormatError("checksum differs from plan.json", where=str(path), hint="the file was changed: plan again")
    return array


def _crc(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())
