"""Which group and option a config file is, and where Hydra looks for them.

A group is a folder and its options are the files in it, with one exception: the options of `experiment` may stand in
folders, and are then named with them, as `experiment=llama2/7B_lora_single_device`.
"""

from __future__ import annotations

from collections.abc import Collection

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult

EXPERIMENT = "experiment"
SCALE = "scale"
"""The group of which a run has no option unless one is added: `+scale=tiny`."""


def at_home(path: str) -> str:
    """`scale/tiny` of `verb/scale/tiny`: a group that is added to a verb is looked for beside that verb's own file."""
    return path.removeprefix("verb/") if path.removeprefix("verb/").partition("/")[0] == SCALE else path


def group_and_option(path: str) -> tuple[str, str]:
    """Of `experiment/llama2/mine` it is `experiment` and `llama2/mine`; of `model/tiny`, `model` and `tiny`.

    Args:
        path: of a config file below the groups, without its ending.
    """
    if path.startswith(f"{EXPERIMENT}/"):
        return EXPERIMENT, path.removeprefix(f"{EXPERIMENT}/")
    group, _, option = at_home(path).rpartition("/")
    return group, option


class Groups(ConfigRepository):
    """Hydra's groups without those whose names the command uses for keys, and with all experiments as one group.

    Args:
        search_path: the folders of groups.
        keys: names that are keys of the command even where a group is called the same.
    """

    def __init__(self, search_path: ConfigSearchPath, keys: Collection[str]) -> None:
        super().__init__(search_path)
        self._keys = keys

    def group_exists(self, config_path: str) -> bool:
        return config_path not in self._keys and super().group_exists(at_home(config_path))

    def config_exists(self, config_path: str) -> bool:
        return super().config_exists(at_home(config_path))

    def load_config(self, config_path: str) -> ConfigResult | None:
        return super().load_config(at_home(config_path))

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        if group_name != EXPERIMENT:
            return super().get_group_options(at_home(group_name), results_filter)
        return [] if results_filter == ObjectType.GROUP else sorted(self._below(EXPERIMENT))

    def _below(self, folder: str) -> list[str]:
        """The experiments in a folder and in those below it, by their names as options."""
        here = [f"{folder}/{name}" for name in super().get_group_options(folder, ObjectType.CONFIG)]
        names = [group_and_option(path)[1] for path in here]
        for name in super().get_group_options(folder, ObjectType.GROUP):
            names += self._below(f"{folder}/{name}")
        return names
