"""The tensors of an adapter by the names that files give them, and by the names of our layers.

`from_stored` and `to_stored` are the one place where the two are translated. Layers carry checkpoint names, so a
translation is only of the parts of a name. A family whose checkpoints join layers that are separate here takes them
apart in the one and joins them in the other; ranks and alphas are with the matrices, so they go along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tuner.adapter_config import IA3, LN_TUNING, MATRICES, AdapterConfig
from tuner.errors import ModelError

PREFIX = "base_model.model."


@dataclass
class Pair:
    """The matrices of one layer's adapter, A [R, in] and B [out, R], None where a file lacks one.

    Attributes:
        rank: R, as the settings say.
        alpha: numerator of the scale.
        base: the layer's own frozen weight, where it is saved along: PEFT does so for an adapted head.
        magnitude: [out], of DoRA.
    """

    rank: int
    alpha: float
    A: Tensor | None = None
    B: Tensor | None = None
    base: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass
class Contents:
    """What an adapter holds.

    Attributes:
        pairs: by the name of the layer.
        vectors: of (IA)³, by the name of the layer: [out, 1], or [1, in] where the input is scaled.
        tuned: weights of norms and biases of linear layers, by the name of the parameter.
        parameters: full weights of modules that are saved whole, by the name of the parameter.
        rows: trained rows of embedding and head, by the name of the matrix.
        matrices: the matrices whole, by their names, where PEFT saves them along because they were resized.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)


ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows; they take the place of the base's and are not added, whatever the name says."""
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "base_layer.weight": "base",
    "lora_magnitude_vector": "magnitude",
}


VECTOR, TUNED = ".ia3_l", ".ln_tuning_layers."
"""What PEFT puts behind the name of a layer that (IA)³ scales, and into the name of a parameter of LN tuning."""


def matrix_of(name: str) -> str | None:
    """Whose weight a tensor is that PEFT saves whole beside rows of tokens, of which it may have wrapped the layer."""
    path = name.removeprefix(PREFIX).removesuffix(".weight")
    return next((matrix for matrix in MATRICES if path in (matrix, f"{matrix}.token_adapter.base_layer")), None)


WEIGHTS = "adapter_model.safetensors"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything in the file of weights.

    Raises:
        ModelError: it is missing or damaged.
    """
    file = folder / WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        raise ModelError(
            f"{file}: missing, and {file.with_suffix('.bin').name} is a pickle, which is not read; save the adapter "
            "again with PEFT: save_pretrained(folder, safe_serialization=True)"
        )
    try:
        # With memory of their own: in the file they are at any address, by which sums are rounded.
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: {error}") from error


def from_stored(tensors: Mapping[str, Tensor], config: AdapterConfig) -> Contents:
    """What a file's tensors are for."""
    contents = Contents()
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        end = next((part for part in (*PARTS, ROWS) if name.endswith(f".{part}")), "")
        if matrix := config.token_rows and matrix_of(name):
            contents.matrices[matrix] = tensor
        elif end in PARTS:
            path = name.removesuffix(f".{end}")
            pair = contents.pairs.setdefault(path, Pair(config.rank_of(path), config.alpha_of(path)))
            setattr(pair, PARTS[end], tensor)
        elif end == ROWS:
            contents.rows[name.removesuffix(f".{ROWS}")] = tensor
        elif config.kind == IA3 and name.endswith(VECTOR):
            contents.vectors[name.removesuffix(VECTOR)] = tensor
        elif config.kind == LN_TUNING and TUNED in name:
            contents.tuned[name.replace(TUNED, ".")] = tensor
        else:
            contents.parameters[name] = tensor
    return contents


def to_stored(contents: Contents) -> dict[str, Tensor]:
    """The tensors of a file, each with memory of its own, as safetensors wants it."""
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in contents.parameters.items()}
    tensors |= {f"{PREFIX}{path}.{ROWS}": rows for path, rows in contents.rows.items()}
    tensors |= {f"{PREFIX}{path}{VECTOR}": vector for path, vector in contents.vectors.items()}
    for name, tensor in contents.tuned.items():
        path, _, parameter = name.rpartition(".")
        tensors[f"{PREFIX}{path}{TUNED}{parameter}"] = tensor
    for path, pair in contents.pairs.items():
        for end, part in PARTS.items():
            if (tensor := getattr(pair, part)) is not None:
                tensors[f"{PREFIX}{path}.{end}"] = tensor
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
