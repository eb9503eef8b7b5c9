"""A report as Markdown: the same words and tables, figures as files beside it."""

import re
from collections.abc import Iterator
from pathlib import Path

from normbench.report.drawing import Drawing
from normbench.report.sections import Report, Table

SPECIAL = re.compile(r"([\\`*_\[\]|#$~])")


def markdown_of(report: Report, folder: Path) -> str:
    """The text; figures are linked relative to `folder`."""
    return "\n\n".join(parts_of(report, folder)) + "\n"


def parts_of(report: Report, folder: Path) -> Iterator[str]:
    """Paragraphs, tables and figures in order."""
    yield f"# {plain(report.question or report.name)}"
    yield plain(str(report.finding) if report.finding else report.waiting)
    if report.warned:
        yield plain(report.warned)
    yield "; ".join(f"{plain(name)} {plain(value)}" for name, value in report.facts) + "."
    for section in report.sections:
        yield f"## {plain(section.title)}"
        yield from map(with_code, section.words)
        for block in section.blocks:
            if isinstance(block, Table):
                yield from table(block)
            elif isinstance(block, Drawing):
                yield from figure(block, folder)
        if section.terms:
            yield "\n".join(f"- **{plain(term)}**: {with_code(words)}" for term, words in section.terms)
    yield plain(report.made)


def plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", re.sub(r"\s+", " ", text)).replace("&", "&amp;").replace("<", "&lt;")


def with_code(text: str) -> str:
    """The same, with what stands between backticks as code."""
    pieces = re.sub(r"\s+", " ", text).split("`")
    return "".join(plain(piece) if i % 2 == 0 else f"`{piece}`" if piece else ""
                   for i, piece in enumerate(pieces))  # fmt: skip


def figure(block: Drawing, folder: Path) -> Iterator[str]:
    """A picture, its title and how to read it."""
    yield f"### {plain(block.title)}"
    yield f"![{plain(block.alt)}]({block.file.relative_to(folder).as_posix()})"
    if block.caption:
        yield plain(block.caption)


def table(block: Table) -> Iterator[str]:
    """A table and what is said below it."""
    yield f"**{plain(block.title)}**"
    lines = ["| " + " | ".join(map(plain, row)) + " |" for row in (block.head, *block.rows)]
    lines.insert(1, "|" + "|".join("---" if name in block.left else "---:" for name in block.head) + "|")
    yield "\n".join(lines)
    if block.why:
        yield "\n".join(f"- **{plain(name)}**: {plain(reason)}" for name, reason in block.why)
    yield from map(plain, block.below)
