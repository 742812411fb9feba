"""The built-in model, reward model and sets as they are shipped: whole, known by their sums, and able to speak."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from dpo_cli.chat import chat_tokens
from dpo_cli.errors import DpoError
from dpo_cli.records import Message
from dpo_cli.smoke import BUILTINS, MODEL, REWARD_MODEL, resolve
from tests.tools.make_style_reward import scores, spoilt
from tests.tools.make_tiny_qwen3 import Question, all_questions, training_questions
from tests.tools.smoke_data import SOURCES, answer
from tests.tools.smoke_grammar import styles
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SHIPPED = resolve(MODEL).parent


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve(MODEL))


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(resolve(MODEL), output_loading_info=True)
    report = loaded[1]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return loaded[0]


# ------------------------------------------------------------------------------------------------------------ as files


def test_every_file_is_the_one_whose_sum_the_repository_holds() -> None:
    lines = (Path(__file__).parents[1] / "tools" / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [path for path in SHIPPED.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {
        path.relative_to(SHIPPED).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    } == sums


def test_an_unknown_id_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(DpoError, match="tiny-qwen33") as caught:
        resolve("builtin:tiny-qwen33")
    hint = str(caught.value.hint)
    assert "did you mean builtin:tiny-qwen3?" in hint
    assert all(builtin in hint for builtin in BUILTINS)


# ----------------------------------------------------------------------------------------------------------- the model


def test_it_loads_whole_as_a_small_float32_qwen3_with_tied_embeddings(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 300_000 < model.num_parameters() < 700_000
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert len(tokenizer) == model.config.vocab_size
    logits = model(torch.arange(2000)[None]).logits
    assert logits.shape == (1, 2000, model.config.vocab_size) and torch.isfinite(logits).all()


def asked(count: int, seed: int) -> list[tuple[str, str]]:
    """(language, question) by turns in English and Chinese, drawn from the topics and ways to ask."""
    rng = Random(seed)
    found = []
    for source in itertools.islice(
        itertools.cycle((SOURCES["style-ultrafeedback-en"], SOURCES["style-ultrafeedback-zh"])), count
    ):
        goal = rng.choice(source.topics.strip().splitlines()).split("|")[0]
        found.append((source.language, rng.choice(source.asks).format(goal=goal)))
    return found


def sampled(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[list[int]]:
    """An answer to each question, at the temperature and top_p of a recipe; the tokens with what ends them."""
    torch.manual_seed(0)
    found = []
    for question in questions:
        prompt = chat_tokens(
            tokenizer, [Message(role="user", content=question)], add_generation_prompt=True, enable_thinking=False
        )
        made = model.generate(
            torch.tensor([prompt]), do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=96
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def test_it_speaks_both_languages_in_both_styles_and_ends_by_itself(model: Any, tokenizer: Any) -> None:
    questions = asked(40, seed=1)
    answers = sampled(model, tokenizer, [question for _, question in questions])
    ended = [ids[-1] == tokenizer.eos_token_id for ids in answers]
    assert sum(ended) >= 0.95 * len(ended)
    for language in ("en", "zh"):
        said = [
            style
            for (asked_in, _), ids in zip(questions, answers, strict=True)
            if asked_in == language
            for style in styles(tokenizer.decode(ids, skip_special_tokens=True), language)
        ]
        assert len(said) >= 50
        known = [style for style in said if style]
        assert len(known) >= 0.95 * len(said), language
        assert 0.35 <= known.count("direct") / len(known) <= 0.65, language


def test_the_chat_template_is_trls_own_qwen3(tokenizer: Any) -> None:
    import trl

    shipped = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    assert tokenizer.chat_template == shipped.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- the reward model


@pytest.fixture(scope="module")
def reward() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(resolve(REWARD_MODEL))


def two_styles(rng: Random, question: Question) -> list[str]:
    """The more direct answer first."""
    worse, better = sorted(rng.sample(range(4), 2))
    return [answer(rng, question.language, question.slots, quality) for quality in (better, worse)]


def whole_and_spoilt(rng: Random, question: Question) -> list[str]:
    whole = answer(rng, question.language, question.slots, rng.randrange(4))
    return [whole, spoilt(rng, whole)]


@pytest.mark.parametrize(("answers", "least"), [(two_styles, 0.95), (whole_and_spoilt, 0.9)])
def test_it_prefers_of_two_answers_to_prompts_that_it_never_saw(
    reward: Any, tokenizer: Any, held_out: Any, answers: Any, least: float
) -> None:
    rng = Random(5)
    rows = [(one.prompt, text) for one in held_out for text in answers(rng, one)]
    with torch.inference_mode():
        good, bad = scores(reward, tokenizer, rows).view(-1, 2).unbind(1)
    assert len(good) >= 100
    assert float((good > bad).float().mean()) >= least


@pytest.fixture(scope="module")
def held_out() -> Any:
    """The questions that no training text of the two models has."""
    seen = {str(one.prompt) for one in training_questions()}
    return [one for one in all_questions() if str(one.prompt) not in seen]
