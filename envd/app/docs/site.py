"""A page as it is served: the Markdown inside a frame with menu, contents and a style of its own."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path

from ... import __version__
from .markdown import Heading, render
from .pages import PAGES, Page

_STYLE = Path(__file__).parent / "style.css"


@cache
def rendered(name: str) -> str:
    """The page of that name as a whole document. Reads files."""
    page = PAGES[name]
    content = render(page, page.read())
    return _DOCUMENT.format(
        language=page.language,
        title=escape(content.title if content.title.startswith("envd") else f"{content.title} · envd"),
        style=_STYLE.read_text(encoding="utf-8"),
        version=__version__,
        menu=_menu(page),
        contents=_contents(content.headings),
        note=f'<p class="note">{escape(page.note)}</p>' if page.note else "",
        body=content.body,
        turning=_turning(page),
    )


def policy_of(html: str) -> str:
    """A Content-Security-Policy under which `html` works: its own styles, and nothing else."""
    styles = {
        base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        for style in re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    }
    allowed = " ".join(f"'sha256-{digest}'" for digest in sorted(styles))
    return f"default-src 'none'; style-src {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _menu(current: Page) -> str:
    parts = []
    for section, pages in groupby(PAGES.values(), key=lambda page: page.section):
        entries = "".join(
            f'<li><a href="{page.url}"{" aria-current=page" if page is current else ""}'
            f"{f' lang={page.language}' if page.language != 'en' else ''}>{escape(page.title)}</a></li>"
            for page in pages
        )
        parts.append(f"<h2>{section}</h2><ul>{entries}</ul>")
    return "".join(parts)


def _contents(headings: list[Heading]) -> str:
    """Of a page that has several: what is on it. Third level only where there are few of the second."""
    deepest = 3 if sum(heading.level == 2 for heading in headings) < 3 else 2
    shown = [heading for heading in headings if 2 <= heading.level <= deepest]
    if len(shown) < 2:
        return ""
    entries = "".join(
        f'<li class="level-{heading.level}"><a href="#{heading.anchor}">{escape(heading.text)}</a></li>'
        for heading in shown
    )
    return f'<nav class="contents" aria-label="On this page"><h2>On this page</h2><ul>{entries}</ul></nav>'


def _turning(page: Page) -> str:
    """To the page before and the page after."""
    pages = list(PAGES.values())
    at = pages.index(page)
    before = f'<a rel="prev" href="{pages[at - 1].url}">← {escape(pages[at - 1].title)}</a>' if at else "<span></span>"
    after = ""
    if at + 1 < len(pages):
        after = f'<a rel="next" href="{pages[at + 1].url}">{escape(pages[at + 1].title)} →</a>'
    return before + after


_DOCUMENT = """<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the text</a>
<header class="top">
<a class="brand" href="/docs">envd</a> <span class="version">{version}</span>
<nav aria-label="Site"><a href="/">Dashboard</a><a href="/docs/api">API</a><a href="/errors">Errors</a></nav>
</header>
<details class="pages"><summary>All pages</summary><nav aria-label="Pages">{menu}</nav></details>
<div class="frame">
<nav class="menu" aria-label="Pages">{menu}</nav>
<main id="content" tabindex="-1">
{contents}
<article>
{note}
{body}
</article>
<nav class="turning" aria-label="Before and after">{turning}</nav>
</main>
</div>
</body>
</html>
"""
