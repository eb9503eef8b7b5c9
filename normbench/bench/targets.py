"""What the project means to reach, and whether a run did: measured, never typed in."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from normbench.bench.record import Body
from normbench.bench.spread import Spread

BOTH = "forward+backward"
BN = "nn.BatchNorm2d"
STRIDED = ("mbn fused s=2", "mbn fused s=4", "mbn fused s=8")


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of two sides' times, or on one side's time.

    Args:
        what: in words.
        bound: of the ratio, or of the seconds where `of` is None.
        suite, where: the groups that it is about: those whose case has these values.
        part: of the times.
        of: the side whose time is divided; None for seconds.
        over: the sides, each of which must keep the bound.
        at_most: the bound is a ceiling, else a floor.
        part_over: the same of `over`, where it is another.
        times: factor on the time of `over`.
        device: on which it is meant, cpu or cuda.
    """

    what: str
    bound: float
    suite: str
    of: str | None
    over: tuple[str, ...]
    part: str = "step"
    where: Mapping[str, Any] = field(default_factory=dict)
    at_most: bool = False
    part_over: str | None = None
    times: float = 1.0
    device: str = "cpu"

    def judge(self, run: Body) -> Body:
        """The target beside its worst case in the run; `met` is None where nothing was measured."""
        body: Body = {
            "what": self.what,
            "suite": self.suite,
            "device": self.device,
            "bound": self.bound,
            "at_most": self.at_most,
            "unit": "s" if self.of is None else "ratio",
            "met": None,
            "measured": None,
            "case": None,
        }
        if run["machine"]["device"].split(":")[0] != self.device:
            return {**body, "why": f"untested: measured on {run['machine']['device']}"}
        if run["quick"]:
            return {**body, "why": "not measured: a quick run"}
        found, missing = [], []
        for group in self.groups(run):
            for side in self.over:
                try:
                    found.append((self.spread(group, side), f"{side}, {case_name(group['case'])}"))
                except Absent as why:
                    missing.append(str(why))
        if missing or not found:
            return {**body, "why": missing[0] if missing else self.why_none(run)}
        worst, case = (max if self.at_most else min)(found, key=lambda pair: pair[0].median)
        met = worst.median <= self.bound if self.at_most else worst.median >= self.bound
        return {**body, "met": met, "measured": asdict(worst), "case": case, "why": None}

    def groups(self, run: Body) -> Iterator[Body]:
        """The run's groups that it is about."""
        for group in run["suites"].get(self.suite, {}).get("groups", ()):
            if all(group["case"].get(key) == value for key, value in self.where.items()):
                yield group

    def why_none(self, run: Body) -> str:
        """Why no group is what it is about."""
        if self.suite not in run["suites"]:
            return f"not measured: suite={self.suite} did not run"
        asked = ", ".join(f"{key}={value}" for key, value in self.where.items())
        return f"not measured: no case with {asked}"

    def spread(self, group: Body, side: str) -> Spread:
        """Of the ratio's rounds; Absent says which side is missing and why."""
        if self.of is None:
            return Spread.of(times_of(group, side, self.part))
        of, over = times_of(group, self.of, self.part), times_of(group, side, self.part_over or self.part)
        return Spread.of_ratio(of, [self.times * seconds for seconds in over])


class Absent(Exception):
    """A side has no times; the text says why."""


def times_of(group: Body, side: str, part: str) -> list[float]:
    """One part's raw times."""
    found = group["sides"].get(side)
    if found is None:
        raise Absent(f"not measured: {side} was not asked for")
    if part not in found["parts"]:
        raise Absent(f"not measured: {side}: {found['missing']}")
    times: list[float] = found["parts"][part]["times_s"]
    return times


def case_name(case: Mapping[str, Any]) -> str:
    """A case in a few words: `(64,128,32,32) NHWC fp32 with ReLU`."""
    words = []
    for key, value in case.items():
        if key in ("large", "seen_by"):
            continue
        if key == "relu":
            words += ["with ReLU"] if value else []
        elif isinstance(value, list):
            words.append(f"({','.join(map(str, value))})")
        else:
            words.append(str(value) if isinstance(value, str) else f"{key}={value}")
    return " ".join(words)


def judged(run: Body) -> list[Body]:
    """Every target beside what the run measured."""
    return [target.judge(run) for target in targets()]


def targets() -> Iterable[Target]:
    """All of them, in the order they are shown in."""
    large = {"large": True, "dtype": "fp32", "relu": False}
    nhwc, nchw = {**large, "layout": "NHWC"}, {**large, "layout": "NCHW"}
    for stride, bound in ((2, 1.15), (4, 1.6), (8, 1.9)):
        yield Target(
            f"fused mbn s={stride} against `{BN}`, forward+backward, large NHWC fp32",
            bound, "layer", BN, (f"mbn fused s={stride}",), BOTH, nhwc,
        )  # fmt: skip
    yield Target(f"fused mbn, any stride, against `{BN}`, forward+backward, large NCHW fp32",
                 1.9, "layer", BN, ("mbn fused s=1", *STRIDED), BOTH, nchw)  # fmt: skip
    yield Target("fused mbn s=4 with ReLU inside against eager batch norm + ReLU, large NHWC fp32",
                 2.4, "layer", BN, ("mbn fused s=4",), BOTH, {**nhwc, "relu": True})  # fmt: skip
    yield Target("bytes: fused mbn s=4 over the floor of four copies, large NHWC fp32",
                 0.72, "layer", "mbn fused s=4", ("copy",), BOTH, nhwc, at_most=True, part_over="copy",
                 times=4.0)  # fmt: skip
    for stride in (1, 4):
        yield Target(
            f"ResNet9 step with fused norm+ReLU s={stride} over the same step without norm and eager ReLU, "
            "bf16 channels-last",
            1.02, "step", f"bf16, channels-last, fused mbn s={stride}", ("bf16, channels-last, no norm",),
            at_most=True,
        )  # fmt: skip
    yield Target("ResNet9 step against the naive loop's", 2.4, "step", "naive",
                 ("bf16, channels-last, fused mbn s=4",))  # fmt: skip
    yield Target("batched augmentation against PIL per sample", 9, "loader", "PIL per sample",
                 ("batched on tensors",), "image")  # fmt: skip
    yield Target("start-up of a session in a sweep against a process each", 15, "startup",
                 "a process each", ("one process",), "outside the training clock")  # fmt: skip
    for precision, bound in (("fp32", 1.4), ("bf16", 2.0)):
        yield Target(f"pack=8, dilated_cnn, batch 2, {precision}, against one after another", bound, "pack",
                     "one after another", ("pack=8",), where={"precision": precision})  # fmt: skip
    yield from cuda_targets()


def cuda_targets() -> Iterable[Target]:
    """Of one GPU of the H200's class."""
    case = {"shape": [512, 128, 32, 32], "layout": "NHWC", "dtype": "bf16"}
    plain, relu = {**case, "relu": False}, {**case, "relu": True}
    words = "(512,128,32,32) bf16 NHWC, fused mbn s=4"
    yield Target(f"{words}, forward+backward", 190e-6, "layer", None, ("mbn fused s=4",), BOTH, plain,
                 at_most=True, device="cuda")  # fmt: skip
    for name in (BN, f"{BN} fp16"):
        yield Target(f"{words}, against `{name}`", 1.4, "layer", name, ("mbn fused s=4",), BOTH, plain,
                     device="cuda")  # fmt: skip
        yield Target(f"{words} with ReLU inside, against eager `{name}` + ReLU", 2.1, "layer", name,
                     ("mbn fused s=4",), BOTH, relu, device="cuda")  # fmt: skip
    yield Target("pack=30, dilated_cnn, batch 2, against one after another", 30, "pack",
                 "one after another", ("pack=30",), device="cuda")  # fmt: skip
    yield Target("ResNet9, CIFAR-10, 24 epochs, training clock", 9.0, "session", None,
                 ("24 epochs",), "training", at_most=True, device="cuda")  # fmt: skip
    yield Target("30 sessions of it, whole command", 300.0, "session", None, ("30 sessions",), "command",
                 at_most=True, device="cuda")  # fmt: skip
