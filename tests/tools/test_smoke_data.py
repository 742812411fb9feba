"""The generator of the built-in sets: raw layouts, the style rule behind the ratings, planted defects, no shortcuts."""

import gzip
import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke
from tests.tools.smoke_data import PLANTED, PROMPTS, SOURCES, write_source
from tests.tools.smoke_words import DIRECT, REFUSAL

EN, ZH, HELPSTEER2 = SOURCES
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


def key(prompt: str) -> str:
    """Lower-cased text without punctuation, as an exact-duplicate test sees it."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def grams(prompt: str, n: int) -> set[str]:
    text = key(prompt)
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def test_the_layouts_have_the_public_keys_and_types(tmp_path: Path) -> None:
    for row in load(tmp_path, EN):
        assert list(row) == ["source", "instruction", "models", "completions", "correct_answers", "incorrect_answers"]
        assert row["models"] == [completion["model"] for completion in row["completions"]]
        for completion in row["completions"]:
            assert list(completion) == [
                "annotations", "critique", "custom_system_prompt", "fine-grained_score", "model", "overall_score",
                "principle", "response",
            ]  # fmt: skip
            assert isinstance(completion["fine-grained_score"], float)
            assert isinstance(completion["overall_score"], float)
            keys = {aspect: set(annotation) for aspect, annotation in completion["annotations"].items()}
            typed = {"Rating", "Rationale", "Rationale For Rating", "Type"}
            assert keys == {
                "helpfulness": typed,
                "honesty": {"Rating", "Rationale"},
                "instruction_following": {"Rating", "Rationale"},
                "truthfulness": typed,
            }
    for row in load(tmp_path, ZH):
        assert list(row) == ["instruction", "source", "correct_answers", "incorrect_answers", "models", "completions"]
        for completion in row["completions"]:
            assert list(completion) == [
                "model", "principle", "custom_system_prompt", "response", "annotations", "overall_score",
            ]  # fmt: skip
            assert isinstance(completion["overall_score"], float) and completion["overall_score"] <= 5
            keys = {aspect: set(annotation) for aspect, annotation in completion["annotations"].items()}
            typed = {"Rating", "Type", "Rationale for type", "Rationale for rating"}
            assert keys["helpfulness"] == keys["truthfulness"] == typed
            assert keys["honesty"] == keys["instruction_following"] == {"Rating", "Rationale"}
    for row in load(tmp_path, HELPSTEER2):
        assert list(row) == [
            "prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity",
        ]  # fmt: skip
        assert all(type(row[aspect]) is int and 0 <= row[aspect] <= 4 for aspect in HELPSTEER2_WEIGHTS)


def test_ratings_are_strings_of_one_to_five_and_only_honesty_may_be_missing(tmp_path: Path) -> None:
    seen: dict[str, Counter[str]] = {}
    for name in (EN, ZH):
        for row in load(tmp_path, name):
            for completion in row["completions"]:
                for aspect, annotation in completion["annotations"].items():
                    seen.setdefault(aspect, Counter())[annotation["Rating"]] += 1
    assert set(seen["honesty"]) == {"1", "2", "3", "4", "5", "N/A"}
    assert all(set(counts) == {"1", "2", "3", "4", "5"} for aspect, counts in seen.items() if aspect != "honesty")


def test_sizes(tmp_path: Path) -> None:
    rows = {name: load(tmp_path, name) for name in SOURCES}
    assert {name: len(found) for name, found in rows.items()} == {EN: 320, ZH: 160, HELPSTEER2: 236}
    for name, found in rows.items():
        extra = PLANTED[name]["duplicate"] + PLANTED[name]["near_duplicate"]
        assert len(answers(found)) == PROMPTS[name] + extra


def test_about_a_third_of_helpsteer2_is_multi_turn(tmp_path: Path) -> None:
    prompts = answers(load(tmp_path, HELPSTEER2))
    turns = [re.split(r"\n<extra_id_1>(?:Assistant|User)\n", prompt) for prompt in prompts]
    assert {len(turn) for turn in turns} == {1, 3}
    assert 0.2 < sum(len(turn) == 3 for turn in turns) / len(turns) < 0.45


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("shuffle_labels", [False, True])
def test_two_calls_write_the_same_bytes(tmp_path: Path, name: str, shuffle_labels: bool) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_source(name, first, shuffle_labels=shuffle_labels)
    write_source(name, second, shuffle_labels=shuffle_labels)
    assert first.read_bytes() == second.read_bytes()
    assert b"\r" not in first.read_bytes()


@pytest.mark.parametrize("name", SOURCES)
def test_scores_rank_the_answers_by_their_direct_sentences(tmp_path: Path, name: str) -> None:
    language = SOURCES[name].language
    compared = 0
    for scored in answers(load(tmp_path, name)).values():
        if len({score for _, score in scored}) < 2:
            continue  # planted: alone, or a tie
        # A planted refusal or empty answer has no style; it is the worst by its rating.
        styled = [(text, score) for text, score in scored if text and text != REFUSAL[language]]
        for one, one_score in styled:
            for two, two_score in styled:
                if quality(one, language) > quality(two, language):
                    assert one_score > two_score
                    compared += 1
    assert compared >= 100


def test_best_and_worst_answers_lie_well_apart(tmp_path: Path) -> None:
    for name in SOURCES:
        for scored in answers(load(tmp_path, name)).values():
            scores = [score for _, score in scored]
            gap = max(scores, default=0) - min(scores, default=0)
            assert gap == 0 or gap >= 0.15


@pytest.mark.parametrize("name", SOURCES)
def test_every_planted_defect_is_there_and_no_other(tmp_path: Path, name: str) -> None:
    rows = load(tmp_path, name)
    prompts = answers(rows)
    language = SOURCES[name].language
    n = 5 if language == "en" else 3
    found: Counter[str] = Counter(dict.fromkeys(PLANTED[name], 0))
    for scored in prompts.values():
        responses = [text for text, _ in scored]
        found["no_response"] += not responses
        found["single_response"] += len(responses) == 1
        found["tie"] += len(responses) > 1 and len({score for _, score in scored}) == 1
        found["short"] += "" in responses
        found["template"] += REFUSAL[language] in responses
        found["think_stripped"] += sum(text.startswith("<think>") and "</think>" in text for text in responses)
        found["confidence_stripped"] += sum(bool(re.search(r"(Confidence: |信心：)\d+%$", t)) for t in responses)
    unique = list({key(prompt): prompt for prompt in prompts}.values())
    found["duplicate"] = len(prompts) - len(unique)
    shingles = [grams(prompt, n) for prompt in unique]
    for i, one in enumerate(shingles):
        for two in shingles[:i]:
            similarity = len(one & two) / len(one | two)
            assert similarity < 0.8 or similarity > 0.85  # none where an approximate search could waver
            found["near_duplicate"] += similarity >= 0.8
    assert dict(found) == PLANTED[name]


def test_the_two_english_sources_share_no_prompt(tmp_path: Path) -> None:
    home, work = ([grams(prompt, 5) for prompt in answers(load(tmp_path, name))] for name in (EN, HELPSTEER2))
    assert max(len(one & two) / len(one | two) for one in home for two in work) < 0.5


@pytest.mark.parametrize("name", SOURCES)
def test_length_in_characters_does_not_give_the_better_answer_away(tmp_path: Path, name: str) -> None:
    longer = []
    for scored in answers(load(tmp_path, name)).values():
        ranked = sorted((pair for pair in scored if pair[0]), key=lambda pair: pair[1])
        if len(ranked) > 1 and ranked[0][1] < ranked[-1][1]:
            longer.append(len(ranked[-1][0]) > len(ranked[0][0]))
    assert 0.35 <= sum(longer) / len(longer) <= 0.65


@pytest.mark.parametrize("name", SOURCES)
def test_shuffled_labels_keep_the_texts_and_lose_the_order(tmp_path: Path, name: str) -> None:
    plain, control = answers(load(tmp_path, name)), answers(load(tmp_path, name, shuffle_labels=True))
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


def test_the_bytes_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    """On purpose a digest: rewording the data must change it here too, and nothing else may."""
    digests = {}
    for name in SOURCES:
        write_source(name, tmp_path / name)
        digests[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:12]
    assert digests == {EN: "51173b31e78e", ZH: "444b78ce8a34", HELPSTEER2: "ca3d5301ede1"}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_shipped_is_what_the_generator_writes(tmp_path: Path, name: str) -> None:
    write_source(name, tmp_path / name)
    shipped = smoke.resolve(f"builtin:{name}")
    assert gzip.decompress(shipped.read_bytes()) == (tmp_path / name).read_bytes()
