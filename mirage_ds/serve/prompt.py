"""Messages and their pictures → the encoded prompt, the one that training saw."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.inside import content_of
from mirage_ds.data.messages import IMAGE_MARK, TURNS_BEFORE, MessageError, check_turns
from mirage_ds.data.record import Record, RecordError, check_marks
from mirage_ds.data.sample import Sample
from mirage_ds.errors import shown
from mirage_ds.serve.body import Message, Part, Refused

# A token has about four: a text that would be too long with so many a token is not even tokenized.
CHARACTERS = 16


class Reader:
    """Encodes prompts; any thread may call it.

    Args:
        encoder: the folder's.
        scratch: a folder of the server's own, where pictures lie while they are encoded.
        files: the folder that file: URLs may lead into; None for none.
        longest: tokens of a prompt with its answer, at most.
    """

    def __init__(self, encoder: Encoder, scratch: Path, files: Path | None, longest: int):
        self.scratch, self.files, self.longest = scratch.resolve(), files.resolve() if files else None, longest
        # Whatever the path that is found: what it leads to lies in one of these.
        within = (self.scratch, *([self.files] if self.files else []))
        self.encoder = replace(encoder, finder=ImageFinder((), within))
        # A tokenizer is no thing for two threads.
        self._one = threading.Lock()

    def sample(self, messages: Sequence[Message], new_tokens: int) -> Sample:
        """Encode a prompt.

        Raises:
            Refused: the messages or a picture cannot be used, or the prompt is too long.
        """
        with TemporaryDirectory(dir=self.scratch) as folder:
            try:
                record = self._record(messages, Path(folder))
                # Headers, which the layout asks for, are remembered: the next prompt need not wait for them.
                for path in record.image_input:
                    self.encoder.finder.size(record, "image_input", path)
                with self._one:
                    layout = self.encoder.lay_out(record, prompt=True)
                self._fits(len(layout.input_ids), new_tokens)
                return self.encoder.fill(layout, record, 0)
            except RecordError as error:
                what = f"{error.fault.what}; {error.fault.how}".replace(f"{folder}/", "")
                raise Refused(400, what, "messages", "invalid_prompt") from None

    def _fits(self, tokens: int, new_tokens: int) -> None:
        if tokens + new_tokens > self.longest:
            what = f"{tokens} prompt tokens and up to {new_tokens} of an answer are more than the {self.longest} that "
            raise Refused(400, f"{what}the model was made for; ask for less", "messages", "context_length_exceeded")

    def _record(self, messages: Sequence[Message], folder: Path) -> Record:
        """Write messages as a record: texts with a mark where a picture stands, and the pictures' places."""
        turns: list[dict[str, str]] = []
        places: list[str] = []
        for message in messages:
            parts = message.content if isinstance(message.content, list) else [Part(type="text", text=message.content)]
            text = ""
            for part in parts:
                if part.type == "image_url":
                    places.append(self._place(part.image_url.url, folder / f"picture {len(places) + 1}"))
                elif IMAGE_MARK in part.text:
                    what = f"a text holds {IMAGE_MARK}, which stands for a picture; send that as a part of the message"
                    raise Refused(400, what, "messages")
                text += part.text if part.type == "text" else IMAGE_MARK
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": text})
        if turns[-1]["role"] != "user":
            raise Refused(400, "the last message is not the user's; it is the one that is answered", "messages")
        self._fits(sum(len(turn["content"]) for turn in turns) // CHARACTERS, 0)
        try:
            # With the answer that is asked for.
            before = check_turns([*turns, {"role": "assistant", "content": ""}], "messages")[:-2]
        except MessageError as error:
            raise Refused(400, str(error), "messages") from None
        record = Record(1, turns[-1]["content"], "", tuple(places), (), {TURNS_BEFORE: before} if before else {})
        check_marks(record, answers=False)
        return record

    def _place(self, url: str, target: Path) -> str:
        """Return the path of a URL's picture; one that stands in the URL itself is written to `target`."""
        if url[:5].lower() == "data:":
            try:
                target.write_bytes(content_of(url) or b"")
            except ValueError as error:
                raise Refused(400, f"{target.name} {error}", "messages", "invalid_image") from None
            return str(target)
        if not url.startswith("file://"):
            what = f"{shown(url)}: give a data: URL with base64, or a file: URL; nothing is fetched"
            raise Refused(400, what, "messages", "invalid_image")
        for place in ImageFinder((self.files,)).places(url) if self.files else ():
            try:
                found = place.resolve(strict=True)
            # A loop of links, a name that is too long, a NUL in it.
            except (OSError, ValueError, RuntimeError):
                continue
            if self.files and found.is_relative_to(self.files) and found.is_file():
                return str(found)
        where = "no file below the folder of --files" if self.files else "no file is read: there is no --files"
        raise Refused(400, f"{shown(url)}: {where}", "messages", "invalid_image")
