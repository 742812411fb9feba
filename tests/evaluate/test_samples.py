"""Sampled answers: that they are samples, the same in any batch and after any crash, and how far the model moved."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import smoke
from dpo_cli.chat import chat_tokens
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.samples import Sample, chat_prompt, draws, sample_pairs
from dpo_cli.inference import Answer
from dpo_cli.recipe import Eval
from dpo_cli.records import Message, Pair
from dpo_cli.store import Store

PROMPTS = (
    "你好",
    "Say a word.",
    "请用中文介绍一下北京的天气，并且说明“晴”和“阴”的区别。",
    "Write a list of the birds that live near an old harbour, and say of each what it eats. " * 4,
    "What is the weather like?",
    "一二三四五六七八九十" * 12,
)
OFF = {"enable_thinking": False}
SETTINGS = Eval(max_new_tokens=12, batch_size=8)


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def pair(place: int, text: str, **changes: Any) -> Pair:
    answer: list[Message] = [{"role": "assistant", "content": "-"}]
    made = Pair(f"id-{place}", ask(text), answer, answer, "en", "source", chat_template_kwargs=OFF)
    return replace(made, **changes)


PAIRS = [pair(place, text) for place, text in enumerate(PROMPTS)]


def build() -> tuple[Any, Any]:
    """The tiny Qwen3 with a random LoRA, large enough that the tuned model says other things than the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = smoke.resolve("builtin:tiny-qwen3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any]:
    return build()


@pytest.fixture
def model(built: tuple[Any, Any]) -> Any:
    return built[0]


@pytest.fixture
def tokenizer(built: tuple[Any, Any]) -> Any:
    return built[1]


@pytest.fixture
def sample(model: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., list[Sample]]:
    """`sample(pairs, batch_size=1)`: into a new file, or that of `name`."""

    def go(pairs: Sequence[Pair] = PAIRS, name: str = "", seed: int = 0, **changes: Any) -> list[Sample]:
        path = tmp_path / (name or f"{len(list(tmp_path.iterdir()))}.sqlite")
        settings = SETTINGS.model_copy(update=changes)
        with Store(path) as store:
            return sample_pairs(model, tokenizer, pairs, settings, seed, store, progress=True)

    return go


@contextmanager
def hooked(model: Any, hook: Callable[..., Any], part: str = "lm_head", **options: Any) -> Iterator[None]:
    handle = getattr(model.get_base_model(), part).register_forward_hook(hook, **options)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def saying(model: Any, ids: Sequence[int]) -> Iterator[None]:
    """The model, base and tuned, answers with these tokens, again and again."""
    steps = 0

    def say(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        forced = torch.full_like(logits, -1e4)
        forced[..., ids[steps % len(ids)]] = 1e4
        steps += 1
        return forced

    with hooked(model, say):
        yield


def texts(samples: Sequence[Sample]) -> list[tuple[Answer, Answer]]:
    return [(one.base, one.tuned) for one in samples]


# -------------------------------------------------------------------------------------------------- the distribution


def warped(logits: torch.Tensor, settings: Eval) -> torch.Tensor:
    """Probabilities after temperature, top-k and top-p, worked out from the definitions."""
    probabilities = (logits.double() / settings.temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: settings.top_k] if settings.top_k else order
    top = probabilities[kept] / probabilities[kept].sum()
    before = top.cumsum(0) - top
    kept = kept[before < settings.top_p]
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"temperature": 1.5, "top_k": 0, "top_p": 0.5}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.3, "top_k": 7, "top_p": 1.0}, marks=pytest.mark.slow),
    ],
    ids=["defaults", "nucleus", "top-k"],
)
def test_answers_are_samples_of_the_warped_distribution(model: Any, tokenizer: Any, changes: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    settings = SETTINGS.model_copy(update={"max_new_tokens": 1, "batch_size": 500, **changes})
    count = 2000
    sides = draws(model, tokenizer, ask("Say a word."), settings, 0, count, OFF)
    ids = tokenizer.apply_chat_template(ask("Say a word."), add_generation_prompt=True, return_tensors="pt", **OFF)
    with torch.no_grad(), model.disable_adapter():
        base = model(**ids).logits[0, -1]
    with torch.no_grad():
        tuned = model(**ids).logits[0, -1]
    for answers, logits in zip(sides, (base, tuned), strict=True):
        expected = warped(logits, settings)
        seen = Counter(answer.ids[0] for answer in answers)
        words = expected.nonzero()[:, 0].tolist()
        assert len(words) > 1
        assert set(seen) <= set(words)
        # Words too rare for the test's approximation share a cell.
        cells: list[tuple[float, int]] = []
        rare = [0.0, 0]
        for word in words:
            if count * float(expected[word]) < 5:
                rare = [rare[0] + count * float(expected[word]), rare[1] + seen[word]]
            else:
                cells.append((count * float(expected[word]), seen[word]))
        cells += [(rare[0], int(rare[1]))] if rare[0] else []
        hoped, observed = zip(*cells, strict=True)
        assert chisquare(observed, hoped).pvalue > 0.001


def test_temperature_zero_is_the_bare_models_greedy_answer(
    model: Any, tokenizer: Any, sample: Callable[..., list[Sample]]
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    bare: Any = AutoModelForCausalLM.from_pretrained(smoke.resolve("builtin:tiny-qwen3")).eval()
    bare.generation_config = GenerationConfig(eos_token_id=bare.generation_config.eos_token_id, pad_token_id=0)
    for one in sample(temperature=0.0):
        ids = tokenizer.apply_chat_template(one.prompt, add_generation_prompt=True, return_tensors="pt", **OFF)
        expected = bare.generate(**ids, max_new_tokens=12, do_sample=False)
        assert one.base.ids == expected[0, ids["input_ids"].shape[1] :].tolist()


def test_base_and_tuned_share_their_noise(model: Any, tokenizer: Any, sample: Callable[..., list[Sample]]) -> None:
    """So an adapter that does nothing changes nothing, however hot the sampling."""
    weights = {name: value.clone() for name, value in model.state_dict().items() if "lora_B" in name}
    try:
        for name, value in model.named_parameters():
            if name in weights:
                value.data.zero_()
        for one in sample(temperature=2.0, top_k=0, top_p=1.0):
            assert one.tuned == one.base
            assert one.kl_total == 0.0
    finally:
        model.load_state_dict(weights, strict=False)


def test_the_reference_is_the_adapter_that_training_started_from(
    model: Any, sample: Callable[..., list[Sample]]
) -> None:
    plain = sample()
    weights = {name: value.clone() for name, value in model.state_dict().items() if ".default." in name}
    model.add_adapter("reference", model.peft_config["default"])
    try:
        model.load_state_dict({k.replace(".default.", ".reference."): v for k, v in weights.items()}, strict=False)
        for one, before in zip(sample(), plain, strict=True):
            assert one.tuned == before.tuned == one.base
            assert one.kl_total == 0.0
    finally:
        model.delete_adapter("reference")


# --------------------------------------------------------------------------------------------------- the same answers


def test_no_batch_and_no_padding_changes_an_answer(sample: Callable[..., list[Sample]], tokenizer: Any) -> None:
    """Prompts of 10 to 400 tokens, so that the short ones are nearly all padding."""
    together, alone = sample(batch_size=8), sample(batch_size=1)
    assert texts(together) == texts(alone) == texts(sample(PAIRS[::-1], batch_size=4))[::-1]
    for one, other in zip(together, alone, strict=True):
        assert one.kl_total == other.kl_total
    assert texts(together) != texts(sample(seed=1))
    padding, tokenizer.pad_token = tokenizer.pad_token, None  # as some tokenizers have none
    unpadded = sample()
    tokenizer.pad_token = padding
    assert texts(unpadded) == texts(together)
    assert len({tuple(one.base.ids) for one in together}) == len(PAIRS)
    assert all(one.base.ids != one.tuned.ids for one in together)


def test_a_prompt_of_several_pairs_is_answered_once(sample: Callable[..., list[Sample]]) -> None:
    thinking = pair(8, PROMPTS[0], chat_template_kwargs={"enable_thinking": True})
    doubled = [PAIRS[0], pair(7, PROMPTS[0]), thinking, *PAIRS[1:]]
    assert [one.id for one in sample(doubled)] == ["id-0", "id-8", "id-1", "id-2", "id-3", "id-4", "id-5"]
    assert [one.id for one in sample(doubled, prompts=3)] == ["id-0", "id-8", "id-1"]
    assert sample(doubled, prompts=0) == []


def test_a_conversation_has_to_leave_room_for_its_answer(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    ids = chat_tokens(tokenizer, ask("你好"), add_generation_prompt=True, **OFF)
    for more, fits in ((SETTINGS.max_new_tokens, True), (SETTINGS.max_new_tokens - 1, False)):
        monkeypatch.setattr(model.config, "max_position_embeddings", len(ids) + more)
        with nullcontext() if fits else pytest.raises(DpoError, match="too many to answer"):
            assert chat_prompt(model, tokenizer, ask("你好"), SETTINGS, OFF, "hint") == ids


def test_draws_differ_from_each_other_and_by_seed_and_come_again(model: Any, tokenizer: Any) -> None:
    base, tuned = draws(model, tokenizer, ask("你好"), SETTINGS, 0, 5, OFF)
    assert len({tuple(answer.ids) for answer in base}) == len({tuple(answer.ids) for answer in tuned}) == 5
    few = SETTINGS.model_copy(update={"batch_size": 2})
    assert draws(model, tokenizer, ask("你好"), few, 0, 5, OFF) == (base, tuned)
    assert draws(model, tokenizer, ask("你好"), SETTINGS, 1, 5, OFF) != (base, tuned)


def test_only_the_recipe_says_how_to_sample(model: Any, sample: Callable[..., list[Sample]]) -> None:
    """A model's folder brings sampling settings of its own; of those only the end tokens count."""
    expected = texts(sample())
    own = model.get_base_model().generation_config
    common = [answer.ids[0] for both in expected for answer in both]
    strange = {"repetition_penalty": 5.0, "suppress_tokens": common, "num_beams": 2, "min_length": 500, "top_k": 1}
    before = {name: getattr(own, name) for name in strange}
    try:
        own.update(**strange)
        assert texts(sample()) == expected
        assert own.suppress_tokens == common  # and they stay as they were
    finally:
        own.update(**before)


# --------------------------------------------------------------------------------------------------------- one answer


def test_how_an_answer_ends(model: Any, tokenizer: Any, sample: Callable[..., list[Sample]]) -> None:
    words = tokenizer("好天气。", add_special_tokens=False)["input_ids"]
    for end in ("<|im_end|>", "<|endoftext|>"):  # the tokenizer's, and one of the model's generation config
        for text, said in (("好天气。", words), ("", [])):
            ids = [*said, tokenizer.convert_tokens_to_ids(end)]
            with saying(model, ids):
                (one,) = sample(PAIRS[:1])
            assert one.base == one.tuned == Answer(text, ids, finished=True)
            assert math.isfinite(one.kl_total)
    with saying(model, words):
        (one,) = sample(PAIRS[:1], max_new_tokens=len(words))
    assert one.base == Answer("好天气。", words, finished=False)


@pytest.mark.parametrize(
    ("said", "thought", "text", "finished"),
    [
        ("<think>\n该怎么说呢\n</think>\n\n晴。<|im_end|>", "<think>\n该怎么说呢\n</think>", "晴。", True),
        ("该怎么说呢</think>晴。<|im_end|>", "该怎么说呢</think>", "晴。", True),  # the template opened it
        ("<think>\n该怎么说呢", "<think>\n该怎么说呢", "", False),
    ],
)
def test_thinking_is_no_part_of_the_text(
    model: Any,
    tokenizer: Any,
    sample: Callable[..., list[Sample]],
    said: str,
    thought: str,
    text: str,
    finished: bool,
) -> None:
    ids, thoughts = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (said, thought))
    with saying(model, ids):
        (one,) = sample(PAIRS[:1], max_new_tokens=len(ids))
    assert one.base == Answer(text, ids, finished, len(thoughts))
    assert one.base.answer_ids == ids[len(thoughts) :]


@pytest.mark.parametrize(("thinking", "ending"), [(False, "<think>\n\n</think>\n\n"), (True, "assistant\n")])
def test_the_prompt_is_rendered_as_in_training(
    model: Any, tokenizer: Any, sample: Callable[..., list[Sample]], thinking: bool, ending: str
) -> None:
    seen: list[torch.Tensor] = []
    with hooked(model, lambda _, __, kwargs, ___: seen.append(kwargs["input_ids"]), "model", with_kwargs=True):
        sample([pair(0, "你好，<世界>？", chat_template_kwargs={"enable_thinking": thinking})])
    prompt = tokenizer.decode(seen[0][0])
    assert prompt.startswith("<|im_start|>user\n你好，<世界>？<|im_end|>")
    assert prompt.endswith(ending)


# ------------------------------------------------------------------------------------------------------------- the KL


def test_kl_is_exact(model: Any, tokenizer: Any, sample: Callable[..., list[Sample]]) -> None:
    """Against one forward of everything in float64."""
    for one in sample():
        ids = tokenizer.apply_chat_template(one.prompt, add_generation_prompt=True, **OFF)["input_ids"]
        whole = torch.tensor([ids + one.tuned.ids])
        with torch.no_grad():
            tuned = model(whole).logits[0].double().log_softmax(-1)
            with model.disable_adapter():
                reference = model(whole).logits[0].double().log_softmax(-1)
        answered = slice(len(ids) - 1, -1)
        expected = torch.nn.functional.kl_div(
            reference[answered], tuned[answered], log_target=True, reduction="sum"
        ).item()
        assert expected > 0.01
        assert one.kl_total == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ resume


def test_what_is_in_the_store_is_not_sampled_again(
    model: Any, sample: Callable[..., list[Sample]], tmp_path: Path
) -> None:
    path = tmp_path / "samples.sqlite"
    sample(PAIRS[:2], name=path.name)
    with Store(path) as store:
        store.put({key: {**row, "language": "marked"} for key, row in store.all().items()})
    assert [one.language for one in sample(PAIRS[1:3], name=path.name)] == ["marked", "en"]  # and id-0 is not asked for
    with Store(path) as store:
        assert sorted(store.all()) == ["id-0", "id-1", "id-2"]

    def forbid(*_: Any) -> None:
        raise AssertionError("nothing is left to compute")

    with hooked(model, forbid):
        assert [one.id for one in sample(PAIRS[:3], name=path.name)] == ["id-0", "id-1", "id-2"]


# ------------------------------------------------------------------------------------------------------------- memory


def test_a_batch_that_is_too_large_for_the_gpu_is_halved(model: Any, sample: Callable[..., list[Sample]]) -> None:
    expected = sample()
    sizes: list[int] = []

    def run_out(_: Any, inputs: Any, __: Any) -> None:
        sizes.append(len(inputs[0]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with hooked(model, run_out):
        assert texts(sample(batch_size=5)) == texts(expected)
    assert sizes[0] == 5 and max(sizes[1:]) == 2

    def always(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with hooked(model, always), pytest.raises(DpoError, match="one answer of 12 tokens") as failure:
        sample()
    assert failure.value.where == "eval.max_new_tokens"

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    with hooked(model, broken), pytest.raises(RuntimeError, match="shapes differ"):
        sample()
    assert re.search(r"lower eval\.max_new_tokens; eval\.batch_size", str(failure.value))
