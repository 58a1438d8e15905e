"""
Reads the sampling parameters that a GGUF recommends, in its metadata `general.sampling.*`.

llama.cpp's converter takes them from a model's generation_config.json (gguf-py/gguf/metadata.py),
and its tools use them as defaults (common_init_sampler_from_model in common/common.cpp). The key
`sequence`, an order of samplers, is not used: the order here is fixed.
"""

import logging
from collections.abc import Callable
from types import MappingProxyType

import msgspec

from services.contract.messages import Sampling

log = logging.getLogger(__name__)

PREFIX = "general.sampling."
# llama.cpp's key, without the prefix: our name of the parameter
PARAMETERS = MappingProxyType(
    {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "xtc_probability": "xtc_probability",
        "xtc_threshold": "xtc_threshold",
        "penalty_last_n": "repeat_last_n",
        "penalty_repeat": "repeat_penalty",
        "mirostat": "mirostat",
        "mirostat_tau": "mirostat_tau",
        "mirostat_eta": "mirostat_eta",
    }
)


def read(metadata: Callable[[str], str | None]) -> Sampling:
    """
    Return the parameters that the file has; `metadata` returns the text of a key's value, or None.
    Invalid values are logged and ignored.
    """
    found = {name: text for key, name in PARAMETERS.items() if (text := metadata(PREFIX + key))}
    valid = {name: value for name, text in found.items() if (value := _valid(name, text))}
    if found:
        invalid = [f"{name}={text!r}" for name, text in found.items() if name not in valid]
        log.info(
            "sampling defaults of the model %s%s",
            " ".join(f"{name}={getattr(one, name):g}" for name, one in valid.items()),
            f" ignored: {', '.join(invalid)}" if invalid else "",
        )
    return Sampling(**{name: getattr(one, name) for name, one in valid.items()})


def _valid(name: str, text: str) -> Sampling | None:
    """Return the parameter with this value; None if it is invalid."""
    try:
        number = float(text)
        return msgspec.convert({name: int(number) if number.is_integer() else number}, Sampling)
    except (ValueError, msgspec.ValidationError):
        return None
