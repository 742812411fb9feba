"""What `prepare` costs at UltraFeedback's size: CPU seconds, prompts per CPU-second and peak memory, case by case.

    python tests/benchmarks/bench_prepare.py [--prompts 64000] [--folder DIR] [--case NAME]

Writes a seeded file in UltraFeedback's layout (4 completions a prompt, English and Chinese, with duplicates, N/A
ratings, refusals and short lists in it) as JSONL and as Parquet, and runs each case in a process of its own. Goals on
one core: all of `prepare` with exact and near duplicates and without the token filter in 40 CPU-seconds and 600 MB;
reading, scoring and pairing alone at 15,000 prompts a CPU-second, in memory that doesn't grow with the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

GOAL_SECONDS, GOAL_MEGABYTES, GOAL_RATE = 40, 600, 15_000


def rows(prompts: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows in UltraFeedback's layout, about 14 kB of JSON each, as the real ones are."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    english = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]
    han = [chr(rng.randint(0x4E00, 0x62FF)) for _ in range(4000)]

    def text(chinese: bool, low: int, high: int) -> str:
        words = (
            rng.choices(han, k=2 * rng.randint(low, high))
            if chinese
            else rng.choices(english, k=rng.randint(low, high))
        )
        joint = "" if chinese else " "
        stop = "。" if chinese else ". "
        return stop.join(joint.join(words[start : start + 14]) for start in range(0, len(words), 14)) + stop.strip()

    earlier: list[str] = []
    for _ in range(prompts):
        chinese = rng.random() < 0.3
        prompt = text(chinese, 15, 120)
        if earlier and (draw := rng.random()) < 0.05:
            prompt = rng.choice(earlier)
            prompt = prompt + "!!" if draw < 0.02 else prompt[: len(prompt) // 2] + "x" + prompt[len(prompt) // 2 :]
        elif len(earlier) < 2000:
            earlier.append(prompt)
        completions = []
        for number in range(4 if rng.random() > 0.003 else rng.randint(0, 3)):
            ratings = [str(rng.randint(1, 5)) for _ in range(4)]
            ratings[1] = "N/A" if rng.random() < 0.04 else ratings[1]
            answer = text(chinese, 60, 320)
            if rng.random() < 0.03:
                answer = (
                    "很抱歉，我无法回答这个问题。" if chinese else "I'm sorry, but I cannot help with that request."
                )
            why = text(chinese, 20, 60)
            names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
            annotations: dict[str, Any] = {
                name: {"Rating": value, "Rationale": why} for name, value in zip(names, ratings, strict=True)
            }
            for name in ("helpfulness", "truthfulness"):
                annotations[name] |= {"Rationale For Rating": why, "Type": ["1"]}
            completions.append({
                "annotations": annotations, "critique": text(chinese, 40, 120), "custom_system_prompt": why[:80],
                "fine-grained_score": 3.0, "model": f"model-{number}", "overall_score": 6.0, "principle": "helpfulness",
                "response": answer,
            })  # fmt: skip
        yield {
            "source": "evol_instruct", "instruction": prompt, "models": [c["model"] for c in completions],
            "completions": completions, "correct_answers": ["None"], "incorrect_answers": ["None"],
        }  # fmt: skip


def write_files(folder: Path, prompts: int) -> None:
    """`{prompts}.jsonl` and `{prompts}.parquet` in `folder`, unless they are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines, table = folder / f"{prompts}.jsonl", folder / f"{prompts}.parquet"
    if table.exists():
        return
    writer = None
    batch = []
    with lines.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows(prompts), 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            batch.append(row)
            if len(batch) == 1000 or number == prompts:
                part = pa.Table.from_pylist(batch, schema=writer.schema if writer else None)
                writer = writer or pq.ParquetWriter(table, part.schema)
                writer.write_table(part)
                batch = []
    if writer:
        writer.close()


def recipe(path: Path) -> Any:
    from dpo_cli.recipe import Recipe

    values = {
        "name": "bench", "model": {"id": "unused"},
        "data": {
            "sources": [{"id": str(path), "layout": "ultrafeedback"}], "total": None, "languages": None,
            "filters": {"too_long": False},
        },
    }  # fmt: skip
    return Recipe.model_validate(values)


def prepare_all(path: Path) -> int:
    """The whole stage; returns how many prompts came in."""
    from dpo_cli.prepare.pipeline import prepare

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        report = prepare(recipe(path), Path(folder), quiet=True).report
    assert "torch" not in sys.modules and "transformers" not in sys.modules, "something heavy was imported"
    print(report["pairs"], report["duplicates"], file=sys.stderr)
    return int(sum(one["in"] for one in report["sources"].values()))


def score_and_pair(path: Path) -> int:
    """Reading, scoring and pairing alone."""
    from dpo_cli.prepare import scoring
    from dpo_cli.prepare.feed import Broken
    from dpo_cli.prepare.read import look

    made, count = recipe(path), 0
    for item in look(made, 0).sets():
        count += 1
        if not isinstance(item, Broken) and len(item.candidates) > 1:
            scoring.pick(item, made.data.pairs, 0, count)
    return count


CASES = {
    "prepare, jsonl": (prepare_all, "jsonl"),
    "prepare, parquet": (prepare_all, "parquet"),
    "score and pair, jsonl": (score_and_pair, "jsonl"),
    "score and pair, parquet": (score_and_pair, "parquet"),
}


def peak_megabytes() -> float:
    """Of this process alone; getrusage would count the parent's as well, which a child starts from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(name: str, folder: Path, prompts: int) -> None:
    work, suffix = CASES[name]
    began = time.process_time()
    count = work(folder / f"{prompts}.{suffix}")
    seconds = time.process_time() - began
    megabytes = peak_megabytes()
    rate = f"{count / seconds:>8,.0f} prompts/CPU s"
    print(f"{name:24} {count:>7,} prompts {seconds:6.1f} CPU s {rate} {megabytes:6.0f} MB peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64_000)
    parser.add_argument("--folder", type=Path, help="where the generated files are kept; default: a temporary folder")
    parser.add_argument("--case", choices=CASES, help="run this case, in this process")
    asked = parser.parse_args()
    if asked.case:
        run_case(asked.case, asked.folder, asked.prompts)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, asked.prompts)
        for name in CASES:
            again = [sys.executable, __file__, "--prompts", str(asked.prompts), "--folder", str(folder), "--case", name]
            subprocess.run(again, check=True)
    print(f"goals: prepare {GOAL_SECONDS} CPU s and {GOAL_MEGABYTES} MB; score and pair {GOAL_RATE:,} prompts/CPU s")


if __name__ == "__main__":
    main()
