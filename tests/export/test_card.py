"""The model card: metadata that the Hub takes, figures from the run's own files, nothing of this machine."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.disk import write_json
from dpo_cli.export import card
from dpo_cli.export.parity import Check
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from huggingface_hub import ModelCard

Project = tuple[Recipe, Run]
RECIPE = """\
model:
  id: Qwen/Qwen3-1.7B
  merge_base: Qwen/Qwen3-1.7B
  thinking: false
data:
  sources:
    - {id: nvidia/HelpSteer2, layout: helpsteer2, language: en, revision: 0123456789abcdef}
    - {id: ./private/my|pairs.jsonl, layout: pairs, language: zh}
train: {method: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.1]}
eval:
  judge: {kind: openai, base_url: "http://10.0.0.7:8000/v1", model: judge-32b, api_key_env: ALICES_KEY}
"""

CHECKS: list[Check] = [
    {"name": "merged.effect", "value": 0.016488, "limit": [0.0082, 0.033], "ok": True},
    {"name": "merged.template", "value": "a" * 64, "limit": "a" * 64, "ok": True},
    {"name": "merged.mean_kl", "value": 0.1, "limit": 0.005, "ok": False},
    {"name": "adapter.foreign", "value": [], "limit": [], "ok": True},
    {"name": "gguf.carried", "value": 0.987, "limit": 0.5, "ok": True},
    {"name": "gap_to_4bit.mean_kl", "value": 0.18, "limit": None, "ok": True},
]


REPORT = """\
# demo

It learned the preference.

- Warning: only 7 held-out pairs in zh

## Held-out pairs

|  | all | en | zh |
| --- | ---: | ---: | ---: |
| reward accuracy | 98.4% (94.2–99.6) | 98.4% (94.2–99.6) | 50.0% |

## Judge

judge-32b, by the file /home/alice/judge.txt

## Answers

## Judge

text of an answer
"""
FUNNEL = """\
# Data report

## Funnel

| prompts | HelpSteer2 | my\\|pairs | all |
| --- | ---: | ---: | ---: |
| prompts in | 120 | 20 | 140 |

## Kept, for example

- somebody's prompt
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A recipe of hub ids and a local file, and a run of it with what the card reads."""
    path = tmp_path / "demo.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    loaded, run = recipe.load(path), Run(tmp_path / "runs" / "demo")
    prepared = {
        "sources": {
            "HelpSteer2": {"in": 120, "kept": 100, "dropped": {"tie": 15, "short": 5}},
            "my|pairs": {"in": 20, "kept": 20, "dropped": {}},
        },
        "pairs": {"train": 1100, "eval": 20},
        "languages": {"en": {"got": 800}, "zh": {"got": 300}},
        "provenance": {
            "sources": {
                "HelpSteer2": {"id": "nvidia/HelpSteer2", "layout": "helpsteer2", "revision": "0123456789abcdef"},
                "my|pairs": {"id": loaded.data.sources[1].id, "layout": "pairs", "revision": None},
            }
        },
    }
    with run.stage("prepare", loaded) as draft:
        write_json(draft.folder / "report.json", prepared)
        (draft.folder / "report.md").write_text(FUNNEL, encoding="utf-8")
        (draft.folder / "train.jsonl").write_text("")
    train(loaded, run, "one")
    with run.stage("eval", loaded) as draft:
        write_json(draft.folder / "metrics.json", {})
        (draft.folder / "report.md").write_text(REPORT, encoding="utf-8")
    return loaded, run


def train(loaded: Recipe, run: Run, weights: str) -> None:
    with run.stage("train", loaded) as draft:
        (draft.folder / "adapter").mkdir()
        (draft.folder / "adapter" / "adapter_model.safetensors").write_text(weights)
        lora = {"r": 24, "lora_alpha": 48, "target_modules": ["v_proj", "q_proj"]}
        write_json(draft.folder / "adapter" / "adapter_config.json", lora)
        write_json(draft.folder / "metrics.json", {"steps": 46})
        draft.record.update(device="cuda", backend="unsloth", revisions={"Qwen/Qwen3-1.7B": "70d244cc86ccca08cf5af4"})


def written(loaded: Recipe, run: Run, kind: str = "merged") -> str:
    folder = run.folder / "made" / kind
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("gguf", "ollama"):
        (folder / "demo q8_0.gguf").touch()
    card.write_card(loaded, run, folder, kind, CHECKS)
    return (folder / "README.md").read_text(encoding="utf-8")


def changed(loaded: Recipe, part: str, **values: Any) -> Recipe:
    return loaded.model_copy(update={part: getattr(loaded, part).model_copy(update=values)})


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [
        ("adapter", "peft", "adapter"),
        ("merged", "transformers", "finetune"),
        ("gguf", "gguf", "finetune"),
        ("ollama", "gguf", "finetune"),
    ],
)
def test_the_metadata_are_what_the_hub_reads_and_nothing_of_this_machine_gets_out(
    project: Project, tmp_path: Path, kind: str, library: str, relation: str
) -> None:
    text = written(*project, kind)
    found = ModelCard(text).data.to_dict()
    tags = found.pop("tags")
    assert found == {
        "base_model": "Qwen/Qwen3-1.7B",
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "language": ["en", "zh"],
        "datasets": ["nvidia/HelpSteer2"],
    }
    assert tags[0] == "dpo" and ("lora" in tags) == (kind == "adapter")
    assert "\n\n\n" not in text
    home, user = str(Path.home()) + os.sep, f"/{getpass.getuser()}/"
    for private in (str(tmp_path), tmp_path.name, home, user, "10.0.0.7", "ALICES_KEY", "private/"):
        assert private not in text
    assert "my|pairs.jsonl" in text


def test_a_local_base_is_named_by_its_last_part_and_gives_its_licence(project: Project, tmp_path: Path) -> None:
    loaded, run = project
    base = tmp_path / "my-base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: https://x.org/l\n---\n# base\n")
    loaded = changed(loaded, "model", merge_base=str(base), revision="v1")
    text = written(loaded, run, "adapter")
    found = ModelCard(text).data.to_dict()
    assert (found["license"], found["license_link"]) == ("apache-2.0", "https://x.org/l")
    assert not {"base_model", "base_model_relation"} & found.keys()
    assert 'from_pretrained("my-base", dtype' in text, "the revision is about the model that was trained"


def test_figures_are_those_of_the_reports_of_this_very_adapter(project: Project) -> None:
    text = written(*project)
    verdict = (
        "## Evaluation\n\nIt learned the preference.\n\n- Warning: only 7 held-out pairs in zh\n\n### Held-out pairs\n"
    )
    assert verdict in text and "| reward accuracy | 98.4% (94.2–99.6) | 98.4% (94.2–99.6) | 50.0% |" in text
    assert "### Judge\n\njudge-32b, by the file judge.txt\n" in text
    assert "text of an answer" not in text and "## Answers" not in text
    assert "### Funnel\n\n| prompts | HelpSteer2 | my\\|pairs | all |" in text and "somebody's prompt" not in text
    train(*project, "another")
    text = written(*project)
    assert "## Evaluation\n\nNot evaluated.\n" in text and "98.4%" not in text


def test_training_data_and_checks_are_told(project: Project) -> None:
    text = written(*project)
    for row in (
        "| base | Qwen/Qwen3-1.7B, 4-bit NF4, revision 70d244cc86ccca08cf5af4 |",
        "| reference | Qwen/Qwen3-1.7B, frozen |",
        "| method | DPO, loss sigmoid + sft, beta 0.1 |",
        "| LoRA | r 24, alpha 48, on q_proj, v_proj |",
        "| steps | 46 |",
        "- nvidia/HelpSteer2 @ 0123456789ab\n",
        "- my|pairs.jsonl\n",
        "1,100 pairs were trained on (en 800, zh 300); 20 are held out.",
        "| merged.effect | 0.01649 | 0.0082 to 0.033 | passed |",
        "| merged.template | aaaaaaaaaaaa… | aaaaaaaaaaaa… | passed |",
        "| merged.mean_kl | 0.1 | 0.005 | **failed** |",
        "| gap_to_4bit.mean_kl | 0.18 | – | reported |",
    ):
        assert row in text, row
    assert "adapter.foreign" not in text
    assert "with the local files that it names beside it" in text
    assert "| gguf.carried | 0.987 | 0.5 | passed |" in written(*project, "ollama"), "whose weights are a GGUF"
    loaded, run = project
    run.write_record("train", loaded, run.record("train") | {"processes": 2})
    rows = 2 * loaded.train.per_device_train_batch_size * loaded.train.gradient_accumulation_steps
    assert f", {rows} pairs a step" in written(loaded, run)


def test_it_says_whether_the_adapter_is_merged_in(project: Project, tmp_path: Path) -> None:
    merged = "merged in? Yes. On held-out answers the mean KL divergence from the untouched base is 0.01649 nats"
    assert merged in written(*project)
    carried = "merged in? Yes. The share of the adapter's change that is there on held-out answers is 0.987 "
    assert carried in written(*project, "gguf")
    assert "merged in?" not in written(*project, "adapter")
    failed: Check = {"name": "merged.effect", "value": 0.0, "limit": [0.0082, 0.033], "ok": False}
    card.write_card(*project, tmp_path, "merged", [failed])
    assert "merged in? **The check says no.**" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_recipe_in_the_card_makes_the_same_run(project: Project, tmp_path: Path) -> None:
    loaded, run = project
    text = written(loaded, run).split("```yaml\n")[1].split("```")[0]
    again = tmp_path / "private" / "again.yaml"  # beside the file that it names
    again.parent.mkdir()
    again.write_text(text, encoding="utf-8")
    (again.parent / "my|pairs.jsonl").touch()
    wanted = loaded.model_dump()
    wanted["eval"]["judge"] |= {"base_url": "http://localhost:8000/v1", "api_key_env": None}
    assert recipe.load(again).model_dump() == wanted


def test_commands_name_what_is_there(project: Project) -> None:
    loaded, run = project
    assert "vllm serve Qwen/Qwen3-1.7B --enable-lora --max-lora-rank 32 \\" in written(loaded, run, "adapter"), (
        "vLLM takes no 24"
    )
    write_json(run.adapter / "adapter_config.json", {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]})
    assert "--max-lora-rank 16 " in written(loaded, run, "adapter")
    assert "llama-server -m 'demo q8_0.gguf' --jinja" in written(loaded, run, "gguf")
    assert "ollama create demo -f Modelfile" in written(loaded, run, "ollama")
    adapter = written(changed(loaded, "model", revision="v1"), run, "adapter")
    assert 'from_pretrained("Qwen/Qwen3-1.7B", revision="v1", dtype' in adapter and "--revision v1 " in adapter
    merged = written(loaded, run)
    assert "transformers serve . --reasoning off" in merged and '{"enable_thinking": false}' in merged
    merged = written(changed(loaded, "model", thinking=True), run)
    assert "--reasoning on" in merged and '{"enable_thinking": true}' in merged and "enable_thinking=True" in merged


def test_on_the_hub_the_commands_name_the_repository(project: Project) -> None:
    loaded, run = project
    pushed = changed(loaded, "export", formats=["adapter", "merged", "gguf", "hub"], hub="me/model")
    adapter = written(pushed, run, "adapter")
    assert 'from_pretrained("me/model"' in written(pushed, run)
    assert "`hf download me/model --local-dir demo` makes (`cd adapter` in it)" in adapter
    alone = written(changed(loaded, "export", formats=["adapter", "hub"], hub="me/model"), run, "adapter")
    assert 'PeftModel.from_pretrained(base, "me/model")' in alone
    assert "me/model" not in written(loaded, run).split("<details>")[0]
