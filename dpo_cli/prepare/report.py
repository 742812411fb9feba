"""The report of `prepare`: report.json for programs, report.md and report.html for people, the terminal shows part."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_cli import __version__
from dpo_cli.disk import read_json, write_json
from dpo_cli.page import markdown_page
from dpo_cli.prepare import remarks
from dpo_cli.prepare.audit import QUANTILES, SHORTCUTS, Audit, shortcut_warnings
from dpo_cli.prepare.filters import REASONS
from dpo_cli.prepare.funnel import Entry, Funnel
from dpo_cli.prepare.read import Read
from dpo_cli.prepare.split import Mix
from dpo_cli.published import clean
from dpo_cli.recipe import Recipe
from dpo_cli.records import ROWS_ARE
from dpo_cli.run import Run
from dpo_cli.show import escaped, say, show_figure, table, visible
from dpo_cli.terminal import print_markdown


def build(
    recipe: Recipe,
    funnel: Funnel,
    entries: list[Entry],
    read: list[Read],
    mix: Mix,
    duplicates: dict[str, int],
    audit: Audit,
    own: dict[str, Any],
    inputs: dict[str, str],
) -> dict[str, Any]:
    """Return what stands in report.json.

    Args:
        audit: of the training pairs.
        own: `sampled` and `rated`, where the model answered or a rater rated.
        inputs: the sha256 of every local file.
    """
    shortcuts = audit.shortcuts()
    kept = sum(len(entry.picks) for entry in entries if entry.drop is None)
    rows = {"train": len(mix.train), "eval": len(mix.held), "quota": kept - len(mix.train) - len(mix.held)}
    clusters = [{entry.cluster for entry, _, _ in chosen} for chosen in (mix.train, mix.held)]
    train, held = (Counter(entry.language for entry, _, _ in chosen) for chosen in (mix.train, mix.held))
    languages: dict[str, dict[str, Any]] = {}
    for name in sorted({*mix.wanted, *(key[1] for key in [*funnel.kept, *funnel.dropped])}):
        languages[name] = {
            "wanted": mix.wanted.get(name), "got": train[name], "eval": held[name],
            "kept": sum(count for (_, language), count in funnel.kept.items() if language == name),
            "dropped": funnel.reasons(language=name),
        }  # fmt: skip
    short = [_shortfall(name, one, mix.outside) for name, one in languages.items() if (one["wanted"] or 0) > one["got"]]
    examples: dict[str, Any] = {"kept": {}, "dropped": {}}
    for (source, reason), several in sorted(funnel.examples.items()):
        if reason == "kept":
            examples["kept"][source] = [row for _, row in several]
        else:
            examples["dropped"].setdefault(reason, []).extend({"source": source, **row} for _, row in several)
    return {
        "sources": {source.label: _source(funnel, source.label) for source in recipe.data.sources},
        "pairs": rows,
        "languages": languages,
        "margin": audit.margins(),
        "length": audit.lengths(),
        "tokens": audit.token_counts(),
        "duplicates": {**duplicates, "train_eval_overlap": len(clusters[0] & clusters[1])},
        "shortcuts": shortcuts,
        "warnings": [
            *remarks.warnings(recipe, funnel, entries, rows, read), *short, *shortcut_warnings(shortcuts),
            *remarks.own_answers(recipe, own),
        ],
        "examples": examples,
        **own,
        "provenance": {
            "dpo_cli": __version__, "datasets": version("datasets"), "seed": recipe.seed, "model": recipe.model.id,
            "format": recipe.data.format, "sources": {one.source.label: _provenance(one) for one in read},
            "inputs": inputs,
        },
    }  # fmt: skip


def _source(funnel: Funnel, source: str) -> dict[str, Any]:
    changes = {kind: count for (name, kind), count in sorted(funnel.edits.items()) if name == source}
    return {
        "in": funnel.came[source],
        "kept": sum(count for (name, _), count in funnel.kept.items() if name == source),
        "dropped": funnel.reasons(source),
        "edits": {kind: count for kind, count in changes.items() if kind not in REASONS},
        "answers_dropped": {kind: count for kind, count in changes.items() if kind in REASONS},
    }


def _shortfall(language: str, figures: dict[str, Any], outside: dict[str, Counter[str]]) -> str:
    """ "zh: 2,250 pairs wanted, 1,984 got: …", with the drops that cost most."""
    causes = [f"{count:,} {reason}" for reason, count in list(figures["dropped"].items())[:4]]
    causes += [f"{counts[language]:,} {why}" for why, counts in outside.items() if counts[language]]
    lost = f"; lost were {', '.join(causes)}" if causes else "; the sources hold no more"
    return f"{language}: {figures['wanted']:,} training pairs wanted, {figures['got']:,} got{lost}"


def _provenance(one: Read) -> dict[str, Any]:
    files = {feed.name: {"rows": feed.count, **({"notes": feed.notes} if feed.notes else {})} for feed in one.feeds}
    found = {"id": one.source.id, "layout": one.layout, "revision": one.commit, "files": files}
    more = {
        "columns_not_read": list(one.unread_columns),
        "files_not_read": one.left_out,
        "short_prompts_cut_from_answers": one.repeats_prompts,
    }
    return found | {name: value for name, value in more.items() if value}


def write(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md, and report.html: the same without paths of this machine, to be shown around."""
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    shown = report | {part: clean(report[part]) for part in ("provenance", "warnings")}
    (folder / "report.html").write_text(markdown_page("Data report", to_markdown(shown)), encoding="utf-8")


def rows_are(report: dict[str, Any]) -> str:
    return ROWS_ARE[report["provenance"].get("format", "pairs")]


def summary(report: dict[str, Any], on_terminal: bool = False) -> list[str]:
    """Return the funnel and what it led to, as parts of Markdown.

    Args:
        on_terminal: more than three sources are summed up.
    """
    sources: dict[str, Any] = report["sources"]
    names = list(sources) if 1 < len(sources) <= (3 if on_terminal else 100) else []
    heads = [*names, "all" if len(sources) > 1 else next(iter(sources))]
    came = max(sum(one["in"] for one in sources.values()), 1)

    def row(what: str, counts: dict[str, int], sign: str = "") -> list[str]:
        every = sum(counts.values())
        cells = [f"{sign}{count:,}" if count else "·" for count in (*(counts[name] for name in names), every)]
        return [what, *cells, "█" * max(round(BAR * every / came), 1)]

    rows = [row("prompts in", {name: one["in"] for name, one in sources.items()})]
    for reason in sorted({reason for one in sources.values() for reason in one["dropped"]}, key=REASONS.index):
        rows.append(row(reason, {name: one["dropped"].get(reason, 0) for name, one in sources.items()}, "-"))
    rows.append(row("kept", {name: one["kept"] for name, one in sources.items()}))
    facts = [f"- {name}: {escaped(text)}" for name, text in _facts(report).items()]
    warned = [f"> {escaped(warning)}" for warning in report["warnings"]]
    return [table(["prompts", *heads, ""], rows, left=(len(heads) + 1,)), "\n".join(facts), *warned]


BAR = 10  # columns of the longest bar


def _facts(report: dict[str, Any]) -> dict[str, str]:
    pairs, twins, longer = report["pairs"], report["duplicates"], report["length"]["longer_wins"]
    sources = report["provenance"]["sources"]

    def summed(key: str) -> str:
        counts = Counter[str]()
        for one in report["sources"].values():
            counts.update(one[key])
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items())) or "none"

    spoken = [
        f"{name} {one['got']:,}" + (f" of {one['wanted']:,}" if one["wanted"] is not None else "")
        for name, one in report["languages"].items()
        if one["got"] or one["wanted"]
    ]
    files = [(name, file) for one in sources.values() for name, file in one["files"].items()]
    read = [f"{name}: {note}" for name, file in files for note in file.get("notes", ())]
    facts = {
        "layouts": ", ".join(f"{name} {one['layout']}" for name, one in sources.items()),
        **_own_answers(report),
        "files": "; ".join(read[:5]),
        rows_are(report): f"{pairs['train']:,} to train on, {pairs['eval']:,} held out, "
        f"{pairs['quota']:,} over the mix",
        "languages": ", ".join(spoken),
        "edits": summed("edits"),
        "answers dropped": summed("answers_dropped"),
        "duplicates": f"{twins['exact']:,} exact, {twins['near']:,} near, {twins['cross_source']:,} across sources; "
        f"the largest cluster has {twins['largest_cluster']:,}",
        "longer wins": f"{show_figure(longer)}: what any accuracy has to beat" if longer["n"] else "",
    }
    return {name: text for name, text in facts.items() if text or name == "languages"}


def _own_answers(report: dict[str, Any]) -> dict[str, str]:
    sampled, rated = report.get("sampled"), report.get("rated")
    facts = {}
    if sampled:
        facts["sampled"] = (
            f"{sampled['answers']:,} answers to {sampled['prompts']:,} prompts by {' and '.join(sampled['by'])}; "
            f"{sampled['cut_off']:,} found no end, {sampled['identical']:,} were given before; "
            f"{sampled['tokens']:,} tokens"
        )
    if rated:
        aspects = rated.get("aspects") or {}
        means = ", ".join(f"{name.replace('_', ' ')} {one['mean']:.2f}" for name, one in aspects.items())
        facts["rated"] = (
            f"{rated['answers']:,} answers by {rated['by']['model']}, {rated['failures']:,} without a score; "
            f"the longer one preferred {show_figure(rated['longer_wins'])}"
            + (f"; mean of 1 to 5: {means}; {rated['tokens']:,} tokens" if means else "")
        )
    return facts


def print_funnel(run: Run, with_examples: bool) -> None:
    """Print where every prompt went, from `data/report.json`."""
    report = read_json(run["prepare"] / "report.json")
    print_markdown("\n\n".join(summary(report, on_terminal=True) + (examples(report) if with_examples else [])))
    pairs = report["pairs"]
    say(f"prepare: {pairs['train']} training {rows_are(report)}, {pairs['eval']} held out -> {run['prepare']}")


def examples(report: dict[str, Any]) -> list[str]:
    """Return kept and dropped rows, as parts of Markdown."""
    kept = [
        f"- {escaped(source)}: {escaped(one['prompt'])}\n"
        f"  - chosen: {escaped(one['chosen'])}\n"
        f"  - rejected: {escaped(one['rejected'])}"
        for source, several in report["examples"]["kept"].items()
        for one in several
    ]
    dropped = [
        f"- **{escaped(reason)}**, {escaped(' '.join(filter(None, [one['source'], one['where']])))}, "
        f"{escaped(one['detail'])}: {escaped(one['prompt'])}"
        for reason, several in report["examples"]["dropped"].items()
        for one in several
    ]
    return ["## Kept, for example", "\n".join(kept), "## Dropped, for example", "\n".join(dropped) or "nothing"]


def to_markdown(report: dict[str, Any]) -> str:
    funnel, facts, *warned = summary(report)
    numbers = {
        "margin": report["margin"],
        "characters, chosen": report["length"]["chosen"],
        "characters, rejected": report["length"]["rejected"],
        "longer / shorter answer": report["length"]["ratio"],
        **{f"tokens, {name.replace('_', ' + ')}": one for name, one in (report["tokens"] or {}).items()},
    }
    bets = [[SHORTCUTS[name], show_figure(one), f"{one['differs']:,}"] for name, one in report["shortcuts"].items()]
    parts = [
        "# Data report",
        *warned,
        "## Funnel",
        funnel,
        facts,
        "## Shortcuts",
        "How often each of these alone picks the chosen answer, with a 95 % interval; a draw counts half.",
        table(["bet on", "right", "pairs where answers differ"], bets),
        "## Numbers",
        table(
            ["of the training pairs", *QUANTILES],
            [[name, *(f"{one[key]:,g}" for key in QUANTILES)] for name, one in numbers.items() if one],
        ),
        *examples(report),
        "## Where it comes from",
        f"```json\n{json.dumps(report['provenance'], ensure_ascii=False, indent=2)}\n```",
    ]
    return visible("\n\n".join(parts) + "\n")
