"""Images as people have them: a CSV of values, a folder of pictures. Found and judged before torch is there.

A CSV has no header; a row is an image of C·H·W values, channel by channel, row by row (CHW), as the third
study's. Values are integers from 0 to 255 or fractions from 0 to 1, one kind a file: the first value of the
file that is neither 0 nor 1 decides, fractions where it is between them. Where somebody says the scale, they
are any numbers from 0 to it.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from normbench.values import Refused

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as ImageFolder's
BY_NAME = ("cifar10", "cifar100", "imagenette", "imagenet")  # whose labels follow the classes' names in order
SCALES = ("255", "1")
UNDECIDED = 2**24  # zeros and ones that are kept until a value says the scale
LONGEST = 64  # characters of a value
SHOWN = 24  # of those that a message repeats

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Chunk = tuple[Values, Labels | None]  # images and, where known, their labels (n,)


@dataclass(frozen=True)
class Table:
    """A CSV of images.

    Args:
        path: the file, or a pipe.
        shape: (C, H, W) of an image.
        num_classes: labels are below.
        scale: 255, 1, or None where the file decides.
        label_column: which column is the label, from 1; -1 the last; None for none.
        labels: of all rows, from elsewhere; None for none.
    """

    path: Path
    shape: tuple[int, int, int]
    num_classes: int
    scale: str | None = None
    label_column: int | None = None
    labels: Labels | None = None

    @property
    def width(self) -> int:
        """Values that a row must have."""
        return int(np.prod(self.shape)) + (self.label_column is not None)

    @property
    def label_at(self) -> int | None:
        """The label's place in a row, from 0."""
        if self.label_column is None:
            return None
        return self.label_column - 1 if self.label_column > 0 else self.width + self.label_column

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """So many images at a time, (n, C, H, W) from 0 to 255, with their labels (n,) where known.

        Raises: Refused — a row of another length, a value out of range, no rows, labels too many or too few.
        """
        scale, before = self.scale, 0
        waiting: list[Chunk] = []  # images of zeros and ones alone
        for values, labels in self.read(rows):
            waiting.append((values, labels))
            scale = scale or scale_of(values)
            if scale is not None:
                self.check(values, scale, before)
                for early, known in waiting:
                    yield (early * 255 if scale == "1" else early).reshape(-1, *self.shape), known
                waiting.clear()
            before += len(values)
            if waiting and before * self.width > UNDECIDED:
                break
        if waiting:
            raise Refused(
                f"{self.path} holds zeros and ones alone up to row {before}; say which is the brightest: "
                "--scale 1 or 255"
            )

    def read(self, rows: int) -> Iterator[Chunk]:
        """So many rows of numbers (n, C·H·W) at a time as they stand, with their labels where known."""
        count = 0
        with self.path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = self.lines(file)
            while chunk := list(itertools.islice(lines, rows)):
                values, labels = self.split(self.parsed(chunk, count), count)
                count += len(chunk)
                if self.labels is not None:
                    if count > len(self.labels):
                        raise Refused(
                            f"{self.path} has more rows than --labels, which has {len(self.labels)}"
                        )
                    labels = self.labels[count - len(chunk) : count]
                yield values, labels
        if not count:
            raise Refused(f"{self.path} is empty; a row of {self.width} values is an image")
        if self.labels is not None and count < len(self.labels):
            raise Refused(f"{self.path} has {count} rows, fewer than --labels, which has {len(self.labels)}")

    def lines(self, file: TextIO) -> Iterator[str]:
        """The rows; blank lines may only end the file."""
        blank, longest = None, LONGEST * self.width
        for number, line in enumerate(iter(partial(file.readline, longest), ""), 1):
            if len(line) == longest:
                raise Refused(f"{self.path}: row {number} is longer than {self.width} values are")
            if not line.strip():
                blank = blank or number
            elif blank:
                raise Refused(f"{self.path}: row {blank} is empty")
            else:
                yield line

    def parsed(self, lines: Sequence[str], before: int) -> Values:
        """Rows of numbers (n, width)."""
        try:
            values = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2, dtype=np.float64)
        except ValueError as error:
            raise Refused(self.culprit(lines, before) or f"{self.path}: {error}") from None
        if values.shape != (len(lines), self.width):
            raise Refused(self.culprit(lines, before))
        return values

    def culprit(self, lines: Sequence[str], before: int) -> str:
        """What is wrong with the first of these that is no row of numbers."""
        for number, line in enumerate(lines, before + 1):
            cells = line.strip().split(",")
            for column, cell in enumerate(cells, 1):
                if not is_number(cell):
                    cure = why_no_number(cell, number == 1, column == len(cells))
                    return f"{self.path}: row {number}, column {column}: {clipped(cell)} is no number{cure}"
            if len(cells) != self.width:
                what = "×".join(map(str, self.shape)) + ("" if self.label_column is None else " and a label")
                one_more = self.label_at is None and len(cells) == self.width + 1
                cure = "; where one is the label, --label-column 1 or -1" if one_more else ""
                return f"{self.path}: row {number} has {len(cells)} values, not {self.width} ({what}){cure}"
        return ""

    def split(self, values: Values, before: int) -> tuple[Values, Labels | None]:
        """The images' values, and the labels where a column holds them."""
        if self.label_at is None:
            return values, None
        labels = values[:, self.label_at]
        wrong = ~((labels >= 0) & (labels < self.num_classes) & (labels == np.floor(labels)))
        if wrong.any():
            row = int(wrong.argmax())
            raise Refused(
                f"{self.path}: row {before + row + 1}, column {self.label_at + 1}: label {labels[row]:g} is "
                f"not an integer from 0 to {self.num_classes - 1}"
            )
        return np.delete(values, self.label_at, axis=1), labels.astype(np.int64)

    def check(self, values: Values, scale: str, before: int) -> None:
        """Every value of its kind and in range; NaN is in none."""
        good, kind = (values >= 0) & (values <= float(scale)), "a number"
        if scale == "255" and self.scale is None:
            good, kind = good & (values == np.floor(values)), "an integer"
        if good.all():
            return
        row, place = map(int, np.unravel_index(good.argmin(), good.shape))
        column = place + 1 + (self.label_at is not None and self.label_at <= place)
        value, cure = values[row, place], ""
        if value < 0:
            cure = "; give the values from before their normalisation"
        elif self.scale is None and value <= 255:
            cure = ", as the file's first value that is neither 0 nor 1; --scale 255 or 1 overrules that one"
        raise Refused(
            f"{self.path}: row {before + row + 1}, column {column}: {value:g} is not {kind} from 0 to "
            f"{scale}{cure}"
        )


def is_number(cell: str) -> bool:
    """As NumPy reads them, which knows no 1_000."""
    try:
        float(cell)
    except ValueError:
        return False
    return cell.isascii() and "_" not in cell


def why_no_number(cell: str, first_row: bool, last_column: bool) -> str:
    """What to do about it, where that can be seen."""
    if is_number(cell.strip().strip("\"'")):
        return "; numbers take no quotes"
    if re.search(r"\d[;\t ]+\d", cell):
        return "; commas separate values"
    if first_row and re.search(r"[^\W\d]", cell):
        return "; a header has no place here"
    return "; a row ends without a comma" if last_column and not cell.strip() else ""


def clipped(text: str) -> str:
    """A value as a message repeats it."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def scale_of(values: Values) -> str | None:
    """What the first value that is neither 0 nor 1 decides; None where there is none."""
    telling = (values != 0) & (values != 1)
    if not telling.any():
        return None
    return "1" if 0 < values.flat[int(telling.argmax())] < 1 else "255"


def read_labels(path: Path, num_classes: int) -> Labels:
    """A file of one integer a line."""
    labels = []
    rows = path.read_text(encoding="utf-8-sig", errors="replace").rstrip().splitlines()
    for number, line in enumerate(rows, 1):
        text = line.strip()
        if not (re.fullmatch(r"\d{1,9}", text) and int(text) < num_classes):
            raise Refused(
                f"{path}: row {number}: {clipped(text)} is not an integer from 0 to {num_classes - 1}"
            )
        labels.append(int(text))
    if not labels:
        raise Refused(f"{path} is empty; a row is a label")
    return np.array(labels, dtype=np.int64)


@dataclass(frozen=True)
class Folder:
    """Pictures under a folder: `files` relative to `root`, their labels where class folders give them.

    `classes` are the names of the model's classes in order; empty where only their numbers are known.
    """

    root: Path
    files: Sequence[str]
    labels: Labels | None
    classes: Sequence[str]


def list_folder(root: Path, dataset: str, num_classes: int) -> Folder:
    """One picture, those of a flat folder in name order, or of one folder a class as in ImageFolder.

    Class folders named by numbers are the labels themselves; other names are labels in their order, which
    takes all classes and a `dataset` whose own labels are in that order.
    """
    if not root.is_dir():
        return Folder(root.parent, [root.name], None, ())
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    inside = {name: sorted(pictures(root, name)) for name in names}
    flat = sorted(file for file in os.listdir(root) if is_picture(file) and not (root / file).is_dir())
    if flat and any(inside.values()):
        within = next(name for name, files in inside.items() if files)
        raise Refused(f"{root} holds pictures ({flat[0]}) beside folders of them ({within}); give one kind")
    if flat:
        return Folder(root, flat, None, ())
    if not any(inside.values()):
        raise Refused(f"{root} holds no pictures ({', '.join(EXTENSIONS)})")
    numbers = label_of(root, names, dataset, num_classes)
    files = [file for name in names for file in inside[name]]
    labels = [numbers[name] for name in names for _ in inside[name]]
    named = not all(map(str.isdecimal, names))
    return Folder(root, files, np.array(labels, dtype=np.int64), names if named else ())


def label_of(root: Path, names: Sequence[str], dataset: str, num_classes: int) -> dict[str, int]:
    """The label of each class folder."""
    by_name = dataset in BY_NAME and len(names) == num_classes
    streamed = dataset in ("imagenette", "imagenet")  # whose own folders count in this order too
    if all(re.fullmatch(r"\d+", name) for name in names) and not streamed:
        beyond = [name for name in names if int(name) >= num_classes]
        if beyond:
            raise Refused(f"{root / beyond[0]}: the model knows classes 0 to {num_classes - 1}")
        return {name: int(name) for name in names}
    if by_name:
        return {name: label for label, name in enumerate(names)}
    cure = "put the pictures into one folder without labels"
    if not streamed:
        cure = f"name them by their labels, 0 to {num_classes - 1}, or {cure}"
    why = (
        f"has {len(names)} class folders, the model {num_classes} classes"
        if dataset in BY_NAME
        else f"has class folders like {names[0]!r}, and {dataset}'s labels are no order of names"
    )
    raise Refused(f"{root} {why}; {cure}")


def pictures(root: Path, name: str) -> Iterator[str]:
    """The pictures below one class folder, relative to `root`; none twice where links lead in circles."""
    seen: set[str] = set()
    for where, inner, files in os.walk(root / name, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [folder for folder in inner if not folder.startswith(".")]
        yield from (os.path.relpath(os.path.join(where, file), root) for file in files if is_picture(file))


def holds_pictures(path: Path) -> bool:
    """A folder, or one picture."""
    return path.is_dir() or is_picture(path.name)


def is_picture(name: str) -> bool:
    """By its ending, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
