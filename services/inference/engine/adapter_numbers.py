"""
Numbers of adapters in the engine.

A number stands for one version of an adapter's file at one scale. Steps and the prefix cache keep
different numbers apart, so scales never mix either. Files are counted from 1 and never reused; 0
is the base model.
"""

from services.contract.model_names import MAX_SCALE, SCALE_DECIMALS

BASE = 0

_STEPS: int = 10**SCALE_DECIMALS  # per scale of 1
_SCALES = 256  # per file; a number must fit 30 bits (kv_cache/prefix.py)

assert MAX_SCALE * _STEPS < _SCALES


def adapter_number(file: int, scale: float = 1.0) -> int:
    return file * _SCALES + round(scale * _STEPS)


def file_of(number: int) -> int:
    """Return the number of the adapter's file; 0 for the base model."""
    return number // _SCALES


def scale_of(number: int) -> float:
    return number % _SCALES / _STEPS
