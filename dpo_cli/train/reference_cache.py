"""`engine.reference_cache`: log-probabilities of the reference, computed once for all runs of a runs folder.

TRL's `precompute_ref_log_probs` forgets them whenever the learning rate, seed, rank or output folder changes, since
all of that is in its key. Here a row's key is its token ids (so the chat template is in it), under a file for what
else decides the numbers, see `facts`:

    runs/.reference_cache/<key>/facts.json    those facts, to be read by people
    runs/.reference_cache/<key>/rows.sqlite   row key: [chosen, rejected]

A kept number is the one that was computed, to the last bit. Computed again in a batch of another shape it may differ
by rounding, as TRL's own numbers do between batch sizes; that much is not part of the key.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict

from dpo_cli import backends, model_files, processes
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError
from dpo_cli.machine import versions
from dpo_cli.recipe import Recipe
from dpo_cli.store import Store

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps")  # the columns that TRL's collator takes
LIBRARIES = ("torch", "transformers", "trl", "bitsandbytes", "unsloth")
Report = Callable[[int], None]


class ReferenceCache:
    """The rows that share one set of facts.

    Attributes:
        rows: row key -> [chosen, rejected], summed log-probabilities in nats.
        computed: rows that `fill` has computed, over all its calls.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Read what is there; without writing or waiting."""
        text = json.dumps(facts, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = folder / self.key
        self.path = self.folder / "rows.sqlite"
        self.facts = json.loads(text)
        self.computed = 0
        self.rows = self._read()

    def missing(self, dataset: Dataset) -> int:
        """How many different rows of a tokenised dataset are not known yet."""
        return len({key for key, _ in _keys(dataset)} - self.rows.keys())

    def fill(self, trainer: Any, dataset: Dataset, batch_tokens: int, report: Report | None = None) -> Dataset:
        """Add `LOGPS` to a tokenised dataset; what is missing is computed, longest rows first, and put on disk.

        No random number is drawn.

        Args:
            trainer: TRL's, before its first step.
            batch_tokens: padded tokens of a batch, chosen and rejected together; a longer row is a batch of its own.
            report: called with the number of rows of each batch.

        Raises:
            DpoError: a reference value is NaN or infinite; it is not kept.
        """
        keys = _keys(dataset)
        self.rows = self._read()  # what others have added
        self.folder.mkdir(parents=True, exist_ok=True)
        # For people. Not renamed into place: another run may write the same facts at this moment.
        (self.folder / "facts.json").write_text(json.dumps(self.facts, indent=2), encoding="utf-8")
        unknown = {key: (length, key, row) for row, (key, length) in enumerate(keys) if key not in self.rows}
        # By key where lengths are equal, so that the order of the data does not change the batches.
        todo = sorted(unknown.values(), reverse=True)
        with Store(self.path) as store:
            for batch in _batches(todo, batch_tokens, trainer.args.max_length):
                new = _compute(trainer, dataset, batch)
                self.rows |= new
                store.put(new)
                if report:
                    report(len(new))
        self.computed += len(todo)
        for position, name in enumerate(LOGPS):
            dataset = dataset.add_column(name, [self.rows[key][position] for key, _ in keys])  # as float64
        return dataset

    def _read(self) -> dict[str, list[float]]:
        with Store(self.path) as store:
            return store.all()


def row_key(row: Mapping[str, Any]) -> str:
    """32 hexadecimal digits for the token ids of a row; order and the borders between its three parts count."""
    digest = hashlib.blake2b(digest_size=16)
    for name in TOKENS:
        ids = array("i", row[name]).tobytes()
        digest.update(len(ids).to_bytes(8, "little") + ids)
    return digest.hexdigest()


def facts(recipe: Recipe, trainer: Any) -> dict[str, Any]:
    """What decides the reference's numbers beside a row's tokens, without absolute paths.

    Learning rate, seed, beta, loss and the fresh LoRA are not among it: the reference knows nothing of them. An
    adapter that training starts from, TRL's "ref", is.
    """
    args, model, device = trainer.args, trainer.model, trainer.accelerator.device
    quantisation: Any = getattr(model.config, "quantization_config", None)
    files = {name: sha256(path) for name, path in _base_files(recipe).items()}
    installed = versions()
    return {
        "base": files or {"id": recipe.model.id, "commit": getattr(model.config, "_commit_hash", None)},
        "adapter": _adapter_sha256(model),
        "quantisation": quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation,
        "dtype": str(model.dtype),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "attention": model.config._attn_implementation,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ld_alpha": args.ld_alpha,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "unsloth": backends.patched_by_unsloth(type(trainer)),
        "versions": {name: installed[name] for name in LIBRARIES if name in installed},
    }


def unsupported(recipe: Recipe, trainer: Any) -> str | None:
    """Why the reference of this run can't be kept, in words; None where it can.

    It has to be the same from the first step to the last, and the same in training as in `fill`.
    """
    model = trainer.model
    if processes.count() > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "one process computes it, and here are several, or DeepSpeed or FSDP places the model"
    if trainer.args.sync_ref_model:
        return "train.sync_ref_model moves the reference"
    changed = [name for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name]
    if changed:
        return f"training changes the reference itself ({changed[0]})"
    if dropping := _dropout(model):
        return f"the reference has dropout in training ({dropping})"
    if not _base_files(recipe) and not getattr(model.config, "_commit_hash", None):
        return f"which commit of {recipe.model.id} was loaded is not known"
    return None


def use(trainer: Any, cache: ReferenceCache, batch_tokens: int, report: Report | None = None) -> None:
    """Have TRL read the columns of `ReferenceCache.fill` in place of a reference pass, for all of a trainer's data."""
    trainer.train_dataset = cache.fill(trainer, trainer.train_dataset, batch_tokens, report)
    if trainer.eval_dataset is not None:
        held_out = trainer.eval_dataset.items()
        trainer.eval_dataset = {name: cache.fill(trainer, one, batch_tokens, report) for name, one in held_out}
    trainer.precompute_ref_logps = True


# ------------------------------------------------------------------------------------------------------------ pieces

Todo = list[tuple[int, str, int]]  # length, key and row


def _keys(dataset: Dataset) -> list[tuple[str, int]]:
    """Each row's key, and the tokens of its longer side."""
    return [
        (row_key(row), len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
        for row in dataset.select_columns(list(TOKENS))
    ]


def _batches(todo: Todo, batch_tokens: int, max_length: int | None) -> Iterator[Todo]:
    """Cut rows, longest first, into batches that are at most `batch_tokens` when padded."""
    start = 0
    while start < len(todo):
        longest = min(todo[start][0], max_length or todo[start][0])
        end = start + max(1, batch_tokens // (2 * longest))
        yield todo[start:end]
        start = end


def _compute(trainer: Any, dataset: Dataset, batch: Todo) -> dict[str, list[float]]:
    """The rows of a batch, by TRL's own function."""
    columns = dataset.select_columns(list(TOKENS))
    padded = trainer.data_collator([columns[row] for _, _, row in batch])
    inputs = {name: value.to(trainer.accelerator.device) for name, value in padded.items()}
    chosen, rejected = (side.tolist() for side in trainer.compute_ref_log_probs(trainer.model, inputs))
    for (_, _, row), *values in zip(batch, chosen, rejected, strict=True):
        if not all(map(math.isfinite, values)):
            raise DpoError(
                f"the reference's log-probabilities of a pair are {values[0]} (chosen) and {values[1]} (rejected)",
                where=f"row {dataset[row]['id']}",
                hint="look at this row; with float16, set model.dtype to bfloat16 or float32; check the base's weights",
            )
    return {key: values for (_, key, _), *values in zip(batch, chosen, rejected, strict=True)}


def _base_files(recipe: Recipe) -> dict[str, Path]:
    """Configuration and weights of a base in a local folder; none of a hub id, which has a commit."""
    names = ("model/config.json", ".index.json", ".safetensors", ".bin")
    files = model_files.local_files(recipe).items()
    return {name: path for name, path in files if name.startswith("model/") and name.endswith(names)}


def _adapter_sha256(model: Any) -> str | None:
    """Of the weights and scale of the adapter "ref"; None where the reference is the base alone."""
    if "ref" not in model.peft_config:
        return None
    config = model.peft_config["ref"]
    digest = hashlib.sha256(json.dumps([config.lora_alpha, config.r, config.use_rslora]).encode())
    for name, tensor in sorted(get_peft_model_state_dict(model, adapter_name="ref").items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _dropout(model: Any) -> str | None:
    """A module of the reference that drops something in training; TRL's `disable_dropout` does not reach them all."""
    for name, module in model.named_modules():
        if ".lora_dropout" in name and "ref" not in model.peft_config:
            continue  # switched off with the adapter
        rate = module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return name
    return None
