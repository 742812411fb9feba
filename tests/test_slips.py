"""Slips of the hand in a recipe: what was meant is named, or taken where nothing else can be meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import Recipe, load

START = "model: {id: a/b}\ndata: {sources: [{id: c/d}]}\n"  # two lines, so that what is added starts on line 3
Load = Callable[..., Recipe]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`loaded(text, *settings)`: the recipe with that text, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def go(text: str, *settings: str) -> Recipe:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return load(Path("r.yaml"), list(settings))

    return go


def refused(loaded: Load, text: str) -> str:
    with pytest.raises(DpoError) as caught:
        loaded(text)
    assert caught.value.exit_code == USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "says", "shown", "line"),
    [
        ("lora:\n\tr: 8\n", "a tab where spaces belong", "→   r: 8", 4),
        ("lora:\n  r:\t8\n", "a tab where spaces belong", "  r:→   8", 4),
        ("lora\n  r: 8\n", "no colon follows the key", "lora", 3),
        ("train:\n  beta:0.1\n  max_steps: 3\n", "no space follows the colon", "  beta:0.1", 4),
        ("train:\n  beta：0.1\n  max_steps: 3\n", "Chinese colon", "  beta：0.1", 4),
        ("train: {beta: 0.1\nlora: {r: 8}\n", "a bracket is not closed", "train: {beta: 0.1", 3),
        ("train: {method: 'dpo}\n", "a quote or a bracket is not closed", "train: {method: 'dpo}", 3),
        ("name: my run: the first\n", "a text has a colon in it", "name: my run: the first", 3),
        ("lora:\n  r: 1\n   alpha: 2\n", "indented otherwise than those above it", "   alpha: 2", 5),
        ("lora:\n    r: 1\n  alpha: 2\n", "indented otherwise than those above it", "  alpha: 2", 5),
        ("lora:\n\u3000r: 8\n", "'\\u3000' in it, which is no plain space", "\u3000r: 8", 4),
    ],
)
def test_a_line_that_is_no_yaml_is_shown_with_what_is_wrong(
    loaded: Load, more: str, says: str, shown: str, line: int
) -> None:
    message = refused(loaded, START + more)
    assert says in message.splitlines()[0]
    assert message.splitlines()[1] == f"  {shown}"
    assert f"where: r.yaml:{line}" in message


@pytest.mark.parametrize(
    ("more", "key", "says"),
    [
        ("lora: 3", "lora", "must be a map, not 3: write lora: {r: 3}"),
        ("train: dpo", "train", 'must be a map, not "dpo": write train: {method: "dpo"}'),
        ("train:\n  beta:0.1", "train", "write beta: 0.1, with a space behind the colon"),
        ("train:\n  beta = 0.1", "train", "write beta: 0.1, with a space behind the colon"),
        ("engine: {early_stopping: true}", "engine.early_stopping", "{metric, patience}"),
        ("eval: {judge: gpt}", "eval.judge", "{kind: openai, …} or {kind: reward_model, id}"),
        ("eval: {top_p: 80%}", "eval.top_p", 'must be a number, not "80%": write 0.8'),
        ("eval: {prompts: 1.5k}", "eval.prompts", "write 1500"),
        ("train: {beta: '0,5'}", "train.beta", "write 0.5"),
        ("train: {method: grpo}", "train.method", '"grpo" learns from a reward while it samples'),
    ],
)
def test_a_value_of_another_kind_is_told_what_to_write(loaded: Load, more: str, key: str, says: str) -> None:
    message = refused(loaded, f"{START}{more}\n")
    assert f"  r.yaml:3  {key}\n" in message
    assert says in message


@pytest.mark.parametrize(
    ("data", "key", "says"),
    [
        ("a/b", "data", 'must be a map, not "a/b": write data: {sources: "a/b"}'),
        ("{sources: {mine: {id: a/b}}}", "data.sources", "[{name: mine, id: …}]"),
        ("{sources: [{id: a/b, sample: 4}]}", "data.sources[0].sample", "{answers: 4}"),
    ],
)
def test_data_that_are_written_otherwise_are_told_what_to_write(loaded: Load, data: str, key: str, says: str) -> None:
    message = refused(loaded, f"model: {{id: a/b}}\ndata: {data}\n")
    assert f"  r.yaml:2  {key}\n" in message
    assert says in message


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("export.formats=gguf", "export.formats", ["gguf"]),
        ("export.formats=adapter, gguf", "export.formats", ["adapter", "gguf"]),
        ("lora.target_modules=q_proj,v_proj", "lora.target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=all", "lora.target_modules", "auto"),
        ("lora.target_modules=[all-linear]", "lora.target_modules", "auto"),
        ("data.filters.contaminated={subsets: bench}", "data.filters.contaminated.subsets", ["bench"]),
        ("train={loss_type: sigmoid, loss_weights: 1}", "train.loss_weights", [1.0]),
    ],
)
def test_a_scalar_is_taken_where_a_list_of_one_is_meant(loaded: Load, setting: str, key: str, value: Any) -> None:
    found: Any = loaded(START, setting)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_file_of_one_in_place_of_a_list_is_found_from_the_recipes_folder(loaded: Load, tmp_path: Path) -> None:
    recipe = loaded(f"{START[:-2]}, contamination: bench.jsonl}}\n")
    assert recipe.data.contamination == [str(tmp_path / "bench.jsonl")]
    assert recipe.where("data", "contamination", 0) == "r.yaml:2  data.contamination[0]"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.json"])
def test_a_data_file_in_place_of_a_recipe_is_told_of_init(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"prompt": "a"}]\n', encoding="utf-8")
    with pytest.raises(DpoError, match="is a data file, not a recipe") as caught:
        load(tmp_path / name)
    assert "dpo-cli init" in (caught.value.hint or "")
