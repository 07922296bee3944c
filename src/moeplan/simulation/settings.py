"""What is simulated: instances, traffic, policies, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.errors import UsageError
from moeplan.gateway.policies import POLICIES, ExpertSettings
from moeplan.simulation.stream import ARRIVALS

__all__ = ["BASELINE", "ROWS", "SimulationSettings"]

#: What every other row is compared with.
BASELINE = "least-loaded"
#: Rows that run the policy `experts` with another signature than the trace's own.
SIGNATURES = ("domain", "prompt-tokens", "oracle")
ROWS = (*(name for name in POLICIES if name != "experts"), "domain", "prompt-tokens", "experts", "oracle")
DEFAULT_ROWS = ("random", "round-robin", "power-of-two", "least-loaded", "domain", "experts", "oracle")


@dataclass(frozen=True)
class SimulationSettings:
    """How traffic is simulated.

    Attributes:
        policies: rows of the table; `least-loaded` is always among them.
        instances: how many, where no plan says; gpus_per_instance: of each, which split attention (tensor parallelism);
            expert_parallel: they share the experts whole, in place of splitting each.
        slots: requests that an instance runs at a time, and that a gateway sends it; 0: any number.
        arrivals: `poisson`; `bursty` (Gamma gaps of 4 times a Poisson process's variance); `recorded` (the trace's own
            times); `closed` (a fixed number in the system).
        rate: requests per second over all instances. load: the same as a share of what full slots can serve. live: the
            same by the live requests of an instance that it gives; with `closed`, requests in the system for each
            instance. At most one of the three; none: 8 live, or the recorded times as they are.
        mix: `trace`; `one-domain` (four fifths from one kind of request); `drift` (the kind changes midway). A kind is
            a cluster of requests by the experts that they use.
        requests: of each run. seeds: runs, each with its own split, stream and arrivals. seed: the first.
        fit: share of the requests that the policies may learn from; the others arrive. block: neighbours kept together.
        budget: tokens of a step. cache_tokens: of an instance; None: what memory leaves, or any number. mixed: prompts
            share steps with decoding requests.
        prompt_tokens: of each request, where the trace does not say.
        ttft_ms, tpot_ms: limits that goodput counts; None: no limit.
        choice: how the policy `experts` weighs.

    Raises:
        UsageError: a value out of range, or two ways of saying the rate.
    """

    policies: tuple[str, ...] = DEFAULT_ROWS
    instances: int = 8
    gpus_per_instance: int = 1
    expert_parallel: bool = False
    slots: int = 0
    arrivals: Literal["poisson", "bursty", "recorded", "closed"] = "poisson"
    rate: float | None = None
    load: float | None = None
    live: float | None = None
    mix: Literal["trace", "one-domain", "drift"] = "trace"
    requests: int = 2000
    seeds: int = 3
    seed: int = 0
    fit: float = 0.5
    block: int = 1
    budget: int = 8192
    cache_tokens: int | None = None
    mixed: bool = True
    prompt_tokens: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    choice: ExpertSettings = ExpertSettings()

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in ROWS:
                raise UsageError(f'no policy is called "{name[:40]}"', hint=f"use {', '.join(ROWS)}")
        whole = (
            ("--instances", self.instances, 1, 1024), ("--gpus-per-instance", self.gpus_per_instance, 1, 1024),
            ("--slots", self.slots, 0, 4096), ("--requests", self.requests, 20, 1_000_000),
            ("--seeds", self.seeds, 1, 100), ("--budget", self.budget, 16, 1 << 20), ("--seed", self.seed, 0, 1 << 40),
        )  # fmt: skip
        for flag, value, low, high in whole:
            if not low <= value <= high:
                raise UsageError(f"{flag} {value} is outside {low}..{high}")
        given = {"--rate": self.rate, "--load": self.load, "--live": self.live}
        named = [flag for flag, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} both say how many requests come", hint="give one of them")
        for flag in named:
            if not 0 < (given[flag] or 0) < 1e6:
                raise UsageError(f"{flag} {given[flag]:g} is not positive, or too large")
        if self.load is not None and not self.slots:
            raise UsageError("--load is a share of full slots", hint="give --slots too, e.g. --slots 8")
        if self.arrivals not in ARRIVALS:
            raise UsageError(f"--arrivals {str(self.arrivals)[:20]} is none of {', '.join(ARRIVALS)}")
        if self.arrivals == "closed" and (self.rate is not None or self.load is not None):
            raise UsageError("closed arrivals have no rate", hint="give --live, the requests for each instance")
        optional = (("--cache-tokens", self.cache_tokens), ("--prompt-tokens", self.prompt_tokens),
                    ("--ttft", self.ttft_ms), ("--tpot", self.tpot_ms))  # fmt: skip
        for flag, limit in optional:
            if limit is not None and not limit > 0:
                raise UsageError(f"{flag} {limit:g} is not positive")

    @property
    def rows(self) -> tuple[str, ...]:
        """The policies, each once, the baseline first."""
        return tuple(dict.fromkeys((BASELINE, *self.policies)))
