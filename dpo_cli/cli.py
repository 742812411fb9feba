"""The command line: options, what is printed, and exit codes. A stage is imported when it is called."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_cli import __version__, console, processes, recipe
from dpo_cli.device import ran_out_of_memory
from dpo_cli.environment import never_fail_to_print, prepare_environment
from dpo_cli.errors import FAILED, INTERRUPTED, USAGE, DpoError
from dpo_cli.recipe import Recipe, paths
from dpo_cli.run import Run
from dpo_cli.show import say, takes_unicode, terminal

app = typer.Typer(
    help="One YAML recipe from raw preference data to a verified, aligned Qwen3.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/smoke.yaml.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, dotted; may be repeated.")
]
RunsDir = Annotated[Path, typer.Option(help="The folder that runs live in.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again though nothing has changed.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RUNS = Path("runs")


@app.command()
def prepare(
    recipe_path: RecipePath,
    settings: Settings = None,
    preview: Annotated[int, typer.Option(metavar="N", min=0, help="Show N pairs as the model will see them.")] = 0,
    examples: Annotated[bool, typer.Option("--examples", help="Show kept rows, and dropped ones by reason.")] = False,
    runs_dir: RunsDir = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn raw sources into clean pairs, with a report of every drop."""
    with _reported(debug):
        loaded, run = _open(recipe_path, settings, runs_dir)
        # What is missing is an error here, even where what was made of it is still whole.
        paths.require(loaded, ["data", *_tokenizer(loaded)])
        from dpo_cli.prepare.sources import source_files

        source_files(loaded)
        with run.lock(view=not force and run.state("prepare", loaded).fresh):
            _prepare(loaded, run, force, quiet, examples)
            trained = run.record("train")
            pairs = run.record("prepare")["outputs"]["data/train.jsonl"]
            if trained.get("status") == "complete" and trained["inputs"].get("data/train.jsonl") != pairs:
                _say(quiet, f"! {run.adapter} was trained on other pairs than these; keep it with --set name=…")
            if preview:
                from dpo_cli.prepare.tokens import preview as show
                from dpo_cli.records import AcrossPrompts, read_pairs

                pairs = read_pairs(run.train_pairs)
                if any(isinstance(pair, AcrossPrompts) for pair in pairs):
                    raise DpoError(
                        "--preview shows pairs, and here no prompt has both a good and a bad answer",
                        hint=f"look at the rows themselves: head -n {preview} {run.train_pairs}",
                    )
                show(loaded, pairs[:preview], terminal())


@app.command()
def train(
    recipe_path: RecipePath,
    settings: Settings = None,
    plan: Annotated[bool, typer.Option("--plan", help="Predict the memory, say whether it fits, and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, also in place of a finished run.")] = False,
    runs_dir: RunsDir = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a LoRA on the pairs, preparing them first where needed."""
    with _reported(debug):
        loaded, run = _open(recipe_path, settings, runs_dir)
        main = processes.is_main()
        again, quiet = force or fresh, quiet or not main
        paths.require(loaded, ["model", "adapter"])

        def goes_on(prepared: bool) -> bool:
            """Whether to go on with what is here, where something is; an error where it would be replaced."""
            from dpo_cli.train.checkpoints import start_of

            if fresh or (force and run.record("train").get("status") != "complete"):
                return False
            another = _command("train", recipe_path, [*(settings or []), f"name={_free_name(run)}"], runs_dir)
            return start_of(loaded, run, another, prepared).longer or not force

        with run.lock(view=plan or (not again and run.state("train", loaded).fresh)) if main else nullcontext():
            if main and not (plan and run.state("prepare", loaded).fresh):
                goes_on(prepared=False)  # before prepare replaces the pairs that a finished run was trained on
            if plan:
                _prepare(loaded, run, False, quiet)
                console.print_plan(loaded, run)
                return
            if again or not main or not run.state("train", loaded).fresh:
                from dpo_cli import backends

                # Now, because prepare needs transformers, and Unsloth has to be imported before that.
                backend = backends.choose_backend(loaded)
                fresh_data = run.state("prepare", loaded).fresh
                _look_at(loaded, ["model", "adapter"] if fresh_data else ["model", "adapter", "data"])
                backends.import_backend(backend)
                backends.refuse_cpu(loaded)
                from dpo_cli.train.rehearsal import rehearse

                rehearse(loaded, run)

            def prepared() -> tuple[bool, bool]:
                _prepare(loaded, run, False, quiet)
                return goes_on(prepared=True), again or not run.state("train", loaded).fresh

            resume, again = processes.from_main(prepared)

            def work() -> None:
                from dpo_cli.train.trainer import train as stage

                trained = stage(loaded, run, fresh=not resume, quiet=quiet)
                best = trained.metrics.get("best")
                kept = f", step {best['step']} was the best" if best else ""
                each = next(one for one in ("pairs", "rows", "prompts") if f"{one}_per_second" in trained.metrics)
                rate = f"{trained.metrics[f'{each}_per_second']:.1f} {each}/s"
                _say(
                    quiet,
                    f"train: {trained.metrics['steps']} steps in {trained.metrics['seconds']:.0f} s, "
                    f"{rate}{kept} -> {trained.adapter}",
                )

            work() if again else _nothing_to_do("train", run, quiet)


@app.command(name="eval")
def evaluate(
    recipe_path: RecipePath,
    settings: Settings = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Show answers to this prompt, and stop.")] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", min=1, help="How many answers to --prompt.")] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="RECIPE", help="Set beside that recipe's run, or that run; repeatable."),
    ] = None,
    runs_dir: RunsDir = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the adapter on the held-out pairs and write report.html."""
    with _reported(debug):
        if samples and prompt is None:
            raise DpoError("--samples says how many answers to --prompt", hint="add --prompt TEXT", exit_code=USAGE)
        loaded, run = _open(recipe_path, settings, runs_dir)
        with run.lock(view=prompt is not None or (not force and run.state("eval", loaded).fresh)):
            run.require("train", loaded, _command("train", recipe_path, settings, runs_dir))
            if prompt is not None:
                _look_at(loaded, ["model", "adapter"])
                from dpo_cli.evaluate.evaluate import answer

                console.print_answers(prompt, *answer(loaded, run, prompt, samples or 3))
                return

            others = [_compared(path, runs_dir) for path in compare or []]

            def work() -> None:
                _look_at(loaded, ["model", "adapter", "judge"])
                from dpo_cli.evaluate.evaluate import evaluate as stage

                stage(loaded, run, quiet=quiet)

            _unless_fresh("eval", loaded, run, force, quiet or bool(others), work)
            if others:
                console.print_comparison([(loaded, run), *others])
            elif not quiet:
                console.print_metrics(run)


@app.command()
def export(
    recipe_path: RecipePath,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files it would write, and push, with their sizes; and stop.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove formats that export.formats does not name.")] = False,
    runs_dir: RunsDir = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write adapter, merged model, GGUF, …; verify and push."""
    with _reported(debug):
        loaded, run = _open(recipe_path, settings, runs_dir)
        with run.lock(view=dry_run or (not (force or prune) and run.state("export", loaded).fresh)):
            run.require("train", loaded, _command("train", recipe_path, settings, runs_dir))
            from dpo_cli.export.export import export as stage
            from dpo_cli.export.export import prune as remove_others
            from dpo_cli.export.export import push

            if dry_run:
                console.print_files(loaded, stage(loaded, run, dry_run=True).planned)
                return

            def work() -> None:
                _look_at(loaded, ["model", "merge_base"])
                _say(quiet, f"export: {', '.join(loaded.export.formats)}")
                exported = stage(loaded, run, quiet=quiet)
                _say(quiet, f"export: {len(exported.checks)} checks passed -> {run['export']}")

            _unless_fresh("export", loaded, run, force, quiet, work)
            gone = remove_others(loaded, run) if prune else []
            if gone:
                _say(quiet, f"export: removed {', '.join(gone)}, which export.formats does not name")
            address = push(loaded, run, quiet=quiet)  # of its own: a push that failed must not cost the export
            if address:
                _say(quiet, f"export: pushed to {address}")


@app.command()
def check(recipe_path: RecipePath, settings: Settings = None, debug: Debug = False) -> None:
    """Validate a recipe and print it with every default."""
    with _reported(debug):
        loaded = recipe.load(recipe_path, settings)
        remarks = recipe.check(loaded, recipe_path)
        sys.stdout.write(recipe.dump(loaded, takes_unicode()))
        sys.stdout.flush()  # here, where a reader that is gone is no error
        for remark in remarks:
            say(f"note: {remark}", sys.stderr)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Say what is installed, what can run here, and what to install."""
    with _reported(debug):
        from dpo_cli.doctor import examine

        able = True
        for finding in examine():
            say(finding.line())
            able = able and (finding.ok or not finding.needed)
        if not able:
            raise typer.Exit(FAILED)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for an editor's completion."""
    typer.echo(json.dumps(recipe.json_schema(), indent=2, ensure_ascii=not takes_unicode()))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
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


# ------------------------------------------------------------------------------------------------------------ pieces


def _open(recipe_path: Path, settings: list[str] | None, runs_dir: Path) -> tuple[Recipe, Run]:
    """The recipe and its run, which knows the files from outside that each stage reads."""
    loaded = recipe.load(recipe_path, settings)
    os.fsencode(loaded.name)  # raises where no folder can be called so
    from dpo_cli import models
    from dpo_cli.prepare.sources import source_files

    inputs: dict[str, Callable[[Recipe], dict[str, Path]]] = {
        "prepare": lambda one: {**source_files(one, missing_ok=True), **models.tokenizer_files(one)},
        "train": models.local_files,
        "export": models.merge_files,
    }
    run = Run(runs_dir / loaded.name, inputs)
    try:
        with suppress(FileNotFoundError):
            (run.folder / "manifest.json").stat()
    except OSError as error:  # a part of the path is a file, too long, or not to be entered
        raise run.unwritable(error) from error
    return loaded, run


def _compared(path: Path, runs_dir: Path) -> tuple[Recipe, Run]:
    """Another evaluated run, by its recipe or by its folder.

    Raises:
        DpoError: it has not been evaluated, or what it was made from has changed.
    """
    if not path.is_dir():
        loaded, run = _open(path, None, runs_dir)
        run.require("eval", loaded, _command("eval", path, None, runs_dir))
        return loaded, run
    written, folder = path / "recipe.yaml", path.resolve()
    loaded, run = _open(written, None, folder.parent)
    renamed = [] if loaded.name == folder.name else [f"name={json.dumps(folder.name, ensure_ascii=False)}"]
    run = Run(path, run.inputs)
    run.require("eval", loaded, _command("eval", written, renamed, folder.parent))
    return loaded, run


def _command(name: str, recipe_path: Path, settings: list[str] | None, runs_dir: Path) -> str:
    """The command line of another stage of this very run."""
    options = [part for setting in settings or [] for part in ("--set", setting)]
    options += ["--runs-dir", str(runs_dir)] if runs_dir != RUNS else []
    return shlex.join(["dpo-cli", name, str(recipe_path), *options])


def _free_name(run: Run) -> str:
    """The name of a run that is not there yet, as `--set name=…` takes it."""
    name = next(
        name
        for name in (f"{run.folder.name}-{number}" for number in itertools.count(2))
        if not run.folder.with_name(name).exists()
    )
    return name if re.fullmatch(r"[A-Za-z][\w-]*", name) else json.dumps(name, ensure_ascii=False)


def _unless_fresh(stage: str, loaded: Recipe, run: Run, force: bool, quiet: bool, work: Callable[[], None]) -> None:
    if not force and run.state(stage, loaded).fresh:
        _nothing_to_do(stage, run, quiet)
    else:
        work()


def _nothing_to_do(stage: str, run: Run, quiet: bool) -> None:
    _say(quiet, f"{stage}: nothing has changed, nothing to do ({run[stage]})")


def _prepare(loaded: Recipe, run: Run, force: bool, quiet: bool, examples: bool = False) -> None:
    def work() -> None:
        paths.require_hub(loaded, _tokenizer(loaded))
        from dpo_cli.prepare.pipeline import prepare as stage

        with run.stage("prepare", loaded) as draft:
            prepared = stage(loaded, draft.folder, quiet=quiet)
            draft.record["revisions"] = prepared.revisions
        console.print_funnel(run, quiet, examples)

    # Asked for its examples only: looking means hashing every source.
    shown_again = examples and not force and run.state("prepare", loaded).fresh
    _unless_fresh("prepare", loaded, run, force, quiet, work)
    if shown_again:
        console.print_funnel(run, quiet, examples)


def _tokenizer(loaded: Recipe) -> list[paths.Part]:
    """`model` where prepare counts tokens."""
    filters = loaded.data.filters
    return ["model"] if filters.too_long or filters.length_ratio else []


def _look_at(loaded: Recipe, parts: list[paths.Part]) -> None:
    """Refuse to begin where what a recipe names is not there, locally or on the Hub."""
    paths.require(loaded, parts)
    paths.require_hub(loaded, parts)


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        say(line)


def _interrupt(number: int, frame: Any) -> None:
    processes.leave_terminal(number)
    raise KeyboardInterrupt


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Turn every error into one block on stderr and an exit code."""
    try:
        yield
    except DpoError as error:
        _fail(error, debug)
    except KeyboardInterrupt:
        _fail(DpoError("interrupted; what was complete before is as it was", exit_code=INTERRUPTED), debug)
    except BrokenPipeError:  # `dpo-cli check … | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except OSError as error:
        elsewhere = ", or choose another folder with --runs-dir"
        hints = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some disk space{elsewhere}")
        hints |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"check who may write there{elsewhere}")
        hint = hints.get(error.errno or 0)
        place = str(error.filename) if error.filename else None
        _fail(DpoError(error.strerror or str(error), where=place, hint=hint), debug)
    except UnicodeEncodeError as error:
        name = error.object[error.start : error.end]
        what = f"file names are {error.encoding} here, which has no {name!r}"
        _fail(DpoError(what, hint="export PYTHONUTF8=1, or a UTF-8 locale: export LC_ALL=C.UTF-8"), debug)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if ran_out_of_memory(error):
            hint = "end what else uses it (nvidia-smi names that of a GPU), or take a smaller model"
            _fail(DpoError(f"memory ran out: {first or type(error).__name__}", hint=hint), debug)
        _fail(DpoError(f"{type(error).__name__}: {first}", hint="--debug shows where this comes from"), debug)


def _fail(error: DpoError, debug: bool) -> None:
    if debug:
        say(traceback.format_exc().rstrip(), sys.stderr)
    say(f"error: {error}", sys.stderr)
    raise typer.Exit(error.exit_code) from None
