"""One session's folder: claimed, filled while it trains, closed by session.json, the row and its evidence."""

import contextlib
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normbench import device as machine
from normbench import ranks
from normbench.building import norm_layers_of
from normbench.checkpoint import Body, Checkpoints
from normbench.claim import Claim
from normbench.config import norm_that_runs
from normbench.course import Course, Run, Totals
from normbench.doors import say
from normbench.failure import last_line
from normbench.identity import short_names
from normbench.manifest import idle_options, never_moved
from normbench.plan import Plan, Planned, utc_now, write_json, write_whole
from normbench.progress import SessionProgress
from normbench.results import COLUMNS, EpochTable, Outcome, Row, finite, git_commit
from normbench.scalars import Scalars
from normbench.seeds import Seeds
from normbench.traces.writing import SessionTraces
from normbench.training import Prepared, settings_of, start, train, warm_up


@dataclass
class Claimed:
    """A session that this process is to train: its place in the plan, its claim (None on a rank that only
    follows), its parameters at the start, on the CPU, and the checkpoint that it goes on from."""

    plan: Plan
    planned: Planned
    claim: Claim | None
    started_at: str
    first: dict[str, Tensor] = field(default_factory=dict)
    saved: Body | None = None

    @property
    def folder(self) -> Path:
        """The session's."""
        return self.plan.session_folder(self.planned)

    @property
    def seat(self) -> int:
        """Its place in its pack: the same whoever else is there, so that its numbers are too."""
        return self.plan.seat(self.planned)

    @property
    def seeds(self) -> Seeds:
        """Its random numbers."""
        return Seeds(self.planned.seed, self.planned.session)

    @property
    def title(self) -> str:
        """What people read."""
        names = short_names({arm.setting: arm.arm for arm in self.plan.arms})
        return f"{names[self.plan.arms[self.planned.arm].setting]} s{self.planned.session}"

    @property
    def row(self) -> Row:
        """The columns that are known before it trains."""
        return started(self.plan, self.planned, self.started_at)

    @property
    def step(self) -> int:
        """What it goes on from."""
        return int(self.saved["step"]) if self.saved else 0


def run_pack(ready: Prepared, pack: Sequence[Claimed]) -> None:
    """Train the sessions of a pack, or the one that is alone, in their folders.

    Those that go on from different steps are trained one group after another.
    """
    with settings_of(ready.config, ready.device):
        start(ready, *seeds_of(ready, pack))
        for each in pack:  # before the warm-up, from which peak memory counts
            own = ready.models[each.seat].named_parameters()
            each.first = {name: parameter.detach().cpu().clone() for name, parameter in own}
        warm_up(ready, *seeds_of(ready, pack))
        waiting: dict[int, list[Claimed]] = {}
        for each in pack:
            checkpoints = Checkpoints(each.folder, None)
            each.saved = ranks.told(checkpoints.read() if each.claim else None)
            waiting.setdefault(each.step, []).append(each)
        while waiting:
            step = max(waiting)
            group = waiting.pop(step)
            start(ready, *seeds_of(ready, group))
            totals = Totals(ready.device, len(ready.models))
            courses = [course_of(ready, each, totals) for each in group]
            if None in courses:
                for each, course in zip(group, courses, strict=True):
                    waiting.setdefault(step if course else 0, []).append(each)
                continue
            run_group(ready, group, [course for course in courses if course])


def seeds_of(ready: Prepared, sessions: Sequence[Claimed]) -> list[Seeds]:
    """The random numbers of every seat; a seat whose session is not here does what the first does."""
    seats = {each.seat: each.seeds for each in sessions}
    return [seats.get(seat, sessions[0].seeds) for seat in range(len(ready.models))]


def course_of(ready: Prepared, each: Claimed, totals: Totals) -> Course | None:
    """How far a started session is, its checkpoint written over its start; None where that does not fit."""
    if each.saved is None:
        return Course(ready, each.seat, totals)
    try:
        return Course.resumed(ready, each.seat, totals, each.saved)
    except (KeyError, TypeError, RuntimeError) as error:
        # other code wrote it, of other tensors
        why = f"its checkpoint does not fit ({last_line(error)}); starts again"
        if each.claim:
            say(f"{each.folder}: {why}", error=True)
        each.saved = None
        return None


def run_group(ready: Prepared, group: Sequence[Claimed], courses: Sequence[Course]) -> None:
    """Train started sessions that are at one step to their ends."""
    config, step = ready.config, courses[0].step
    seeds = seeds_of(ready, group)
    quiet = group[0].claim is None
    title = group[0].title + (f"-s{group[-1].planned.session}" if len(group) > 1 else "")
    with contextlib.ExitStack() as stack:
        runs = []
        for each, course in zip(group, courses, strict=True):
            checkpoints = Checkpoints(each.folder, config.checkpoint_every)
            if each.claim:
                checkpoints.held = each.claim.held
            path = each.folder / "epochs.csv" if each.claim else Path(os.devnull)
            table = stack.enter_context(contextlib.closing(EpochTable(path, course.rows)))
            folder = each.folder / "tb" if config.tensorboard and each.claim else None
            scalars = stack.enter_context(contextlib.closing(Scalars(folder, course.step)))
            scalars.begin(each.row)
            folder = each.folder / "traces" if each.claim else None
            traces = SessionTraces(folder, config.trace, course.step, scalars, each.seat)
            stack.enter_context(contextlib.closing(traces))
            runs.append(Run(each.title, course, table, scalars, traces, checkpoints))
        progress = stack.enter_context(SessionProgress(title, ready.total_steps, quiet))
        if step:
            progress.skip(step)
        open_runs = runs
        while open_runs:
            train(ready, seeds, open_runs, progress)
            ready.optimizer.zero_grad()  # between its sessions a setting holds no gradients
            for each, run in zip(group, runs, strict=True):
                if run in open_runs and run.outcome and each.claim:
                    finish(ready, each, run)
            open_runs = [run for run in open_runs if run.outcome is None and not run.lost]


def finish(ready: Prepared, each: Claimed, run: Run) -> None:
    """Close an ended session: its weights if asked, session.json, one line."""
    folder, config, outcome = each.folder, ready.config, run.outcome
    if outcome is None or each.claim is None:
        raise RuntimeError(f"{folder} has not ended here")
    threads = torch.get_num_threads()
    manifest = make_manifest(ready, each.seat, each.first)
    if config.save_model:
        buffer = io.BytesIO()
        torch.save(run.weights, buffer)
        write_whole(folder / "model.pt", buffer.getvalue())
    row = {**each.row, **measured(ready, outcome, manifest)}
    row = {column: row.get(column) for column in COLUMNS} | {"threads": threads}
    parts = {"train": ready.data.train, "val": ready.data.val, "test": ready.data.test}
    images = {name: part.num_samples for name, part in parts.items() if part}
    values = each.plan.arms[each.planned.arm].values
    each.claim.held()
    write_json(
        folder / "session.json",
        finite({"row": row, "images": images, "manifest": manifest, "config": values}),
    )
    run.scalars.end(row, outcome.rows[-1].step)
    (folder / "failure.json").unlink(missing_ok=True)
    if run.body is None:
        run.checkpoints.remove()
    else:
        run.checkpoints.write(run.body)
    paid = "no whole epoch" if row["epoch_time_s"] is None else f"{row['epoch_time_s']:.3f} s an epoch"
    accuracy = f"test_acc {outcome.reported.test_acc:.4f}, {paid}"
    say(f"{run.title}: {outcome.status}, {accuracy}, row in {folder / 'session.json'}")


def started(plan: Plan, planned: Planned, started_at: str) -> Row:
    """The columns that are known before a session trains."""
    arm = plan.arms[planned.arm]
    values, norm = arm.values, norm_that_runs(arm.values)
    return {
        "study": plan.study,
        "setting": arm.setting,
        "arm": arm.arm,
        "session": planned.session,
        "seed": planned.seed,
        **arm.choices,
        "norm_options": json.dumps({k: v for k, v in norm.items() if k != "_partial_"}),
        "stride": norm.get("stride"),
        "batch_size": values["batch"]["size"],
        "epochs": values["epochs"],
        "steps": values["steps"],
        "lr": values["optim"]["lr"],
        "precision": values["precision"],
        "compile": values["compile"],
        "pack": arm.pack,
        "threads": values["threads"] or machine.share(),
        "slots": machine.slots(),
        "launch_order": planned.launch_order,
        "started_at": started_at,
        "hostname": platform.node(),
        "torch_version": torch.__version__,
        "git_commit": git_commit(),
        "config_hash": arm.config_hash,
    }


def measured(ready: Prepared, outcome: Outcome, manifest: dict[str, Any]) -> Row:
    """The columns that a finished session adds."""
    parameters = list(ready.models[0].parameters())
    return {
        **outcome.columns(),
        "device": str(ready.device),
        "device_name": machine.name_of(ready.device),
        "params": sum(p.numel() for p in parameters),
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "norm_layers": len(norm_layers_of(ready.model)),
        "warnings": "; ".join(manifest["warnings"]),
        "finished_at": utc_now(),
    }


def make_manifest(ready: Prepared, seat: int, first: dict[str, Tensor]) -> dict[str, Any]:
    """What ran: the norm layers as observed, options without effect, parameters that never moved."""
    seen = ready.observation
    idle = idle_options(ready.config.norm, seen.layers, among=seen.idle)
    in_optimizer = {id(p) for group in ready.optimizer.param_groups for p in group["params"]}
    whole, model = dict(ready.model.named_parameters()), ready.models[seat]
    trained = {id(p) for name, p in model.named_parameters() if id(whole[name]) in in_optimizer}
    still = never_moved(model, first, trained, seen)
    warnings = [f"norm.{key}={ready.config.norm[key]} changed nothing" for key in idle]
    cut = ready.data.train.cut
    if ready.config.sync_bn and cut.ranks == 1:
        warnings.append("sync_bn=true changed nothing in one process")
    if ready.config.batch["micro"] and cut.micros == 1:
        warnings.append(f"batch.micro={ready.config.batch['micro']} changed nothing: no batch is larger")
    if ready.not_graphed:
        warnings.append(f"no CUDA graph: {ready.not_graphed}")
    if still.suspicious:
        warnings.append(f"never moved: {', '.join(still.suspicious)}")
    return {
        "norm_layers": [layer.as_dict() for layer in seen.layers.values()],
        "compiled": ready.config.compile,
        "cuda_graph": ready.graphed is not None,
        "kernels": seen.kernels,
        "idle_options": idle,
        "never_moved": still.suspicious,
        "warnings": warnings,
        "notes": [f"{name} never moved: a bias or gain directly before a norm" for name in still.before_norm],
    }
