"""Where rows come from: local files and folders, built-in sets, the Hub. Streamed: memory doesn't grow with a file."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dpo_cli import smoke
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe, Source

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")
BATCH = 256  # rows of a parquet file in memory at a time
SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test", "eval"}}


@dataclass(frozen=True)
class Broken:
    """A row that can't be read at all, and why."""

    detail: str


Row = dict[str, Any] | Broken
Ticker = Callable[[float], None]  # called now and then with the share of the file that is read, 0..1


@dataclass(frozen=True)
class Feed:
    """One file, or one split of a Hub data set: what to call it, and how to read it.

    `rows(names, tick)` yields the rows; from parquet, only columns whose every part is in `names` (None: all).
    """

    name: str
    rows: Callable[[frozenset[str] | None, Ticker], Iterator[Row]]


def is_hub(source: Source) -> bool:
    """Whether an id means a Hub data set: neither built in, nor on disk, nor written like a path."""
    written_as_path = source.id.startswith((".", "/", "~")) or source.id.lower().endswith(SUFFIXES)
    return not (source.id.startswith("builtin:") or written_as_path or Path(source.id).exists())


def local_files(recipe: Recipe, index: int) -> dict[str, Path]:
    """The files of a local or built-in source, by their name below its folder; none for a Hub source.

    Raises:
        DpoError: it is not there, or the folder holds no data file that fits `data_files` and `split`.
    """
    source = recipe.data.sources[index]
    where = recipe.where("data", "sources", index, "id")
    if is_hub(source):
        return {}
    if source.id.startswith("builtin:"):
        return {f"{source.label}.jsonl": smoke.resolve(source.id)}
    root = Path(source.id).expanduser()
    if root.is_file():
        return {root.name: root}
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
        found = {path.relative_to(root).as_posix(): path for path in paths}
        hint = f"{root} has no {', '.join(wanted)}; it holds {_listed([p.name for p in root.iterdir()])}"
    else:
        paths = [path for path in sorted(root.rglob("*")) if path.name.lower().endswith(SUFFIXES) and path.is_file()]
        named = {path.relative_to(root).as_posix(): path for path in paths}
        split = re.compile(rf"(?<![a-z0-9_]){re.escape(source.split.lower())}(?![a-z0-9_])")
        others = set().union(*(words for name, words in SPLITS.items() if name != source.split))
        found = {n: p for n, p in named.items() if split.search(n.lower())} or {
            n: p for n, p in named.items() if not others & set(re.split(r"[^a-z0-9]+", n.lower()))
        }
        hint = f"it holds {_listed(list(named))}; name files in data_files, or choose another split"
    if not found:
        raise DpoError(f"no data files for split {source.split} in {root}", where=where, hint=hint)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"


def file_feed(name: str, path: Path) -> Feed:
    """A feed of a local file; its format is told by its suffix, and array from lines by the first character."""

    def rows(names: frozenset[str] | None, tick: Ticker) -> Iterator[Row]:
        lower = path.name.lower()
        try:
            if lower.endswith(".parquet"):
                yield from _parquet_rows(path, names, tick)
                return
            with path.open("rb") as raw:
                size = max(path.stat().st_size, 1)
                stream: Any = gzip.GzipFile(fileobj=raw) if lower.endswith(".gz") else raw
                read = _csv_rows if lower.removesuffix(".gz").endswith(".csv") else _json_rows
                for number, row in enumerate(read(stream)):
                    if number % BATCH == 0:
                        tick(raw.tell() / size)
                    yield row
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise DpoError(f"can't read {name}: {error}", where=str(path), hint="download or write it again") from error

    return Feed(name, rows)


def _json_rows(stream: BinaryIO) -> Iterator[Row]:
    lines = iter(stream)
    first = next((line for line in lines if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    if first.lstrip().startswith(b"["):  # one array: it has to be read whole
        whole = _parsed(first + b"".join(lines))
        yield from whole if isinstance(whole, list) else [whole]
        return
    for line in itertools.chain([first], lines):
        if line.strip():
            yield _parsed(line)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, 10,000 brackets
        return Broken(f"not JSON: {error}")


def _csv_rows(stream: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    for row in csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")):
        yield Broken("more fields than the header has names") if None in row else row


def _parquet_rows(path: Path, names: frozenset[str] | None, tick: Ticker) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [leaf for leaf in leaves if names is None or set(leaf.split(".")) <= names | LIST_PARTS]
            done, total = 0, max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):  # over all at once, iter_batches keeps every group's buffers
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
                    yield from batch.to_pylist()
                    done += batch.num_rows
                    tick(done / total)
    except (pa.ArrowException, OverflowError, ValueError) as error:  # the last two from dates that Python has not
        raise OSError(str(error).splitlines()[0]) from error


LIST_PARTS = {"list", "element", "item", "array"}  # what parquet writers put between a list and its elements


# --------------------------------------------------------------------------------------------------------------- Hub


def hub_feed(recipe: Recipe, index: int) -> tuple[Feed, str]:
    """A feed of a Hub data set, downloaded at the commit that its revision names now; and that commit.

    Raises:
        DpoError: no network, no such data set, revision, file or split, or no access to it.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    source = recipe.data.sources[index]
    try:
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        table = load_dataset(source.id, data_files=source.data_files, split=source.split, revision=commit)
    except Exception as error:  # requests, httpx, huggingface_hub and datasets each raise their own kinds
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise DpoError(
            f"can't get the data set {source.id}: {said}",
            where=recipe.where("data", "sources", index, "id"),
            hint=_hub_hint(error),
        ) from error

    return table_feed(f"{source.id} ({source.split})", table), commit


def table_feed(name: str, table: Dataset) -> Feed:
    """A feed of a data set that `datasets` has loaded."""

    def rows(names: frozenset[str] | None, tick: Ticker) -> Iterator[Row]:
        kept = [name for name in table.column_names if names is None or name in names]
        for number, batch in enumerate(table.select_columns(kept).with_format("arrow").iter(batch_size=BATCH)):
            yield from batch.to_pylist()
            tick((number + 1) * BATCH / max(len(table), 1))

    return Feed(name, rows)


def _hub_hint(error: Exception) -> str:
    """What mends an error of the Hub, by the kind of the error and of those that caused it."""
    kinds, cause = "", error
    while cause is not None:
        kinds, cause = f"{kinds} {type(cause).__name__}", cause.__cause__ or cause.__context__  # type: ignore[assignment]
    for kind, hint in HUB_HINTS.items():
        if re.search(kind, kinds):
            return hint
    return "name the files you mean in data_files; a folder with differing files can't be loaded whole"


HUB_HINTS = {
    "Gated": "accept its terms on its Hub page, then run `hf auth login`",
    "Offline": "unset HF_HUB_OFFLINE, or download it elsewhere and give the folder as id",
    "RepositoryNotFound|DatasetNotFound|HFValidation": (
        "check the spelling; a private one needs `hf auth login`; a local path starts with ./ or ends like a data file"
    ),
    "RevisionNotFound": "check revision: a branch, tag or commit",
    "EntryNotFound|DataFilesNotFound|FileNotFound": "check data_files and split against the file list on its Hub page",
    "Connect|Timeout|Proxy|SSL|MaxRetry|LocalEntryNotFound": (
        "check the network; set HF_ENDPOINT to a mirror where the Hub can't be reached"
    ),
}


def contamination_files(recipe: Recipe) -> dict[str, Path]:
    """The files of `data.contamination`, keyed as in the inputs.

    Raises:
        DpoError: one is not there.
    """
    found = {}
    for index, name in enumerate(recipe.data.contamination):
        path = Path(name).expanduser()
        if not path.is_file():
            where = recipe.where("data", "contamination", index)
            raise DpoError(f"no file {path}", where=where, hint="check the path; it is relative to the recipe")
        found[f"contamination[{index}]/{path.name}"] = path
    return found


def source_files(recipe: Recipe, missing_ok: bool = False) -> dict[str, Path]:
    """Every local or built-in input, as `<source label>/<name below its folder>` -> path; Hub sources are left out.

    With `missing_ok`, so are sources that are not on this machine, as in a run that was copied from another one.
    """
    files: dict[str, Path] = {}
    for index, source in enumerate(recipe.data.sources):
        try:
            found = local_files(recipe, index)
        except DpoError:
            if not missing_ok:
                raise
            continue
        files |= {f"{source.label}/{name}": path for name, path in found.items()}
    try:
        return {**files, **contamination_files(recipe)}
    except DpoError:
        if not missing_ok:
            raise
        return files
