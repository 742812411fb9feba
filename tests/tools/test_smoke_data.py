"""The generator of the built-in sets: the style rule behind the ratings, no shortcuts, and what is shipped.

What is planted in them `prepare` finds, in tests/prepare/test_prepare.py.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke
from tests.tools.smoke_data import SOURCES, write_source
from tests.tools.smoke_words import DIRECT, REFUSAL
from transformers import AutoTokenizer

Answers = dict[str, list[tuple[str, float]]]  # prompt -> (response, score in 0..1) of each answer
HELPSTEER2_WEIGHTS = {"correctness": 0.4, "helpfulness": 0.3, "coherence": 0.2, "complexity": 0.05, "verbosity": 0.05}


def load(folder: Path, name: str, *, shuffle_labels: bool = False) -> list[dict[str, Any]]:
    path = folder / f"{name}-{shuffle_labels}.jsonl"
    write_source(name, path, shuffle_labels=shuffle_labels)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unit(rating: str) -> float | None:
    return None if rating == "N/A" else (int(rating) - 1) / 4


def ultrafeedback_score(annotations: dict[str, Any]) -> float:
    ratings = {aspect: unit(annotation["Rating"]) for aspect, annotation in annotations.items()}
    correctness = [value for value in (ratings["honesty"], ratings["truthfulness"]) if value is not None]
    helpfulness, following = ratings["helpfulness"], ratings["instruction_following"]
    assert helpfulness is not None and following is not None
    return round((0.4 * sum(correctness) / len(correctness) + 0.3 * helpfulness + 0.2 * following) / 0.9, 6)


def answers(rows: list[dict[str, Any]]) -> Answers:
    grouped: Answers = {}
    for row in rows:
        if "completions" in row:
            grouped[row["instruction"]] = [
                (completion["response"], ultrafeedback_score(completion["annotations"]))
                for completion in row["completions"]
            ]
        else:
            score = sum(weight * row[aspect] / 4 for aspect, weight in HELPSTEER2_WEIGHTS.items())
            grouped.setdefault(row["prompt"], []).append((row["response"], round(score, 6)))
    return grouped


def quality(response: str, language: str) -> int:
    """Direct sentences in an answer, found by the words before and after the slot."""
    frames = [tuple(re.split(r"{\w+}", wording)) for position in DIRECT[language] for wording in position]
    patterns = [re.escape(before) + "[^.。]+" + re.escape(after) for before, after in frames]
    return sum(len(re.findall(pattern, response)) for pattern in patterns)


@pytest.mark.parametrize("name", SOURCES)
def test_scores_rank_the_answers_by_their_direct_sentences_and_not_by_their_length(tmp_path: Path, name: str) -> None:
    language, encode = SOURCES[name].language, AutoTokenizer.from_pretrained(smoke.resolve("builtin:tiny-qwen3")).encode
    compared, characters, tokens, lengths = 0, list[int](), list[int](), list[int]()
    for scored in answers(load(tmp_path, name)).values():
        scores = [score for _, score in scored]
        gap = max(scores, default=0) - min(scores, default=0)
        if not gap:
            continue  # planted: alone, or a tie
        assert gap >= 0.15
        ranked = sorted((pair for pair in scored if pair[0]), key=lambda pair: pair[1])
        if len(ranked) > 1 and ranked[0][1] < ranked[-1][1]:
            worst, best = ranked[0][0], ranked[-1][0]
            characters.append(len(best) - len(worst))
            lengths += [len(encode(best)), len(encode(worst))]
            tokens.append(lengths[-2] - lengths[-1])
        # A planted refusal or empty answer has no style; it is the worst by its rating.
        styled = [(quality(text, language), score) for text, score in scored if text and text != REFUSAL[language]]
        better = [one_score > score for one, one_score in styled for other, score in styled if one > other]
        assert all(better)
        compared += len(better)
    assert compared >= 100
    assert 0.35 <= sum(more > 0 for more in characters) / len(characters) <= 0.65
    longer, ties = (sum(found) / len(tokens) for found in zip(*((more > 0, more == 0) for more in tokens), strict=True))
    assert 0.40 <= longer <= 0.60 and 0.40 <= longer + ties / 2 <= 0.60
    lengths.sort()
    assert lengths[len(lengths) // 10] >= 20 and lengths[len(lengths) * 9 // 10] <= 60


@pytest.mark.parametrize("name", SOURCES)
def test_shuffled_labels_keep_the_texts_and_lose_the_order(tmp_path: Path, name: str) -> None:
    plain, control = answers(load(tmp_path, name)), answers(load(tmp_path, name, shuffle_labels=True))
    assert control == answers(load(tmp_path, name, shuffle_labels=True))
    assert {p: [text for text, _ in scored] for p, scored in plain.items()} == {
        p: [text for text, _ in scored] for p, scored in control.items()
    }
    agree = []
    for prompt, scored in plain.items():
        scores = [score for _, score in scored]
        if len(set(scores)) > 1:
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            agree.append(control[prompt][best][1] > control[prompt][worst][1])
    assert 0.35 < sum(agree) / len(agree) < 0.65


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_shipped_is_what_the_generator_writes_to_the_byte(tmp_path: Path, name: str) -> None:
    write_source(name, tmp_path / name)
    assert gzip.decompress(smoke.resolve(f"builtin:{name}").read_bytes()) == (tmp_path / name).read_bytes()
