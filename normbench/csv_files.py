"""The same CSV file of many sessions as one table, parsed at once."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

Part = tuple[str, str]  # a session's name, and its rows


def read_together(files: Mapping[str, Path], needed: Sequence[str], optional: Sequence[str] = (),
                  texts: Sequence[str] = (), notices: list[str] | None = None
                  ) -> pd.DataFrame | None:  # fmt: skip
    """The rows of these files, by session, with `session` as a last column; None where there is no row.

    A row that is still being written is left out, a file that is missing too; what is no such table is a
    notice.

    Args:
        needed: columns without which a file is none.
        optional: columns that are read where they are there.
        texts: columns that are no numbers.
    """
    said = [] if notices is None else notices
    by_head: dict[str, list[Part]] = {}
    for session, path in files.items():
        try:
            text = path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            said.append(f"{path} cannot be read: {error}")
            continue
        head, _, rows = text[: text.rfind("\n") + 1].partition("\n")
        missing = [column for column in needed if column not in head.split(",")]
        if missing and head:
            said.append(f"{path} cannot be read: no column {missing[0]!r}")
        elif rows:
            by_head.setdefault(head, []).append((session, rows))
    tables = []
    for head, parts in by_head.items():
        try:
            tables.append(parsed(head, parts, [*needed, *optional], texts))
        except ValueError:  # one of them: by itself it says which, and the others are read
            for part in parts:
                try:
                    tables.append(parsed(head, [part], [*needed, *optional], texts))
                except ValueError as error:
                    said.append(f"{files[part[0]]} cannot be read: {str(error).splitlines()[0]}")
    return pd.concat(tables, ignore_index=True) if tables else None


def parsed(head: str, parts: Sequence[Part], columns: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    """Rows under one head. Raises: ValueError — they are no such table."""
    there = [column for column in columns if column in head.split(",")]
    kinds = {column: str if column in texts else float for column in there}
    text = io.StringIO("".join([head, "\n", *(rows for _, rows in parts)]))
    table = pd.read_csv(text, usecols=there, dtype=kinds)
    sizes = [rows.count("\n") for _, rows in parts]
    if len(table) != sum(sizes):
        raise ValueError(f"{sum(sizes)} lines hold {len(table)} rows")
    return table.assign(session=np.repeat([session for session, _ in parts], sizes))
