"""Records from local files, globs of them, or a Hub dataset, each with the place it came from.

A place is what an error names: `chats.jsonl:17` (line 17), `chats.parquet:17` (row 17) or
`owner/name[train]:17`. Nothing here runs code that comes with the data.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".parquet", ".txt")

# owner/name as the Hub spells it, then the configuration of a data set that has several.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")

PARQUET_ROWS = 256
"""Rows decoded at a time; documents can be long, and only one batch is in memory."""


class Record(NamedTuple):
    """One record and the place an error about it names."""

    place: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """The string under `field`.

        Raises:
            ValueError: the record has no such field, or it is not a string.
        """
        if field not in self.fields:
            known = ", ".join(map(repr, self.fields)) or "none"
            raise ValueError(f"{self.place}: no field {field!r} (the record's fields: {known})")
        found = self.fields[field]
        if not isinstance(found, str):
            raise ValueError(f"{self.place}: {field!r} is {_kind(found)}, expected a string")
        return found


def read_records(path: str, split: str = "train", streaming: bool = False) -> Iterator[Record]:
    """Every record of `path`, in order.

    Args:
        path: a .jsonl, .parquet or .txt file (one document, field "text"), a folder or a glob of
            such files (read in sorted order), or a Hub id `owner/name`, `owner/name:configuration`.
        split: which split, for a Hub id.
        streaming: read a Hub data set over the network instead of downloading it first.
            Local files are always read one record at a time.

    Raises:
        ValueError: there is no such data, or a record is not readable; names file and line.
    """
    files = find_files(path)
    if files is None:
        yield from _hub_records(path, split, streaming)
        return
    for file in files:
        read = {".jsonl": _jsonl_records, ".parquet": _parquet_records, ".txt": _txt_records}
        is_empty = True
        for record in read[file.suffix](file):
            is_empty = False
            yield record
        if is_empty:
            raise ValueError(f"{file}: no records in this file")


def find_files(path: str) -> list[Path] | None:
    """The local files that `path` means, sorted; None when it can only be a Hub id.

    Raises:
        ValueError: no such file, no match, or a type of file that is not read here.
    """
    here = Path(path)
    if here.is_file():
        files = [here]
    elif here.is_dir():
        files = sorted(f for f in here.iterdir() if f.is_file() and f.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
    elif any(c in path for c in "*?["):
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file())
        if not files:
            raise ValueError(f"{path}: no file matches")
    elif here.suffix in (*SUFFIXES, ".npy", ".json") or not HUB_ID.fullmatch(path):
        hint = "" if here.is_absolute() else f" (looked in {Path.cwd()})"
        raise ValueError(f"{path}: no such file{hint}, and not a Hub id of the form owner/name")
    else:
        return None
    for file in files:
        if file.suffix not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"{file}: unknown type of file {file.suffix!r}; read here: {known}")
    return files


def _jsonl_records(file: Path) -> Iterator[Record]:
    # Our own loop, not a loader's: it knows the line an error is on.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                # A byte order mark is legal nowhere but at the start, where some editors put it.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 (byte {error.start})") from None
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{place}: expected one JSON object, found {_kind(fields)}")
            yield Record(place, fields)


def _parquet_records(file: Path) -> Iterator[Record]:
    # pyarrow (which `datasets` brings) and not load_dataset: no second copy of the data in a cache.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{file}:{number}", fields)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a readable Parquet file ({reason})") from None


def _txt_records(file: Path) -> Iterator[Record]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 (byte {error.start})") from None
    if text.strip():
        yield Record(str(file), {"text": text})


def _hub_records(path: str, split: str, streaming: bool) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    name, _, configuration = path.partition(":")
    try:
        # datasets 5 cannot run a data set's own script: it refuses such a repository.
        found = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except Exception as error:  # the Hub client raises a dozen kinds, all of them the outside world
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no such file or folder, and not loaded from the Hub ({reason})") from error
    for number, fields in enumerate(found, start=1):
        yield Record(f"{path}[{split}]:{number}", dict(fields))


def _kind(value: Any) -> str:
    """What a JSON value is, in the words of a person."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), f"a number ({value!r})")
