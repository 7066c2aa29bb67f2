"""Rows as others have them, as a record's own keys: one reader for training, for import and for every other command.

    messages        conversations, also as `conversations` or `conversation`, with content items or texts
    pairs           query / response (ms-swift), instruction / input / output (Alpaca), prompt / completion (TRL)
    own columns     question, answer, image and helper under names that are given (--columns) or obvious

In their texts an `<image>` is the next of the row's `images`; an item of a message, and ms-swift's `<img>PATH</img>`,
may name a picture of its own. A picture in the last answer is its helper image, and so are those of a column of
helpers, which stand where `<output_image>` does (without it, first). What a record cannot hold is refused. Imports
nothing heavy.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from mirage_ds.config.columns import RECOGNISED, Columns, Layout
from mirage_ds.data import messages
from mirage_ds.data.messages import (
    FIELDS,
    HELPER_MARK,
    IMAGE_MARK,
    REGION,
    TURNS_BEFORE,
    MessageError,
    expect,
    is_absent,
)
from mirage_ds.errors import shown

Row = Mapping[str, Any]
Roles = list[tuple[str, str]]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CONVERSATIONS = ("messages", "conversations", "conversation")
# Each layout's question and answer as plain texts.
PAIRS: dict[Layout | None, tuple[tuple[str, str], ...]] = {
    "swift": (("query", "response"), ("instruction", "output")),
    "llama-factory": (("instruction", "output"),),
    "trl": (("prompt", "completion"),),
    None: (("query", "response"), ("instruction", "output"), ("prompt", "completion")),
}
# Obvious names of columns, as _plain makes them.
OBVIOUS = {
    "question": "question query prompt instruction problem input",
    "answer": "answer response completion output solution target reply",
    "image": "image img picture photo input_image image_input question_image",
    "helper": "helper helper_image helper_img image_output output_image aux_image auxiliary_image intermediate_image "
    "reasoning_image latent_image annotated_image",
}
# Text that stands for something else in those trainers.
_STANDS_FOR = re.compile(
    r"<(?:video|audio|bbox|ref-object|cot-process)>|<\|(?:vision|image|video|audio|box|quad|object_ref)_\w+\|>"
)
_PICTURE = re.compile(rf"{IMAGE_MARK}|{HELPER_MARK}|<img>(.+?)</img>")
_PICTURE_KEYS = ("bytes", "base64", "image", "path", "url", "image_url")
# As `datasets`' image folder calls the column of paths: file_name is the image, helper_file_name the helper.
_FILE_NAME = re.compile(r"_?file_?names?$")
_TAIL = re.compile(r"_(paths?|files?|urls?|bytes)$|s$")
_SPEAKER, _CONTENT = ("role", "from"), ("content", "value")


class ColumnError(MessageError):
    """It cannot be known which column is meant."""


class _Turn(NamedTuple):
    """A message as one text with marks.

    Attributes:
        pictures: for each mark its own picture, None for the next of the row's, HELPER_MARK for the next helper if any.
    """

    where: str
    role: str
    text: str
    pictures: list[Any]
    learnt: bool = True


def _turn(where: str, role: str, content: Any, learnt: bool = True) -> _Turn:
    """Read a message's content; MessageError where it holds what a record cannot."""
    pictures: list[Any] = []
    mark = HELPER_MARK if role == "assistant" else IMAGE_MARK

    def marked(text: str) -> str:
        def picture(match: re.Match[str]) -> str:
            if match[0] == HELPER_MARK and role != "assistant":
                raise MessageError(where, f"a {role} message holds {HELPER_MARK}", "only the last answer holds latents")
            pictures.append(match[0] if match[0] == HELPER_MARK else match[1] and match[1].strip())
            return mark

        return _PICTURE.sub(picture, text)

    def part(item: Any) -> str:
        if not isinstance(item, Mapping):
            raise MessageError(where, f"no item {shown(item)}", "there are text, image and latent items")
        named = [key for key in ("text", *_PICTURE_KEYS) if not is_absent(item.get(key))]
        kind = item.get("type") or next(iter(named), None)
        if kind in ("text", "input_text", "output_text"):
            messages.check_keys(item, ("type", "text"), where)
            return marked(expect(item.get("text"), str, where))
        if kind == "latent" and role != "assistant":
            raise MessageError(where, f"a {role} message holds latents", "only the answer may hold them")
        if kind in ("latent", "input_image", *_PICTURE_KEYS):
            messages.check_keys(item, ("type", "detail", *_PICTURE_KEYS), where)
            pictures.append(picture_of(item, where) if named else HELPER_MARK if kind == "latent" else None)
            return mark
        raise MessageError(where, f"no item {shown(item)}", "there are text, image and latent items")

    if not isinstance(content, (str, list)):
        raise MessageError(where, f"its content is {shown(content)}", "write a text or a list of items")
    text = marked(content) if isinstance(content, str) else "".join(part(item) for item in content)
    return _Turn(where, role, text, pictures, learnt)


def _taken(row: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Take a value out of a row; MessageError where it is of another type."""
    return expect(row.pop(key, default), kind, key)


def _messages(row: dict[str, Any], key: str) -> Iterator[_Turn]:
    for number, one in enumerate(_taken(row, key, list), 1):
        where = f"{key} {number}"
        if isinstance(one, Mapping) and one.keys() >= {"human", "assistant"}:
            messages.check_keys(one, ("human", "assistant"), where)
            yield from (_turn(where, "user", one["human"]), _turn(where, "assistant", one["assistant"]))
            continue
        role = _either(one, _SPEAKER) if isinstance(one, Mapping) else None
        if role not in ROLES:
            how = f"write role ({', '.join(ROLES)}) and content; tools and their answers cannot be carried over"
            raise MessageError(where, f"expected a message, found {shown(one)}", how)
        learnt = messages.is_learnt(one, (*_SPEAKER, *_CONTENT), where)
        yield _turn(where, ROLES[role], _either(one, _CONTENT), learnt)


def _either(one: Row, keys: tuple[str, ...]) -> Any:
    return next((one[key] for key in keys if one.get(key) is not None), None)


def _pair(row: dict[str, Any], question: str, answer: str) -> Iterator[_Turn]:
    """Read a question and its answer, if it has one, with the rounds before it."""
    for number, pair in enumerate(_taken(row, "history", list, []), 1):
        where = f"history {number}"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise MessageError(where, f"found {shown(pair)}", "write a question and its answer")
        yield from (_turn(where, "user", pair[0]), _turn(where, "assistant", pair[1]))
    texts = [_taken(row, question, str, "" if question == "instruction" and "input" in row else None)]
    if question == "instruction":
        texts.append(_taken(row, "input", str, ""))
    yield _turn(question, "user", "\n".join(text for text in texts if text))
    if answer:
        yield _turn(answer, "assistant", _taken(row, answer, str))


@lru_cache(4096)
def _plain(name: str) -> str:
    """Return a column's name without case, a plural, and what says that it holds a path: `Image path` is image."""
    name = re.sub(r"[\s-]+", "_", name.strip().lower())
    return _TAIL.sub("", _TAIL.sub("", _FILE_NAME.sub("", name) or "image"))


def _guess(role: str, names: Iterable[str]) -> str:
    """Return the column whose name is obvious for a role, or an empty text; ColumnError where several are."""
    found = [name for name in names if _plain(name) in OBVIOUS[role].split()]
    if len(found) > 1:
        raise ColumnError(role, f"may be {' or '.join(found)}", f"say which by --columns {role}={found[0]}")
    return found[0] if found else ""


def _own_pair(row: dict[str, Any], names: tuple[str, ...], columns: Columns, answers: bool) -> tuple[str, str]:
    """Return the columns of question and answer, named or obvious; numbers become texts, the only change to a value.

    Raises:
        MessageError: one is missing, or it cannot be known which it is.
    """
    question = columns.question or _guess("question", names)
    answer = columns.answer or _guess("answer", (name for name in names if name != question))
    for role, name in (("question", question), ("answer", answer)):
        if name not in row and (answers or role == "question"):
            # Rows of preferences have no answer either.
            messages.refuse_row(row)
            if name:
                raise MessageError(role, f"{name} is missing or empty", "fill it, or leave the row out")
            what = f"missing (the row has {shown(list(names)[:8])})"
            raise MessageError(role, what, f"give --columns {role}=COLUMN")
        if isinstance(row.get(name), (int, float)) and not isinstance(row[name], bool):
            row[name] = str(row[name])
    return question, answer if answer in row else ""


def _form(row: dict[str, Any], names: tuple[str, ...], columns: Columns) -> tuple[str, ...]:
    """Return where a row has its conversation: one key, or question and answer; nothing for columns of the user's own.

    Raises:
        MessageError: it has two.
    """
    if columns.messages:
        return (columns.messages,)
    asked, answered = columns.question or "prompt", columns.answer or "completion"
    prompted = isinstance(row.get(asked), list) and columns.layout in (None, "trl")
    if columns.question or columns.answer or (prompted and columns.layout):
        return (asked, answered) if prompted else ()
    found: list[tuple[str, ...]] = [(asked, answered)] if prompted else []
    found += [(key,) for key in CONVERSATIONS if key in row]
    if not found:
        # An instruction may be empty where there is an input.
        there = {*row, *(("instruction",) if "instruction" in names and "input" in row else ())}
        enough = any if columns.layout else all
        found += [pair for pair in PAIRS[columns.layout] if enough(name in there for name in pair)]
    if len(found) > 1:
        first, second = (next(name for name in form if name in names) for form in found[:2])
        how = f"a row has one conversation; name it: --columns messages={second}, or question=… and answer=…"
        raise MessageError(first, f"stands beside {second}", how)
    if not found and columns.layout:
        return PAIRS[columns.layout][0]
    return found[0] if found else ()


def _turns(
    row: dict[str, Any], names: tuple[str, ...], form: tuple[str, ...], columns: Columns, answers: bool
) -> list[_Turn]:
    """Take the conversation out of a row."""
    system = [_turn("system", "system", _taken(row, "system", str))] if "system" in row else []
    if not form:
        return [*system, *_pair(row, *_own_pair(row, names, columns, answers))]
    if len(form) == 1 or isinstance(row.get(form[0]), list):
        keys = [key for key in form if answers or key in row]
        return [*system, *(turn for key in keys for turn in _messages(row, key))]
    return [*system, *_pair(row, *form)]


def picture_of(value: Any, where: str) -> str | dict[str, Any]:
    """Return a picture as its path or as {"bytes": content}: of an item, or as `datasets` has it.

    Raises:
        MessageError: it is neither.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bytes) and value:
        return {"bytes": value}
    if isinstance(value, Mapping):
        content = _either(value, ("bytes", "base64"))
        if content is not None:
            return {"bytes": content}
        inner = _either(value, _PICTURE_KEYS)
        if inner is not None:
            return picture_of(inner, where)
    raise MessageError(where, f"no picture {shown(value)}", "write its path")


def images_of(row: dict[str, Any], names: Iterable[str]) -> list[Any]:
    """Take the pictures under some keys out of a row."""
    found = []
    for name in names:
        value = row.pop(name, [])
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            # A list in a table of texts.
            with suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
        found += [picture_of(one, name) for one in (value if isinstance(value, list) else [value])]
    return found


def _placed(turns: list[_Turn], images: list[Any], helpers: list[Any]) -> tuple[list[str], list[Any], list[Any]]:
    """Return the texts with their marks, and the pictures in the order of the marks: questions', answer's."""
    texts, asked = [turn.text for turn in turns], turns[:-1]
    marked = any(turn.pictures for turn in asked)
    wanted = [picture for turn in turns for picture in turn.pictures].count(None)
    lead = len(images) - wanted
    if lead < 0 or (marked and lead):
        what = f"{wanted} {IMAGE_MARK} mark(s) without a picture of their own for {len(images)} image(s)"
        raise MessageError("images", what, "write one mark for each image, or none (images then stand first)")
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    if lead and first < len(turns) - 2:
        # Without marks those trainers show them first of all; a record would show them with its last question.
        texts[first] = IMAGE_MARK * lead + texts[first]
    rest, waiting = iter(images[lead:]), iter(helpers)
    seen = [next(rest) if one is None else one for turn in asked for one in turn.pictures]
    drawn = [next(rest) if one is None else one for one in turns[-1].pictures]
    drawn = [next(waiting, one) if one == HELPER_MARK else one for one in drawn]
    return texts, images[:lead] + seen, [one for one in [*drawn, *waiting] if one != HELPER_MARK]


def _read(row: Row, columns: Columns, answers: bool) -> tuple[dict[str, Any], Roles]:
    """Return a record's keys, and (role, column) of what was read; no role where a column's pictures are not."""
    names = tuple(row)
    left = {key: value for key, value in row.items() if not is_absent(value)}
    form = _form(left, names, columns)
    shown_under = [name for name in ("image", "images") if name in left and form]
    if len(shown_under) > 1 and not columns.image:
        raise MessageError("image", "stands beside images", "write all pictures of the row under images")
    own = {"image": columns.image or tuple(shown_under), "helper": columns.helper}
    pictures = {role: images_of(left, columns_of) for role, columns_of in own.items()}
    if form and answers:
        messages.refuse_row(left)
    turns = _turns(left, names, form, columns, answers)
    if not answers and turns[-1].role == "user":
        turns.append(_Turn("", "assistant", "", []))
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        what = "they do not end with a question and its answer"
        raise MessageError(form[0] if form else "history", what, "leave the row out")
    if answers and not turns[-1].learnt:
        how = "end with one that is, or leave the row out"
        raise MessageError(turns[-1].where, "its answer is marked as not to be learnt", how)
    for turn in turns if form else ():
        if found := _STANDS_FOR.search(turn.text):
            how = "write it out, or leave the row out"
            raise MessageError(turn.where, f"{shown(found[0])} would be plain text here", how)
    # What a message shows itself needs no column, and another one is the user's own matter.
    for role, part in (("image", turns[:-1]), ("helper", turns[-1:])):
        if not own[role] and all(one in (None, HELPER_MARK) for turn in part for one in turn.pictures):
            own[role] = tuple(filter(None, [_guess(role, left)]))
            pictures[role] = images_of(left, own[role])
    texts, seen, drawn = _placed(turns, pictures["image"], pictures["helper"])
    used = (*seen, *drawn)
    unread = [name for name in left if any(one not in used for one in messages.unread_pictures(left[name], True))]
    if columns.image or columns.helper or any(any(turn.pictures) for turn in turns):
        left = {name: value for name, value in left.items() if not any(messages.unread_pictures(value, False))}
    else:
        messages.need_read(left, paths=not seen and not drawn)
    lost = next((name for name in (*FIELDS, TURNS_BEFORE) if name in left), None)
    if lost:
        raise MessageError(lost, "is a key of a record", "a row has one layout; leave it out, or rename it")
    before = [{"role": turn.role, "content": text} for turn, text in zip(turns[:-2], texts[:-2], strict=True)]
    made = {
        **{"text_input": texts[-2], "text_output": texts[-1]},
        **({"image_input": seen} if seen else {}),
        **({"image_output": drawn} if drawn else {}),
        **({TURNS_BEFORE: messages.check_turns(before, form[0] if form else TURNS_BEFORE)} if before else {}),
        **left,
    }
    pair = form or (turns[-2].where, turns[-1].where)
    named = [("messages", form[0])] if len(form) == 1 else [*zip(("question", "answer"), pair, strict=True)]
    named += [(role, name) for role, names in own.items() for name in names]
    return made, [*((role, name) for role, name in named if name), *(("", name) for name in unread)]


def read_row(row: Row, columns: Columns = RECOGNISED, answers: bool = True) -> tuple[dict[str, Any], Roles]:
    """Turn a row into a record's keys; its images are paths or contents. A record's own keys stay as they are.

    Args:
        columns: the names that are given; what is not given is recognised.
        answers: whether it must have an answer.

    Returns:
        The keys, and (role, column) of what they are read from, "" for pictures that are not; nothing for a record.

    Raises:
        MessageError: it has no layout, no answer, or something that a record cannot hold.
    """
    asked, wanted = columns.question or columns.messages, {name for _, name in columns.named} - row.keys()
    # Blanks around a name are hard to see.
    row = {name.strip() if name.strip() in wanted else name: value for name, value in row.items()} if wanted else row
    if columns.region and columns.region in row:
        row = {**{name: value for name, value in row.items() if name != columns.region}, REGION: row[columns.region]}
    # A record may stand beside rows whose question is named: what is named is not its own.
    asks = "text_input" not in row or not is_absent(row.get(asked))
    chosen = columns.layout or (asks and asked not in ("", "text_input"))
    bare = "text_output" in row and not any(name in row for name in CONVERSATIONS)
    if chosen or not ("text_input" in row or bare):
        return _read(row, columns, answers)
    made, given = dict(row), columns.named
    for role, field in zip(Columns._fields, FIELDS, strict=False) if given else ():
        named = [name for own, name in given if own == role and name != field and not is_absent(made.get(name))]
        if named and not is_absent(made.get(field)):
            raise MessageError(field, f"stands beside {named[0]}", f"a record has one; leave {role}= out of --columns")
        if named:
            found = [made.pop(name) for name in named]
            made[field] = found[0] if len(found) == 1 else found
    return made, []
