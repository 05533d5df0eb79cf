"""The command line: `tuner [VERB] [words]`, `run` being the verb that need not be said.

Exit codes: 0 done, 2 the input was wrong (one line each on stderr), 130 interrupted, 1 anything else (a traceback, or
a sweep of which not every trial finished).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.errors import ConfigError, Interrupted, TunerError, nearest


@dataclass(frozen=True)
class Verb:
    """What a word on the command line does.

    Attributes:
        function: `module:function`, imported when the verb is said.
        help: one line.
        config: its primary configuration, composed from the words; the function gets (cfg, words).
        settings: the class of `tuner.settings` that names the keys of `config`.
        texts: keys of `config` whose value is a person's text and is taken as it stands, commas and brackets included.
        takes: without a `config`, the names of the words the function gets; one in brackets may be left out.
        makes_folder: Hydra makes its run folder, and it may be swept.
        loads: it loads weights, so the commit of a `model.source` or `data.source` has to be known.
    """

    function: str
    help: str
    config: str | None = None
    settings: str = "Run"
    texts: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    makes_folder: bool = False
    loads: bool = True


FOLDERS = ("run", "adapter", "checkpoint")

VERBS = {
    "run": Verb("tuner.train:run", "one training run (the default verb); -m sweeps", "config", makes_folder=True),
    "ls": Verb(
        "tuner.verbs.ls:ls",
        "the config groups, or the options of one; or run folders and what became of them",
        takes=("[GROUP|runs]", "[DIR]"),
    ),
    "cp": Verb(
        "tuner.verbs.from_torchtune:copy_or_translate",
        "copy a config file to edit it, or translate one of torchtune's",
        takes=("[--from-torchtune]", "NAME", "DEST"),
    ),
    "validate": Verb(
        "tuner.verbs.validate:validate", "check a run without running it; its parameter counts", "config", loads=False
    ),
    "estimate": Verb(
        "tuner.verbs.estimate:estimate",
        "peak memory of a run by component, predicted without weights, data or a GPU",
        "config",
        loads=False,
    ),
    "data": Verb(
        "tuner.verbs.data:data",
        "the dataset as the model will see it: samples with trained tokens marked, lengths, totals",
        "config",
        loads=False,
    ),
    "generate": Verb(
        "tuner.verbs.generate:generate",
        "text from a model",
        "verb/generate",
        "Generate",
        ("prompt", "prompts", "system", *FOLDERS),
    ),
    "evaluate": Verb("tuner.verbs.evaluate:evaluate", "loss and perplexity", "verb/evaluate", "Evaluate", FOLDERS),
    "merge": Verb("tuner.verbs.merge:merge", "an adapter into its base", "verb/merge", "Merge", (*FOLDERS, "dest")),
    "export": Verb(
        "tuner.verbs.export:export",
        "an adapter, or the merged model, from any checkpoint of a run",
        "verb/export",
        "Export",
        ("run", "checkpoint", "dest"),
    ),
    "convert": Verb(
        "tuner.verbs.convert:convert",
        "GGUF, Meta's .pth or .bin weights into a Hugging Face folder",
        "verb/convert",
        "Convert",
        ("source", "dest"),
    ),
    "download": Verb(
        "tuner.verbs.download:download",
        "a model of the Hugging Face Hub into the cache",
        takes=("ORG/NAME", "[REVISION]"),
    ),
    "sync": Verb("tuner.verbs.sync:sync", "replay a run folder into MLflow", takes=("DIR",)),
}


def main() -> None:
    """The console script."""
    words = sys.argv[1:]
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    debug = "--debug" in words or os.environ.get("HYDRA_FULL_ERROR") == "1"
    sys.exit(reported(lambda: dispatch([word for word in words if word != "--debug"]), debug))


def dispatch(words: Sequence[str]) -> Any:
    """Call the verb that `words` begin with.

    Raises:
        TunerError: as the verb does; ConfigError for a word that is no verb.
    """
    said = words[0] if words else ""
    is_override = not said or "=" in said or said[0] in "-+~"
    name, rest = ("run", list(words)) if is_override else (said, list(words[1:]))
    _refuse_torchtunes(words)
    if name not in VERBS:
        raise ConfigError(f"{name}: no such verb; {nearest(name, VERBS)}")
    verb = VERBS[name]
    asks_help = any(word in ("-h", "--help") for word in rest)
    if asks_help and (is_override or verb.config is None):
        print(overview())
    if verb.config is not None:
        from tuner.config.application import Application

        command = _command(verb, name)
        application = Application(
            verb.config,
            verb.settings,
            command,
            makes_folder=verb.makes_folder,
            texts=verb.texts,
            pins=verb.loads,
        )
        return application.main(rest)
    return None if asks_help else _load(verb)(*_given(name, verb.takes, rest))


def _refuse_torchtunes(words: Sequence[str]) -> None:
    """Raise a ConfigError with our words for a command in torchtune's form, as `tune run RECIPE --config NAME`."""
    if all("=" in word and not word.startswith("--config=") for word in words):
        return
    from tuner.config.torchtune.commands import command_problems

    if problems := command_problems(words):
        raise ConfigError(problems)


def reported(call: Callable[[], Any], debug: bool) -> int:
    """The exit code of a call; prints the text it returns, or each of its texts as it comes, and what it raises.

    Args:
        call: the command.
        debug: print the traceback of a person's error too.
    """
    try:
        result = call()
        for text in (result,) if isinstance(result, str) else result if isinstance(result, Iterator) else ():
            print(text, flush=True)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except TunerError as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"{'' if isinstance(error, Interrupted) else 'error: '}{line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader has gone, as in `tuner ls | head -1`; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from tuner.out_of_memory import is_out_of_memory, what_was_asked

        if not is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"error: out of memory: {what_was_asked(error)}", file=sys.stderr)
        return TunerError.exit_code


def overview() -> str:
    """The verbs with a line each, for `--help`."""
    rows = {" ".join([name, *verb.takes]): verb.help for name, verb in VERBS.items()}
    width = max(map(len, rows))
    lines = [f"  {row.ljust(width)}  {text}" for row, text in rows.items()]
    return "\n".join(["tuner [VERB] [key=value ...]", "", "== Verbs ==", *lines, ""])


def _command(verb: Verb, name: str) -> Callable[[Any, list[str]], Any]:
    # Imported after the configuration is checked: a typo costs milliseconds and not an import of torch.
    return lambda config, words: _load(verb)(config, words)


def _load(verb: Verb) -> Callable[..., Any]:
    module, _, function = verb.function.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def _given(name: str, takes: tuple[str, ...], words: Sequence[str]) -> list[str]:
    """The words of a verb without a configuration, as many as it takes."""
    fewest = sum(not word.startswith("[") for word in takes)
    if not fewest <= len(words) <= len(takes):
        raise ConfigError(f"{name} takes {' '.join(takes)}; given: {' '.join(words) or 'nothing'}")
    return list(words)


if __name__ == "__main__":
    main()
