"""One page's Markdown as HTML: anchors on headings, links that lead where they are served, code in colours."""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .pages import Page, target_of

_PICTURES = Path(__file__).parent / "pages"
_COLOURS = HtmlFormatter(nowrap=True)
LANGUAGES = {"sh": "bash", "py": "python", "python": "python", "json": "json", "text": "text"}
Env = MutableMapping[str, Any]
NOT_RUN = "not-run:"
"""In a fence's line, before the reason why no test runs it."""


@dataclass(frozen=True, slots=True)
class Heading:
    level: int
    text: str
    anchor: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """`body` is HTML; `headings` are those of it, in order."""

    body: str
    headings: list[Heading] = field(default_factory=list)

    @property
    def title(self) -> str:
        return next((heading.text for heading in self.headings if heading.level == 1), "")


def render(page: Page, text: str) -> Rendered:
    """`text` as it is shown on `page`. HTML in it is shown as text; comments outside of code are not shown."""
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    pieces[::2] = [re.sub(r"<!--.*?-->\n?", "", piece, flags=re.DOTALL) for piece in pieces[::2]]
    text = "".join(pieces)
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    headings = _anchored(tokens)
    _labelled(tokens)
    body = parser.renderer.render(tokens, parser.options, {"page": page})
    return Rendered(body, headings)


def slug(text: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.lower()))


def _anchored(tokens: Sequence[Token]) -> list[Heading]:
    """Give each heading its `id`; of the same words the second has `-1` behind it."""
    found: list[Heading] = []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            words = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            anchor = slug(words)
            again = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one.anchor) is not None for one in found)
            opening.attrSet("id", f"{anchor}-{again}" if again else anchor)
            found.append(Heading(int(opening.tag[1]), words, str(opening.attrGet("id"))))
    return found


def _labelled(tokens: Sequence[Token]) -> None:
    """Give each cell of a table the words above its column, for screens that are too narrow for columns."""
    words: list[str] = []
    column = 0
    for opening, inline in pairwise(tokens):
        match opening.type:
            case "table_open":
                words = []
            case "th_open":
                words.append(inline.content)
            case "tr_open":
                column = 0
            case "td_open":
                opening.attrSet("data-label", words[column])
                column += 1


class _Renderer(RendererHTML):
    """Methods are called as the kinds of tokens are."""

    def heading_close(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        opening = tokens[index - 2]
        link = f'<a class="anchor" href="#{opening.attrGet("id")}" aria-label="Link to this heading">#</a>'
        return f"{link if tokens[index].tag != 'h1' else ''}</{tokens[index].tag}>\n"

    def table_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        return '<div class="table" role="group" aria-label="Table" tabindex="0"><table>\n'

    def table_close(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        return "</table></div>\n"

    def link_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        target = target_of(env["page"], str(tokens[index].attrGet("href")))
        if target is None:
            return '<span class="file" title="in the source">'
        return f'<a href="{escape(target)}"{" rel=noreferrer" if "://" in target else ""}>'

    def link_close(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        depth = 1
        while depth:
            index -= 1
            depth += {"link_close": 1, "link_open": -1}.get(tokens[index].type, 0)
        return "</a>" if target_of(env["page"], str(tokens[index].attrGet("href"))) is not None else "</span>"

    def image(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        """A drawing of ours, in the page itself: it follows the page's theme, and nothing is loaded. Of any other
        picture, what it shows."""
        label, source = escape(tokens[index].content), Path(str(tokens[index].attrGet("src")))
        if source.suffix != ".svg":
            return f'<span class="file" title="a picture in the source">{label}</span>'
        drawing = (_PICTURES / source.name).read_text(encoding="utf-8")
        drawing = re.sub(r"\A.*?(?=<svg)", "", drawing, flags=re.DOTALL)
        named = drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        return f'<span class="picture" tabindex="0" role="group" aria-label="A wide picture">{named}</span>'

    def fence(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: Env) -> str:
        language, _, about = tokens[index].info.strip().partition(" ")
        reason = about.partition(NOT_RUN)[2].strip()
        code = _coloured(tokens[index].content, language)
        note = f"<figcaption>Not run by the tests: {escape(reason)}</figcaption>" if reason else ""
        kind = f' class="{escape(language)}"' if language else ""
        return f'<figure{kind}><pre tabindex="0"><code>{code}</code></pre>{note}</figure>\n'


def _coloured(code: str, language: str) -> str:
    try:
        coloured: str = highlight(code, get_lexer_by_name(LANGUAGES.get(language, language or "text")), _COLOURS)
    except ClassNotFound:
        return escape(code)
    return coloured
