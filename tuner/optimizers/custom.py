"""Any other optimizer class, named: `optimizer._target_=torch.optim.RAdam`, or one of a package the person trusts.

There is no function of ours whose signature could be the schema, so the class's own is, read when it is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch.optim import Optimizer

from tuner.errors import ConfigError, nearest
from tuner.optimizers.groups import Trained, groups
from tuner.optimizers.paging import set_up_paging
from tuner.quiet import import_bitsandbytes

MODULES = ("torch.optim", "bitsandbytes.optim")
"""Where a class may come from unasked; of anything else, a configuration makes only what is trusted be imported."""


OURS = ("loraplus_lr_ratio", "no_decay")
"""Keys that make groups of parameters, which every optimizer takes; the others are arguments of its class."""


def custom(target: str, params: Sequence[Trained], keys: Mapping[str, Any], trusted: Sequence[str]) -> Optimizer:
    """The optimizer of class `target` over `params`, every key given to it as an argument.

    Args:
        target: dotted name of the class.
        params: what it steps.
        keys: its arguments by name, and those of `OURS`; one that is not there is off.
        trusted: the dotted prefixes of `trust_targets`.

    Raises:
        ConfigError: if the class is neither in `MODULES` nor trusted, cannot be used in a training loop, lacks an
            argument of one of these names, or refuses a value.
    """
    optimizer_class = find(target, trusted)
    if problems := _unknown_keys(target, optimizer_class, keys):
        raise ConfigError(problems)
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items() if key not in OURS}
    given = groups(params, keys.get("lr"), keys.get("loraplus_lr_ratio"), keys.get("no_decay", []))
    try:
        optimizer = cast(Any, optimizer_class)(given, **own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer._target_={target} refuses its keys: {error}") from error
    _refuse_fused_sgd(target, optimizer)
    if getattr(optimizer, "is_paged", False):
        set_up_paging(optimizer)
    return cast(Optimizer, optimizer)


def _refuse_fused_sgd(target: str, optimizer: Any) -> None:
    """On a CPU it would leave bf16 parameters as they are (see `sgd`): a run that seems to train and does not."""
    for group in optimizer.param_groups if target == "torch.optim.SGD" else ():
        stuck = any(param.device.type == "cpu" and param.dtype.itemsize == 2 for param in group["params"])
        if group["fused"] and stuck:
            raise ConfigError("optimizer.fused=true: on a CPU, PyTorch's fused SGD skips bf16 parameters; take it away")


def find(target: str, trusted: Sequence[str]) -> type[Optimizer]:
    """The class of this dotted name, in `MODULES` or below one of the `trusted` prefixes.

    Raises:
        ConfigError: if there is none, with the names that come close, or if its step needs a closure.
    """
    module, _, name = target.rpartition(".")
    if module not in MODULES and not any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in trusted if prefix):
        raise ConfigError(
            f"optimizer._target_={target}: must be a class of {' or '.join(MODULES)}, as torch.optim.RAdam, or of a "
            "package that trust_targets names"
        )
    classes = _classes(target, module)
    if name not in classes:
        raise ConfigError(f"optimizer._target_={target}: {module} has no such optimizer; {nearest(name, classes)}")
    closure = inspect.signature(classes[name].step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer._target_={target}: evaluates the loss several times a step, which training cannot"
        )
    return classes[name]


def _classes(target: str, module: str) -> dict[str, type[Optimizer]]:
    if module.startswith("bitsandbytes"):
        import_bitsandbytes()
    try:
        members = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ConfigError(f"optimizer._target_={target}: there is no module {error.name} to import it from") from error
    return {
        name: member
        for name, member in members.items()
        if isinstance(member, type) and issubclass(member, Optimizer) and member is not Optimizer
    }


def _unknown_keys(target: str, optimizer_class: type[Optimizer], keys: Mapping[str, Any]) -> list[str]:
    arguments = [name for name in inspect.signature(optimizer_class).parameters if name != "params"]
    valid = [*arguments, *OURS]
    undecayed = bool(keys.get("no_decay")) and "weight_decay" not in arguments
    wrong = [f"optimizer.no_decay={keys['no_decay']}: {target} has no weight_decay"] if undecayed else []
    return wrong + [
        f"optimizer.{key}={value}: {target} has no such argument (~optimizer.{key} takes the key away); "
        f"{nearest(key, valid)}"
        for key, value in keys.items()
        if key not in valid
    ]
