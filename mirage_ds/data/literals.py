"""What a user's text spells out stays text: only the template and the encoder place special tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Characters that stand for a special token in a user's text while the row is put together: those without a meaning
# of their own first.
PRIVATE_USE = range(0xE000, 0x110000)


@dataclass(frozen=True)
class Literals:
    """Tokenizes rows in which the user's own texts may spell special tokens."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def special_tokens(self) -> list[str]:
        """Every special token as it is spelt: image slots, turns, latents and the like."""
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches a special token, of several that begin at one place the longest."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))})")

    @cached_property
    def _literal(self) -> Tokenizer:
        """The tokenizer to which special tokens are ordinary text; a copy, since the setting is the tokenizer's own."""
        made: Tokenizer = copy.deepcopy(self.tokenizer.backend_tokenizer)
        made.no_padding()
        made.no_truncation()
        made.encode_special_tokens = True
        return made

    def veil(self, texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Replace special tokens that a user's texts spell out by characters that the texts do not hold.

        Returns:
            The texts, and special token → its character (empty where there is none, as in almost every record).
        """
        spelt = {token for text in texts for token in self._special.findall(text)}
        if not spelt:
            return list(texts), {}
        held = set().union(*texts)
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in held)
        veils = dict(zip(sorted(spelt), unused, strict=False))
        return [self._special.sub(lambda found: veils[found.group()], text) for text in texts], veils

    def tokenize(self, text: str, veils: Mapping[str, str]) -> list[int]:
        """Tokenize a rendered row; what is veiled in it (`veil`) becomes the ordinary tokens that spell it out."""
        if not veils:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        convert: Any = self.tokenizer.convert_tokens_to_ids
        ids: list[int] = []
        unveil = str.maketrans({veil: token for token, veil in veils.items()})
        # Every second part is a special token.
        for number, part in enumerate(self._special.split(text)):
            if number % 2:
                ids.append(int(convert(part)))
            elif part:
                ids += self._literal.encode(part.translate(unveil), add_special_tokens=False).ids
        return ids
