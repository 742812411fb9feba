"""Parquet and Arrow files as rows. Imports pyarrow, and so is imported where there is one to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.errors import first_line
from dpo_cli.prepare.feed import BATCH, Broken, Feed, Row, Rows


def parquet_rows(path: Path, feed: Feed) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            done, total = 0, max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):  # over all at once, iter_batches keeps every group's buffers
                for batch in file.iter_batches(BATCH, row_groups=[group], use_threads=False):
                    yield from _batch_rows(batch, done)
                    done += batch.num_rows
                    feed.share = done / total
    except pa.ArrowException as error:
        raise OSError(first_line(error)) from error


def arrow_rows(path: Path, feed: Feed) -> Rows:
    """Arrow's stream format: what `datasets` keeps and `save_to_disk` writes."""
    from datasets import Dataset  # here, for it takes seconds that Parquet needs not

    try:
        table = Dataset.from_file(str(path))
    except pa.ArrowException as error:
        raise OSError(first_line(error)) from error
    yield from dataset_rows(table, feed)


def dataset_rows(table: Any, feed: Feed) -> Rows:
    """The rows of a `datasets.Dataset`."""
    for number, batch in enumerate(table.with_format("arrow").iter(batch_size=BATCH)):
        yield from _batch_rows(batch, number * BATCH)
        feed.share = (number + 1) * BATCH / max(len(table), 1)


def _batch_rows(batch: Any, done: int) -> Rows:
    """A batch's rows; one by one where Python has no value for one of them: text that is not UTF-8, a date too far."""
    try:
        yield from enumerate(batch.to_pylist(), done + 1)
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            row: Row
            try:
                [row] = batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                row = Broken(f"a value of it can't be read: {first_line(error)}")
            yield done + index + 1, row
