"""moeplan: which requests decode together and where each expert lives, for multi-node mixture-of-experts inference.

The public names below are loaded when first used: `import moeplan` itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplan.cluster import Cluster, Dispatch, Home, ReplicaRule
    from moeplan.errors import MoeplanError
    from moeplan.planning import Options, Problem, read_requests, solve
    from moeplan.planning.store import load_plan, save_plan
    from moeplan.profile import profile as profile_trace
    from moeplan.replay import Setup, compare
    from moeplan.replay import replay as replay_plan
    from moeplan.trace import Trace, TraceWriter, open_trace
    from moeplan.types import ModelShape, Placement

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "Dispatch",
    "Home",
    "ModelShape",
    "MoeplanError",
    "Options",
    "Placement",
    "Problem",
    "ReplicaRule",
    "Setup",
    "Trace",
    "TraceWriter",
    "compare",
    "load_plan",
    "open_trace",
    "profile_trace",
    "read_requests",
    "replay_plan",
    "save_plan",
    "solve",
]

#: Where each name lives, and what it is called there when that differs.
_HOME = {
    "Cluster": "cluster",
    "Dispatch": "cluster",
    "Home": "cluster",
    "ModelShape": "types",
    "MoeplanError": "errors",
    "Options": "planning",
    "Placement": "types",
    "Problem": "planning",
    "ReplicaRule": "cluster",
    "Setup": "replay",
    "Trace": "trace",
    "TraceWriter": "trace",
    "compare": "replay",
    "load_plan": "planning.store",
    "open_trace": "trace",
    "profile_trace": "profile:profile",
    "read_requests": "planning",
    "replay_plan": "replay:replay",
    "save_plan": "planning.store",
    "solve": "planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moeplan' has no attribute {name!r}")
    module, _, inner = _HOME[name].partition(":")
    value = getattr(importlib.import_module(f"moeplan.{module}"), inner or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
