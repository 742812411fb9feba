"""What commands have in common: recipe and run opened, a stage run where it is not fresh, errors as one block."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import typer

from dpo_cli import model_files, recipe
from dpo_cli.distribution import shipped
from dpo_cli.errors import FAILED, INTERRUPTED, USAGE, DpoError, first_line
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.prepare.sources import set_files, source_files
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe, paths
from dpo_cli.run import Run
from dpo_cli.show import say

RUNS = Path("runs")


@dataclass(frozen=True)
class Job:
    """What every stage command gets: the recipe, its run, and the options that all of them have."""

    recipe: Recipe
    run: Run
    path: Path
    settings: list[str]
    runs_dir: Path
    force: bool
    quiet: bool

    @classmethod
    def open(cls, path: Path, settings: list[str], runs_dir: Path, force: bool, quiet: bool) -> Job:
        """Load the recipe of a command, and open its run."""
        return cls(*open_run(path, settings, runs_dir), path, settings, runs_dir, force, quiet)

    def with_setting(self, setting: str) -> Job:
        """Open the same again with one more `--set`, which is in the commands that are proposed, too."""
        return Job.open(self.path, [*self.settings, setting], self.runs_dir, self.force, self.quiet)

    def say(self, line: str) -> None:
        if not self.quiet:
            say(line)

    def fresh(self, stage: str) -> bool:
        return self.run.fresh(stage, self.recipe)

    def lock(self, stage: str, view: bool = False, again: bool = False) -> AbstractContextManager[None]:
        """Lock the run, unless it is only looked at, or can't be written to and has nothing to do."""
        return self.run.lock(view=view or (not (self.force or again) and self.fresh(stage)))

    def run_stage(self, stage: str, work: Callable[[], None], again: bool | None = None) -> bool:
        """Do a stage's work where its results are not fresh, or where it is asked for again; returns whether it did."""
        if again if again is not None else self.force or not self.fresh(stage):
            work()
            return True
        self.say(f"{stage}: nothing has changed, nothing to do ({self.run[stage]})")
        return False

    def look_at(self, *parts: paths.Part) -> None:
        """Refuse to begin where what the recipe names is not there, locally or on the Hub."""
        paths.require(self.recipe, parts)
        from dpo_cli import hub

        hub.require(self.recipe, parts)

    def load_backend(self, *parts: paths.Part) -> None:
        """Import the backend, once what the recipe names of `parts` is there.

        Before prepare, because that needs transformers, and Unsloth has to be imported before it.
        """
        with importing("torch, transformers and TRL"):
            from dpo_cli import backends

            backend = backends.choose_backend(self.recipe)
            self.look_at(*parts)
            backends.import_backend(backend)

    def prepare(self, examples: bool = False) -> None:
        """Prepare where the pairs are not fresh, and print where every prompt went."""

        def work() -> None:
            self.say(f"prepare: {', '.join(source.label for source in self.recipe.data.sources)}")
            self.look_at(*self.parts_of_prepare)
            with importing("datasets and transformers"):
                from dpo_cli.prepare.pipeline import prepare

            with self.run.stage("prepare", self.recipe) as draft:
                prepared = prepare(self.recipe, draft.folder, kept=self.runs_dir, quiet=self.quiet)
                draft.record["revisions"] = prepared.revisions

        done = self.run_stage("prepare", work)
        if (done or examples) and not self.quiet:
            from dpo_cli.prepare.report import print_funnel

            print_funnel(self.run, examples)

    @property
    def parts_of_prepare(self) -> list[paths.Part]:
        """What prepare takes beside the data: a model where it counts tokens or samples, and the rater."""
        filters, samples = self.recipe.data.filters, self.recipe.data.samples_here
        model: list[paths.Part] = ["model"] if samples or filters.too_long or filters.length_ratio else []
        return [*model, "adapter", "rater"] if samples else [*model, "rater"]

    def next(self, stage: str, *options: str) -> None:
        """Name the command that comes next; on the main process only, which is the one that is not quiet."""
        self.say(" ".join([f"next: {self.command(stage)}", *options]))

    def command(self, stage: str, *more: str) -> str:
        """Write the command line of another stage of this very run, with more settings."""
        return command_line(stage, self.path, [*self.settings, *more], self.runs_dir)


@contextmanager
def importing(what: str) -> Iterator[None]:
    """The step of importing libraries: seconds, after the first line of a command.

    Garbage is not collected meanwhile, nor looked for later among what was imported: it would cost a fifth more.
    """
    gc.disable()
    try:
        with Step(f"importing {what}", named=False):
            yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def importing_models() -> Iterator[None]:
    """The step of importing torch and transformers where nothing is compiled.

    bitsandbytes calls torch.compile at import, whose default backend, Inductor, takes a CPU second to import.
    """
    with importing("torch and transformers"):
        import torch

        choose = getattr(torch.compiler, "set_default_backend", lambda backend: None)  # older than torch 2.13
        choose("eager")
        try:
            yield
        finally:
            choose(None)


def open_run(recipe_path: Path, settings: list[str] | None, runs_dir: Path) -> tuple[Recipe, Run]:
    """Load a recipe and open its run, which knows the files from outside that each stage reads."""
    loaded = recipe.load(shipped(recipe_path), settings)
    inputs: dict[str, Callable[[Recipe], dict[str, Path]]] = {
        "prepare": lambda one: {**source_files(one, missing_ok=True), **model_files.files_for_prepare(one)},
        "train": model_files.local_files,
        "sets": set_files,
        "export": model_files.merge_files,
    }
    run = Run(runs_dir / loaded.name, inputs)
    try:
        with suppress(FileNotFoundError):
            (run.folder / "manifest.json").stat()
    except OSError as error:  # a part of the path is a file, too long, or not to be entered
        raise run.unwritable(error) from error
    return loaded, run


def several(paths: list[Path], job: Job) -> list[Path]:
    """The recipes and runs that `--compare` names: globs and folders expanded, without the job's own.

    Raises:
        DpoError: (exit code 2) a glob or folder names none.
    """
    found: list[Path] = []
    own = {job.path.resolve(), job.run.folder.resolve()}
    for path in paths:
        if path.is_file() or _is_run(path):
            found.append(path)
            continue
        root = Path(path.anchor)
        inside = path.glob("*") if path.is_dir() else root.glob(str(path.relative_to(root)))
        named = [one for one in sorted(inside) if _is_run(one) or (one.is_file() and one.suffix in (".yaml", ".yml"))]
        if not named:
            raise DpoError(f"no recipe or run is called {path}", hint="name recipes or run folders", exit_code=USAGE)
        found += [one for one in named if one.resolve() not in own]
    return found


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def evaluated_run(path: Path, runs_dir: Path) -> tuple[Recipe, Run]:
    """Another evaluated run, by its recipe or by its folder.

    Raises:
        DpoError: it has not been evaluated, or what it was made from has changed.
    """
    if not path.is_dir():
        loaded, run = open_run(path, None, runs_dir)
        run.require("eval", loaded, command_line("eval", path, None, runs_dir))
        return loaded, run
    written, folder = path / "recipe.yaml", path.resolve()
    loaded, run = open_run(written, None, folder.parent)
    renamed = [] if loaded.name == folder.name else [f"name={json.dumps(folder.name, ensure_ascii=False)}"]
    run = Run(path, run.inputs)
    run.require("eval", loaded, command_line("eval", written, renamed, folder.parent))
    return loaded, run


def command_line(name: str, recipe_path: Path, settings: list[str] | None = None, runs_dir: Path = RUNS) -> str:
    """The command line of another stage of this very run."""
    options = [part for setting in settings or [] for part in ("--set", setting)]
    options += ["--runs-dir", str(runs_dir)] if runs_dir != RUNS else []
    return shlex.join(["dpo-cli", name, str(recipe_path), *options])


def free_name(run: Run) -> str:
    """The name of a run that is not there yet, as `--set name=…` takes it."""
    names = (f"{run.folder.name}-{number}" for number in itertools.count(2))
    name = next(name for name in names if not run.folder.with_name(name).exists())
    return name if re.fullmatch(r"[A-Za-z][\w-]*", name) else json.dumps(name, ensure_ascii=False)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
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
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        what, hint = f"{type(error).__name__}: {first_line(error)}", "--debug shows where this comes from"
        if ran_out_of_memory(error):
            what = f"memory ran out: {first_line(error)}"
            hint = "end what else uses it (nvidia-smi names that of a GPU), or take a smaller model"
        _fail(DpoError(what, hint=hint), debug)


def _fail(error: DpoError, debug: bool) -> None:
    if debug:
        say(traceback.format_exc().rstrip(), sys.stderr)
    say(f"error: {error}", sys.stderr)
    raise typer.Exit(error.exit_code) from None
