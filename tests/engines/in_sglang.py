"""Runs in the engine's environment: SGLang's own code (the released wheel's Python files), on this CPU.

`python in_sglang.py WHEEL JOB OUT`: WHEEL is where the wheel is unpacked, JOB a JSON of what to do, OUT gets a pickle.
Nothing of SGLang is replaced but what asks a running server for its settings.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

from forked import on_ranks

WHEEL, JOB, OUT = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
sys.path.insert(0, str(WHEEL))  # for its version, as metadata has it
for _name in ("sglang", "sglang.srt"):  # their own __init__ loads a server
    _module = types.ModuleType(_name)
    _module.__path__ = [str(WHEEL / _name.replace(".", "/"))]
    sys.modules[_name] = _module
_elastic = types.ModuleType("sglang.srt.elastic_ep.elastic_ep")  # asked for one thing: whether ranks have joined
_elastic.elastic_expanded_world_enabled = lambda: False
sys.modules[_elastic.__name__] = _elastic

location = importlib.import_module("sglang.srt.eplb.expert_location")
algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
context = importlib.import_module("sglang.srt.runtime_context")
plugins = importlib.import_module("sglang.srt.plugins")
import torch  # noqa: E402


def settings(job: dict[str, Any]) -> None:
    """What a server with these flags would answer when it is asked."""
    moe = types.SimpleNamespace(
        init_expert_location=job.get("init_expert_location", "trivial"),
        enable_eplb=job.get("enable_eplb", True),
        ep_num_redundant_experts=job["redundant"],
        ep_dispatch_algorithm=job.get("dispatch", "static"),
        moe_a2a_backend="deepep",
        ep_join_mode=None,
        eplb_algorithm="auto",
    )
    parallel = types.SimpleNamespace(
        ep_size=job["ep_size"], nnodes=job["nodes"], elastic_ep_initial_size=None, tp_size=job["ep_size"]
    )
    answers = {
        "get_exec": lambda: types.SimpleNamespace(moe=moe),
        "get_parallel": lambda: parallel,
        "get_device": lambda: types.SimpleNamespace(device="cpu"),
    }
    for name, answer in answers.items():
        for module in (context, location):
            if hasattr(module, name):
                setattr(module, name, answer)
    shape = location.ModelConfigForExpertLocation(job["layers"], job["experts"], job.get("groups", 1))
    location.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda _: shape)


def arrays(made: Any) -> dict[str, Any]:
    """A location, as plain arrays."""
    return {
        "slots": made.physical_to_logical_map.numpy(),
        "dispatch": made.logical_to_rank_dispatch_physical_map.numpy(),
        "all": made.logical_to_all_physical_map.numpy(),
        "copies": made.logical_to_all_physical_map_num_valid.numpy(),
    }


def from_file(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank makes of the file of --init-expert-location; {"error": ..} where SGLang refuses it."""
    settings(job)
    out = []
    for rank in range(job["ep_size"]):
        try:
            out.append(arrays(location.compute_initial_expert_location_metadata(None, rank)))
        except Exception as error:
            out.append({"error": f"{type(error).__name__}: {error}"})
    return out


def balanced(job: dict[str, Any]) -> dict[str, Any]:
    """The map of SGLang's own copy of DeepSeek's algorithm, without any plug-in."""
    made = algorithms.rebalance_experts(
        tokens_per_expert=torch.tensor(job["counts"]),
        num_physical_experts=job["experts"] + job["redundant"],
        num_local_physical_experts=(job["experts"] + job["redundant"]) // job["ep_size"],
        num_groups=job["groups"],
        num_nodes=job["nodes"],
        algorithm=algorithms.EplbAlgorithm[job["algorithm"]],
    )
    return {"slots": made[0].numpy()}


def plugged(job: dict[str, Any]) -> list[dict[str, Any]]:
    """A server with the plug-in on every rank: where experts are at first, and after each rebalance."""

    def work(rank: int) -> dict[str, Any]:
        os.environ.update({key: value for key, value in job["environment"].items() if value})
        for key, value in job.get("only", {}).get(str(rank), {}).items():
            os.environ.pop(key, None)
            if value:
                os.environ[key] = value
        if job.get("version"):
            _pretend(job["version"])
        settings(job)
        plugins.load_plugins()  # finds moeplan as it is installed
        first = location.compute_initial_expert_location_metadata(model_config=None, moe_ep_rank=rank)
        location.set_global_expert_location_metadata(first)
        after = []
        for counts in job.get("counts", []):
            made = location.ExpertLocationMetadata.init_by_eplb(None, torch.tensor(counts))
            location.set_global_expert_location_metadata(made, allow_overwrite=True)
            after.append(arrays(made))
        return {
            "first": arrays(first),
            "after": after,
            "loaded": sorted(name for name in sys.modules if name.startswith("moeplan")),
        }

    return on_ranks(job["ep_size"], work)


def _pretend(version: str) -> None:
    """SGLang's metadata say so."""
    from importlib import metadata

    true = metadata.version
    metadata.version = lambda name: version if name == "sglang" else true(name)


def main() -> None:
    does = {"from_file": from_file, "balanced": balanced, "plugged": plugged}
    OUT.write_bytes(pickle.dumps({name: does[job["do"]](job) for name, job in JOB.items()}))


if __name__ == "__main__":
    main()
