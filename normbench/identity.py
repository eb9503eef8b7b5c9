"""When two sessions belong to one setting: the one function that decides, and the names it gives.

In: the chosen names of model, dataset and norm, and every value that can change a result, as written. Out:
the study that asked, the session and seed, shorthands, and where and how it runs. null and false are left
out, so a key added later with one of them as its default renames nothing; LATER names the others.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normbench.config import Values, flatten
from normbench.rules import interval

OUTSIDE = {
    *("study", "fidelity", "plan", "session", "seed"),  # what asked for it, and which repetition
    *("config_hash", "choices"),  # config.yaml's own
    "stride",  # folded into norm.stride
    *("threads", "cuda_graph", "data_dir", "out", "tensorboard", "save_model", "checkpoint"),
    *("trace", "traces"),
    *("retry_failed", "fail_fast", "stop_when_decided", "margin"),
    *("dataset.download", "dataset.workers", "dataset.cache"),
}
# keys added later whose default is a word: left out at it
LATER = {"model.weight": "none", "norm.sample": "stride"}
LATER_OF = {name: {"norm.impl": "reference"} for name in ("bn", "bn_no_affine", "cumulative_bn")}
MAX_ID = 160  # with the hash and a seed's prefix well below what a file name may have


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
    """The setting of checked values; the usual values and choices only shorten the readable id.

    An id is the norm, its options, model, dataset, and what else differs from the usual, joined by "-", which
    no word contains. One that would be too long ends in "~" and part of the hash.
    """
    kept = result_changing(values, choices)
    digest = digest_of(kept)
    expected = result_changing(usual, choices)
    differs = [
        key for key in dict.fromkeys([*kept, *expected]) if value_of(kept, key) != value_of(expected, key)
    ]
    words = [
        choices["norm"],
        *(word(key, kept) for key in differs if key.startswith("norm.")),
        choices["model"],
        choices["dataset"],
        *(choices[g] for g in ("optim", "optim/schedule") if choices[g] != usual_choices[g]),
        *(word(key, kept) for key in differs if not key.startswith("norm.")),
    ]
    name = "-".join(w for w in words if w)
    return Setting(name if len(name) <= MAX_ID else f"{name[: MAX_ID - 5]}~{digest[:4]}", digest)


def digest_of(kept: Values) -> str:
    """The hash of result-changing values."""
    text = json.dumps({k: kept[k] for k in sorted(kept)}, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def value_of(kept: Values, key: str) -> Any:
    """What is left out is false or null, or the word in LATER."""
    return kept.get(key, LATER.get(key, False))


def short_names(ids: Mapping[str, str]) -> dict[str, str]:
    """setting → its id without the words that all share (its norm stays); the setting where not unique."""
    words = {setting: id.split("-") for setting, id in ids.items()}
    shared = set.intersection(*map(set, words.values())) if len(ids) > 1 else set()
    short = {
        setting: "-".join([norm, *(w for w in rest if w not in shared)])
        for setting, (norm, *rest) in words.items()
    }
    return short if len(set(short.values())) == len(short) else dict(zip(ids, ids, strict=True))


def outside(key: str) -> bool:
    """Whether a key is no part of a setting."""
    return key in OUTSIDE or key.split(".")[0] in OUTSIDE


def result_changing(values: Values, choices: Mapping[str, str]) -> Values:
    """The flat values that make a setting what it is."""
    kept: Values = {group: choices[group] for group in ("model", "dataset", "norm")}
    unit = "epochs" if values["steps"] is None else "steps"
    for key, value in flatten(values):
        leaf = key.rpartition(".")[2]
        named = leaf == "_target_" and not (key == "norm._target_" and choices["norm"] == "custom")
        if named or leaf == "_partial_" or outside(key):
            continue
        if key == "eval_every":
            every = interval(key, value, unit)
            value = f"{every.count}{every.unit}"
        value = canonical(key, value)
        added = LATER | LATER_OF.get(choices["norm"], {})
        later = None if key.startswith("norm.") and choices["norm"] == "custom" else added.get(key)
        if value is not None and value is not False and value != later:
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
         "optim.momentum": "sgd_momentum", "optim.eps": "adam_eps", "precision": "", "select": "",
         "device": "", "norm._target_": "", "model.weight": ""}  # fmt: skip


def word(key: str, kept: Values) -> str:
    """`stride4`, `lr0.2`, `no_train_gate`: a difference from the usual as a word without "-"; "" for none."""
    leaf, value = SHORT.get(key, key.rpartition(".")[2]), value_of(kept, key)
    if key == "epochs" and value is False:
        return ""  # the steps say it
    if isinstance(value, bool):
        return leaf if value else f"no_{leaf}"
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+=~]", "_", f"{leaf}{text}")
