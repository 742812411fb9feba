"""The recipe: what YAML means here, what is refused and in which words, `extends`, `--set`, and the way back out."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import Recipe, dump, json_schema, load
from dpo_cli.recipe.errors import fields_at
from dpo_cli.recipe.foreign import NAMES, OLD_TRAIN_ARGUMENTS, OWNED_TRAIN_ARGUMENTS, SYNONYMS
from dpo_cli.recipe.overview import overview
from dpo_cli.recipe.train import trl_arguments
from dpo_cli.recipe.yaml import read_recipe

MINIMAL = "model: {id: a/b}\ndata: {sources: [{id: c/d}]}\n"  # two lines, so that what is added starts on line 3

Write = Callable[..., Path]
Load = Callable[..., Recipe]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, so that no `a/b` beside us is taken for a local model."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def go(text: str | bytes, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return go


@pytest.fixture
def loaded(write: Write) -> Load:
    """`loaded(more, *settings)`: the minimal recipe with more lines below it."""
    return lambda more="", *overrides, base=MINIMAL: load(write(base + more), list(overrides))


@pytest.fixture
def refused(write: Write, tmp_path: Path) -> Refused:
    """`refused(more, *settings)`: what the error says, which has to be a usage error; the folder is left out."""

    def go(more: str = "", *overrides: str, base: str = MINIMAL) -> str:
        with pytest.raises(DpoError) as caught:
            load(write(base + more), list(overrides))
        assert caught.value.exit_code == USAGE
        return str(caught.value).replace(f"{tmp_path}{os.sep}", "")

    return go


def values(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump()


# ------------------------------------------------------------------------------------------------ what scalars mean


NUMBERS = {
    "5e-6": 5e-6, "5E-6": 5e-6, "1.0e-5": 1e-5, "2e+1": 20.0, ".5": 0.5, "1_000": 1000, "010": 10, "+3": 3, "7.": 7.0,
}  # fmt: skip
# YAML 1.1 reads these as booleans, base 60, hex and dates.
WORDS = ("on", "off", "yes", "no", "y", "n", "On", "12:30", "0x1F", "2001-01-01", "1e")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(("learning_rate", text, number) for text, number in NUMBERS.items()),
        *(("run_name", word, word) for word in WORDS),
        *(("run_name", null, None) for null in ("~", "null", "Null", "", "NULL")),
        *(("logging_first_step", true, True) for true in ("true", "True", "TRUE")),
    ],
)
def test_what_a_scalar_means(loaded: Load, key: str, text: str, value: Any) -> None:
    assert getattr(loaded(f"train:\n  {key}: {text}\n").train, key) == value


def test_defaults_are_the_contracts(loaded: Load) -> None:
    recipe = loaded()
    assert recipe.name == "r"
    assert recipe.seed == 42
    assert (recipe.model.load_in_4bit, recipe.model.max_length, recipe.model.thinking) == (True, 1024, False)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (32, 64, 0.01)
    assert (recipe.data.total, recipe.data.languages) == (None, None)
    assert (recipe.data.eval_fraction, recipe.data.eval_size) == (0.05, 500)
    assert (recipe.train.method, recipe.train.learning_rate, recipe.train.beta) == ("dpo", 1e-5, 0.1)
    assert (recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps) == (1, 24)
    assert recipe.export.formats == ["adapter", "merged"]


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "place", "says"),
    [
        # unknown keys
        ("modle: {}", "r.yaml:3  modle", "did you mean model?"),
        ("train:\n\n  lerning_rate: 1", "r.yaml:5  train.lerning_rate", "did you mean learning_rate?"),
        ("eval: {zzz: 1}", "r.yaml:3  eval.zzz", "known here: prompts, max_new_tokens, temperature, top_p"),
        # the right name in the wrong section
        ("beta: 0.1", "r.yaml:3  beta", "did you mean train.beta?"),
        # wrong types
        ("seed: '1'", "r.yaml:3  seed", 'must be a whole number, not "1"'),
        ("lora: null", "r.yaml:3  lora", "must be a map, not null: indent the lines that belong to it"),
        ("lora: {target_modules: 3}", "r.yaml:3  lora.target_modules", "must be a list or auto, not 3"),
        # impossible values
        ("train: {logging_first_step: yes}", "r.yaml:3  train.logging_first_step", 'must be true or false, not "yes"'),
        ("seed: 很多", "r.yaml:3  seed", '"很多"'),
        ("train: {learning_rate: 0}", "r.yaml:3  train.learning_rate", "greater than 0"),
        ("name: a/b", "r.yaml:3  name", "name of a folder"),
        # bad choices
        ("export: {formats: [adaptor]}", "r.yaml:3  export.formats[0]", "did you mean adapter?"),
        # losses
        ("train:\n  loss_type:\n    - sigmoid\n    - stf\n", "r.yaml:6  train.loss_type[1]", "did you mean sft?"),
        ("train: {loss_type: []}", "r.yaml:3  train.loss_type", "at least 1"),
        ("train:\n  loss_weights: [1.0]\n  loss_type: [sigmoid, sft]", "r.yaml:4  train.loss_weights", "for 2 losses"),
    ],
)  # fmt: skip
def test_one_mistake(refused: Refused, more: str, place: str, says: str) -> None:
    message = refused(more)
    assert message.startswith("the recipe has an error\n"), message
    assert f"  {place}\n" in message
    assert says in message


def test_every_mistake_is_told_at_once_in_the_order_of_the_file(refused: Refused) -> None:
    message = refused(
        base="""\
train:
  warmup_ratio: 0.1
  beta: [1]
lora: {r: -1}
sead: 3
data:
  total: no
  sources:
    - {id: 7}
    - {idd: x}
model: {id: a/b, dtype: int4}
""",
    )
    assert message.startswith("the recipe has 9 errors\n")
    places = [line.split()[0] for line in message.splitlines() if line.strip().startswith("r.yaml:")]
    assert [int(place.partition(":")[2]) for place in places] == [2, 3, 4, 5, 7, 9, 10, 10, 11]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        *OWNED_TRAIN_ARGUMENTS.items(), *OLD_TRAIN_ARGUMENTS.items(),
        ("rpo_alpha", "loss_weights"), ("lr", "learning_rate"), ("torch_dtype", "model.dtype"),
    ],
)  # fmt: skip
def test_the_hint_names_what_to_write_instead(refused: Refused, name: str, instead: str) -> None:
    message = refused(f"train: {{{name}: null}}")
    assert f"r.yaml:3  train.{name}\n" in message and instead in message


SERVER = "kind: openai, base_url: http://x/v1, model: m"


@pytest.mark.parametrize(
    ("judge", "key", "says"),
    [
        ("{kind: opnai, model: m}", "kind", 'must be openai or reward_model, not "opnai"; did you mean openai?'),
        ("{model: m}", "kind", "is missing: openai or reward_model"),
        ("{kind: openai, model: m}", "base_url", "is missing: the server's address"),
        (f"{{{SERVER}, concurency: 3}}", "concurency", "did you mean concurrency?"),
        ("{kind: reward_model, id: a, modl: b}", "modl", "known here: kind, id, revision, batch_size"),
        (
            "{kind: openai, model: m, base_url: localhost:80}",
            "base_url",
            "such as http://localhost:8000/v1, without keys",
        ),
    ],
)
def test_one_mistake_in_the_judge(refused: Refused, judge: str, key: str, says: str) -> None:
    """Those of the kind that is meant: what another kind of judge takes is not offered."""
    message = refused(f"eval:\n  judge: {judge}\n")
    assert message.startswith("the recipe has an error\n"), message
    assert f"r.yaml:4  eval.judge{key and '.' + key}\n" in message
    assert says in message


@pytest.mark.parametrize(
    ("more", "setting"),
    [
        (f"eval: {{judge: {{{SERVER}, api_key: sk-secret}}}}", None),
        (f"eval: {{judge: {{{SERVER}, api_key_env: secret}}}}", None),
        ("eval: {judge: {kind: openai, base_url: http://me:secret@x/v1, model: m}}", None),
        ("eval: {judge: {api_key: sk-secret, model: m}}", None),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge.api_key=sk-secret"),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge.api_key_env=secret"),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge={kind: openai, api_key: secret"),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge=secret"),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge.kind=secret"),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge.timeout={api: secret}"),
        (f"eval: {{judge: {{{SERVER}}}}}", "eval.judge.api_key: secret=="),
        ("eval:\n  judge:\n    api_key: my: secret\n", None),
    ],
)
def test_a_key_in_the_recipe_is_refused_and_not_shown(refused: Refused, more: str, setting: str | None) -> None:
    message = refused(more, *([setting] if setting else []))
    assert "secret" not in message
    assert "eval.judge" in message or "r.yaml:5" in message


@pytest.mark.parametrize("value", ["sk-abc123def456ghi789", "hf_AbCdEfGhIjKlMnOpQrSt", "ghp_A1b2C3d4E5f6G7h8I9"])
def test_what_looks_like_a_key_gets_into_no_run(refused: Refused, value: str) -> None:
    for more in (f"name: {value}", f"train: {{run_name: {value}}}", f"eval: {{sets: [{{id: c/d, name: {value}}}]}}"):
        message = refused(more)
        assert "looks like the key of a service" in message and value not in message


def test_words_that_only_look_a_little_like_keys_are_fine(loaded: Load) -> None:
    for name in ("sk-learn", "hf_pairs", "task-abcdef123456"):
        assert loaded(f"name: {name}\n").name == name


def test_both_kinds_of_judge(loaded: Load) -> None:
    judge = loaded(f"eval: {{judge: {{{SERVER}, api_key_env: MY_KEY}}}}").eval.judge
    assert judge is not None
    assert (judge.kind, judge.calibration) == ("openai", 100)
    judge = loaded("eval: {judge: {kind: reward_model, id: a/b}}").eval.judge
    assert judge is not None
    assert judge.kind == "reward_model"
    assert loaded("eval: {judge: null}").eval.judge is None


# ------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("lora:\n  r: 1\n  alpha: 2\n  r: 3\n", "lora.r is set twice, on lines 4 and 6", 6),
        ('seed: 1\n"seed": 2\n', "seed is set twice, on lines 3 and 4", 4),
        ("seed: 1\nmodel: {id: x}\n", "model is set twice, on lines 1 and 4", 4),
        ("lora: *nowhere\n", "nowhere", 3),
        ("a: &a [*a]\n", "more than 20,000 values or 50 levels, aliases written out", 3),
        ("lora: {<<: 3}\n", "merging", 3),
        ("name: !!python/object:os.system x\n", "python/object", 3),
        ("---\nseed: 1\n", "document", 3),
        ("? [a, b]\n: 1\n", "a key must be a word", 3),
        ("1: x\n", "a key must be a word", 3),
    ],
)
def test_yaml_that_is_refused(refused: Refused, text: str, says: str, line: int) -> None:
    message = refused(text)
    assert says in message
    assert f"r.yaml:{line}" in message


def test_a_byte_order_mark_and_windows_lines_are_fine(write: Write) -> None:
    path = write(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode() + b"seed: 7\r\n")
    assert load(path).seed == 7


def test_anchors_aliases_and_merge_keys(loaded: Load) -> None:
    recipe = loaded(
        base="""\
model: {id: a/b}
lora: {target_modules: &modules [q_proj, v_proj]}
data:
  sources:
    - &first {id: c/d, layout: pairs, language: en}
    - {<<: *first, id: e/f, language: zh}
  contamination: *modules
""",
    )
    assert recipe.data.sources[1].model_dump(exclude_defaults=True) == {
        "id": "e/f",
        "layout": "pairs",
        "language": "zh",
    }
    assert recipe.data.contamination == recipe.lora.target_modules == ["q_proj", "v_proj"]


def test_setting_one_alias_leaves_the_other(loaded: Load) -> None:
    shared = "model: {id: a/b}\ndata: {sources: [{id: c/d, columns: &c {prompt: p}}, {id: e/f, columns: *c}]}\n"
    recipe = loaded("", "data.sources.1.columns.prompt=q", base=shared)
    assert [source.columns for source in recipe.data.sources] == [{"prompt": "p"}, {"prompt": "q"}]


def test_chinese_names_and_values(write: Write) -> None:
    text = (
        "name: 偏好_中文\nmodel: {id: 模型/千问}\ndata: {sources: [{name: 数据, id: c/d, columns: {prompt: 问题}}]}\n"
    )
    recipe = load(write(text, "配方.yaml"))
    assert (recipe.name, recipe.model.id, recipe.data.sources[0].label) == ("偏好_中文", "模型/千问", "数据")
    assert "偏好_中文" in dump(recipe)
    assert load(write(MINIMAL, "配方.yaml")).name == "配方"


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000 + "]" * 5000 + "\n",
        MINIMAL + "seed: " + "9" * 5000 + "\n",
        MINIMAL + "seed: !!int x\n",
        MINIMAL + "name: !!timestamp x\n",
        MINIMAL + "name: !!bool x\n",
        MINIMAL + "extends: ~nosuchuser/x\n",
        MINIMAL + 'extends: "a\\0b"\n',
        MINIMAL + f"extends: {'x' * 5000}\n",
        "model: {id: ~nosuchuser/x}\ndata: {sources: [{id: c/d}]}\n",
        'model: {id: "./a\\0b"}\ndata: {sources: [{id: c/d}]}\n',
        f"model: {{id: ./{'x' * 5000}}}\ndata: {{sources: [{{id: c/d}}], total: x}}\n",
    ],
    ids=lambda text: text[:60].replace("\n", " ") if len(text) < 300 else text[:20] + "…" + text[-12:],
)
def test_hostile_files_end_in_a_clear_error(write: Write, text: str) -> None:
    with pytest.raises(DpoError) as caught:
        load(write(text))
    assert caught.value.exit_code == USAGE
    assert "r.yaml" in str(caught.value)


def bomb(first: str, again: str) -> str:
    """A few lines that stand for billions of values: each line twice what the line above it is."""
    return "\n".join([f"a0: &a0 {first}", *(f"a{n}: &a{n} {again.replace('*', f'*a{n - 1}')}" for n in range(1, 30))])


@pytest.mark.parametrize(
    "text",
    [
        bomb("[x, x]", "[*, *]"), bomb("{a: x, b: x}", "{a: *, b: *}"), bomb("{a: x}", "{<<: [*, *]}"),
        "x: " + "[" * 20_000, "x: " + "{a: " * 20_000, "x:\n  " + "- " * 40_000, "x: [" + "1," * 100_000 + "]",
    ],
    ids=["lists", "maps", "merged", "deep", "deep maps", "deep lists", "wide"],
)  # fmt: skip
def test_a_yaml_bomb_is_refused_at_once(refused: Refused, text: str) -> None:
    start = time.process_time()
    message = refused(text)
    assert time.process_time() - start < 2
    assert len(message) < 500
    assert "r.yaml" in message
    assert "more than " in message or "too large" in message


def test_of_thousands_of_unknown_keys_twenty_are_shown(refused: Refused) -> None:
    start = time.process_time()
    message = refused("\n".join(f"unknown_{number}: 1" for number in range(5000)))
    assert time.process_time() - start < 3
    assert message.startswith("the recipe has 5,000 errors\n")
    assert message.endswith("and 4,980 more")
    assert "unknown_19" in message and "unknown_20\n" not in message
    assert len(message) < 5000


# ---------------------------------------------------------------------------------------------------------- extends


def test_auto_targets_are_written_out_where_the_config_is_at_hand(
    loaded: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a local folder, the built-in and the Hub's cache; not of an unknown family, nor beside an adapter."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder, kind in (("local", "phi3"), ("strange", "gpt2"), ("hub/models--a--b/snapshots/main", "qwen2")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": kind}))

    def targets(model: str, *more: str) -> Any:
        recipe = loaded("", f"model.id={model}", *more)
        assert loaded(base=dump(recipe)).model_dump() == recipe.model_dump()
        return recipe.lora.target_modules

    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert targets("builtin:tiny-qwen3") == targets("a/b") == usual
    assert targets(str(tmp_path / "local")) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert targets("a/c") == targets(str(tmp_path / "strange")) == "auto"
    assert targets("a/b", "model.adapter=a/sft") == "auto"
    assert targets("a/b", "lora.target_modules=[k_proj]") == targets("a/b", "lora.target_modules=k_proj") == ["k_proj"]


def test_maps_merge_and_the_rest_replaces(write: Write) -> None:
    write(
        """\
name: parent
seed: 1
model: {id: a/b, max_length: 512}
lora: {r: 4, target_modules: [q_proj, v_proj]}
data:
  sources: [{id: c/d, layout: pairs}, {id: e/f}]
  total: 10
  languages: {en: 0.5, zh: 0.5}
  score_weights: {correctness: 0.9}
train: {beta: 0.2, run_name: mine}
""",
        "parent.yaml",
    )
    child = load(
        write(
            """\
extends: parent.yaml
lora: {target_modules: [k_proj]}
data: {sources: [{id: g/h}], total: null, languages: null, score_weights: {helpfulness: 0.1}}
train: {run_name: null, learning_rate: 1e-4}
""",
            "child.yaml",
        )
    )
    assert child.name == "child"  # never the parent's: two recipes would share a run
    assert child.extends is None
    assert child.seed == 1
    assert (child.model.id, child.model.max_length) == ("a/b", 512)
    assert (child.lora.r, child.lora.target_modules) == (4, ["k_proj"])
    assert [source.model_dump(exclude_defaults=True) for source in child.data.sources] == [{"id": "g/h"}]
    assert (child.data.total, child.data.languages) == (None, None)
    assert (child.data.score_weights.correctness, child.data.score_weights.helpfulness) == (0.9, 0.1)
    assert (child.train.beta, child.train.run_name, child.train.learning_rate) == (0.2, None, 1e-4)


def test_the_nearest_of_three_generations_wins(write: Write) -> None:
    write(MINIMAL + "name: g\nseed: 1\nlora: {r: 1, alpha: 1}\ntrain: {beta: 0.1}\n", "a/grand.yaml")
    write("extends: ../a/grand.yaml\nname: p\nseed: 2\nlora: {r: 2}\n", "b/parent.yaml")
    child = load(write("extends: b/parent.yaml\nseed: 3\n", "child.yaml"))
    assert (child.name, child.seed, child.lora.r, child.lora.alpha, child.train.beta) == ("child", 3, 2, 1, 0.1)


def test_an_absolute_path_and_one_from_home(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = write(MINIMAL + "seed: 5\n", "far/away/parent.yaml")
    assert load(write(f"extends: {parent}\n", "child.yaml")).seed == 5
    monkeypatch.setenv("HOME", str(tmp_path / "far"))
    assert load(write("extends: ~/away/parent.yaml\n", "other.yaml")).seed == 5


def test_a_relative_path_is_relative_to_the_file_that_wrote_it(write: Write, tmp_path: Path) -> None:
    write(
        """\
model: {id: ./weights, merge_base: ../shared/base}
data: {sources: [{id: rows.jsonl}, {id: c/d}], contamination: [asked.txt]}
""",
        "parents/parent.yaml",
    )
    write("extends: ../parents/parent.yaml\nmodel: {merge_base: ./base}\n", "children/one.yaml")
    one = load(tmp_path / "children" / "one.yaml")
    assert one.model.id == str(tmp_path / "parents" / "weights")
    assert one.model.merge_base == str(tmp_path / "children" / "base")
    assert [source.id for source in one.data.sources] == [str(tmp_path / "parents" / "rows.jsonl"), "c/d"]
    assert one.data.contamination == [str(tmp_path / "parents" / "asked.txt")]


def test_a_plain_name_is_a_path_where_it_exists(write: Write, tmp_path: Path, loaded: Load) -> None:
    """`c/d` may be a Hub id or a folder beside the recipe."""
    assert loaded().data.sources[0].id == "c/d"
    (tmp_path / "c" / "d").mkdir(parents=True)
    assert loaded().data.sources[0].id == str(tmp_path / "c" / "d")


def test_a_circle_is_refused(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    with pytest.raises(DpoError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load(write(b"extends: b.yaml\n", "a.yaml"))
    with pytest.raises(DpoError, match=r"circle: self\.yaml -> self\.yaml"):
        load(write("extends: self.yaml\n", "self.yaml"))


def test_a_missing_parent_is_told_with_the_line(refused: Refused) -> None:
    message = refused("extends: nowhere.yaml\n")
    assert "nowhere.yaml" in message
    assert "r.yaml:3" in message
    assert "r.yaml:3" in refused("extends: [a]\n")


def test_lines_point_into_the_file_that_wrote_them(write: Write, tmp_path: Path) -> None:
    write("model: {id: a/b}\n\n\nlora:\n  r: none\ntrain: {beta: 1}\ndata: {sources: [{id: c/d}]}\n", "parent.yaml")
    child = write("extends: parent.yaml\ntrain:\n  beta: much\n", "child.yaml")
    with pytest.raises(DpoError) as caught:
        load(child)
    message = str(caught.value)
    assert f"{tmp_path}/parent.yaml:5  lora.r\n" in message
    assert f"{tmp_path}/child.yaml:3  train.beta\n" in message


def test_where_names_the_line_of_a_setting(loaded: Load, tmp_path: Path) -> None:
    recipe = loaded("train:\n  beta: 0.3\n", "lora.r=4")
    assert recipe.where("train", "beta") == f"{tmp_path}/r.yaml:4  train.beta"
    assert recipe.where("data", "sources", 0, "id") == f"{tmp_path}/r.yaml:2  data.sources[0].id"
    assert recipe.where("lora", "r") == "--set  lora.r"
    assert recipe.where("eval", "prompts") == "eval.prompts"


# ------------------------------------------------------------------------------------------------------------ --set


def test_settings_win_and_are_yaml(loaded: Load) -> None:
    recipe = loaded(
        "seed: 1\ntrain: {beta: 0.3}\n",
        "seed=2", "train.learning_rate=5e-6", "lora.target_modules=[q_proj, k_proj]", "data.total=null",
        "data.sources.0.quota=100", "data.sources[0].language=zh", "eval={prompts: 3}", "train.run_name=on", "name=it",
        "train.loss_type=hinge",
    )  # fmt: skip
    assert (recipe.seed, recipe.name, recipe.data.total, recipe.eval.prompts) == (2, "it", None, 3)
    assert (recipe.train.beta, recipe.train.learning_rate, recipe.train.run_name) == (0.3, 5e-6, "on")
    assert recipe.lora.target_modules == ["q_proj", "k_proj"]
    assert (recipe.data.sources[0].quota, recipe.data.sources[0].language) == (100, "zh")
    assert recipe.train.loss_type == ["hinge"]


def test_a_test_set_may_be_an_id_alone_and_is_in_the_overview(loaded: Load) -> None:
    recipe = loaded("", "eval.sets=[{id: allenai/reward-bench, split: filtered, name: 基准}, builtin:style-helpsteer2]")
    assert [one.label for one in recipe.eval.sets] == ["基准", "style-helpsteer2"]
    assert any(line.endswith("; scored on 基准, style-helpsteer2 too") for line in overview(recipe))


def test_a_relative_path_is_relative_to_the_working_directory(loaded: Load, tmp_path: Path) -> None:
    recipe = loaded("", "data.sources.0.id=rows.jsonl", "model.id=../weights", "data.contamination=[./asked.txt]")
    assert recipe.data.sources[0].id == str(tmp_path / "cwd" / "rows.jsonl")
    assert recipe.model.id == str(tmp_path / "weights")
    assert recipe.data.contamination == [str(tmp_path / "cwd" / "asked.txt")]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("trian.beta=1", "did you mean train?"),
        ("train.betta=1", "did you mean beta?"),
        ("train.beta=much", "must be a number"),
        ("model=a/b", 'must be a map, not "a/b": write model: {id: "a/b"}'),
        ("data.sources.3.id=x", "one of the list's 1 places"),
        ("data.sources.first.id=x", "one of the list's 1 places"),
        ("lora.r=[1", "not a YAML value"),
        ("lora={r: 1, r: 2}", "twice"),
        ("seed.x=1", "must be a whole number"),
        ("lora.target_modules.0.x=1", "lora.target_modules[0]"),
        ("seed=!!int x", ""),
        (f"seed={'9' * 5000}", ""),
        ("lora=&a {x: *a}", "levels"),
        ("lora=" + "[" * 5000, "more than 50 levels deep"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_setting_is_named(refused: Refused, setting: str, says: str) -> None:
    message = refused("lora: {target_modules: [q_proj]}\n", setting)
    assert "--set " in message
    assert setting.split("=")[0].split(".")[0] in message
    assert says in message


@pytest.mark.parametrize("setting", ["beta", "", "=1", " =1"])
def test_a_setting_without_a_key_or_value_is_refused(refused: Refused, setting: str) -> None:
    assert "--set takes KEY=VALUE" in refused("", setting)


def test_a_set_section_has_the_lines_of_the_setting_only(refused: Refused, tmp_path: Path) -> None:
    """The file's line 4 no longer says anything about lora.r."""
    message = refused("lora:\n  r: 4\n", "lora={r: none}")
    assert "  --set  lora.r\n" in message
    assert "r.yaml:4" not in message


# ----------------------------------------------------------------------------------------------------- the way back


def round_trip(recipe: Recipe, folder: Path) -> dict[str, Any]:
    path = folder / "again.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    return values(load(path))


@pytest.mark.parametrize(
    "more",
    [
        "",
        "train: {loss_type: [sigmoid, sft], loss_weights: [1.0, 0.5], learning_rate: 5e-6, save_steps: 0.1}\n",
        "train: {gradient_checkpointing_kwargs: {use_reentrant: false}, "
        "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-7}}\n",
        "seed: 7\nengine: {shared_prefix: off}\nexport: {formats: [adapter]}\nname: 中文 名\n",
        "lora: {alpha: 1e22, dropout: 1e-10}\n",
    ],
)
def test_dump_loads_again_to_the_same(loaded: Load, tmp_path: Path, more: str) -> None:
    recipe = loaded(more)
    assert round_trip(recipe, tmp_path) == values(recipe)


def test_dump_keeps_filters_and_paths(write: Write, tmp_path: Path) -> None:
    recipe = load(
        write(
            """\
model: {id: ./weights}
data:
  sources: [{id: rows.jsonl, columns: {prompt: "on"}}, {id: ~/more.jsonl, name: second}]
  contamination: [asked.txt]
  filters: {tie: false, near_duplicate: 0.9, length_ratio: true, echo: {min_chars: 5}}
"""
        )
    )
    (tmp_path / "other").mkdir()
    assert round_trip(recipe, tmp_path / "other") == values(recipe)


def test_a_filter_is_off_on_a_value_or_a_map(loaded: Load) -> None:
    text = "{sources: [{id: c/d}], filters: {tie: false, near_duplicate: 0.9, length_ratio: true, short: {min_han: 2}}}"
    filters = loaded(f"data: {text}\n", base="model: {id: a/b}\n").data.filters
    assert filters.tie is False
    assert filters.near_duplicate.similarity == 0.9
    assert filters.length_ratio.max == 3.0
    assert (filters.short.min_chars, filters.short.min_han) == (16, 2)


# Words that YAML 1.1, by which PyYAML writes, and YAML 1.2, by which we read, take for different things.
@pytest.mark.parametrize(
    "word",
    [
        "on", "no", "null", "~", "true", "1e5", "5e-6", "08", "010", "1_0", "0x1F", "12:30", "2001-01-01", "1.", "=",
        "7e10", " lead", "trail ", "a\tb", "- a", "#a", "a: b", "a #b", "'", '"', "a\nb", "", "%", "@a", "…", "\x85",
        "<<", ".inf", ".nan", "!a", "&a", "*a",
    ],
)  # fmt: skip
def test_any_word_survives_the_way_out_and_in(loaded: Load, tmp_path: Path, word: str) -> None:
    recipe = loaded(f"train: {{run_name: {json.dumps(word)}}}\n")
    assert recipe.train.run_name == word
    assert round_trip(recipe, tmp_path) == values(recipe)


# ------------------------------------------------------------------------------------------------------ JSON Schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_every_recipe(validator: jsonschema.Draft202012Validator, path: Path) -> None:
    validator.validate(read_recipe(path, []).values)


MINIMAL_VALUES: dict[str, Any] = yaml.safe_load(MINIMAL)


@pytest.mark.parametrize(
    "more",
    [
        {"train": {"loss_type": ["sigmoid", "sft"]}},
        {"train": {"method": "simpo", "simpo_gamma": 0.3, "loss_type": "alphapo", "alpha": 0.25}},
        {"train": {"method": "kto", "desirable_weight": 1.3, "loss_type": None}},
        {"eval": {"sets": "a/b"}},
        {"data": {"sources": [{"id": "c/d"}], "filters": {"near_duplicate": 0.9, "length_ratio": True}}},
        {"data": {"sources": [{"id": "c/d"}], "filters": {"tie": False, "echo": {"min_chars": 3}}}},
        {"data": {"sources": [{"id": "c/d"}], "total": None, "languages": None}},
    ],
    ids=str,
)
def test_the_schema_accepts_what_loads(
    validator: jsonschema.Draft202012Validator, write: Write, more: dict[str, Any]
) -> None:
    """An editor must not underline what `check` is happy with."""
    written = MINIMAL_VALUES | more
    load(write(yaml.safe_dump(written)))
    validator.validate(written)


@pytest.mark.parametrize(
    "more",
    [
        {"trian": {}},
        {"train": {"seed": 1}},
        {"train": {"loss_type": "sigmod"}},
        {"train": {"method": "lime"}},
        {"train": {"optim": "adamw"}},
        {"lora": {"r": 0}},
        {"model": {}},
        {"data": {"sources": []}},
        {"data": {"sources": [{"id": "c/d", "layout": "ultrafedback"}]}},
        {"data": {"sources": [{"id": "c/d"}], "filters": {"dedup": False}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_does_not_load(
    validator: jsonschema.Draft202012Validator, write: Write, more: dict[str, Any]
) -> None:
    written = MINIMAL_VALUES | more
    with pytest.raises(DpoError):
        load(write(yaml.safe_dump(written)))
    assert not validator.is_valid(written)


# ------------------------------------------------------------------------------------------------- the training methods

METHODS = list(trl_arguments())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_with_its_own_defaults(loaded: Load, write: Write, method: str) -> None:
    described = trl_arguments()[method]
    recipe = loaded(f"train: {{method: {method}}}\n", f"data.format={described['data'][-1]}")
    train = recipe.train
    assert train.method == method
    assert set(train.losses) <= set(described["losses"])
    for name, value in described["defaults"].items():
        assert getattr(train, name) == value
    assert train.learning_rate == described["defaults"].get("learning_rate", 1e-5), (
        "ours, unless the method has its own"
    )
    assert load(write(dump(recipe), "again.yaml")).model_dump() == recipe.model_dump()


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_of_a_method_can_be_written_by_its_default(loaded: Load, method: str) -> None:
    """What TRL would do anyway has to pass our types, ranges and choices."""
    described = trl_arguments()[method]
    own = {name: entry["default"] for name, entry in described["arguments"].items()}
    own = {name: value for name, value in own.items() if name not in OWNED_TRAIN_ARGUMENTS}
    # TRL's own default may be of another of its losses, or one that its trainer refuses.
    own |= {"method": method} | described["defaults"]
    train = loaded(json.dumps({"train": own})[1:-1] + "\n", f"data.format={described['data'][-1]}").train
    for name, value in own.items():
        assert getattr(train, name) == value, name


def test_a_null_loss_takes_back_what_the_recipe_says_for_another_method(loaded: Load) -> None:
    own = "train: {loss_type: sigmoid_norm}\n"
    assert loaded(own, "train.method=simpo", "train.loss_type=null").train.loss_type == "simpo"
    assert loaded(own, "train.method=orpo", "train.loss_type=null").train.losses == []
    assert loaded(own, "train.loss_type=null").train.loss_type == ["sigmoid"]


def test_kto_takes_one_row_at_a_time_where_its_loss_has_no_kl_term(loaded: Load) -> None:
    own = "train: {method: kto, loss_type: apo_zero_unpaired, per_device_train_batch_size: 1}\n"
    assert loaded(own).train.per_device_train_batch_size == 1


# ------------------------------------------------------------------------------------------- recipes of other programs


LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-0.6B
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
template: qwen3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/dpo
logging_steps: 10
plot_loss: true
per_device_train_batch_size: 1
learning_rate: 5.0e-6
num_train_epochs: 3.0
warmup_ratio: 0.1
val_size: 0.1
eval_strategy: steps
"""
AXOLOTL = """
base_model: Qwen/Qwen3-0.6B
load_in_4bit: true
rl: dpo
datasets:
  - path: a/b
    split: train
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: 2048
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
val_set_size: 0.05
"""
TRL_SCRIPT = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/ultrafeedback_binarized
use_peft: true
lora_r: 32
lora_alpha: 16
attn_implementation: sdpa
learning_rate: 5.0e-6
beta: 0.1
max_length: 1024
output_dir: out
push_to_hub: true
"""


@pytest.mark.parametrize(
    ("text", "program", "says"),
    [
        (
            LLAMA_FACTORY,
            "LLaMA-Factory",
            {
                "model_name_or_path": "model.id", "lora_rank": "lora.r", "lora_target": "lora.target_modules",
                "pref_beta": "train.beta", "cutoff_len": "model.max_length", "dataset": "data.sources",
                "output_dir": "--runs-dir", "warmup_ratio": "train.warmup_steps",
                "eval_strategy": "train.eval_strategy",
            },
        ),
        (
            AXOLOTL,
            "Axolotl",
            {
                "base_model": "model.id", "load_in_4bit": "model.load_in_4bit", "rl": "train.method",
                "datasets": "data.sources", "lora_alpha": "lora.alpha", "sequence_len": "model.max_length",
                "micro_batch_size": "train.per_device_train_batch_size", "num_epochs": "train.num_train_epochs",
                "optimizer": "train.optim", "learning_rate": "train.learning_rate",
            },
        ),
        (
            TRL_SCRIPT,
            "TRL",
            {
                "model_name_or_path": "model.id", "dataset_name": "data.sources", "lora_r": "lora.r",
                "beta": "train.beta", "max_length": "model.max_length", "output_dir": "--runs-dir",
            },
        ),
    ],
    ids=["llama-factory", "axolotl", "trl"],
)  # fmt: skip
def test_a_recipe_of_another_program_is_recognised_and_each_key_named_once(
    refused: Refused, text: str, program: str, says: dict[str, str]
) -> None:
    first, *lines, hint = refused(base=text).splitlines()[1:]
    assert first == f"  it looks like a recipe of {program}; this is what its keys are called here"
    assert "dpo-cli init" in hint
    advice = dict(line.split("  ")[-1].split(" -> ") for line in lines)
    assert list(advice) == list(yaml.safe_load(text)), "in the file's order, and nothing is missing beside"
    assert {name: said for name, said in says.items() if said not in advice[name]} == {}


def test_keys_of_another_program_without_a_counterpart_stand_in_one_line(refused: Refused) -> None:
    more = "use_galore: true\nshift_attn: false\nreport_to: none\nresume_from_checkpoint: null\n"
    *_, reported, resumed, nothing, _ = refused(base=LLAMA_FACTORY + more).splitlines()
    assert nothing == "  nothing here does what these do, so remove them: use_galore, shift_attn"
    assert reported.endswith("report_to -> train.report_to")
    assert resumed.endswith("resume_from_checkpoint -> train resumes automatically; start over with --fresh")


def test_every_name_that_is_proposed_is_one_of_ours() -> None:
    methods = [f"train.{name}" for one in trl_arguments().values() for name in one["arguments"]]
    sections = [f"{part}.{name}" for part in Recipe.model_fields for name in fields_at(Recipe, (part,))]
    for said in [*NAMES.values(), *SYNONYMS.values()]:
        for key in re.findall(r"\b(?:model|lora|data|train|engine|export)\.[a-z_0-9]+", said):
            assert key in [*methods, *sections], said


@pytest.mark.parametrize("written", ["rows.jsonl", "[rows.jsonl]", "{id: rows.jsonl}", "[{id: rows.jsonl}]"])
def test_one_source_is_taken_however_it_is_written(write: Write, written: str) -> None:
    path = write(f"model: {{id: a/b}}\ndata:\n  sources: {written}\n")
    recipe = load(path)
    assert [source.id for source in recipe.data.sources] == [str(path.parent / "rows.jsonl")]
