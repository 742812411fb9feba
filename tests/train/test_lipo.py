"""LiPO's trainer against TRL's DPOTrainer on the same two answers, against a loop over lists, and learning."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.records import Pair
from dpo_cli.run import Run
from dpo_cli.train import lipo, listwise, shared_prefix
from dpo_cli.train.prefix_check import check
from tests.train.runs import batch_of, cut_short, leave_start, log, step, trl_trainer

Build = Callable[..., Any]
SmokeRun = Callable[..., Run]
LISTS = ["train.method=lipo", "data.format=ranked"]
WORDS = ("the", "a", "is", "and", "of", "to", "amber", "basket", "candle", "的", "是", "我")
BETA = 0.3


def ranked(counts: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows as prepare writes them, with so many answers each."""
    rng = random.Random(seed)

    def say(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [
        {
            "id": f"row-{number}",
            "prompt": [{"role": "user", "content": say(12)}],
            "candidates": [
                {"text": say(14), "score": round(0.9 - 0.13 * place, 2), "model": None} for place in range(count)
            ],
            "chat_template_kwargs": {"enable_thinking": False},
            "language": "en",
            "source": "made-up",
        }
        for number, count in enumerate(counts)
    ]


@pytest.fixture
def build(tmp_path: Path, tiny_model: Path) -> Build:
    """`build(rows)`: TRL's trainer for lists, or (`pairs=True`) its own for the best and the worst answers."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    def go(rows: list[dict[str, Any]], *, pairs: bool = False, mixins: tuple[type, ...] = (), **options: Any) -> Any:
        set_seed(1)
        base: Any = options.pop("base", None) or AutoModelForCausalLM.from_pretrained(tiny_model)
        base.get_input_embeddings().weight.data *= 12.0  # so that entropies differ, and a token is guessed now and then
        given = [Pair.of_row(row).to_json() for row in rows] if pairs else rows
        dataset, tokenizer = datasets.Dataset.from_list(given), AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = options.pop("template", None) or tokenizer.chat_template
        trainer = trl_trainer(
            tmp_path, get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
            tokenizer, dataset if pairs else lipo.rows(dataset, seed=0),
            *mixins, *([] if pairs else [lipo.Listwise]), beta=BETA, per_device_train_batch_size=len(rows),
            gradient_accumulation_steps=1, **{"loss_type": ["lambda"], **options},
        )  # fmt: skip
        leave_start(trainer)
        return trainer

    return go


# ------------------------------------------------------------------------------------------------------------- the data


def test_scores_are_the_labels_and_an_order_becomes_even_steps() -> None:
    assert lipo.relevance([0.9, 0.55, 0.1]) == [0.9, 0.55, 0.1]
    assert lipo.relevance([None, None]) == [1.0, 0.0]
    assert lipo.relevance([None] * 5) == [1.0, 0.75, 0.5, 0.25, 0.0]


# A prompt that ends in what no text of a chat has, as Qwen3's does with thinking off.
THINKS_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, THINKS_FIRST], ids=["own template", "thinks first"])
def test_tokens_are_those_of_dpo(template: str | None, build: Build) -> None:
    rows = ranked([2, 4, 3])
    lists = build(rows, template=template).train_dataset
    for one, other in ((0, 1), (1, 0)):
        sides = [{**row, "candidates": [row["candidates"][one], row["candidates"][other]]} for row in rows]
        for mine, row in zip(lists, build(sides, pairs=True, template=template).train_dataset, strict=True):
            assert mine["prompt_ids"] == row["prompt_ids"]
            assert [mine["answer_ids"][one], mine["answer_ids"][other]] == [row["chosen_ids"], row["rejected_ids"]]
    assert [len(row["answer_ids"]) for row in lists] == [2, 4, 3]


def test_a_batch_is_cut_and_padded_as_trl_does_it(build: Build) -> None:
    trainer = build(ranked([3, 2]), max_length=40)
    batch, rows = batch_of(trainer), list(trainer.train_dataset)
    assert batch["present"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["relevance"].tolist()[1] == pytest.approx([0.9, 0.77, 0.0])
    texts = [row["prompt_ids"] + ids for row in rows for ids in row["answer_ids"]]
    assert max(map(len, texts)) > 40
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == text[:40]
    starts = [len(row["prompt_ids"]) for row in rows for _ in row["answer_ids"]]
    assert batch["completion_mask"].argmax(1).tolist() == starts
    assert starts[-1] != starts[0]
    fitting = build(ranked([3, 2]), max_length=max(starts)).train_dataset
    assert [len(row["prompt_ids"]) for row in fitting] == [min(starts)], "a prompt that fills it has no answer"


def test_tokens_are_counted_in_training_alone(build: Build) -> None:
    trainer = build(ranked([2, 3]))
    batch = batch_of(trainer)
    for mode, counted in ((False, 0), (True, int(batch["attention_mask"].sum()))):
        trainer.model.train(mode)
        trainer.compute_loss(trainer.model, batch)
        assert trainer._total_train_tokens == counted


# -------------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize(("loss", "dpo"), [("list_mle", "sigmoid"), ("softmax_norm", "sigmoid_norm")])
def test_with_two_answers_a_step_is_trl_s_dpo(loss: str, dpo: str, build: Build) -> None:
    """Loss, gradients and the figures that are logged."""
    import torch

    rows = ranked([2] * 6)
    expected, grads, figures = step(build(rows, pairs=True, loss_type=[dpo]))
    found, mine, logged = step(build(rows, loss_type=[loss]))
    assert found == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(mine, grads, rtol=1e-3, atol=2e-6)  # the rows stand in another order
    assert len(logged) == 7
    assert logged == pytest.approx({name: figures[name] for name in logged}, rel=1e-4, abs=1e-6)
    assert 0 < figures["rewards/accuracies"] < 1


def test_lists_of_any_length_in_one_batch(build: Build) -> None:
    """Against every answer run by itself and the lists put together in a loop."""
    import torch

    trainer = build(ranked([4, 2, 7, 3]))
    model, lists = trainer.model, list[list[float]]()
    for row in trainer.train_dataset:
        rewards = []
        for answer in row["answer_ids"]:
            ids, start = torch.tensor([row["prompt_ids"] + answer]), len(row["prompt_ids"])

            def log_prob(ids: Any = ids, start: int = start) -> float:
                logits = model(input_ids=ids).logits.log_softmax(-1)
                return float(logits[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :].sum())

            model.eval()
            with torch.no_grad():
                policy = log_prob()
                with model.disable_adapter():
                    rewards.append(BETA * (policy - log_prob()))
        lists.append(rewards)
    ordered = [[one > other for one, other in itertools.combinations(rewards, 2)] for rewards in lists]
    for loss in listwise.LOSS_TYPES:
        trainer.loss_types = [loss]
        found, _, logged = step(trainer)
        losses = []
        for row, rewards in zip(trainer.train_dataset, lists, strict=True):
            lengths = [len(answer) if loss.endswith("_norm") else 1 for answer in row["answer_ids"]]
            scores = torch.tensor([reward / length for reward, length in zip(rewards, lengths, strict=True)])
            function = listwise.LOSSES[loss.removesuffix("_norm")]
            everyone = torch.ones(len(scores), dtype=torch.bool)
            losses.append(float(function(scores, torch.tensor(row["relevance"]), everyone)))
        assert found == pytest.approx(mean(losses), rel=1e-3, abs=1e-6), loss
        assert logged["rewards/accuracies"] == pytest.approx(mean(map(mean, ordered)))
        assert logged["rewards/chosen"] == pytest.approx(mean(one[0] for one in lists), rel=1e-3, abs=1e-5)
        assert logged["rewards/rejected"] == pytest.approx(mean(one[-1] for one in lists), rel=1e-3, abs=1e-5)


def test_losses_mix_by_their_weights(build: Build) -> None:
    rows = ranked([4, 3])
    one, other = (step(build(rows, loss_type=[name]))[0] for name in ("lambda", "softmax"))
    mixed = step(build(rows, loss_type=["lambda", "softmax"], loss_weights=[0.25, 2.0]))[0]
    assert mixed == pytest.approx(0.25 * one + 2.0 * other, rel=1e-5)


@pytest.mark.parametrize("counts", [[4, 2, 7, 3], [1, 3, 2]])
def test_the_prompt_of_a_list_is_computed_once_and_the_numbers_stay(counts: list[int], build: Build) -> None:
    import torch

    rows = ranked(counts)
    if counts[0] == 4:
        rows[0]["candidates"][2] = dict(rows[0]["candidates"][1])  # twice the same answer
    expected, grads, figures = step(build(rows))
    trainer = build(rows)
    shared = shared_prefix.install(trainer.model)
    assert check(trainer, shared, batch_of(trainer)).ok
    found, mine, logged = step(trainer)
    assert found == pytest.approx(expected, rel=1e-6)  # about 10 roundings of float32
    assert logged == pytest.approx(figures, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(mine, grads, rtol=1e-3, atol=2e-6)
    least = [len(row["prompt_ids"]) + sum(map(len, row["answer_ids"])) for row in trainer.train_dataset]
    assert 0 < shared.stream_tokens <= 2 * sum(least)  # by the policy, and by the reference


# ------------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> SmokeRun:
    """`smoke_run("softmax", "train.max_steps=4")`: the smoke recipe by lipo, prepared once for all."""
    from dpo_cli import recipe
    from dpo_cli.prepare.pipeline import prepare

    base = [*LISTS, "data.total=160", "data.eval_size=60"]
    path, folder = repository / "recipes" / "smoke.yaml", tmp_path_factory.mktemp("lipo")
    prepared = folder / "data"
    prepared.mkdir()
    prepare(recipe.load(path, base), prepared, quiet=True)

    def go(loss: str, *settings: str, again: Run | None = None) -> Run:
        from dpo_cli.train.trainer import train

        loaded = recipe.load(path, [*base, f"train.loss_type={loss}", *settings])
        run = again or Run(folder / f"{loss}-{len(list(folder.iterdir()))}")
        if not again:
            run.folder.mkdir()
            run["prepare"].symlink_to(prepared)
        train(loaded, run, quiet=True)
        return run

    return go


@pytest.mark.slow
def test_it_learns(smoke_run: SmokeRun) -> None:
    """On prompts never seen, nearly all pairs of a list come out in their order; for lambda see tests/end_to_end."""
    run = smoke_run(
        "list_mle", "train.max_steps=16", "train.learning_rate=3e-3", "train.eval_strategy=steps", "train.eval_steps=16"
    )
    held_out = next(row for row in log(run.folder) if "eval_rewards/accuracies" in row)
    assert held_out["eval_rewards/accuracies"] >= 0.85
    assert held_out["eval_rewards/margins"] > 0.3


FEW = ("train.max_steps=4", "train.logging_steps=1", "train.save_steps=2", "train.eval_strategy=steps")


@pytest.mark.slow  # tests/train/test_methods.py cuts short runs by other methods
def test_a_run_that_was_cut_short_goes_on_to_the_same_bytes(smoke_run: SmokeRun) -> None:
    settings = (*FEW, "train.eval_steps=2", "train.gradient_accumulation_steps=1")
    run = smoke_run("lambda", *settings)
    rows, whole = log(run.folder), (run.adapter / "adapter_model.safetensors").read_bytes()
    assert {"eval_en_loss", "eval_zh_rewards/margins", "eval_logps/chosen"} <= {key for row in rows for key in row}

    cut_short(run.folder, step=2)
    smoke_run("lambda", *settings, again=run)
    assert json.loads((run["train"] / "metrics.json").read_text(encoding="utf-8"))["resumed_from"] == 2
    same = ("step", "loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/rejected", "eval_loss")
    assert [[row.get(key) for key in same] for row in log(run.folder)] == [
        [row.get(key) for key in same] for row in rows
    ]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == whole


def test_a_loss_that_is_no_number_names_its_prompts(build: Build) -> None:
    import torch
    from dpo_cli.train.trl_fixes import Fixes

    trainer = build(ranked([2, 3, 2]), mixins=(Fixes,))
    with torch.no_grad():
        next(one for one in trainer.model.parameters() if one.requires_grad).fill_(float("nan"))
    with pytest.raises(DpoError, match="row-0, row-2"):
        trainer.training_step(trainer.model, trainer.data_collator([trainer.train_dataset[n] for n in (0, 2)]))


def test_the_plan_counts_all_answers_of_a_prompt(repository: Path) -> None:
    from dpo_cli import recipe
    from dpo_cli.train.memory import GIB
    from dpo_cli.train.plan import plan
    from transformers import Qwen3Config

    loaded = recipe.load(repository / "recipes/smoke.yaml", [*LISTS, "train.per_device_train_batch_size=2"])
    few, some, many = (plan(loaded, [(100, *[80] * count)] * 4, Qwen3Config(), 80 * GIB) for count in (2, 3, 4))
    kept = [one.memory.activations for one in (few, some, many)]
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=1e-6) and kept[1] - kept[0] > 0.4 * kept[0]
    assert many.longest == 180


def test_a_ranked_row_is_evaluated_by_its_best_and_worst_answers() -> None:
    row = ranked([4])[0]
    pair = Pair.of_row(row)
    texts = [side[0]["content"] for side in (pair.chosen, pair.rejected)]
    assert texts == [row["candidates"][place]["text"] for place in (0, 3)]
    assert (pair.score_chosen, pair.score_rejected, pair.margin) == (0.9, 0.51, 0.39)
    assert Pair.of_row(pair.to_json()) == pair


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.method=lipo", "data.format=pairs"], "not from pairs: set data.format: ranked, or train.method: dpo"),
        (["data.format=ranked"], "not from ranked: set data.format: pairs, or train.method: lipo"),
        ([*LISTS, "train.loss_type=sigmoid"], "sigmoid is a loss of train.method dpo"),
        ([*LISTS, "train.router_aux_loss_coef=0.1"], "belongs to train.method dpo"),
        ([*LISTS, "train.label_smoothing=0.1"], "belongs to train.method dpo"),
        ([*LISTS, "engine.reference_cache=on"], "set engine.reference_cache: auto"),
    ],
)  # fmt: skip
def test_check_says_which_to_use(settings: list[str], said: str, repository: Path) -> None:
    from dpo_cli import recipe

    with pytest.raises(DpoError, match=re.escape(said)):
        recipe.load(repository / "recipes" / "smoke.yaml", settings)
