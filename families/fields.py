"""Single fields of a config.json: read as what they have to be, or refused in a line."""

import sys
from reprlib import repr as brief  # cut where it is long or deep
from typing import Any

LARGEST = 2**24  # the largest size that is believed; a larger one means a corrupt file
MANY = 2**12  # the same for layers, heads and head_dim


def size(config: dict[str, Any], name: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise ValueError(f"config.json: {name} is missing, a {config['model_type']} model needs it")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"config.json: {name} is {brief(value)}, expected a whole number from {least} to {most}")
    return value


def flag(config: dict[str, Any], name: str, default: bool = False) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {name} is {brief(value)}, expected true or false")
    return default if value is None else value


def positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"config.json: {name} is {brief(value)}, expected a positive number")
    return float(value)
