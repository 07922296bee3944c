"""The section of a profile on what stored rows leak."""

from __future__ import annotations

from moeplan.profile import Profile, Skipped
from moeplan.profile.common import FloatArray
from moeplan.profile.privacy import LINE_UP, DomainInference, Reidentification
from moeplan.report.page import Section, Table
from moeplan.report.profile_figures import link_figure

__all__ = ["privacy_section"]

HEADING = "Leakage of stored rows"


def privacy_section(found: Profile, *, figures: bool) -> Section:
    """Kind and link in one sentence and one table; the reasons where neither can be measured."""
    item = found.privacy
    stages = {name: found.counts.stages.phrase(i) for i, name in enumerate(item.kind)}
    kinds = {stages[name]: kind for name, kind in item.kind.items() if isinstance(kind, DomainInference)}
    link = item.link if isinstance(item.link, Reidentification) else None
    if not kinds and link is None:
        reasons = dict.fromkeys(r.reason for r in (*item.kind.values(), item.link) if isinstance(r, Skipped))
        return Section(HEADING, f"Not shown: it {'; '.join(reasons)}.", skipped=True)
    sentences = [_kind_sentence(kinds, item.aggregate)] if kinds else []
    sentences.append(_link_sentence(link, item.link))
    rows = [
        [f"domain, from {name}", _percent(kind.accuracy), _range(kind.ci95), _percent(kind.chance), f"{kind.rows:,}"]
        for name, kind in kinds.items()
    ]
    if link is not None:
        for what, rate, ci in (("routing", link.by_routing, link.routing_ci), ("text", link.by_text, link.text_ci)):
            for i, n in enumerate(link.aggregate.tolist()):
                cells = (_percent(float(rate[i])), _range(ci[i]), _percent(link.chance), f"{link.requests[i]:,}")
                rows.append([f"row, by {what}, N = {n}", *cells])
    left_out = {name for kind in kinds.values() for name in kind.left_out}
    return Section(
        HEADING,
        " ".join(sentences),
        [link_figure(link)] if figures and link is not None and len(link.aggregate) > 1 else (),
        Table(["identified", "accuracy", "95 % interval", "chance", "rows"], rows),
        "Domain: ridge regression on the counts of all layers, 5 folds; chance: always predict the largest domain"
        + (f"; {len(left_out)} domains with fewer than 5 rows are left out" if left_out else "")
        + "."
        + (_link_note(stages) if link is not None else ""),
    )


def _link_note(stages: dict[str, str]) -> str:
    return (
        f" Row: identify the row with a request's {stages['prefill']} among {LINE_UP} of its domain, either from the "
        f"routing of its {stages['decode']}, or from its text, with which the counts can be recomputed on the model. "
        "N: requests summed into a row, as 'moeplan import trace --aggregate N' stores them."
    )


def _kind_sentence(kinds: dict[str, DomainInference], aggregate: int) -> str:
    told = " and ".join(f"{_percent(kind.accuracy)} from {name}" for name, kind in kinds.items())
    largest = max(kind.chance for kind in kinds.values())
    row = "request" if aggregate == 1 else f"sum of {aggregate} requests"
    return (
        f"The domain of a stored {row} is predicted correctly in {told} (always predicting the largest domain: "
        f"{_percent(largest)})."
    )


def _link_sentence(link: Reidentification | None, item: Reidentification | Skipped) -> str:
    if link is None:
        return f"Re-identification of requests is not measured: {item.reason if isinstance(item, Skipped) else ''}."
    text = (
        f"Among {LINE_UP} rows of its domain, a request's row is identified from its other routing in "
        f"{_percent(link.by_routing[0])} and from its text in {_percent(link.by_text[0])} of cases "
        f"(chance: {_percent(link.chance)})"
    )
    if len(link.aggregate) > 1:
        text += (
            f"; for sums of {link.aggregate[-1]} requests (--aggregate {link.aggregate[-1]}) in "
            f"{_percent(link.by_routing[-1])} and {_percent(link.by_text[-1])}"
        )
    return text + "."


def _percent(share: float) -> str:
    """Whole percents, and no '100 %' or '0 %' that is not one."""
    if 0.995 <= share < 1 or 0 < share < 0.005:
        return f"{min(100 * share, 99.9):.1f} %"
    return f"{100 * share:.0f} %"


def _range(ci: FloatArray) -> str:
    return f"{100 * ci[0]:.0f} - {100 * ci[1]:.0f} %"
