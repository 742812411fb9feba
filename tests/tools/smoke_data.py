"""Small preference sets that a tiny model can learn: UltraFeedback (en, zh) and HelpSteer2 in their raw layouts.

Every answer has three sentences. Its quality is the number of *direct* ones (0..3); the others *hedge*.
Ratings follow quality on each set's own scale, so the right normalisation finds the right winner, and a
model that has learnt the style ranks the answers to prompts it never saw. Both styles are worded to the
same length, so that length gives nothing away. Standard library only; the same bytes on every machine.

    python -m tests.tools.smoke_data     writes the files that dpo_cli/smoke ships
"""

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.tools import smoke_words as words

Row = dict[str, Any]

# Defects put into each source on purpose, so that `prepare` has a funnel to show: source -> kind -> count.
# Kinds carry the name of the drop reason or edit that answers them, and no prompt has two.
#   duplicate, near_duplicate      extra prompts: another's wording with other punctuation / with a "thank you"
#   no_response, single_response   no answer at all / only one
#   tie                            all answers rated alike
#   short, template                the worst answer is empty / a canned refusal: the prompt survives with three
#                                  answers in UltraFeedback, and is lost in HelpSteer2, which has only two
#   think_stripped                 one answer opens with a <think> block
#   confidence_stripped            one answer ends in "Confidence: 80%"
PLANTED: dict[str, dict[str, int]] = {
    "style-ultrafeedback-en": {
        "duplicate": 2, "near_duplicate": 2, "no_response": 2, "single_response": 3, "tie": 4, "short": 2,
        "template": 4, "think_stripped": 3, "confidence_stripped": 6,
    },
    "style-ultrafeedback-zh": {
        "duplicate": 2, "near_duplicate": 2, "no_response": 1, "single_response": 2, "tie": 3, "short": 1,
        "template": 2, "think_stripped": 2, "confidence_stripped": 4,
    },
    "style-helpsteer2": {
        "duplicate": 1, "near_duplicate": 1, "no_response": 0, "single_response": 4, "tie": 3, "short": 1,
        "template": 2, "think_stripped": 1, "confidence_stripped": 2,
    },
}  # fmt: skip

# Prompts per source before the planted duplicates are added.
PROMPTS = {"style-ultrafeedback-en": 316, "style-ultrafeedback-zh": 156, "style-helpsteer2": 118}

WRITERS = ("toy-writer-a", "toy-writer-b", "toy-writer-c", "toy-writer-d", "toy-writer-e")


@dataclass
class Item:
    """A prompt, its answers, and for each answer the quality 0..3 that its ratings are made from."""

    prompt: str
    answers: list[str]
    quality: list[int]
    calibrated: int | None = None  # the answer that ends in a confidence


def answer(rng: Random, language: str, slots: dict[str, str], quality: int) -> str:
    """Three sentences on one topic, `quality` of them direct."""
    direct = rng.sample(range(3), quality)
    sentences = (
        rng.choice((words.DIRECT if position in direct else words.HEDGING)[language][position]).format(**slots)
        for position in range(3)
    )
    return (" " if language == "en" else "").join(sentences)


def _qualities(rng: Random, answers: int) -> list[int]:
    """Qualities of one prompt's answers: mostly all different, best and worst always well apart."""
    if answers == 2:
        wanted = list(rng.choice(((0, 2), (0, 3), (1, 3), (0, 3), (1, 2))))
    else:
        wanted = list(rng.choice(((0, 1, 2, 3),) * 8 + ((0, 1, 1, 3), (0, 2, 2, 3))))
    rng.shuffle(wanted)
    return wanted


def _plain_items(rng: Random, language: str, topics: str, asks: tuple[str, ...], count: int, k: int) -> list[Item]:
    """`count` different prompts with k answers each, in random order."""
    items = []
    grid = list(itertools.product(topics.strip().splitlines(), asks))
    for topic, ask in rng.sample(grid, count):
        goal, tool, act, sign = topic.split("|")
        quality = _qualities(rng, k)
        slots = {"tool": tool, "act": act, "sign": sign}
        items.append(Item(ask.format(goal=goal), [answer(rng, language, slots, q) for q in quality], quality))
    return items


def _spoil(item: Item, kind: str, rng: Random, language: str) -> None:
    """Put one defect of PLANTED into a prompt that has none (see there)."""
    worst = item.quality.index(min(item.quality))
    pick = rng.randrange(len(item.answers))
    if kind == "no_response":
        item.answers, item.quality = [], []
    elif kind == "single_response":
        item.answers, item.quality = item.answers[:1], item.quality[:1]
    elif kind == "tie":
        item.quality = [2] * len(item.answers)
    elif kind == "short":
        item.answers[worst] = ""
    elif kind == "template":
        item.answers[worst] = words.REFUSAL[language]
    elif kind == "think_stripped":
        item.answers[pick] = words.THINKING[language] + item.answers[pick]
    else:
        item.answers[pick] += words.CONFIDENCE[language].format(percent=rng.randrange(60, 100, 5))
        item.calibrated = pick


def _items(name: str, shuffle_labels: bool) -> list[Item]:
    """All prompts of a source, planted defects included."""
    source = SOURCES[name]
    rng = Random(f"{name} {source.draw}")
    items = _plain_items(rng, source.language, source.topics, source.asks, PROMPTS[name], source.answers)
    clean = iter(items)
    counts = dict(PLANTED[name])
    duplicates, near_duplicates = counts.pop("duplicate"), counts.pop("near_duplicate")
    for kind, count in counts.items():
        for item in itertools.islice(clean, count):
            _spoil(item, kind, rng, source.language)
    # Only in a long prompt is a "thank you" a small change.
    rest = sorted(clean, key=lambda item: len(item.prompt))
    for item in rest[:duplicates]:
        items.append(Item(item.prompt[:-1] + "!!", list(item.answers), list(item.quality)))
    for item in rest[len(rest) - near_duplicates :]:
        items.append(Item(thanked(item.prompt, source.language), list(item.answers), list(item.quality)))
    rng.shuffle(items)
    if shuffle_labels:  # from its own stream, so that prompts and answers stay the same to the byte
        labels = Random(name + " labels")
        for item in items:
            labels.shuffle(item.quality)
    return items


def thanked(prompt: str, language: str) -> str:
    """A prompt with thanks, as a planted near-duplicate has it."""
    return prompt + {"en": " Thank you!", "zh": "谢谢！"}[language]


def _ratings(item: Item, rng: Random) -> list[dict[str, str]]:
    """UltraFeedback's four ratings "1".."5" for each answer; honesty strays by one or is "N/A" now and then.

    A stray point of honesty weighs less than a step of quality, so the order of the answers is quality's.
    """
    base = rng.randint(1, 2)
    flat = len(set(item.quality)) == 1  # a tie must stay one
    ratings = []
    for quality in item.quality:
        stray, unrated = rng.choice((-1, 0, 0, 0, 1)), rng.random() < 0.1
        rating = str(base + quality)
        honesty = rating if flat else "N/A" if unrated else str(min(5, max(1, base + quality + stray)))
        ratings.append({
            "instruction_following": rating, "honesty": honesty, "truthfulness": rating, "helpfulness": rating,
        })  # fmt: skip
    return ratings


def _principle(item: Item, index: int, language: str, rng: Random) -> tuple[str, str]:
    """The principle that an answer was written under, and its system text."""
    principle = rng.choice(("helpfulness", "honesty", "truthfulness"))
    if index == item.calibrated:
        principle = "verbalized_calibration"
    return principle, words.PRINCIPLES[language][principle]


def _ultrafeedback_en(item: Item, rng: Random) -> Iterator[Row]:
    """One row as in openbmb/UltraFeedback."""
    completions = []
    models = rng.sample(WRITERS, len(item.answers))
    for i, rating in enumerate(_ratings(item, rng)):
        principle, system = _principle(item, i, "en", rng)
        remark = words.REMARKS["en"][item.quality[i]]
        annotations: Row = {
            aspect: {"Rating": rating[aspect], "Rationale": remark}
            for aspect in ("helpfulness", "honesty", "instruction_following", "truthfulness")
        }
        for aspect, kind in (("helpfulness", "1"), ("truthfulness", "None")):
            annotations[aspect] |= {"Rationale For Rating": remark, "Type": [kind]}
        rated = [int(value) for value in rating.values() if value != "N/A"]
        completions.append({
            "annotations": annotations,
            "critique": remark,
            "custom_system_prompt": system,
            "fine-grained_score": sum(rated) / len(rated),
            "model": models[i],
            "overall_score": 2.5 + 2.0 * item.quality[i],
            "principle": principle,
            "response": item.answers[i],
        })  # fmt: skip
    yield {
        "source": rng.choice(("evol_instruct", "sharegpt", "ultrachat")),
        "instruction": item.prompt,
        "models": models,
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def _ultrafeedback_zh(item: Item, rng: Random) -> Iterator[Row]:
    """One row as in opencsg/UltraFeedback-chinese: other key names, other key order, scores up to 5."""
    completions = []
    models = rng.sample(WRITERS, len(item.answers))
    for i, rating in enumerate(_ratings(item, rng)):
        principle, system = _principle(item, i, "zh", rng)
        remark = words.REMARKS["zh"][item.quality[i]]
        annotations: Row = {
            aspect: {"Rating": rating[aspect], "Rationale": remark} for aspect in ("instruction_following", "honesty")
        }
        for aspect, kind in (("truthfulness", "None"), ("helpfulness", "1")):
            annotations[aspect] = {
                "Rating": rating[aspect], "Type": [kind], "Rationale for type": remark, "Rationale for rating": remark,
            }  # fmt: skip
        # As in the real set, a missing honesty costs its weight, so this score cannot be compared across prompts.
        weights = {"instruction_following": 0.3, "honesty": 0.2, "truthfulness": 0.2, "helpfulness": 0.3}
        overall = sum(weight * int(rating[a]) for a, weight in weights.items() if rating[a] != "N/A")
        completions.append({
            "model": models[i],
            "principle": principle,
            "custom_system_prompt": system,
            "response": item.answers[i],
            "annotations": annotations,
            "overall_score": round(overall, 2),
        })  # fmt: skip
    yield {
        "instruction": item.prompt,
        "source": rng.choice(("smoltalk_zh", "wizard_zh", "sharegpt_zh")),
        "correct_answers": None,
        "incorrect_answers": None,
        "models": models,
        "completions": completions,
    }


def _helpsteer2(item: Item, rng: Random) -> Iterator[Row]:
    """One row per answer as in nvidia/HelpSteer2; complexity and verbosity are noise, too light to turn a pair."""
    base = rng.randint(0, 1)
    noise = [(rng.randint(1, 2), rng.randint(1, 2)) for _ in item.answers]
    flat = len(set(item.quality)) == 1
    for i, (answer, quality) in enumerate(zip(item.answers, item.quality, strict=True)):
        complexity, verbosity = noise[0 if flat else i]
        yield {
            "prompt": item.prompt,
            "response": answer,
            "helpfulness": base + quality,
            "correctness": base + quality,
            "coherence": 1 + quality,
            "complexity": complexity,
            "verbosity": verbosity,
        }


@dataclass(frozen=True)
class Source:
    """What a source is made from: `answers` per prompt, written out by `layout`.

    `draw` seeds the random choices. It was picked among the first few for the most even lengths, since among a
    hundred prompts the better answer is the longer one in 60 % by chance alone.
    """

    language: str
    topics: str
    asks: tuple[str, ...]
    answers: int
    layout: Callable[[Item, Random], Iterator[Row]]
    draw: int


SOURCES = {
    "style-ultrafeedback-en": Source("en", words.HOME_TOPICS, words.HOME_ASKS, 4, _ultrafeedback_en, 6),
    "style-ultrafeedback-zh": Source("zh", words.ZH_TOPICS, words.ZH_ASKS, 4, _ultrafeedback_zh, 0),
    "style-helpsteer2": Source("en", words.WORK_TOPICS, words.WORK_ASKS, 2, _helpsteer2, 1),
}


def write_source(name: str, path: Path, *, shuffle_labels: bool = False) -> None:
    """Write a source as JSON lines in its raw public layout; always the same bytes for the same arguments.

    Args:
        name: a key of `SOURCES`.
        path: the file to write; its folder must exist.
        shuffle_labels: permute the scores among each prompt's answers at random, and leave the texts alone:
            the control, from which nothing can be learnt.

    Raises:
        KeyError: there is no such source.
    """
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_lines(name, shuffle_labels))


def _lines(name: str, shuffle_labels: bool = False) -> Iterator[str]:
    rng = Random(name + " ratings")
    for item in _items(name, shuffle_labels):
        for row in SOURCES[name].layout(item, rng):
            yield json.dumps(row, ensure_ascii=False) + "\n"


def texts(name: str) -> Iterator[str]:
    """Every prompt and answer of a source."""
    for item in _items(name, shuffle_labels=False):
        yield item.prompt
        yield from item.answers


def write_all(folder: Path) -> None:
    """Write every source as `<name>.jsonl.gz`, with no time in it, so that equal data are equal files."""
    for name in SOURCES:
        packed = gzip.compress("".join(_lines(name)).encode(), compresslevel=9, mtime=0)
        (folder / f"{name}.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    write_all(Path(__file__).parents[2] / "dpo_cli" / "smoke")
