"""One session's folder: claimed, filled while it trains, closed by session.json, the row and its evidence."""

import contextlib
import io
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normbench import device as machine
from normbench import ranks
from normbench.building import norm_layers_of
from normbench.checkpoint import Checkpoints
from normbench.claim import Claim
from normbench.config import Config, norm_that_runs
from normbench.course import Course
from normbench.doors import say
from normbench.failure import last_line
from normbench.identity import short_names
from normbench.manifest import idle_options, never_moved
from normbench.plan import Plan, Planned, utc_now, write_json, write_whole
from normbench.progress import SessionProgress
from normbench.results import COLUMNS, EpochTable, Outcome, Row, finite, git_commit
from normbench.scalars import Scalars
from normbench.seeds import Seeds
from normbench.training import Prepared, settings_of, start, train, warm_up


def run_session(
    ready: Prepared, config: Config, plan: Plan, planned: Planned, started_at: str, claim: Claim | None
) -> None:
    """Train one session in its folder, which `claim` holds; a rank that only follows has none."""
    folder, arm = plan.session_folder(planned), plan.arms[planned.arm]
    seeds = Seeds(config.seed, config.session)
    name = short_names({a.setting: a.arm for a in plan.arms})[arm.setting]
    title = f"{name} s{planned.session}"
    checkpoints = Checkpoints(folder, config.checkpoint_every)
    if claim:
        checkpoints.held = claim.held
    with settings_of(config, ready.device):
        start(ready, seeds)
        first = {name: p.detach().cpu().clone() for name, p in ready.model.named_parameters()}
        warm_up(ready, seeds)
        start(ready, seeds)
        saved = ranks.told(checkpoints.read() if claim else None)
        course = Course(ready)
        if saved is not None:
            try:
                course = Course.resumed(ready, saved)
            except (KeyError, TypeError, RuntimeError) as error:
                # other code wrote it, of other tensors
                why = f"its checkpoint does not fit ({last_line(error)}); starts again"
                if claim:
                    say(f"{folder}: {why}", error=True)
                start(ready, seeds)
        with (
            contextlib.closing(
                EpochTable(folder / "epochs.csv" if claim else Path(os.devnull), course.rows)
            ) as table,
            contextlib.closing(Scalars(folder / "tb" if config.tensorboard and claim else None)) as scalars,
            SessionProgress(title, ready.total_steps, quiet=claim is None) as progress,
        ):
            if course.step:
                progress.skip(course.step)
                for earlier in course.rows:
                    scalars.write(earlier)
            outcome, weights = train(ready, seeds, course, table, scalars, progress, checkpoints)
        threads = torch.get_num_threads()
        ready.optimizer.zero_grad()  # between its sessions a setting holds no gradients
        if claim is None:
            return
        manifest = make_manifest(ready, first)
    if config.save_model:
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        write_whole(folder / "model.pt", buffer.getvalue())
    row = {**started(plan, planned, started_at), **measured(ready, outcome, manifest)}
    row = {column: row.get(column) for column in COLUMNS} | {"threads": threads}
    parts = {"train": ready.data.train, "val": ready.data.val, "test": ready.data.test}
    images = {name: part.num_samples for name, part in parts.items() if part}
    claim.held()
    write_json(
        folder / "session.json",
        finite({"row": row, "images": images, "manifest": manifest, "config": arm.values}),
    )
    (folder / "failure.json").unlink(missing_ok=True)
    if not config.checkpoint["keep"]:
        checkpoints.remove()
    paid = "no whole epoch" if row["epoch_time_s"] is None else f"{row['epoch_time_s']:.3f} s an epoch"
    accuracy = f"test_acc {outcome.reported.test_acc:.4f}, {paid}"
    say(f"{title}: {outcome.status}, {accuracy}, row in {folder / 'session.json'}")


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
        "pack": 1,
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
    parameters = list(ready.model.parameters())
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


def make_manifest(ready: Prepared, first: dict[str, Tensor]) -> dict[str, Any]:
    """What ran: the norm layers as observed, options without effect, parameters that never moved."""
    seen = ready.observation
    idle = idle_options(ready.config.norm, seen.layers, among=seen.idle)
    trained = {id(p) for group in ready.optimizer.param_groups for p in group["params"]}
    still = never_moved(ready.model, first, trained, seen)
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
