"""When two sessions belong to one setting: the one function that decides, and the names it gives.

In: the chosen names of model, dataset and norm, and every value that can change a result, as written. Out:
the study that asked, the session and seed, shorthands, and where and how it runs. null and false are left
out, so a key added later with one of them as its default renames nothing.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normbench.config import Values, flatten

OUTSIDE = {
    *("study", "fidelity", "plan", "session", "seed"),  # what asked for it, and which repetition
    "stride",  # folded into norm.stride
    *("threads", "data_dir", "out", "tensorboard", "save_model", "dataset.download", "dataset.workers"),
}
MAX_ID = 80


@dataclass(frozen=True)
class Setting:
    """A setting's names: `id` is for people, `hash` decides, `name` is its folder."""

    id: str
    hash: str

    @property
    def name(self) -> str:
        return f"{self.id}-{self.hash}"


def identify(
    values: Values, choices: Mapping[str, str], usual: Values, usual_choices: Mapping[str, str]
) -> Setting:
    """The setting of checked values; the usual values and choices only shorten the readable id."""
    kept = result_changing(values, choices)
    text = json.dumps({k: kept[k] for k in sorted(kept)}, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    expected = result_changing(usual, choices)
    words = [choices["norm"], choices["model"], choices["dataset"]]
    words += [
        choices[group] for group in ("optim", "optim/schedule") if choices[group] != usual_choices[group]
    ]
    norm_words = 1
    for key in dict.fromkeys([*kept, *expected]):
        value = kept.get(key, False)  # what is left out is false or null
        if value != expected.get(key, False) and (key, value) != ("epochs", False):
            place = norm_words if key.startswith("norm.") else len(words)
            words.insert(place, token(key, value))
            norm_words += key.startswith("norm.")
    name = words[0]
    for word in words[1:]:
        if len(name) + len(word) < MAX_ID:
            name = f"{name}-{word}"
    return Setting(name, digest)


def short_names(ids: Mapping[str, str]) -> dict[str, str]:
    """setting → its id without the words that all share; the setting itself where that is not unique."""
    words = {setting: id.split("-") for setting, id in ids.items()}
    shared = set.intersection(*map(set, words.values()))
    short = {setting: "-".join(w for w in ws if w not in shared) for setting, ws in words.items()}
    if len(ids) == 1:
        return dict(ids)
    unique = len(set(short.values())) == len(short) and all(short.values())
    return short if unique else dict(zip(ids, ids, strict=True))


def result_changing(values: Values, choices: Mapping[str, str]) -> Values:
    """The flat values that make a setting what it is."""
    kept: Values = {group: choices[group] for group in ("model", "dataset", "norm")}
    for key, value in flatten(values):
        leaf = key.rpartition(".")[2]
        named = leaf == "_target_" and not (key == "norm._target_" and choices["norm"] == "custom")
        if named or leaf == "_partial_" or key in OUTSIDE or key.split(".")[0] in OUTSIDE:
            continue
        value = canonical(key, value)
        if value is not None and value is not False:
            kept[key] = value
    return kept


def canonical(key: str, value: Any) -> Any:
    """1.0 and 1 are one value; a device's index is not part of it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [canonical(key, item) for item in value]
    return value.split(":")[0] if key == "device" else value


SHORT = {"batch.size": "bs", "optim.name": "", "optim.schedule.name": "", "optim.weight_decay": "wd",
         "precision": "", "select": "", "device": ""}  # fmt: skip


def token(key: str, value: Any) -> str:
    """`stride4`, `lr0.2`, `no-train_gate`: a difference from the defaults as a word for a file name."""
    leaf = SHORT.get(key, key.rpartition(".")[2])
    if isinstance(value, bool):
        return leaf if value else f"no-{leaf}"
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+=~-]", "_", f"{leaf}{text}")
