"""From a command to a page: its suites, one after another in this process, written down as they come."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from normbench.config import Composer, Values, flatten
from normbench.doors import line_of, say
from normbench.plan import utc_now, write_json, write_whole
from normbench.planning import by_key
from normbench.rules import SUITES
from normbench.values import Refused

if TYPE_CHECKING:
    from normbench.bench.bench import Bench
    from normbench.bench.record import Body, Group


def run(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> None:
    """Measure what the command asks for, print it, write JSON and Markdown; Ctrl-C keeps what there is."""
    parser = OverridesParser.create(config_loader=composer.loader)
    typed = by_key(parser.parse_overrides(list(arguments)), "the command")
    lists = {key for key, value in flatten(composer.schema({})) if isinstance(value, list)}
    values, _ = composer.compose([spelled(override, key in lists) for key, override in typed.items()])
    suites = list(SUITES) if "all" in values["suite"] else list(dict.fromkeys(values["suite"]))
    check(values, suites)

    from normbench import device as machine
    from normbench.bench import record
    from normbench.bench.allocator import tuned
    from normbench.bench.bench import Bench

    earlier = [(path, record.read_run("join", path)) for path in values["join"]]
    against = values["against"]
    before = None if against is None else record.read_run("against", against)
    allocator, device = tuned(), machine.pick(values["device"])
    machine.use_threads(values["threads"])
    bench = Bench({**values, "device": str(device)}, device, Composer(composer.loader, master, "train"))
    threads = values["threads"] or machine.share()
    where = record.machine_body(device, threads, allocator)
    body = record.run_body(sys.argv[1:], utc_now(), bench.quick, where)
    for path, other in earlier:
        record.same_machine("join", path, body, other)
        body["suites"] |= other["suites"]
    files = Files.of(values, suites, body["made_at"])
    interrupted = False
    try:
        for suite in suites:
            measure(bench, suite, body, files)
        body["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    finish(body, before, str(against), files)
    if interrupted:
        say(f"interrupted; what was measured is in {files.markdown}", error=True)
        sys.exit(130)


def spelled(override: Override, is_list: bool) -> str:
    """An override as Hydra takes it: of a list's key, `a,b` and `a` mean `[a,b]` and `[a]`."""
    line = str(override.input_line)
    key, _, value = line.partition("=")
    if is_list and override.is_discrete_sweep():
        return f"{key}=[{','.join(override.sweep_string_iterator())}]"
    if override.is_sweep_override():
        raise Refused(f"{line}: {key} has one value in a run; run it once for each")
    return line if not is_list or value.startswith("[") else f"{key}=[{value}]"


def check(values: Values, suites: Sequence[str]) -> None:
    """What no key can judge alone, and where to write."""
    if not suites and not values["join"]:
        raise Refused(f"suite=[]: nothing to measure; there are {', '.join(SUITES)} and all")
    for key in ("out", "page"):
        target = values[key]
        if target is None:
            continue
        folder = Path(target) if key == "out" else Path(target).parent
        if not str(target) or (key == "page" and Path(target).is_dir()):
            raise Refused(f"{key}={target or repr('')} is no file's name")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{key}={target}: {line_of(error)}; choose another place") from error
        if not os.access(folder, os.W_OK):
            raise Refused(f"{key}={target}: {folder} cannot be written to; choose another place")


class Files:
    """Where a run is written."""

    def __init__(self, json: Path, markdown: Path, page: Path | None) -> None:
        self.json, self.markdown, self.page = json, markdown, page

    @classmethod
    def of(cls, values: Values, suites: Sequence[str], made_at: str) -> "Files":
        """`<out>/<time>-<suites>.json` and `.md`, the second of a second with -2; the page if asked for."""
        when = made_at[:19].replace("-", "").replace(":", "")
        what = "all" if suites == list(SUITES) else "-".join(suites) or "joined"
        name = f"{when}-{what}"
        stem, nth = Path(values["out"]) / name, 1
        while stem.with_name(stem.name + ".json").exists():
            nth += 1
            stem = stem.with_name(f"{name}-{nth}")
        page = None if values["page"] is None else Path(values["page"])
        return cls(stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".md"), page)


def measure(bench: "Bench", suite: str, body: "Body", files: Files) -> None:
    """One suite's groups into the run's body, each written and printed as it ends."""
    from normbench.bench import page, record

    began = time.perf_counter()
    found: Body = {
        "command": record.shown(body["command"], suite),
        "made_at": utc_now(),
        "wall_s": 0.0,
        "groups": [],
    }
    body["suites"].pop(suite, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sides keep those of their own layers
        for group in suite_of(suite)(bench):
            found["wall_s"] = time.perf_counter() - began
            found["groups"].append(group.body())
            body["suites"][suite] = found
            write_json(files.json, body)
            say(f"\n[{suite}, {found['wall_s']:.0f} s] " + "\n".join(page.group_table(group.body())).rstrip())


def suite_of(name: str) -> "Callable[[Bench], Iterator[Group]]":
    """The function that measures a suite; only those that run are imported."""
    if name == "layer":
        from normbench.bench import layer

        return layer.groups
    if name == "step":
        from normbench.bench import step

        return step.groups
    if name == "loader":
        from normbench.bench import loader

        return loader.groups
    if name == "pack":
        from normbench.bench import pack

        return pack.groups
    from normbench.bench import sessions, whole

    others: dict[str, Any] = {
        "naive": whole.against_naive,
        "startup": sessions.startup,
        "sweep": sessions.sweep,
        "session": whole.to_the_end,
    }
    found: Callable[[Bench], Iterator[Group]] = others[name]
    return found


def finish(body: "Body", before: "Body | None", named: str, files: Files) -> None:
    """Judge the targets, write everything, say where it is."""
    from normbench.bench import page
    from normbench.bench.targets import judged

    body["targets"] = judged(body)
    say("\n" + "\n".join(page.target_table(body, body["suites"])).rstrip())
    text = page.page(body)
    if before is not None:
        compared = "\n".join(page.comparison(body, before, named)).rstrip()
        say("\n" + compared)
        body["against"] = {"path": named, "changes": [list(change) for change in page.changes(body, before)]}
    try:
        write_json(files.json, body)
        write_whole(files.markdown, text + ("" if before is None else f"\n{compared}\n"))
        say(f"\nwritten: {files.json}, {files.markdown}")
        if files.page is not None:
            write_whole(files.page, text)
            say(f"written: {files.page}")
    except OSError as error:
        raise Refused(f"the results cannot be written: {line_of(error)}") from error
