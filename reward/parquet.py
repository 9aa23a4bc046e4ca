"""Parquet files that came from outside, a few rows at a time: a file of some kilobytes can stand for a large text repeated millions of times.

A batch holds so few rows that, were every row as large as its whole group, packed as it is, it would still be small. What a footer says is not believed: the kernel has the
last word on memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from base_model.bounds import memory_at_most

MOST_ROWS = 10_000_000
MOST_COLUMNS = 1_000
MOST_NESTED = 4  # lists in lists
TIGHTEST = 500  # times that a file may be smaller than a large group of its rows
LARGE = 64 << 20
AT_ONCE = 256 << 20  # bytes of a batch, if each row is as large as its group
MEMORY = 2 << 30  # that reading one batch may take


def open_parquet(source: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises ValueError where there is too much in it, OSError and pyarrow's errors where it cannot be read."""
    import pyarrow.parquet as pq

    with memory_at_most(MEMORY):
        file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
    try:
        _check(file, source.stat().st_size)
    except ValueError:
        file.close()
        raise
    return file


def batches(file: Any, columns: Sequence[str] | None = None, *, rows: int = 65_536) -> Iterator[Any]:
    """The file's `pyarrow.RecordBatch`es, of `rows` rows at most. Raises MemoryError where one does not fit, ValueError where there are fewer rows than the footer says, and
    pyarrow's errors."""
    told = file.metadata
    largest = max((told.row_group(i).total_byte_size for i in range(told.num_row_groups)), default=0)
    found = file.iter_batches(max(1, min(rows, AT_ONCE // max(largest, 1))), columns=columns, use_threads=False)
    read = 0
    while True:
        with memory_at_most(MEMORY):
            batch = next(found, None)
        if batch is None:
            break
        read += batch.num_rows
        yield batch
    if read != told.num_rows:
        raise ValueError(f"{read:,} rows where the footer says {told.num_rows:,}")


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """A batch as mappings. Raises MemoryError where there is more in it than there should be."""
    with memory_at_most(MEMORY):
        rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _check(file: Any, size: int) -> None:
    """What the footer says. Metadata of single columns is left alone: where it is damaged, pyarrow ends the process."""
    told = file.metadata
    groups = [told.row_group(i) for i in range(told.num_row_groups)]
    if told.num_rows != sum(group.num_rows for group in groups):
        raise ValueError("the footer contradicts itself about the number of rows")
    nested = max((told.schema.column(j).max_repetition_level for j in range(min(told.num_columns, MOST_COLUMNS))), default=0)
    for what, number, most in (("rows", told.num_rows, MOST_ROWS), ("columns", told.num_columns, MOST_COLUMNS), ("lists in lists", nested, MOST_NESTED)):
        if number > most:
            raise ValueError(f"{number:,} {what} are more than {most:,}")
    if any(group.total_byte_size > max(LARGE, TIGHTEST * size) for group in groups):
        raise ValueError(f"its rows are packed more than {TIGHTEST} times")
