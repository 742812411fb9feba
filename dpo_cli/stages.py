"""What commands do around a stage: look at what its recipe names, import it, and say what it is about to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_cli import console
from dpo_cli.job import Job
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe, paths


def prepare(job: Job, examples: bool = False) -> None:
    """Prepare where the pairs are not fresh, and print where every prompt went."""

    def work() -> None:
        job.say(f"prepare: {', '.join(source.label for source in job.recipe.data.sources)}")
        paths.require_hub(job.recipe, of_prepare(job.recipe))
        with importing("datasets and transformers"):
            from dpo_cli.prepare.pipeline import prepare as stage

        with job.run.stage("prepare", job.recipe) as draft:
            prepared = stage(job.recipe, draft.folder, kept=job.runs_dir, quiet=job.quiet)
            draft.record["revisions"] = prepared.revisions
        console.print_funnel(job.run, job.quiet, examples)

    # Asked for its examples only: looking means hashing every source.
    shown_again = examples and not job.force and job.fresh("prepare")
    job.run_stage("prepare", work)
    if shown_again:
        console.print_funnel(job.run, job.quiet, examples)


def importing(what: str) -> Step:
    """The step of importing libraries: seconds, in which a command has said its first line already."""
    return Step(f"importing {what}", named=False)


def of_prepare(loaded: Recipe) -> list[paths.Part]:
    """What prepare takes beside the data: a model where it counts tokens or samples, and the rater."""
    filters, samples = loaded.data.filters, loaded.data.samples_here
    model: list[paths.Part] = ["model"] if samples or filters.too_long or filters.length_ratio else []
    return [*model, "adapter", "rater"] if samples else [*model, "rater"]


def look_at(loaded: Recipe, parts: list[paths.Part]) -> None:
    """Refuse to begin where what a recipe names is not there, locally or on the Hub."""
    paths.require(loaded, parts)
    paths.require_hub(loaded, parts)


def load_backend(job: Job, *parts: paths.Part) -> None:
    """Import the backend, once what the recipe names of `parts` is there.

    Before prepare, because that needs transformers, and Unsloth has to be imported before it.
    """
    from dpo_cli import backends

    with importing("torch, transformers and TRL"):
        backend = backends.choose_backend(job.recipe)
        look_at(job.recipe, list(parts))
        backends.import_backend(backend)


def rehearse(job: Job) -> None:
    """Import the backend, and try what a training needs before the data are prepared for it."""
    job.say(f"train: {job.recipe.train.method} of {job.recipe.model.id}")
    data: list[paths.Part] = [] if job.fresh("prepare") else ["data"]
    load_backend(job, "model", "adapter", *data)
    with importing("TRL"):
        from dpo_cli.train import rehearsal

    rehearsal.rehearse(job.recipe, job.run)


def export_stage() -> Callable[..., Any]:
    """Import what exports, after what keeps its libraries quiet; seconds that a finished export does not cost."""
    from dpo_cli import backends

    with importing("torch and transformers"):
        backends.import_backend(backends.Backend("hf", "export"))
        from dpo_cli.export.export import export

    return export
