"""What the simulated instances run on: a model on accelerators, its step times, and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeplan._kernels.serving import Clock
from moeplan.cluster import Cluster, Dispatch
from moeplan.errors import PlanError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.hardware import Hardware, load_hardware
from moeplan.perf.memory import MemoryModel, ParallelLayout, Precision
from moeplan.perf.step_model import StepModel
from moeplan.planning.plan import Plan
from moeplan.replay.timing import Timing, cluster_parallel, find_model
from moeplan.simulation.clock import Span, step_clock
from moeplan.simulation.settings import SimulationSettings
from moeplan.types import ModelShape

__all__ = ["Server", "find_server"]


@dataclass(frozen=True)
class Server:
    """One kind of instance.

    Attributes:
        step: the step model of an instance; of a plan, of the whole server.
        layers: MoE layers whose routing is timed step by step; 0: routing is taken to be uniform.
    """

    step: StepModel
    layers: int

    def clock(self, batch: int, context: int, budget: int) -> Clock:
        """Step times, as far as they can be asked for."""
        return step_clock(self.step, Span(batch, context, budget), self.layers)

    def cache_tokens(self, context: int, budget: int) -> int:
        """Tokens of cache that memory leaves to a data-parallel rank.

        Raises:
            PlanError: not even one request fits.
        """
        m = self.step
        most = MemoryModel(m.spec, m.hardware, m.parallel, m.precision).largest_batch(context, budget)
        if most < 1:
            raise PlanError(
                f"one request of {context:,} tokens of {m.spec.name} does not fit an instance of {m.layout} on "
                f"{m.hardware.name}",
                hint="use more --gpus-per-instance",
            )
        return most * context

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.step.to_dict() | {"model": self.step.spec.name}

    def describe(self) -> str:
        """In words."""
        m = self.step
        return f"{m.spec.name} on {m.hardware.name}, {m.layout}, {m.precision.describe(m.spec)}"


def find_server(
    shape: ModelShape,
    settings: SimulationSettings,
    hardware: str | Hardware,
    model: str | None = None,
    plan: Plan | None = None,
) -> Server:
    """From names as on the command line, checked.

    Raises:
        UsageError: unknown names, or a model that is not the trace's. PlanError: a layout that is impossible.
    """
    spec: CompleteSpec = find_model(shape, model)
    found = load_hardware(hardware) if isinstance(hardware, str) else hardware
    timing = Timing(spec, found)
    if plan is not None:
        timing.check(shape, plan.cluster, plan.dispatch)
        parallel = cluster_parallel(plan.cluster, spec, plan.task.redundant)
        return Server(StepModel(spec, found, parallel, Precision.of_checkpoint(spec)), 0)
    timing.check(shape, Cluster(1, 1), Dispatch.PICK)
    gpus = settings.gpus_per_instance
    parallel = ParallelLayout(tp=gpus, ep=gpus if settings.expert_parallel else 1)
    server = Server(StepModel(spec, found, parallel, Precision.of_checkpoint(spec)), shape.num_layers)
    server.step.decode(1, 1)  # refuses a layout that cannot be, before anything runs
    return server
