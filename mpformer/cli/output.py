"""What the commands print, in terminals and pipes of any encoding."""

from __future__ import annotations

import codecs
import io
import unicodedata
from typing import TextIO

from mpformer.types import encodable

_ERRORS = "mpformer.plain"
_PLAIN = {"±": "+/-", "–": "-", "−": "-", "—": "-", "×": "x", "†": "+", "…": "...", "→": "->", "λ": "lambda"}


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def print_any_text(stream: TextIO) -> None:
    """Let a stream print what its encoding lacks in characters that it has, instead of raising."""
    codecs.register_error(_ERRORS, _in_plain_characters)
    if isinstance(stream, io.TextIOWrapper):  # not where a caller collects what is printed, as text
        stream.reconfigure(errors=_ERRORS)


def _in_plain_characters(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of `codecs`: "±" becomes "+/-", "é" becomes "e", what has no such form "?".

    A byte that is not UTF-8 in a file's name becomes `\\xff`, in any encoding.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = encodable(error.object[error.start : error.end])
    return "".join(_PLAIN.get(character) or _decomposed(character) for character in found), error.end


def _decomposed(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"
