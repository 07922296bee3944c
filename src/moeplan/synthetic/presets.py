"""Presets of the synthetic generator: three published models, and a small one for the demonstration.

The models are those of the catalogue, with experts in fp8 and a KV cache in bf16. Three spreads per preset are tuned,
each to one figure of `Targets`, and to nothing else (never to the volumes or the quality of plans).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moeplan.errors import UsageError
from moeplan.model.catalogue import load_model
from moeplan.model.parameters import expert_parameters, kv_values_per_token
from moeplan.model.spec import ModelSpec, Moe
from moeplan.types import ModelShape

__all__ = ["PRESETS", "Preset", "Targets", "find_preset"]


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
        domains: (name, family); domains of one family share topics.
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
    domains: tuple[tuple[str, str], ...]
    targets: Targets
    base_spread: float
    topic_spread: float
    phase_spread: float
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


#: The seven data sets of the published experiment; mathematics, program synthesis and summaries are each a family.
_SEVEN = (
    ("gsm8k", "mathematics"),
    ("math", "mathematics"),
    ("mbpp", "code"),
    ("humaneval", "code"),
    ("lmsys-chat", "chat"),
    ("xsum", "summaries"),
    ("tldr", "summaries"),
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="demo",
            model=ModelSpec(
                hidden=2048,
                moe=Moe(layers=tuple(range(8)), experts=32, top_k=4),
                expert_bytes=3 * 2048 * 768,
                kv_bytes_per_token=8 * 4 * 128 * 2 * 2,
            ),
            domains=(("code", "formal"), ("math", "formal"), ("chat", "prose"), ("prose", "prose")),
            targets=Targets(imbalance=3.0, correlation=0.75, related=0.8, unrelated=0.55),
            base_spread=0.95,
            topic_spread=2.17,
            phase_spread=0.42,
            family_share=0.44,
            requests=400,
            prefill=32,
            decode=48,
        ),
        # Imbalance: mean of four real decode counts of DeepSeek-V3 (SGLang's logical_count, 58 layers): 5.6 to 6.1.
        # Correlation: published. Similarity: no figure; clearly apart, relatives closer.
        Preset(
            name="deepseek-v3",
            model="DeepSeek-V3",
            domains=_SEVEN,
            targets=Targets(imbalance=5.8, correlation=0.55, related=0.75, unrelated=0.45),
            base_spread=0.635,
            topic_spread=1.565,
            phase_spread=0.393,
            family_share=0.4,
        ),
        # Imbalance: real decode counts on two MMLU subjects, without layer 45: 20. Correlation: published. Similarity:
        # the same real set has 0.30 between two unrelated subjects.
        Preset(
            name="llama-4-maverick",
            model="Llama-4-Maverick",
            domains=_SEVEN,
            targets=Targets(imbalance=19.0, correlation=0.82, related=0.7, unrelated=0.4),
            base_spread=2.49,
            topic_spread=3.26,
            phase_spread=0.555,
            family_share=0.36,
        ),
        # Imbalance: no published figure found; 6 is our choice, as for DeepSeek-V3, which is also top-8.
        # Correlation: published. Similarity: no figure, as for DeepSeek-V3.
        Preset(
            name="qwen3-235b",
            model="Qwen3-235B-A22B",
            domains=_SEVEN,
            targets=Targets(imbalance=6.0, correlation=0.68, related=0.75, unrelated=0.5),
            base_spread=1.4,
            topic_spread=2.6,
            phase_spread=0.603,
            family_share=0.36,
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}", hint=f"choose from {', '.join(PRESETS)}")
    return PRESETS[name]
