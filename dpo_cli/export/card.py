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
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpo_cli import chat, model_files, models
from dpo_cli.disk import write_text
from dpo_cli.export import base as base16
from dpo_cli.export import hub
from dpo_cli.export.formats import FORMATS
from dpo_cli.export.parity import Check
from dpo_cli.published import recipe_yaml, report_sections, without_paths
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.train import trl_arguments
from dpo_cli.records import ROWS_ARE
from dpo_cli.run import Run

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


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
    environment.filters |= {"shell": lambda text: shlex.quote(str(text)), "cell": _cell, "plain": _plain}
    about = (f"{kind}.", f"{FORMATS[kind].weights}.", "gap_")
    own = [check for check in checks if check["name"].startswith(about)]
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    page = environment.get_template("card.jinja").render(
        front_matter=front_matter(recipe, run, kind).to_yaml(),
        name=recipe.name,
        kind=kind,
        merged=kind != "adapter",
        checks=own,
        effect=next((check for check in own if check["name"].endswith((".effect", ".carried"))), None),
        **_use(recipe, run, folder, kind),
        **_training(recipe, run, kind),
        **_evaluation(recipe, run),
        **_data(recipe, run),
        **_reproduction(recipe, run),
    )
    write_text(folder / "README.md", page)


def front_matter(recipe: Recipe, run: Run, kind: str) -> Any:
    """The card's metadata as huggingface_hub's `ModelCardData`; only ids that the Hub knows, and no guessed licence."""
    base = models.merge_base(recipe)
    prepared = _prepared(run)
    licence = _licence(base, base16.revision(recipe))
    return ModelCardData(
        base_model=base if _on_hub(base) else None,
        # merge is the Hub's word for several models made one; an adapter merged into its base is a fine-tune.
        base_model_relation=None if not _on_hub(base) else "adapter" if kind == "adapter" else "finetune",
        library_name=FORMATS[kind].library,
        pipeline_tag="text-generation",
        language=[one for one in prepared["languages"] if re.fullmatch("[a-z]{2,3}", one)] or None,
        datasets=[source.id for source in recipe.data.sources if _on_hub(source.id)] or None,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        tags=[recipe.train.method, "trl", "dpo-cli", *(["lora"] if kind == "adapter" else [])],
    )


# ------------------------------------------------------------------------------------------------------- the sections


def _use(recipe: Recipe, run: Run, folder: Path, kind: str) -> dict[str, Any]:
    """What stands where, and what the commands need."""
    repository = recipe.export.hub if "hub" in recipe.export.formats else None
    formats = recipe.export.formats
    at_root = kind != "adapter" or "merged" not in formats
    # In quotes transformers, PEFT and vLLM take a repository's name as they take a folder.
    here = repository if repository and at_root and kind in ("adapter", "merged") else "."
    first = next((one for one in hub.ROOT_FIRST if one in formats), kind)
    beside = [FORMATS[one].beside.format(gguf=recipe.export.gguf) for one in FORMATS if one in formats and one != kind]
    slug = re.sub(r"[^a-z0-9._-]+", "-", recipe.name.lower()).strip("-.") or "model"
    return {
        "repository": repository,
        "here": here,
        "fetch": f"hf download {repository} --local-dir {slug}" if repository and here == "." else None,
        "others": [text for text in beside if text] if repository and kind == first else [],
        "base": without_paths(models.merge_base(recipe)),
        "builtin": models.merge_base(recipe).startswith("builtin:"),
        "revision": base16.revision(recipe),
        "slug": slug,
        "gguf": next((path.name for path in sorted(folder.glob("*.gguf"))), None),
        "lora_rank": next((rank for rank in VLLM_RANKS if rank >= _lora(run)["r"]), _lora(run)["r"]),
        "thinking": recipe.model.thinking,
        "template_kwargs": json.dumps(chat.chat_template_kwargs(recipe)),
    }


def _training(recipe: Recipe, run: Run, kind: str) -> dict[str, Any]:
    train, record = recipe.train, run.record("train")
    lora = _lora(run)  # not the recipe's, which model.adapter overrules
    metrics = _read(run["train"] / "metrics.json") or {}
    rows_are = ROWS_ARE[recipe.data.format]
    kind_of = {"pairs": "preference pairs", "ranked": "ranked prompts", "unpaired": "labelled answers"}
    rows_of = f"{_prepared(run)['pairs']['train']:,} {kind_of[recipe.data.format]}"
    method, base = train.method.upper(), without_paths(models.merge_base(recipe))
    weights = "4-bit NF4" if recipe.model.load_in_4bit else f"dtype {recipe.model.dtype}"
    given = recipe.model.adapter
    started = f" + {f'the adapter {given}' if _on_hub(given) else 'a LoRA trained before'}" if given else ""
    loss = [f"loss {' + '.join(train.losses)}"] if train.losses else []  # ORPO has but one, and no name for it
    beta = [f"beta {train.beta:g}"] if hasattr(train, "beta") else []
    compared = trl_arguments()[train.method]["reference"]
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * record.get("processes", 1)
    rows: list[tuple[str, Any]] = [
        ("base", f"{without_paths(recipe.model.id)}, {weights}" + _revision(recipe, record)),
        ("merged onto" if kind != "adapter" else "made for", base),
        ("reference", f"{without_paths(recipe.model.id)}{started}, frozen" if compared else "none"),
        ("method", ", ".join([method, *loss, *beta])),
        (
            "rsLoRA" if lora.get("use_rslora") else "LoRA",
            f"r {lora['r']}, alpha {lora['lora_alpha']:g}, on {', '.join(sorted(lora['target_modules']))}",
        ),
        (
            "optimisation",
            f"learning rate {train.learning_rate:g} ({train.lr_scheduler_type}), {batch} {rows_are} a step",
        ),
        ("steps", f"{metrics['steps']:,}" if "steps" in metrics else "–"),
        ("tokens of prompt + answer", f"at most {recipe.model.max_length:,}"),
        ("seed", recipe.seed),
        ("trained on", f"{record.get('device', '–')}, backend {record.get('backend', '–')}"),
    ]
    what = FORMATS[kind].sentence.format(base=base, training=f"{method} on {rows_of}", gguf=recipe.export.gguf)
    return {"what": what, "training": rows}


def _evaluation(recipe: Recipe, run: Run) -> dict[str, Any]:
    """Verdict and tables of eval/report.md; none where eval has not seen this very adapter."""
    if not run.fresh("eval", recipe):
        return {"evaluation": ""}
    wanted = ("", "Held-out pairs", "Other test sets", "Sampled answers", "Judge")
    return {"evaluation": report_sections(run["eval"] / "report.md", wanted)}


def _data(recipe: Recipe, run: Run) -> dict[str, Any]:
    """What was read, and the funnel of data/report.md."""
    prepared = _prepared(run)
    known = prepared.get("provenance", {}).get("sources", {})
    sources = []
    for label in prepared["sources"]:
        about = known.get(label, {})
        at = f" @ {about['revision'][:12]}" if about.get("revision") else ""
        sources.append(f"{without_paths(about.get('id') or label)}{at}")
    pairs, rows_are = prepared["pairs"], ROWS_ARE[recipe.data.format]
    spoken = ", ".join(f"{one} {counts['got']:,}" for one, counts in prepared["languages"].items())
    trained = f"{pairs['train']:,} {rows_are} were trained on ({spoken}); {pairs['eval']:,} are held out."
    if prepared.get("sampled"):
        trained += f" Their answers are sampled from {' and '.join(prepared['sampled']['by'])}, not written by people."
    if prepared.get("rated"):
        trained += f" Which answer is better says {prepared['rated']['by']['model']}, which rated them."
    funnel = report_sections(run["prepare"] / "report.md", ("Funnel",))
    return {"sources": sources, "trained": trained, "funnel": funnel}


def _reproduction(recipe: Recipe, run: Run) -> dict[str, Any]:
    record = run.record("train")
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    commit = f"; the recipe's repository was at commit {record['git_commit']}" if record.get("git_commit") else ""
    return {
        "recipe": recipe_yaml(recipe),
        "recipe_file": f"{recipe.name}.yaml",
        "local_data": any(without_paths(source.id) != source.id for source in recipe.data.sources),
        "versions": f"Trained with {versions}{commit}.",
    }


# ----------------------------------------------------------------------------------------------------------- helpers


def _on_hub(name: str) -> bool:
    """Whether a model or data set is named by a hub id; a recipe's local paths are absolute."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _licence(base: str, revision: str | None) -> dict[str, Any]:
    """What the base's own card says of its licence, where that card is on this machine; else nothing."""
    card = Path(model_files.location(base)) / "README.md"
    if _on_hub(base):
        cached = try_to_load_from_cache(base, "README.md", revision=revision)
        card = Path(cached) if isinstance(cached, str) else card
    if not card.is_file():
        return {}
    try:
        return dict(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, yaml.YAMLError):  # not UTF-8, no YAML: a card that says nothing of its licence
        return {}


def _revision(recipe: Recipe, record: Mapping[str, Any]) -> str:
    revision = (record.get("revisions") or {}).get(recipe.model.id) or recipe.model.revision
    return f", revision {revision}" if revision else ""


def _lora(run: Run) -> dict[str, Any]:
    return dict(_read(run.adapter / "adapter_config.json"))


def _prepared(run: Run) -> dict[str, Any]:
    return dict(_read(run["prepare"] / "report.json") or {})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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


def _cell(value: Any) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
