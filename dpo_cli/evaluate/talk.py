"""`eval --chat`: talk with the base and the tuned model side by side, each with its own history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress

from rich.console import Console

from dpo_cli import backends, chat, models
from dpo_cli.errors import DpoError
from dpo_cli.inference import Answer, Sampling, generate, seed_of
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message
from dpo_cli.run import Run
from dpo_cli.terminal import print_answers, print_side_by_side, terminal

__all__ = ["print_answers", "talk"]

HELP = "/system TEXT sets a system prompt, /new starts over, Ctrl-D ends"


class Conversation:
    """Base and tuned model answer the same questions; each sees its own earlier answers.

    Both draw from the same noise, so that they differ only as the models do.
    """

    def __init__(self, recipe: Recipe, run: Run) -> None:
        backends.import_backend(backends.Backend("hf", "evaluation"))
        self.model, self.tokenizer = models.load_tuned(models.as_trained(recipe, run.record("train")), run.adapter)
        self.recipe = recipe
        self.system: list[Message] = []
        self.start_over()

    def start_over(self, system: str | None = None) -> None:
        """Forget what was said; with `system`, under another system prompt ("" for none)."""
        if system is not None:
            self.system = [Message(role="system", content=system)] if system else []
        self.histories: dict[str, list[Message]] = {"base": [*self.system], "tuned": [*self.system]}

    def ask(self, question: str) -> dict[str, Answer]:
        """Answer a question with both models.

        Raises:
            DpoError: the conversation has grown longer than the model's positions.
        """
        settings = self.recipe.eval
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)
        asked = Message(role="user", content=question)
        options = chat.chat_template_kwargs(self.recipe)
        answers = {}
        for name, history in self.histories.items():
            ids = chat.chat_tokens(self.tokenizer, [*history, asked], add_generation_prompt=True, **options)
            room = getattr(self.model.config, "max_position_embeddings", None)
            if room and len(ids) + settings.max_new_tokens > room:
                what = f"{len(ids):,} tokens are too many to go on from: the model has {room:,} positions"
                raise DpoError(what, hint="/new starts over")
            seed = seed_of(self.recipe.seed, question, len(history))
            with models.as_reference(self.model) if name == "base" else nullcontext():
                (answers[name],) = generate(self.model, self.tokenizer, [ids], sampling, [seed])
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
            conversation.start_over()
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
