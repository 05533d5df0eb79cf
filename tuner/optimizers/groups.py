"""What an optimizer is given: the parameters that train, each with its name and its part in the model, in groups.

An optimizer knows tensors alone; which of them are to be stepped otherwise is known by the modules they belong to. So
one of ours is given parameters with their names and parts, and hands its library the groups that are made here.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

from torch import nn

from tuner.errors import ConfigError
from tuner.types import PositiveFloat

Role = Literal["A", "B", "norms", "biases", "embeddings", "head", "matrices", "vectors"]
"""A parameter's part: of an adapter `A` [R, in] and `B` [out, R]; `embeddings` are rows of tokens, also those of new
tokens alone; `head` makes logits where the embedding does not; `matrices` and `vectors` are what is none of these."""

ROLES: tuple[Role, ...] = get_args(Role)


NoDecay = list[Literal["norms", "biases", "embeddings"]]
"""Parts that a person may take from weight decay. Hugging Face's Trainer takes norms and biases, torchtune nothing."""


class Trained(NamedTuple):
    """A parameter that trains.

    Attributes:
        name: in the model.
        param: the parameter itself.
        role: its part.
    """

    name: str
    param: nn.Parameter
    role: Role


def trained(model: nn.Module) -> list[Trained]:
    """Every parameter of `model` that trains, once, in the order of its modules."""
    parts = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [Trained(name, param, role_of(model, name, param)) for name, param in parts]


def role_of(model: nn.Module, name: str, param: nn.Parameter) -> Role:
    """The part that the parameter of this name has."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in ("A", "B"):
        return cast(Role, leaf)
    if leaf == "bias":
        return "biases"
    if type(module).__name__.endswith("Norm"):
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if path == "lm_head":
        return "head"
    return "matrices" if param.dim() == 2 else "vectors"


def groups(
    params: Sequence[Trained],
    lr: PositiveFloat | None,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
    of: Container[Role] = ROLES,
) -> list[dict[str, Any]]:
    """The groups of parameters that an optimizer takes, in an order that `params` alone decide.

    A group says what it has otherwise than the optimizer is told for all; the first is always at the learning rate `lr`
    itself, unless everything that trains is at the other.

    Args:
        params: what it steps.
        lr: learning rate of the optimizer; None where that is left to a library, which LoRA+ cannot be.
        loraplus_lr_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the learning rate of B over that of A. As in
            PEFT and the authors' code, vectors that train beside an adapter have B's. None: one rate for all.
        no_decay: parts that weight decay leaves alone.
        of: the parts that groups are made of.

    Raises:
        ConfigError: LoRA+ where no adapter with a matrix B trains, or without a learning rate to multiply.
    """
    if loraplus_lr_ratio is not None and not any(one.role == "B" for one in params):
        raise ConfigError(
            f"optimizer.loraplus_lr_ratio={loraplus_lr_ratio}: LoRA+ is about the matrices B of adapters, and "
            "none trains here; say optimizer.loraplus_lr_ratio=null, or train LoRA"
        )
    if loraplus_lr_ratio is not None and lr is None:
        raise ConfigError(f"optimizer.loraplus_lr_ratio={loraplus_lr_ratio}: of which rate? say optimizer.lr too")
    made: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for one in params:
        faster = loraplus_lr_ratio is not None and (one.role == "B" or one.param.dim() == 1)
        if one.role in of:
            made.setdefault((faster, one.role in no_decay), []).append(one.param)
    return [
        {
            "params": members,
            **({"lr": cast(float, lr) * cast(float, loraplus_lr_ratio)} if faster else {}),
            **({"weight_decay": 0.0} if undecayed else {}),
        }
        for (faster, undecayed), members in sorted(made.items(), key=lambda item: item[0])
    ]
