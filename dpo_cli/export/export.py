"""The stage: write each format, read it back, and hold it against the trained adapter on the 16-bit base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.export import merge, verify
from dpo_cli.export.verify import Check
from dpo_cli.recipe import Recipe
from dpo_cli.records import read_pairs
from dpo_cli.run import Run, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBES = 8  # held-out answers that the models are compared on
PROBE_TOKENS = 64  # the last tokens of each; 8 x 64 rows of 151,936 floats are 311 MB


@dataclass(frozen=True)
class Exported:
    """What `export` prints: the folders it wrote, and every check."""

    folders: list[Path]
    checks: list[Check]

    @property
    def verified(self) -> bool:
        return all(check["ok"] for check in self.checks)


def export(recipe: Recipe, run: Run, *, quiet: bool = False) -> Exported:
    """Write `export.formats` under `runs/<name>/export` with `verify.json`.

    Where a check fails the files stay for a look, but the stage does not count as done.
    """
    models.import_backend(models.Backend("hf", "export"))
    base = merge.base_folder(recipe)
    tokenizer = models.load_tokenizer(recipe)
    rows = _probes(recipe, run, tokenizer)
    formats = recipe.export.formats
    checks: list[Check] = []
    with run.stage("export", recipe) as draft:
        model = _adapter_on_base(recipe, run.adapter)
        tuned = verify.token_logps(model, rows, PROBE_TOKENS)
        with model.disable_adapter():
            plain = verify.token_logps(model, rows, PROBE_TOKENS)

        adapter, merged = draft.folder / "adapter", draft.folder / "merged"
        if "adapter" in formats:
            merge.write_adapter(recipe, run.adapter, base, adapter)
            _say(quiet, adapter)
        if "merged" in formats:
            merge.write_merged(model, _stored_dtype(base), base, run.adapter, merged)
            _say(quiet, merged)
        del model  # what was written is read back now, one model in memory at a time

        if "adapter" in formats:
            checks += verify.check_adapter_files(adapter)
            checks += verify.check_template("adapter", _tokenizer(adapter), tokenizer)
            reloaded = verify.token_logps(_adapter_on_base(recipe, adapter), rows, PROBE_TOKENS)
            checks += verify.check_parity("adapter", reloaded, tuned, plain)
        if "merged" in formats:
            checks += verify.check_structure(merged, base)
            checks += verify.check_template("merged", _tokenizer(merged), tokenizer)
            reloaded = verify.token_logps(_load(merged), rows, PROBE_TOKENS)
            checks += verify.check_parity("merged", reloaded, tuned, plain)
        write_json(draft.folder / "verify.json", checks)
        result = Exported([run["export"] / kind for kind in formats], checks)
        draft.status = "complete" if result.verified else "unverified"
    return result


def _probes(recipe: Recipe, run: Run, tokenizer: Any) -> list[list[int]]:
    """Token ids of the first held-out prompts with their chosen answers."""
    pairs = read_pairs(run.eval_pairs)[:PROBES] or read_pairs(run.train_pairs)[:PROBES]
    rows = []
    for pair in pairs:
        ids = tokenizer.apply_chat_template(
            [*pair.prompt, *pair.chosen], tokenize=True, return_dict=False, **pair.chat_template_kwargs
        )
        rows.append(ids[: recipe.model.max_length])
    return rows


def _load(folder: Path | str) -> PreTrainedModel:
    """A 16-bit model in float32: what is compared is the weights, not the arithmetic of a dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


def _adapter_on_base(recipe: Recipe, adapter: Path) -> Any:
    from peft import PeftModel

    base = models.location(models.merge_base(recipe))
    try:
        model = _load(base)
    except (OSError, ValueError) as error:
        raise DpoError(
            f"can't load the 16-bit base {base}: {str(error).strip().splitlines()[0]}",
            where=recipe.where("model", "merge_base"),
            hint="check the id; where the Hub is out of reach set HF_ENDPOINT to a mirror, or name a local folder",
        ) from error
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def _stored_dtype(base: Path) -> torch.dtype:
    """float16 where the base has it, else bfloat16."""
    import torch
    from transformers import AutoConfig

    return torch.float16 if AutoConfig.from_pretrained(base).dtype == torch.float16 else torch.bfloat16


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _say(quiet: bool, folder: Path) -> None:
    if not quiet:
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"  {folder.name:<8} {size / 1e6:,.1f} MB written, reading it back", flush=True)
