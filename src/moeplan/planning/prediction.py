"""What a plan knows of a request before its prefill: its prompt, and earlier answers of its session.

Names: n requests, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Float32Array, FloatArray, Int64Array
from moeplan.errors import FormatError
from moeplan.planning.predictor import PromptPredictor
from moeplan.planning.prompt_router import Calibration, prompt_router
from moeplan.planning.router import Router
from moeplan.planning.sessions import EarlierAnswers
from moeplan.trace.prompts import PromptFeatures, PromptKind

if TYPE_CHECKING:
    from moeplan.planning.requests import RequestSet

__all__ = ["PREDICTED", "Prediction", "predictable"]

#: Signatures that are predicted: from the prompt's tokens; from earlier answers of the session, and the tokens if kept.
PREDICTED = ("prompt-tokens", "previous-turn")


def predictable(requests: RequestSet) -> list[str]:
    """Which of `PREDICTED` the trace has what it takes for."""
    has = (requests.prompts is not None, requests.earlier is not None)
    return [signature for signature, given in zip(PREDICTED, has, strict=True) if given]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predicts the use of experts that a plan's groups are chosen by.

    Attributes:
        predictor: from prompts; one that knows no terms where the trace keeps no prompts.
        earlier: how earlier answers of a session are weighed in.
        domains: names of the domains that the predictor has offsets for. Rows of a table use them only where prompts
            are not kept: what a gateway knows is the text.
        calibration: from the score of the chosen group to the local share to expect; None without a placement.
    """

    predictor: PromptPredictor
    earlier: EarlierAnswers
    domains: tuple[str, ...] = ()
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, requests: RequestSet, fit: Int64Array, seed: int = 0) -> Prediction:
        """Fit on some requests, int64 [n] positions."""
        prompts, domain = requests.prompts, requests.domain[fit]
        given = PromptFeatures.empty(len(fit)) if prompts is None else prompts.take(fit)
        use = requests.use[fit]
        predictor = PromptPredictor.fit(given, use, domain, seed=seed)
        names = requests.trace.requests.domains if requests.trace is not None else ()
        made = cls(predictor, EarlierAnswers(), tuple(names[: len(predictor.domain_offset)]))
        if requests.earlier is None or predictor.left_out is None:
            return made
        known = predictor.left_out.index
        prior = made.left_out_use(requests, fit, "prompt-tokens")
        return dataclasses.replace(made, earlier=EarlierAnswers.fit(prior, requests.earlier[fit[known]], use[known]))

    def usable_for(self, requests: RequestSet) -> list[str]:
        """Which of `PREDICTED` it can tell of these requests: their prompts must be kept as those of the fit were."""
        prompts, predictor = requests.prompts, self.predictor
        readable = prompts is None or (prompts.kind == predictor.kind and prompts.key == predictor.key)
        knows_terms = len(predictor.weighting.terms) > 0
        return [kind for kind in predictable(requests) if readable and (knows_terms or kind == "previous-turn")]

    def expected_use(self, requests: RequestSet, which: Int64Array, signature: str) -> Float32Array:
        """float32 [n, L, E], each layer sums to 1: what requests at positions int64 [n] are expected to use.

        Raises:
            UsageError: prompts of another kind than it was fitted on, or hashed under another secret.
        """
        if requests.prompts is None:
            none = PromptFeatures.empty(len(which), self.predictor.kind, self.predictor.key)
            prior = self.predictor.expected_use(none, self._domain(requests)[which])
        else:
            prior = self.predictor.expected_use(requests.prompts.take(which))
        return self._with_earlier(requests, which, prior, signature)

    def left_out_use(self, requests: RequestSet, fit: Int64Array, signature: str) -> Float32Array:
        """float32 [m, L, E]: the same of the fitted requests at `left_out.index`, by a regression without them."""
        left_out = self.predictor.left_out
        assert left_out is not None
        coordinates, which = left_out.coordinates, fit[left_out.index]
        if requests.prompts is None:
            coordinates = coordinates + left_out.domain_offset
        return self._with_earlier(requests, which, self.predictor.use_at(coordinates), signature)

    def _with_earlier(
        self, requests: RequestSet, which: Int64Array, prior: Float32Array, signature: str
    ) -> Float32Array:
        if signature != "previous-turn" or requests.earlier is None:
            return prior
        return self.earlier.combined(prior, requests.earlier[which])

    def _domain(self, requests: RequestSet) -> Int64Array:
        """int64 [n], domains of all requests by the numbers of the fit; -1 for one that it did not have."""
        if requests.trace is None:
            return requests.domain
        number = {name: i for i, name in enumerate(self.domains)}
        names = requests.trace.requests.domains
        return np.array([number.get(name, -1) for name in names], np.int64)[requests.domain]

    def calibrated(self, requests: RequestSet, fit: Int64Array, router: Router, local: FloatArray) -> Prediction:
        """The same with a calibration for a placement.

        Args:
            fit: as it was fitted on. router: the plan's. local: float64 [D, L, E], see `prompt_router`.
        """
        left_out = self.predictor.left_out
        assert left_out is not None
        scores = prompt_router(router, local).scores(self.left_out_use(requests, fit, "prompt-tokens"))
        return dataclasses.replace(self, calibration=Calibration.fit(scores, local, requests.use[fit[left_out.index]]))

    def to_dict(self) -> dict[str, Any]:
        """What plan.json says of it."""
        predictor = self.predictor
        return {
            "kind": predictor.kind,
            "key": predictor.key,
            "domains": list(self.domains),
            "earlier_strength": self.earlier.strength,
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What a stored plan keeps, by file name; all begin with `prompt_`."""
        calibration = self.calibration
        curve = np.zeros((2, 0)) if calibration is None else np.stack((calibration.score, calibration.share))
        return self.predictor.arrays() | {"prompt_calibration": curve}

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, npt.NDArray[Any]],
        kind: PromptKind,
        key: str,
        domains: tuple[str, ...],
        earlier_strength: float,
    ) -> Prediction:
        """The prediction that `arrays` and `to_dict` are of.

        Raises:
            FormatError: arrays that do not fit each other.
        """
        curve = np.asarray(arrays["prompt_calibration"], np.float64)
        if len(curve) != 2 or not np.isfinite(curve).all() or (np.diff(curve, axis=1) < 0).any():
            raise FormatError("the calibration of the prompt predictor must rise", hint="plan again")
        predictor = PromptPredictor.from_arrays(arrays, kind, key)
        if len(predictor.domain_offset) != len(domains):
            raise FormatError("the prompt predictor's domains do not fit its arrays", hint="plan again")
        calibration = Calibration(curve[0], curve[1]) if curve.shape[1] else None
        return cls(predictor, EarlierAnswers(earlier_strength), domains, calibration)
