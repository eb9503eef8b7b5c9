"""From a command to arms: composed, checked as `train` checks them, prepared as a session prepares itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from normbench.config import Composer, Config, Values
from normbench.data.options import DatasetOptions
from normbench.planning import by_key, expand_arms, meaning, parse_arm
from normbench.study import Fidelity, Study
from normbench.values import Refused

ONE_VALUE = ("model", "dataset", "arms", "threads", "device", "rounds", "out", "name", "quick", "compare",
             "page", "join")  # fmt: skip
OWN = ("arms", "rounds", "out", "name", "quick", "compare", "page", "join")  # not for a session
INPUTS = ("dataset.shape", "dataset.num_classes")  # what a data set means here
IDLE = ("batch.eval_size", "batch.micro")
QUICK_BATCH = 4
# a step's arithmetic without its effect: weights stay, so that every round is the same work
STILL = ("optim.lr=1e-12", "optim/schedule=constant", "cuda_graph=false")


@dataclass(frozen=True)
class Arm:
    """One setting of the norm layers, before anything is built.

    `twin` is the same setting without norms.
    """

    name: str
    values: Values
    config: Config
    twin: Config


def arms_of(
    composer: Composer, master: DictConfig, arguments: Sequence[str]
) -> tuple[list[Arm], Values, dict[str, str]]:
    """Every arm that the command names, its common values and choices; Refused as `train` would refuse.

    No arms: `arms=[]`, which joins earlier profiles.
    """
    parser = OverridesParser.create(config_loader=composer.loader)
    typed = by_key(parser.parse_overrides(list(arguments)), "the command")
    for key, override in typed.items():
        check_typed(key, override)
    common, chosen = composer.compose([str(o.input_line) for k, o in typed.items() if k in OWN])
    listed = common["arms"] or []
    if common["arms"] == []:
        check_joined(common, typed)
        return [], common, chosen
    shared = [o for key, o in typed.items() if key not in OWN]
    for arm in listed:
        for key, override in parse_arm(parser, arm).items():
            check_typed(key, override)
            if key in ONE_VALUE:
                raise Refused(f"arms: {arm!r} sets {key}, which is one for all arms; give it beside them")
            if meaning(key) in {meaning(str(o.key_or_group)) for o in shared}:
                raise Refused(f"{key}: set by arms={arm!r}; leave it out of the command")
    own = [str(o.input_line) for key, o in typed.items() if key in OWN]
    spelled = list(expand_arms(parser, Study("profile", listed), Fidelity(), shared))
    sessions = Composer(composer.loader, master, "train")
    found: dict[str, Arm] = {}
    for overrides, words in zip(spelled, words_of(parser, spelled), strict=True):
        values, choices = composer.compose([*own, *overrides])
        layer = str(values["norm"]["_target_"]).rpartition(".")[2]
        name = " ".join([layer if choices["norm"] == "custom" else choices["norm"], *words])
        arm = Arm(name, values, *session(sessions, values, overrides))
        same = next((a for a in found.values() if a.name == name or a.config == arm.config), None)
        if same is not None:
            names = " and ".join(dict.fromkeys((same.name, name)))
            raise Refused(f"two arms are one setting ({names}); give it once")
        found[name] = arm
        common = values
    return list(found.values()), common, choices


def check_joined(common: Values, typed: Iterable[str]) -> None:
    """`arms=[]` measures nothing: it joins earlier profiles onto a page, and no other key says anything."""
    idle = [key for key in typed if key not in ("arms", "join", "page")]
    if idle:
        raise Refused(f"arms=[] measures nothing, so {idle[0]} changes nothing; leave it out")
    if not common["join"] or not common["page"]:
        raise Refused("arms=[] measures nothing; with join=[folders] page=docs/profile.md it makes a page")


def check_typed(key: str, override: Override) -> None:
    """What is one for all arms has one value; what would change nothing here is refused."""
    if key in ONE_VALUE and override.is_sweep_override():
        raise Refused(f"{override.input_line}: {key} has one value in a profile; run it once for each")
    if key in IDLE or (key.startswith("dataset.") and key not in INPUTS):
        raise Refused(
            f"{key} changes nothing here: inputs are generated, and only {', '.join(INPUTS)} and "
            "batch.size are used of data set and batch; leave it out"
        )


def words_of(parser: OverridesParser, spelled: Sequence[Sequence[str]]) -> list[list[str]]:
    """`[stride=4]` for every arm: options of the norm, and what the arms do not share."""
    parsed = [parser.parse_overrides(list(overrides)) for overrides in spelled]
    lines = [{str(o.key_or_group): str(o.input_line).lstrip("+") for o in arm} for arm in parsed]

    def tells(key: str, line: str) -> bool:
        if key in ("norm", "norm._target_", *ONE_VALUE):
            return False
        option = key == "stride" or key.startswith("norm.")
        return option or any(line != other.get(key) for other in lines)

    return [[line.removeprefix("norm.") for key, line in arm.items() if tells(key, line)] for arm in lines]


def session(sessions: Composer, values: Values, overrides: Sequence[str]) -> tuple[Config, Config]:
    """What `train` would run, on generated images of the data set's shape; and the same without norms."""
    try:
        data = DatasetOptions.from_mapping(values["dataset"])
    except ValueError as error:
        raise Refused(str(error)) from error
    size = values["batch"]["size"]
    if values["quick"]:
        size = min(size, QUICK_BATCH)

    def left(among: Iterable[str], *keys: str) -> list[str]:
        return [o for o in among if not o.lstrip("+").startswith(tuple(keys))]

    given = [
        *left(overrides, "dataset=", "dataset.", "batch.size=", "threads="),
        f"batch.size={size}",
        "dataset=synthetic",
        f"dataset.shape=[{','.join(map(str, data.shape))}]",
        f"dataset.num_classes={data.num_classes}",
        "dataset.mean=[0.5]",
        "dataset.std=[0.21]",
        f"dataset.train_size={size}",
        f"dataset.test_size={size}",
        f"threads={values['threads'] or 'null'}",
        *STILL,
    ]
    config = Config.of(*sessions.compose(given))
    twin = Config.of(*sessions.compose([*left(given, "stride=", "norm=", "norm."), "norm=nn"]))
    return config, twin
