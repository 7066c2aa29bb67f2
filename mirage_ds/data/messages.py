"""Conversations: `messages` with content items, and what of them a record can hold; layouts.py reads them.

    {"messages": [
        {"role": "system", "content": "You plan."},
        {"role": "user", "content": [{"type": "image", "image": "map.png"}, {"type": "text", "text": "Fewest moves?"}]},
        {"role": "assistant", "content": [{"type": "latent", "image": "path.png"}, {"type": "text", "text": "RIGHT"}]}]}

The last user message is the question, the last assistant message the answer that is learnt; what stands before them is
kept in TURNS_BEFORE, with `<image>` where an image stands. Imports nothing heavy.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mirage_ds.errors import shown

# Own key of a record: the messages before its question, [{"role": …, "content": text with <image> marks}, …].
TURNS_BEFORE = "turns_before"
# And a box of its first input image (region.py).
REGION = "region"
IMAGE_MARK = "<image>"
HELPER_MARK = "<output_image>"
FIELDS = ("text_input", "text_output", "image_input", "image_output")
ROLES = ("system", "user", "assistant")
# Keys of a message that say whether it is learnt, whether it is not, and such that say nothing about it.
LEARNT = ("loss", "weight", "train", "trainable")
MASKED = ("mask", "masked")
MESSAGE_NOTES = ("id", "message_id", "timestamp", "date", "model")

_PREFERENCES = "nothing here learns from worse answers; write the better one as the row's answer, or leave the row out"
# Keys of a row that no record can hold: what they are, and what to do.
_REFUSED = (
    (re.compile(r"videos?$"), "a video", "leave the row out, or give its frames as images"),
    (re.compile(r"audios?$"), "sound", "leave the row out"),
    (re.compile(r"objects$|bbox(es)?$|boxes$"), "boxes", "write their coordinates into the texts, without this key"),
    (re.compile(r"tools$|functions$|tool_calls$"), "tools", "write what is to be said into the texts, or leave it out"),
    (re.compile(r"chosen|rejected|(posi|nega)tive_"), "a better and a worse answer", _PREFERENCES),
    (re.compile(r"completions$"), "several answers", "write a row for each"),
)
_PICTURE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.I)
_VERDICTS = ("label", "labels", "kto_tag")


class MessageError(Exception):
    """What is wrong with a conversation: `field`, `what`, and `how` to mend it."""

    def __init__(self, field: str, what: str, how: str):
        super().__init__(f"{field}: {what}; {how}")
        self.field, self.what, self.how = field, what, how


def is_null(value: Any) -> bool:
    """Tell whether a value is null, NaN, which pandas writes for it, or a list or object of such values alone."""
    inner = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(inner, list) and inner:
        return all(is_null(one) for one in inner)
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_absent(value: Any) -> bool:
    """Tell whether a value says nothing: null, NaN, empty, or a list or object of such values alone."""
    if isinstance(value, (Mapping, list, tuple)):
        return all(is_absent(one) for one in (value.values() if isinstance(value, Mapping) else value))
    return is_null(value) or (isinstance(value, (str, bytes)) and not value)


def expect(value: Any, kind: type, where: str) -> Any:
    """Return a value; MessageError unless it is of this type, a string or a list."""
    if not isinstance(value, kind):
        name = "string" if kind is str else "list"
        raise MessageError(where, f"expected a {name}, found {shown(value)}", f"write it as a {name}")
    return value


def check_keys(item: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """MessageError where a message or an item of its content has something that is not read."""
    for key, value in item.items():
        if key not in known and not is_absent(value):
            how = "write it into the text, or leave it out"
            raise MessageError(where, f"{key} ({shown(value)}) has no place in a record", how)


def is_learnt(message: Mapping[str, Any], known: tuple[str, ...], where: str) -> bool:
    """Tell whether a message is to be learnt, by its keys besides `known`.

    Raises:
        MessageError: it has something that is not read; or it counts by another weight than 0 or 1.
    """
    marks = {key: message[key] for key in (*LEARNT, *MASKED) if not is_null(message.get(key))}
    check_keys(message, (*marks, *MESSAGE_NOTES, *known), where)
    for key, value in marks.items():
        if value not in (0, 1):
            raise MessageError(where, f"{key} is {shown(value)}", "an answer counts whole: write 1, or leave it out")
    return all(bool(value) == (key in LEARNT) for key, value in marks.items())


def refuse_row(row: Mapping[str, Any]) -> None:
    """MessageError where a conversation's row holds what no record can: other media, boxes, tools, bad answers."""
    for key, value in row.items():
        for pattern, what, how in _REFUSED:
            if not is_absent(value) and pattern.match(key) and str(value).strip() not in ("[]", "{}", "null"):
                raise MessageError(key, f"holds {what} ({shown(value)})", how)
        verdicts = value if isinstance(value, list) else [value]
        if key in _VERDICTS and any(str(one).lower() in ("false", "0", "0.0") for one in verdicts):
            raise MessageError(key, f"is {shown(value)}: an example of a bad answer", _PREFERENCES)


def unread_pictures(value: Any, paths: bool) -> Iterator[Any]:
    """Yield the pictures in what a row has besides; with `paths`, also texts that look like a picture's path."""
    if isinstance(value, (list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from unread_pictures(inner, paths)
    elif isinstance(value, bytes) or (paths and isinstance(value, str) and _PICTURE_FILE.search(value)):
        yield value


def need_read(left: dict[str, Any], paths: bool) -> None:
    """MessageError where a picture in what a row has besides would not be read."""
    for key, value in left.items():
        for found in unread_pictures(value, paths):
            how = f"name it: --columns image={key} or helper={key}"
            raise MessageError(key, f"holds a picture ({shown(found, 40)}) that is not read", how)


def check_turns(turns: Any, field: str = TURNS_BEFORE) -> list[dict[str, str]]:
    """Check the messages before a question: roles that take turns, texts, no latents.

    Raises:
        MessageError: they do not have the format.
    """
    if not isinstance(turns, list):
        what = f"expected a list of messages, found {shown(turns)}"
        raise MessageError(field, what, "write role and content of each")
    found = []
    wanted = "user"
    for number, turn in enumerate(turns, 1):
        where = f"{field} {number}"
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise MessageError(where, f"expected role and content, found {shown(turn)}", "write both as strings")
        role = turn.get("role")
        if role not in ROLES or (role == "system" and number > 1):
            raise MessageError(where, f"its role is {shown(role)}", "system may come first, then user and assistant")
        if role not in ("system", wanted):
            raise MessageError(where, f"its role is {role} where {wanted} is due", "user and assistant take turns")
        if role != "system":
            wanted = "assistant" if role == "user" else "user"
        if HELPER_MARK in turn["content"]:
            raise MessageError(where, "holds latents", "only the last answer, which is learnt, may hold them")
        if role != "user" and IMAGE_MARK in turn["content"]:
            raise MessageError(where, f"a {role} message holds an image", "only the user shows images")
        found.append({"role": role, "content": turn["content"]})
    if wanted != "user":
        raise MessageError(field, "they end with a user message", "the question itself is text_input")
    return found
