"""
Names of models in requests: `<model>`, `<model>:<adapter>`, or `<model>:<adapter>@<scale>`.

A scale multiplies the effect of a LoRA adapter; 1 is what it was trained for. A file name may
contain `@` too, so a name is first looked up whole.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo

SCALE_DECIMALS = 2
MAX_SCALE = 2.0

_SCALE = re.compile(rf"\d(\.\d{{1,{SCALE_DECIMALS}}})?\Z", re.ASCII)


class AdapterChoice(NamedTuple):
    name: str  # `<model>:<adapter>`
    scale: float


def names_of(model: ModelInfo | None) -> tuple[str, ...]:
    """Return the names by which requests select the model: plain, and with each adapter."""
    if model is None:
        return ()
    return (model.name, *(f"{model.name}:{adapter}" for adapter in model.adapters))


def is_name_of(name: str, model: ModelInfo | None) -> bool:
    """Return whether `name` selects the model, with or without an adapter, at any scale."""
    names = names_of(model)
    return name in names or _without_scale(name) in names[1:]


def choose_adapter(name: str, adapters: Collection[str]) -> AdapterChoice | None:
    """
    Return which of `adapters` (`<model>:<adapter>`) the name selects, and its scale; None if it
    selects none of them. Raises ServiceError(invalid_request) for an invalid scale.
    """
    if name in adapters:
        return AdapterChoice(name, 1.0)
    plain = _without_scale(name)
    if plain not in adapters:
        return None
    scale = name[len(plain) + 1 :]
    if not _SCALE.match(scale) or float(scale) > MAX_SCALE:
        raise ServiceError(
            "invalid_request",
            f"The scale in the model {name!r} must be a number from 0 to {MAX_SCALE:g} with at most"
            f" {SCALE_DECIMALS} decimals, for example {plain}@0.5.",
        )
    return AdapterChoice(plain, float(scale))


def with_scale(name: str, scale: float) -> str:
    """Return the name of an adapter at a scale: the shortest one that selects it."""
    return name if scale == 1 else f"{name}@{scale:g}"


def _without_scale(name: str) -> str:
    """Return the part before the last `@`; "" without one."""
    return name.rpartition("@")[0]
