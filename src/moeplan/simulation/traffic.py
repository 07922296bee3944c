"""From a trace to simulated traffic: who may be learnt from, who arrives, and what is known of each."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplan.arrays import Float32Array, FloatArray, Int64Array
from moeplan.errors import UsageError
from moeplan.gateway.fleet import Request
from moeplan.planning.assignment import kmeans
from moeplan.planning.expected_use import UseForecast, shares
from moeplan.planning.plan import Plan
from moeplan.planning.predictor import PromptPredictor
from moeplan.planning.requests import RequestSet, blocks, split
from moeplan.replay.evaluator import fold_rng
from moeplan.simulation.settings import SimulationSettings
from moeplan.simulation.stream import Stream, bursty_gaps, poisson_gaps, recorded_times

__all__ = ["Traffic", "prompt_lengths"]

#: Prompt tokens where nothing is known of them.
PROMPT_TOKENS = 512
#: Of traffic that is mostly of one kind: the share of that kind, and how many kinds are told apart.
ONE_KIND, KINDS = 0.8, 8


def prompt_lengths(requests: RequestSet, given: int | None) -> tuple[Int64Array, str]:
    """(int64 [n], where they are from): as given, else the recorded prefill, else the prompts, else a usual length."""
    n = len(requests)
    if given is not None:
        return np.full(n, given, np.int64), f"prompts of {given} tokens"
    if requests.trace is not None:
        prefill = requests.trace.requests.prefill_known[requests.index]
        if (prefill > 0).all():
            return np.asarray(prefill, np.int64), "prompts as long as the recorded prefill"
    prompts = requests.trace.prompts if requests.trace is not None else None
    if prompts is not None and prompts.kind == "ids":
        lengths = np.diff(prompts.offsets)[requests.index]
        if (lengths > 0).all():
            return np.asarray(lengths, np.int64), "prompts as long as the trace's"
    return np.full(n, PROMPT_TOKENS, np.int64), f"prompts of {PROMPT_TOKENS} tokens, since the trace does not say"


@dataclass(frozen=True)
class Traffic:
    """One run's requests.

    Attributes:
        requests, settings: as given. fit, held: int64, positions that policies learn from, and that arrive.
        prompt: int64 [n], prompt tokens. number: of the run. plan: the plan whose router scores groups, or None.
    """

    requests: RequestSet
    settings: SimulationSettings
    fit: Int64Array
    held: Int64Array
    prompt: Int64Array
    number: int
    plan: Plan | None = None

    @classmethod
    def of(
        cls, requests: RequestSet, settings: SimulationSettings, number: int, prompt: Int64Array, plan: Plan | None
    ) -> Traffic:
        """The run's own split; with a plan, which was fitted elsewhere, all requests arrive.

        Raises:
            UsageError: too few requests to split.
        """
        every = np.arange(len(requests))
        if plan is not None:
            return cls(requests, settings, every, every, prompt, number, plan)
        rng = fold_rng(settings.seed, number, 0)
        chosen = split(requests.domain, blocks(requests.index, settings.block), settings.fit, rng)
        fit, held = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        if len(fit) < 2 or len(held) < 2:
            raise UsageError(f"{len(requests)} usable requests are too few to split", hint="use a larger trace")
        return cls(requests, settings, fit, held, prompt, number)

    @property
    def seed(self) -> int:
        """Of everything else in this run."""
        return self.settings.seed + self.number

    def stream(self) -> Stream:
        """Requests drawn from those that arrive, in the mix asked for; when they come is said later."""
        count, rng = self.settings.requests, fold_rng(self.settings.seed, self.number, 1)
        if self.settings.arrivals == "recorded":
            order, time = recorded_times(self._arrival[self.held])
            return self._stream(self.held[order], time)
        if self.settings.mix == "trace":
            return self._stream(rng.choice(self.held, count), np.zeros(count))
        kind = self._kinds[self.held]
        named = rng.permutation(kind.max() + 1)[:2]
        half = count // 2 if self.settings.mix == "drift" else count
        parts = [self._mostly(kind == named[0], half, rng), self._mostly(kind == named[-1], count - half, rng)]
        return self._stream(np.concatenate(parts), np.zeros(count))

    def timed(self, stream: Stream, rate: float) -> Stream:
        """The stream with arrivals at `rate` requests per second."""
        rng = fold_rng(self.settings.seed, self.number, 2)
        gaps = bursty_gaps if self.settings.arrivals == "bursty" else poisson_gaps
        return stream.at(gaps(len(stream), rate, rng))

    def known(self, row: str, stream: Stream) -> list[Request]:
        """What a row's policy is told of each request of the stream."""
        use, scores = self._expected_use(row), self.scores(row)
        mean = float(self._answers[self.fit].mean())
        session = self._session
        return [
            Request(
                i,
                None if use is None else use[r],
                None if scores is None else scores[r],
                session=_none(session[r]),
                prompt_tokens=float(self.prompt[r]),
                expected_output_tokens=mean,
            )
            for i, r in enumerate(stream.source.tolist())
        ]

    def _mostly(self, chosen: np.ndarray, count: int, rng: np.random.Generator) -> Int64Array:
        """`ONE_KIND` of the requests from those chosen, the others from all."""
        of_kind = rng.random(count) < ONE_KIND
        return np.where(of_kind, rng.choice(self.held[chosen], count), rng.choice(self.held, count))

    def _stream(self, source: Int64Array, time: FloatArray) -> Stream:
        first = self.requests.spans.use[0, source]
        return Stream(source, time, self.prompt[source], self._answers[source], first)

    @cached_property
    def _answers(self) -> Int64Array:
        """int64 [n]: the first token comes with the prompt, and each row of the trace decodes one more."""
        first, end = self.requests.spans.use
        return np.asarray(end - first + 1, np.int64)

    @cached_property
    def _kinds(self) -> Int64Array:
        use = shares(self.requests.use).reshape(len(self.requests), -1)
        return kmeans(use, min(KINDS, len(self.held)), self.settings.seed)

    @property
    def _arrival(self) -> FloatArray:
        trace = self.requests.trace
        n = len(self.requests)
        return np.full(n, np.nan) if trace is None else trace.requests.arrival[self.requests.index]

    @property
    def _session(self) -> Int64Array:
        trace, n = self.requests.trace, len(self.requests)
        found = None if trace is None else trace.requests.session
        return np.full(n, -1, np.int64) if found is None else found[self.requests.index]

    def _expected_use(self, row: str) -> Float32Array | None:
        """float32 [n, L, E], or None where the row goes by something else."""
        requests, fit = self.requests, self.fit
        if row == "oracle":
            return shares(requests.use)
        if row == "domain":
            total = shares(requests.use[fit])
            everybody = total.mean(axis=0)
            mean = {d: total[requests.domain[fit] == d].mean(axis=0) for d in np.unique(requests.domain[fit])}
            return np.stack([mean.get(d, everybody) for d in requests.domain])
        if row == "experts":
            forecast = UseForecast(requests.signature[fit], requests.use[fit], self.settings.seed)
            return forecast.expected_use(requests.signature)
        if row == "prompt-tokens":
            prompts = requests.trace.prompts if requests.trace is not None else None
            assert prompts is not None
            prompts = prompts.take(requests.index)
            domain, seed = requests.domain, self.settings.seed
            predictor = PromptPredictor.fit(prompts.take(fit), requests.use[fit], domain[fit], seed=seed)
            return predictor.expected_use(prompts, domain)
        return None

    def scores(self, row: str) -> FloatArray | None:
        """float64 [n, groups] by the plan's router; None without a plan, and for rows that do not ask it."""
        if self.plan is None or row not in ("experts", "oracle"):
            return None
        requests = self.requests
        return self.plan.router.scores(requests.signature if row == "experts" else requests.use)


def _none(session: int) -> Hashable | None:
    return None if session < 0 else int(session)
