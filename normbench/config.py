"""Where typos die: composed configuration in, a typed `Config` out, or one line that names the cure.

`conf/` is the schema. A key is legal when `conf/` composes it for the chosen options, and a value must be of
the kind that stands there; `RULES` adds the ranges. Nothing here imports torch: a wrong key answers at once.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import omegaconf
from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normbench import ranks
from normbench.data.options import DatasetOptions
from normbench.rules import RULES, Every, Interval, every, interval, trace
from normbench.values import Refused, closest, nearest, one_of

Values = dict[str, Any]
GROUPS = ("model", "dataset", "norm", "batch", "optim", "optim/schedule")
DOOR_GROUPS = {"audit": ("norm",), "bench": (), "profile": ("model", "dataset", "norm", "batch")}


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def register_resolvers() -> None:
    """`${or:a,b}` is a unless it is null, else b; `${unless:a,b}` is null where a is given, else b."""
    # OmegaConf 2.4 warns of the long name; in 2.3 the short one is another function
    short = not omegaconf.__version__.startswith("2.3.")
    register: Any = OmegaConf.register_resolver if short else OmegaConf.register_new_resolver
    register("or", lambda a, b: b if a is None else a, replace=True)
    register("unless", lambda a, b: b if a is None else None, replace=True)


@dataclass(frozen=True)
class Config:
    """One setting with its session, checked. Mappings go to the constructors that own their options."""

    choices: Mapping[str, str]
    model: Values
    dataset: Values
    norm: Values
    batch: Values
    optim: Values
    epochs: int | None
    steps: int | None
    session: int
    seed: int
    precision: str
    compile: bool
    cuda_graph: bool | None
    device: str
    channels_last: bool
    select: str
    sync_bn: bool
    world: int | None
    deterministic: bool
    eval_every: Interval
    threads: int | None
    data_dir: str
    tensorboard: bool
    save_model: bool
    checkpoint: Values
    pack: int | None = None
    trace: list[str] = field(default_factory=list)
    traces: Values = field(default_factory=dict)

    @property
    def checkpoint_every(self) -> Every | None:
        """How often to write a checkpoint."""
        given = self.checkpoint["every"]
        return None if given is None else every("checkpoint.every", given)

    @property
    def traces_every(self) -> Interval | None:
        """How often to trace a step; None: as seldom as costs nothing."""
        given = self.traces["every"]
        return None if given is None else interval("traces.every", given, "steps")

    @classmethod
    def of(cls, values: Values, choices: Mapping[str, str]) -> "Config":
        """The typed view of checked, resolved values."""
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        unit = "steps" if values["steps"] is not None else "epochs"
        known["eval_every"] = interval("eval_every", values["eval_every"], unit)
        known["norm"] = norm_that_runs(values)
        known["trace"] = trace("trace", values.get("trace"))
        return cls(choices=choices, **known)


class Composer:
    """Composes and checks the configurations of one door; what `conf/` alone composes is its schema."""

    def __init__(self, loader: ConfigLoader, master: DictConfig, door: str | None = None) -> None:
        self.loader = loader
        self.hydra_overrides: list[str] = list(master.hydra.overrides.hydra)
        self.door: str = door or master.hydra.job.config_name
        self.groups = DOOR_GROUPS.get(self.door, GROUPS)
        self.schemas: dict[tuple[tuple[str, str], ...], Values] = {}
        self.choices: dict[tuple[str, ...], dict[str, str]] = {}

    def load(self, overrides: Sequence[str]) -> DictConfig:
        """Hydra's composition of these overrides, Hydra's own node included."""
        return self.loader.load_configuration(
            self.door, [*self.hydra_overrides, *overrides], run_mode=RunMode.RUN, from_shell=False
        )

    def schema(self, choices: Mapping[str, str]) -> Values:
        """What `conf/` composes for these choices alone: the legal keys and the kinds of their values."""
        key = tuple(sorted(choices.items()))
        if key not in self.schemas:
            self.schemas[key] = plain(self.load([f"{group}={option}" for group, option in key]))
        return self.schemas[key]

    def packaged(self, values: Values, choices: Mapping[str, str]) -> dict[str, str]:
        """The choices with a user's own batch, optim and schedule files replaced by ours of the same name."""
        packaged = dict(choices)
        if "optim" not in choices:
            return packaged
        optim = values["optim"]
        if not self.own("batch", choices["batch"]):
            packaged["batch"] = self.choices_of()["batch"]
        for group, node in (("optim", optim), ("optim/schedule", optim.get("schedule", {}))):
            if not self.own(group, choices[group]):
                ours = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
                try:
                    packaged[group] = one_of(f"{group.replace('/', '.')}.name", node.get("name"), ours)
                except ValueError as error:
                    raise Refused(str(error)) from error
        return packaged

    def usual(self, choices: Mapping[str, str]) -> tuple[Values, dict[str, str]]:
        """What this model, data set and norm usually go with: what a short id need not mention."""
        default = dict(self.choices_of())
        if choices["optim"] != default["optim"]:
            default["optim/schedule"] = self.choices_of(f"optim={choices['optim']}")["optim/schedule"]
        return self.schema({**choices, "batch": default["batch"]}), default

    def choices_of(self, *overrides: str) -> dict[str, str]:
        """The option that every group has with these overrides."""
        if overrides not in self.choices:
            choices = self.load(overrides).hydra.runtime.choices
            self.choices[overrides] = {group: str(choices.get(group)) for group in self.groups}
        return self.choices[overrides]

    def own(self, group: str, option: str) -> bool:
        """Whether this option is one of our YAML files rather than a user's from `--config-dir`."""
        return (conf_dir() / group / f"{option}.yaml").is_file()

    def hidden(self, group: str, option: str) -> list[Path]:
        """A user's files of that name from `--config-dir`, which Hydra would pass over in silence."""
        folders = [
            Path(source.path.removeprefix("file://"))
            for source in self.loader.get_search_path().get_path()
            if source.provider == "command-line" and source.path
        ]
        return [
            f
            for folder in folders
            if self.own(group, option) and (f := folder / group / f"{option}.yaml").is_file()
        ]

    def compose(self, overrides: Sequence[str]) -> tuple[Values, dict[str, str]]:
        """Checked, resolved values and the chosen option of every group; Refused names what is wrong."""
        cfg = self.load(overrides)
        choices = {group: str(cfg.hydra.runtime.choices.get(group)) for group in self.groups}
        for group, option in choices.items():
            options = self.loader.get_group_options(group)
            if option == "None":
                raise Refused(f"{group} is not chosen; add it to the defaults of optim={choices['optim']}")
            if option not in options:
                raise Refused(unknown_option(group, option, options))
            if others := self.hidden(group, option):
                raise Refused(
                    f"{group}={option}: {others[0]} is hidden by ours of that name; give it another"
                )
        values = plain(cfg)
        schema = self.schema(self.packaged(values, choices))
        judged_elsewhere = "norm" in choices and (
            choices["norm"] == "custom" or not self.own("norm", choices["norm"])
        )
        self.check(values, schema, skip="norm." if judged_elsewhere else None)
        if "norm" in choices:
            check_norm(values, choices)
        if self.door == "train":
            check_world(values)
            check_together(values)
            check_pack(values)
            check_traces(values, schema)
        return values, choices

    def check(self, values: Values, schema: Values, skip: str | None) -> None:
        """Every key known, every value of its kind and in range."""
        given, known = dict(flatten(values)), dict(flatten(schema))
        for key in sorted([*given, *known], key=lambda k: "." in k):  # shorthands before what they set
            if skip and key.startswith(skip):
                continue
            if key not in known:
                raise Refused(unknown_key(key, known))
            if key not in given:
                raise Refused(f"{key} was deleted or left out; every key of conf/ must keep a value")
            check_value(key, given[key], known[key])


def plain(cfg: DictConfig) -> Values:
    """Resolved, ordinary containers, without Hydra's own node."""
    values = {}
    for name in map(str, cfg):
        if name == "hydra":
            continue
        try:
            node = cfg[name]
            is_tree = OmegaConf.is_config(node)
            values[name] = OmegaConf.to_container(node, resolve=True) if is_tree else node
        except OmegaConfBaseException as error:
            raise Refused(f"{name}: {str(error).splitlines()[0]}") from error
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; lists are values, and so is everything under `study`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and prefix != "study.":
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_traces(values: Values, schema: Values) -> None:
    """Refuse what is asked of traces that are not taken."""
    for key, value in values["traces"].items():
        kind = "features" if key == "features" else "norms"
        if value != schema["traces"][key] and kind not in trace("trace", values["trace"]):
            raise Refused(f"traces.{key}={show(value)} changes nothing without trace={kind}; add that")


def unknown_key(key: str, known: Mapping[str, Any]) -> str:
    """`unknown key 'epoch'; did you mean 'epochs'?`, looking beside it first and then everywhere."""
    parent, _, leaf = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    anywhere = {k.rpartition(".")[2]: k for k in known}
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key} holds other keys; set one of them: {', '.join(inside)}"
    for names in (beside, anywhere):
        close = closest(leaf, names)
        if close:
            same = [k for k in known if k.rpartition(".")[2] == close]
            meant = names[close] if names is beside else closest(key, same) or names[close]
            return f"unknown key '{key}'; did you mean '{meant}'?"
    return f"unknown key '{key}'" + (f"; there are {', '.join(beside.values())}" if parent and beside else "")


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """`norm=mnb: no such norm; did you mean 'mbn'?`"""
    hint = nearest(option, options) or f"; there are {', '.join(sorted(options))}"
    return f"{group}={option}: no such {group}{hint}"


def check_value(key: str, value: Any, default: Any) -> None:
    """The value is of the default's kind and keeps the key's rule."""
    leaf = key.rpartition(".")[2]
    if leaf == "_target_" or key in ("dataset.name", "optim.name", "optim.schedule.name"):
        if value != default:
            raise Refused(f"{key} names what its group chose and cannot be set to {value!r}; choose with "
                          f"{key.rpartition('.')[0].replace('.', '/')}=…")  # fmt: skip
        return
    try:
        if key.startswith(("dataset.", "study.")):
            return  # DatasetOptions and Study judge theirs
        if key in RULES:
            RULES[key](key, value)
        elif default is not None and kind(value) not in (kind(default), *WIDER.get(kind(default), ())):
            raise ValueError(f"{key} must be {KINDS[kind(default)]} like {show(default)}, got {value!r}")
    except ValueError as error:
        raise Refused(str(error)) from error


KINDS = {"bool": "true or false", "int": "an int", "float": "a number", "str": "a word", "list": "a list",
         "dict": "a mapping", "NoneType": "null"}  # fmt: skip
WIDER = {"float": ("int",)}


def kind(value: Any) -> str:
    """The name of a value's type as YAML knows it."""
    return type(value).__name__


def show(value: Any) -> str:
    """A value as a person types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def norms_with_stride() -> list[str]:
    """The norm options whose YAML has a `stride`."""
    return sorted(
        f.stem for f in (conf_dir() / "norm").glob("*.yaml") if re.search(r"^stride:", f.read_text(), re.M)
    )


def check_norm(values: Values, choices: Mapping[str, str]) -> None:
    """The norm with the root's shorthand."""
    norm, stride = choices["norm"], values["stride"]
    if stride is not None and "stride" not in values["norm"]:
        raise Refused(f"stride={stride}: norm={norm} has no stride; use {' or '.join(norms_with_stride())}, "
                      "or leave stride out (a study's arms let both share a sweep)")  # fmt: skip
    if stride is not None and stride != values["norm"]["stride"]:
        raise Refused(f"stride={stride} contradicts norm.stride={values['norm']['stride']}; set one of them")
    if values.get("sync_bn"):
        check_sync_bn(values, norm)
    if norm == "custom" and values["norm"].get("_target_") in (None, "???"):
        raise Refused("norm=custom needs the layer's class: norm._target_=my_package.MyNorm")


SYNC_BN = "normbench.norms.sync.SyncBatchNorm"
SYNCHRONIZED = {"eps", "momentum", "affine", "track_running_stats", "train_weight", "train_bias"}


def check_sync_bn(values: Values, norm: str) -> None:
    """`sync_bn` with a norm that has a synchronized form, and with the options that the form has."""
    if norm not in ("bn", "obn", "torch_bn"):
        cure = "leave sync_bn out" if norm == "sync_bn" else "use bn, obn or torch_bn, or leave sync_bn out"
        raise Refused(f"sync_bn=true: norm={norm} has no other form that is synchronized; {cure}")
    for key, usual in (("stored_var", "unbiased"), ("eval_bessel", False), ("impl", "reference")):
        if (got := values["norm"].get(key, usual)) != usual:
            raise Refused(f"sync_bn=true needs norm.{key}={show(usual)}, got {show(got)}")


def norm_that_runs(values: Values) -> Values:
    """The norm's class and options, synchronized where `sync_bn` asks for it."""
    norm: Values = values["norm"]
    if not values.get("sync_bn"):
        return norm
    return {"_target_": SYNC_BN, "_partial_": True} | {k: v for k, v in norm.items() if k in SYNCHRONIZED}


def check_world(values: Values) -> None:
    """Write down how many processes train together, and refuse batches that some would get nothing of."""
    if values["world"] is not None:
        raise Refused(f"world={values['world']}: torchrun --nproc-per-node fills it in; leave it out")
    values["world"] = ranks.size() if ranks.size() > 1 else None
    size, micro = values["batch"]["size"], values["batch"]["micro"]
    if micro is not None and micro > size:
        raise Refused(f"batch.micro={micro} is larger than batch.size={size}; use {size} or less, or null")


def check_pack(values: Values) -> None:
    """What several sessions cannot do as one network; what its layers cannot, `packing` says."""
    if values["pack"] is None:
        return
    for key, got, cure in (
        ("precision", values["precision"] == "fp16", "scales all gradients alike; use bf16 or fp32"),
        ("sync_bn", values["sync_bn"], "measures the batches of all processes together"),
        ("world", values["world"] is not None, "is for one process; start it without torchrun"),
    ):
        if got:
            raise Refused(f"pack={values['pack']}: {key}={show(values[key])} {cure}, or leave pack out")


def check_together(values: Values) -> None:
    """What no key can judge alone."""
    if values["steps"] is None and values["epochs"] is None:
        raise Refused("epochs=null and steps=null; give one of them")
    if values["steps"] is not None and values["epochs"] is not None:
        raise Refused(f"epochs={values['epochs']} and steps={values['steps']} exclude each other; give one")
    check_dataset(values)
    if values["cuda_graph"] and values["device"] == "cpu":
        raise Refused("cuda_graph=true needs a CUDA device, got device=cpu; leave cuda_graph out")
    if values["norm"].get("impl") == "fused" and values["precision"] == "fp16" and values["device"] == "cpu":
        raise Refused("norm.impl=fused has no float16 on a CPU; use precision=bf16, or norm.impl=auto")
    schedule = values["optim"]["schedule"]
    if schedule["name"] == "one_cycle" and not 0 < schedule["warmup"] <= 0.5:
        got = schedule["warmup"]
        raise Refused(f"optim.schedule.warmup must be > 0 and ≤ 0.5: one_cycle falls as it rose, got {got}")
    if values["select"] == "best_val" and not values["dataset"]["val_fraction"]:
        raise Refused(
            "select=best_val needs a held-out part of the training set: set dataset.val_fraction=0.1"
        )
    if values["optim"].get("nesterov") and not values["optim"]["momentum"]:
        raise Refused("optim.nesterov=true needs optim.momentum > 0, got 0; set optim.nesterov=false")


def check_dataset(values: Values) -> None:
    """The data set's options, by their owner; and at least one batch."""
    try:
        options = DatasetOptions.from_mapping(values["dataset"])
    except ValueError as error:
        raise Refused(str(error)) from error
    size, samples = values["batch"]["size"], options.train_samples
    if options.drop_last and size > samples:
        raise Refused(f"batch.size={size} is larger than the {samples} training samples, and "
                      f"dataset.drop_last=true would leave no batch; use a smaller batch")  # fmt: skip
    cut = ranks.Cut.here(size, values["batch"]["micro"])
    last = 0 if options.drop_last else samples % size
    for images, cure in ((min(size, samples), "a larger batch.size"), (last, "dataset.drop_last=true")):
        if 0 < images < cut.parts:
            micros = f" × {cut.micros} micro batches" if cut.micros > 1 else ""
            raise Refused(f"a batch of {images} samples (batch.size={size}, {samples} an epoch) cannot be "
                          f"shared by {cut.ranks} processes{micros}; use {cure}")  # fmt: skip
