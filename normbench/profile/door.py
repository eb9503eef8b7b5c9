"""From a command to a folder: arms, their times, rows, figures, a trace, and the page if asked for."""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
    earlier = [earlier_body(path) for path in values["join"]]
    page = page_of(values)
    if not arms:
        assert page is not None  # arms_of has seen to it
        write_page(page, earlier)
        return
    folder = folder_of(values, choices)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own words, read when torch is loaded

    from normbench.bench.interleaved import CannotRun
    from normbench.building import build, check_builds, norm_layers_of

    for arm in arms:
        check_builds(arm.config)
    layers = len(norm_layers_of(build(arms[0].config)))
    if not layers:
        raise Refused("the model has no norm layers; choose others with model.norm_layers")
    check_layers(str(values["compare"]), theirs, layers)
    body = new_body(arms, values, choices, folder.name, theirs)
    own = None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        own = measure(arms, values, body)
    except CannotRun as why:
        raise Refused(str(why)) from why
    except KeyboardInterrupt:
        if not body["arms"]:
            say("interrupted; nothing was measured yet", error=True)
            sys.exit(130)
    finally:
        if not body["arms"]:
            folder.rmdir()
    finish(body, own, folder)
    if page is not None:
        write_page(page, [*earlier, body])
    if own is None:
        say(f"interrupted; what was measured is in {folder}", error=True)
        sys.exit(130)


def earlier_body(path: str) -> Body:
    """An earlier profile that a page can be made of."""
    from normbench.figures import WIDTH
    from normbench.profile import figures, tables

    body = record.read_profile("join", path)
    try:
        list(tables.section(body, "", "", ()))
        for sketch in figures.sketches(body, theirs_of(body)):
            sketch.make(WIDTH)
    except record.DAMAGE as error:
        raise Refused(f"join={path}: what it holds is damaged; give another profile's folder") from error
    return body


def folder_of(values: Values, choices: Mapping[str, str]) -> Path:
    """`<out>/profile/<name>`, which is not there yet, or empty."""
    above, name = Path(values["out"]) / "profile", values["name"]
    if name is None:
        stem = f"{utc_now()[:19].replace('-', '').replace(':', '')}-{choices['model']}"
        name, nth = stem, 1
        while (above / name).exists():
            nth += 1
            name = f"{stem}-{nth}"
    folder: Path = above / name
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"name={name}: {folder} is there already; choose another name, or remove it")
    check_writable("out", values["out"], above)
    return folder


def page_of(values: Values) -> Path | None:
    """Where the page goes, if it is asked for; its figures go into a folder of its name."""
    if values["page"] is None:
        if values["join"]:
            raise Refused("join puts earlier profiles onto the page; give page=docs/profile.md too")
        return None
    page = Path(values["page"])
    if page.suffix != ".md" or page.is_dir():
        raise Refused(f"page={values['page'] or repr('')} is no Markdown file's name, like docs/profile.md")
    if page.with_suffix("").is_file():
        raise Refused(f"page={page}: its figures go into {page.with_suffix('')}/, which is a file; move it")
    check_writable("page", values["page"], page.parent)
    return page


def check_writable(key: str, value: str, folder: Path) -> None:
    """Make a folder and try to write there, or refuse the key that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(f"{key}={value}: {folder}: {error.strerror}; choose another place") from error


def new_body(
    arms: Sequence[Arm], values: Values, choices: Mapping[str, str], name: str, theirs: Sequence[Series]
) -> Body:
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
        "command": ["python", "-m", "normbench.profile", *sys.argv[1:]],
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
        "compare": [asdict(one) for one in theirs],
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


def finish(body: Body, own: "Mapping[str, Steps] | None", folder: Path) -> None:
    """Print the table and write everything, the raw times first; without models there is no trace."""
    from normbench.profile import figures, tables

    body["complete"] = own is not None
    tables.show(body)
    try:
        write_json(folder / "profile.json", body)
        write_whole(folder / "layers.csv", record.as_csv(record.LAYER_COLUMNS, record.layer_rows(body)))
        write_whole(folder / "steps.csv", record.as_csv(record.STEP_COLUMNS, record.step_rows(body)))
        figures.draw(body, theirs_of(body), folder)
        if own is not None:
            from normbench.profile.trace import write_trace

            write_trace(own, folder)
    except OSError as error:
        there = ", ".join(sorted(path.name for path in folder.glob("[!.]*"))) or "nothing"
        raise Refused(f"the results cannot all be written: {line_of(error)}; {folder} has {there}") from error
    trace = "" if own is None else "trace.json, tensorboard/, "
    say(f"\nwritten: {folder}/layers.csv, steps.csv, profile.json, {trace}*.svg")


def write_page(page: Path, bodies: Sequence[Body]) -> None:
    """The page with its figures beside it, in a folder of its name."""
    from normbench.profile import figures, tables

    beside, sections = page.with_suffix(""), []
    try:
        for body, label in zip(bodies, labels(bodies), strict=True):
            figures.draw(body, theirs_of(body), beside, label)
            drawn = [sketch.parts[0] for sketch in figures.sketches(body, theirs_of(body))]
            sections.append(tables.section(body, beside.name, label, drawn))
        write_whole(page, tables.page(sections))
    except OSError as error:
        raise Refused(f"the page cannot be written: {line_of(error)}") from error
    say(f"written: {page} and its figures in {beside}/")


def theirs_of(body: Body) -> list[Series]:
    """The times that were laid over a profile's own."""
    return [Series(**one) for one in body["compare"]]


def labels(bodies: Sequence[Body]) -> list[str]:
    """Each profile's word in the names of its figures, the second of a model and data set with -2."""
    words = [re.sub(r"[^\w.]+", "-", f"{body['model']}-{body['dataset']}") for body in bodies]
    return [
        word if words[:i].count(word) == 0 else f"{word}-{words[:i].count(word) + 1}"
        for i, word in enumerate(words)
    ]


def sized(image: Sequence[int]) -> str:
    """`3×32×32`."""
    return "×".join(map(str, image))
