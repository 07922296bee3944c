"""Presets of the synthetic generator (`data/presets.json`): three published models, and a small one for the demo.

The models are those of the catalogue, with experts in fp8 and a KV cache in bf16. Three spreads per preset are tuned,
each to one figure of `Targets`, and to nothing else (never to the volumes or the quality of plans).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moeplan.errors import UsageError
from moeplan.io.catalogue import read_object
from moeplan.io.json import convert
from moeplan.model.catalogue import load_model
from moeplan.model.parameters import expert_parameters, kv_values_per_token
from moeplan.model.spec import ModelSpec
from moeplan.types import ModelShape

__all__ = ["PRESETS", "Preset", "Targets", "find_preset"]

DATA = Path(__file__).parent / "data" / "presets.json"

#: The seven data sets of the published experiment; mathematics, program synthesis and summaries are each a family.
_SEVEN = (
    *(("gsm8k", "mathematics"), ("math", "mathematics"), ("mbpp", "code"), ("humaneval", "code")),
    *(("lmsys-chat", "chat"), ("xsum", "summaries"), ("tldr", "summaries")),
)


@dataclass(frozen=True)
class Targets:
    """What a preset is tuned to, each a mean over layers.

    Attributes:
        imbalance: largest expert's decode picks over the mean.
        correlation: Pearson, per-expert prefill counts against decode counts, counts pooled over all requests.
        related, unrelated: Pearson, decode counts of one domain against another's, of the same family and not.
    """

    imbalance: float
    correlation: float
    related: float
    unrelated: float


@dataclass(frozen=True)
class Preset:
    """A synthetic workload of one model.

    Every token draws a topic from its request's mixture; a topic has log-normal expert weights per layer and phase:
    log w = base_spread x popularity + topic_spread x topic +/- phase_spread x phase, each factor a standard normal.

    Attributes:
        name: of the preset, and of the model in its traces.
        model: its name in the catalogue, or its description.
        domains: (name, family); domains of one family share topics. By default the published experiment's.
        targets: what the spreads are tuned to.
        base_spread: of an expert's popularity with everybody; varies by +/- 30 % over layers. Sets the imbalance.
        topic_spread: between topics. Sets the similarity of domains.
        phase_spread: between prefill and decode, common to all topics. Sets the correlation of the pooled counts.
        family_share: of a request's mixture that goes to its family's topics, related domains alike.
        common_share: of a request's mixture that goes to all topics alike.
        concentration: of the Dirichlet from which a request's mixture is drawn; low makes requests differ.
        drift: share of a request's decode mixture that is drawn anew rather than kept from its prefill.
        requests, prefill, decode: default size, tokens as means per request.
    """

    name: str
    model: str | ModelSpec
    targets: Targets
    base_spread: float
    topic_spread: float
    phase_spread: float
    domains: tuple[tuple[str, str], ...] = _SEVEN
    family_share: float = 0.35
    common_share: float = 0.1
    topics_per_domain: int = 4
    concentration: float = 4.0
    drift: float = 0.3
    requests: int = 2000
    prefill: int = 128
    decode: int = 128

    @cached_property
    def spec(self) -> ModelSpec:
        """The model, with the bytes of an expert in fp8 and of a token's KV cache in bf16."""
        if isinstance(self.model, ModelSpec):
            return self.model
        spec = load_model(self.model)
        return spec.override(
            expert_bytes=sum(expert_parameters(spec)), kv_bytes_per_token=2 * kv_values_per_token(spec)
        )

    @cached_property
    def shape(self) -> ModelShape:
        """The model as its traces know it."""
        return self.spec.override(name=self.name).moe_shape()

    @property
    def groups_per_token(self) -> int:
        """Routing groups that a token's picks come from."""
        return self.spec.moe.groups_kept if self.spec.moe else 1

    @property
    def num_topics(self) -> int:
        return self.topics_per_domain * len(self.domains)


#: By name; the file says where each target is from.
PRESETS = {
    name: convert({"name": name} | entry, Preset, f"{DATA}, {name}") for name, entry in read_object(DATA).items()
}


def find_preset(name: str | Preset) -> Preset:
    """The preset of that name; a preset as it is.

    Raises:
        UsageError: there is none.
    """
    if isinstance(name, Preset):
        return name
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}", hint=f"choose from {', '.join(PRESETS)}")
    return PRESETS[name]
