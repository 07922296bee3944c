"""What hardware a use needs: the smallest cluster that keeps its time limits, for many use cases and accelerators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.errors import UsageError
from moeplan.frames import data_frame
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec, ModelSpec
from moeplan.perf.cluster_search import SizingResult, SizingSettings, smallest_cluster
from moeplan.perf.hardware import Hardware, hardware_list
from moeplan.perf.memory import Precision
from moeplan.perf.use_cases import UseCase, find_use_cases
from moeplan.progress import Progress

if TYPE_CHECKING:
    import pandas

__all__ = ["Sizing", "SizingResult", "SizingSettings", "size"]


@dataclass(frozen=True, repr=False)
class Sizing:
    """The smallest cluster of each piece of hardware for each use case.

    Attributes:
        spec, settings, precision: what was asked. cases: the use cases.
        results: case by case, each hardware in the order given.
    """

    spec: CompleteSpec
    settings: SizingSettings
    precision: Precision
    cases: tuple[UseCase, ...]
    results: tuple[SizingResult, ...]

    def __repr__(self) -> str:
        return "\n".join([f"Sizing of {self.spec.name}", *(f"  {result!r}" for result in self.results)])

    def of(self, case: UseCase) -> list[SizingResult]:
        """The results of one use case."""
        return [result for result in self.results if result.case is case]

    @property
    def met(self) -> bool:
        """Whether some hardware keeps the limits of each use case."""
        return all(any(result.meets for result in self.of(case)) for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.spec.name,
            "requests": self.settings.requests,
            "max_gpus": self.settings.max_gpus,
            "use_cases": {
                case.name: {
                    "case": case.to_dict(),
                    "hardware": {r.hardware.name: r.to_dict(self.settings.sensitivity) for r in self.of(case)},
                }
                for case in self.cases
            },
        }

    def to_pandas(self) -> pandas.DataFrame:
        """One line per use case and hardware.

        Raises:
            MoeplanError: pandas is not installed.
        """
        return data_frame([{"use_case": r.case.name, "hardware": r.hardware.name, **r.to_dict()} for r in self.results])


def size(
    model: str | Path | ModelSpec,
    hardware: str | Hardware | Sequence[str | Hardware],
    use_cases: str | UseCase | Sequence[UseCase],
    settings: SizingSettings = SizingSettings(),
    progress: Progress | None = None,
) -> Sizing:
    """Find the smallest cluster that keeps the limits of a use, for each use case and each piece of hardware.

    Args:
        model: a name of the catalogue, the path of a config.json, or a description.
        hardware: names of the catalogue ("H100,H200", or "all"), or descriptions.
        use_cases: a name of `USE_CASES`, "all", or descriptions.
        progress: called with each size that is tried.

    Raises:
        UsageError: an unknown name; a dtype that no kernel is modelled for; drafts of a model that makes none.
        FormatError: a file that does not describe a model.

    Examples:
        >>> import moeplan
        >>> moeplan.size("Llama-3.1-70B", "H200", "chat")
        Sizing of Llama-3.1-70B
          chat on H200-SXM: 16 GPUs (tp 16), TTFT 86 ms, TPOT 9.9 ms
    """
    spec, machines = load_model(model), hardware_list(hardware)
    if isinstance(use_cases, UseCase):
        use_cases = [use_cases]
    cases = tuple(find_use_cases(use_cases) if isinstance(use_cases, str) else use_cases)
    if any(case.drafts for case in cases) and not spec.mtp_layers:
        raise UsageError(f"{spec.name} has no MTP (NextN) layers", hint="ask for no draft tokens")
    precision = Precision.of_checkpoint(spec, settings.weights, settings.experts, settings.kv)
    for case in cases:
        _ = case.workload  # refuses what is impossible, before any work
    asked = [(case, machine) for case in cases for machine in machines]
    results: list[SizingResult] = []
    for done, (case, machine) in enumerate(asked):

        def report(gpus: int, done: int = done, what: str = f"{case.name}, {machine.name}") -> None:
            if progress:
                progress(done, len(asked), f"{what} x {gpus}")

        results.append(smallest_cluster(spec, machine, case, precision, settings, report))
    return Sizing(spec, settings, precision, cases, tuple(results))
