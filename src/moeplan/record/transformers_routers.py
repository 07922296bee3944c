"""Finding and reading the routers of a model that Transformers loaded.

A router is found by what it does, not by its name. One short forward pass with a hook on every module shows, in each
layer, which module gives the chosen indices: one that returns them in a tuple (nearly all families of Transformers
5.23), else one that is called with them (`experts(hidden, indices, weights)`, as in DBRX), else a family that hides
them and is known by name (Llama-4). Logits are never read where indices exist: selection bias and groups come after
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, UsageError
from moeplan.types import MAX_K

__all__ = ["PickTap", "RouterModule", "find_routers"]

#: Tokens of the probing pass: a number that no other dimension is likely to have.
PROBE_TOKENS = 13
#: Class names that betray routed experts, for telling a router that cannot be read from a model without any.
TELLTALE = re.compile("Router|Gating|Experts|SparseMoe")

#: Reads (indices [T, k], gate weights [T, k] or None) from one call of a module: its arguments and its output.
Reader = Callable[[tuple[Any, ...], Any], tuple[Any, Any]]


@dataclass(frozen=True)
class RouterModule:
    """One MoE layer's source of picks.

    Attributes:
        name: path of the module in the model.
        kind: its class.
        layer: the model's own index of the layer.
        top_k: k.
        num_experts: E.
        has_weights: whether it gives gate weights.
        read: takes picks from a call.
    """

    name: str
    kind: str
    layer: int
    top_k: int
    num_experts: int
    has_weights: bool
    read: Reader = field(repr=False)


@dataclass(frozen=True)
class _Call:
    """What one module did in the probing pass; `rank` says how good a source it is, 0 the best."""

    name: str
    rank: int
    picks: Any
    gate: Any
    read: Reader
    logits: int | None


def find_routers(model: Any) -> tuple[RouterModule, ...]:
    """The routers of all MoE layers, in the order of layers.

    Raises:
        UsageError: no MoE layer, or one whose router cannot be read; names the modules looked at.
    """
    calls, modules = _probe(model), dict(model.named_modules())
    routers = []
    for layer in sorted({_layer(call.name) for call in calls}):
        found = [call for call in calls if _layer(call.name) == layer]
        best = min(call.rank for call in found)
        found = [call for call in found if call.rank == best]
        # A block that hands on what its router returned is not a second router.
        found = [call for call in found if not any(other.name.startswith(f"{call.name}.") for other in found)]
        if len(found) > 1:
            names = ", ".join(f"{call.name} ({type(modules[call.name]).__name__})" for call in found[:4])
            raise UsageError(f"layer {layer} has {len(found)} routers: {names}", hint="moeplan reads one per layer")
        routers.append(_router(model, modules, found[0], layer))
    missed = _unread(modules, {router.layer for router in routers})
    if missed:
        raise UsageError(
            f"the model's routers cannot be read; looked at {_listed(missed)}",
            hint="moeplan needs a module that returns, or experts that take, indices of shape [tokens, k]",
        )
    if not routers:
        raise UsageError(
            f"the model has no MoE layer; looked at {len(modules)} modules: {_listed(_of_one_layer(modules))}",
            hint="record a mixture-of-experts model",
        )
    for router in routers:
        if (router.top_k, router.num_experts) != (routers[0].top_k, routers[0].num_experts):
            raise UsageError(
                f"{router.name} picks {router.top_k} of {router.num_experts} experts, {routers[0].name}"
                f" {routers[0].top_k} of {routers[0].num_experts}",
                hint="a trace holds layers of one shape",
            )
    return tuple(routers)


def _probe(model: Any) -> list[_Call]:
    """Run a few tokens and keep, of each module's first call, what looks like picks."""
    import torch

    calls: dict[str, _Call | None] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if name not in calls:
                calls[name] = _picks_of(name, module, args, output)

        return hook

    for name, module in model.named_modules():
        if _layer(name) >= 0:
            handles.append(module.register_forward_hook(watch(name)))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(PROBE_TOKENS, device=model.device) % vocabulary)[None]
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # the model's own code, whatever it raises
        raise UsageError(f"the model does not run: {_first_line(error)}", hint="check its files and --dtype") from None
    finally:
        for handle in handles:
            handle.remove()
    return [call for call in calls.values() if call is not None]


def _picks_of(name: str, module: Any, args: tuple[Any, ...], output: Any) -> _Call | None:
    """The three rules, best first: returned indices, indices among the arguments, a family known by name."""
    if isinstance(output, tuple):
        for place, value in enumerate(output):
            if _is_picks(value):
                gate = _place_of(output, value)
                logits = [v.shape[1] for v in output if _is_matrix(v) and v.is_floating_point()]
                widest = max(logits, default=0)
                known = widest if widest > value.shape[1] else None
                picked = None if gate is None else output[gate]
                return _Call(name, 0, value, picked, _from_output(place, gate), known)
    if len(args) > 1 and _is_hidden(args[0]) and _is_picks(args[1]):
        gate = _place_of(args, args[1])
        return _Call(name, 1, args[1], None if gate is None else args[gate], _from_arguments(gate), None)
    family = FAMILIES.get(type(module).__name__)
    if family is not None:
        read = family(module)
        picks, weights = read(args, output)
        return _Call(name, 2, picks, weights, read, None)
    return None


def _from_output(place: int, gate: int | None) -> Reader:
    return lambda args, output: (output[place], None if gate is None else output[gate])


def _from_arguments(gate: int | None) -> Reader:
    return lambda args, output: (args[1], None if gate is None else args[gate])


def _llama4(module: Any) -> Reader:
    """Llama-4 returns (sigmoid scores [T, E], logits [T, E]); its picks are the k largest logits."""
    k = int(module.top_k)

    def read(args: tuple[Any, ...], output: Any) -> tuple[Any, Any]:
        values, picks = output[1].topk(k, dim=1)
        return picks, values.float().sigmoid()

    return read


#: Class name -> what makes a reader for a module of that class.
FAMILIES: dict[str, Callable[[Any], Reader]] = {"Llama4Router": _llama4}


def _is_matrix(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == PROBE_TOKENS


def _is_hidden(value: Any) -> bool:
    """Floating [T, H], or [1, T, H]."""
    import torch

    good = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim in (2, 3)
    return good and value.shape[-2] == PROBE_TOKENS


def _is_picks(value: Any) -> bool:
    import torch

    whole = (torch.int64, torch.int32, torch.int16, torch.uint8)
    return _is_matrix(value) and value.dtype in whole and 1 <= value.shape[1] <= MAX_K


def _place_of(values: tuple[Any, ...], picks: Any) -> int | None:
    """Where the gate weights are: the floating [T, k] nearest to the end; with k = E the logits come before them."""
    shape = picks.shape
    places = [i for i, v in enumerate(values) if _is_matrix(v) and v.is_floating_point() and v.shape == shape]
    return places[-1] if places else None


def _layer(name: str) -> int:
    """The first number in a module's path, -1 without one."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def _router(model: Any, modules: dict[str, Any], call: _Call, layer: int) -> RouterModule:
    module = modules[call.name]
    top_k = int(call.picks.shape[1])
    parent = modules[call.name.rpartition(".")[0]]
    count = _expert_count(model, (module, parent), call)
    if count is None or not top_k <= count:
        raise UsageError(f"{call.name} ({type(module).__name__}) does not say how many experts it chooses among")
    return RouterModule(call.name, type(module).__name__, layer, top_k, count, call.gate is not None, call.read)


def _expert_count(model: Any, modules: tuple[Any, ...], call: _Call) -> int | None:
    """E: as the module or its block says, else the width of the logits, else as the config says."""
    config = model.config.get_text_config()
    stated = [*map(_stated_count, modules), call.logits]
    stated += map(_stated_count, (config, getattr(config, "ffn_config", None)))
    return next((count for count in stated if count is not None), None)


def _stated_count(holder: Any) -> int | None:
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if type(value) is int), None)


def _unread(modules: dict[str, Any], read: set[int]) -> list[tuple[str, Any]]:
    """Modules that look like routed experts in layers where no picks were found."""
    return [
        (name, module)
        for name, module in modules.items()
        if TELLTALE.search(type(module).__name__) and _layer(name) >= 0 and _layer(name) not in read
    ]


def _of_one_layer(modules: dict[str, Any]) -> list[tuple[str, Any]]:
    """One module of each class in the last numbered layer: deeper layers are the ones that are sparse."""
    last = max((_layer(name) for name in modules), default=-1)
    kinds = {type(module).__name__: (name, module) for name, module in modules.items() if _layer(name) == last}
    return list(kinds.values())


def _listed(found: list[tuple[str, Any]]) -> str:
    texts = [f"{name or '(model)'} ({type(module).__name__})" for name, module in found]
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class PickTap:
    """Hooks on the routers, which keep the picks of each forward pass until `take` is called.

    Args:
        model: the model that the routers were found in.
        routers: L of them.
        weights: keep gate weights as well.
    """

    def __init__(self, model: Any, routers: tuple[RouterModule, ...], *, weights: bool) -> None:
        self._model, self._routers, self._weights = model, routers, weights
        self._calls: list[list[tuple[Any, Any]]] = [[] for _ in routers]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks are in place inside the block only."""
        modules = dict(self._model.named_modules())
        handles = [
            modules[router.name].register_forward_hook(self._hook(router.read, calls))
            for router, calls in zip(self._routers, self._calls, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for calls in self._calls:
                calls.clear()

    def _hook(self, read: Reader, calls: list[tuple[Any, Any]]) -> Callable[..., None]:
        """Keeps references only: copying and stacking wait until the batch is done."""
        if self._weights:
            return lambda module, args, output: calls.append(read(args, output))
        return lambda module, args, output: calls.append((read(args, output)[0], None))

    def take(self, batch: int, length: int, passes: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Picks and gate weights of one generation: a pass over B x S prompt tokens, then passes over B tokens each.

        Args:
            batch: B.
            length: S, padding included.
            passes: forward passes that the model made.

        Returns:
            int32 [B, S + passes - 1, L, k], and float16 of the same shape or None.

        Raises:
            FormatError: a router was not called once per pass, or not with all tokens (a fused kernel may bypass it).
        """
        for router, calls in zip(self._routers, self._calls, strict=True):
            sizes = [len(picks) for picks, _ in calls]
            if sizes != [batch * length] + [batch] * (passes - 1):
                raise FormatError(
                    f"{router.name} ({router.kind}) chose experts for {sum(sizes)} tokens in {len(sizes)} calls, but"
                    f" {batch * (length + passes - 1)} tokens went through the model in {passes}",
                    hint="a fused kernel or a cache may bypass the router; switch it off",
                )
        picks = self._stacked(0, batch, length).astype(np.int32)
        weights = self._stacked(1, batch, length).astype(np.float16) if self._weights else None
        for calls in self._calls:
            calls.clear()
        return picks, weights

    def _stacked(self, which: int, batch: int, length: int) -> npt.NDArray[Any]:
        """[B, S + passes - 1, L, k] from [layer][pass] -> [tokens, k]."""
        import torch

        joined = torch.stack([torch.cat([call[which] for call in calls]) for calls in self._calls], dim=1)
        flat: npt.NDArray[Any] = (joined.float() if which else joined.int()).cpu().numpy()  # [tokens, L, k]
        prompt = flat[: batch * length].reshape(batch, length, *flat.shape[1:])
        rest = flat[batch * length :].reshape(-1, batch, *flat.shape[1:]).swapaxes(0, 1)
        return np.concatenate([prompt, rest], axis=1)
