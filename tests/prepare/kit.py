"""What the tests of `prepare` share: rows in raw layouts, and `prepare` run on them through real files."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare.pipeline import Prepared, prepare
from dpo_cli.recipe import Recipe

Row = dict[str, Any]

ENGLISH = """
    amber basket candle dragon engine falcon garden harbour island jungle kettle ladder marble needle orchid pepper
    quarry ribbon saddle tunnel umbrella velvet window yellow zipper anchor bridge copper desert feather
"""
WORDS = {
    "en": ENGLISH.split(),
    "zh": list("春夏秋冬山水风云花草树木日月星辰江河湖海金银铜铁东西南北城楼桥路书画琴棋茶酒饭菜车船马牛"),
}


def sentence(seed: object, language: str = "en", words: int = 14) -> str:
    """A sentence of random words, the same for the same seed and unlike those of others."""
    rng = random.Random(repr((seed, language)))
    if language == "zh":
        return "".join(rng.choices(WORDS["zh"], k=2 * words)) + "。"
    return " ".join(rng.choices(WORDS["en"], k=words)).capitalize() + "."


ASKED = "Name two uses of baking soda and explain one of them."
GOOD = "It cleans pans and lifts batter: heated with an acid it gives off gas."
BAD = "Baking soda is used for a great many different things."


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def answer(text: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def ultrafeedback(prompt: str, answers: Sequence[str], ratings: Sequence[Any], **more: Any) -> Row:
    """A row in openbmb/UltraFeedback's layout; a rating is one value for all four aspects, or a map of them."""
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "source": "evol_instruct", "instruction": prompt, "models": [], "correct_answers": ["None"],
        "completions": [
            {
                "annotations": {
                    aspect: {"Rating": rating[aspect] if isinstance(rating, dict) else rating, "Rationale": "Why."}
                    for aspect in aspects
                },
                "critique": "Fine.", "model": f"model-{number}", "overall_score": 7.0, "response": answer,
            }
            for number, (answer, rating) in enumerate(zip(answers, ratings, strict=True))
        ],
        **more,
    }  # fmt: skip


def plain(seed: object, language: str = "en", ratings: Sequence[Any] = ("5", "4", "2", "1")) -> Row:
    """A clean UltraFeedback row."""
    answers = [sentence((seed, number), language, 20) for number in range(len(ratings))]
    return ultrafeedback(sentence((seed, "asked"), language), answers, ratings)


def helpsteer2(prompt: str, response: str, rating: int, **ratings: Any) -> Row:
    metrics = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict.fromkeys(metrics, rating), **ratings}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSONL; text is escaped, so that lone surrogates can be written too."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(sources: Sequence[Row], **data: Any) -> Recipe:
    """A recipe without a token filter, quotas or languages, unless `data` says otherwise."""
    filters = {"too_long": False, **data.pop("filters", {})}
    model = data.pop("model", {"id": "builtin:tiny-qwen3"})
    seed = data.pop("seed", 42)
    values = {"total": None, "languages": None, "sources": list(sources), "filters": filters, **data}
    return Recipe.model_validate({"name": "test", "seed": seed, "model": model, "data": values})


def pair(seed: object, language: str = "en", words: int = 14, **more: Any) -> Row:
    """A clean row of plain pairs."""
    texts = {name: sentence((seed, name), language, 20) for name in ("chosen", "rejected")}
    return {"prompt": sentence((seed, "q"), language, words), **texts, **more}


@dataclass
class Made:
    """What `prepare` wrote, read back."""

    report: Row
    train: list[Row]
    held: list[Row]
    folder: Path
    prepared: Prepared

    @property
    def rows(self) -> list[Row]:
        return self.train + self.held

    def source(self, name: str = "rows") -> Row:
        return dict(self.report["sources"][name])

    def dropped(self, name: str = "rows") -> dict[str, int]:
        return dict(self.source(name)["dropped"])

    def detail(self, reason: str) -> str:
        return str(self.report["examples"]["dropped"][reason][0]["detail"])

    def warnings(self, part: str) -> list[str]:
        return [one for one in self.report["warnings"] if part in one]

    def funnel_holds(self) -> bool:
        return all(one["in"] == one["kept"] + sum(one["dropped"].values()) for one in self.report["sources"].values())


def read_jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run(made: Recipe, folder: Path) -> Made:
    folder.mkdir(parents=True)
    prepared = prepare(made, folder, quiet=True)
    return Made(
        json.loads((folder / "report.json").read_text(encoding="utf-8")),
        read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "eval.jsonl"), folder, prepared,
    )  # fmt: skip


def run_file(path: Path, **data: Any) -> Made:
    """`prepare` on one file or folder, beside which it writes."""
    return run(recipe([{"id": str(path)}], **data), path.with_name("out"))


def run_rows(rows: Sequence[Any], source: Row | None = None, **data: Any) -> Made:
    """`prepare` on one source called `rows`, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder, "rows.jsonl"), rows)
        return run(recipe([{"id": str(path), **(source or {})}], **data), Path(folder, "out"))


def only(row: Any, source: Row | None = None, **data: Any) -> Row:
    """What a lone row is written as."""
    [written] = run_rows([row], source, eval_fraction=1e-9, **data).train
    return written


def refused(rows: Sequence[Any], source: Row | None = None, **data: Any) -> DpoError:
    """The error that `prepare` ends with on these rows."""
    with pytest.raises(DpoError) as caught:
        run_rows(rows, source, **data)
    return caught.value
