"""Parquet and Arrow files as rows. Imports pyarrow, and so is imported where there is one to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.errors import first_line
from dpo_cli.prepare.feed import BATCH, Broken, Feed, Rows

LIST_PARTS = {"list", "element", "item", "array"}  # what parquet writers put between a list and its elements


def parquet_rows(path: Path, feed: Feed, names: frozenset[str] | None) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [leaf for leaf in leaves if names is None or set(leaf.split(".")) <= names | LIST_PARTS]
            done, total = 0, max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):  # over all at once, iter_batches keeps every group's buffers
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
                    yield from _batch_rows(batch, done)
                    done += batch.num_rows
                    feed.share = done / total
    except pa.ArrowException as error:
        raise OSError(first_line(error)) from error


def arrow_rows(path: Path, feed: Feed, names: frozenset[str] | None) -> Rows:
    """Arrow's stream or file format: what `datasets` keeps and `save_to_disk` writes, and Feather."""
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            done, size = 0, max(path.stat().st_size, 1)
            for whole in batches:
                kept = [name for name in whole.schema.names if names is None or name in names]
                for start in range(0, whole.num_rows, BATCH):
                    batch = whole.select(kept).slice(start, BATCH)
                    yield from _batch_rows(batch, done)
                    done += batch.num_rows
                    feed.share = min(source.tell() / size, 1.0)
    except pa.ArrowException as error:
        raise OSError(first_line(error)) from error


def _batch_rows(batch: Any, done: int) -> Rows:
    """A batch's rows, one by one where a text of it is not UTF-8, or a date is none that Python has (read as null)."""
    try:
        yield from enumerate(batch.to_pylist(), done + 1)
        return
    except (UnicodeDecodeError, OverflowError, ValueError):
        pass
    for index in range(batch.num_rows):
        row: dict[str, Any] = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[index].as_py()
            except UnicodeDecodeError as error:
                yield done + index + 1, Broken(f"column {name} is not UTF-8: byte 0x{error.object[error.start]:02x}")
                break
            except (OverflowError, ValueError):
                row[name] = None
        else:
            yield done + index + 1, row
