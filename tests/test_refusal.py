"""What counts as a refusal, in `prepare` as in `eval`."""

from __future__ import annotations

import pytest
from dpo_cli.refusal import refuses


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I won’t do this.",
        "I cannot provide instructions for this.",
        "I am unable to assist with this request.",
        "Unfortunately, I will not be able to help you here. I won't be able to assist.",
        "As an AI language model, I don't have feelings.",
        "抱歉，我无法回答这个问题。",
        "对不起，这个请求我不能满足。",
        "我不能提供这样的建议。",
        "作为一个人工智能助手，我没有个人观点。",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Falcons are birds of prey.",
        "I can't help but admire falcons.",
        "As an AI researcher, you may like this book.",
        "Say: sorry for the delay, the order is on its way.",
        "隼是一种猛禽，能够在空中捕食。",
        "作为一名教师，你可以这样开始。",
        "Here is the letter. " * 20 + "I cannot help you.",  # only how it opens counts
    ],
)
def test_no_refusals(text: str) -> None:
    assert not refuses(text)
