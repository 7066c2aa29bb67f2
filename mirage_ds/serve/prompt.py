"""Messages and their pictures → the encoded prompt, the one that training saw."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.inside import content_of
from mirage_ds.data.messages import IMAGE_MARK, TURNS_BEFORE, MessageError, check_turns
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.sample import Sample
from mirage_ds.errors import shown
from mirage_ds.evaluate.decoder import Decoder
from mirage_ds.evaluate.report import prompt_hash
from mirage_ds.serve.body import Message, Picture, Refused

# A token has about four: a text that would be too long with so many a token is not even tokenized.
CHARACTERS = 16
# Pixels of all pictures of a request: decoding them takes time.
PIXELS = 400_000_000
# How PNG, JPEG, GIF, WebP, BMP and TIFF begin. Others are nothing for strangers: for EPS, Pillow runs Ghostscript.
SIGNS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def _bad(what: str, code: str = "invalid_prompt") -> Refused:
    return Refused(400, what, "messages", code)


class Reader:
    """Encodes prompts; any thread may call it.

    Args:
        scratch: a folder of the server's own, where pictures lie while they are encoded.
        files: the folder that file: URLs may lead into; None for none.
        longest: tokens of a prompt with its answer, at most.
    """

    def __init__(self, decoder: Decoder, scratch: Path, files: Path | None, longest: int):
        self.scratch = scratch.resolve()
        self.longest = min(longest, decoder.loaded.model.language_model.config.max_position_embeddings)
        self.files = ImageFinder((), (files.resolve(),)) if files else None
        # Whatever the path that is found: what it leads to lies in one of these.
        within = (self.scratch, *((self.files and self.files.within) or ()))
        self.encoder = replace(decoder.encoder, finder=ImageFinder((), within))
        # A tokenizer is no thing for two threads.
        self._one = threading.Lock()

    def sample(self, messages: Sequence[Message], new_tokens: int) -> tuple[Sample, str]:
        """Encode a prompt; return it and its evaluate.report.prompt_hash.

        Raises:
            Refused: the messages or a picture cannot be used, or the prompt is too long.
        """
        with TemporaryDirectory(dir=self.scratch) as folder:
            try:
                record = self._record(messages, Path(folder))
                # Headers, which the layout asks for, are remembered: the next prompt need not wait for them.
                sizes = [self.encoder.finder.size(record, "image_input", path) for path in record.image_input]
                if sum(height * width for height, width in sizes) > PIXELS:
                    raise _bad(f"the pictures have more than {PIXELS:,} pixels together; make them smaller")
                with self._one:
                    layout = self.encoder.lay_out(record, prompt=True)
                self._fits(len(layout.input_ids), new_tokens)
                return self.encoder.fill(layout, record, 0), prompt_hash(record, self.encoder.finder)
            except MessageError as error:
                raise _bad(str(error)) from None
            except RecordError as error:
                raise _bad(f"{error.fault.what}; {error.fault.how}".replace(f"{folder}/", "")) from None

    def _fits(self, tokens: int, new_tokens: int) -> None:
        if tokens + new_tokens > self.longest:
            what = f"{tokens} prompt tokens and up to {new_tokens} of an answer are more than {self.longest}"
            raise _bad(f"{what}, which the model was made for or --max_length allows", "context_length_exceeded")

    def _record(self, messages: Sequence[Message], folder: Path) -> Record:
        """Write messages as a record: texts with a mark where a picture stands, and the pictures' places."""
        parts = [part for message in messages for part in message.content]
        # A picture has three tokens at least.
        self._fits(sum(3 if isinstance(part, Picture) else len(part.text) // CHARACTERS for part in parts), 0)
        turns: list[dict[str, str]] = []
        places: list[str] = []
        for message in messages:
            text = ""
            for part in message.content:
                if isinstance(part, Picture):
                    places.append(self._place(part.image_url.url, folder / f"picture {len(places) + 1}"))
                    text += IMAGE_MARK
                elif IMAGE_MARK in part.text:
                    raise _bad(f"a text holds {IMAGE_MARK}, which stands for a picture; send that as a part")
                else:
                    text += part.text
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": text})
        if turns[-1]["role"] != "user":
            raise _bad("the last message is not the user's; it is the one that is answered")
        # With the answer that is asked for.
        *before, question, _ = check_turns([*turns, {"role": "assistant", "content": ""}], "messages")
        return Record(1, question["content"], "", tuple(places), (), {TURNS_BEFORE: before} if before else {})

    def _place(self, url: str, target: Path) -> str:
        """Return the path of a URL's picture; one that stands in the URL itself is written to `target`."""
        if url[:5].lower() == "data:":
            try:
                content = content_of(url) or b""
            except ValueError as error:
                raise _bad(f"{target.name} {error}", "invalid_image") from None
            if not content.startswith(SIGNS):
                raise _bad(f"{target.name} is no PNG, JPEG, GIF, WebP, BMP or TIFF", "invalid_image")
            target.write_bytes(content)
            return str(target)
        if not url.startswith("file://"):
            what = "give a data: URL with base64, or a file: URL; nothing is fetched"
        elif not self.files:
            what = "no file is read: there is no --files"
        else:
            with suppress(RecordError):
                return str(self.files.find(Record(1, "", "", (), ()), "image_input", url))
            what = "no file below the folder of --files"
        raise _bad(f"{shown(url)}: {what}", "invalid_image")
