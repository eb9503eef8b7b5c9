"""From a command to a folder: arms, their times, rows, figures, a trace, and the page if asked for."""

import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from normbench.config import Composer, Values
from normbench.doors import line_of, say
from normbench.plan import utc_now, write_json, write_whole
from normbench.profile import record
from normbench.profile.arms import Arm, arms_of
from normbench.profile.compare import Series, check_layers, read_times
from normbench.sweep import count
from normbench.values import Refused

if TYPE_CHECKING:
    from normbench.profile.measuring import Steps

Body = record.Body


def run(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> None:
    """Measure what the command asks for and write it; Ctrl-C keeps what there is."""
    arms, values, choices = arms_of(composer, master, arguments)
    theirs = [] if values["compare"] is None else read_times(values["compare"])
    earlier = [record.read_profile("join", path) for path in values["join"]]
    folder, page = folder_of(values, choices), page_of(values)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own words, read when torch is loaded

    from normbench.bench.interleaved import CannotRun
    from normbench.building import build, check_builds, norm_layers_of

    for arm in arms:
        check_builds(arm.config)
    layers = len(norm_layers_of(build(arms[0].config)))
    if not layers:
        raise Refused("the model has no norm layers; choose others with model.norm_layers")
    check_layers(str(values["compare"]), theirs, layers)
    body = new_body(arms, values, choices, folder.name)
    interrupted = False
    try:
        folder.mkdir(parents=True)
        own = measure(arms, values, body)
        finish(body, own, theirs, folder)
    except KeyboardInterrupt:
        interrupted = True
        if not body["arms"]:
            folder.rmdir()
            say("interrupted; nothing was measured yet", error=True)
            sys.exit(130)
        finish(body, None, theirs, folder)
    except CannotRun as why:
        folder.rmdir()
        raise Refused(str(why)) from why
    if page is not None:
        write_page(page, [*earlier, body])
    if interrupted:
        say(f"interrupted; what was measured is in {folder}", error=True)
        sys.exit(130)


def folder_of(values: Values, choices: Mapping[str, str]) -> Path:
    """`<out>/profile/<name>`, which is not there yet."""
    above, name = Path(values["out"]) / "profile", values["name"]
    if name is None:
        stem = f"{utc_now()[:19].replace('-', '').replace(':', '')}-{choices['model']}"
        name, nth = stem, 1
        while (above / name).exists():
            nth += 1
            name = f"{stem}-{nth}"
    folder: Path = above / name
    if folder.exists():
        raise Refused(f"name={name}: {folder} is there already; choose another name, or remove it")
    check_writable("out", values["out"], above)
    return folder


def page_of(values: Values) -> Path | None:
    """Where the page goes, if it is asked for."""
    if values["page"] is None:
        if values["join"]:
            raise Refused("join puts earlier profiles onto the page; give page=docs/profile.md too")
        return None
    page = Path(values["page"])
    if not values["page"] or page.is_dir():
        raise Refused(f"page={values['page'] or repr('')} is no file's name")
    check_writable("page", values["page"], page.parent)
    return page


def check_writable(key: str, value: str, folder: Path) -> None:
    """Make a folder, or refuse the key that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{key}={value}: {line_of(error)}; choose another place") from error
    if not os.access(folder, os.W_OK):
        raise Refused(f"{key}={value}: {folder} cannot be written to; choose another place")


def new_body(arms: Sequence[Arm], values: Values, choices: Mapping[str, str], name: str) -> Body:
    """A profile before anything is measured."""
    import torch

    from normbench import device as machine
    from normbench.bench.allocator import tuned
    from normbench.bench.record import machine_body

    allocator, device = tuned(), machine.pick(values["device"])
    machine.use_threads(values["threads"])
    return {
        "format": record.FORMAT,
        "name": name,
        "command": ["python -m normbench.profile", *sys.argv[1:]],
        "made_at": utc_now(),
        "quick": values["quick"],
        "complete": False,
        "wall_s": 0.0,
        "cpu_share": None,
        "model": choices["model"],
        "dataset": choices["dataset"],
        "image": list(values["dataset"]["shape"]),
        "machine": {
            **machine_body(device, values["threads"] or machine.share(), allocator),
            "driver_version": driver_version(device.type),
            "cuda_version": torch.version.cuda if device.type == "cuda" else None,
        },
        "arms": [],
        "without": {},
        "alone": [],
    }


def driver_version(device_type: str) -> str:
    """NVIDIA's driver; of a CPU the kernel that runs it. Untested on CUDA."""
    if device_type != "cuda":
        return f"{platform.system()} {platform.release()}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def measure(arms: Sequence[Arm], values: Values, body: Body) -> "dict[str, Steps]":
    """The steps of all arms, then their layers alone, into the body as they come."""
    from normbench.profile import measuring

    pace, began = measuring.Pace.of(values["rounds"], values["quick"]), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layers' own, as in a session
        what = f"{count(len(arms), 'arm')}, {body['model']} at {sized(body['image'])}"
        say(f"{what}: steps with and without norms")
        own, without, twins = measuring.prepared_steps(arms)
        times, share = measuring.measure_steps(own, without, pace)
        body["cpu_share"] = round(share, 3)
        body["without"] = {
            name: measuring.without_body(steps, times[name]) for name, steps in without.items()
        }
        body["arms"] = [
            measuring.arm_body(arm, own[arm.name], times[arm.name], twins[arm.name]) for arm in arms
        ]
        without.clear()
        body["wall_s"] = time.perf_counter() - began
        say(f"{body['wall_s']:.0f} s; layers alone")
        for group in measuring.measure_alone(own, pace):
            body["alone"].append(group)
            body["wall_s"] = time.perf_counter() - began
    return own


def finish(body: Body, own: "Mapping[str, Steps] | None", theirs: Sequence[Series], folder: Path) -> None:
    """Write everything, print the table, say where it is; without models there is no trace."""
    from normbench.profile import figures, tables

    body["complete"] = own is not None
    try:
        if own is not None:
            from normbench.profile.trace import write_trace

            write_trace(own, folder)
        write_json(folder / "profile.json", body)
        write_whole(folder / "layers.csv", record.as_csv(record.LAYER_COLUMNS, record.layer_rows(body)))
        write_whole(folder / "steps.csv", record.as_csv(record.STEP_COLUMNS, record.step_rows(body)))
        figures.draw(body, theirs, folder)
    except OSError as error:
        raise Refused(f"the results cannot be written: {line_of(error)}") from error
    tables.show(body)
    trace = "" if own is None else "trace.json, tensorboard/, "
    say(f"\nwritten: {folder}/layers.csv, steps.csv, profile.json, {trace}*.svg")


def write_page(page: Path, bodies: Sequence[Body]) -> None:
    """The page with its figures beside it, in a folder of its name."""
    from normbench.profile import figures, tables

    beside = page.with_suffix("")
    try:
        for body in bodies:
            figures.draw(body, (), beside, label(body))
        write_whole(page, tables.page(bodies, beside.name, label))
    except OSError as error:
        raise Refused(f"the page cannot be written: {line_of(error)}") from error
    say(f"written: {page} and its figures in {beside}/")


def label(body: Body) -> str:
    """A profile's word in the page's file names."""
    return re.sub(r"[^\w.]+", "-", f"{body['model']}-{body['dataset']}")


def sized(image: Sequence[int]) -> str:
    """`3×32×32`."""
    return "×".join(map(str, image))
