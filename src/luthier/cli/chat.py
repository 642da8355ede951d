"""`luthier chat`: a conversation on the terminal, or one answer with --prompt."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import flags
from luthier.cli.evaluate import Adapter, Target, parse_storage, show_notes
from luthier.errors import ConfigError, DataError
from luthier.units import visible

if TYPE_CHECKING:
    from luthier.evaluation.conversation import Conversation

HELP = "Type a message. Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves."


def chat(
    target: Target,
    adapter: Adapter = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Print one answer and end.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample from so many likeliest tokens; 0 for all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.0, help="Above 1, tokens that came before become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Fixes the sampling.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", min=1, help="Longest answer.")] = 512,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="FILE", help="Every answer is one of these, one a line.", show_default=False),
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema", metavar="FILE", help="Every answer is JSON of this schema (extra constrain).", show_default=False
        ),
    ] = None,
    base: flags.Base = None,
    offline: flags.Offline = False,
) -> None:
    """Talk to a run's tuned model, or to any model, with answers shown as they are made."""
    storage = parse_storage(base)
    if labels is not None and json_schema is not None:
        raise ConfigError("one constraint at a time; got --labels and --json-schema. Leave one out.")

    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with progress_display() as progress:
        from luthier.evaluation.constrain import check_files, read_constraint
        from luthier.evaluation.conversation import Conversation
        from luthier.generation import Sampling
        from luthier.training.load_run import load_target

        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
        check_files(labels=labels, json_schema=json_schema)
        loaded = load_target(target, adapter=adapter, base=storage, offline=offline, progress=progress)
    show_notes(loaded.notes)
    conversation = Conversation(
        loaded.model, loaded.tokenizer, system=system, sampling=sampling,
        constraint=read_constraint(loaded.tokenizer, labels=labels, json_schema=json_schema), max_new_tokens=max_tokens,
    )  # fmt: skip
    if prompt is not None:
        _answer(conversation, prompt)
    else:
        _converse(conversation)


def _answer(conversation: Conversation, message: str) -> None:
    """Print an answer as it comes, its line ended even where it is cut short.

    On a terminal control characters are shown, not obeyed: what a model says must not be able to move the cursor.
    """
    terminal = sys.stdout.isatty()
    try:
        for piece in conversation.ask(message):
            sys.stdout.write(visible(piece, lines=True) if terminal else piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _converse(conversation: Conversation) -> None:
    if not conversation.remembers:
        typer.echo("note: this model has no chat template: each message is answered by itself.", err=True)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text are refused as a message, not as a fault
        sys.stdin.reconfigure(errors="surrogateescape")
    if interactive:
        typer.echo(HELP, err=True)
    while True:
        if interactive:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        message = line.strip()
        if not line or message == "/exit":
            return
        if message == "/reset":
            conversation.reset()
        elif message:
            _answer_and_go_on(conversation, message)


def _answer_and_go_on(conversation: Conversation, message: str) -> None:
    """Ctrl-C stops the answer, and a message that cannot be one is said; neither ends the conversation."""
    try:
        _answer(conversation, message)
    except KeyboardInterrupt:
        typer.echo("stopped; Ctrl-C again leaves.", err=True)
    except DataError as error:
        typer.echo(f"error: {error}", err=True)
