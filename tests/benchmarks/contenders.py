"""The contenders of `bench_train.py`: who trains on the same pairs, from the same weights, in the same order.

Each is built, measured for some steps, and thrown away, so that every measurement starts from the same adapter. Its
B is random, not zero: a policy equal to its reference would hide half of all mistakes.
"""

from __future__ import annotations

import gc
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lengths import Lengths, Tokens, tokens

FIRST_TOKEN = 8  # ids below are the tokenizer's own
RANK = 16


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3; the real ones as their `config.json` has them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 16, 128, 512),
    "bench": Shape(512, 6, 8, 4, 64, 1536, 8000),
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936),
    "4B": Shape(2560, 36, 32, 8, 128, 9728, 151936),
}


@dataclass(frozen=True)
class Work:
    """What all contenders of a table are given."""

    rows: Sequence[Lengths]  # lengths of the pairs, `step_pairs` for each step, in the order in which they are used
    step_pairs: int
    model: Path  # folder of the base model and its tokenizer
    folder: Path  # a run's folder, with `data/train.jsonl`
    device: str = "cpu"  # (float32) or cuda (NF4, bfloat16)
    backend: str = "hf"  # or unsloth, for TRL's script and dpo-cli alike
    warm_up: int = 0  # steps before the clock starts, on the pairs of the first steps; only a GPU needs them

    @property
    def pairs(self) -> list[Tokens]:
        return tokens(self.rows, json.loads((self.model / "config.json").read_text())["vocab_size"], FIRST_TOKEN)

    def recipe(self, micro_batch: int, engine: dict[str, Any], **train: Any) -> Any:
        """The recipe of this work; TRL's scripts take its `train` section too, so that all have the same arguments."""
        from dpo_cli.recipe import Recipe

        on_gpu = self.device == "cuda"
        model = {"id": str(self.model), "load_in_4bit": on_gpu, "dtype": "bfloat16" if on_gpu else "float32"}
        arguments = {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": self.step_pairs // micro_batch,
            "max_steps": self.warm_up + len(self.rows) // self.step_pairs,
            "learning_rate": 1e-4,
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return Recipe.model_validate(
            {
                "name": "bench",
                "seed": 0,
                "model": model,
                "lora": {"r": RANK, "alpha": 2.0 * RANK, "dropout": 0.0},
                "data": {"sources": [{"id": "unused"}]},
                "train": arguments | train,
                "engine": {"backend": self.backend, "preflight": False} | engine,
            }
        )


@dataclass
class Measured:
    """Some steps of a contender, without warm-up, loading and what the reference cost before them."""

    wall: float = 0.0  # seconds
    cpu: float = 0.0
    losses: list[float] = field(default_factory=list)  # of each step
    gradient: Any = None  # of all adapter weights at the first step, flat
    peak: int = 0  # bytes on the GPU; 0 on a CPU
    seen: tuple[int, int] = (0, 0)  # tokens of the forwards that shared a prefix: padded, and as computed


@dataclass(frozen=True)
class Contender:
    """`build` gives its trainer, ready for the first step."""

    key: str
    label: str
    build: Callable[[Work], Any]


# ------------------------------------------------------------------------------------------------------- who takes part


def trl_script(key: str, label: str, micro_batch: int = 1, **arguments: Any) -> Contender:
    """A script as TRL's documentation writes it, on the model that dpo-cli loads."""

    def build(work: Work) -> Any:
        from datasets import load_dataset
        from dpo_cli import backends, models

        trl: Any = import_module("trl")  # after Unsloth, which patches it
        on_gpu = work.device == "cuda"
        recipe = work.recipe(micro_batch, {}, gradient_checkpointing=arguments.get("gradient_checkpointing", True))
        args = trl.DPOConfig(
            **{name: getattr(recipe.train, name) for name in recipe.train.model_fields_set},
            output_dir=str(work.folder / "trl"),
            seed=recipe.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_pin_memory=on_gpu,
            **{name: value for name, value in arguments.items() if name != "gradient_checkpointing"},
        )
        model, tokenizer = models.load_for_training(recipe, backends.Backend(work.backend, "the benchmark"))
        pairs = load_dataset("json", data_files=str(work.folder / "data" / "train.jsonl"), split="train")
        trainer = trl.DPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
        trainer.model.delete_adapter("ref")  # TRL's copy of the fresh adapter; the base is the reference, as for all
        return trainer

    return Contender(key, label, build)


DEFAULTS = trl_script("trl_defaults", "TRL script, defaults (checkpointing on)")
TUNED = trl_script(
    "trl_tuned", "TRL tuned: no checkpointing, reference precomputed", gradient_checkpointing=False,
    precompute_ref_log_probs=True,
)  # fmt: skip


def stock(micro_batch: int) -> Contender:
    """TRL with dpo-cli's settings: no checkpointing, the reference computed in each step."""
    label = f"TRL, no checkpointing, batch {micro_batch}"
    return trl_script(f"stock_{micro_batch}", label, micro_batch, gradient_checkpointing=False)


PARTS = ("shared_prefix", "token_budget", "reference_cache")


def dpo_cli(*off: str, micro_batch: int = 1) -> Contender:
    """The product's own trainer, as `dpo-cli train` builds it, without the parts of `engine` that are named."""

    def build(work: Work) -> Any:
        from dpo_cli import backends
        from dpo_cli.run import Run
        from dpo_cli.train.engine import cache_reference, choose
        from dpo_cli.train.trainer import build as build_trainer

        engine = {"shared_prefix": "on", "token_budget": "auto", "reference_cache": "on"} | dict.fromkeys(off, "off")
        recipe = work.recipe(micro_batch, engine)
        trainer = build_trainer(recipe, Run(work.folder), backends.Backend(work.backend, "the benchmark"))
        choose(recipe, trainer, None, lambda line: None)
        cache_reference(recipe, trainer, work.folder.parent, None, lambda line: None)
        return trainer

    key = "_".join(("dpo_cli_without", *off)) if off else "dpo_cli"
    label = f"dpo-cli, off: {', '.join(off)}" if off else "dpo-cli, all on, reference cache warm"
    return Contender(key + f"_{micro_batch}" * (micro_batch > 1), label, build)


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(contender: Contender, work: Work) -> Measured:
    """Build a contender, let it do the work's steps, and forget it."""
    import torch
    from dpo_cli.train import shared_prefix
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    made, on_gpu, clock = Measured(), work.device == "cuda", [0.0, 0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == work.warm_up:
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                clock[:] = time.perf_counter(), time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
                made.peak = torch.cuda.max_memory_allocated()
            made.wall, made.cpu = time.perf_counter() - clock[0], time.process_time() - clock[1]

    trainer = contender.build(work)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if weight.requires_grad:  # by name, whoever made it
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(Clock())
    shared = shared_prefix.of(trainer.model)
    if shared:
        shared.padded_tokens = shared.stream_tokens = 0
    with first_gradient() as gradient:
        trainer.train()
    made.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    made.gradient = gradient[0]
    if shared:
        made.seen = shared.padded_tokens, shared.stream_tokens
    del trainer, shared
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return made


@contextmanager
def first_gradient() -> Iterator[list[Any]]:
    """[0] is what the first optimizer step within it saw, flat, on the CPU, whoever's optimizer it is."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found: list[Any] = []

    def hook(optimizer: Any, *_: Any) -> None:
        if not found:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            found.append(torch.cat([weight.grad.detach().float().cpu().flatten() for weight in weights]))

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


# ----------------------------------------------------------------------------------------------------- model and pairs


def random_qwen3(shape: Shape, device: str, dtype: Any, **special_tokens: Any) -> Any:
    """A Qwen3 of random weights, made in its dtype: 4B in float32 would not fit into 16 GB."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **special_tokens,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_model(folder: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write a Qwen3 of random weights, and a tokenizer whose token i is the word `wi`, unless they are there."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return folder
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random_qwen3(shape, device, dtype, pad_token_id=0, eos_token_id=1).save_pretrained(folder)
    special = ["<pad>", "<eos>", "<unk>"]
    words = special + [f"w{number}" for number in range(len(special), shape.vocabulary)]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=8192
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(work: Work) -> Work:
    """The pairs as `dpo-cli prepare` leaves them, in `data/train.jsonl`; the tokenizer makes one token of a word."""
    from dpo_cli.records import Pair, write_jsonl

    def message(role: str, ids: list[int]) -> list[Any]:
        return [{"role": role, "content": " ".join(f"w{number}" for number in ids)}]

    path = work.folder / "data" / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        Pair(
            id=str(number),
            prompt=message("user", pair.prompt),
            chosen=message("assistant", pair.chosen),
            rejected=message("assistant", pair.rejected),
            language="en",
            source="random",
            chat_template_kwargs={"enable_thinking": False},
        ).to_json()
        for number, pair in enumerate(work.pairs)
    )
    write_jsonl(path, rows)
    return work
