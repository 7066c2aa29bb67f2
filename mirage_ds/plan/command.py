"""`mirage-ds plan`, the command."""

import sys
from typing import Any

import click

from mirage_ds.config.flags import build_model, model_options
from mirage_ds.plan.spec import PlanSpec

# Of a JSON given by --deepspeed; 2 is a user's mistake.
EXIT_DOES_NOT_FIT = 1


@click.command("plan")
@model_options(PlanSpec)
@click.option("--card", hidden=True, help="What --gpu was called before.")
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object alone, in bytes and seconds.")
def plan(wants_json: bool, card: str | None, **flags: Any) -> None:
    """Compute what fits into memory and how long it takes.

    It says which DeepSpeed JSON to take and what bounds a step, from the model's config.json alone; nothing is
    downloaded or measured, and no weights are read. Exit code 0 also where none of the shipped JSONs fits; 1 where the
    one given by --deepspeed does not.
    """
    from mirage_ds.plan.fit import Question, advice, rank
    from mirage_ds.plan.report import as_json, print_tables

    spec = build_model(PlanSpec, flags | {"gpu": flags["gpu"] or card})
    asked = Question(spec)
    plans = rank(asked)
    fits = plans[0].problem is None
    said = [] if fits else advice(asked)
    if wants_json:
        click.echo(as_json(asked, plans, said))
    else:
        print_tables(asked, plans, said)
    if spec.deepspeed is not None and not fits:
        sys.exit(EXIT_DOES_NOT_FIT)
