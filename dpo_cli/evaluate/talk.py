"""`eval --chat`: talk with the base and the tuned model side by side, each with its own history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.samples import answer_both, chat_prompt, load_both
from dpo_cli.inference import Answer, seed_of
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message
from dpo_cli.run import Run
from dpo_cli.terminal import print_answers, print_side_by_side, terminal

__all__ = ["print_answers", "talk"]

HELP = "/system TEXT sets a system prompt, /new starts over, Ctrl-D ends"


class Conversation:
    """Base and tuned model answer the same questions; each sees its own earlier answers."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self.model, self.tokenizer = load_both(recipe, run)
        self.recipe, self.options = recipe, chat.chat_template_kwargs(recipe)
        self.start_over()

    def start_over(self, system: str = "") -> None:
        """Forget the conversation, and go on under a system prompt ("" for none)."""
        self.system = system
        opening = [Message(role="system", content=system)] if system else []
        self.histories: dict[str, list[Message]] = {"base": [*opening], "tuned": [*opening]}

    def ask(self, question: str) -> dict[str, Answer]:
        """Answer a question with both models.

        Raises:
            DpoError: the conversation has grown longer than the model's positions.
        """
        asked = Message(role="user", content=question)
        settings, seed = self.recipe.eval, seed_of(self.recipe.seed, question, len(self.histories["base"]))
        prompts = [
            [chat_prompt(self.model, self.tokenizer, [*history, asked], settings, self.options, "/new starts over")]
            for history in self.histories.values()
        ]
        found = answer_both(self.model, self.tokenizer, prompts[0], prompts[1], [seed], settings)
        answers = {name: some[0] for name, some in zip(self.histories, found, strict=True)}
        for name, answer in answers.items():
            self.histories[name] += [asked, Message(role="assistant", content=answer.text)]
        return answers


def talk(recipe: Recipe, run: Run) -> None:
    """Read questions from standard input until it ends, and print both answers to each."""
    console = terminal()
    conversation = Conversation(recipe, run)
    console.print(HELP, style="dim")
    for line in _lines(console):
        command, _, rest = line.partition(" ")
        if command == "/system":
            conversation.start_over(rest.strip())
        elif command == "/new":
            conversation.start_over(conversation.system)
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            try:
                print_side_by_side(conversation.ask(line))
            except DpoError as error:
                console.print(str(error))


def _lines(console: Console) -> Iterator[str]:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # so that arrow keys work
    while True:
        try:
            yield input("you> " if console.is_terminal else "").strip()
        except EOFError:
            return
