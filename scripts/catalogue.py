"""Writes docs/norms.md, the catalogue, from conf/norm/ and the layers' docstrings.

python scripts/catalogue.py             from the costs kept in docs/norms_cost.csv
python scripts/catalogue.py --measure   measures the costs anew first, some minutes
"""

import argparse
import inspect
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf

from normbench import device
from normbench.audit.behaviour import statistics
from normbench.audit.cost import SHAPE, ratio
from normbench.audit.subject import Subject
from normbench.config import conf_dir

DOCS = Path(__file__).parents[1] / "docs"
COSTS = DOCS / "norms_cost.csv"
ROUNDS = 60
MAP = (64, 64, 8, 8)  # the inputs that parameters and state are counted for
FAMILIES = {
    "Batch norm and its relatives": "obn torch_bn bn bn_no_affine sync_bn bnwos ghost cumulative_bn "
    "memorized_bn mean_bn var_bn l1bn range_bn ebn mabn cbn bnrs brn brnc renorm",
    "Statistics from a sample of the batch": "mbn mbn_rows mbn_batch mbn_random",
    "Statistics of each sample by itself": "in ln ln_elementwise gn pono rms pixel lrn divisive frn "
    "evonorm_s0 evonorm_b0 grn proxy",
    "Mixtures": "bin switchable sparse_switchable",
    "Whitening": "dbn dbn_cholesky dbn_group iternorm",
    "Transforms of the distribution": "pit_uniform pit_gaussian",
    "No statistics": "dyt dyisru derf nn",
}
SECTIONS = ("Args", "Shape", "State", "Raises", "Source")


@dataclass(frozen=True)
class Entry:
    """One name of conf/norm/ with what its YAML and its class say."""

    name: str
    says: str
    values: dict[str, Any]

    @property
    def subject(self) -> Subject:
        return Subject(self.values, 12)

    @property
    def target(self) -> type:
        return self.subject.layer_class  # type: ignore[return-value]

    @property
    def doc(self) -> dict[str, str]:
        """The docstring by its parts: summary, formula, axes, and the named sections."""
        head, _, rest = (inspect.getdoc(self.target) or "").partition("\nArgs:")
        blocks = [block for block in head.split("\n\n") if block.strip()]
        parts = {"summary": " ".join(blocks[0].split())}
        parts["formula"] = "\n".join(b for b in blocks[1:] if b.startswith("    "))
        parts["axes"] = " ".join(" ".join(b.split()) for b in blocks[1:] if not b.startswith("    "))
        found = re.split(rf"^({'|'.join(SECTIONS)}):", f"Args:{rest}", flags=re.M)[1:]
        return parts | {k: v for k, v in zip(found[::2], found[1::2], strict=True)}

    @property
    def options(self) -> Iterator[tuple[str, Any, str]]:
        """Name, value in the YAML, meaning."""
        meant = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", self.doc["Args"], flags=re.M))
        for key, value in self.values.items():
            if not key.startswith("_"):
                yield key, value, " ".join(meant[key].split())


def entries() -> list[Entry]:
    """Every layer of conf/norm/, in the order of the families."""
    found = []
    for name in " ".join(FAMILIES.values()).split():
        path = conf_dir() / "norm" / f"{name}.yaml"
        config = OmegaConf.load(path)
        if "stride" in config:
            config.stride = 1 if name == "mbn" else 2
        values = OmegaConf.to_container(config, resolve=True)
        says = path.read_text().splitlines()[0].removeprefix("# ")
        found.append(Entry(name, says, values))  # type: ignore[arg-type]
    return found


def measure(found: list[Entry]) -> pd.DataFrame:
    """Forward and backward time of every layer beside `obn`'s, in rounds that alternate."""
    torch.set_num_threads(1)
    rows = []
    for entry in found:
        median, low, high = ratio(entry.subject, ROUNDS)
        rows.append({"norm": entry.name, "times_obn": median, "p20": low, "p80": high})
        print(f"{entry.name:20} {median:.2f} ({low:.2f} to {high:.2f})", flush=True)
    about = {
        "shape": "x".join(map(str, SHAPE)),
        "dtype": "float32",
        "threads": 1,
        "rounds": ROUNDS,
        "device": device.name_of(torch.device("cpu")),
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "measured": datetime.now(UTC).date().isoformat(),
    }
    return pd.DataFrame(rows).assign(**about)


def page(found: list[Entry], costs: pd.DataFrame) -> str:
    """The catalogue as Markdown."""
    about = costs.iloc[0]
    cost = {row.norm: row for row in costs.itertuples()}
    by_name = {entry.name: entry for entry in found}
    sizes, paid = "×".join(map(str, MAP)), about["shape"].replace("x", "×")
    lines = f"""\
# The catalogue

Made by `scripts/catalogue.py` from `conf/norm/` and the layers' docstrings; do not edit. Every layer takes (N, C, *) with
0 to 3 spatial axes. *Depends on* is found by probing one output of the layer as its YAML stands; `python -m
normbench.audit norm=<name>` shows the whole card. *Parameters* and *state* count numbers, for {sizes} inputs. *Cost*
is forward and backward time over `obn`'s in alternating rounds, median of {about.rounds} (20th to 80th percentile):
{paid} {about["dtype"]}, {about.threads} thread, {about.device}, torch {about.torch_version}, {about.measured}. Untested on CUDA.
`cbn` stands here without the layer that feeds it; in a model it also measures how its moments follow that
layer's weight.
""".splitlines()  # noqa: E501
    lines.append("")
    for family, names in FAMILIES.items():
        lines += [f"## {family}", "", "| norm | what it is | depends on | parameters | state | cost |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for name in names.split():
            lines.append(row(by_name[name], cost[name]))
        lines.append("")
        seen: set[type] = set()
        for name in names.split():
            entry = by_name[name]
            lines += section(entry, first=entry.target not in seen)
            seen.add(entry.target)
    return "\n".join(lines).rstrip() + "\n"


def row(entry: Entry, cost: Any) -> str:
    """The layer in one line of its family's table."""
    layer = entry.subject.build(torch.float32, MAP)
    parameters = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    state = sum(b.numel() for b in layer.buffers())
    depends = statistics(entry.subject)
    paid = f"{cost.times_obn:.2g} ({cost.p20:.2g} to {cost.p80:.2g})"
    return f"| [`{entry.name}`](#{entry.name}) | {entry.says} | {depends} | {parameters} | {state} | {paid} |"


def section(entry: Entry, first: bool) -> list[str]:
    """The layer's formula, options and source; an alias of a class already shown gives its options alone."""
    doc = entry.doc
    lines = [f"### {entry.name}", ""]
    if first:
        formula = inspect.cleandoc("\n" + doc["formula"])
        lines += [doc["summary"], "", "```", formula, "```", "", doc["axes"], ""]
    else:
        lines += [f"`{entry.target.__name__}` again: {entry.says}.", ""]
    for key, value, meaning in entry.options:
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        lines.append(f"- `{key}={shown}`: {meaning}" if first else f"- `{key}={shown}`")
    lines.append("")
    if first:
        source, _, differs = " ".join(doc["Source"].split()).partition("Differs from the source in:")
        lines += [
            f"*State:* {' '.join(doc['State'].split())}",
            f"*Source:* {source.strip()} *Differs in:* {differs.strip()}",
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/norms.md.")
    parser.add_argument("--measure", action="store_true", help="measure the costs anew")
    found = entries()
    if parser.parse_args().measure:
        measure(found).to_csv(COSTS, index=False, float_format="%.4g")
    (DOCS / "norms.md").write_text(page(found, pd.read_csv(COSTS)))


if __name__ == "__main__":
    main()
