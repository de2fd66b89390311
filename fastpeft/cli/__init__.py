"""The command line: fastpeft train | study | evaluate | predict | merge | serve | inspect | plan | tune | demo.

Progress and messages go to standard error; the last line on standard output is one JSON object of results.
Exit codes: 0 done; 1 some runs of a study failed, a fault of the program, or a process of several that was lost; 2 bad input,
with one line `error: ...` on standard error and nothing written; 130 interrupted.
A command's module is imported when it runs, so `fastpeft --help` needs neither torch nor transformers.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from typing import Any, TextIO

from fastpeft import __version__
from fastpeft.cli.launch import ProcessError, run_in_processes, wanted

COMMANDS = {
    "train": "fine-tune a model on your rows; writes an adapter, metrics and a report",
    "study": "methods x options x seeds on one data set, compared with statistics",
    "evaluate": "metrics of an adapter on labelled rows",
    "predict": "labels or responses of an adapter for new rows or texts",
    "merge": "adapter + base model -> one plain transformers model",
    "serve": "many adapters on one base model over HTTP, requests for different ones in one batch",
    "inspect": "what an adapter holds, or what a config would train in a model",
    "plan": "peak memory of a training step, what it is made of, and which GPUs it fits",
    "tune": "measure on this machine which algorithms are fastest for a model's linears",
    "demo": "a complete example: data, training, metrics, report",
}
EXTRAS = {"serve": "serve"}
"""The extra of pyproject.toml that a command needs; "demo" has what every other one does."""
INPUT_ERRORS = (ValueError, TypeError, OSError, NotImplementedError)
"""What bad input raises; anything else is a fault of the program and shows its traceback."""

USAGE = """usage: fastpeft COMMAND [OPTIONS]

Parameter-efficient fine-tuning.

commands:
{commands}

options:
  -h, --help   show this message, or with a command its options
  --version    show the version
  --debug      show the traceback of an error

The last line on standard output is one JSON object of results.
Example: fastpeft train --model MODEL --data reviews.csv --output-dir out --r 16 --lora-alpha 32
--method NAME of train and inspect chooses another method; fastpeft train --method ia3 --help shows its options."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastpeft {__version__}")
        return 0
    command, options = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise ValueError(f"fastpeft: expected a command, one of {list(COMMANDS)}, got {command!r}")
        result = run_command(command, options)
    except ProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except INPUT_ERRORS as error:
        return _fail(error, debug)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(command, "demo")
        missing = ValueError(
            f"fastpeft {command} needs {error.name}, which is not installed: pip install 'fastpeft[{extra}]'"
        )
        return _fail(missing.with_traceback(error.__traceback__), debug)
    except KeyboardInterrupt:
        print(
            "interrupted; train goes on from its last checkpoint with --resume, predict from the end of --output, "
            "a study by itself",
            file=sys.stderr,
        )
        return 130
    if result is None:
        return 0
    print(json.dumps(result, ensure_ascii=False))
    return 1 if result.get("failed") else 0


def run_command(command: str, options: list[str]) -> dict | None:
    """Parse the options of a command and run it, with everything it prints on standard error.

    Of several processes only rank 0 shows anything and has a result; with --nproc this one starts them.
    """
    module = importlib.import_module(f"fastpeft.cli.{command}")
    config = _parse(module.CONFIG, command, options)
    if wanted(config):
        return run_in_processes(command, options, config.nproc)
    is_main = int(os.environ.get("RANK", 0)) == 0
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        results, shown = (sys.stdout, sys.stderr) if is_main else (nowhere, nowhere)
        stack.enter_context(contextlib.redirect_stdout(shown))
        stack.enter_context(_quiet_libraries(shown))
        result = module.run(config, results)
    return result if is_main else None


def _parse(kind: type, command: str, options: list[str]) -> Any:
    """The config of a command. tyro shows unknown or missing options in its own way and exits with code 2.

    What a config's __post_init__ refuses comes out as the error it raised, not in tyro's frame.
    """
    import tyro

    from fastpeft.cli import method_options

    method = method_options.chosen_method(options) if method_options.takes_method(kind) else None
    parsed = kind if method is None else method_options.with_method(kind, method)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            found = tyro.cli(parsed, prog=f"fastpeft {command}", args=options, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        refused = _refused_by_config(stop)
        if refused is not None:
            raise refused from None
        sys.stderr.write(shown.getvalue())
        raise
    return found if method is None else method_options.plain(found, kind, method)


def _refused_by_config(error: BaseException) -> BaseException | None:
    """The error among the causes of `error` that a __post_init__ raised, or None."""
    cause = error.__context__
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        if isinstance(cause, INPUT_ERRORS) and any(frame.name == "__post_init__" for frame in frames):
            return cause
        cause = cause.__context__
    return None


@contextlib.contextmanager
def _quiet_libraries(shown: TextIO):
    """Warnings of this package as plain lines in `shown`, and transformers' notices about new heads and such left out."""
    import warnings

    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=shown)
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


def _fail(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 2
