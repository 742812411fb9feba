"""`eval --chat`: talk with the base and the tuned model side by side, each with its own history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.samples import answer_both, chat_prompt, load_both
from dpo_cli.inference import seed_of
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message
from dpo_cli.run import Run
from dpo_cli.terminal import print_side_by_side, terminal

HELP = "/system TEXT sets a system prompt, /new starts over, Ctrl-D ends"
RESTART = "/new starts over"


def talk(recipe: Recipe, run: Run) -> None:
    """Read questions from standard input until it ends, and print both answers to each."""
    model, tokenizer = load_both(recipe, run)
    settings, options = recipe.eval, chat.chat_template_kwargs(recipe)
    console, opening = terminal(), list[Message]()
    histories: dict[str, list[Message]] = {"base": [], "tuned": []}  # each model sees its own earlier answers
    console.print(HELP, style="dim")
    for line in _lines(console):
        command, _, rest = line.partition(" ")
        if command in ("/system", "/new"):
            if command == "/system":
                opening = [Message(role="system", content=rest.strip())] if rest.strip() else []
            histories = {name: [*opening] for name in histories}
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            asked, seed = Message(role="user", content=line), seed_of(recipe.seed, line, len(histories["base"]))
            talks = [[*history, asked] for history in histories.values()]
            try:
                base, tuned = ([chat_prompt(model, tokenizer, one, settings, options, RESTART)] for one in talks)
            except DpoError as error:
                console.print(str(error))
                continue
            answers = dict(zip(histories, answer_both(model, tokenizer, base, tuned, [seed], settings), strict=True))
            for name, [answer] in answers.items():
                histories[name] += [asked, Message(role="assistant", content=answer.text)]
            print_side_by_side({name: answer for name, [answer] in answers.items()})


def _lines(console: Console) -> Iterator[str]:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # so that arrow keys work
    while True:
        try:
            yield input("you> " if console.is_terminal else "").strip()
        except EOFError:
            return
