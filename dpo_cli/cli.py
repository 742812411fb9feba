"""The command line: options, what is printed, and exit codes. A stage is imported when it is called."""

from __future__ import annotations

import inspect
import json
import re
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from dpo_cli import __version__, processes, progress, recipe
from dpo_cli.distribution import shipped
from dpo_cli.doctor import examine
from dpo_cli.environment import never_fail_to_print, prepare_environment
from dpo_cli.errors import FAILED, UNVERIFIED, USAGE, DpoError
from dpo_cli.export import upkeep
from dpo_cli.job import (
    RUNS,
    Job,
    command_line,
    evaluated_run,
    free_name,
    importing,
    importing_models,
    reported,
    several,
)
from dpo_cli.prepare.sources import source_files
from dpo_cli.recipe import paths
from dpo_cli.recipe.overview import overview
from dpo_cli.records import read_pairs
from dpo_cli.show import say, takes_unicode
from dpo_cli.train.checkpoints import start_of

app = typer.Typer(
    help="One YAML recipe from raw preference data to a verified, aligned Qwen3.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/smoke.yaml.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, dotted; may be repeated.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def examples(*lines: str) -> str:
    """Lay out example command lines for the end of a command's help."""
    return "\n".join(("\b", "Examples:", *(f"  dpo-cli {line}" for line in lines)))


def stage_command(name: str, *lines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a stage: its own options among those that all four have, examples, and every error as one block."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        def command(
            recipe_path: RecipePath,
            settings: Settings = None,
            runs_dir: Annotated[Path, typer.Option(help="The folder that runs live in.")] = RUNS,
            force: Annotated[bool, typer.Option("--force", help="Do it again though nothing has changed.")] = False,
            quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
            debug: Debug = False,
            **own: Any,
        ) -> None:
            quiet = quiet or not processes.is_main()
            with reported(debug), progress.shown(not quiet):
                body(Job.open(recipe_path, settings or [], runs_dir, force, quiet), **own)

        *shared, _ = inspect.signature(command, eval_str=True).parameters.values()
        _, *own = inspect.signature(body, eval_str=True).parameters.values()
        command.__signature__ = inspect.Signature([*shared[:2], *own, *shared[2:]])  # type: ignore[attr-defined]
        command.__doc__ = body.__doc__
        app.command(name, epilog=examples(*lines))(command)
        return body

    return register


@stage_command("prepare", "prepare recipes/smoke.yaml", "prepare mine.yaml --preview 3", "prepare mine.yaml --examples")
def prepare(
    job: Job,
    preview: Annotated[int, typer.Option(metavar="N", min=0, help="Show N pairs as the model will see them.")] = 0,
    show_examples: Annotated[
        bool, typer.Option("--examples", help="Show kept rows, and dropped ones by reason.")
    ] = False,
) -> None:
    """Turn raw sources into clean pairs, with a report of every drop."""
    # What is missing is an error here, even where what was made of it is still whole.
    paths.require(job.recipe, ["data", *job.parts_of_prepare])
    source_files(job.recipe)
    with job.lock("prepare"):
        job.prepare(show_examples)
        trained = job.run.record("train")
        pairs = job.run.record("prepare")["outputs"]["data/train.jsonl"]
        if trained.get("status") == "complete" and trained["inputs"].get("data/train.jsonl") != pairs:
            job.say(f"! {job.run.adapter} was trained on other pairs than these; keep it with --set name=…")
        if preview:
            from dpo_cli.prepare.tokens import preview as show

            pairs = read_pairs(job.run.train_pairs)
            if not pairs:
                raise DpoError(
                    "--preview shows pairs, and here no prompt has both a good and a bad answer",
                    hint=f"look at the rows themselves: head -n {preview} {job.run.train_pairs}",
                )
            show(job.recipe, pairs[:preview])
    job.next("train")


@stage_command("train", "train recipes/smoke.yaml", "train mine.yaml --plan", "train mine.yaml --set train.beta=0.3")
def train(
    job: Job,
    plan: Annotated[
        bool, typer.Option("--plan", help="Predict memory and time, say whether it fits, and stop.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, also in place of a finished run.")] = False,
) -> None:
    """Train a LoRA on the pairs, preparing them first where needed."""
    loaded, run, main = job.recipe, job.run, processes.is_main()
    again = job.force or fresh
    paths.require(loaded, ["model", "adapter"])

    def goes_on(prepared: bool) -> bool:
        """Whether to go on with what is here, where something is; an error where it would be replaced."""
        if fresh or (job.force and run.record("train").get("status") != "complete"):
            return False
        another = job.command("train", f"name={free_name(run)}")
        return start_of(loaded, run, another, prepared).longer or not job.force

    with job.lock("train", view=plan, again=again) if main else nullcontext():
        if main and not (plan and job.fresh("prepare")):
            goes_on(prepared=False)  # before prepare replaces the pairs that a finished run was trained on
        prepare_first = replace(job, force=False)
        if plan:
            job.load_backend()
            prepare_first.prepare()
            progress.show_live_only()
            with importing("torch, transformers and TRL"):
                from dpo_cli.train.planned import print_plan

            if not print_plan(loaded, run):
                raise typer.Exit(UNVERIFIED)
            return
        if again or not main or not job.fresh("train"):
            _rehearse(job)

        def prepared() -> tuple[bool, bool]:
            prepare_first.prepare()
            return goes_on(prepared=True), again or not job.fresh("train")

        resume, again = processes.from_main(prepared)

        def work() -> None:
            from dpo_cli.train.trainer import train as stage

            stage(loaded, run, fresh=not resume, quiet=job.quiet)

        job.run_stage("train", work, again=again)
    processes.leave()
    job.next("eval")


def _rehearse(job: Job) -> None:
    """Import the backend, and try what a training needs before the data are prepared for it."""
    job.say(f"train: {job.recipe.train.method} of {job.recipe.model.id}")
    data: list[paths.Part] = [] if job.fresh("prepare") else ["data"]
    job.load_backend("model", "adapter", *data)
    with importing("TRL"):
        from dpo_cli.train.config import rehearse

    rehearse(job.recipe, job.run)


@stage_command("eval", "eval recipes/smoke.yaml", 'eval mine.yaml --prompt "Why is the sky blue?"')
def evaluate(
    job: Job,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Show answers to this prompt, and stop.")] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many answers to --prompt; 3 unless set.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with base and tuned model side by side.")] = False,
    answer: Annotated[
        Path | None,
        typer.Option("--answer", metavar="FILE", help="Answer a file's prompts, for AlpacaEval or MT-Bench."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare", metavar="RECIPE", help="Set beside its run: a recipe, run, folder or glob; repeatable."
        ),
    ] = None,
    against: Annotated[
        Literal["reference", "base"] | None,
        typer.Option(help="Compare with the adapter that training started from (reference), or with the base alone."),
    ] = None,
) -> None:
    """Measure the adapter on the held-out pairs and write report.html."""
    job = job.with_setting(f"eval.against={against}") if against else job
    if samples and prompt is None:
        raise DpoError("--samples says how many answers to --prompt", hint="add --prompt TEXT", exit_code=USAGE)
    with job.lock("eval", view=prompt is not None or chat):
        job.run.require("train", job.recipe, job.command("train"))
        if chat or prompt is not None or answer is not None:
            job.look_at("model", "adapter")
            _answer(job, None if chat else prompt, samples or 3, None if chat else answer)
            return
        others = [evaluated_run(path, job.runs_dir) for path in several(compare or [], job)]

        def work() -> None:
            job.say(f"eval: {job.recipe.name}, {job.recipe.train.method} of {job.recipe.model.id}")
            job.look_at("model", "adapter", "judge", "sets")
            if job.recipe.eval.sets and not job.fresh("sets"):
                from dpo_cli.prepare.eval_sets import read_sets

                read_sets(job.recipe, job.run)
            with importing_models():
                from dpo_cli.evaluate.evaluate import evaluate as stage

            stage(job.recipe, job.run, quiet=job.quiet)

        replace(job, quiet=job.quiet or bool(others)).run_stage("eval", work)
        from dpo_cli.evaluate import comparison_page, report

        if others:
            comparison_page.print_comparison([(job.recipe, job.run), *others])
        elif not job.quiet:
            report.print_report(job.run["eval"])
            job.next("export")


def _answer(job: Job, prompt: str | None, count: int, file: Path | None) -> None:
    """Answer a prompt, a file of prompts, or who talks with both models."""
    if file is None:
        progress.show_live_only()
    with importing_models():
        from dpo_cli.evaluate import evaluate, prompt_file, talk

    if prompt is not None:
        evaluate.answer(job.recipe, job.run, prompt, count)
    elif file is not None:
        for written in prompt_file.answer_file(job.recipe, job.run, file, quiet=job.quiet):
            job.say(f"eval: answers -> {written}")
    else:
        talk.talk(job.recipe, job.run)


def _export_stage() -> ModuleType:
    """Import what exports: seconds that a finished export does not cost."""
    with importing_models():
        from dpo_cli.export import export

    return export


@stage_command("export", "export recipes/smoke.yaml", "export mine.yaml --set export.formats=[merged,gguf] --dry-run")
def export(
    job: Job,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files it would write, and push, with their sizes; and stop.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove formats that export.formats does not name.")] = False,
) -> None:
    """Write adapter, merged model, GGUF, …; verify and push."""
    loaded, run = job.recipe, job.run
    with job.lock("export", view=dry_run, again=prune):
        run.require("train", loaded, job.command("train"))
        if dry_run:
            progress.show_live_only()
            stage = _export_stage()
            stage.print_planned(loaded, stage.plan(loaded, run))
            return

        def work() -> None:
            job.say(f"export: {', '.join(loaded.export.formats)}")
            job.look_at("model", "merge_base")
            checks = _export_stage().export(loaded, run, quiet=job.quiet)
            job.say(f"export: {len(checks)} checks passed -> {run['export']}")

        job.run_stage("export", work)
        gone = upkeep.prune(loaded, run) if prune else []
        if gone:
            job.say(f"export: removed {', '.join(gone)}, which export.formats does not name")
        address = upkeep.push(loaded, run, quiet=job.quiet)  # of its own: a push that failed must not cost the export
        if address:
            job.say(f"export: pushed to {address}")
    job.next("eval", "--chat")


@app.command(epilog=examples("check mine.yaml", "check mine.yaml --all", "check mine.yaml --set model.max_length=2048"))
def check(
    recipe_path: RecipePath,
    settings: Settings = None,
    everything: Annotated[bool, typer.Option("--all", help="Print the whole recipe, with every default.")] = False,
    debug: Debug = False,
) -> None:
    """Validate a recipe and say what it will do."""
    with reported(debug):
        loaded = recipe.load(shipped(recipe_path), settings)
        remarks = recipe.check(loaded, shipped(recipe_path))
        if any(source.sample and source.quota for source in loaded.data.sources):
            from dpo_cli.prepare.own_answers import check_quotas

            check_quotas(loaded)
        if everything:
            sys.stdout.write(recipe.dump(loaded, takes_unicode()))
            sys.stdout.flush()  # here, where a reader that is gone is no error
        else:
            say("\n".join([f"ok: {recipe_path}", *overview(loaded)]))
            say(f"next: {command_line('prepare', recipe_path, settings)}")
        for remark in remarks:
            say(f"note: {remark}", sys.stderr)


@app.command(epilog=examples("init my_pairs.jsonl", "init HuggingFaceH4/ultrafeedback_binarized -o h4.yaml", "init"))
def init(
    data: Annotated[str | None, typer.Argument(metavar="FILE", help="Data: a file, a folder or a Hub id.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The recipe; default: named as FILE.")] = None,
    debug: Debug = False,
) -> None:
    """Look at your data, and write a recipe to start from."""
    with reported(debug):
        from dpo_cli.prepare.starter import BUILT_IN_DATA, starter

        source = data or BUILT_IN_DATA
        name = re.sub(r"[^\w-]+", "_", Path(source.removeprefix("builtin:")).name.split(".")[0]).strip("_")
        path = output or Path(f"{name or 'recipe'}.yaml")
        if path.exists():
            raise DpoError(f"{path} is there already", hint="name another file with --output", exit_code=USAGE)
        written = starter(source, path.parent)
        with open(path, "x", encoding="utf-8") as file:
            file.write(written)
        say(f"{written.rstrip()}\n-> {path}\nnext: {command_line('check', path)}")


@app.command(epilog=examples("doctor"))
def doctor(debug: Debug = False) -> None:
    """Say what is installed, what can run here, and what to install."""
    with reported(debug):
        able = True
        for finding in examine():
            say(finding.line())
            able = able and (finding.ok or not finding.needed)
        if not able:
            raise typer.Exit(FAILED)


@app.command(epilog=examples("schema > recipe.schema.json"))
def schema() -> None:
    """Print the JSON Schema of a recipe, for an editor's completion."""
    typer.echo(json.dumps(recipe.json_schema(), indent=2, ensure_ascii=not takes_unicode()))


@app.callback(invoke_without_command=True, epilog="Start with `dpo-cli init my_data.jsonl`, or `dpo-cli doctor`.")
def version(
    show: Annotated[bool, typer.Option("--version", "-V", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """One YAML recipe from raw preference data to a verified, aligned Qwen3."""
    if show:
        typer.echo(f"dpo-cli {__version__}")
        raise typer.Exit


def main() -> None:
    """The program: quiet libraries, no telemetry unless asked for, and SIGTERM and hang-up treated like Ctrl-C."""
    never_fail_to_print()
    prepare_environment(next(iter(sys.argv[1:]), ""))
    for number in processes.stop_signals():
        if number != signal.SIGINT:  # which Python has made a KeyboardInterrupt, unless it is ignored
            signal.signal(number, _interrupt)
    app()


def _interrupt(number: int, frame: Any) -> None:
    processes.leave_terminal(number)
    raise KeyboardInterrupt
