"""Where rows come from: local files and folders, built-in sets, the Hub. Streamed: memory doesn't grow with a file."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from dpo_cli import smoke
from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError, first_line
from dpo_cli.prepare.feed import Feed
from dpo_cli.prepare.files import SUFFIXES, file_feed
from dpo_cli.prepare.text import listed
from dpo_cli.progress import drawn
from dpo_cli.recipe import Recipe, Source

SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test", "eval"}}
# Files that people take for data and that can't be read, and those beside the data that tell of them.
OTHER_SUFFIXES = (".xlsx", ".xls", ".ods", ".txt", ".zip", ".tar", ".tgz", ".7z", ".pkl", ".pickle", ".db", ".sqlite")
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def is_hub(source: Source) -> bool:
    """Whether an id means a Hub data set: neither built in, nor on disk, nor written like a path."""
    written_as_path = source.id.startswith((".", "/", "~")) or source.id.lower().endswith(SUFFIXES + OTHER_SUFFIXES)
    return not (source.id.startswith("builtin:") or written_as_path or Path(source.id).exists())


def local_files(recipe: Recipe, index: int) -> dict[str, Path]:
    """Return the files of a local or built-in source, by their name below its folder; none for a Hub source.

    Raises:
        DpoError: it is not there, or the folder holds no data file that fits `data_files` and `split`.
    """
    source = recipe.data.sources[index]
    where = recipe.where("data", "sources", index, "id")
    if is_hub(source):
        return {}
    if source.id.startswith("builtin:"):
        return {f"{source.label}.jsonl.gz": smoke.resolve(source.id)}
    root = Path(source.id).expanduser()
    if root.is_file():
        return {_name(root.name): root}
    if not root.is_dir():
        raise DpoError(f"no file or folder {root}", where=where, hint="check the path; it is relative to the recipe")
    return _folder_files(root, source, where)


def _folder_files(root: Path, source: Source, where: str) -> dict[str, Path]:
    wanted = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    if wanted:
        try:
            paths = [path for name in wanted for path in sorted(root.glob(name)) if path.is_file()]
        except (ValueError, NotImplementedError):  # no pattern, or one from the root
            paths = []
        found = _named(root, paths)
        hint = f"{root} has no {', '.join(wanted)}; it holds {listed(sorted(_name(p.name) for p in root.iterdir()))}"
    else:
        if (root / "dataset_dict.json").is_file():  # what DatasetDict.save_to_disk wrote
            splits = sorted(_name(path.parent.name) for path in root.glob("*/state.json"))
            if source.split not in splits:
                message = f"{root} was written by save_to_disk and has no split {source.split}"
                raise DpoError(message, where=where, hint=f"set split: to one of {listed(splits)}")
            root = root / source.split
        named = _named(root, _data_files(root, SUFFIXES))
        split = re.compile(rf"(?<![a-z0-9_]){re.escape(source.split.lower())}(?![a-z0-9_])")
        found = {n: p for n, p in named.items() if split.search(n.lower())} or {
            n: p for n, p in named.items() if not _of_another_split(n, source.split)
        }
        held = list(named or _named(root, [path for path in root.rglob("*") if path.is_file()]))
        hint = f"it holds {listed(sorted(held))}; name files in data_files, or choose another split"
    if not found:
        raise DpoError(f"no data files for split {source.split} in {root}", where=where, hint=hint)
    return found


def _of_another_split(name: str, split: str) -> bool:
    others = set().union(*(words for one, words in SPLITS.items() if one != split))
    return bool(others & set(re.split(r"[^a-z0-9]+", name.lower())))


def _data_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Every file below a folder that can hold rows; of one that `save_to_disk` wrote, those that its state names."""
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.name.lower().endswith(suffixes) and path.is_file() and _named_by_state(path)
        if path.name not in ABOUT and not path.name.startswith((".", "cache-"))
    ]


def _named_by_state(path: Path) -> bool:
    """Whether the state of a data set that `save_to_disk` wrote, where there is one, names an Arrow file."""
    state = path.with_name("state.json")
    if path.suffix != ".arrow" or not state.is_file():
        return True
    known = read_json(state)
    if known.get("_indices_data_files") or known.get("_indices_files"):
        raise DpoError(
            f"{path.parent} was written by an old save_to_disk, which kept rows and their order apart",
            where=str(state),
            hint=f"load it with datasets.load_from_disk and write it with to_parquet('{path.parent.name}.parquet')",
        )
    return path.name in [one["filename"] for one in known["_data_files"]]


def left_out(recipe: Recipe, index: int) -> list[str]:
    """Return the names of a folder's data files that are not read, unless another split or `data_files` says why."""
    source = recipe.data.sources[index]
    root = Path(source.id).expanduser()
    if source.id.startswith("builtin:") or source.data_files or not root.is_dir():
        return []
    read = local_files(recipe, index)
    named = _named(root, _data_files(root, SUFFIXES + OTHER_SUFFIXES))
    return [name for name in named if name not in read and not _of_another_split(name, source.split)]


def _named(root: Path, paths: list[Path]) -> dict[str, Path]:
    return {_name(path.relative_to(root).as_posix()): path for path in paths}


def _name(path: str) -> str:
    """A file's name as text that any file can hold; bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def feeds(recipe: Recipe, index: int) -> tuple[list[Feed], str | None]:
    """Return what a source's rows are read from, and its commit where it is a data set on the Hub."""
    if is_hub(recipe.data.sources[index]):
        feed, commit = _hub_feed(recipe, index)
        return [feed], commit
    return [file_feed(name, path) for name, path in local_files(recipe, index).items()], None


HUB_HINT = (
    "check id, revision, data_files and split on its Hub page (a local path starts with ./ or ends like a data file); "
    "a gated or private one needs its terms accepted there and `hf auth login`; "
    "out of reach of the Hub, unset HF_HUB_OFFLINE or set HF_ENDPOINT to a mirror"
)


def _hub_feed(recipe: Recipe, index: int) -> tuple[Feed, str]:
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    from huggingface_hub import HfApi

    from dpo_cli.prepare.tables import dataset_rows

    source = recipe.data.sources[index]
    (enable_progress_bars if drawn() else disable_progress_bars)()
    try:
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        table = load_dataset(source.id, data_files=source.data_files, split=source.split, revision=commit)
    except Exception as error:  # requests, httpx, huggingface_hub and datasets each raise their own kinds
        why = first_line(error)
        where = recipe.where("data", "sources", index, "id")
        raise DpoError(f"can't get the data set {source.id}: {why}", where=where, hint=HUB_HINT) from error
    return Feed(f"{source.id} ({source.split})", partial(dataset_rows, table)), commit


def contamination_files(recipe: Recipe) -> dict[str, Path]:
    """Return the files of `data.contamination`, keyed as in the inputs; DpoError where one is not there."""
    found = {}
    for index, name in enumerate(recipe.data.contamination):
        path = Path(name).expanduser()
        if not path.is_file():
            where = recipe.where("data", "contamination", index)
            raise DpoError(f"no file {path}", where=where, hint="check the path; it is relative to the recipe")
        found[f"contamination[{index}]/{path.name}"] = path
    return found


def set_files(recipe: Recipe) -> dict[str, Path]:
    """Return the local files of `eval.sets` that are on this machine, keyed as in the inputs."""
    asked = (recipe.of_test_set(index, recipe.data.filters) for index in range(len(recipe.eval.sets)))
    return {name: path for one in asked for name, path in source_files(one, missing_ok=True).items()}


def source_files(recipe: Recipe, missing_ok: bool = False) -> dict[str, Path]:
    """Return every local or built-in input, as `<source label>/<name below its folder>` -> path.

    With `missing_ok`, what is not on this machine is left out, as in a run that was copied from another one.

    Raises:
        DpoError: one is missing.
    """
    files: dict[str, Path] = {}
    passed_over = [DpoError] if missing_ok else []
    for index, source in enumerate(recipe.data.sources):
        label = source.label.replace("/", ":")  # up to the first slash, a name says which source or model it is of
        with suppress(*passed_over):
            files |= {f"{label}/{name}": path for name, path in local_files(recipe, index).items()}
    with suppress(*passed_over):
        files |= contamination_files(recipe)
    return files
