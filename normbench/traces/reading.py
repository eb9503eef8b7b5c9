"""What sessions have traced, read from their CSV files arm by arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from normbench.csv_files import read_together
from normbench.figures import thin
from normbench.identity import short_names
from normbench.results import session_names
from normbench.stats.order import choose_baseline, in_order
from normbench.traces.tables import COLUMNS

TEXTS = ("layer", "part")
Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Traces:
    """Traced tables by arm: a file's columns and `session`, the folder's name; arms without are not there.

    Args:
        arms: all of them in the tables' order, those without traces too; an arm's colour is its place here.
    """

    arms: Sequence[str]
    norms: Tables
    features: Tables
    logits: Tables

    @property
    def empty(self) -> bool:
        """Whether nothing was traced."""
        return not (self.norms or self.features or self.logits)


def arms_of(study: Path, session: str | None = None) -> dict[str, list[Path]]:
    """Every arm's session folders in the tables' order; of `session` alone where it is given."""
    folders: dict[str, list[Path]] = {}
    for name in session_names(study):
        setting, own = name.split("/")
        folders.setdefault(setting, []).extend([study / name] if session in (None, own) else [])
    labels = short_names({setting: setting.rpartition("-")[0] for setting in folders})
    arms = {labels[setting]: paths for setting, paths in folders.items()}
    return {label: arms[label] for label in in_order(arms, choose_baseline(list(arms), None))}


def read_traces(arms: Mapping[str, Sequence[Path]], notices: list[str]) -> Traces:
    """The traces of these session folders; a file that cannot be read is a notice."""
    tables: dict[str, dict[str, pd.DataFrame]] = {kind: {} for kind in COLUMNS}
    for kind, found in tables.items():
        for label, folders in arms.items():
            files = {folder.name: folder / "traces" / f"{kind}.csv" for folder in folders}
            table = read_together(files, COLUMNS[kind], texts=TEXTS, notices=notices)
            if table is not None:
                found[label] = at_few_steps(table)
    return Traces(list(arms), tables["norms"], tables["features"], tables["logits"])


def at_few_steps(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at as many of its steps as are drawn, the first and the last among them."""
    steps = np.sort(table["step"].unique())
    kept = steps[thin(steps.size)]
    return table if kept.size == steps.size else table[table["step"].isin(kept)]
