"""Reading a plan: a directory of `plan.json` and plain `.npy` arrays (never pickled), of any version so far."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule, routes
from moeplan.errors import FormatError, MoeplanError
from moeplan.io.json import read_json
from moeplan.io.paths import check_input
from moeplan.planning.plan import FORMAT, VERSION, Plan, Provenance, Signature, crc
from moeplan.planning.prediction import Prediction
from moeplan.planning.router import ClusterRouter, LinearRouter, LocalityRouter, Router
from moeplan.types import ModelShape, Placement

__all__ = ["load_plan"]

#: Parts of the format that this version knows, for `requires`: a plan that needs another one is refused.
KNOWN: frozenset[str] = frozenset()
_MAX_ARRAY_BYTES = 8 * 1024**3
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Cluster(msgspec.Struct):
    nodes: Count
    gpus_per_node: Count
    deployment: Deployment


class _Signature(msgspec.Struct):
    source: Literal["prefill", "prompt", "decode", "rows"]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None


class _Prediction(msgspec.Struct):
    kind: Literal["ids", "hashed"]
    key: str
    domains: tuple[str, ...]
    earlier_strength: Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class _Head(msgspec.Struct, kw_only=True):
    """What plan.json must say; fields that it does not name are ignored, parts in `requires` are not."""

    strategy: str
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    model: dict[str, Any]
    cluster: _Cluster
    replica_rule: ReplicaRule
    dispatch: Dispatch
    router: Literal["clusters", "linear", "locality"]
    equal_groups: bool
    fit_seconds: float
    arrays: dict[str, int]
    signature: _Signature
    params: dict[str, Any] = {}
    fit_requests: Count = 0
    trace_checksum: str = ""
    synthetic: bool = False
    moeplan: str = ""
    notes: tuple[str, ...] = ()
    expected: dict[str, dict[str, Any]] | None = None
    prediction: _Prediction | None = None


def load_plan(path: str | Path) -> Plan:
    """Read a plan that `Plan.save` or `moeplan plan` wrote, of this version or an older one, and check it whole.

    Args:
        path: the plan's directory.

    Raises:
        FormatError: not a plan, a newer version, an unknown requirement, a wrong checksum, an impossible placement.

    Examples:
        >>> moeplan.load_plan("plan").cluster  # doctest: +SKIP
        Cluster(nodes=8, gpus_per_node=8, deployment=<Deployment.NODES: 'nodes'>)
    """
    root = Path(path)
    place = root / "plan.json"
    if not root.exists():
        raise FormatError("does not exist", where=str(root), hint="check the path")
    if not place.is_file():
        raise FormatError(
            "is not a moeplan plan (a directory with plan.json)", where=str(root), hint="make one: moeplan plan"
        )
    where = str(place)
    head = _read_head(read_json(place), where)
    model = ModelShape.from_dict(head.model, where=where)
    try:
        cluster = Cluster(head.cluster.nodes, head.cluster.gpus_per_node, head.cluster.deployment)
    except MoeplanError as error:
        raise FormatError(error.what, where=where, hint=error.hint) from None
    try:
        slots = _array(root, "slots", head.arrays, 2)
        placement = Placement(slots, model.num_experts, cluster.nodes, cluster.gpus_per_node)
    except MoeplanError as error:
        raise FormatError(error.what, where=error.where or str(root / "slots.npy"), hint=error.hint) from None
    router = _router(root, head, model, cluster)
    fitted = _array(root, "fit_index", head.arrays, 1).tolist() if "fit_index" in head.arrays else ()
    try:
        return Plan(
            placement=placement,
            router=router or LocalityRouter.of(routes(placement, cluster, head.replica_rule, head.seed)),
            cluster=cluster,
            dispatch=head.dispatch,
            replica_rule=head.replica_rule,
            model=model,
            strategy=head.strategy,
            params=head.params,
            signature=Signature(head.signature.source, head.signature.tokens),
            seed=head.seed,
            equal_groups=head.equal_groups,
            provenance=Provenance(
                head.moeplan,
                head.trace_checksum,
                head.synthetic,
                head.fit_requests,
                head.fit_seconds,
                head.notes,
                tuple(fitted),
            ),
            expected=head.expected,
            prediction=_prediction(root, head, model),
        )
    except MoeplanError as error:
        raise FormatError(error.what, where=str(root), hint=error.hint) from None


def _read_head(data: Any, where: str) -> _Head:
    """plan.json, of any version, as what it must be; errors name the field."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"is not a {FORMAT} file", where=where)
    version, needed = data.get("version"), data.get("requires", [])
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(f"is of version {str(version)[:20]}, this moeplan reads up to {VERSION}", where=where)
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        raise FormatError("has a wrong 'requires': a list of names is needed", where=where, hint="plan again")
    if unknown := sorted(set(needed) - KNOWN):
        raise FormatError(
            f"requires {unknown[0][:40]!r}, which this moeplan does not know", where=where, hint="use a newer moeplan"
        )
    try:
        return msgspec.convert(_from_version_1(data) if version == 1 else data, _Head)
    except msgspec.ValidationError as error:
        raise FormatError(_in_words(str(error), data), where=where, hint="plan again") from None


def _in_words(error: str, data: dict[str, Any]) -> str:
    """msgspec's message with the field first, as the package's other errors have it."""
    what, _, at = error.partition(" - at `$")
    path = at.rstrip("`").lstrip(".")
    if missing := re.search(r"missing required field `(\w+)`", what):
        return f"has no {missing[1]!r}" + (f" in {path!r}" if path else "")
    value: Any = data
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    shown = "" if value is None else f": {str(value)[:40]!r}"
    return f"has a wrong {path.rpartition('.')[2]!r}{shown} ({what[0].lower()}{what[1:]})"


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """plan.json as 0.1.0 wrote it, in the words of version 2."""
    out = dict(data)
    cluster, text = data.get("cluster"), data.get("signature_stands_in")
    if isinstance(cluster, dict) and "home" in cluster:
        home = cluster["home"]
        out["cluster"] = {**cluster, "deployment": {"node": "nodes", "gpu": "gpus"}.get(str(home), home)}
    out["params"] = {key: data[key] for key in ("guard", "objective") if key in data}
    found = re.fullmatch(r"first ([1-9]\d{0,8}) (decode|prompt|recorded) tokens", str(text))
    if text is not None and not found:
        raise msgspec.ValidationError(f"`{str(text)[:40]}` is not known - at `$.signature_stands_in`")
    source, tokens = ("prefill", None) if found is None else (found[2], int(found[1]))
    out["signature"] = {"source": "rows" if source == "recorded" else source, "tokens": tokens}
    return out


def _router(root: Path, head: _Head, model: ModelShape, cluster: Cluster) -> Router | None:
    """The stored router; None for the one that every placement brings along."""
    width, groups = model.num_layers * model.num_experts, cluster.num_groups
    if head.router == "locality":
        return None
    router: ClusterRouter | LinearRouter
    if head.router == "clusters":
        first, second = _array(root, "centroids", head.arrays, 2), _array(root, "serves", head.arrays, 2)
        good = first.shape == (len(second), width) and second.shape[1] == groups
        router = ClusterRouter(first.astype(np.float32), second.astype(np.bool_))
    else:
        first, second = _array(root, "weights", head.arrays, 2), _array(root, "intercept", head.arrays, 1)
        good = first.shape == (groups, width) and second.shape == (groups,) and bool(np.isfinite(second).all())
        router = LinearRouter(first.astype(np.float32), second.astype(np.float64))
    if not good or not np.isfinite(first).all():
        raise FormatError("the router's arrays do not fit the plan", where=str(root))
    return router


def _prediction(root: Path, head: _Head, model: ModelShape) -> Prediction | None:
    """The stored prediction of the use of experts, if there is one."""
    about = head.prediction
    if about is None:
        return None
    dimensions = {"prompt_terms": 1, "prompt_rarity": 1, "prompt_limit": 1}
    names = [name for name in head.arrays if name.startswith("prompt_")]
    arrays = {name: _array(root, name, head.arrays, dimensions.get(name, 2)) for name in names}
    try:
        made = Prediction.from_arrays(arrays, about.kind, about.key, about.domains, about.earlier_strength)
    except KeyError as error:
        raise FormatError(f"has no array {error}", where=str(root / "plan.json"), hint="plan again") from None
    if made.predictor.mean.shape != (model.num_layers, model.num_experts):
        raise FormatError("the prompt predictor is of another model", where=str(root), hint="plan again")
    return made


def _array(root: Path, name: str, sums: dict[str, int], dimensions: int) -> npt.NDArray[Any]:
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
    if sums.get(name) != crc(array):
        raise FormatError("checksum differs from plan.json", where=str(path), hint="the file was changed: plan again")
    return array
