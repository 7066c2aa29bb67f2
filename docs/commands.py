"""mkdocs hook: the page of all commands and flags, made from the command line itself when the site is built."""

from __future__ import annotations

import html
import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

import click

PAGE, PLACE = "commands.md", "<!-- commands -->"
# As the commands have them; click remembers those of the first context.
HELP = ["-h", "--help"]
# The settings of training stand once, under this heading; other commands that take them lead to it.
TRAIN = "Training"
# Of a command's own texts: what would be markup. Words with _ inside are none.
MARKUP = re.compile(r"[\\`*\[\]|]")


def escaped(text: str) -> str:
    """Write a text so that Markdown shows it as it is."""
    return MARKUP.sub(lambda met: f"\\{met[0]}", html.escape(text, quote=False))


def paragraphs(text: str | None) -> Iterator[str]:
    """Yield the paragraphs of a command's help, each on one line."""
    for part in inspect.cleandoc(text or "").replace("\b", "").split("\n\n"):
        yield escaped(" ".join(part.split()))


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield a command and, behind it, all below it that are not hidden."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from walk(below, click.Context(below, context, info_name=name))


def records(command: click.Command, context: click.Context) -> dict[str, str]:
    """Return a command's options as `--help` has them: how each is written, and what it says."""
    rows = [one.get_help_record(context) for one in command.params if isinstance(one, click.Option)]
    return dict(row for row in rows if row is not None)


def described(title: str, command: click.Command, context: click.Context, known: dict[str, str]) -> Iterator[str]:
    """Write one command in Markdown: usage, what it does, its flags; those of training, `known`, are not repeated."""
    yield f"{'##' if len(context.command_path.split()) < 3 or title == TRAIN else '###'} {title}\n"
    if not isinstance(command, click.Group):
        usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
        yield f"``` {{ .text .no-copy }}\n{usage}\n```\n"
    yield from (f"{text}\n" for text in paragraphs(command.help))
    own = records(command, context)
    if known and known.keys() <= own.keys():
        own = {flag: text for flag, text in own.items() if flag not in known}
        yield f"It takes all flags of [training](#{TRAIN.lower()})" + (", and these:\n" if own else ".\n")
    for flag, text in own.items():
        # A definition list; the flag may break before each of its parts.
        yield f"`` {flag} ``\n:   {escaped(text) or '&nbsp;'}\n"


def pages() -> Iterator[str]:
    """Write the page's body: training first, then every command of `mirage-ds`."""
    # The page says the same on every machine.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from mirage_ds.cli import cli
    from mirage_ds.config.flags import model_options
    from mirage_ds.config.run import RunConfig
    from mirage_ds.train import command as train

    context = click.Context(train, info_name="deepspeed --module mirage_ds.train", help_option_names=HELP)
    yield from described(TRAIN, train, context, {})
    settings = model_options(RunConfig)(click.Command("settings"))
    known = records(settings, click.Context(settings, help_option_names=HELP))
    for command, below in walk(cli, click.Context(cli, info_name="mirage-ds", help_option_names=HELP)):
        yield from described(f"`{below.command_path}`", command, below, known)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands into their page."""
    return markdown.replace(PLACE, "\n".join(pages())) if page.file.src_uri == PAGE else markdown
