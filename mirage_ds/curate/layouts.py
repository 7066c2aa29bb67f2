"""Conversations in the layouts of other trainers, as records: `mirage-ds data import LAYOUT SOURCE`.

    swift           ms-swift: messages or conversations, query / response / history, or instruction / input / output
    llama-factory   conversations (sharegpt) or messages, or instruction / input / output / history
    trl             messages, or prompt and completion, with content items or texts

In their texts an `<image>` is the next of the row's `images`; an item of a message, and ms-swift's `<img>PATH</img>`,
may name a picture of its own. None of them has helper images: those are taken from a key of the row, and stand where
`<output_image>` does in the answer (without it, first). What a record cannot hold is refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from mirage_ds.data.messages import (
    FIELDS,
    IMAGE_MARK,
    TURNS_BEFORE,
    MessageError,
    check_keys,
    check_turns,
    is_absent,
    is_learnt,
    not_learnt,
    refuse_row,
)
from mirage_ds.errors import shown

Layout = Literal["swift", "llama-factory", "trl"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Row = Mapping[str, Any]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Each layout's question and answer as plain texts.
PAIRS: dict[Layout, tuple[tuple[str, str], ...]] = {
    "swift": (("query", "response"), ("instruction", "output")),
    "llama-factory": (("instruction", "output"),),
    "trl": (("prompt", "completion"),),
}
# Text that stands for something else in those trainers.
_STANDS_FOR = re.compile(
    r"<(?:video|audio|bbox|ref-object|cot-process)>|<\|(?:vision|image|video|audio|box|quad|object_ref)_\w+\|>"
)
_PICTURE = re.compile(rf"{IMAGE_MARK}|<img>(.+?)</img>")
_PICTURE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.I)
_PICTURE_KEYS = ("bytes", "base64", "image", "path", "url", "image_url")
_SPEAKER, _CONTENT = ("role", "from"), ("content", "value")


class _Turn(NamedTuple):
    """A message as one text with marks.

    Attributes:
        pictures: for each mark its own picture, or None for the next of the row's.
    """

    where: str
    role: str
    text: str
    pictures: list[Any]
    learnt: bool = True


def _turn(where: str, role: str, content: Any, learnt: bool = True) -> _Turn:
    """Read a message's content; MessageError where it holds what a record cannot."""
    pictures: list[Any] = []

    def marked(text: str) -> str:
        def picture(match: re.Match[str]) -> str:
            pictures.append(match[1] and match[1].strip())
            return IMAGE_MARK

        return _PICTURE.sub(picture, text)

    def part(item: Any) -> str:
        if not isinstance(item, Mapping):
            raise MessageError(where, f"no item {shown(item)}", "there are text and image items")
        named = [key for key in ("text", *_PICTURE_KEYS) if not is_absent(item.get(key))]
        kind = item.get("type") or next(iter(named), None)
        if kind in ("text", "input_text", "output_text"):
            check_keys(item, ("type", "text"), where)
            if not isinstance(item.get("text"), str):
                raise MessageError(where, f"expected a string, found {shown(item.get('text'))}", "write it as a string")
            return marked(item["text"])
        if kind in ("input_image", *_PICTURE_KEYS):
            check_keys(item, ("type", "detail", *_PICTURE_KEYS), where)
            pictures.append(picture_of(item, where) if named else None)
            return IMAGE_MARK
        raise MessageError(where, f"no item {shown(item)}", "there are text and image items")

    if not isinstance(content, (str, list)):
        raise MessageError(where, f"its content is {shown(content)}", "write a text or a list of items")
    text = marked(content) if isinstance(content, str) else "".join(part(item) for item in content)
    found = _STANDS_FOR.search(text)
    if found:
        raise MessageError(where, f"{shown(found[0])} would be plain text here", "write it out, or leave the row out")
    if pictures and role == "assistant":
        how = "only the user shows images; a helper stands there as <output_image>, its path under --helper_key"
        raise MessageError(where, "an answer holds an image", how)
    return _Turn(where, role, text, pictures, learnt)


def _taken(row: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Take a value out of a row; MessageError where it is of another type."""
    value = row.pop(key, default)
    if not isinstance(value, kind):
        name = "string" if kind is str else "list"
        raise MessageError(key, f"expected a {name}, found {shown(value)}", f"write it as a {name}")
    return value


def _messages(row: dict[str, Any], key: str) -> Iterator[_Turn]:
    for number, one in enumerate(_taken(row, key, list), 1):
        where = f"{key} {number}"
        if isinstance(one, Mapping) and one.keys() >= {"human", "assistant"}:
            check_keys(one, ("human", "assistant"), where)
            yield from (_turn(where, "user", one["human"]), _turn(where, "assistant", one["assistant"]))
            continue
        role = _either(one, _SPEAKER) if isinstance(one, Mapping) else None
        if role not in ROLES:
            how = f"write role ({', '.join(ROLES)}) and content; tools and their answers cannot be carried over"
            raise MessageError(where, f"expected a message, found {shown(one)}", how)
        learnt = is_learnt(one, (*_SPEAKER, *_CONTENT), where)
        yield _turn(where, ROLES[role], _either(one, _CONTENT), learnt)


def _either(one: Row, keys: tuple[str, ...]) -> Any:
    return next((one[key] for key in keys if one.get(key) is not None), None)


def _pair(row: dict[str, Any], question: str, answer: str) -> Iterator[_Turn]:
    """Read a question and its answer with the rounds before it."""
    for number, pair in enumerate(_taken(row, "history", list, []), 1):
        where = f"history {number}"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise MessageError(where, f"found {shown(pair)}", "write a question and its answer")
        yield from (_turn(where, "user", pair[0]), _turn(where, "assistant", pair[1]))
    texts = [_taken(row, question, str, "" if question == "instruction" and "input" in row else None)]
    if question == "instruction":
        texts.append(_taken(row, "input", str, ""))
    yield _turn(question, "user", "\n".join(text for text in texts if text))
    yield _turn(answer, "assistant", _taken(row, answer, str))


def _turns(row: dict[str, Any], layout: Layout) -> list[_Turn]:
    """Take the conversation out of a row."""
    keys = [key for key in ("messages", "conversations", "conversation") if key in row]
    pairs = [pair for pair in PAIRS[layout] if any(name in row for name in pair)] or [PAIRS[layout][0]]
    system = [_turn("system", "system", _taken(row, "system", str))] if "system" in row else []
    if len(keys) > 1:
        raise MessageError(keys[0], f"stands beside {keys[1]}", "a row has one conversation")
    if keys:
        return [*system, *_messages(row, keys[0])]
    if isinstance(row.get("prompt"), list) and layout == "trl":
        return [*system, *_messages(row, "prompt"), *_messages(row, "completion")]
    if len(pairs) > 1:
        first, second = (next(name for name in pair if name in row) for pair in pairs)
        raise MessageError(first, f"stands beside {second}", "a row has one question and one answer")
    return [*system, *_pair(row, *pairs[0])]


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


def images_of(row: dict[str, Any], key: str) -> list[Any]:
    """Take the pictures under a key out of a row."""
    value = row.pop(key, [])
    return [picture_of(one, key) for one in (value if isinstance(value, list) else [value])]


def _unread(value: Any, paths: bool) -> Iterator[Any]:
    """Yield the pictures in what a row has besides; with `paths`, also texts that look like a picture's path."""
    if isinstance(value, (list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _unread(inner, paths)
    elif isinstance(value, bytes) or (paths and isinstance(value, str) and _PICTURE_FILE.search(value)):
        yield value


def _placed(turns: list[_Turn], images: list[Any]) -> tuple[list[str], list[Any]]:
    """Return the texts with their marks, and the pictures in the order of the marks."""
    texts = [turn.text for turn in turns]
    own = [picture for turn in turns for picture in turn.pictures]
    if not own:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        if images and first < len(turns) - 2:
            # Without marks those trainers show them first of all; a record would show them with its last question.
            texts[first] = IMAGE_MARK * len(images) + texts[first]
        return texts, images
    if own.count(None) != len(images):
        what = f"{own.count(None)} {IMAGE_MARK} mark(s) without a picture of their own for {len(images)} image(s)"
        raise MessageError("images", what, "write one mark for each image, or none (images then stand first)")
    rest = iter(images)
    return texts, [next(rest) if picture is None else picture for picture in own]


def read_row(row: Row, layout: Layout, helper_key: str) -> dict[str, Any]:
    """Turn a row of a layout into a record's keys; its images are paths or contents.

    Raises:
        MessageError: it has not the layout, no answer, or something that a record cannot hold.
    """
    left = {key: value for key, value in row.items() if not is_absent(value)}
    if "image" in left and "images" in left:
        raise MessageError("image", "stands beside images", "write all pictures of the row under images")
    helpers = images_of(left, helper_key)
    images = images_of(left, "image" if "image" in left else "images")
    refuse_row(left)
    own = next((name for name in (*FIELDS, TURNS_BEFORE) if name in left), None)
    if own:
        raise MessageError(own, "is a key of a record", "a row has one layout; leave it out, or rename it")
    turns = _turns(left, layout)
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise MessageError("messages", "they do not end with a question and its answer", "leave the row out")
    if not turns[-1].learnt:
        raise not_learnt(turns[-1].where)
    texts, images = _placed(turns, images)
    for key, value in left.items():
        for found in _unread(value, paths=not images and not helpers):
            how = "call the key images, or name it with --helper_key"
            raise MessageError(key, f"holds a picture ({shown(found, 40)}) that is not read", how)
    before = [{"role": turn.role, "content": text} for turn, text in zip(turns[:-2], texts[:-2], strict=True)]
    return {
        **{"text_input": texts[-2], "text_output": texts[-1]},
        **({"image_input": images} if images else {}),
        **({"image_output": helpers} if helpers else {}),
        **({TURNS_BEFORE: check_turns(before, "messages")} if before else {}),
        **left,
    }
