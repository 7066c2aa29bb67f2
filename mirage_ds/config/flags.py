"""Settings from command-line flags, made from pydantic models so that each is written down once, and from a YAML file.

Precedence: flags over YAML over defaults. An unknown key is an error in all three. `-` and `_` are alike in option
names and in choices (click's ``token_normalize_func``).
"""

import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from pydantic import BaseModel, ValidationError

from mirage_ds.config.names import hint, ours
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError, reason, shown

Model = TypeVar("Model", bound=BaseModel)

CONTEXT = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "max_content_width": 110,
    "help_option_names": ["-h", "--help"],
}


WORDS = f"{__name__}.words"


# First setting → the heading of its part of a run's help.
PARTS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("parts.yaml").read_text(encoding="utf-8"))


class Group(click.Group):
    """A command that has commands. Its help says the whole of each one's first sentence; alone, it shows its help.

    Attributes:
        sections: heading → the names of the commands below it; none where one heading is enough.
    """

    sections: Mapping[str, str] = {}
    # Groups in it are like it.
    group_class = type

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does."""
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings."""
        names = self.list_commands(ctx)
        found = {name: one for name in names if (one := self.get_command(ctx, name))}
        width = max(map(len, names))
        for heading, listed in (self.sections or {"Commands": " ".join(names)}).items():
            with formatter.section(heading):
                # The same width below every heading.
                rows = [(f"{name:{width}}", found[name].get_short_help_str(limit=1000)) for name in listed.split()]
                formatter.write_dl(rows)


class RunCommand(click.Command):
    """A command that takes a run's settings as flags: other trainers' names are answered with ours.

    Alone, it shows its help. Its words are kept as they are, for whoever passes them on: ctx.meta[WORDS].
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; UsageError where there is no such flag."""
        ctx.meta[WORDS] = tuple(args)
        try:
            return super().parse_args(ctx, args or ["--help"])
        except click.NoSuchOption as error:
            said = hint(error.option_name, {str(param.name) for param in self.params})
            raise click.UsageError(f"No such option: {error.option_name}{said or '; --help lists them'}", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of PARTS."""
        parts: dict[str, list[tuple[str, str]]] = {}
        part = ""
        for param in self.get_params(ctx):
            part = PARTS.get(str(param.name), part)
            parts.setdefault(part, []).extend(filter(None, [param.get_help_record(ctx)]))
        for heading, rows in parts.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """Translate a field's annotation to (click type, takes several values)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [_click_type(arg) for arg in args if arg is not type(None)]
        if all(isinstance(kind, click.Choice) for kind, _ in kinds):
            return click.Choice([choice for kind, _ in kinds for choice in kind.choices]), False
        return kinds[0][0], any(several for _, several in kinds)
    if origin is typing.Annotated:
        return _click_type(args[0])
    if origin is typing.Literal:
        return click.Choice([str(arg) for arg in args]), False
    if origin in (list, tuple):
        return _click_type(args[0])[0], True
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return click.Path(path_type=Path), False
    return (annotation if annotation in (int, float, bool, str) else str), False


def model_options(model: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a click command one option per field of `model`; an option left out arrives as None (or an empty tuple).

    Options that take several values are given several times, or once with commas between the values; paths, which may
    have commas in them, only several times.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(model.model_fields.items()):
            kind, several = _click_type(field.annotation)
            text = field.description or ""
            if field.is_required():
                text += "" if "[required" in text else " [required]"
            elif field.default not in (None, (), []):
                text += f" [default: {', '.join(map(str, d)) if isinstance(d := field.default, list) else d}]"
            # What is a denial by name (--no_latents) has no second one.
            denied = f"/--no_{name}" if kind is bool and not name.startswith("no_") else ""
            how: dict[str, Any] = {"type": kind, "is_flag": kind is bool}
            if isinstance(kind, click.Choice):
                # click would show them normalized, and the default as it is.
                how["metavar"] = f"[{'|'.join(kind.choices)}]"
            if several:
                how = {"multiple": True, "metavar": "PATH" if isinstance(kind, click.Path) else "A,B,…"}
            function = click.option(f"--{name}{denied}", name, default=None, help=text, **how)(function)
        return function

    return decorate


def build_model(
    model: type[Model], flags: Mapping[str, Any], yaml_values: Mapping[str, Any] | None = None, source: str = "the YAML"
) -> Model:
    """Make `model` from flags over YAML over defaults.

    Args:
        flags: option values as click gives them; None means "not given".
        yaml_values: the content of a YAML file, or None.
        source: how the YAML file is called in messages.

    Raises:
        UserError: an unknown key or a value that does not fit, named with the place it came from.
    """
    values: dict[str, Any] = {}
    for key, value in (yaml_values or {}).items():
        name = str(key).replace("-", "_")
        if name not in model.model_fields:
            # Known, but only where processes are started.
            ranks = model is RunConfig and "ranks" in (name, ours(name))
            said = "; give --ranks to `mirage-ds train`" if ranks else hint(name, model.model_fields)
            raise UserError(f"unknown key {shown(str(key))} in {source}{said}")
        kind = _click_type(model.model_fields[name].annotation)[0]
        if kind in (int, float) and isinstance(value, bool):
            raise UserError(f"'{name}' in {source} is {value}: a number is needed")
        if isinstance(kind, click.Choice) and isinstance(value, str):
            # "-" and "_" are alike, as in flags.
            spelt = {choice.replace("-", "_"): choice for choice in kind.choices}
            values[name] = spelt.get(value.replace("-", "_"), value)
        else:
            values[name] = value
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    for name, value in given.items():
        kind, several = _click_type(model.model_fields[name].annotation)
        values[name] = value
        if several:
            texts = value if isinstance(value, tuple) else (value,)
            parts = [part for text in texts for part in str(text).split(",") if part]
            values[name] = list(texts) if isinstance(kind, click.Path) else parts
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UserError(str(first["ctx"]["error"] if "ctx" in first else first["msg"])) from None
        name = str(first["loc"][0])
        where = f"--{name}" if name in given or name not in (yaml_values or {}) else f"'{name}' in {source}"
        reason = "is required" if first["type"] == "missing" else f"is {shown(first.get('input'))}: {first['msg']}"
        raise UserError(f"{where} {reason}") from None


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the settings of a run as options, and --config for a YAML file of them."""
    file = click.option(
        "--config", "yaml_file", type=click.Path(path_type=Path), help="YAML file of the same settings."
    )
    return model_options(RunConfig)(file(function))


def run_config(yaml_file: Path | None, flags: Mapping[str, Any], **beforehand: Any) -> RunConfig:
    """Make a run's settings of what run_options gave; `beforehand` are defaults that stand in for missing ones."""
    values = beforehand | (read_yaml(yaml_file) if yaml_file else {})
    return build_model(RunConfig, flags, values, source=str(yaml_file))


class _Loader(yaml.SafeLoader):
    """SafeLoader silently takes the last of two equal keys; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    said = f"key {shown(key.value)} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings; UserError when it is missing, broken or not a mapping."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file of settings")
        # _Loader is a SafeLoader.
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    # PyYAML raises all kinds at a scalar that is not what it looks like: `2001-99-99`, `!!int x`.
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); write `key: value` lines") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values
