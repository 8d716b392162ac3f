"""The pages at /docs and /errors: every link leads somewhere, nothing is loaded, what follows from the code is true."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from serving import serving

from envd.app.docs import openapi_document
from envd.app.docs.generated import write
from envd.app.docs.markdown import LANGUAGES, render, slug
from envd.app.docs.pages import COPIES, HERE, PAGES, Page, source_of, target_of
from envd.app.docs.reference import examples, operations
from envd.app.docs.site import policy_of, rendered
from envd.app.openapi import TAGS
from envd.errors import error_classes

ROOT = Path(__file__).parent.parent
every_page = pytest.mark.parametrize("name", PAGES)
OTHER_PATHS = frozenset({"/", "/openapi.json"})
"""Links to what is no page."""


class Parts(HTMLParser):
    """What a document is made of: ids, links, and what it would load or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.levels: list[int] = []
        self.lang = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(given)
        if name := given.get("id"):
            self.ids.append(name)
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "html":
            self.lang = given["lang"] or ""
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))


def article(html: str) -> str:
    return html.partition("<article>")[2].partition("</article>")[0]


@every_page
def test_a_page_loads_and_runs_nothing(name: str) -> None:
    html = rendered(name)
    parts = Parts(html)
    assert not parts.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert not {one for one in parts.attributes if one.startswith("on")} | (parts.attributes & {"style", "src"})
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", "".join(re.findall(r"<style>.*?</style>", html, re.DOTALL))) == []


@every_page
def test_a_page_can_be_read_by_keyboard_and_by_ear(name: str) -> None:
    parts = Parts(rendered(name))
    assert parts.links[0] == "#content"
    assert "content" in parts.ids
    assert parts.lang == ("zh-CN" if name == "zh-CN" else "en")
    levels = Parts(article(rendered(name))).levels
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels


@every_page
def test_every_link_and_anchor_leads_somewhere(name: str) -> None:
    parts = Parts(rendered(name))
    assert len(parts.ids) == len(set(parts.ids))
    urls = {page.url: page for page in PAGES.values()}
    for link in parts.links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = urls.get(path, PAGES[name] if not path else None)
        assert target is not None or path in OTHER_PATHS, link
        if anchor:
            assert target is not None
            assert anchor in Parts(rendered(target.name)).ids, link


@every_page
def test_every_link_leads_somewhere_in_the_repository_too(name: str) -> None:
    page = PAGES[name]
    for reference in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read(), flags=re.DOTALL)):
        if not reference.startswith(("#", "http")):
            file = source_of(page, reference.partition("#")[0])
            assert (ROOT / file).exists(), reference
            assert target_of(page, reference) or file.endswith(".svg") or not file.startswith(HERE), reference


GUIDES = (
    "README.md",
    "README.zh-CN.md",
    "deploy/RUNBOOK.md",
    *(f"deploy/{name}/README.md" for name in ("aws", "container", "proxy", "tunnel")),
)


@pytest.mark.parametrize("file", [*GUIDES, "deploy/DOCKER.md"])
def test_links_of_guides_lead_somewhere(file: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / file).read_text(), flags=re.DOTALL)
    found = [one for one in re.findall(r"\]\(([^)\s]+)\)", text) if not one.startswith("http")]
    assert found
    for reference in found:
        path, _, anchor = reference.partition("#")
        target = (ROOT / file).parent / path if path else ROOT / file
        assert target.exists(), reference
        if anchor:
            headings = render(PAGE, target.read_text()).headings
            assert anchor in {heading.anchor for heading in headings}, reference


def test_pages_that_follow_from_the_code_are_as_make_docs_writes_them(tmp_path: Path) -> None:
    for folder in ("pages", "copies"):
        (tmp_path / folder).mkdir()
    write(tmp_path, ROOT)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*")}
    docs = (ROOT / HERE).parent
    stale = [
        str(path) for path, text in made.items() if not (docs / path).exists() or (docs / path).read_text() != text
    ]
    assert stale == [], "run: make docs"


def test_every_file_of_pages_is_a_page_or_a_picture_of_one() -> None:
    files = {str(path.relative_to(ROOT)) for folder in (HERE, COPIES) for path in (ROOT / folder).iterdir()}
    pages = {f"{COPIES}/{page.name}.md" if page.copied else page.source for page in PAGES.values()}
    assert files == pages | {f"{HERE}/architecture.svg"}


def test_every_error_has_its_place() -> None:
    parts = Parts(rendered("errors"))
    assert [code for code in error_classes() if code not in parts.ids] == []


def test_every_operation_is_on_the_page_of_its_tag_with_an_example() -> None:
    told = {f"{method} {path}": operation for method, path, operation in operations(openapi_document())}
    assert examples().keys() == told.keys()
    for name, operation in told.items():
        [tag] = operation["tags"]
        assert tag in TAGS
        text = PAGES[f"api-{tag}"].read()
        method, _, path = name.partition(" ")
        assert f"## {method} `{path}`\n" in text
        assert {"```sh", "```python"} <= set(re.findall(r"```\w+", examples()[name])), name


def fences(text: str) -> list[str]:
    return re.findall(r"^```(?=\S)(.*)$", text, re.MULTILINE)


@every_page
def test_every_example_is_in_a_language_that_is_known(name: str) -> None:
    assert [one for one in fences(PAGES[name].read()) if one.split()[0] not in LANGUAGES] == []


def test_the_chinese_quick_start_has_commands_of_the_english_readme() -> None:
    readme, chinese = (ROOT / "README.md").read_text(), (ROOT / "README.zh-CN.md").read_text()
    pages = "\n".join([readme, *(page.read() for page in PAGES.values() if page.language == "en")])
    blocks = re.findall(r"```(?:sh|python).*?\n(.*?)```", chinese, re.DOTALL)
    assert len(blocks) >= 5
    lines = {line.strip() for line in pages.splitlines()}
    assert [line for block in blocks for line in block.splitlines() if line.strip() not in lines] == []
    start = re.findall(r"```(?:sh|python)\n(.*?)```", readme.partition("\n## ")[0], re.DOTALL)
    assert len(start) >= 2
    assert blocks[: len(start)] == start
    assert "README.zh-CN.md" in readme


async def test_a_page_is_served_with_a_policy_that_lets_it_load_nothing() -> None:
    async with serving() as served:
        for url in ("/docs", "/docs/architecture", "/docs/zh-CN", "/errors"):
            status, html, headers = await served.ask("GET", url)
            assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
            policy = headers["Content-Security-Policy"]
            assert policy == policy_of(html.decode())
            assert policy.startswith("default-src 'none'; style-src 'sha256-")
            assert "unsafe" not in policy
        status, problem, _ = await served.ask("GET", "/docs/nothing")
        assert (status, problem["code"]) == (404, "not_found")
        status, problem, _ = await served.ask("GET", "/v1/jobs/none")
        assert problem["type"].removeprefix("/errors#") in Parts(rendered("errors")).ids


PAGE = Page("quick-start", "Quick start", "Start", f"{HERE}/quick-start.md")


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        pytest.param("[a](events.md#kinds)", '<a href="/docs/events#kinds">a</a>', id="page"),
        pytest.param("[a](errors.md#no_vnc)", '<a href="/errors#no_vnc">a</a>', id="errors"),
        pytest.param("[a](../../../../README.zh-CN.md)", '<a href="/docs/zh-CN">a</a>', id="at the top"),
        pytest.param("[a](../../../models.py)", '<span class="file" title="in the source">a</span>', id="source"),
        pytest.param("[a](https://x.example/)", '<a href="https://x.example/" rel=noreferrer>a</a>', id="elsewhere"),
        pytest.param("[a](javascript:1)", "[a](javascript:1)", id="no script"),
        pytest.param("![a](b.png)", '<span class="file" title="a picture in the source">a</span>', id="picture"),
        pytest.param("<b>a</b>", "&lt;b&gt;a&lt;/b&gt;", id="no HTML"),
    ],
)
def test_markdown_becomes(markdown: str, html: str) -> None:
    assert render(PAGE, markdown).body.strip() == f"<p>{html}</p>"


def test_comments_are_not_shown_but_in_code() -> None:
    body = render(PAGE, "a\n\n<!-- b -->\n\n```sh\n# <!-- c -->\n```\n<!-- d -->\n").body
    assert [letter for letter in "abcd" if re.search(rf"\b{letter}\b", re.sub("<[^>]*>", "", body))] == ["a", "c"]


def test_an_example_that_no_test_runs_says_why() -> None:
    assert "Not run by the tests: needs a cloud" in render(PAGE, "```sh not-run: needs a cloud\nls\n```").body


@pytest.mark.parametrize(
    ("words", "anchor"),
    [("Who may use it?", "who-may-use-it"), ("boot_failed", "boot_failed"), ("GET /v1/envs/{env}", "get-v1envsenv")],
)
def test_anchors_are_those_of_github(words: str, anchor: str) -> None:
    assert slug(words) == anchor


def test_a_cell_knows_the_words_above_it() -> None:
    body = render(PAGE, "| a | b |\n|---|---|\n| 1 | 2 |\n\n| c |\n|---|\n| 3 |\n").body
    assert re.findall(r'<td data-label="(.)">(.)', body) == [("a", "1"), ("b", "2"), ("c", "3")]


def test_the_same_heading_twice_has_two_anchors() -> None:
    headings: Any = render(PAGE, "# a\n## b\n## b\n").headings
    assert [heading.anchor for heading in headings] == ["a", "b", "b-1"]


@pytest.mark.timeout(180)
async def test_pages_fit_a_telephone_and_a_picture_that_does_not_says_that_it_is_scrolled(tmp_path: Path) -> None:
    picture = "document.querySelector('.picture')"
    hint = f"getComputedStyle({picture}, '::before').content"
    async with serving() as served, chromium(tmp_path) as browser, browser.page(360, 740) as page:
        for name in PAGES:
            await page.open(f"{served.url}{PAGES[name].url}")
            await page.until("document.readyState === 'complete'")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        await page.open(f"{served.url}/docs")
        await page.until("document.readyState === 'complete'")
        assert await page.evaluate(f"{picture}.scrollWidth > {picture}.clientWidth")
        assert "scroll it" in await page.evaluate(hint)
        assert await page.evaluate(f"{picture}.tabIndex") == 0
        await page.evaluate(f"{picture}.scrollLeft = 1e6")
        assert await page.evaluate(f"{picture}.scrollLeft") > 300
        await page.resize(1280, 900)
        assert await page.evaluate(f"{picture}.scrollWidth <= {picture}.clientWidth")
        assert await page.evaluate(hint) == "none"
