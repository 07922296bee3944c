"""The catalogue of models `data/models.json`: names, aliases, notes; and models from a user's own file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import asdict

from moeplan import embedded
from moeplan.errors import located
from moeplan.io.catalogue import find_name, read_object
from moeplan.io.json import convert
from moeplan.model.bounds import MAX_MTP, MAX_WINDOW, NoWidth, Width, layer_list
from moeplan.model.config import config_file, of_config
from moeplan.model.spec import Attention, CompleteSpec, LinearAttention, ModelSpec, Moe
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS

__all__ = ["load_model", "model_names", "model_notes"]

DATA = Path(__file__).parent / "data" / "models.json"

Layers = Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
Experts = Annotated[int, Meta(ge=1, le=MAX_EXPERTS)]
Dtype = Annotated[str, Meta(pattern="^(bf16|fp8|int8|int4|fp4|mxfp4)$")]
#: What an entry says beside the dimensions.
NOTES = ("sources", "published", "note")
HINT = "docs/reference/catalogue.md lists the keys and their values"


class LayerRule(Struct, forbid_unknown_fields=True):
    """The layers first, first + every, first + 2 every, .."""

    first: Annotated[int, Meta(ge=0, le=MAX_LAYERS)] = 0
    every: Layers = 1


LayerSet = list[int] | LayerRule | None


class ExpertsEntry(Struct, forbid_unknown_fields=True, kw_only=True):
    """The experts, as `moeplan.model.spec.Moe` describes them."""

    layers: LayerSet = None
    experts: Experts
    top_k: Annotated[int, Meta(ge=1, le=MAX_K)]
    width: Width
    shared: Annotated[int, Meta(ge=0, le=MAX_EXPERTS)] = 0
    shared_width: NoWidth | None = None
    shared_gate: bool = False
    router_bias: bool = False
    groups: Experts = 1
    groups_kept: Experts = 1

    def moe(self, layers: int) -> Moe:
        shared_width = self.shared_width
        if shared_width is None:
            shared_width = self.width if self.shared else 0
        own = {"layers": _layers(self.layers, "moe.layers", layers), "shared_width": shared_width}
        return Moe(**asdict(self) | own)


class Checkpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """Dtypes of the published weights, and of the experts where they differ."""

    weights: Dtype
    experts: Dtype | None = None


class Entry(Struct, forbid_unknown_fields=True, kw_only=True):
    """One model in the catalogue's form (docs/reference/catalogue.md)."""

    layers: Layers
    hidden: Width
    vocab: Width
    attention: Attention
    full_layers: LayerSet = None
    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] = 0
    linear: LinearAttention | None = None
    dense_width: NoWidth = 0
    moe: ExpertsEntry | None = None
    gated: bool = True
    ffn_bias: bool = False
    norm_bias: bool = False
    positions: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] = 0
    tied: bool = False
    mtp_layers: Annotated[int, Meta(ge=0, le=MAX_MTP)] = 0
    checkpoint: Checkpoint = Checkpoint("bf16")
    aliases: list[str] = []
    sources: dict[str, str] = {}
    published: dict[str, Any] = {}
    note: str = ""

    def spec(self, name: str, source: str) -> CompleteSpec:
        """The model.

        Raises:
            FormatError: dimensions that no model can have.
        """
        same = {key: value for key, value in asdict(self).items() if key not in NOTES and key != "aliases"}
        with located(source):
            own = {
                "full_layers": _layers(self.full_layers, "full_layers", self.layers),
                "moe": self.moe.moe(self.layers) if self.moe else None,
                "checkpoint": (self.checkpoint.weights, self.checkpoint.experts or self.checkpoint.weights),
            }
            return ModelSpec(name=name, source=source, **same | own).complete()


def _layers(given: LayerSet, key: str, layers: int) -> tuple[int, ...]:
    """The layers of a list or a rule; all where nothing is given."""
    if isinstance(given, list):
        return layer_list(given, key, layers)
    rule = given or LayerRule()
    return tuple(range(rule.first, layers, rule.every))


def load_model(name_or_path: str | Path | ModelSpec) -> CompleteSpec:
    """A model of the catalogue, or of a file, with all its dimensions.

    Args:
        name_or_path: a name or alias of the catalogue (any case), or the path of a Transformers `config.json`, of the
            folder that holds it, or of a file with one entry in the catalogue's own form; the word `embedded`; or a
            description as it is.

    Raises:
        UsageError: neither a known name nor a path.
        FormatError: a file with a key missing, of a wrong type or impossible, or of an unknown model_type.
    """
    if isinstance(name_or_path, ModelSpec):
        return name_or_path.complete()
    text, path = str(name_or_path), embedded.named(name_or_path, embedded.MODEL)
    if path.exists() or path.suffix == ".json" or path.is_absolute():
        file = config_file(path)
        data = read_object(file)
        if "model_type" not in data and "layers" in data:
            return convert(data, Entry, str(file), HINT).spec(file.stem, str(file))
        return of_config(file, data).complete()
    return _from_catalogue(find_name(text, _names(), "model", "; or give the path of a config.json"))


def model_names() -> tuple[str, ...]:
    """All names of the catalogue."""
    return tuple(_entries())


def model_notes(name: str) -> dict[str, Any]:
    """What the catalogue says beside the dimensions: sources, published counts and what they count, a note."""
    entry = _entries()[name]
    return {key: getattr(entry, key) for key in NOTES if getattr(entry, key)}


@functools.cache
def _entries() -> dict[str, Entry]:
    return convert(read_object(DATA), dict[str, Entry], str(DATA), HINT)


@functools.cache
def _names() -> dict[str, tuple[str, ...]]:
    """Aliases by name; of a Hugging Face name also its last part."""
    return {
        key: (*entry.aliases, *(alias.rsplit("/")[-1] for alias in entry.aliases)) for key, entry in _entries().items()
    }


@functools.cache
def _from_catalogue(name: str) -> CompleteSpec:
    return _entries()[name].spec(name, f"{DATA}, {name}")
