"""Plain paragraphs out of wiki markup.

Templates, tables and links nest, so a stack reads them in one pass; the rest is line by line. What cannot be text is
dropped: references, formulas, lists, headings, files. Prose that a template would produce (``{{convert|5|km}}``) is
kept where it stands in the template itself.
"""

from __future__ import annotations

import html
import re

_DROPPED = "ref|math|chem|gallery|table|timeline|score|code|source|syntaxhighlight|pre|nowiki|imagemap|references|hiero"
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_EMPTY_TAG = re.compile(rf"<(?:{_DROPPED})\b[^<>]*/>", re.I)
_CONTENT = re.compile(rf"<({_DROPPED})\b[^<>]*>.*?</\1\s*>", re.S | re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BRACKETS = re.compile(r"(\{\{|\}\}|\{\||\|\}(?!\})|\[\[|\]\])")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+ ?([^\]\n]*)\]")
_CLOSES = {"}}": "{{", "|}": "{|", "]]": "[["}
_NO_TEXT = re.compile(r"(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)*):", re.I)
#: templates whose text is one of their arguments: which one
_SPOKEN = {"lang": 2, "nowrap": 1, "nobr": 1, "transl": -1, "transliteration": -1, "as of": 1, "circa": 1, "mvar": 1}
_NOT_PROSE = tuple("*#:;|!={}")


def paragraphs(markup: str, *, shortest: int = 120) -> list[str]:
    """The paragraphs of prose in ``markup``, each of at least ``shortest`` characters."""
    text = _EMPTY_TAG.sub("", _COMMENT.sub("", markup))
    text = _brackets(_CONTENT.sub("", text))
    text = _EXTERNAL.sub(r"\1", _TAG.sub("", text))
    text = html.unescape(re.sub(r"'{2,}", "", text)).replace("\xa0", " ")
    lines = (_tidy(line) for line in text.split("\n") if not line.lstrip().startswith(_NOT_PROSE))
    return [line for line in lines if len(line) >= shortest]


def _brackets(text: str) -> str:
    """``text`` with templates, tables and links rendered, from the inside out."""
    stack: list[tuple[str, list[str]]] = [("", [])]
    for piece in _BRACKETS.split(text):
        if piece in ("{{", "{|", "[["):
            stack.append((piece, []))
        elif piece in _CLOSES and any(opened == _CLOSES[piece] for opened, _ in stack):
            while stack[-1][0] != _CLOSES[piece]:  # something inside was never closed: plain text, then
                _, inner = stack.pop()
                stack[-1][1].extend(inner)
            opened, inner = stack.pop()
            stack[-1][1].append(_render(opened, "".join(inner)))
        elif piece not in _CLOSES:
            stack[-1][1].append(piece)
    return "".join("".join(inner) for _, inner in stack)


def _render(opened: str, inner: str) -> str:
    if opened == "{|":
        return ""
    parts = [part.strip() for part in inner.split("|")]
    if opened == "[[":
        return "" if _NO_TEXT.match(parts[0]) else parts[-1].lstrip(":")
    name, arguments = parts[0].lower(), [part for part in parts[1:] if "=" not in part]
    if name in ("convert", "cvt"):
        return " ".join(arguments[:2])
    if name in _SPOKEN and arguments:
        at = _SPOKEN[name]
        said = arguments[-1 if at < 0 else min(at, len(arguments)) - 1]
        return f"As of {said}" if name == "as of" else said
    return ""


def _tidy(line: str) -> str:
    """``line`` without the holes that dropped templates leave."""
    line = re.sub(r"\(\s*(?:[;,:]\s*)*", "(", line)
    line = re.sub(r"(?:\s*[;,:])*\s*\)", ")", line)
    line = line.replace("()", "")
    line = re.sub(r"\s+([,.;:!?)])", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()
