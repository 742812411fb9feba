"""Text from outside in Markdown, in HTML and on a terminal: shown as it stands, whatever it looks like."""

from __future__ import annotations

import html
import re

import pytest
from dpo_cli.page import to_html
from dpo_cli.show import escaped, fenced, table
from dpo_cli.terminal import print_markdown

TEXTS = (
    "请用三句话解释“偏好对齐”。",
    "</td><script>alert(1)</script> &amp; <b>bold</b>",
    "a | b || c",
    "*stars* _under_ snake_case __init__ ~~gone~~ `tick` ``` $x$",
    "[link](javascript:alert(1)) ![image](http://x.y/z.png) <http://x.y> http://x.y",
    "# a heading", "- an item", "1. first", "> a quote", "---", "+ x", "back\\slash \\* \\|", "[b]bold[/b] :x: {{ 1 }}",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_shown_as_it_stands(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no text is wrapped
    markdown = f"{table(['name', text], [[text, '1'], ['x', text]])}\n\n{escaped(text)}"
    page = to_html(markdown)
    assert set(re.findall(r"</?([a-z]+)", page)) == {"div", "table", "thead", "tbody", "tr", "th", "td", "p"}
    shown = [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall("<(?:th|td|p)[ >].*", page)]
    assert shown.count(text) == 4
    print_markdown(markdown)
    assert "".join(capsys.readouterr().out.split()).count("".join(text.split())) == 4


@pytest.mark.parametrize("text", ["```\nx\n```", "````", "~~~", "plain", "</pre><script>"])
def test_a_block_holds_any_text(text: str) -> None:
    page = to_html(fenced(text))
    [inside] = re.findall(r"<pre><code[^>]*>(.*)\n</code></pre>", page, re.DOTALL)
    assert html.unescape(inside) == text and "<script" not in page
