"""Requests to an OpenAI-compatible server, by the `openai` client: many at a time, each answered once and kept."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from dpo_cli.distribution import install_command
from dpo_cli.errors import DpoError
from dpo_cli.judging.judgment import key_of
from dpo_cli.recipe import OpenAIRater, Server
from dpo_cli.records import Message
from dpo_cli.show import one_line
from dpo_cli.store import Store

# Requests in a row without an answer, after all their retries, that mean a sick server rather than an odd prompt.
_SILENCE = 8
_MOST_BYTES = 10**6  # of a reply's body; what is longer is cut, and is no chat completion then
NO_KEY = "none"  # the client insists on one, servers that want none don't look
KEPT = "run again to go on: what was answered is kept"


class Reply(NamedTuple):
    """What a server replied; `cut`: at its limit of tokens. `tokens`: of request and reply, 0 where it counts none."""

    text: str
    cut: bool = False
    tokens: int = 0


class Client:
    """Asks one server; `store` keeps usable replies by their key, see `request_key`."""

    def __init__(self, settings: Server, store: Store) -> None:
        self.settings, self.store = settings, store
        self._reached = False
        self._silent = 0
        self._refuses: set[str] = set()

    def ask(
        self,
        requests: Mapping[str, dict[str, Any]],
        usable: Callable[[Reply], bool],
        advance: Callable[[int], None],
    ) -> tuple[dict[str, Reply], dict[str, Reply]]:
        """Ask each request once: what is usable is kept, and not asked again by any run.

        The rest is asked again by the next run, for a person may have fixed the server (its chat template, its limits).

        Args:
            requests: the arguments of `chat.completions.create` but the model, by their key.
            usable: whether a reply has what was asked for.
            advance: is called with the number of requests that are done, the known ones at once.

        Returns:
            The usable replies by key; for the other keys the reply, or why there is none.

        Raises:
            DpoError: the server can't be reached or used at all.
        """
        good = {key: Reply(*kept) for key, kept in self.store.get(requests).items()}
        bad: dict[str, Reply] = {}
        advance(len(good))

        def answered(key: str, reply: Reply) -> None:
            (good if usable(reply) else bad)[key] = reply
            if key in good:
                self.store.put({key: reply})

        async def ask_all(missing: Mapping[str, dict[str, Any]]) -> None:
            free = asyncio.Semaphore(self.settings.concurrency)

            async def ask_one(key: str) -> None:
                async with free:
                    try:
                        answered(key, await self._ask(client, missing[key]))
                        self._silent = 0
                    except _Unanswered as why:
                        bad[key] = Reply(str(why))
                        self._silent += 1
                    advance(1)
                    if self._silent == _SILENCE:
                        raise self._error(f"gave no answer {_SILENCE} times in a row: {bad[key].text}", KEPT)

            async with open_client(self.settings) as client:
                # Waiting for what nobody has started is of no use.
                if not self._reached and not await there(self.settings, client):
                    raise self._unreachable()
                self._reached = True
                tasks = [asyncio.create_task(ask_one(key)) for key in missing]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

        if len(good) < len(requests):
            asyncio.run(ask_all({key: request for key, request in requests.items() if key not in good}))
        return good, bad

    async def _ask(self, client: Any, request: dict[str, Any]) -> Reply:
        """The reply to one request.

        Arguments that the server refuses are left out of all later requests. Errors are raised `from None`: what a
        server echoes may hold the key, and a traceback would show it.

        Raises:
            _Unanswered: this request got no answer.
            DpoError: no request would.
        """
        settings, asked, openai = self.settings, frozenset(self._refuses), library(self.settings)
        all_tries = 2 * settings.timeout * (settings.retries + 1)  # the client limits each read, and one may drip
        try:
            async with asyncio.timeout(all_tries):
                completion = await client.chat.completions.create(model=settings.model, **_accepted(request, asked))
            choice = completion.choices[0]
            text = _without_key(choice.message.content or "", client)
            used = completion.usage.total_tokens if completion.usage else 0
            return Reply(text, choice.finish_reason == "length", used)
        except (openai.APITimeoutError, TimeoutError):
            raise _Unanswered(f"nothing within {settings.timeout:g} s; see {settings.at}.timeout") from None
        except openai.APIConnectionError:
            raise self._unreachable() from None
        except openai.APIStatusError as error:
            status, words = error.status_code, one_line(_without_key(error.message, client))[:300]
            refused = {name for name, pattern in REFUSED.items() if re.search(pattern, error.message)} - asked
            if status in (400, 422) and refused:
                self._refuses |= refused
                return await self._ask(client, request)
            if status in (400, 408, 409, 413, 422) or status >= 500:  # too long, refused by a filter, out of memory
                raise _Unanswered(f"HTTP {status}, {words}") from None
            raise self._error(f"answers HTTP {status}: {words}", self._fix(status)) from None
        except Exception as error:  # a page in HTML, half a JSON, no choices: the client has no one name for these
            raise _Unanswered(f"its reply is no chat completion ({type(error).__name__})") from None

    def _fix(self, status: int) -> str:
        """What to do about an HTTP status that every request would get."""
        at, name = self.settings.at, self.settings.api_key_env
        if status in (401, 403):
            return f"check the key in {name}" if name else f"name the variable that holds the key in {at}.api_key_env"
        if status == 404:
            listed = f"curl {self.settings.base_url.rstrip('/')}/models lists what a server has"
            return f"check {at}.model and {at}.base_url, which mostly ends in /v1; {listed}"
        return f"lower {at}.concurrency or raise {at}.retries; {KEPT}" if status == 429 else KEPT

    def _unreachable(self) -> DpoError:
        return self._error("can't be reached", f"start the server, or correct {self.settings.at}.base_url; {KEPT}")

    def _error(self, what: str, hint: str) -> DpoError:
        where = f"{self.settings.base_url}, model {self.settings.model}"
        return DpoError(f"the {self.settings.role} {what}", where=where, hint=hint)


class _Unanswered(Exception):
    """One request that got no answer, while others may."""


def library(settings: Server) -> Any:
    """Import the `openai` package, whose seconds only who asks a server waits for.

    Raises:
        DpoError: it is not installed.
    """
    try:
        import openai
    except ImportError:
        what = f"{settings.role} on a server needs the openai package, which is not installed"
        raise DpoError(what, where=settings.at, hint=install_command("judge")) from None
    return openai


def open_client(settings: Server) -> Any:
    """The official client, asynchronous.

    Raises:
        DpoError: no client, or no key.
    """
    openai = library(settings)
    name = settings.api_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise DpoError(
            f"the environment variable {name} holds {'no API key' if key else 'nothing'}",
            where=f"{settings.at}.api_key_env",
            hint=f"export {name}=…; where the server wants no key, leave {settings.at}.api_key_env out",
        )
    # The client repeats 408, 409, 429, 5xx, timeouts and lost connections after twice the wait, or after Retry-After.
    return openai.AsyncOpenAI(
        base_url=settings.base_url,
        api_key=key or NO_KEY,
        timeout=settings.timeout,
        max_retries=settings.retries,
        default_headers={"Accept-Encoding": "identity"},
        http_client=openai.DefaultAsyncHttpxClient(timeout=settings.timeout, event_hooks={"response": [_bound]}),
    )


async def _bound(response: Any) -> None:
    """Limit the bytes of a response's body; one compressed unasked stays so, for it may unfold to any number."""
    library: Any = sys.modules[type(response).__module__.partition(".")[0]]  # httpx, or what openai has in its place
    stream = response.stream

    class Bounded(library.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = _MOST_BYTES
            async for chunk in stream:
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return

        async def aclose(self) -> None:
            await stream.aclose()

    response.headers.pop("Content-Encoding", None)
    response.stream = Bounded()


def _without_key(text: str, client: Any) -> str:
    """A server's words without the key, which it may echo, and without halves of surrogate pairs."""
    text = text if client.api_key == NO_KEY else text.replace(client.api_key, "[the key]")
    return text.encode("utf-8", "replace").decode()


async def there(settings: Server, client: Any) -> bool:
    """Whether anything listens; a server that is slow, or lists no models, does."""
    openai = library(settings)
    try:
        await client.with_options(max_retries=0).models.with_raw_response.list()
    except openai.APIError as error:
        return isinstance(error, openai.APITimeoutError) or not isinstance(error, openai.APIConnectionError)
    return True


# What a server writes of arguments that it does not take, by their name in `_accepted`: OpenAI's reasoning models take
# no temperature and limit the tokens by another name; its servers take no `chat_template_kwargs`.
REFUSED = {"limits": "max_completion_tokens|temperature", "template": "chat_template_kwargs"}


def _accepted(request: dict[str, Any], refuses: frozenset[str]) -> dict[str, Any]:
    """A request without what the server refuses."""
    accepted = dict(request)
    if "limits" in refuses:
        accepted["max_completion_tokens"] = accepted.pop("max_tokens")
        accepted.pop("temperature", None)
    if "template" in refuses:
        accepted["extra_body"] = {k: v for k, v in request["extra_body"].items() if k != "chat_template_kwargs"}
    return accepted


def request(settings: OpenAIRater, question: str) -> dict[str, Any]:
    """A question to a judge or rater, all in one user turn, since some chat templates know no system turn."""
    asked: Message = {"role": "user", "content": question}
    return {"messages": [asked], "temperature": 0, "max_tokens": settings.max_tokens}


def request_key(settings: OpenAIRater, *parts: Any) -> str:
    """The key of its reply; two servers may both call their model "default"."""
    return key_of(settings.kind, settings.base_url.rstrip("/"), settings.model, *parts)
