"""What a DPO step costs: dpo-cli beside TRL, on pairs of real lengths, the same numbers coming out.

    python tests/benchmarks/bench_train.py                      English and Chinese lengths, some minutes on one core
    python tests/benchmarks/bench_train.py --quick              equality and token counts, half a minute, no times
    python tests/benchmarks/bench_train.py --device cuda        on a GPU: a real shape in NF4, peak memory

Contenders train in turn (A B C C B A) on the same pairs from the same adapter, with one OpenMP thread; medians count,
and CPU seconds where there is no GPU. Ratios are printed only where losses and gradients equal TRL's: to 1e-5, or to
twice what TRL's own micro-batches of 1 and 4 differ by, since a sum of 400 log-probabilities of -9 rounds at 2e-4.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# All of it before torch, datasets and transformers are imported.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import contenders  # noqa: E402
import lengths  # noqa: E402
from contenders import DEFAULTS, PARTS, TUNED, Contender, Measured, Work, dpo_cli, measure, stock  # noqa: E402

LANGUAGES = ("en", "zh")
TOLERANCE = 1e-5
ONE_EPOCH = "dpo_cli_without_reference_cache"  # whose reference is computed in each step
# The goals of a CPU, as (what, faster, slower, least ratio).
GOALS = (
    ("TRL at micro-batch 1, same settings", ONE_EPOCH, "stock_1", 1.4),
    ("TRL at micro-batch 4, same settings", ONE_EPOCH, "stock_4", 2.2),
    ("TRL defaults, reference cache warm", "dpo_cli", "trl_defaults", 2.8),
)
Results = dict[str, list[Measured]]


def alternate(some: Sequence[Contender], work: Work, repeat: int) -> Results:
    """`repeat` measurements of each: A B C, C B A, A B C, …; one that runs out of memory is left out."""
    import torch

    results: Results = {one.key: [] for one in some}
    for turn in range(repeat):
        for one in some if turn % 2 == 0 else reversed(some):
            try:
                results[one.key].append(measure(one, work))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    return {key: every for key, every in results.items() if len(every) == repeat}


@dataclasses.dataclass(frozen=True)
class Gate:
    """By contender, how far its losses (absolute) and its first gradient (relative, 2-norm) are from TRL's."""

    losses: dict[str, float]
    gradients: dict[str, float]

    @property
    def limits(self) -> list[float]:
        """By what TRL at micro-batch 4 differs from TRL at micro-batch 1."""
        return [max(TOLERANCE, 2 * errors.get("stock_4", 0.0)) for errors in (self.losses, self.gradients)]

    @property
    def failing(self) -> list[str]:
        """Whose numbers are further off than allowed, or NaN."""
        every = zip((self.losses, self.gradients), self.limits, strict=True)
        return sorted({key for errors, limit in every for key, error in errors.items() if not error <= limit})


def gate(results: Results) -> Gate:
    """Compare every contender's steps with TRL's at micro-batch 1 (`stock_1`)."""
    truth = results["stock_1"][0]
    losses, gradients = {}, {}
    for key, every in results.items():
        pairs = [zip(one.losses, truth.losses, strict=True) for one in every]
        losses[key] = worst(abs(mine - its) for one in pairs for mine, its in one)
        gradients[key] = worst(float((one.gradient - truth.gradient).norm() / truth.gradient.norm()) for one in every)
    return Gate(losses, gradients)


def worst(errors: Iterable[float]) -> float:
    """The largest; infinite with a NaN among them, which max() would pass over."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def report(title: str, some: Sequence[Contender], results: Results, work: Work) -> dict[str, Any]:
    """Print a table, with ratios and goals where the numbers are TRL's; the same as JSON."""
    on_gpu, pairs, checked = work.device == "cuda", len(work.rows), gate(results)
    # The clock on a GPU, CPU seconds elsewhere, where others work as well.
    each = {key: [(made.wall if on_gpu else made.cpu) / pairs for made in every] for key, every in results.items()}
    medians = {key: statistics.median(every) for key, every in each.items()}
    passed = not any(key.startswith("dpo_cli") for key in checked.failing)  # another's failure only costs its ratio
    print(f"\n{title}\n{'':<58}{'s a pair':>9}{'min':>7}{'max':>7}{'ratio':>7}{'loss':>9}{'grad':>9}{'GiB':>7}")
    rows: dict[str, dict[str, Any]] = {}
    for one in some:
        if one.key not in results:
            print(f"{one.label:<58}  out of memory")
            continue
        own, equal = each[one.key], passed and one.key not in checked.failing
        row = rows[one.key] = {
            "label": one.label,
            "seconds_a_pair": medians[one.key],
            "min": min(own),
            "max": max(own),
            "ratio": medians["trl_defaults"] / medians[one.key] if equal and "trl_defaults" in medians else None,
            "loss_difference": checked.losses[one.key],
            "gradient_relative_error": checked.gradients[one.key],
            "peak_gib": max(made.peak for made in results[one.key]) / 2**30,
        }
        print(
            f"{one.label:<58}{row['seconds_a_pair']:>9.3f}{row['min']:>7.3f}{row['max']:>7.3f}"
            f"{row['ratio'] or math.nan:>7.2f}{row['loss_difference']:>9.0e}{row['gradient_relative_error']:>9.0e}"
            f"{row['peak_gib']:>7.2f}"
        )
    limits = ", ".join(f"{limit:.1e}" for limit in checked.limits)
    print(f"ratio: pairs a second to TRL's defaults; loss, grad: from TRL at micro-batch 1; allowed {limits}")
    if checked.failing:
        print(f"{'' if passed else 'NO RATIOS: '}the numbers of {', '.join(checked.failing)} are not TRL's")
    goals = []
    for what, faster, slower, goal in GOALS if passed and not on_gpu else ():
        ratio = medians[slower] / medians[faster]
        goals.append({"against": what, "ratio": ratio, "goal": goal})
        print(f"  {what:<40} {ratio:5.2f}   goal {goal}   {'met' if ratio >= goal else 'MISSED'}")
    return {"title": title, "pairs": pairs, "passed": passed, "contenders": rows, "goals": goals}


def work_of(asked: argparse.Namespace, folder: Path, name: str, rows: Sequence[lengths.Lengths]) -> Work:
    """Pairs and model in a folder."""
    model = contenders.make_model(folder / f"model-{asked.shape}", contenders.SHAPES[asked.shape], asked.device)
    warm_up = 2 if asked.device == "cuda" else 0
    run = folder / "runs" / name
    return contenders.write_pairs(Work(rows, asked.pairs, model, run, asked.device, asked.backend, warm_up))


def steps(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Two optimizer steps on a sample of real lengths, by language; the parts of dpo-cli one by one in English."""
    found = []
    for language in LANGUAGES if asked.device == "cpu" else LANGUAGES[:1]:
        rows = lengths.sample(lengths.load(language), 2 * asked.pairs, min(4, asked.pairs))
        some = [DEFAULTS, stock(4), stock(1), TUNED, dpo_cli("reference_cache"), dpo_cli()]
        if language == LANGUAGES[0]:
            some += [dpo_cli("shared_prefix"), dpo_cli("token_budget"), dpo_cli(*PARTS)]
        title = f"{asked.shape} on {asked.backend}, {language}, {asked.pairs} pairs a step, 2 steps"
        work = work_of(asked, folder, language, rows)
        found.append(report(title, some, alternate(some, work, asked.repeat), work))
    return found


def quick(asked: argparse.Namespace, folder: Path) -> int:
    """Equality with TRL, and how many tokens are computed, on a tiny model; the last line is JSON."""
    rows = [row for name in LANGUAGES for row in lengths.sample(lengths.load(name), 4)]
    asked.shape = "tiny"
    work = work_of(asked, folder, "quick", rows)
    whole = ("reference_cache", "token_budget")
    alone, together = dpo_cli(*whole), dpo_cli(*whole, micro_batch=4)
    some = [stock(1), stock(4), DEFAULTS, alone, together, dpo_cli(), dpo_cli("shared_prefix"), dpo_cli(*PARTS)]
    results = alternate(some, work, 1)
    checked = gate(results)
    for one in some:
        print(f"{one.label:<66} loss {checked.losses[one.key]:.0e}   gradient {checked.gradients[one.key]:.0e}")
    problems = list(checked.failing)
    for one, size in ((alone, 1), (together, 4)):
        # Policy and reference, each once: what ran is what the lengths say.
        wanted = 2 * lengths.padded_tokens(rows, size), 2 * lengths.shared_tokens(rows)
        if results[one.key][0].seen != wanted:
            problems.append(f"{results[one.key][0].seen} tokens ran at micro-batch {size}, {wanted} were to")
    own = [key for key in results if key.startswith("dpo_cli")]
    figures = {
        "max_loss_difference": max(checked.losses[key] for key in own),
        "max_gradient_relative_error": max(checked.gradients[key] for key in own),
        "token_ratio": {str(size): round(token_ratio(size), 3) for size in (1, 4)},
    }
    print(json.dumps(figures))
    if problems:
        print(f"NOT EQUAL: {', '.join(problems)}", file=sys.stderr)
    return 1 if problems else 0


def token_ratio(micro_batch: int) -> float:
    """Tokens of padded rows over those that dpo-cli computes, for all pairs of both languages at real lengths."""
    padded = shared = 0
    for language in LANGUAGES:
        rows = lengths.load(language)
        rows = rows[: len(rows) // micro_batch * micro_batch]
        padded += lengths.padded_tokens(rows, micro_batch)
        shared += lengths.shared_tokens(rows)
    return padded / shared


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    from dpo_cli.machine import device_name, versions

    facts = {"date": time.strftime("%Y-%m-%d"), "device": device_name("train"), "cores": os.cpu_count()}
    return {**facts, "load": os.getloadavg(), "asked": vars(asked), "versions": versions()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="equality and token counts only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("hf", "unsloth"), default="hf", help="who loads the models")
    parser.add_argument("--shape", choices=contenders.SHAPES, help="default: bench, on a GPU 1.7B")
    parser.add_argument("--pairs", type=int, help="of an optimizer step, 4 or more; default: 4, on a GPU 8")
    parser.add_argument("--repeat", type=int, default=2, help="measurements of each contender")
    parser.add_argument("--json", type=Path, help="write everything there")
    asked = parser.parse_args()
    on_gpu = asked.device == "cuda"
    asked.pairs = asked.pairs or (8 if on_gpu else 4)
    asked.shape = asked.shape or ("1.7B" if on_gpu else "bench")

    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/datasets"
        from dpo_cli import backends, environment

        environment.prepare_environment("train")
        backends.import_backend(backends.Backend(asked.backend, "the benchmark"))
        import torch

        torch.set_num_threads(1)
        if asked.quick:
            return quick(asked, Path(name))
        tables = steps(asked, Path(name))
    if asked.json:
        found = {"machine": machine(asked), "steps": tables}
        asked.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return 0 if all(one["passed"] for one in tables) else 1


if __name__ == "__main__":
    sys.exit(main())
