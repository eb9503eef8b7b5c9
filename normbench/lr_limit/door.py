"""From a command to limits: its arms, one after another in this process, every trial written as it ends."""

import contextlib
import hashlib
import itertools
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from normbench import claim as claims
from normbench import interrupt, ranks
from normbench.config import Composer, Config, Values, check_together, check_world
from normbench.doors import line_of, say
from normbench.identity import identify, result_changing, short_names
from normbench.lr_limit.search import Grid, Seen, next_step
from normbench.plan import Arm, utc_now, write_json, write_whole
from normbench.planning import by_key, spellings
from normbench.sweep import SweepFailed
from normbench.values import Refused

if TYPE_CHECKING:
    from normbench.lr_limit.limits import Searched
    from normbench.lr_limit.record import Machine, Range, Trial, Trials
    from normbench.lr_limit.trial import Chance
    from normbench.training import Prepared

SEARCH = ("sessions", "resolution", "lowest", "highest", "range", "name")  # the door's own keys
# one for all arms; by the smoothing a loss is judged
ONE = (*SEARCH, "seed", "device", "threads", "cuda_graph", "data_dir", "out", "optim.label_smoothing")
MATCHED = ("model", "dataset")  # arms are compared on one model and one data set
# of `train`'s, what a trial has no use for: it evaluates once, keeps nothing, goes on from nothing
FIXED: Values = {
    "session": 0,
    "select": "last",
    "sync_bn": False,
    "world": None,
    "eval_every": "1epoch",
    "pack": None,
    "tensorboard": False,
    "save_model": False,
    "checkpoint": {"every": None, "keep": False},
}


@dataclass(frozen=True)
class Question:
    """What a command asks: arms that share everything else, the sessions and rates to try them with."""

    arms: Sequence[Arm]
    names: Sequence[str]
    grid: Grid
    sessions: int
    seed: int
    range_rates: Sequence[float]
    folder: Path

    @property
    def differing(self) -> list[str]:
        """The keys in which the arms differ."""
        kept = [result_changing(arm.values, arm.choices) for arm in self.arms]
        keys = dict.fromkeys(itertools.chain(*kept))
        found = [key for key in keys if len({json.dumps(each.get(key)) for each in kept}) > 1]
        # with another norm its options are others too
        return [key for key in found if "norm" not in found or not key.startswith("norm.")]


def run(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> None:
    """Search every arm's limit, fit, compare, print and write; what was run before is not run again."""
    question = ask(composer, arguments)

    from normbench import device as machine
    from normbench.building import check_builds
    from normbench.lr_limit import page
    from normbench.lr_limit.record import Machine, Trials
    from normbench.lr_limit.trial import Chance
    from normbench.preparing import check_device, load_data

    configs = [Config.of(arm.values, arm.choices) for arm in question.arms]
    for config in configs:
        check_builds(config)
        check_device(config)
    first = configs[0]
    chance = Chance.of(load_data(first), first.optim["label_smoothing"])
    if chance.bound >= 1:
        part, key = ("validation", "val_fraction") if chance.part == "val" else ("test", "test_subset")
        raise Refused(
            f"dataset.{key}={first.dataset[key]}: of {chance.images} {part} images the commonest class has "
            f"{chance.acc:.0%}, so no accuracy is two standard errors above chance; use more images"
        )
    terms = [
        page.definition(chance),
        page.matched(question.arms, question.seed, question.sessions, question.differing),
        page.parameters(question.names, [sizes_of(config) for config in configs], first.model.get("bias")),
    ]
    here = Machine.here(machine.pick(first.device), first.threads)
    held = claims.take(question.folder, {})
    if held is None:
        raise Refused(
            f"{question.folder}: another process searches there; wait for it, or give another name=…"
        )
    try:
        with contextlib.closing(Trials(question.folder / "trials.csv")) as trials, interrupt.listening():
            trials.same_machine(here, [arm.config_hash for arm in question.arms])
            say("\n".join(terms))
            work = Work(question, trials, chance, here)
            finish(question, terms, work.searched(configs), work.ranges, chance)
    finally:
        held.remove()


def ask(composer: Composer, arguments: Sequence[str]) -> Question:
    """The question of these overrides; Refused before anything is built."""
    if ranks.size() > 1:
        raise Refused("torchrun starts normbench.train; a search trains one session at a time in one process")
    parser = OverridesParser.create(config_loader=composer.loader)
    typed = by_key(parser.parse_overrides(list(arguments)), "the command")
    for override in typed.values():
        check_one(override)
    arms: dict[str, Arm] = {}
    for overrides in itertools.product(*map(spellings, typed.values())):
        values, choices = composer.compose(list(overrides))
        check(values)
        own = arm_values(values)
        check_world(own)
        check_together(own)
        usual, usual_choices = composer.usual(choices)
        setting = identify(without_rate(own), choices, without_rate(arm_values(usual)), usual_choices)
        if setting.hash in arms:
            raise Refused(f"two arms are one setting ({setting.id}): {' '.join(overrides)}; give it once")
        arms[setting.hash] = Arm.of(setting, own, choices)
    check_shared(list(arms.values()))
    short = short_names({arm.setting: arm.arm for arm in arms.values()})
    if len(short) == 1:  # nothing to tell it from
        short = dict.fromkeys(short, choices["norm"])
    grid = Grid(values["optim"]["lr"], values["resolution"], values["lowest"], values["highest"])
    return Question(
        list(arms.values()),
        [short[arm.setting] for arm in arms.values()],
        grid,
        values["sessions"],
        values["seed"],
        growing(values["range"]),
        folder_of(values, choices, arms),
    )


def sizes_of(config: Config) -> tuple[int, int]:
    """How many parameters a model has beside its norms' own, and how many these are."""
    from normbench.building import build, norm_layers_of

    model = build(config)
    norms = {p: p.numel() for layer in norm_layers_of(model).values() for p in layer.parameters()}
    own = sum(norms.values())
    return sum(p.numel() for p in model.parameters()) - own, own


def check_one(override: Override) -> None:
    """Refused where a key has several values that is one for all arms."""
    key = str(override.key_or_group)
    if not override.is_sweep_override():
        return
    if key == "optim.lr":
        raise Refused(
            f"{override.input_line}: the rate is what is searched; optim.lr is where that starts, one number"
        )
    if key in ONE or key.startswith("range."):
        raise Refused(f"{override.input_line}: {key} is one for all arms; give one value")
    if key in MATCHED or key.startswith("dataset."):
        raise Refused(f"{override.input_line}: arms share {key}, else their limits say nothing of the norm; "
                      "run it once for each")  # fmt: skip


def check(values: Values) -> None:
    """What no key can judge alone."""
    low, start, high = values["lowest"], values["optim"]["lr"], values["highest"]
    if not low < start < high:
        given = f"lowest={low:g}, optim.lr={start:g} and highest={high:g}"
        raise Refused(f"{given} must rise: the search starts at optim.lr")
    if not values["range"]["low"] < values["range"]["high"]:
        raise Refused(
            f"range.low={values['range']['low']:g} must be below range.high={values['range']['high']:g}"
        )


def check_shared(arms: Sequence[Arm]) -> None:
    """Refused where what is one for all arms differs by an option that was chosen, as optim=sgd,adam."""
    for key in ("lr", "label_smoothing"):
        there = {arm.choices["optim"]: arm.values["optim"][key] for arm in arms}
        if len(set(there.values())) > 1:
            given = " and ".join(f"{value:g} ({name})" for name, value in there.items())
            raise Refused(f"optim.{key} is one for all arms, got {given}; give one, like "
                          f"optim.{key}={min(there.values()):g}")  # fmt: skip


def arm_values(values: Values) -> Values:
    """What a trial runs with: `train`'s values without the search's."""
    return {**{key: value for key, value in values.items() if key not in SEARCH}, **FIXED}


def without_rate(values: Values) -> Values:
    """A setting's values but the rate, which every trial has its own of."""
    return {**values, "optim": {key: value for key, value in values["optim"].items() if key != "lr"}}


def growing(options: Values) -> list[float]:
    """The range test's rates, evenly on a log scale; none where it is left out."""
    steps, low, high = options["steps"], options["low"], options["high"]
    return [] if steps is None else [float(low * (high / low) ** (i / (steps - 1))) for i in range(steps)]


def folder_of(values: Values, choices: Values, arms: dict[str, Arm]) -> Path:
    """`<out>/lr_limit/<name>`; where none is given it says model, data set and, by a hash, arms and seed."""
    asked = json.dumps([sorted(arms), values["seed"]])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:10]
    name = values["name"] or f"{choices['model']}-{choices['dataset']}-{digest}"
    return Path(values["out"]) / "lr_limit" / str(name)


class Work:
    """A search while it goes: what there is, and what runs the rest.

    Args:
        question: as asked.
        trials: those of before, and all that come.
        chance: what guessing reaches.
        here: the machine.
    """

    def __init__(self, question: Question, trials: "Trials", chance: "Chance", here: "Machine") -> None:
        from normbench.lr_limit.record import read_ranges

        self.question, self.trials, self.chance, self.here = question, trials, chance, here
        self.range_file = question.folder / "range.csv"
        self.ranges: dict[tuple[str, int], Range] = read_ranges(self.range_file)

    def searched(self, configs: Sequence[Config]) -> "list[Searched]":
        """Every arm, searched to its end; SweepFailed where a trial ended in an error."""
        question, found = self.question, []
        say(f"{question.folder}: {self.trials.there()}")
        for arm, name, config in zip(question.arms, question.names, configs, strict=True):
            try:
                found.append(self.arm(arm, name, Lazy(config)))
            except (Refused, OSError):
                raise
            except Exception as error:
                write_whole(question.folder / "failure.txt", traceback.format_exc())
                said = (
                    f"{name}: {type(error).__name__}: {line_of(error)}; more in {question.folder}/failure.txt"
                )
                raise SweepFailed(f"{said}; the same command goes on from here") from error
        (question.folder / "failure.txt").unlink(missing_ok=True)
        return found

    def arm(self, arm: Arm, name: str, lazy: "Lazy") -> "Searched":
        """One arm: rate after rate until the limit is known, then the range test."""
        from normbench.lr_limit.limits import Searched, seen_in

        question, trials = self.question, []
        seen: dict[int, Seen] = {}
        while step := next_step(seen, question.grid):
            began, there, rate = time.perf_counter(), len(self.trials.rows), question.grid.rate(step.place)
            these = [self.trial(arm, name, lazy, session, rate, step.purpose)
                     for session in range(question.sessions)]  # fmt: skip
            seen[step.place] = seen_in(these)
            trials += these
            failed = f"{seen[step.place].failed} of {question.sessions} sessions failed"
            took = f"{time.perf_counter() - began:.1f} s" if len(self.trials.rows) > there else "were there"
            say(f"{name}  rate {rate:<10.4g}  {failed}  ({step.purpose}, {took})")
        self.range_test(arm, name, lazy)
        return Searched(name, trials, question.grid)

    def trial(self, arm: Arm, name: str, lazy: "Lazy", session: int, rate: float, purpose: str) -> "Trial":
        """One session at one rate, from the file where it is there."""
        from normbench.lr_limit.record import Place, Trial
        from normbench.lr_limit.trial import run_trial
        from normbench.seeds import Seeds

        place = Place(arm.config_hash, self.question.seed, session, rate)
        if place in self.trials.rows:
            return self.trials.rows[place]
        interrupt.obey()
        began = time.perf_counter()
        ended = run_trial(lazy.ready(), Seeds(place.seed, session), rate, self.chance)
        found = {**asdict(ended), "failed": int(ended.failed), "wall_s": time.perf_counter() - began}
        trial = Trial.of(name, place, purpose, found, self.here)
        self.trials.add(trial)
        return trial

    def range_test(self, arm: Arm, name: str, lazy: "Lazy") -> None:
        """The arm's range test, of session 0, from the file where it is there."""
        from normbench.lr_limit.record import Range, write_ranges
        from normbench.lr_limit.trial import range_test
        from normbench.seeds import Seeds

        rates, key = self.question.range_rates, (arm.config_hash, self.question.seed)
        there = self.ranges.get(key)
        if rates and (there is None or there.rates != rates[: len(there.rates)]):
            losses = range_test(lazy.ready(), Seeds(self.question.seed, 0), rates)
            self.ranges[key] = Range(name, *key, rates, losses)
            write_ranges(self.range_file, self.ranges.values())


class Lazy:
    """What an arm's trials share, prepared when the first is run: once, for all rates and sessions."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.there: Prepared | None = None

    def ready(self) -> "Prepared":
        """Prepared now, or before; each trial starts it afresh."""
        from normbench.preparing import prepare

        if self.there is None:
            self.there = prepare(self.config)
        return self.there


def finish(
    question: Question,
    terms: Sequence[str],
    found: "Sequence[Searched]",
    ranges: "dict[tuple[str, int], Range]",
    chance: "Chance",
) -> None:
    """Fit and compare, print, write limits.csv, lr_limit.json and the figures."""
    from rich.console import Console

    from normbench.lr_limit import figures, page
    from normbench.lr_limit.limits import ratios
    from normbench.lr_limit.record import table

    compared, folder, made_at = ratios(found), question.folder, utc_now()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    console.print()
    console.print(page.limit_table(found, compared))
    said = [line for arm in found for line in page.sentences(arm, compared.get(arm.name))]
    say("\n".join(said))
    rows = page.limit_rows(list(zip(question.arms, found, strict=True)), compared, chance, made_at)
    write_whole(folder / "limits.csv", table(list(rows[0]), [list(row.values()) for row in rows]))
    named = zip(question.arms, question.names, strict=True)  # an arm's name depends on the others there are
    ours = [replace(ranges[arm.config_hash, question.seed], arm=name, rates=question.range_rates)
            for arm, name in named if question.range_rates]  # fmt: skip
    drawn = figures.draw(folder, found, ours, chance)
    write_json(folder / "lr_limit.json", body_of(question, terms, said, made_at))
    say(f"\nwritten: {folder}: limits.csv, trials.csv, " + ", ".join(path.name for path in drawn))


def body_of(question: Question, terms: Sequence[str], said: Sequence[str], made_at: str) -> dict[str, Any]:
    """lr_limit.json: what was asked, how failure was defined, what came out in words."""
    failure, *matched = terms
    return {
        "made_at": made_at,
        "command": sys.argv[1:],
        "failure": failure,
        "matched": matched,
        "found": list(said),
        "search": {**asdict(question.grid), "sessions": question.sessions, "seed": question.seed},
        "arms": [{"arm": name, "setting": arm.setting, "config": without_rate(arm.values)}
                 for name, arm in zip(question.names, question.arms, strict=True)],
    }  # fmt: skip
