"""Commands that messages propose, as a POSIX shell reads them. Imports nothing of mpformer."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
"""An argument that sets something: `key.sub=value`."""


def command(*arguments: str | Path) -> str:
    """`mpformer ARGUMENT ...`: what can be pasted into a POSIX shell, whatever is in the arguments.

    Arguments that are a `Path` are written so that they are taken neither for an option nor for a setting.
    One line, unless an argument ends in a line break.
    """
    return " ".join(["mpformer", *(_quoted(place(a) if isinstance(a, Path) else a) for a in arguments)])


def place(path: str | Path) -> str:
    """A file or folder as an argument of a command: `./-x` and `./a=b`, everything else as it is."""
    text = str(path)
    return f"./{text}" if text.startswith("-") or SETTING.fullmatch(text) else text


def _quoted(text: str) -> str:
    """One word of a shell. What a terminal does not show as it is (line breaks, bytes that are no UTF-8, ...)
    is left to printf."""
    body = text.rstrip("\n")  # $(...) drops line breaks at the end
    if all(map(_shown, body)):
        return shlex.quote(text)
    written = "".join(map(_for_printf, body))
    return f"\"$(printf '{written}')\"" + (shlex.quote(text[len(body) :]) if body != text else "")


def _shown(character: str) -> bool:
    """Whether the terminal, or what the output goes to, shows a character as itself."""
    try:
        character.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return character.isprintable()


def _for_printf(character: str) -> str:
    """A character of a format of printf within single quotes."""
    if character in "\\%":
        return 2 * character
    if character in "-'!" or not _shown(character):  # an option, the quote's end, history expansion
        return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))
    return character
