"""What is done with a finished export: formats pruned, cards brought up to date, pushed; light to import."""

from __future__ import annotations

import shutil
from typing import Any

from dpo_cli.disk import read_json, sha256, write_json
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run

FOLDERS = ("adapter", "merged", "gguf", "ollama")  # formats that are written, in this order


def checks_of(run: Run) -> list[Any]:
    """The checks of the export that is there; none before the first."""
    file = run["export"] / "verify.json"
    return list(read_json(file)) if file.is_file() else []


def format_of(check: Any) -> str:
    return str(check["name"]).partition(".")[0]


def evaluated(recipe: Recipe, run: Run) -> str | None:
    """What tells one evaluation of this very adapter from another, for the cards show its figures; None without."""
    return str(run.record("eval")["outputs"]["eval/metrics.json"]) if run.fresh("eval", recipe) else None


def prune(recipe: Recipe, run: Run) -> list[str]:
    """Remove the formats of a complete export that `export.formats` does not name; returns their names.

    The manifest is written last: killed before, the export counts as changed, and is made anew.
    """
    record, report = run.record("export"), "export/verify.json"
    gone = [kind for kind in FOLDERS if kind not in recipe.export.formats and (run["export"] / kind).is_dir()]
    if record.get("status") != "complete" or not gone:
        return []
    for kind in gone:
        shutil.rmtree(run["export"] / kind)
    write_json(run.folder / report, [one for one in checks_of(run) if format_of(one) not in gone])
    left = {name: digest for name, digest in record["outputs"].items() if (run.folder / name).is_file()}
    record["outputs"] = left | {report: sha256(run.folder / report)}
    run.write_record("export", recipe, record)
    return gone


def renew_cards(recipe: Recipe, run: Run) -> bool:
    """Write the cards of a complete export anew where an evaluation has come after it; else do nothing.

    What has been pushed counts as not pushed then.
    """
    record, figures = run.record("export"), evaluated(recipe, run)
    if record.get("status") != "complete" or figures in (None, record.get("evaluated")):
        return False
    from dpo_cli.export.card import write_card  # seconds of imports, for nothing else here

    for kind in FOLDERS:
        folder = run["export"] / kind
        if folder.is_dir():
            write_card(recipe, run, folder, kind, checks_of(run))
            record["outputs"][f"export/{kind}/README.md"] = sha256(folder / "README.md")
    run.write_record("export", recipe, record | {"evaluated": figures, "hub": None})
    return True


def push(recipe: Recipe, run: Run, *, quiet: bool = False) -> str | None:
    """Push a complete export where `export.formats` names hub and this one has not been pushed yet.

    A push that fails does not cost the export. The manifest keeps the address. The cards are brought up to date first.

    Returns:
        The repository's address; None where there is nothing to push.

    Raises:
        DpoError: as `hub.push` has it.
    """
    if renew_cards(recipe, run) and not quiet:
        print("export: eval's figures are in the cards now", flush=True)
    record = run.record("export")
    if "hub" not in recipe.export.formats or record.get("status") != "complete" or record.get("hub"):
        return None
    from dpo_cli.export import hub  # its client, which an export that pushes nothing does not wait for

    record["hub"] = hub.push(recipe, run["export"], quiet)
    run.write_record("export", recipe, record)
    return str(record["hub"])
