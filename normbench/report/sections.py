"""What a report says, in order, before it is HTML or Markdown: sections of words, tables and figures."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from normbench import status
from normbench.figures import Sketch, safe_stem
from normbench.profile import figures as profile_figures
from normbench.profile.tables import caveat, crowded
from normbench.report import curves, layers, method
from normbench.report.drawing import Drawing, drawings_of
from normbench.report.evidence import Evidence, evidence_of, said
from normbench.report.finding import Finding, finding_of
from normbench.report.layers import Profile
from normbench.report.study import Part, Study
from normbench.stats import tables
from normbench.stats.analysis import Analysis, Group
from normbench.stats.figures import KINDS, difference_words
from normbench.stats.metrics import Metric
from normbench.traces import figures as trace_figures
from normbench.traces.reading import Traces, read_traces

MOST_ROWS = 1000
MOST_CHANNELS = 2  # arms whose channels are drawn; each takes as long as all arms together
ROW_COLUMNS = ("session", "seed", "status", "test_acc", "test_loss", "best_test_acc", "train_loss",
               "epoch_time_s", "peak_memory_mib", "launch_order", "started_at", "warnings",
               "error")  # fmt: skip
PROSE = ("warnings", "error", "says", "forward", "backward", "class")
LEFT = ("arm", "verdict", "status", "layer", "where", "shape", "started_at", "kind", "sessions", "fused",
        "agree", "key", "what", *PROSE)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by every column, and what is said below it.

    Args:
        verdicts: by row, where its last cell is one.
        why: (name, reason) below it, under the words of `asks`.
        below: sentences below that.
        folded: opened by who wants it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdicts: Sequence[str] = ()
    why: Sequence[tuple[str, str]] = ()
    asks: str = "Each verdict's reason"
    below: Sequence[str] = ()
    folded: bool = False
    left: Sequence[str] = LEFT

    @property
    def letters(self) -> int:
        """The longest name in the first column."""
        return max(len(row[0]) for row in (self.head, *self.rows))


@dataclass
class Section:
    """A part of the page: its words, then its tables and figures in order."""

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    blocks: list[Table | Drawing | Sketch] = field(default_factory=list)
    terms: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All of it."""

    name: str
    question: str
    finding: Finding | None
    waiting: str
    warned: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    made: str


@dataclass
class Builder:
    """Makes the sections of a study; figures are saved under `folder/figures`.

    Args:
        command: what a person typed, to be shown.
        options: those of the comparison alone, as they were typed.
        at_once: processes that draw.
    """

    study: Study
    folder: Path
    profile: Profile | None
    command: Sequence[str]
    options: Sequence[str]
    at_once: int = 1

    def report(self, made: str) -> Report:
        """Every section that has something to say."""
        study, analysis = self.study, self.study.analysis
        evidence = [evidence_of(study, part.arms) for part in study.parts]
        sections = [
            self.progress(),
            self.comparison(),
            self.sessions(evidence),
            self.curves(),
            self.layers(),
            self.norms(),
            self.quantiles(),
            self.warnings(evidence),  # what the others could not read is among them
            self.provenance(evidence),
            self.method(),
        ]
        there = [section for section in sections if section]
        self.draw(there)
        kept = [s for s in there if s.blocks or s.terms or s.words]
        waiting = "" if analysis else "No session has ended yet: there is nothing to compare."
        finding = finding_of(analysis) if analysis else None
        warned = list(dict.fromkeys(w.arm for e in evidence for w in e.warnings if w.kind == "warning"))
        alarm = f"The manifests of {tables.some(warned)} hold warnings: read them below." if warned else ""
        return Report(study.name, study.question, finding, waiting, alarm, self.facts(evidence), kept, made)

    def facts(self, evidence: Sequence[Evidence]) -> list[tuple[str, str]]:
        """What stands in the page's head."""
        sweep = self.study.progress
        done, planned = (sum(getattr(arm, what) for arm in sweep.arms) for what in ("done", "planned"))
        facts = [("sessions", f"{done:,} of {planned:,} done"), ("arms", f"{len(sweep.arms):,}")]
        rows = [row for e in evidence for arm in e.rows.values() for row in arm]
        for name, column in (("model", "model"), ("data", "dataset"), ("device", "device_name"),
                             ("torch", "torch_version")):  # fmt: skip
            values = list(dict.fromkeys(str(row[column]) for row in rows if row.get(column)))
            facts += [(name, tables.some(values))] if values else []
        days = sorted(str(row["started_at"])[:10] for row in rows if row.get("started_at"))
        if days:
            facts.append(("run", days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"))
        return facts

    def draw(self, sections: Sequence[Section]) -> None:
        """Put drawings in the place of sketches, and nothing where there is nothing to draw."""
        named: dict[str, Sketch] = {}
        for section in sections:
            for block in section.blocks:
                if isinstance(block, Sketch):
                    named[safe_stem(block.parts, {name.lower() for name in named})] = block
        drawn = iter(drawings_of(named, self.folder / "figures", self.at_once))
        for section in sections:
            blocks = [next(drawn) if isinstance(block, Sketch) else block for block in section.blocks]
            section.blocks = [block for block in blocks if block is not None]

    def progress(self) -> Section | None:
        """What a sweep is doing; nothing where all has ended well."""
        sweep = self.study.progress
        if sweep.ended and not any(arm.failed for arm in sweep.arms):
            return None
        made = Section("progress", "Progress")
        made.words.append("; ".join(filter(None, (status.headline(sweep), status.to_go(sweep)))) + ".")
        head = ["arm", "done", "planned", "running", "failed", "interrupted", "to run", "to go"]
        rows = [[arm.name, str(arm.done), str(arm.planned), str(len(arm.running)), str(len(arm.failed)),
                 str(len(arm.interrupted)), str(arm.waiting), status.arm_to_go(sweep, arm)]
                for arm in sweep.arms]  # fmt: skip
        lines = [("running", status.running_lines(sweep)), ("failed", status.failed_lines(sweep)),
                 ("interrupted", status.interrupted_lines(sweep))]  # fmt: skip
        why = [(f"{kind}: {name}", what) for kind, found in lines for name, what in found]
        made.blocks.append(Table("Sessions by arm", head, rows, why=why[: 3 * status.SHOWN], asks="Which"))
        return made

    def comparison(self) -> Section | None:
        """The tables of `stats`, and every difference with its interval and margin."""
        analysis = self.study.analysis
        if analysis is None:
            return None
        lines = tables.opening(analysis, str(self.study.folder))
        made = Section("comparison", "Comparison", [" ".join(f"{sentence(line)}." for line in lines)])
        for group in analysis.groups:
            for metric in analysis.metrics:
                made.blocks.append(comparison_table(analysis, group, metric))
                made.blocks.append(self.kind("differences", analysis, group, metric))
        return made

    def kind(self, kind: str, analysis: Analysis, group: Group, metric: Metric) -> Sketch:
        """One of the figures of `stats`."""
        alt = (differences_words if kind == "differences" else means_words)(analysis, group, metric)
        parts = (*(said(value) for value in group.name.values()), metric.name, kind)
        return Sketch(parts, partial(KINDS[kind], analysis, group, metric), alt)

    def sessions(self, evidence: Sequence[Evidence]) -> Section:
        """Every session: points, launch order, and their rows."""
        made, analysis = Section("sessions", "Every session"), self.study.analysis
        if analysis:
            for group, metric, kind in product(analysis.groups, analysis.metrics, KINDS):
                if kind != "differences":
                    made.blocks.append(self.kind(kind, analysis, group, metric))
        found = [(arm, row) for e in evidence for arm, rows in e.rows.items() for row in rows]
        if found:
            head, rows = without_empty(
                ["arm", *ROW_COLUMNS],
                [[arm, *(cell(row.get(column)) for column in ROW_COLUMNS)] for arm, row in found[:MOST_ROWS]],
            )
            these = f"The first {MOST_ROWS:,} of {len(found):,}" if len(found) > MOST_ROWS else "All"
            made.blocks.append(Table(f"{these} rows; results.csv has every column", head, rows, folded=True))
        return made

    def curves(self) -> Section:
        """Learning curves."""
        made = Section("curves", "Learning curves")
        for part in self.study.parts:
            found = curves.read_curves(part.arms, self.study.notices)
            for column in curves.SHOWN:
                make = partial(curves.curves_figure, found, column, part.title)
                words = curves.curves_words(found, column)
                made.blocks.append(Sketch((part.title, "curves", column), make, words))
        return made

    def layers(self) -> Section | None:
        """A profile of the norm layers, where there is one."""
        profile = self.profile
        if profile is None:
            return None
        body = profile.body
        made = Section("layers", "Time by layer", [f"From {profile.folder}: {profile.where}."])
        made.words += filter(None, [caveat(body), crowded(body)])
        places = profile.places(self.norms_of(self.study.parts[0]))
        made.blocks += profile_figures.sketches(body, places=places)
        head, rows = layers.step_table(profile)
        made.blocks.append(Table("What norms take of a training step", head, rows))
        head, rows = layers.layer_table(profile)
        made.blocks.append(Table("Every layer", head, rows[:MOST_ROWS], folded=True))
        return made

    def norms_of(self, part: Part) -> list[tuple[str, dict[str, Any]]]:
        """Of every arm the norm's name and options, as its plan says them."""
        values = [self.study.values_of(arm.setting.name).get("norm") or {} for arm in part.arms]
        return [(arm.label.split("-")[0], {key: value for key, value in own.items() if key != "_partial_"})
                for arm, own in zip(part.arms, values, strict=True)]  # fmt: skip

    def norms(self) -> Section:
        """Traced norm layers."""
        made = Section("traces", "Inside the norm layers")
        for part, traced in self.traced:
            made.blocks += trace_figures.norm_sketches(traced, part.title, MOST_CHANNELS)
            if len(traced.norms) > MOST_CHANNELS:
                shown = ", ".join(list(traced.norms)[:MOST_CHANNELS])
                command = shlex.join(["python", "-m", "normbench.traces", str(self.study.folder)])
                made.words.append(f"Channel by channel below: {shown}; `{command}` draws all arms so.")
        return made

    def quantiles(self) -> Section:
        """Traced features and logits."""
        made = Section("quantiles", "Features and logits")
        for part, traced in self.traced:
            made.blocks += trace_figures.output_sketches(traced, part.title)
        return made

    @cached_property
    def traced(self) -> Sequence[tuple[Part, Traces]]:
        """Every part's traces."""
        return [(part, read_traces({arm.label: arm.sessions for arm in part.arms}, self.study.notices))
                for part in self.study.parts]  # fmt: skip

    def warnings(self, evidence: Sequence[Evidence]) -> Section:
        """Options without effect, parameters that never moved, and what could not be read."""
        made = Section("warnings", "Warnings")
        rows = [[w.arm, w.kind, w.text, w.sessions] for e in evidence for w in e.warnings]
        finished = sum(e.finished for e in evidence)
        if rows:
            made.words.append("What the sessions' manifests say; a note is nothing to worry about.")
            made.blocks.append(Table("By arm", ["arm", "kind", "says", "sessions"], rows))
        elif finished:
            made.words.append("None: no option was without effect, and every trainable parameter moved.")
        made.words += [f"Not read: {notice}." for notice in dict.fromkeys(self.study.notices)]
        return made

    def provenance(self, evidence: Sequence[Evidence]) -> Section:
        """Hardware, versions, commit, and how the arms' configurations differ."""
        made = Section("provenance", "Where it ran, and what differs")
        for part, e in zip(self.study.parts, evidence, strict=True):
            known = [arm for arm in e.arms if e.rows[arm]]
            equal = [[f.name, f.values[0]] for f in e.machine if f.shared]
            equal += [["images", images] for images in e.images]
            if equal:
                title = " ".join(filter(None, [part.title, "Equal in all arms"]))
                made.blocks.append(Table(title, ["what", "value"], equal, left=("what", "value")))
            unequal = [[f.name, *f.values] for f in e.machine if not f.shared]
            if unequal:
                made.blocks.append(Table("Not equal", ["what", *known], unequal, left=("what", *known)))
            arms = e.arms[: len(e.differences[0].values)] if e.differences else []
            if e.differences:
                title = "How the arms' configurations differ"
                rows = [[f.name, *f.values] for f in e.differences]
                made.blocks.append(Table(title, ["key", *arms], rows, left=("key", *arms)))
            if e.ran:
                head = ["arm", "layers", "class", "fused", "forward", "backward", "says"]
                rows = [[r.arm, str(r.layers), r.classes, r.fused, r.forward, r.backward, r.note]
                        for r in e.ran]  # fmt: skip
                head, rows = without_empty(head, rows)
                title = "What the norm layers executed (one session of each arm; most calls in one layer)"
                made.blocks.append(Table(title, head, rows))
        return made

    def method(self) -> Section:
        """How every number was made."""
        made, analysis = Section("method", "How every number was made"), self.study.analysis
        if analysis:
            made.terms += method.of_comparison(analysis)
            stats = shlex.join(["python", "-m", "normbench.stats", str(self.study.folder), *self.options])
            made.terms.append(("The same numbers", f"`{stats}`; {method.FILES}"))
        made.terms += method.GENERAL
        if self.profile:
            made.terms.append(("Layer times", f"`{self.profile.folder}/profile.json`: {method.LAYERS}"))
        if any(not traced.empty for _, traced in self.traced):
            made.terms.append(("Traces", method.TRACES))
        command = shlex.join(["python", "-m", "normbench.report", *self.command])
        made.terms.append(("This page", f"`{command}`; each figure is also a file in `figures/`."))
        return made


def comparison_table(analysis: Analysis, group: Group, metric: Metric) -> Table:
    """A table of `stats`, its reasons below."""
    page, rows = tables.page(analysis, group, metric), analysis.of(group, metric)
    reasons = [(c.treatment, f"{c.verdict}: {c.reason}") for c in rows]
    more = page.below[len(rows) :]
    return Table(page.title, page.header, page.rows, page.verdicts, reasons, below=more)


def sentence(line: str) -> str:
    """A line that begins like a sentence, unless with a path."""
    return line if "/" in line.split(":")[0] else line[:1].upper() + line[1:]


def cell(value: object) -> str:
    """A value of a row."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def without_empty(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without columns that say nothing."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def differences_words(analysis: Analysis, group: Group, metric: Metric) -> str:
    """The forest plot in words."""
    return "; ".join(
        f"{c.treatment} {difference_words(c, metric)}: {c.verdict}" for c in analysis.of(group, metric)
    )


def means_words(analysis: Analysis, group: Group, metric: Metric) -> str:
    """The arms' means and ranges in words."""
    said = []
    for label in group.order():
        x = group.arms[label].values(metric.name)
        if x.size:
            mean, low, high = (tables.number(float(v), metric) for v in (x.mean(), x.min(), x.max()))
            said.append(f"{label} mean {mean}, {low} to {high}")
    return "; ".join(said)
