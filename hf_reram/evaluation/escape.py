"""Texts that others have chosen – names, notes, sources, repository ids – inside Markdown and Python."""

import re
import unicodedata

# Backslashes, emphasis, code and cells of tables, and the brackets of links where they follow one another.
_MARKUP = re.compile(r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|(?<=\])[(\[:]")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_COMMENT = re.compile(r"<(?=!--)|(?<=--)>")


def one_line(text: str) -> str:
    """The text without line breaks and without characters that are not printed, or that turn others around."""
    return "".join(c for c in " ".join(str(text).split()) if c == " " or unicodedata.category(c)[0] != "C")


def escaped(text: str) -> str:
    """The text as Markdown that shows it, on one line: no HTML, no cell of a table of
    its own, no link but an address that stands there."""
    text = _MARKUP.sub(lambda found: f"\\{found[0]}", one_line(text))
    return _ENTITY.sub("&amp;", text).replace("<", "&lt;")


def code_span(text: str) -> str:
    """The text as code within a line of Markdown; escaped where it would end the code."""
    text = one_line(text)
    return f"`{text}`" if text and not set("`<|]") & set(text) else escaped(text)


def code_block(text: str, language: str = "") -> str:
    """The text as a block of code, fenced by more backticks than it holds, and without marks of comments."""
    text = _COMMENT.sub(lambda found: f"{found[0]} " if found[0] == "<" else f" {found[0]}", text.strip())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def python_text(text: str) -> str:
    """A Python literal of the text, in double quotes, within which nothing ends it, or a Markdown block around it."""
    plain = "".join(c if c.isalnum() or c in " ./_-+:@~,=()" else f"\\U{ord(c):08x}" for c in str(text))
    return f'"{plain}"'
