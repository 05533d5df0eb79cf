"""Nested settings as a flat table, as tracking systems show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c -> value`; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return flat


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """What of a summary can be compared as a number."""
    return {
        key: value for key, value in summary.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
