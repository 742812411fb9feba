"""A judge behind HTTP that behaves as judges and their servers do: an OpenAI-compatible endpoint made of sockets.

In a test: `with JudgeServer("honest") as server: server.url`. As a process of its own, that a test can kill:
`python judge_server.py BEHAVIOUR…` prints its address.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BETTER = "splendid"  # the word by which this judge knows the better answer


class JudgeServer:
    """Serves on a free port of this machine until it is closed.

    Args:
        behaviours: names in `REPLIES` or `FAULTS`, echo, hang, drips or die, one a request for a judgment; the last
            one stays.
        port: 0 takes a free one.

    Attributes:
        asked: the questions so far, in the order they came.
        keys: the Authorization headers that came with them.
        released: requests that hang do so until this is set.
        lists_nothing: a request for the list of models hangs.
    """

    def __init__(self, *behaviours: str, port: int = 0) -> None:
        self.behaviours = behaviours
        self.lists_nothing = False
        self.asked: list[str] = []
        self.keys: list[str | None] = []
        self.released = threading.Event()
        self.hanging = threading.Event()
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.http.daemon_threads = True
        self.port = int(self.http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def next_behaviour(self, question: str, key: str | None) -> str:
        with self.lock:
            self.asked.append(question)
            self.keys.append(key)
            return self.behaviours[min(len(self.asked), len(self.behaviours)) - 1]


def honest(question: str) -> str:
    """`[[A]]` or `[[B]]`, whichever answer holds the word; a tie where both or none do."""
    first, second = (BETTER in part for part in re.findall(r"<answer_[ab]_\w+>\n(.*?)\n</answer_", question, re.DOTALL))
    return "[[C]]" if first == second else "[[A]]" if first else "[[B]]"


def alphabetical(question: str) -> str:
    """Whichever answer comes first in a dictionary: a preference that any two texts leave room for."""
    first, second = re.findall(r"<answer_[ab]_\w+>\n(.*?)\n</answer_", question, re.DOTALL)
    return "[[C]]" if first == second else "[[A]]" if first < second else "[[B]]"


def other(verdict: str) -> str:
    return {"[[A]]": "[[B]]", "[[B]]": "[[A]]", "[[C]]": "[[C]]"}[verdict]


# What is answered, as text.
REPLIES: dict[str, Callable[[str], str]] = {
    "honest": honest,
    "alphabetical": alphabetical,
    "first_place": lambda question: "I like what comes first. [[A]]",
    "thinks": lambda question: f"<think>Is it {other(honest(question))}?</think>\n{honest(question)}",
    "thinks_for_ever": lambda question: f"<think>It is {honest(question)}, or is it {other(honest(question))}",
    "garbage": lambda question: "The weather is fine. [[D]] [A] 甲更好",
    "reasons": honest,
    "reasons_422": honest,
    "tie": lambda question: "[[C]]",
    "cut_early": lambda question: f"It might be {honest(question)}, for the fir",
    "cut_late": lambda question: f"Because it is better.\n\n**{honest(question)}**\n",
    "half_a_character": lambda question: f"\ud83d {honest(question)}",
}

# What goes wrong below the text: status, headers, body ("…": the Authorization header is put there).
FAULTS: dict[str, tuple[int, dict[str, str], str]] = {
    "busy": (429, {"Retry-After": "0", "retry-after-ms": "1"}, '{"error": {"message": "slow down"}}'),
    "broken": (500, {"retry-after-ms": "1"}, "out of memory"),
    "no_quota": (429, {"x-should-retry": "false"}, '{"error": {"message": "insufficient_quota"}}'),
    "wrong_key": (401, {}, '{"error": {"message": "Incorrect API key provided: …"}}'),
    "no_model": (404, {}, '{"error": {"message": "model not found"}}'),
    "too_long": (400, {}, '{"error": {"message": "maximum context length exceeded, … sent: [[A]]"}}'),
    "echo_500": (500, {"x-should-retry": "false"}, "Traceback: headers={'Authorization': '…'}"),
    "html": (200, {"Content-Type": "text/html"}, "<html>welcome</html>"),
    "no_json": (200, {"Content-Type": "application/json"}, '{"choices": [{"mess'),
    "endless": (200, {"Content-Type": "application/json"}, '{"choices": "' + "x" * 5_000_000 + '"}'),
    "bomb": (200, {"Content-Encoding": "gzip"}, "no gzip at all"),
    "no_choices": (200, {"Content-Type": "application/json"}, '{"choices": []}'),
}

REFUSALS = {"reasons": 400, "reasons_422": 422}  # status of what refuses a chat model's arguments
UNSUPPORTED = (
    '{"error": {"message": "Unsupported parameter: \'max_tokens\' is not supported with this model. Use '
    "'max_completion_tokens' instead.\"}}"
)


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if server.lists_nothing:
                server.released.wait()
                self.close_connection = True
                return
            self.send(200, {"Content-Type": "application/json"}, '{"object": "list", "data": []}')

        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body.get("temperature", 0) == 0
            question, key = body["messages"][-1]["content"], self.headers["Authorization"]
            behaviour = server.next_behaviour(question, key)
            if behaviour == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if behaviour == "hang":
                server.hanging.set()
                server.released.wait()
                self.close_connection = True
                return
            limited = "max_completion_tokens" in body and not {"temperature", "max_tokens"} & body.keys()
            if behaviour in REFUSALS and not limited:
                self.send(REFUSALS[behaviour], {}, UNSUPPORTED)
                return
            if behaviour == "drips":
                self.drip()
                return
            if behaviour in FAULTS:
                status, headers, text = FAULTS[behaviour]
                self.send(status, headers, text.replace("…", str(key)))
                return
            reply = f"You are {key}. {honest(question)}" if behaviour == "echo" else REPLIES[behaviour](question)
            message = {"role": "assistant", "content": reply}
            reason = "length" if behaviour in ("thinks_for_ever", "cut_early", "cut_late") else "stop"
            choice = {"index": 0, "finish_reason": reason, "message": message}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(completion))

        def drip(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            with suppress(OSError):  # the client has left
                while not server.released.wait(0.02):
                    self.wfile.write(b" ")
            self.close_connection = True

        def send(self, status: int, headers: dict[str, str], text: str) -> None:
            body = text.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    with JudgeServer(*sys.argv[1:]) as alone:
        print(alone.url, flush=True)
        threading.Event().wait()
