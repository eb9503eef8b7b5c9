"""What a report is made from: a study's plan, progress and comparison, and the folders of its sessions."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normbench.identity import short_names
from normbench.overview import Overview, look
from normbench.plan import Plan
from normbench.results import session_names
from normbench.stats.choices import analysis_of
from normbench.values import Refused

if TYPE_CHECKING:
    from normbench.stats.analysis import Analysis, Group


@dataclass(frozen=True)
class ArmFiles:
    """An arm as its files: its name in tables, its setting's folder, its sessions' folders that exist."""

    label: str
    setting: Path
    sessions: Sequence[Path]


@dataclass(frozen=True)
class Part:
    """Arms that are compared with each other; `group` is None as long as no session has ended."""

    title: str
    arms: Sequence[ArmFiles]
    group: "Group | None"


@dataclass
class Study:
    """All that a report shows, or where it lies.

    Args:
        folder: `outputs/<study>`.
        plan: the newest, None with --all and where there is none.
        progress: what every session is doing.
        analysis: the comparison; None as long as no session has ended.
        parts: the arms, in the tables' order; more than one with --by.
        notices: what could not be read, and why.
    """

    folder: Path
    plan: Plan | None
    progress: Overview
    analysis: "Analysis | None"
    parts: Sequence[Part]
    notices: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The study's."""
        return self.folder.resolve().name

    @property
    def question(self) -> str:
        """What the study asks, where its YAML says it."""
        said = self.values_of(self.plan.arms[0].setting).get("study") if self.plan else None
        return str((said or {}).get("question") or "")

    def values_of(self, setting: str) -> Mapping[str, Any]:
        """Every value that a setting runs with, by the plan; nothing where none says it."""
        arms = self.plan.arms if self.plan else []
        return next((arm.values for arm in arms if arm.setting == setting), {})


def read_study(folder: Path, given: argparse.Namespace, patient: bool = False) -> Study:
    """A study's files as they are now.

    `patient`: while sessions are still to come, a comparison that is refused is a notice.
    """
    progress = look(folder, given.all)
    plan = None if given.all else Plan.newest(folder)
    analysis, notices = None, []
    if any(arm.done or arm.failed for arm in progress.arms):
        try:
            analysis = analysis_of([str(folder)], given)
        except Refused as refused:
            if not patient or progress.ended:
                raise
            notices.append(f"no comparison yet: {refused}")
    return Study(folder, plan, progress, analysis, parts_of(folder, plan, analysis), notices)


def parts_of(folder: Path, plan: Plan | None, analysis: "Analysis | None") -> list[Part]:
    """The arms of every group, and of a single group also those that have no row yet."""
    there = folders_by_setting(folder, plan)
    names = plan_names(plan, there)
    if analysis is None:
        return [Part("", [ArmFiles(names[s], folder / s, there.get(s, [])) for s in names], None)]
    parts = []
    for group in analysis.groups:
        settings = {label: str(group.arms[label].rows["setting"].iloc[0]) for label in group.order()}
        arms = [ArmFiles(label, folder / s, there.get(s, [])) for label, s in settings.items()]
        if len(analysis.groups) == 1:
            waiting = [s for s in names if s not in settings.values()]
            arms += [ArmFiles(names[s], folder / s, there.get(s, [])) for s in waiting]
        parts.append(Part(group.title, arms, group))
    return parts


def plan_names(plan: Plan | None, there: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """setting → its short name, of all arms of the plan, else of all folders."""
    ids = {arm.setting: arm.arm for arm in plan.arms} if plan else {s: s.rpartition("-")[0] for s in there}
    return short_names(ids)


def folders_by_setting(folder: Path, plan: Plan | None) -> dict[str, list[Path]]:
    """Every setting's session folders that exist; of a plan only its own, in its order."""
    found: dict[str, list[Path]] = {}
    if plan:
        for planned in plan.sessions:
            path = plan.session_folder(planned)
            if path.is_dir():
                found.setdefault(plan.arms[planned.arm].setting, []).append(path)
        return found
    for name in session_names(folder):
        setting, _, session = name.partition("/")
        found.setdefault(setting, []).append(folder / setting / session)
    return found
