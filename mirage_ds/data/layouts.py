"""Conversations in the layouts of other trainers, as records: `mirage-ds data import LAYOUT SOURCE`.

    swift           ms-swift: messages, or query / response / history, with `<image>` in the texts and a list `images`
    llama-factory   conversations (sharegpt) or messages, or instruction / input / output, with `<image>` and `images`
    trl             messages, or prompt and completion, with content items or texts, and `images`

Their texts hold marks: an `<image>` is the next of the row's images. None of them has helper images: those are taken
from a key of the row, and stand where `<output_image>` does in the answer (without it, first).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from mirage_ds.data.messages import IMAGE_MARK, TURNS_BEFORE, MessageError, check_turns
from mirage_ds.errors import shown

Layout = Literal["swift", "llama-factory", "trl"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Row = Mapping[str, Any]
Turn = dict[str, str]

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Keys of a row that are spelt out in the record.
_SPENT = frozenset(
    {
        *("messages", "conversations", "query", "response", "history", "system", "images", "image", "prompt"),
        *("completion", "instruction", "input", "output"),
    }
)


def _text(row: Row, key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise MessageError(key, f"expected a string, found {shown(value)}", "write it as a string")
    return value


def _listed(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise MessageError(key, f"expected a list, found {shown(value)}", "write it as a list")
    return value


def _content(value: Any, where: str) -> str:
    """Write a message's content as one text with marks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise MessageError(where, f"its content is {shown(value)}", "write a text or a list of items")
    parts = []
    for item in value:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            parts.append(item["text"])
        elif kind == "image":
            parts.append(IMAGE_MARK)
        else:
            raise MessageError(where, f"no item {shown(item)}", "there are text and image items")
    return "".join(parts)


def _messages(row: Row, key: str, role: str = "role", content: str = "content") -> list[Turn]:
    turns = []
    for number, one in enumerate(_listed(row, key), 1):
        where = f"{key} {number}"
        if not isinstance(one, Mapping) or one.get(role) not in _SHAREGPT:
            raise MessageError(where, f"expected a message, found {shown(one)}", f"write {role} and {content}")
        turns.append({"role": _SHAREGPT[one[role]], "content": _content(one.get(content), where)})
    return turns


def _history(row: Row) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(_listed(row, "history"), 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise MessageError(f"history {number}", f"found {shown(pair)}", "write a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _system(row: Row) -> list[Turn]:
    text = _text(row, "system", "")
    return [{"role": "system", "content": text}] if text else []


def _asked(row: Row, question: str, answer: str) -> list[Turn]:
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*_system(row), *_history(row), *pair]


def _swift(row: Row) -> list[Turn]:
    if "messages" in row:
        return [*_system(row), *_messages(row, "messages")]
    return _asked(row, _text(row, "query"), _text(row, "response"))


def _llama_factory(row: Row) -> list[Turn]:
    if "conversations" in row:
        return [*_system(row), *_messages(row, "conversations", "from", "value")]
    if "messages" in row:
        return [*_system(row), *_messages(row, "messages")]
    question, more = _text(row, "instruction"), _text(row, "input", "")
    return _asked(row, f"{question}\n{more}" if more else question, _text(row, "output"))


def _trl(row: Row) -> list[Turn]:
    if "messages" in row:
        return _messages(row, "messages")
    if isinstance(row.get("prompt"), str):
        return _asked(row, _text(row, "prompt"), _text(row, "completion"))
    return [*_messages(row, "prompt"), *_messages(row, "completion")]


_READERS: dict[Layout, Callable[[Row], list[Turn]]] = {"swift": _swift, "llama-factory": _llama_factory, "trl": _trl}


def images_of(row: Row, key: str) -> list[Any]:
    """Return the images under a key: paths, or what `datasets` makes of an image ({"bytes": …, "path": …})."""
    value = row.get(key)
    if value is None and key == "images":
        value = row.get("image")
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [one["path"] if isinstance(one, Mapping) and one.get("bytes") is None and one.get("path") else one
            for one in values]  # fmt: skip


def read_row(row: Row, layout: Layout, helper_key: str) -> dict[str, Any]:
    """Turn a row of a layout into a record's keys; its images stay as `images_of` gives them.

    Raises:
        MessageError: it has not the layout, or no answer.
    """
    turns = _READERS[layout](row)
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or turns[-2]["role"] != "user":
        raise MessageError("messages", "they do not end with a question and its answer", "leave the row out")
    *before, question, answer = turns
    kept = {key: value for key, value in row.items() if key not in _SPENT and key != helper_key}
    images, helpers = images_of(row, "images"), images_of(row, helper_key)
    return {
        **{"text_input": question["content"], "text_output": answer["content"]},
        **({"image_input": images} if images else {}),
        **({"image_output": helpers} if helpers else {}),
        **({TURNS_BEFORE: check_turns(before, "messages")} if before else {}),
        **kept,
    }
