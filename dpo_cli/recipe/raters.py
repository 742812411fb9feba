"""What answers, rates and judges beside the model in training: `sample`, `data.rater` and `eval.judge`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from dpo_cli.recipe.train import Section


class Server(Section):
    """Any OpenAI-compatible server: vLLM, Ollama, llama.cpp, transformers serve, or a hosted one."""

    at: ClassVar[str] = "data.sources[].sample.server"  # where it stands in a recipe, for errors
    role: ClassVar[str] = "server"

    base_url: str = Field(
        pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$",  # a key may stand before an @, or behind a ?
        description="the server's address, such as http://localhost:8000/v1, without keys (api_key_env names one)",
    )
    model: str = Field(min_length=1, description="the model's name on that server")
    api_key_env: str | None = Field(
        None,
        # So a key written here is no valid name, and no recipe can send another variable to a server of its own.
        pattern=r"^[A-Z_][A-Z0-9_]*_(KEY|TOKEN)$",
        description="the name of an environment variable, in capitals, with _KEY or _TOKEN at its end; never the key",
    )
    concurrency: int = Field(8, ge=1, description="requests at a time")
    timeout: float = Field(60.0, gt=0, description="seconds for one request")
    retries: int = Field(5, ge=0, description="tries after 429, 5xx and timeouts, each after twice the wait")


class OpenAIRater(Server):
    """A rater behind a server: it rates one answer at a time, on UltraFeedback's four aspects."""

    at: ClassVar[str] = "data.rater"
    role: ClassVar[str] = "rater"

    kind: Literal["openai"]
    max_tokens: int = Field(1024, ge=1, description="tokens of its reply")


class RewardModelRater(Section):
    """A model on this machine: a sequence classifier with one output, which scores an answer alone."""

    at: ClassVar[str] = "data.rater"
    role: ClassVar[str] = "rater"

    kind: Literal["reward_model"]
    id: str = Field(
        min_length=1, description="hub id or local folder of a sequence classifier, or builtin:style-reward"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    batch_size: int = Field(8, ge=1, description="answers scored at a time")
    max_length: int = Field(4096, ge=16, description="tokens of prompt + answer; longer ones are cut and counted")


class OpenAIJudge(OpenAIRater):
    """A judge behind a server: it reads two answers, in both orders."""

    at: ClassVar[str] = "eval.judge"
    role: ClassVar[str] = "judge"

    calibration: int = Field(100, ge=0, description="held-out prompts whose pair the judge itself is tried on")


class RewardModelJudge(RewardModelRater):
    """A judge on this machine: of two answers, the one with the higher score wins."""

    at: ClassVar[str] = "eval.judge"
    role: ClassVar[str] = "judge"

    calibration: int = Field(100, ge=0, description="held-out prompts whose pair the judge itself is tried on")


Rater = Annotated[OpenAIRater | RewardModelRater, Field(discriminator="kind")]
Judge = Annotated[OpenAIJudge | RewardModelJudge, Field(discriminator="kind")]
# What decides how fast they answer, and not what.
PACE = ("concurrency", "timeout", "retries", "api_key_env", "batch_size")


class Sample(Section):
    """Answers to a source's prompts by the model that `train` starts from, `model.id` with `model.adapter`."""

    answers: int = Field(4, ge=2, description="answers to each prompt")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus that is sampled from")
    top_k: int = Field(0, ge=0, description="likeliest tokens that are sampled from; 0: all")
    max_new_tokens: int = Field(512, ge=1, description="tokens per answer; one that finds no end is dropped")
    keep: bool = Field(False, description="the source's own answers are candidates too, rated alike")
    slice: list[int] | None = Field(None, description="[part, parts], from 0: that part of the prompts, by hash")
    server: Server | None = Field(None, description="{base_url, model}: an OpenAI-compatible server answers instead")

    @field_validator("slice")
    @classmethod
    def _slice_is_a_part(cls, part: list[int] | None) -> list[int] | None:
        if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1]):
            raise ValueError(f"must be [part, parts] from 0, such as [0, 3], [1, 3] and [2, 3], not {part}")
        return part

    @field_validator("top_k")
    @classmethod
    def _several_tokens(cls, top_k: int) -> int:
        if top_k == 1:
            raise ValueError("1 makes all answers to a prompt alike; set 0 for all tokens, or 20, say")
        return top_k
