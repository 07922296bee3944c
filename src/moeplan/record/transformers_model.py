"""A model that Transformers loaded, with its routers found: what a recording needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan import embedded
from moeplan.errors import UsageError
from moeplan.io.paths import check_input
from moeplan.record.transformers_routers import RouterModule, find_routers
from moeplan.types import ModelShape

__all__ = ["LoadedModel", "load_model", "pad_token", "stop_tokens"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its routers found.

    Attributes:
        name: as the trace will call it.
        model, tokenizer: of Transformers; the tokenizer may be None if prompts are token ids.
        routers: one per MoE layer.
    """

    name: str
    model: Any
    tokenizer: Any
    routers: tuple[RouterModule, ...]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, name: str) -> LoadedModel:
        """Find the routers of a model that is already in memory; raises UsageError if they cannot be read."""
        model.eval()
        return cls(name, model, tokenizer, find_routers(model))

    @property
    def shape(self) -> ModelShape:
        """The model as the trace describes it; bytes of an expert at the type the weights were loaded in."""
        config = self.model.config.get_text_config()
        first = self.routers[0]
        groups = getattr(config, "n_group", None)
        plain = getattr(config, "topk_method", None) == "greedy"
        return ModelShape(
            name=self.name,
            num_layers=len(self.routers),
            num_experts=first.num_experts,
            top_k=first.top_k,
            layer_ids=tuple(router.layer for router in self.routers),
            hidden=getattr(config, "hidden_size", None),
            routing_groups=groups if type(groups) is int and groups > 0 and not plain else 1,
            expert_bytes=_expert_bytes(self.model, first),
        )


def load_model(
    source: str, *, dtype: str = "auto", device: str = "auto", allow_download: bool = False, tokenizer: bool = True
) -> LoadedModel:
    """Load a model folder (or, with `allow_download`, a name on the Hub) from safetensors; its own code never runs.

    Args:
        source: the folder; the word `embedded` for the model that comes with the package.
        dtype: one of `DTYPES`; auto takes the type it was saved in.
        device: of torch, e.g. cpu or cuda:1; auto takes a GPU if there is one.
        tokenizer: whether one is needed.

    Raises:
        UsageError: Transformers is not installed, or cannot load it, or the model's routers cannot be read.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed", hint="pip install 'moeplan[transformers]'") from None
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    name = Path(source).resolve().name if Path(source).is_dir() else source
    source = str(embedded.named(source, embedded.MODEL)) if source == embedded.WORD else source
    if not allow_download and not Path(source).is_dir():
        raise UsageError("is not a model folder", where=source, hint="check the path, or add --allow-download")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    common = {"local_files_only": not allow_download, "trust_remote_code": False}
    try:
        for file in Path(source).iterdir() if Path(source).is_dir() else ():
            check_input(file)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **common)
        reader = transformers.AutoTokenizer.from_pretrained(source, **common) if tokenizer else None
        model = model.to(place)
    except Exception as error:  # Transformers and torch raise nearly everything; it is their verdict on the folder
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"Transformers cannot load it ({lines[0][:200]})", where=source, hint="check the folder and --device"
        ) from None
    return LoadedModel.of(model, reader, name)


def stop_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Ids that end a request: those of the generation config, else of the model's config, else of the tokenizer."""
    for holder in (loaded.model.generation_config, loaded.model.config.get_text_config(), loaded.tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            return frozenset(value if isinstance(value, list | tuple) else [value])
    return frozenset()


def pad_token(loaded: LoadedModel) -> int:
    """Any id will do: what it stands on is masked, and its rows are dropped."""
    for holder in (loaded.tokenizer, loaded.model.config.get_text_config()):
        value = getattr(holder, "pad_token_id", None)
        if type(value) is int and value >= 0:
            return value
    return min(stop_tokens(loaded), default=0)


def _expert_bytes(model: Any, router: RouterModule) -> int | None:
    """Bytes of one expert, from the module `experts` beside the router, if there is one; else None."""
    modules = dict(model.named_modules())
    experts = modules.get(f"{router.name.rpartition('.')[0]}.experts")
    size = sum(p.numel() * p.element_size() for p in experts.parameters()) if experts is not None else 0
    return size // router.num_experts if size and size % router.num_experts == 0 else None
