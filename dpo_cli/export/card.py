"""The model card (README.md) of an exported folder, in the form that the Hugging Face Hub reads.

It says what the weights are, how they were made and checked, what held-out pairs show, and how to run them. Figures
come from the run's reports; nothing is computed here. The page is the Jinja template beside this file. A card is made
to be published: local paths appear by their last part only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpo_cli import chat, model_files, models
from dpo_cli.disk import read_json, write_text
from dpo_cli.export import base as base16
from dpo_cli.export.formats import FORMATS
from dpo_cli.export.parity import Check
from dpo_cli.published import recipe_yaml, report_sections, without_paths
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.model_rules import on_hub
from dpo_cli.recipe.train import trl_arguments
from dpo_cli.records import ROWS_ARE
from dpo_cli.run import Run

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
ROWS_OF = {"pairs": "preference pairs", "ranked": "ranked prompts", "unpaired": "labelled answers"}
REPORTED = ("", "Held-out pairs", "Other test sets", "Sampled answers", "Judge")  # of eval/report.md


def write_card(recipe: Recipe, run: Run, folder: Path, kind: str, checks: Sequence[Check]) -> None:
    """Write `README.md` into an exported folder.

    Args:
        folder: what was exported, its files all there.
        kind: adapter, merged, gguf or ollama.
        checks: of the whole export; the card shows those of its kind (`merged.effect`, …).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "shell": shlex.quote,
        "cell": lambda text: text.replace("|", "\\|").replace("\n", " "),
        "plain": _plain,
        "public": without_paths,
        "thousands": "{:,}".format,
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    prepared, record = read_json(run["prepare"] / "report.json"), run.record("train")
    about = (kind, "gguf") if kind == "ollama" else (kind,)  # whose weights are a GGUF
    own = [check for check in checks if check["name"].startswith((*(f"{one}." for one in about), "gap_"))]
    page = environment.get_template("card.jinja").render(
        front_matter=front_matter(recipe, prepared, kind).to_yaml(),
        recipe=recipe,
        kind=kind,
        checks=own,
        effect=next((check for check in own if check["name"].endswith((".effect", ".carried"))), None),
        base=without_paths(models.merge_base(recipe)),
        revision=base16.revision(recipe),
        record=record,
        trained_revision=(record.get("revisions") or {}).get(recipe.model.id) or recipe.model.revision,
        lora=read_json(run.adapter / "adapter_config.json"),  # not the recipe's, which model.adapter overrules
        steps=read_json(run["train"] / "metrics.json")["steps"],
        adapter_on_hub=on_hub(recipe.model.adapter or ""),
        has_reference=trl_arguments()[recipe.train.method]["reference"],
        # None where eval has not seen this very adapter.
        evaluation=report_sections(run["eval"] / "report.md", REPORTED) if run.fresh("eval", recipe) else None,
        prepared=prepared,
        rows_are=ROWS_ARE[recipe.data.format],
        rows_of=ROWS_OF[recipe.data.format],
        funnel=report_sections(run["prepare"] / "report.md", ("Funnel",)),
        recipe_yaml=recipe_yaml(recipe),
        local_data=any(without_paths(source.id) != source.id for source in recipe.data.sources),
        **_use(recipe, folder, kind),
    )
    write_text(folder / "README.md", page)


def front_matter(recipe: Recipe, prepared: Mapping[str, Any], kind: str) -> Any:
    """The card's metadata as huggingface_hub's `ModelCardData`; only ids that the Hub knows, and no guessed licence."""
    base = models.merge_base(recipe)
    # merge is the Hub's word for several models made one; an adapter merged into its base is a fine-tune.
    relation = "adapter" if kind == "adapter" else "finetune"
    licence = _licence(base, base16.revision(recipe))
    known = {key: value for key, value in licence.items() if key in ("license", "license_name", "license_link")}
    if on_hub(base):
        known |= {"base_model": base, "base_model_relation": relation}
    return ModelCardData(
        library_name=FORMATS[kind].library,
        pipeline_tag="text-generation",
        language=[one for one in prepared["languages"] if re.fullmatch("[a-z]{2,3}", one)] or None,
        datasets=[source.id for source in recipe.data.sources if on_hub(source.id)] or None,
        tags=[recipe.train.method, "trl", "dpo-cli", *(["lora"] if kind == "adapter" else [])],
        **known,
    )


def _use(recipe: Recipe, folder: Path, kind: str) -> dict[str, Any]:
    """What stands where, and what the commands need."""
    formats = recipe.export.formats
    repository = recipe.export.hub if "hub" in formats else None
    at_root = kind == "merged" or (kind == "adapter" and "merged" not in formats)
    # In quotes transformers, PEFT and vLLM take a repository's name as they take a folder.
    here = repository if repository and at_root else "."
    slug = re.sub(r"[^a-z0-9._-]+", "-", recipe.name.lower()).strip("-.") or "model"
    return {
        "what": FORMATS[kind].sentence,
        "here": here,
        "fetch": f"hf download {repository} --local-dir {slug}" if repository and here == "." else None,
        "slug": slug,
        "gguf": next((path.name for path in sorted(folder.glob("*.gguf"))), None),
        "vllm_ranks": VLLM_RANKS,
        "template_kwargs": json.dumps(chat.chat_template_kwargs(recipe)),
    }


def _licence(base: str, revision: str | None) -> dict[str, Any]:
    """What the base's own card says of its licence, where that card is on this machine; else nothing."""
    card = Path(model_files.location(base)) / "README.md"
    if on_hub(base):
        cached = try_to_load_from_cache(base, "README.md", revision=revision)
        card = Path(cached) if isinstance(cached, str) else card
    if not card.is_file():
        return {}
    try:
        return dict(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, yaml.YAMLError):  # not UTF-8, no YAML: a card that says nothing of its licence
        return {}


def _plain(value: Any) -> str:
    """A check's value or limit, short enough for a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        between = " to " if all(isinstance(one, float) for one in value) else ", "
        return between.join(map(_plain, value)) or "none"
    text = without_paths(str(value))
    return text[:12] + "…" if re.fullmatch("[0-9a-f]{64}", text) else text
