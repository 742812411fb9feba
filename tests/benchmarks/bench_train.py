"""What a DPO step costs: dpo-cli beside plain torch and TRL, on pairs of real lengths, the same numbers coming out.

    python tests/benchmarks/bench_train.py                      all sections, about 13 minutes on one core
    python tests/benchmarks/bench_train.py growth sweep         some of them
    python tests/benchmarks/bench_train.py --quick              equality and token counts, half a minute, no times
    python tests/benchmarks/bench_train.py --device cuda        on a GPU: real shapes, NF4, peak memory, MFU

Contenders train in turn (A B C C B A) on the same pairs from the same adapter, with one OpenMP thread; medians count,
and CPU seconds where there is no GPU. Ratios are printed only where losses and gradients equal TRL's: to 1e-5, or to
twice what TRL's own micro-batches of 1 and 4 differ by, since a sum of 400 log-probabilities of -9 rounds at 2e-4
(and to 1e-4 for the one written by hand).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# All of it before torch, datasets and transformers are imported.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import contenders  # noqa: E402
import lengths  # noqa: E402
from contenders import NOTHING, Contender, Measured, Work, dpo_cli, measure, stock, trl_defaults, tuned  # noqa: E402

LANGUAGES = ("en", "zh")
TOLERANCE = 1e-5
BY_HAND = 1e-4  # an implementation of its own adds up log-probabilities in another order
# The bars of the CPU, as (what, faster, slower, least ratio).
BARS = (
    ("TRL at micro-batch 1, same settings", "dpo_cli_without_reference_cache", "stock_1", 1.4),
    ("TRL at micro-batch 4, same settings", "dpo_cli_without_reference_cache", "stock_4", 2.2),
    ("TRL defaults, reference cache warm", "dpo_cli_warm", "trl_defaults", 2.8),
)
# Of bf16 with dense matrices, in FLOP/s, from NVIDIA's data sheets; by a part of the card's name.
PEAKS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12,
    "4090": 165e12, "4080": 97.5e12, "5090": 209e12, "5080": 113e12,
}  # fmt: skip

Results = dict[str, list[Measured]]


# ------------------------------------------------------------------------------------------------------------ measuring


def alternate(some: Sequence[Contender], work: Work, repeat: int) -> Results:
    """`repeat` measurements of each: A B C, C B A, A B C, …; one that runs out of memory is left out."""
    import torch

    results: Results = {one.key: [] for one in some}
    for turn in range(repeat):
        for one in some if turn % 2 == 0 else reversed(some):
            if turn and not results[one.key]:
                continue
            try:
                results[one.key].append(measure(one, work))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            progress(f"{one.label}: {'out of memory' if not results[one.key] else ''}")
    return {key: some for key, some in results.items() if some}


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<79.79}", end="", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Gate:
    """By contender, how far its losses (absolute) and its first gradient (relative, 2-norm) are from TRL's."""

    losses: dict[str, float]
    gradients: dict[str, float]
    noise: tuple[float, float]  # TRL at micro-batch 4 against TRL at micro-batch 1, where both took part

    @property
    def limits(self) -> list[float]:
        return [max(TOLERANCE, 2 * noise) for noise in self.noise]

    @property
    def failing(self) -> list[str]:
        """Whose numbers are further off than allowed, or NaN."""
        found = set()
        for errors, limit in zip((self.losses, self.gradients), self.limits, strict=True):
            allowed = {key: max(BY_HAND, limit) if key.startswith("by_hand") else limit for key in errors}
            found |= {key for key, error in errors.items() if not error <= allowed[key]}
        return sorted(found)

    @property
    def passed(self) -> bool:
        """No figure of dpo-cli's is worth anything otherwise; a rival that fails only has none of its own."""
        return not any(key.startswith("dpo_cli") for key in self.failing)


def gate(results: Results) -> Gate:
    """Compare every contender's steps with TRL's at micro-batch 1 (`stock_1`)."""
    truth = results["stock_1"][0]
    size = truth.gradient.norm()
    losses, gradients = {}, {}
    for key, every in results.items():
        pairs = [zip(one.losses, truth.losses, strict=True) for one in every]
        losses[key] = worst(abs(mine - its) for one in pairs for mine, its in one)
        gradients[key] = worst(float((one.gradient - truth.gradient).norm() / size) for one in every)
    return Gate(losses, gradients, (losses.get("stock_4", 0.0), gradients.get("stock_4", 0.0)))


def worst(errors: Iterable[float]) -> float:
    """The largest; infinite with a NaN among them, which max() would pass over."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def seconds(some: Sequence[Measured], on_gpu: bool) -> float:
    """What counts of the steps: the clock on a GPU, CPU seconds elsewhere, where others work as well."""
    return statistics.median(one.wall if on_gpu else one.cpu for one in some)


def report(title: str, some: Sequence[Contender], results: Results, work: Work) -> dict[str, Any]:
    """Print a table, with ratios if the gate passes; the same as JSON."""
    on_gpu, pairs = work.device == "cuda", len(work.rows)
    checked = gate(results)
    base = "trl_defaults" if "trl_defaults" in results else "stock_1"
    found: dict[str, Any] = {
        "title": title,
        "pairs": pairs,
        "pairs_a_step": work.step_pairs,
        "loss_differences": checked.losses,
        "gradient_relative_errors": checked.gradients,
        "noise": checked.noise,
        "failing": checked.failing,
        "passed": checked.passed,
        "contenders": {},
    }
    clock = "seconds" if on_gpu else "CPU s"
    print(
        f"\n{title}\n{'':<66}{clock + ' a pair':>15}{'min':>7}{'max':>7}{'wall':>7}{'ratio':>7}{'loss':>9}{'grad':>9}"
    )
    for one in some:
        if one.key not in results:
            print(f"{one.label:<66}  out of memory")
            continue
        every = results[one.key]
        each = sorted((made.wall if on_gpu else made.cpu) / pairs for made in every)
        ratio = seconds(results[base], on_gpu) / seconds(every, on_gpu)
        row: dict[str, Any] = {
            "label": one.label,
            "seconds_a_pair": statistics.median(each),
            "min": each[0],
            "max": each[-1],
            "wall_a_pair": statistics.median(made.wall for made in every) / pairs,
            "reference_cpu_s_a_pair": max(made.reference_cpu for made in every) / pairs,
            "token_budget": every[0].token_budget,
            "losses": every[0].losses,
        }
        if checked.passed and one.key not in checked.failing:
            row["ratio"] = ratio
        if on_gpu:
            row |= gpu_figures(one, every, work)
        found["contenders"][one.key] = row
        print(
            f"{one.label:<66}{row['seconds_a_pair']:>15.3f}{each[0]:>7.3f}{each[-1]:>7.3f}{row['wall_a_pair']:>7.3f}"
            + (f"{ratio:>7.2f}" if "ratio" in row else f"{'-':>7}")
            + f"{checked.losses[one.key]:>9.0e}{checked.gradients[one.key]:>9.0e}"
            + (f"  {row['peak_gib']:.2f} GiB ({row['predicted_gib']:.2f}), MFU {row['mfu']}" if on_gpu else "")
        )
    print(
        f"ratio: of pairs a second, to {next(one.label for one in some if one.key == base)}; loss, grad: difference "
        f"from TRL at micro-batch 1; allowed {', '.join(f'{limit:.1e}' for limit in checked.limits)}"
    )
    before = {key: row["reference_cpu_s_a_pair"] for key, row in found["contenders"].items()}
    for key in [key for key, spent in before.items() if spent]:
        label = found["contenders"][key]["label"]
        print(f"  before its first step, not counted above: {before[key]:.3f} CPU s a pair ({label})")
    if checked.failing:
        print(f"{'' if checked.passed else 'NO RATIOS: '}the numbers of {', '.join(checked.failing)} are not TRL's")
    return found


def bars(results: Results) -> list[dict[str, Any]]:
    """The goals of the CPU beside what came out; those whose contenders took part."""
    found = []
    for what, faster, slower, goal in BARS:
        if faster in results and slower in results:
            ratio = seconds(results[slower], False) / seconds(results[faster], False)
            found.append({"against": what, "ratio": ratio, "goal": goal, "met": ratio >= goal})
            print(f"  {what:<40} {ratio:5.2f}   goal {goal}   {'met' if ratio >= goal else 'MISSED'}")
    return found


def gpu_figures(one: Contender, every: Sequence[Measured], work: Work) -> dict[str, Any]:
    """Peak memory, seen and predicted, and the share of the card's peak that goes into what the steps need.

    Needed are 4N FLOPs for each token of the policy, prompts once, and 6H for each answer token; 2N and 2H for the
    reference where a step computes it. N: weights of the layers' linear modules, H: of the head; they are frozen, so
    the backward is of activations only, and what is computed twice is not needed.
    """
    import torch
    from dpo_cli.train.memory import predict
    from dpo_cli.train.shape import Shape
    from dpo_cli.train.token_budget import groups
    from transformers import AutoConfig

    shape = Shape.of(AutoConfig.from_pretrained(work.model))
    tokens = sum(row.shared for row in work.rows)
    scored = sum(row.chosen + row.rejected for row in work.rows)
    kept = one.key.startswith("tuned") or (one.key.startswith("dpo_cli") and "reference_cache" not in one.key)
    online = 0 if kept else 1
    head = shape.hidden * shape.vocabulary
    needed = (4 + 2 * online) * shape.linear * tokens + (6 + 2 * online) * head * scored
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    spent = statistics.median(made.wall for made in every)

    shared, top = any(made.seen[1] for made in every), max(row.row for row in work.rows)
    if every[0].token_budget and shared:
        parts = groups([row.shared for row in work.rows], every[0].token_budget)
        at_once = max((part for part in parts), key=lambda part: sum(work.rows[index].shared for index in part))
        largest = sum(work.rows[index].shared for index in at_once)
    elif every[0].token_budget:
        largest = every[0].token_budget
    else:
        largest = 2 * one.micro_batch * top
    further = sum(row.prompt + row.rejected for row in work.rows)
    memory = predict(
        shape,
        precision="nf4",
        rank=work.rank,
        targets=contenders.TARGETS,
        optimizer="adamw_torch_fused",
        checkpointing=one.checkpointing,
        tokens=largest,
        scored=min(largest, scored),
        row=0 if shared else top,
        again=further / tokens if shared else 0.0,
        unsloth=work.backend == "unsloth",
    )
    return {
        "peak_gib": max(made.peak for made in every) / 2**30,
        # torch counts what it allocates itself; the driver's share is outside of that.
        "predicted_gib": (memory.total - memory.context - memory.margin) / 2**30,
        "mfu": round(needed / spent / peak, 3) if peak else None,
    }


# ------------------------------------------------------------------------------------------------------------- sections


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the models and runs of one call lie, and what was asked for."""

    folder: Path
    asked: argparse.Namespace

    def work(self, name: str, shape: str, rows: Sequence[lengths.Lengths], step_pairs: int, **more: Any) -> Work:
        device = self.asked.device
        model = contenders.make_model(self.folder / f"model-{shape}", contenders.SHAPES[shape], device)
        warm_up = 2 if device == "cuda" else 0
        common: dict[str, Any] = {"device": device, "backend": self.asked.backend, "warm_up": warm_up}
        common["token_budget"] = self.asked.token_budget
        work = Work(rows, step_pairs, model, self.folder / "runs" / name.replace(" ", "_"), **(common | more))
        return contenders.write_pairs(work)

    # ------------------------------------------------------------------------------------------- (a) steps, the bars

    def steps(self) -> list[dict[str, Any]]:
        """Two optimizer steps on a sample of real lengths, by language; the parts of dpo-cli one by one in English."""
        found = []
        shapes = self.asked.shapes or (["1.7B"] if self.asked.device == "cuda" else ["bench"])
        for shape in shapes:
            for language in LANGUAGES if self.asked.device == "cpu" else LANGUAGES[:1]:
                found.append(self._steps(shape, language))
        return found

    def _steps(self, shape: str, language: str) -> dict[str, Any]:
        pairs = self.asked.pairs
        rows = lengths.sample(lengths.load(language), 2 * pairs, min(4, pairs))
        work = self.work(f"steps {shape} {language}", shape, rows, pairs)
        cold = dpo_cli("dpo-cli, one epoch (reference in each step)", reference_cache="off")
        if self.asked.backend == "unsloth":
            own = [trl_defaults(), stock(1), cold, dpo_cli(), dpo_cli(shared_prefix="off")]
            some = [dataclasses.replace(one, label="Unsloth + " + one.label) for one in own]
        else:
            sizes = [size for size in (4, 1) if size <= pairs]
            some = [trl_defaults(), *map(stock, sizes), cold, dpo_cli()]
            if language == LANGUAGES[0]:
                some += [self._best(work), contenders.by_hand()]
                some += [dpo_cli(**{part: "off"}) for part in ("shared_prefix", "token_budget")]
                some += [dpo_cli("dpo-cli, every part off", **NOTHING)]
        results = alternate(some, work, self.asked.repeat)
        found = report(f"Steps: {shape}, {language}, {pairs} pairs a step, 2 steps", some, results, work)
        if self.asked.device == "cpu" and found["passed"]:
            found["bars"] = bars(results)
        return found

    def _best(self, work: Work) -> Contender:
        """TRL tuned by hand, with the micro-batch that is fastest here, of those that divide a step."""
        # In a folder of its own: TRL would find its reference there in the table's measurement, and not count it.
        work = contenders.write_pairs(dataclasses.replace(work, folder=work.folder.with_name("search")))
        tried = [tuned(size) for size in (1, 2, 4, 8) if work.step_pairs % size == 0]
        results = alternate(tried, work, 1)
        return min(
            (one for one in tried if one.key in results),
            key=lambda one: seconds(results[one.key], work.device == "cuda"),
        )

    # ---------------------------------------------------------------------------------------------------- (b) growth

    def growth(self) -> list[dict[str, Any]]:
        """Seconds as prompt, sequence and step grow: TRL and dpo-cli same settings, one layer of `bench`."""

        def alike(length: int, share: float, count: int) -> list[lengths.Lengths]:
            prompt = round(length * share)
            return [lengths.Lengths(prompt, length - prompt, length - prompt, 0)] * count

        zh = lengths.load("zh")
        axes: dict[str, dict[float, tuple[Sequence[lengths.Lengths], int]]] = {
            "prompt share, of 1024 tokens": {share: (alike(1024, share, 2), 2) for share in (0.2, 0.4, 0.6, 0.8, 0.9)},
            "tokens of a text, half of them prompt": {
                length: (alike(length, 0.5, 1), 1) for length in (256, 512, 1024, 2048, 4096)
            },
            "pairs a step, real lengths (zh)": {count: (lengths.sample(zh, count), count) for count in (4, 16, 64)},
        }
        found = []
        shape = (self.asked.shapes or ["layer"])[0]
        for axis, points in axes.items():
            print(f"\nGrowth: {axis}")
            row: dict[str, Any] = {"axis": axis, "points": []}
            for x, (rows, step) in points.items():
                work = self.work(f"growth {axis} {x}", shape, rows, step, max_length=4096)
                some = [stock(1), dpo_cli("dpo-cli", reference_cache="off")]
                some += [stock(4)] if 4 <= step <= 16 else []  # at 64 pairs it alone would take a minute
                results = alternate(some, work, min(2, self.asked.repeat))
                checked = gate(results)
                point: dict[str, Any] = {"x": x, "failing": checked.failing}
                for key, every in results.items():
                    point[key] = seconds(every, work.device == "cuda") / len(rows)
                ours = point["dpo_cli_without_reference_cache"]
                ratios = {key: point[key] / ours for key in ("stock_1", "stock_4") if key in point}
                if checked.passed:
                    point["ratios"] = ratios
                print(
                    f"  {x:>6}  dpo-cli {ours:.3f} s a pair, TRL {point['stock_1']:.3f}: "
                    + (", ".join(f"{ratio:.2f}" for ratio in ratios.values()) if "ratios" in point else "NOT EQUAL")
                    + (" (micro-batch 1, 4)" if len(ratios) == 2 else "")
                )
                row["points"].append(point)
            found.append(row)
        return found

    # ----------------------------------------------------------------------------------------------------- (c) sweep

    def sweep(self) -> dict[str, Any]:
        """Five runs on the same pairs, one thing changed in each: reference rows that were computed in all of them."""
        rows = lengths.sample(lengths.load("zh"), 32)
        base = self.work("sweep", "tiny", rows, 4)
        runs = {
            "as it is": base,
            "learning rate": dataclasses.replace(base, learning_rate=3e-4),
            "seed": dataclasses.replace(base, seed=1),
            "rank": dataclasses.replace(base, rank=8),
            "beta": dataclasses.replace(base, beta=0.3),
        }
        counted: dict[str, list[int]] = {}
        for name, one in {"TRL, precompute_ref_log_probs": tuned(1), "dpo-cli": dpo_cli()}.items():
            counted[name] = [contenders.reference_pairs(one, work) for work in runs.values()]
        print(f"\nSweep: reference rows computed, {len(rows)} pairs, runs: {', '.join(runs)}")
        for name, each in counted.items():
            print(f"  {name:<40} {' + '.join(map(str, each))} = {sum(each)}")
        return {"pairs": len(rows), "runs": list(runs), "reference_rows": counted}

    # ---------------------------------------------------------------------------------------------------- (d) memory

    def memory(self) -> dict[str, Any]:
        """Bytes kept for the backward, at their most, with the same pairs at once: TRL and dpo-cli."""
        rows = lengths.sample(lengths.load("en"), 4)
        work = self.work("memory", "small", rows, 4, warm_up=0)
        engine = {"reference_cache": "off", "token_budget": "off"}
        some = {
            1: (stock(1), dpo_cli("", 1, **engine)),
            4: (stock(4), dpo_cli("", 4, **engine)),
        }
        found: dict[str, Any] = {}
        print("\nMemory: activations kept for the backward, at their most, MiB")
        for size, pair in some.items():
            peaks = []
            for one in pair:
                with contenders.kept_for_backward() as kept:
                    measure(one, work)
                peaks.append(kept.peak / 2**20)
            found[str(size)] = {"trl": peaks[0], "dpo_cli": peaks[1], "ratio": peaks[0] / peaks[1]}
            print(f"  {size} pairs at once   TRL {peaks[0]:7.1f}   dpo-cli {peaks[1]:7.1f}   {peaks[0] / peaks[1]:.2f}")
        return found

    # -------------------------------------------------------------------------------------------------- (e) overhead

    def overhead(self) -> dict[str, Any]:
        """Whole `dpo-cli train` with every part switched off, beside a bare TRL script: what a step costs more."""
        rows = [lengths.Lengths(96, 96, 96, 0)] * 48
        work = self.work("overhead", "small", rows, 4, warm_up=0)
        each: dict[str, list[float]] = {"TRL script": [], "dpo-cli, every part off": []}
        for turn in range(2 * self.asked.repeat):
            both = [contenders.script_steps, contenders.command_steps]
            for go in both if turn % 2 == 0 else reversed(both):
                name = "TRL script" if go is contenders.script_steps else "dpo-cli, every part off"
                each[name] += go(work)
        script, own = (statistics.median(some) for some in each.values())
        print(f"\nOverhead: median CPU seconds of {len(each['TRL script'])} steps each")
        for name, some in each.items():
            print(f"  {name:<40} {statistics.median(some):.4f}   min {min(some):.4f}   max {max(some):.4f}")
        share = own / script - 1
        print(f"  more: {share:+.1%}   goal 2 %   {'met' if share <= 0.02 else 'MISSED'}")
        return {"steps": each, "more": share, "goal": 0.02, "met": share <= 0.02}

    # --------------------------------------------------------------------------------------------------------- quick

    def quick(self) -> int:
        """Equality with TRL, and how many tokens are computed, on a tiny model; the last line is JSON."""
        rows = [row for name in LANGUAGES for row in lengths.sample(lengths.load(name), 4)]
        work = self.work("quick", "tiny", rows, 4)
        parts = {"reference_cache": "off", "token_budget": "off"}
        alone, together = dpo_cli("", 1, **parts), dpo_cli("", 4, **parts)
        others = [dpo_cli(), dpo_cli(shared_prefix="off"), dpo_cli(reference_cache="off"), dpo_cli(**NOTHING)]
        some = [stock(1), stock(4), trl_defaults(), contenders.by_hand(), alone, together, *others]
        results = alternate(some, work, 1)
        checked = gate(results)
        for one in some:
            print(f"{one.label:<66} loss {checked.losses[one.key]:.0e}   gradient {checked.gradients[one.key]:.0e}")
        ok = not checked.failing
        for one, size in ((alone, 1), (together, 4)):
            # Policy and reference, each once: what ran is what the lengths say.
            wanted = 2 * lengths.padded_tokens(rows, size), 2 * lengths.shared_tokens(rows)
            if results[one.key][0].seen != wanted:
                print(f"micro-batch {size}: {results[one.key][0].seen} tokens ran, {wanted} were to")
                ok = False
        own = [key for key in results if key.startswith("dpo_cli")]
        print(
            json.dumps(
                {
                    "max_loss_difference": max(checked.losses[key] for key in own),
                    "max_gradient_relative_error": max(checked.gradients[key] for key in own),
                    "token_ratio": {str(size): round(token_ratio(size), 3) for size in (1, 4)},
                }
            )
        )
        if not ok:
            print(f"NOT EQUAL: {', '.join(checked.failing) or 'token counts'}", file=sys.stderr)
        return 0 if ok else 1


def token_ratio(micro_batch: int) -> float:
    """Tokens of padded rows over those that dpo-cli computes, for all pairs of both languages at real lengths."""
    padded = shared = 0
    for language in LANGUAGES:
        rows = lengths.load(language)
        rows = rows[: len(rows) // micro_batch * micro_batch]
        padded += lengths.padded_tokens(rows, micro_batch)
        shared += lengths.shared_tokens(rows)
    return padded / shared


# ----------------------------------------------------------------------------------------------------------- one call


def budget(text: str) -> int | str:
    return text if text == "auto" else int(text)


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    import torch
    from dpo_cli.machine import versions

    cpu = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if "model name" in line]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": [round(one, 2) for one in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if asked.device == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions(),
    }


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "steps": Bench.steps, "growth": Bench.growth, "sweep": Bench.sweep, "memory": Bench.memory,
    "overhead": Bench.overhead,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all, on a GPU steps")
    parser.add_argument("--quick", action="store_true", help="equality and token counts only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("hf", "unsloth"), default="hf", help="who loads the models")
    parser.add_argument("--shapes", nargs="*", choices=contenders.SHAPES, help="default: bench, on a GPU 1.7B")
    parser.add_argument("--pairs", type=int, help="of an optimizer step; default: 4, on a GPU 8")
    parser.add_argument("--repeat", type=int, default=2, help="measurements of each contender")
    parser.add_argument("--token-budget", type=budget, default="auto", help="of dpo-cli; default: what it takes itself")
    parser.add_argument("--json", type=Path, help="write everything there")
    asked = parser.parse_args()
    asked.pairs = asked.pairs or (8 if asked.device == "cuda" else 4)
    strange = sorted(set(asked.sections) - SECTIONS.keys())
    if strange:
        parser.error(f"there is no section {strange[0]}; there are {', '.join(SECTIONS)}")

    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/datasets"
        from dpo_cli import backends, environment

        environment.prepare_environment("train")
        backends.import_backend(backends.Backend(asked.backend, "the benchmark"))
        import torch

        torch.set_num_threads(1)
        bench = Bench(Path(name), asked)
        if asked.quick:
            return bench.quick()
        found: dict[str, Any] = {"machine": machine(asked)}
        print(json.dumps(found["machine"]))
        for section in asked.sections or (["steps"] if asked.device == "cuda" else SECTIONS):
            found[section] = SECTIONS[section](bench)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")
    # Unsloth patches TRL for a whole process, so its contenders get one of their own.
    if asked.device == "cuda" and asked.backend == "hf" and find_spec("unsloth"):
        again = [sys.executable, __file__, *sys.argv[1:], "--backend", "unsloth"]
        if asked.json:
            again += ["--json", str(asked.json.with_suffix(".unsloth.json"))]
        return subprocess.run(again, check=False).returncode
    return 1 if not all(one["passed"] for one in found.get("steps", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
