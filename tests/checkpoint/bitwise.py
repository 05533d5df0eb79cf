"""Nested states compared value by value, tensors bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in flat(value, f"{path}/{key}").items()}
    if isinstance(node, list | tuple):
        return flat(dict(enumerate(node)), path)
    return {path: node}


def assert_bitwise(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
