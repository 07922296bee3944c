"""Presets of the synthetic generator: three published models, and a small one for the demonstration.

Shapes and byte counts come from the models' public `config.json`: experts in fp8, three matrices of hidden x
moe_intermediate_size; KV cache in bf16. Three spreads per preset are tuned, each to one figure of `Targets`, and to
nothing else (never to the volumes or the quality of plans).
"""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.errors import UsageError
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
        shape: the model.
        groups_per_token: routing groups that a token's picks come from.
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

    shape: ModelShape
    groups_per_token: int
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

    @property
    def name(self) -> str:
        return self.shape.name

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
            shape=ModelShape(
                name="demo",
                num_layers=8,
                num_experts=32,
                top_k=4,
                hidden=2048,
                expert_bytes=3 * 2048 * 768,
                kv_bytes_per_token=8 * 4 * 128 * 2 * 2,
            ),
            groups_per_token=1,
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
        # MLA keeps 512 + 64 values a token in each of 61 layers; moe_intermediate_size 2048.
        Preset(
            shape=ModelShape(
                name="deepseek-v3",
                num_layers=58,
                num_experts=256,
                top_k=8,
                layer_ids=tuple(range(3, 61)),
                hidden=7168,
                routing_groups=8,
                expert_bytes=3 * 7168 * 2048,
                kv_bytes_per_token=61 * (512 + 64) * 2,
            ),
            groups_per_token=4,
            domains=_SEVEN,
            targets=Targets(imbalance=5.8, correlation=0.55, related=0.75, unrelated=0.45),
            base_spread=0.635,
            topic_spread=1.565,
            phase_spread=0.393,
            family_share=0.4,
        ),
        # Imbalance: real decode counts on two MMLU subjects, without layer 45: 20. Correlation: published. Similarity:
        # the same real set has 0.30 between two unrelated subjects.
        # Expert intermediate_size 8192; 48 layers with 8 KV heads of 128.
        Preset(
            shape=ModelShape(
                name="llama-4-maverick",
                num_layers=24,
                num_experts=128,
                top_k=1,
                layer_ids=tuple(range(1, 48, 2)),
                hidden=5120,
                expert_bytes=3 * 5120 * 8192,
                kv_bytes_per_token=48 * 8 * 128 * 2 * 2,
            ),
            groups_per_token=1,
            domains=_SEVEN,
            targets=Targets(imbalance=19.0, correlation=0.82, related=0.7, unrelated=0.4),
            base_spread=2.49,
            topic_spread=3.26,
            phase_spread=0.555,
            family_share=0.36,
        ),
        # Imbalance: no published figure found; 6 is our choice, as for DeepSeek-V3, which is also top-8.
        # Correlation: published. Similarity: no figure, as for DeepSeek-V3.
        # moe_intermediate_size 1536; 94 layers with 4 KV heads of 128.
        Preset(
            shape=ModelShape(
                name="qwen3-235b",
                num_layers=94,
                num_experts=128,
                top_k=8,
                hidden=4096,
                expert_bytes=3 * 4096 * 1536,
                kv_bytes_per_token=94 * 4 * 128 * 2 * 2,
            ),
            groups_per_token=1,
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
