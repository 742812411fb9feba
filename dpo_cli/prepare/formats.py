"""What a row of train.jsonl and eval.jsonl holds, by `data.format`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_cli.prepare import scoring
from dpo_cli.records import CandidateSet, Message, Pair

Row = dict[str, Any]


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def pair_rows(item: CandidateSet, picked: tuple[int, ...], name: str, kwargs: dict[str, Any]) -> Iterator[Row]:
    chosen, rejected = item.candidates[picked[0]], item.candidates[picked[-1]]
    yield Pair(
        id=name, prompt=item.prompt, chosen=_answer(chosen.text), rejected=_answer(rejected.text),
        language=item.language or "und", source=item.source, margin=scoring.margin(item, picked[0], picked[-1]),
        score_chosen=chosen.score, score_rejected=rejected.score, chat_template_kwargs=kwargs,
    ).to_json()  # fmt: skip


def ranked_rows(item: CandidateSet, picked: tuple[int, ...], name: str, kwargs: dict[str, Any]) -> Iterator[Row]:
    """A prompt with all its candidates, best first, for listwise training."""
    ranked = [item.candidates[index] for index in picked]
    yield {
        "id": name, "prompt": item.prompt,
        "candidates": [{"text": one.text, "score": one.score, "model": one.model} for one in ranked],
        "chat_template_kwargs": kwargs, "language": item.language, "source": item.source,
    }  # fmt: skip


def unpaired_rows(item: CandidateSet, picked: tuple[int, ...], name: str, kwargs: dict[str, Any]) -> Iterator[Row]:
    """Rows of TRL's unpaired format: an answer and whether it is good; of a pair, chosen is and rejected is not."""
    for number, index in enumerate(picked):
        candidate = item.candidates[index]
        good = candidate.score == 1.0 if item.labelled else number == 0
        yield {
            "id": f"{name}-{index}", "prompt": item.prompt, "completion": _answer(candidate.text), "label": good,
            "chat_template_kwargs": kwargs, "language": item.language, "source": item.source,
        }  # fmt: skip


FORMATS = {"pairs": pair_rows, "ranked": ranked_rows, "unpaired": unpaired_rows}
