"""The HTML pages: one self-contained frame, no network, no scripts, light and dark, for a phone and a desk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt


def to_html(markdown: str) -> str:
    """Render Markdown; HTML in it stays text. Wide tables scroll by themselves."""
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    region = '<div class="scroll" role="region" tabindex="0" aria-label="table"><table>'
    framed = page.replace("<table>", region).replace("</table>", "</table></div>")  # no text holds a bare < in HTML
    return re.sub("<th(?=[ >])", '<th scope="col"', framed)


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package that extends `page.html.jinja`; values are text, not HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values, to_html=to_html)


def markdown_page(name: str, markdown: str, language: str = "en") -> str:
    """Frame a whole Markdown report, which has a title of its own."""
    return render("page.html.jinja", name=name, markdown=markdown, page_language=language)
