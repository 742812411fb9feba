"""Requests to an OpenAI-compatible server, by the `openai` client: many at a time, each answered once and kept."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

from dpo_cli.distribution import install_command
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Server
from dpo_cli.show import one_line
from dpo_cli.store import Store

# Requests in a row without an answer, after all their retries, that mean a sick server rather than an odd prompt.
_SILENCE = 8
_MOST_BYTES = 10**6  # of a reply's body; what is longer is cut, and is no chat completion then


class Reply(NamedTuple):
    """What a server replied; `cut`: at its limit of tokens. `tokens`: of request and reply, 0 where it counts none."""

    text: str
    cut: bool = False
    tokens: int = 0


class Client:
    """Asks one server; `requests` are the arguments of `chat.completions.create` but the model, by their key.

    Args:
        settings: of the recipe.
        store: where usable replies are kept by their key, see `key_of`.
    """

    def __init__(self, settings: Server, store: Store) -> None:
        self.settings, self.store = settings, store
        self._opened: tuple[Any, Callable[[str], str]] | None = None
        self._silent = 0
        self._refuses: set[str] = set()

    def ask(
        self,
        requests: Mapping[str, dict[str, Any]],
        usable: Callable[[Reply], bool],
        advance: Callable[[int], None],
    ) -> tuple[dict[str, Reply], dict[str, Reply]]:
        """Ask each request once: what is usable is kept, and not asked again by any run.

        The rest is not kept: at temperature 0 the same server would say it again, but what a person does about it is to
        fix the server (its chat template, its limits), and then it is worth asking again.

        Args:
            usable: whether a reply has what was asked for.
            advance: is told of every request that is done, the known ones at once.

        Returns:
            The usable replies by key; for the other keys the reply, or why there is none.

        Raises:
            DpoError: the server can't be reached or used at all.
        """
        good = {key: Reply(*kept) for key, kept in self.store.get(requests).items()}
        bad: dict[str, Reply] = {}
        advance(len(good))
        missing = [key for key in requests if key not in good]
        if not missing:
            return good, bad
        if self._opened is None:
            self._opened = open_client(self.settings)
            if not there(self._opened[0]):  # waiting for a server that nobody has started is of no use
                raise _unreachable(self.settings)
        client, hide = self._opened

        def ask(key: str) -> Reply:
            return _ask(client, self.settings, hide, requests[key], self._refuses)

        def answered(key: str, reply: Reply | Exception) -> None:
            advance(1)
            if isinstance(reply, Reply):
                self._silent = 0
                if usable(reply):
                    self.store.put({key: reply})
                    good[key] = reply
                else:
                    bad[key] = reply
                return
            if not isinstance(reply, _Unanswered):
                raise reply
            self._silent += 1
            bad[key] = Reply(str(reply))
            if self._silent == _SILENCE:
                raise _error(self.settings, f"gave no answer {_SILENCE} times in a row: {reply}", KEPT)

        _in_threads(ask, missing, self.settings.concurrency, answered)
        return good, bad


class _Unanswered(Exception):
    """One request that got no answer, while others may."""


def _in_threads(
    work: Callable[[str], Reply], items: Sequence[str], threads: int, done: Callable[[str, Reply | Exception], None]
) -> None:
    """Call `done(item, work(item) or its error)` for every item, here, as the threads finish them.

    Daemon threads rather than an executor's: where `done` raises or Ctrl-C comes, nobody waits for requests under way.
    """
    todo: SimpleQueue[str | None] = SimpleQueue()
    results: SimpleQueue[tuple[str, Reply | Exception]] = SimpleQueue()
    stop = threading.Event()
    for item in [*items, *[None] * threads]:
        todo.put(item)

    def worker() -> None:
        while (item := todo.get()) is not None and not stop.is_set():
            try:
                results.put((item, work(item)))
            except Exception as error:
                results.put((item, error))

    try:
        for _ in range(min(threads, len(items))):
            threading.Thread(target=worker, daemon=True).start()
        for _ in items:
            done(*results.get())
    finally:
        stop.set()


def open_client(settings: Server) -> tuple[Any, Callable[[str], str]]:
    """The official client, and what takes the key out of a text.

    Raises:
        DpoError: no client, or no key.
    """
    try:
        import openai
    except ImportError:
        raise DpoError(
            f"{settings.role} on a server needs the openai package, which is not installed",
            where=settings.at,
            hint=install_command("judge"),
        ) from None
    name = settings.api_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise DpoError(
            f"the environment variable {name} holds {'no API key' if key else 'nothing'}",
            where=f"{settings.at}.api_key_env",
            hint=f"export {name}=…; where the server wants no key, leave {settings.at}.api_key_env out",
        )
    # The client repeats 408, 409, 429, 5xx, timeouts and lost connections after twice the wait, or after Retry-After.
    client = openai.OpenAI(
        base_url=settings.base_url,
        api_key=key or "none",  # the client insists on one, servers that want none don't look
        timeout=settings.timeout,
        max_retries=settings.retries,
        http_client=openai.DefaultHttpxClient(
            timeout=settings.timeout, event_hooks={"response": [lambda response: _bound(response, settings.timeout)]}
        ),
    )
    return client, lambda text: text.replace(key, "[the key]") if key else text


def _bound(response: Any, seconds: float) -> None:
    """Limit the bytes of a response's body, and the seconds that all of it may take: the client limits each read only.

    A compressed one stays as it is, for a few bytes may unfold to any number.
    """
    library: Any = sys.modules[type(response).__module__.partition(".")[0]]  # httpx, or what openai has in its place
    stream = response.stream

    class Bounded(library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            left, end = _MOST_BYTES, time.monotonic() + seconds
            for chunk in stream:
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return
                if time.monotonic() > end:
                    raise library.ReadTimeout("the reply took too long", request=response.request)

        def close(self) -> None:
            stream.close()

    response.headers.pop("Content-Encoding", None)
    response.stream = Bounded()


def there(client: Any) -> bool:
    """Whether anything listens; a server that is slow, or lists no models, does."""
    import openai

    try:
        client.with_options(max_retries=0).models.with_raw_response.list()
    except openai.APIError as error:
        return isinstance(error, openai.APITimeoutError) or not isinstance(error, openai.APIConnectionError)
    return True


def _ask(
    client: Any, settings: Server, hide: Callable[[str], str], request: dict[str, Any], refuses: set[str]
) -> Reply:
    """The reply to one request.

    OpenAI's reasoning models take no temperature, and limit the tokens by another name; its servers take no
    `chat_template_kwargs`. Once a server says so, all requests keep to that.

    Errors are raised `from None`: what a server echoes may hold the key, and a traceback would show it.

    Raises:
        _Unanswered: this request got no answer.
        DpoError: no request would.
    """
    import openai

    asked = frozenset(refuses)
    try:
        completion = client.chat.completions.create(model=settings.model, **_taken(request, asked))
        choice = completion.choices[0]
        text = hide(choice.message.content or "").encode("utf-8", "replace").decode()  # no half of a surrogate pair
        used = completion.usage.total_tokens if completion.usage else 0
        return Reply(text, choice.finish_reason == "length", used)
    except openai.APITimeoutError:
        raise _Unanswered(f"nothing within {settings.timeout:g} s; see {settings.at}.timeout") from None
    except openai.APIConnectionError:
        raise _unreachable(settings) from None
    except openai.APIStatusError as error:
        status, said = error.status_code, one_line(hide(error.message))[:300]
        refused = {name for name, words in REFUSED.items() if re.search(words, error.message)} - asked
        if status in (400, 422) and refused:
            refuses |= refused
            return _ask(client, settings, hide, request, refuses)
        if status in (400, 408, 409, 413, 422) or status >= 500:  # too long for it, refused by a filter, out of memory
            raise _Unanswered(f"HTTP {status}, {said}") from None
        name = settings.api_key_env
        key = (
            f"check the key in {name}" if name else f"name the variable that holds the key in {settings.at}.api_key_env"
        )
        hint = {
            401: key,
            403: key,
            404: f"check {settings.at}.model and {settings.at}.base_url, which mostly ends in /v1; "
            f"curl {settings.base_url.rstrip('/')}/models lists what a server has",
            429: f"lower {settings.at}.concurrency or raise {settings.at}.retries; {KEPT}",
        }
        raise _error(settings, f"answers HTTP {status}: {said}", hint.get(status, KEPT)) from None
    except Exception as error:  # a page in HTML, half a JSON, no choices: the client has no one name for these
        raise _Unanswered(f"its reply is no chat completion ({type(error).__name__})") from None


# What a server says of arguments that it does not take, by the name that `_taken` knows them by.
REFUSED = {"limits": "max_completion_tokens|temperature", "template": "chat_template_kwargs"}


def _taken(request: dict[str, Any], refuses: frozenset[str]) -> dict[str, Any]:
    """A request without what the server refuses."""
    taken = dict(request)
    if "limits" in refuses:
        taken["max_completion_tokens"] = taken.pop("max_tokens")
        taken.pop("temperature", None)
    if "template" in refuses:
        taken["extra_body"] = {k: v for k, v in request["extra_body"].items() if k != "chat_template_kwargs"}
    return taken


KEPT = "run again to go on: what was answered is kept"


def _unreachable(settings: Server) -> DpoError:
    hint = f"start the server, or correct {settings.at}.base_url; {KEPT}"
    return _error(settings, "can't be reached", hint)


def _error(settings: Server, what: str, hint: str) -> DpoError:
    return DpoError(f"the {settings.role} {what}", where=f"{settings.base_url}, model {settings.model}", hint=hint)
