"""Conversations: `messages` with content items, as a record's own keys. Imports nothing heavy.

    {"messages": [
        {"role": "system", "content": "You plan."},
        {"role": "user", "content": [{"type": "image", "image": "map.png"}, {"type": "text", "text": "Fewest moves?"}]},
        {"role": "assistant", "content": [{"type": "latent", "image": "path.png"}, {"type": "text", "text": "RIGHT"}]}]}

The last user message is the question, the last assistant message the answer that is learnt; what stands before them is
kept in TURNS_BEFORE, with `<image>` where an image stands.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from mirage_ds.errors import shown

# Own key of a record: the messages before its question, [{"role": …, "content": text with <image> marks}, …].
TURNS_BEFORE = "turns_before"
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
    if isinstance(value, Mapping):
        return all(is_absent(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_absent(one) for one in value)
    return is_null(value) or (isinstance(value, (str, bytes)) and not value)


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


def not_learnt(where: str) -> MessageError:
    """Make the error of a last answer that is marked as not to be learnt."""
    return MessageError(where, "its answer is marked as not to be learnt", "end with one that is, or leave the row out")


def check_turns(turns: Any, field: str = TURNS_BEFORE) -> list[dict[str, str]]:
    """Check the messages before a question: roles that take turns, texts, no latents.

    Raises:
        MessageError: they do not have the format.
    """
    if not isinstance(turns, list):
        raise MessageError(
            field, f"expected a list of messages, found {shown(turns)}", "write role and content of each"
        )
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


def from_messages(messages: Any, answers: bool) -> dict[str, Any]:
    """Turn a conversation into text_input, text_output, image_input, image_output and TURNS_BEFORE.

    Args:
        answers: whether it must end with an answer; a question may stand last otherwise.

    Raises:
        MessageError: it does not have the format.
    """
    if not isinstance(messages, list) or not messages:
        raise MessageError("messages", f"expected a list of messages, found {shown(messages)}", "write at least two")
    images: list[Any] = []
    helpers: list[Any] = []
    turns = [_turn(message, number, images, helpers) for number, message in enumerate(messages, 1)]
    answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if answer is None and answers:
        raise MessageError("messages", "the last one is no assistant's", "end with the answer that is to be learnt")
    if answers and not is_learnt(messages[-1], ("role", "content"), f"messages {len(messages)}"):
        raise not_learnt(f"messages {len(messages)}")
    if not turns or turns[-1]["role"] != "user":
        raise MessageError("messages", "no user message before the answer", "write the question before it")
    question = turns.pop()["content"]
    before = check_turns(turns, "messages")
    return {
        "text_input": question,
        "text_output": answer or "",
        **({"image_input": images} if images else {}),
        **({"image_output": helpers} if helpers else {}),
        **({TURNS_BEFORE: before} if before else {}),
    }


def _turn(message: Any, number: int, images: list[Any], helpers: list[Any]) -> dict[str, str]:
    where = f"messages {number}"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        how = f"write a role ({', '.join(ROLES)}) and a content"
        raise MessageError(where, f"expected a message, found {shown(message)}", how)
    content, role = message.get("content"), str(message["role"])
    is_learnt(message, ("role", "content"), where)
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list):
        raise MessageError(where, f"its content is {shown(content)}", "write a text or a list of items")
    return {"role": role, "content": "".join(_item(item, where, role, images, helpers) for item in items)}


def _item(item: Any, where: str, role: str, images: list[Any], helpers: list[Any]) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind in ("text", "image", "latent"):
        check_keys(item, ("type", "text" if kind == "text" else "image"), where)
    if kind == "text" and isinstance(item.get("text"), str):
        for mark in (IMAGE_MARK, HELPER_MARK):
            if mark in item["text"]:
                how = "images and latents are items here; `mirage-ds data import` reads layouts that write marks"
                raise MessageError(where, f"a text holds {mark}", how)
        return str(item["text"])
    if kind == "image":
        if role != "user":
            raise MessageError(
                where, f"a {role} message holds an image", 'the helper of an answer is {"type": "latent"}'
            )
        images.append(_image(item, where))
        return IMAGE_MARK
    if kind == "latent":
        if role != "assistant":
            raise MessageError(where, f"a {role} message holds latents", "only the answer may hold them")
        if item.get("image") is not None:
            helpers.append(_image(item, where))
        return HELPER_MARK
    raise MessageError(where, f"no item {shown(item)}", "there are text, image and latent items")


def _image(item: Mapping[str, Any], where: str) -> Any:
    """Return what stands for an item's picture: a path, or the picture itself (inside.py)."""
    image = item.get("image")
    if not image or not isinstance(image, (str, bytes, Mapping)):
        raise MessageError(where, f"an item's image is {shown(image)}", "write its path")
    return image
