"""The command line: one file a command, parsing only. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import copy
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

import luthier
from luthier.cli import chat, compress, data, doctor, evaluate, export, plan, quantize, runs, train
from luthier.errors import LuthierError, PreflightError
from luthier.units import visible

INTERNAL_ERROR = 1
INTERRUPTED = 130

app = typer.Typer(
    name="luthier",
    help="Fine-tune language models with LoRA on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luthier {luthier.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere on the line.")] = False,
) -> None:
    """--debug is heard by `run`, here and on every command; see `_accept_debug`."""


app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("export")(export.export)
app.command("quantize")(quantize.quantize)
app.command("compress")(compress.compress)
app.command("doctor")(doctor.doctor)
app.add_typer(runs.app, name="runs")
app.add_typer(data.app, name="data")


def _accept_debug(program: Any, hear: Callable[[Any, Any, bool], None]) -> None:
    """Let every command take the program's --debug, unlisted, so that it goes anywhere where no option's value stands."""
    (option,) = (one for one in program.params if "--debug" in one.opts)
    option.callback, option.expose_value, option.is_eager = hear, False, True
    hidden = copy.copy(option)
    hidden.hidden = True
    below = list(program.commands.values())
    while below:
        command = below.pop()
        command.params.append(hidden)
        below += getattr(command, "commands", {}).values()


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM unwinds the program, so that what is half written is removed as by Ctrl-C; the exit code is 143."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # which no signal reaches
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_output() -> None:
    """Where nobody takes the output, the flush at exit must not complain about it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fault(error: Exception) -> str:
    fault = f"{type(error).__name__}: {error}"
    return f"this is a fault in luthier, not yours: {fault}. Run again with --debug and report what it shows."


def _of_the_system(error: OSError) -> tuple[int, str, BaseException]:
    """Exit code and message for what the system refused: a full disk is nobody's fault, all else is ours."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return INTERNAL_ERROR, _fault(error), error
    if error.filename is None:  # a write says neither which file nor whether it was the output
        with suppress(OSError):
            sys.stdout.flush()
        _drop_output()
    where = error.filename or "the output or a file"
    return PreflightError.exit_code, f"what is written needs room on the disk; {where}: {error.strerror}. Free some.", error


def run(arguments: list[str] | None = None) -> None:
    """Entry point of the `luthier` command. Ends the process with the exit code that fits what happened.

    0 done, 2 usage or configuration, 3 will not fit or failed preflight, 4 data, 5 numeric, 6 a guarded set got worse than
    its bound allows, 130 interrupted, 143 ended by SIGTERM;
    1 only for a fault of Luthier's own.
    """
    debug = os.environ.get("LUTHIER_DEBUG", "") not in ("", "0")

    def hear_debug(_context: Any, _option: Any, given: bool) -> None:
        nonlocal debug
        debug = debug or given

    if isinstance(sys.stdout, io.TextIOWrapper):  # what an output's encoding has no characters for is written out
        sys.stdout.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    _accept_debug(command, hear_debug)
    caught: BaseException
    try:
        with _leaving_on_sigterm():
            command(sys.argv[1:] if arguments is None else arguments, prog_name="luthier")
    except LuthierError as error:
        code, message, caught = error.exit_code, str(error), error
    except KeyboardInterrupt as error:
        code, message, caught = INTERRUPTED, "interrupted", error
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        code, message, caught = INTERRUPTED, "interrupted", stop  # typer makes this of Ctrl-C, without a word
    except BrokenPipeError:
        _drop_output()
        sys.exit(INTERNAL_ERROR)
    except OSError as error:
        code, message, caught = _of_the_system(error)
    except Exception as error:  # noqa: BLE001 - the edge of the program: a fault of ours still ends in one message
        code, caught = INTERNAL_ERROR, error
        message = _fault(error)
    else:
        return
    if debug:
        traceback.print_exception(caught)
    typer.echo(f"error: {visible(message, lines=True)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    run()
