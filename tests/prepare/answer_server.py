"""A server behind HTTP that answers prompts and rates answers, as an OpenAI-compatible one does.

In a test: `with AnswerServer() as server: server.url`. An answer is as good as its seed says: from none to three of its
sentences have the word GOOD in them, and the rater counts it. `trouble` may reply something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.judging.judge_server import BETTER, JudgeServer

GOOD = BETTER
WORDS = ("amber basket candle dragon engine falcon garden harbour island jungle kettle ladder marble needle").split()  # noqa: SIM905
Body = dict[str, Any]
Fault = tuple[int, dict[str, str], str]  # status, headers, body
NO_QUOTA: Fault = (429, {"x-should-retry": "false"}, '{"error": {"message": "insufficient_quota"}}')


def answer(body: Body) -> str:
    """Three sentences about the prompt, of which `seed % 4` are good."""
    seed, prompt = body["seed"], body["messages"][-1]["content"]
    words = [WORDS[(seed // 7 + place * (seed % 5 + 2)) % len(WORDS)] for place in range(9)]
    kinds = [GOOD if place < seed % 4 else "plain" for place in range(3)]
    parts = [f"The {kind} {' '.join(words[3 * place : 3 * place + 3])}." for place, kind in enumerate(kinds)]
    return f"{' '.join(parts)} {prompt.split()[-1]}"


def rating(body: Body) -> str:
    """1 to 4 on every aspect, by how often the answer has the word."""
    said = re.findall(r"<answer_\w+>\n(.*?)\n</answer_", body["messages"][-1]["content"], re.DOTALL)[-1]
    value = 1 + said.count(GOOD)
    return f"It is what it is.\n{lines(value)}"


def lines(value: object) -> str:
    return "\n".join(f"{name}: {value}" for name in ("instruction_following", "honesty", "truthfulness", "helpfulness"))


def is_rating(body: Body) -> bool:
    return "<answer_" in body["messages"][-1]["content"]


class AnswerServer(JudgeServer):
    """Serves on a free port of this machine until it is closed.

    Args:
        trouble: what to reply instead of an answer or a rating: another text, or a fault; None: the usual.
        cut: which replies end at their limit of tokens.

    Attributes:
        answers, ratings: the requests so far.
    """

    def __init__(
        self,
        trouble: Callable[[Body, int], str | Fault | None] = lambda body, number: None,
        cut: Callable[[Body], bool] = lambda body: False,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self.trouble, self.cut = trouble, cut
        self.answers: list[Body] = []
        self.ratings: list[Body] = []
        self.http.RequestHandlerClass = _handler(self)

    def __enter__(self) -> AnswerServer:
        super().__enter__()
        return self

    def reply(self, body: Body) -> str | Fault:
        with self.lock:
            kind = self.ratings if is_rating(body) else self.answers
            kind.append(body)
            number = len(kind)
        found = self.trouble(body, number)
        return found if found is not None else rating(body) if is_rating(body) else answer(body)


def _handler(server: AnswerServer) -> Any:
    base: Any = server.http.RequestHandlerClass

    class Handler(base):
        def do_POST(self) -> None:
            body: Body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = server.reply(body)
            if isinstance(found, tuple):
                self.send(*found)
                return
            choice = {
                "index": 0, "finish_reason": "length" if server.cut(body) else "stop",
                "message": {"role": "assistant", "content": found},
            }  # fmt: skip
            usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
            self.send(200, {"Content-Type": "application/json"}, json.dumps({**completion, "choices": [choice]}))

    return Handler
