"""Runs in the engine's environment: vLLM's own balancer (the released wheel's Python files), on this CPU.

`python in_vllm.py WHEEL JOB OUT`: WHEEL is where the wheel is unpacked, JOB a JSON of what to do, OUT gets a pickle.
vLLM's `EplbState` runs on forked ranks over gloo, and moves the weights of a made-up model; what is replaced is GPU
timing, and the groups of ranks, which a server would make.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forked import on_ranks

WHEEL, JOB, OUT = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
sys.path.insert(0, str(WHEEL))
import torch  # noqa: E402
import vllm.distributed.eplb.eplb_state as eplb  # noqa: E402
import vllm.distributed.parallel_state as groups  # noqa: E402
import vllm.plugins  # noqa: E402
from vllm.config.parallel import EPLBConfig  # noqa: E402
from vllm.distributed.eplb.policy import EPLB_POLICIES, DefaultEplbPolicy  # noqa: E402

INTERVAL = 8


class Untimed:
    """In place of a GPU's event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class Model:
    """A model of which an expert's weight is its layer and its number."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.num_moe_layers, self.num_logical_experts = job["layers"], job["experts"]
        self.num_routed_experts, self.num_redundant_experts = job["experts"], job["redundant"]
        self.num_physical_experts = job["experts"] + job["redundant"]
        self.num_local_physical_experts = self.num_physical_experts // job["ranks"]
        self.num_expert_groups, self.moe_layers = job.get("groups", 1), []
        first = rank * self.num_local_physical_experts
        held = (first + torch.arange(self.num_local_physical_experts)) % self.num_logical_experts
        self.expert_weights = [[weight(layer, held)] for layer in range(self.num_moe_layers)]

    def set_eplb_state(self, *tensors: Any) -> None: ...


def weight(layer: int, experts: Any) -> Any:
    """float32 [experts, 3]."""
    return (layer * 1000.0 + experts.float())[:, None] + torch.tensor([0.0, 0.25, 0.5])


def serve(job: dict[str, Any]) -> list[dict[str, Any]]:
    """A server of several ranks: its profiling run, then forward passes up to each rearrangement in turn."""

    def work(rank: int) -> dict[str, Any]:
        os.environ.update(job["environment"])
        for key, value in job.get("only", {}).get(str(rank), {}).items():
            os.environ.pop(key, None)
            if value:
                os.environ[key] = value
        if job.get("version"):
            _pretend(job["version"])
        world = SimpleNamespace(device_group=torch.distributed.group.WORLD, cpu_group=torch.distributed.group.WORLD)
        groups._EP = groups._EPLB = world
        groups._NODE_COUNT = job["nodes"]
        eplb.torch.Event = eplb.torch.cuda.Event = eplb.CpuGpuEvent = Untimed
        eplb.PIN_MEMORY = False
        vllm.plugins.load_general_plugins()  # finds moeplan as it is installed
        settings = EPLBConfig(window_size=4, step_interval=INTERVAL, use_async=False, communicator="torch_nccl")
        settings.num_redundant_experts = job["redundant"]
        parallel = SimpleNamespace(eplb_config=settings, enable_elastic_ep=False, num_ubatches=0)
        state = eplb.EplbState(parallel, torch.device("cpu"))
        model = Model(job, rank)
        state.add_model(model, SimpleNamespace(compute_hash=lambda: "m", model="made-up"))
        inside = state.model_states["m"]
        start = inside.physical_to_logical_map.clone()
        state.step(is_dummy=True, is_profile=True)
        passes, seconds = [], []
        for counts in job["counts"]:
            done = 0
            while not done or state.expert_rearrangement_step:
                inside.expert_load_pass[:] = load_of(inside.physical_to_logical_map, counts, rank, job["ranks"])
                began = time.perf_counter()
                state.step()
                done += 1
            seconds.append(time.perf_counter() - began)
            passes.append((done, inside.physical_to_logical_map.numpy().copy(), right(inside, model, rank)))
        return {
            "policy": state.policy.__mro__[0].__name__,
            "first": start.numpy(),
            "passes": [done for done, _, _ in passes],
            "slots": [slots for _, slots, _ in passes],
            "weights": [good for _, _, good in passes],
            "seconds": seconds,
            "loaded": sorted(name for name in sys.modules if name.startswith("moeplan")),
        }

    return on_ranks(job["ranks"], work)


def load_of(slots: Any, counts: list[list[float]], rank: int, ranks: int) -> Any:
    """int32 [layers, slots]: what this rank counts of a pass; each of an expert's copies serves as many."""
    total = torch.tensor(counts)
    copies = torch.stack([torch.bincount(row, minlength=total.shape[1]) for row in slots])
    each = (total / copies).gather(1, slots) / ranks
    return each.round().int()


def right(inside: Any, model: Model, rank: int) -> bool:
    """Whether this rank's slots hold the weights of the experts that vLLM's maps say."""
    local = model.num_local_physical_experts
    mine = inside.physical_to_logical_map[:, rank * local : (rank + 1) * local]
    moved = all(torch.equal(model.expert_weights[i][0], weight(i, row)) for i, row in enumerate(mine))
    where = inside.logical_to_physical_map
    back = all(
        set(where[i, e][where[i, e] >= 0].tolist())
        == set((inside.physical_to_logical_map[i] == e).nonzero()[:, 0].tolist())
        for i in range(where.shape[0])
        for e in range(where.shape[1])
    )
    return moved and back


def default(job: dict[str, Any]) -> dict[str, Any]:
    """The map of vLLM's own policy."""
    slots = job["experts"] + job["redundant"]
    counts = torch.tensor(job["counts"])
    old = job.get("old")
    begin = time.perf_counter()
    made = DefaultEplbPolicy.rebalance_experts(
        counts, slots, job["groups"], job["nodes"], job["ranks"], None if old is None else torch.tensor(old)
    )
    return {"slots": made.numpy(), "seconds": time.perf_counter() - begin}


def _pretend(version: str) -> None:
    """vLLM's metadata say so."""
    from importlib import metadata

    true = metadata.version
    metadata.version = lambda name: version if name == "vllm" else true(name)


def main() -> None:
    assert EPLB_POLICIES["default"] is DefaultEplbPolicy
    does = {"serve": serve, "default": default}
    OUT.write_bytes(pickle.dumps({name: does[job["do"]](job) for name, job in JOB.items()}))


if __name__ == "__main__":
    main()
