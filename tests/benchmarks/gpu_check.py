"""`make gpu-check`: what is claimed about a 16 GB card, asked of the NVIDIA GPU at hand, offline.

Speed, memory, resume and merge don't depend on what the weights are. So a Qwen3 of a real shape is made with random
ones, in 16-bit and in NF4, with English and Chinese pairs of real lengths, and goes through the real commands with the
real recipe under `engine.memory_limit: 16`. Each command is a process of its own with a time limit: one that crashes
loses its own question. What is worth most is asked first. Answers go to OUT/answers.jsonl and OUT/table.md as they
come, and the same command goes on after them; models and runs lie in WORK.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contenders

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RECIPE = REPOSITORY / "recipes" / "ultrafeedback_zh_en.yaml"
GIB = 2**30
# The questions, with the most seconds that one may take (a guess until one has run).
QUESTIONS = {
    "environment": 90, "load": 240, "train": 420, "resume": 420, "evaluate": 240, "export": 420, "memory": 240,
    "speed": 560,
}  # fmt: skip
IN_16BIT = "model.layers.1.mlp"  # left so in the NF4 model, as the published 4-bit repositories do with some layers
# Between a resumed run and a whole one, of the largest margin. A CPU is exact; on a GPU the backward of attention adds
# up in any order. A resume that lost its adapter is off by 1.
SAME_MARGINS = {"cuda": 0.05, "cpu": 0.0}
PLAN_TOLERANCE = 0.10
CONTEXT_GIB = 0.6  # the driver's, which PyTorch's peak leaves out: `memory.CUDA_CONTEXT`


@dataclass(frozen=True)
class Scale:
    """How much is trained on; a checkpoint at each `save`, killed at the first, real lengths divided by `shorter`."""

    steps: int = 20
    pairs: int = 24  # a step's, as in the recipe
    save: int = 5
    max_length: int = 1024  # the recipe's
    memory_at: tuple[int, ...] = (1024, 2048, 512)
    shorter: int = 1


TINY = Scale(steps=6, pairs=4, save=2, max_length=128, memory_at=(128,), shorter=8)


class Failed(Exception):
    """A question that got no answer."""


@dataclass
class Ran:
    """A finished command: its exit code, and what it printed."""

    code: int
    text: str

    @property
    def error(self) -> str:
        """The last line that names an error, else the last one."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception|Interrupt)\b", line)]
        return (named or lines or ["it printed nothing"])[-1][:300] + f" (exit code {self.code})"

    def worked(self) -> Ran:
        if self.code != 0:
            raise Failed(self.error)
        return self


@dataclass(frozen=True)
class Task:
    question: str
    shape: str = ""
    backend: str = ""
    length: int = 0  # max_length, where the question is asked at several

    def __str__(self) -> str:
        at = f"at {self.length}" if self.length else ""
        return " ".join(filter(None, (self.question, self.shape, self.backend, at)))


@dataclass
class GpuCheck:
    """One call. A method for each question returns its figures; `holds`, where given, says whether the claim does.

    Attributes:
        out, work: folders of the answers, and of models and runs.
        settings: of each dpo-cli command, as `--set` takes them.
    """

    out: Path
    work: Path
    device: str
    scale: Scale
    settings: Sequence[str]
    task: Task = Task("")

    # ---------------------------------------------------------------------------------------------------- questions

    def environment(self) -> dict[str, Any]:
        """What Triton's launcher needs, and what `dpo-cli doctor` says."""
        doctor = self.python("-m", "dpo_cli", "doctor")
        header = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
        return {"gcc": shutil.which("gcc"), "python_h": header, "printed": doctor.text, "holds": doctor.code == 0}

    def load(self) -> dict[str, Any]:
        """Make what is missing of data and model, and load its NF4 folder."""
        options = ["--make", self.task.shape, "--work", str(self.work), "--device", self.device]
        made = self.python(__file__, *options).worked()
        self.recipe.write_text(json.dumps(self.document(), indent=1), encoding="utf-8")
        return dict(json.loads(next(line for line in reversed(made.text.splitlines()) if line.startswith("{"))))

    def train(self) -> dict[str, Any]:
        """The recipe's settings for some steps, with the shared prefix, which is compared with the stock path there."""
        done = self.dpo_cli("train", "--fresh").worked()
        rows, taken = self.rows(), self.taken()
        remarks = re.findall(r"^ *((?:warning:|no (?:shared|token)).*|.*Warning:.*)", done.text, flags=re.MULTILINE)
        return {
            "steps": len(rows),
            "first_loss": rows[0]["loss"],
            "first_logps": rows[0]["logps/chosen"],  # alike on both backends, which the loss always is
            "last_loss": rows[-1]["loss"],
            "peak_gib": round(self.read("train/metrics.json")["peak_memory_bytes"] / GIB, 2),
            **taken,
            "remarks": remarks,
            "holds": len(rows) == self.scale.steps and taken["shared_prefix"],
        }

    def resume(self) -> dict[str, Any]:
        """SIGKILL and the same command again, against the run that was left alone."""
        checkpoint = self.folder("killed") / "train" / "checkpoints" / f"checkpoint-{self.scale.save}"
        shutil.rmtree(checkpoint.parent, ignore_errors=True)
        killed = self.dpo_cli("train", "--fresh", run="killed", kill_at=checkpoint / "files.json")
        if killed.code != -signal.SIGKILL:
            raise Failed(f"it ended before it could be killed: {killed.error}")
        resumed = self.dpo_cli("train", run="killed").worked()
        found = re.search(r"resumed from step (\d+)", resumed.text)
        whole, again = self.rows(), self.rows("killed")

        def apart(key: str) -> float:
            return max(abs(one[key] - other[key]) for one, other in zip(whole, again, strict=False))

        margins = apart("rewards/margins") / max(abs(row["rewards/margins"]) for row in whole)
        return {
            "resumed_from": int(found[1]) if found else None,
            "losses_apart": apart("loss"),
            "margins_apart_of_largest": margins,
            "may_be": SAME_MARGINS[self.device],
            "holds": found is not None and len(again) == len(whole) and margins <= SAME_MARGINS[self.device],
        }

    def evaluate(self) -> dict[str, Any]:
        """Held-out pairs and sampled answers of both models, on the weights as they were trained."""
        self.dpo_cli("eval", "--force", settings=["eval.prompts=32", "eval.max_new_tokens=64"]).worked()
        metrics = self.read("eval/metrics.json")
        kl, pairs = metrics["samples"]["kl"], metrics["pairs"]["reward_accuracy"]["n"]
        return {"pairs": pairs, "answers": 2 * kl["n"], "kl": kl["value"], "holds": math.isfinite(kl["value"])}

    def export(self) -> dict[str, Any]:
        """Merged into the 16-bit weights and as GGUF, each read back and compared."""
        done = self.dpo_cli("export", "--force", settings=["export.formats=[merged, gguf]"])
        if not (self.folder() / "export" / "verify.json").is_file():
            raise Failed(done.error)
        checks = {check["name"]: check for check in self.read("export/verify.json")}
        figures = ("merged.mean_kl", "merged.top1_agreement", "merged.effect", "gguf.mean_kl", "gguf.carried")
        broken = [name for name, check in checks.items() if not check["ok"]]
        return {**{name: checks[name]["value"] for name in figures}, "broken": broken, "holds": done.code == 0}

    def memory(self) -> dict[str, Any]:
        """`train --plan` against what was seen; the preflight tries the longest pairs, so that two steps will do."""
        length = self.task.length
        run, settings = f"at{length}", [f"model.max_length={length}", "train.max_steps=2"]
        plan = self.dpo_cli("train", "--plan", run=run, settings=settings)
        total = re.search(r"\btotal\W+([\d.]+)", plan.text)
        if total is None:
            raise Failed(plan.error)
        self.dpo_cli("train", "--fresh", run=run, settings=settings).worked()
        seen = self.read("train/metrics.json", run)["peak_memory_bytes"] / GIB
        seen += CONTEXT_GIB if self.device == "cuda" else 0
        ratio = float(total[1]) / seen
        time_needed = re.search(r"Time: .*", plan.text)
        return {
            "time": time_needed and time_needed[0],
            "predicted_gib": float(total[1]),
            "seen_gib": round(seen, 2),
            "predicted_over_seen": round(ratio, 3),
            **self.taken(run),
            "holds": abs(ratio - 1) <= PLAN_TOLERANCE,
        }

    def speed(self) -> dict[str, Any]:
        """The contenders of `bench_train.py`, whose own table is kept whole."""
        file = str(self.out / f"speed_{self.task.shape}_{self.task.backend}.json")
        options = ["--device", self.device, "--backend", self.task.backend, "--shape", self.task.shape, "--json", file]
        return {"json": file, "printed": self.python(str(HERE / "bench_train.py"), *options).worked().text}

    # ------------------------------------------------------------------------------------------------------- pieces

    def python(self, *arguments: str, kill_at: Path | None = None) -> Ran:
        """A process of our own; killed with its children where its time is up, or as soon as there is a file."""
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment["UNSLOTH_COMPILE_LOCATION"] = str(self.work / "unsloth_compiled")  # else in the working directory
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        end = time.monotonic() + QUESTIONS[self.task.question]
        with open(self.out / "log.txt", "a+", encoding="utf-8", errors="replace") as log:
            print("$", shlex.join(arguments), file=log, flush=True)
            start = log.tell()
            options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
            process = subprocess.Popen([sys.executable, *arguments], start_new_session=True, **options)
            try:
                while process.poll() is None and time.monotonic() < end and not (kill_at and kill_at.is_file()):
                    time.sleep(0.05)
            finally:
                late = process.poll() is None and not (kill_at and kill_at.is_file())
                if process.poll() is None:  # also at a Ctrl-C, which does not reach another session
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            log.seek(start)
            ran = Ran(code, log.read())
        if late:
            raise Failed(f"took longer than {QUESTIONS[self.task.question]} s; {ran.error}")
        return ran

    def dpo_cli(
        self, command: str, *options: str, run: str = "whole", settings: Sequence[str] = (), kill_at: Path | None = None
    ) -> Ran:
        named = [f"name={self.folder(run).name}", f"engine.backend={self.task.backend}", *settings, *self.settings]
        parts = [part for one in named for part in ("--set", one)]
        place = [str(self.recipe), "--runs-dir", str(self.work / "runs")]
        return self.python("-m", "dpo_cli", command, *place, *options, *parts, kill_at=kill_at)

    @property
    def recipe(self) -> Path:
        return self.work / f"{self.task.shape}.yaml"

    def document(self) -> dict[str, Any]:
        """The real recipe on what was made.

        Its learning rate would hardly move anything in so few steps, and a resume or a merge that loses the adapter
        could not be told from one that keeps it.
        """
        scale, model = self.scale, self.work / self.task.shape
        train = {"learning_rate": 2e-4, "gradient_accumulation_steps": scale.pairs, "logging_steps": 1}
        sources = [
            {"id": f"{self.work}/pairs_{language}_{scale.max_length}.jsonl", "layout": "pairs", "language": language}
            for language in ("en", "zh")
        ]
        return {
            "extends": str(RECIPE),
            "model": {"id": f"{model}/nf4", "merge_base": f"{model}/16bit", "max_length": scale.max_length},
            "data": {"sources": sources, "total": scale.steps * scale.pairs},
            "train": {**train, "max_steps": scale.steps, "save_steps": scale.save},
            "engine": {"memory_limit": 16},
        }

    def folder(self, run: str = "whole") -> Path:
        return self.work / "runs" / f"{self.task.shape}-{self.task.backend}-{run}"

    def read(self, file: str, run: str = "whole") -> Any:
        return json.loads((self.folder(run) / file).read_text(encoding="utf-8"))

    def taken(self, run: str = "whole") -> dict[str, Any]:
        """What a run took of the recipe's `engine`, as its manifest says."""
        return dict(self.read("manifest.json", run)["stages"]["train"]["engine"])

    def rows(self, run: str = "whole") -> list[dict[str, Any]]:
        """The log of a finished run, one row a step."""
        train = self.folder(run) / "train"
        if not (train / "metrics.json").is_file():
            raise Failed(f"there is no finished run {train.parent.name} to look at")
        return [json.loads(line) for line in (train / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- what is trained on


def make(work: Path, name: str, device: str, scale: Scale) -> dict[str, Any]:
    """Write pairs and, as `16bit` and `nf4`, the model of a shape; what is there stays. Runs in its own process."""
    import torch
    from contenders import random_qwen3
    from dpo_cli import smoke
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tiny = smoke.resolve("builtin:tiny-qwen3")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for language in ("en", "zh"):
        write_pairs(work / f"pairs_{language}_{scale.max_length}.jsonl", language, tokenizer, scale)
    shape = contenders.SHAPES[name]
    shape = replace(shape, vocabulary=max(shape.vocabulary, len(tokenizer)))
    half, quarter, whole = (work / name / part for part in ("16bit", "nf4", "whole"))
    on: Any = {"": 0 if device == "cuda" else "cpu"}
    if not whole.is_file():
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        random_qwen3(shape, device, torch.bfloat16, **special).save_pretrained(half)
        computed = torch.bfloat16 if device == "cuda" else torch.float32
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computed, llm_int8_skip_modules=["lm_head", IN_16BIT],
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(half, quantization_config=nf4, dtype=computed, device_map=on)
        model.save_pretrained(quarter)
        for folder in (half, quarter):
            for file in (*tiny.glob("tokenizer*"), tiny / "chat_template.jinja"):
                shutil.copy(file, folder)
        whole.touch()
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(quarter, device_map=on)
    layers = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    return {
        "nf4_gb": round(sum(file.stat().st_size for file in quarter.iterdir()) / 1e9, 2),
        "layers_in_4bit": layers,
        "seconds_to_load": round(time.monotonic() - began, 1),
        "holds": layers == 7 * shape.layers - 3,
    }


def write_pairs(path: Path, language: str, tokenizer: Any, scale: Scale) -> None:
    """Pairs of real lengths and no sense: twice as many as are trained on, for `prepare` drops what is too long.

    Chosen and rejected answers draw from two halves of the words, so that there is something to learn.
    """
    import lengths
    from tests.tools.smoke_data import SOURCES, texts

    if path.is_file():
        return
    known = " ".join(text for name in SOURCES for text in texts(name))
    words = sorted(set(re.findall(r"[一-鿿]{2}" if language == "zh" else r"[A-Za-z]{3,}", known)))
    between, rng = "" if language == "zh" else " ", random.Random(language)

    def text(some: Sequence[str], tokens: int) -> str:
        drawn = between.join(rng.choices(some, k=tokens))  # a word is a token or more
        offsets = tokenizer(drawn, return_offsets_mapping=True)["offset_mapping"]
        return drawn[: offsets[tokens - 1][1]]

    rows, real = [], lengths.load(language, max_length=10**6)
    for number in range(2 * scale.steps * scale.pairs):
        row = real[number % len(real)]
        # The chat template's own tokens, about 14 in the prompt and 2 after an answer, are among the counted ones.
        wanted = row.prompt - 14, row.chosen - 2, row.rejected - 2
        prompt, chosen, rejected = (max(tokens // scale.shorter, 8) for tokens in wanted)
        both = min(row.opening // scale.shorter, chosen - 1, rejected - 1)
        opening = text(words, both) + between if both else ""
        answers = [opening + text(words[0::2], chosen - both), opening + text(words[1::2], rejected - both)]
        rows.append({"prompt": text(words, prompt), "chosen": answers[0], "rejected": answers[1]})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- one call


def tasks(shapes: Sequence[str], scale: Scale) -> Iterator[Task]:
    """In the order of their worth: one shape on one backend through everything, then what the others may differ in.

    Unsloth is that backend where it is installed: the recipe then takes it. Eval and export never touch it.
    """
    (main, *others), (shape, *shapes) = ["unsloth", "hf"] if find_spec("unsloth") else ["hf"], shapes
    yield from (Task("environment"), Task("load", shape))
    yield from (Task(question, shape, main) for question in ("train", "resume", "evaluate", "export"))
    for other in others:
        yield from (Task("train", shape, other), Task("resume", shape, other))
    yield from (Task("memory", shape, backend, length) for length in scale.memory_at for backend in (main, *others))
    for other in shapes:
        yield from (Task("load", other), Task("train", other, main), Task("memory", other, main, scale.max_length))
    yield from (Task("speed", shape, backend) for backend in (main, *others))


def answer(check: GpuCheck, task: Task) -> dict[str, Any]:
    """Ask one question: `ok`, `off` (answered, but not as claimed) or `failed`."""
    began = time.monotonic()
    check.task = task
    row: dict[str, Any] = {"date": str(date.today()), "question": str(task), "state": "failed"}
    try:
        found = getattr(check, task.question)()
        row |= {"state": "ok" if found.pop("holds", True) else "off", **found}
    except Failed as error:
        row["error"] = str(error)
    except Exception as error:  # a file that is not as expected; the other questions go on
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.monotonic() - began, 1)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The answers as tests/benchmarks/RESULTS.md has them."""
    lines = [f"## {date.today()}", "", f"`{shlex.join(['python', *sys.argv])}`", ""]
    lines += ["| question | answer | s | figures |", "|---|---|---|---|"]
    for row in rows:
        named = {name: value for name, value in row.items() if name not in ("question", "state", "seconds", "date")}
        figures = [
            f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
            for name, value in named.items()
            if name != "printed"
        ]
        cells = (row["question"], row["state"], str(row["seconds"]), "; ".join(figures))
        lines.append("| " + " | ".join(re.sub(r"[|\n]", " ", cell) for cell in cells) + " |")
    for row in rows:
        if row.get("printed"):
            lines += ["", f"{row['question']}:", "", "```", row["printed"].strip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default="1.7B,0.6B,4B", help="the first is asked everything; or tiny, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="for the answers")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-check-work"), help="for models and runs")
    everything = ",".join(name for name in QUESTIONS if name != "speed")
    parser.add_argument("--only", default=everything, help="some of %(default)s; or speed. load is asked before others")
    parser.add_argument("--minutes", type=float, default=10, help="after which nothing new is asked; call it again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of each dpo-cli command")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    given = parser.parse_args()
    shapes, asked = given.shapes.split(","), given.only.split(",")
    out, work = given.out.resolve(), given.work.resolve()
    if strange := sorted(set(asked) - QUESTIONS.keys()):
        parser.error(f"no such question: {', '.join(strange)}")
    if strange := sorted(set(shapes) - contenders.SHAPES.keys()):
        parser.error(f"no such shape: {', '.join(strange)}")
    work.mkdir(parents=True, exist_ok=True)
    scale = TINY if "tiny" in (*shapes, given.make) else Scale()
    if given.make:
        print(json.dumps(make(work, given.make, given.device, scale)))
        return 0

    out.mkdir(parents=True, exist_ok=True)
    file, every = out / "answers.jsonl", list(tasks(shapes, scale))
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    known = {row["question"]: row for row in map(json.loads, lines)}
    wanted = [task for task in every if task.question in asked or (task.question == "load" and asked != ["speed"])]
    # What failed comes last, so that it takes no time from what was not reached.
    left = [task for task in wanted if str(task) not in known]
    left += [task for task in wanted if known.get(str(task), {}).get("state") == "failed"]
    most = sum(QUESTIONS[task.question] for task in left) / 60
    print(f"at most {most:.0f} minutes for {len(left)} questions, in calls of {given.minutes:g}", flush=True)
    check, end = GpuCheck(out, work, given.device, scale, given.set), time.monotonic() + 60 * given.minutes
    for task in left:
        if time.monotonic() >= end:
            print(task, "not reached", flush=True)
            continue
        row = known[str(task)] = answer(check, task)
        with open(file, "a", encoding="utf-8") as answers:
            print(json.dumps(row, ensure_ascii=False), file=answers)
        print(task, row["state"], row.get("error", ""), flush=True)
        text = table([known[str(one)] for one in every if str(one) in known])
        (out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{out / 'table.md'}; what the commands printed: {out / 'log.txt'}")
    return int(any(row["state"] != "ok" for row in known.values()))


if __name__ == "__main__":
    sys.exit(main())
