"""The report: all of metrics.json and nothing else, in one page that needs no network and breaks on no text."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.evaluate import charts, words
from dpo_cli.evaluate.evaluate import Scores, figures
from dpo_cli.evaluate.pairs import Scored, by_name, pair_metrics
from dpo_cli.evaluate.report import print_report, write_report
from dpo_cli.evaluate.samples import Sample
from dpo_cli.evaluate.tables import ROWS
from dpo_cli.evaluate.verdict import verdict, warnings
from dpo_cli.inference import Answer
from dpo_cli.judging import Judgment
from dpo_cli.page import to_html
from dpo_cli.recipe.sections import Eval
from dpo_cli.records import Message
from dpo_cli.show import NATS, RATIO, SHARE, Unit, shorten, show_figure
from dpo_cli.stats import Figure
from markdown_it import MarkdownIt
from rich.cells import cell_len

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
NASTY = "</pre><script>alert(1)</script> & <b>bold</b> | *stars* _under_ `tick` ``` ~~~~ 🦜 ’quoted’ “too” \u202e"
CHINESE = "请用三句话解释“偏好对齐”是什么，并举一个例子。\n```python\nprint('你好')\n```"
RECIPE = """name: a-run
model:
  id: Qwen/Qwen3-1.7B
  thinking: false
data:
  sources:
    - id: 中文/数据
"""


def figure(value: float | None, low: float | None, high: float | None, n: int) -> Figure:
    return Figure(value=value, low=low, high=high, n=n)


def example_metrics(
    samples: bool = True, judge: bool = True, languages: tuple[str, ...] = ("en", "zh")
) -> dict[str, Any]:
    """A metrics.json with much in it that is awkward to show; figures are of random pairs, answers and judgments."""
    rng = random.Random(0)
    sources = ("helpsteer2", "ultrafeedback-zh", "a source | of <many> words, 中文数据集" * 2)

    def pair(number: int) -> Scored:
        reference = -rng.uniform(20, 60), -rng.uniform(20, 60)
        policy = reference[0] + rng.gauss(1.2, 2), reference[1] + rng.gauss(-0.8, 2)
        lengths = rng.randint(5, 60), rng.randint(5, 60)
        of = languages[number % len(languages)], sources[number % len(sources)]
        return Scored(f"p{number}", *of, *lengths, *policy, *reference, f"prompt {number}")

    def answer(language: str) -> Answer:
        text = "好的，先这样做。" if language == "zh" else "Do it like this."
        return Answer(text, rng.choices(range(90), k=rng.randint(5, 60)), rng.random() < 0.9)

    def judgment(name: str, number: int) -> Judgment:
        return Judgment(name, None if number < 3 else rng.choice((0, 0.25, 0.5, 0.75, 1)))

    pairs, server = (
        [pair(number) for number in range(300)],
        "{kind: openai, base_url: 'http://x/v1', model: 'judge-<1>'}",
    )
    loaded = recipe.load(SMOKE, [f"eval.judge={server if judge and samples else 'null'}", "eval.prompts=200"])
    asked = pairs[:200] if samples else []
    answered = [
        Sample(one.id, one.language, one.source, QUESTION, answer(one.language), answer(one.language), rng.random())
        for one in asked
    ]
    judged = [judgment(one.id, number) for number, one in enumerate(answered)]
    no_audit: dict[str, Any] = {"length": {"languages": {}}, "shortcuts": {"markdown": SHORTCUT}}
    found = figures(loaded, no_audit, Scores(pairs, [], pairs, []), answered, judged, judged[:50])
    how = loaded.train.reward_scale, loaded.seed
    rising = [0.5 + 0.01 * step for step in range(20)]
    metrics: dict[str, Any] = found | {
        "name": "a-very-long-name-of-a-recipe-that-remembers-all-its-settings-lr1e-5-beta0.1-r32-qwen3-1.7b-zh",
        "curves": [
            {"key": key, "points": [[5 * s, None if s == 3 else scale * v] for s, v in enumerate(rising)]}
            for key, scale in (("loss", 0.9), ("rewards/rejected", -1), ("rewards/margins", 2), ("logps/chosen", -400))
        ],
        "examples": [shown(kind, *one) for kind in ("changed", "random") for one in enumerate(TEXTS) if samples],
        "data": {
            "pairs": {"train": 7123, "eval": 300},
            "came": 9120,
            "kept": 7423,
            "warnings": [NASTY],
            "report": "### Funnel\n\n| prompts | all |\n| --- | ---: |\n| tie | -1,577 |",
        },
        "about": {
            "model": "Qwen/Qwen3-1.7B", "method": "dpo", "date": "2026-11-29", "device": "NVIDIA L4", "seconds": 11_100,
        },
        "report_language": "en",
        "environment": {"python": "3.11", "torch": "2.13", "device": "NVIDIA L4", "backend": "hf", "unsloth": None},
        "recipe": RECIPE,
        "sampling": {"prompts": 200, "max_new_tokens": 512, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 42}
        if samples
        else None,
        "sets": {
            name: {
                "in": n + 4, "kept": n, "dropped": {"tie": 3, "too_long": 1}, "overlap": n // 40,
                "pairs": pair_metrics(pairs[:n], *how), "languages": {},
                "subsets": by_name(pairs[:n], [f"{kind} | *x*" for kind in ("安全", "chat")] * (n // 2), *how),
            }
            for name, n in {"reward-bench": 200, "中文 | 测试集 :x:": 30}.items()
        } if samples else {},
    }  # fmt: skip
    said = [*warnings(metrics), *(f"data: {one}" for one in metrics["data"]["warnings"])]
    return {**metrics, "verdict": verdict(metrics), "warnings": said}


QUESTION: list[Message] = [{"role": "user", "content": "How?"}]
SHORTCUT = figure(0.62, 0.58, 0.66, 7123)
TEXTS = [
    (CHINESE, "好的。" * 300),
    (NASTY, ""),
    (" ".join(f"word{number}" for number in range(3000)), NASTY * 3),
    ("plain", "x" * 5000),
    ("# no heading", "ok\n\n- a\n- b"),
]


def shown(kind: str, number: int, texts: tuple[str, str]) -> dict[str, Any]:
    """An example as `summary.examples` has it."""
    turns = ("system", "Be brief. <system>"), ("assistant", "About **tea**?"), ("user", f"{CHINESE} {NASTY} {number}")
    return {
        "kind": kind,
        "id": f"{kind}-{number}",
        "language": "en",
        "prompt": [{"role": role, "content": text} for role, text in turns],
        "score": 1.0 if kind == "changed" else None,
        "answers": {
            name: {"text": text, "tokens": len(text) // 4, "finished": number != 2, "score": None}
            for name, text in zip(("base", "tuned"), texts, strict=True)
        },
    }


# ------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """A page read strictly: every element closed in order; what it says, by element, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[tuple[int, str]] = []
        self.filled: list[bool] = []  # whether something stands under the heading
        self.text = ""
        self.style = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag in ("h1", "h2", "h3"):
            if self.filled and int(tag[1]) > self.headings[-1][0]:
                self.filled[-1] = True  # by what is below a heading of its own
            self.headings.append((int(tag[1]), ""))
            self.filled.append(False)
        elif self.filled and tag in ("p", "table", "svg", "pre", "details", "ul", "div"):
            self.filled[-1] = True
        if tag not in ("meta", "link", "br", "img", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            level, title = self.headings[-1]
            self.headings[-1] = (level, title + data)


def write(metrics: dict[str, Any], folder: Path) -> tuple[str, str]:
    """(report.html, report.md)"""
    folder.mkdir(exist_ok=True)
    write_report(metrics, folder)
    return (folder / "report.html").read_text("utf-8"), (folder / "report.md").read_text("utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """(metrics, report.html, report.md) of all there can be."""
    metrics = example_metrics()
    return metrics, *write(metrics, tmp_path_factory.mktemp("full"))


def blocks(markdown: str) -> tuple[list[str], list[str]]:
    """(the lines outside of fenced blocks, what each block holds), as CommonMark reads them."""
    fences = [token for token in MarkdownIt("commonmark").parse(markdown) if token.type == "fence"]
    taken = {line for token in fences for line in range(*(token.map or ()))}
    outside = [line for number, line in enumerate(markdown.splitlines()) if number not in taken]
    return outside, [token.content for token in fences]


def said(metrics: dict[str, Any]) -> set[str]:
    """Each figure of the tables as a reader sees it, for all and by language, with its interval."""
    found = set()
    groups = [metrics, *metrics["languages"].values()]
    for part, rows in ROWS.items():
        for some in (group[part] for group in groups if group[part]):
            for row in rows:
                if row.compared:
                    found |= {row.sides(some), show_figure(some[f"{row.key}_change"], row.unit.change)}
                elif some.get(row.key):
                    found.add(show_figure(some[row.key], row.unit))
    return found


def test_the_page_is_one_file_that_loads_and_runs_nothing(full: Any) -> None:
    page = Page(full[1])
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [one for one in page.attributes if one[1] in ("src", "href", "srcset", "action") or one[1][:2] == "on"]
    assert not re.search(r"url\(|@import|https?:", page.style)
    assert full[1].startswith("<!doctype html>")


def test_both_reports_hold_every_figure(full: Any) -> None:
    metrics, html, markdown = full
    text = Page(html).text
    for one in said(metrics):
        assert one in text and one in markdown
    for curve in metrics["curves"]:
        assert words.say(f"curve_{curve['key']}") in text
    for name, one in metrics["languages"].items():
        accuracy, longer = one["pairs"]["reward_accuracy"], one["pairs"]["longer_wins"]
        bets = f"{show_figure(accuracy)} | {show_figure(longer, interval=False)} |"
        assert f"| {name}, n = {accuracy['n']:,} | {bets}" in markdown
    assert f"| {words.say('bet_longer')} | {show_figure(metrics['pairs']['longer_wins'])} |" in markdown
    for one in metrics["sets"].values():
        assert f"{one['overlap']} of them in the training data" in markdown


def test_each_group_opens_with_a_sentence_of_what_it_says(full: Any) -> None:
    _, html, markdown = full
    for sentence in (
        "held-out prompts moved towards the chosen answer", "nats a token", "of them repeat themselves",
        "with length taken out", "7,423 of 9,120 prompts that were read passed the filters",
    ):  # fmt: skip
        assert sentence in markdown and sentence in html
    assert "The loss went from 0.45 to" in html
    assert len(re.findall(r'<h2[^>]*>[^<]*</h2>\s*<p class="note">', html)) >= 7


def test_what_a_model_wrote_stays_text(full: Any) -> None:
    metrics, html, markdown = full
    text, (outside, inside) = Page(html).text, blocks(markdown)
    for one in metrics["examples"]:
        answers = [answer["text"] for answer in one["answers"].values()]
        for wrote in (*answers, *(turn["content"] for turn in one["prompt"])):
            assert wrote in text
            assert any(wrote[:500].rstrip() in block for block in inside)
    assert "an empty answer" in text and "cut off" in text
    assert re.search(r"^tuned, \d+ tokens, cut off:$", markdown, re.M)
    assert all(warning in text for warning in metrics["warnings"])
    assert not any("<script" in line and "\\<script" not in line for line in outside)
    assert "<b>" not in to_html("<b>bold</b>"), "whoever forgets to escape it"
    headings = [line for line in outside if line.startswith("#")]
    assert headings[0].startswith("# a-very-long-name") and "# no heading" not in headings
    assert headings[-4:] == ["## Data", "### Funnel", "## How it was made", "## Recipe"]


def test_a_table_in_markdown_keeps_its_columns_whatever_a_source_is_called(full: Any) -> None:
    outside, _ = blocks(full[2])
    width = None
    for line in outside:
        columns = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or columns is None or columns == width
        width = columns
    assert any("a source \\| of \\<many>" in line for line in outside)


@pytest.mark.parametrize("languages", [("en",), ("en", "zh", "de", "fr", "ja")])
def test_without_samples_and_judge_nothing_is_left_of_them(
    tmp_path: Path, languages: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = example_metrics(samples=False, languages=languages)
    html, markdown = write(metrics, tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    print_report(tmp_path)
    printed = capsys.readouterr().out.replace(str(tmp_path), "")
    assert "held-out pairs" in printed and "sampled answers" not in printed and "judge" not in printed.lower()
    page = Page(html)
    titles = [title for _, title in page.headings]
    assert all(page.filled), [title for title, some in zip(titles, page.filled, strict=True) if not some]
    assert [title for level, title in page.headings if level == 2] == [
        "Held-out pairs", "Held-out answers", "Reward accuracy", "Margins and training",
        "Data", "How it was made", "Recipe",
    ]  # fmt: skip
    for word in ("Win rate", "KL to base", "None", "the judge", "at random"):
        assert word not in page.text
        assert word not in markdown


@pytest.mark.parametrize(
    ("wanted", "spoken", "found"), [(None, "zze", "zh"), (None, "zef", "en"), ("en", "zz", "en"), ("zh", "ee", "zh")]
)
def test_the_page_speaks_the_language_of_most_prompts_unless_set(wanted: Any, spoken: str, found: str) -> None:
    names = {"z": "zh", "e": "en", "f": "fr"}
    assert words.language(Eval(report_language=wanted), [names[one] for one in spoken]) == found


def test_a_chinese_page_is_chinese_in_every_table_chart_and_sentence(full: Any, tmp_path: Path) -> None:
    """But for what is English in any language: answers and prompts, the recipe, the data report, and names."""
    html, markdown = write(full[0] | {"report_language": "zh"}, tmp_path)
    page, kind = Page(html), full[0]["verdict"]["kind"]
    assert ("html", "lang", "zh") in page.attributes
    assert all(level != 2 or re.search("[\u4e00-\u9fff]", title) for level, title in page.headings)
    for text in (words.say(kind, "zh"), words.say(f"{kind}_means", "zh"), verdict(full[0], "zh")["sentence"]):
        assert text in page.text
    assert "训练 7,123 条，留出 300 条" in page.text
    assert markdown == full[2], "the model card takes its parts of report.md by their names"
    heads = re.findall(r"<th [^>]*>(.*?)</th>", html)
    first = re.findall(r"<tr>\s*<td>(.*?)</td>", html)
    notes = re.findall(r'<p class="(?:note|lead)">(.*?)</p>', html, re.DOTALL)
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', html)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    warned = re.findall(r"<li>(.*?)</li>", html[: html.index("<h2>")])
    names = {"n", "AUROC", "Distinct-2", "prompts", "tie", "all", "chat | *x*"}
    names |= {*full[0]["sets"], *full[0]["languages"], *full[0]["sources"]}
    for one in (*heads, *first, *notes, *labels, *captions, *warned):
        said = re.sub(r", n = [\d,]+$", "", unescape(one))
        named = any(name.startswith(said.removesuffix("…")) for name in names)
        assert named or re.search("[\u4e00-\u9fff]", said), one
        assert not re.search(r"\d%? to [+−\d]", said)
    assert len(notes) > 5 and len(labels) > 6 and warned


def test_both_languages_are_whole() -> None:
    for key, both in words.WORDS.items():
        assert len(both) == 2 and all(one.strip() for one in both), key
        holes = [sorted(name for _, name, _, _ in Formatter().parse(one) if name) for one in both]
        assert holes[0] == holes[1], key


def test_no_path_of_this_machine_is_published(full: Any, tmp_path: Path) -> None:
    home = "/home/someone/work"
    metrics = full[0] | {
        "warnings": [f"data: {home}/pairs.jsonl is odd"],
        "data": full[0]["data"] | {"warnings": [f"{home}/pairs.jsonl is odd"]},
        "about": full[0]["about"] | {"model": f"{home}/models/mine"},
        "judge": full[0]["judge"] | {"model": f"{home}/judges/one"},
    }
    for text in write(metrics, tmp_path):
        assert "someone" not in text and "pairs.jsonl is odd" in text


def test_held_out_curves_stand_beside_those_of_training(full: Any, tmp_path: Path) -> None:
    held = {"key": "loss", "points": [[1, 0.7], [9, 0.3]], "held_out": [[5, 0.6], [9, 0.5]]}
    html, _ = write(full[0] | {"curves": [held]}, tmp_path)
    assert "from 0.7 to 0.3; held out from 0.6 to 0.5" in html and 'class="line held" points=' in html
    assert "key line held" in html and "key line held" not in full[1].split("<main>")[1]


def test_the_page_reads_well_to_who_cannot_see_it(full: Any) -> None:
    page = Page(full[1])
    charts = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(charts) == page.tags.count("svg") and all(charts)
    assert any("zh, n = 150: " in label for label in charts)
    assert page.tags.count("th") == sum(tag == "th" and name == "scope" for tag, name, _ in page.attributes)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and all(later - level <= 1 for level, later in pairwise(levels))


def test_the_reports_come_from_the_file_alone_with_a_column_a_language(full: Any, tmp_path: Path) -> None:
    again = json.loads(json.dumps(full[0]))
    assert write(again, tmp_path) == full[1:]
    assert "| held-out pairs | all, n = 300 | en, n = 150 | zh, n = 150 | what it says |" in full[2]
    again["languages"].pop("zh")
    assert "| held-out pairs | all, n = 300 | what it says |" in write(again, tmp_path)[1]


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_nothing_is_wider_than_the_screen(full: Any, tmp_path: Path) -> None:
    frame = "<iframe width='{0}' height='800' srcdoc='{1}'></iframe>"
    page = full[1].replace("&", "&amp;").replace("'", "&#39;")
    script = (
        "onload = () => document.body.replaceChildren('widths ' + [...document.querySelectorAll('iframe')]"
        ".map(one => one.contentDocument.documentElement.scrollWidth).join(' '))"
    )
    frames = "".join(frame.format(width, page) for width in (390, 1280))
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}<script>{script}</script>", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    widths = re.search(r"widths (\d+) (\d+)", done.stdout)
    assert widths, done.stderr
    assert int(widths[1]) <= 390 and int(widths[2]) <= 1280


# ------------------------------------------------------------------------------------------- numbers and the rest


@pytest.mark.parametrize(
    ("figure", "unit", "shown"),
    [
        (figure(0.984, 0.942, 0.996, 120), SHARE, "98% (94–100)"),
        (figure(0.9784, 0.9712, 0.9836, 9000), SHARE, "97.8% (97.1–98.4)"),
        (figure(0.56, 0.503, 0.62, 250), SHARE, "56.0% (50.3–62.0)"),
        (figure(0.042, 0.002, 0.082, 120), SHARE.change, "+4.2 pp (+0.2 to +8.2)"),
        (figure(-0.001, -0.75, 0.25, 120), NATS, "+0.0 (−0.8 to +0.2)"),
        (figure(1.031, 1.002, 1.06, 120), RATIO, "×1.031 (1.002–1.060)"),
        (figure(312.4, 290.0, 333.0, 90), Unit(1), "312 (290–333)"),
        (figure(0.0, 0.0, 0.0, 90), SHARE.change, "+0.0 pp (+0.0 to +0.0)"),
        (figure(1234.5, None, None, 1), Unit(1), "1,234.5"),
        (figure(None, None, None, 0), SHARE, "–"),
    ],
)
def test_a_figure_is_written_with_its_unit_and_interval(figure: Any, unit: Unit, shown: str) -> None:
    assert show_figure(figure, unit) == shown


def test_a_judge_that_gave_no_verdict_has_no_shares(full: Any, tmp_path: Path) -> None:
    nothing = dict.fromkeys((row.key for row in ROWS["judge"]), figure(None, None, None, 0))
    silent = full[0]["judge"] | nothing | {"judged": 0, "failures": 200}
    html, markdown = write(full[0] | {"judge": silent}, tmp_path)
    for text in (Page(html).text, markdown):
        assert "0 of 200 prompts judged." in text and "Won | 0%" not in text


def test_bars_left_of_zero_are_marked_wrong() -> None:
    drawn = charts.histogram([-1.0, -0.5, 0.0, 0.5, 1.0], [1, 2, 3, 4], 7)
    assert re.findall(r'rect class="([^"]+)"', drawn) == ["bar wrong", "bar wrong", "bar", "bar"]
    assert "10 held-out pairs, 7 of them above 0" in drawn
    assert charts.histogram([0.0, 0.0], [0], 0) == ""


def test_a_chart_of_shares_puts_them_where_they_belong() -> None:
    rival = figure(0.5, None, None, 9)
    rows = [charts.Dot(str(value), figure(value, None, None, 9), rival) for value in (0.5, 0.2, 0.9)]
    low, high = charts.scale(rows)
    assert (low, high) == (0.2, 0.9)
    assert charts.scale([charts.Dot("far", figure(0.5, 0.4, 0.6, 9), figure(0.93, None, None, 9))]) == (0.4, 1.0)
    drawn = charts.dots(rows, low, high, "shares")
    half, left, right = (float(x) for x in re.findall(r'circle class="dot" cx="([\d.]+)"', drawn))
    assert left < half < right
    assert {float(x) for x in re.findall(r'line class="mark" x1="([\d.]+)"', drawn)} == {half}
    assert {float(x) for x in re.findall(r'class="rival" d="M([\d.]+) ', drawn)} == {half}


def test_a_curve_leaves_out_what_is_no_number() -> None:
    assert charts.curve([(1, float("nan")), (2, None), (3, 0.5)], "loss") == ""
    assert charts.curve([(1, 0.7), (2, float("nan")), (3, 0.5)], "loss").count(",") == 2
    assert "nan" not in charts.curve([(1, 0.5), (2, 0.5)], "loss")


@pytest.mark.parametrize(
    ("text", "columns", "cut"), [("source", 6, "source"), ("sources", 6, "sourc…"), ("中文数据", 6, "中文…")]
)
def test_a_long_name_is_cut_by_the_columns_it_takes(text: str, columns: int, cut: str) -> None:
    assert shorten(text, columns) == cut


@pytest.mark.parametrize(
    "languages", [("en",), ("en", "[/b]"), ("en", "zh", "[/b]"), ("en", "zh", "de", "[/b]", ":x:")]
)
def test_the_terminal_shows_it_in_80_columns(
    languages: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)  # a path is never broken, however long
    metrics = example_metrics(languages=languages)
    folder = Path("runs/mine/eval")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    print_report(folder)
    printed = capsys.readouterr().out
    assert max(cell_len(line) for line in printed.splitlines() if not line.startswith("report: ")) <= 80
    assert "…" not in re.sub(r"^… ", "", printed, flags=re.M), "a cell was cut"
    lines = {line.strip().split("  ")[0]: line for line in printed.splitlines()}
    assert show_figure(metrics["pairs"]["reward_accuracy"]) in lines["Reward accuracy"]
    assert show_figure(metrics["samples"]["truncated_tuned"], interval=False) in lines["Cut off"]
    assert show_figure(metrics["samples"]["truncated_change"], SHARE.change) in printed
    assert show_figure(metrics["judge"]["win_rate"]) in lines["Win rate"]
    for name in languages if len(languages) > 1 else ():
        assert name in printed, "neither markup nor an emoji"
        assert show_figure(metrics["languages"][name]["pairs"]["reward_accuracy"], interval=False) in printed
    flowing = " ".join(printed.split())
    last = ("warning: 3 of 200", "1 remark of prepare on the data", metrics["verdict"]["sentence"], "report: ")
    assert [flowing.index(one) for one in last] == sorted(flowing.index(one) for one in last)
    assert "alert(1)" not in printed, "prepare has printed its remarks already"
