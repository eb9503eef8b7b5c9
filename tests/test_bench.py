"""The benchmark door: its figures follow from its raw times, its pages say what its JSON says."""

import json
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import hear_ctrl_c

from normbench import cli
from normbench.bench import layer, page, targets
from normbench.bench.interleaved import CannotRun, Ready, take_turns
from normbench.bench.record import Group
from normbench.bench.spread import Spread

Body = dict[str, Any]
QUICK = ("quick=true", "device=cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Body, str]]:
    """Run a quick command in this process: its JSON and its Markdown."""

    def run(*arguments: str) -> tuple[Body, str]:
        before, threads = set(Path().glob("outputs/bench/*.json")), torch.get_num_threads()
        monkeypatch.setattr(sys, "argv", ["bench", *QUICK, *arguments])
        try:
            cli.run("bench")
        finally:
            torch.set_num_threads(threads)
        (written,) = set(Path().glob("outputs/bench/*.json")) - before
        return json.loads(written.read_text()), written.with_suffix(".md").read_text()

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a command is refused."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run("bench")
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("normbench bench: ")
        return said.removeprefix("normbench bench: ").rstrip()

    return run


def groups_of(body: Body) -> Iterator[Body]:
    for suite in body["suites"].values():
        yield from suite["groups"]


def check(body: Body, markdown: str, suite: str, rounds: int, must_run: set[str]) -> list[Body]:
    """What holds for every suite; `must_run` are sides that no machine may lack."""
    assert list(body["suites"]) == [suite] and body["complete"] and body["quick"]
    machine = body["machine"]
    assert machine["torch"] == torch.__version__ and machine["threads"] == 1 and machine["cores"] >= 1
    assert machine["device_name"] and machine["allocator"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", body["made_at"])
    groups: list[Body] = body["suites"][suite]["groups"]
    assert groups
    for group in groups:
        ran = {name for name, side in group["sides"].items() if side["parts"]}
        assert must_run <= ran, {name: side["missing"] for name, side in group["sides"].items()}
        for side in group["sides"].values():
            assert bool(side["parts"]) != bool(side["missing"])
            for part in side["parts"]:
                check_part(group, side, part, rounds)
        check_table(group, markdown)
    assert "A quick run" in markdown and machine["device_name"] in markdown
    assert all(target["met"] is None and target["why"] for target in body["targets"])
    return groups


def check_part(group: Body, side: Body, part: str, rounds: int) -> None:
    """Medians and ratios are those of the raw times."""
    found = side["parts"][part]
    times = found["times_s"]
    assert len(times) == rounds and all(0 < seconds < 600 for seconds in times)
    assert found["median_s"] == pytest.approx(statistics.median(times))
    assert min(times) <= found["p20_s"] <= found["median_s"] <= found["p80_s"] <= max(times)
    base = group["sides"][group["baseline"]]["parts"].get(part)
    if base:
        ratios = [a / b for a, b in zip(base["times_s"], times, strict=True)]
        assert found["speedup"]["median"] == pytest.approx(statistics.median(ratios))
        assert min(ratios) <= found["speedup"]["p20"] <= found["speedup"]["p80"] <= max(ratios)


def check_table(group: Body, markdown: str) -> None:
    """The group's table has a line for every side with the JSON's numbers, or its reason."""
    lines = markdown.splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith(f"**{targets.case_name(group['case'])}**")
    )
    rows: dict[str, list[str]] = {}
    for line in lines[start + 1 :]:
        if line.startswith("**"):
            break
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[name.removesuffix(" (baseline)")] = cells
    for name, side in group["sides"].items():
        if name == "copy":
            continue
        if side["missing"]:
            assert rows[name][-1] == side["missing"].replace("|", "/")
        for found in side["parts"].values():
            assert page.spread_s(found) in rows[name]
            number, unit, *_ = page.spread_s(found).split()
            scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]
            assert float(number) * scale == pytest.approx(found["median_s"], rel=1e-3)
            if name != group["baseline"] and found["speedup"]:
                assert any(cell.startswith(f"{found['speedup']['median']:.3g}") for cell in rows[name])


def test_layers(bench: Callable[..., tuple[Body, str]]) -> None:
    narrow = ["layer.model=resnet9", "layer.dtype=fp32,bf16", "layer.layout=nhwc", "layer.stride=1,4"]
    body, markdown = bench("suite=layer", *narrow)
    must = {"copy", "nn.BatchNorm2d", "obn", "bn readable", "mbn readable s=1", "mbn readable s=4"}
    groups = check(body, markdown, "layer", 3, must)
    assert [(g["case"]["dtype"], g["case"]["relu"]) for g in groups] == [
        ("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]  # fmt: skip
    for group in groups:
        assert {"bn fused", "mbn fused s=1", "mbn fused s=4"} <= set(group["sides"])
        size = torch.Size(group["case"]["shape"]).numel() * (4 if group["case"]["dtype"] == "fp32" else 2)
        assert group["controls"]["mbn readable s=4"] == "mbn readable s=1"
        copies = group["sides"]["copy"]["parts"]["copy"]
        assert copies["bytes"] == 2 * size
        for name, side in group["sides"].items():
            if name == "copy" or not side["parts"]:
                continue
            forward, backward, both = (side["parts"][part] for part in layer.PASSES)
            for a, b, c in zip(*(part["times_s"] for part in (forward, backward, both)), strict=True):
                assert a + b == pytest.approx(c)
            floor = [c / (4 * d) for c, d in zip(both["times_s"], copies["times_s"], strict=True)]
            assert both["over_floor"]["median"] == pytest.approx(statistics.median(floor))
            assert both["gb_per_s"] == pytest.approx(both["bytes"] / both["median_s"] / 1e9)
        eager = 5 if group["case"]["relu"] else 0
        units = {name: side["parts"]["forward+backward"]["bytes"] / size
                 for name, side in group["sides"].items() if name != "copy" and side["parts"]}  # fmt: skip
        assert units["nn.BatchNorm2d"] == units["mbn readable s=1"] == 8 + eager
        assert units["mbn readable s=4"] == pytest.approx(5 + 3 / 16 + eager)
        if "mbn fused s=4" in units:
            assert units["mbn fused s=4"] == pytest.approx(5 + 3 / 16)


def test_the_shapes_are_those_that_the_models_see() -> None:
    assert layer.shapes_of("resnet9", 64) == {
        (64, 64, 32, 32), (64, 128, 32, 32), (64, 128, 16, 16), (64, 256, 16, 16), (64, 256, 8, 8),
    }  # fmt: skip
    resnet50 = layer.shapes_of("resnet50", 32)
    assert max(resnet50, key=lambda s: (torch.Size(s).numel(), s[1])) == (32, 256, 56, 56)
    assert (32, 2048, 7, 7) in resnet50
    assert layer.shapes_of("dilated_cnn", 2) == {(2, 32, 28, 28)}


def test_a_fused_layer_that_is_none_or_has_other_numbers_is_missing() -> None:
    case = layer.Case(*[None] * 6)  # type: ignore[arg-type]
    assert case.relu is None

    class Inputs:
        def next(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(2, 3), torch.ones(2, 3)

    with pytest.raises(CannotRun, match=r"not fused: it ran aten\.mul"):
        layer.check_twin(lambda x: x * 2, lambda x: x * 2, Inputs(), 1e-3)  # type: ignore[arg-type]
    own = torch.library.custom_op("normbench_tests::threefold", lambda x: x * 3, mutates_args=(),
                                  schema="(Tensor x) -> Tensor")  # fmt: skip
    with pytest.raises(CannotRun, match="other numbers than its readable twin: off by 1"):
        layer.check_twin(own, lambda x: x * 2, Inputs(), 1e-3)  # type: ignore[arg-type]
    layer.check_twin(own, lambda x: x * 3, Inputs(), 1e-3)  # type: ignore[arg-type]


def test_steps(bench: Callable[..., tuple[Body, str]]) -> None:
    body, markdown = bench("suite=step")
    ours = {f"{precision}, {layout}, readable mbn" for precision in ("fp32", "bf16")
            for layout in ("NCHW", "channels-last")}  # fmt: skip
    must = {"naive", *ours, "bf16, channels-last, no norm", "bf16, channels-last, obn"}
    (group,) = check(body, markdown, "step", 3, must)
    assert {f"bf16, channels-last, fused mbn s={s}" for s in (1, 4)} <= set(group["sides"])
    assert group["per"] == "step"


def test_batches(bench: Callable[..., tuple[Body, str]]) -> None:
    body, markdown = bench("suite=loader", "loader.batch_size=32", "data_dir=none")
    must = {"batched on tensors", "PIL per sample", "PIL in a DataLoader, num_workers=0"}
    (group,) = check(body, markdown, "loader", 3, must)
    assert group["per"] == "image" and group["case"]["images"] == "made up, CIFAR's size"
    assert "images/s" in markdown


@pytest.mark.slow
def test_whole_sessions_and_the_plain_loop(bench: Callable[..., tuple[Body, str]]) -> None:
    body, markdown = bench("suite=naive", "data_dir=none")
    must = {"naive", "session, bf16, channels-last, obn", "session, fp32, NCHW, readable mbn"}
    (group,) = check(body, markdown, "naive", 1, must)
    for name in must:
        parts = group["sides"][name]["parts"]
        assert parts["training"]["median_s"] < parts["command"]["median_s"]


@pytest.mark.slow
def test_packs(bench: Callable[..., tuple[Body, str]]) -> None:
    body, markdown = bench("suite=pack", "pack.precision=fp32")
    (group,) = check(body, markdown, "pack", 1, {"one after another"})
    assert list(group["sides"]) == ["one after another", "pack=2"] and group["per"] == "session-step"


@pytest.mark.slow
def test_start_up_and_sweeps(bench: Callable[..., tuple[Body, str]]) -> None:
    body, markdown = bench("suite=startup")
    (group,) = check(body, markdown, "startup", 1, {"a process each", "one process"})
    for side in group["sides"].values():
        outside, command = (side["parts"][part] for part in ("outside the training clock", "command"))
        assert outside["median_s"] < command["median_s"]
    body, markdown = bench("suite=sweep")
    slots = {f"one command, {where}" for where in ("in its process", "1 slot", "2 slots")}
    (group,) = check(body, markdown, "sweep", 1, {"separate commands", *slots})
    assert group["per"] == "session" and "sessions/min" in markdown


def test_sides_take_turns_in_changing_order() -> None:
    order: list[str] = []

    def side(name: str, fails_at: int | None = None) -> Callable[[], Ready]:
        def measure() -> dict[str, float]:
            order.append(name)
            if order.count(name) == fails_at:
                raise CannotRun(f"{name} broke")
            return {"call": float(order.count(name))}

        return lambda: Ready(measure, note=f"of {name}")

    def cannot() -> Ready:
        raise CannotRun("no such device")

    found = take_turns({"a": side("a"), "b": side("b"), "c": side("c", 3), "d": cannot}, 6)
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"].times_s == {"call": [1, 2, 3, 4, 5, 6]} and found["a"].note == "of a"
    assert (found["c"].times_s, found["c"].missing) == ({}, "c broke")
    assert (found["d"].times_s, found["d"].missing) == ({}, "no such device")
    rounds = [order[0:3], order[3:6], order[6:9]]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(set(map(tuple, rounds))) > 1
    assert order[9:] in [list(p + q + r) for p in ("ab", "ba") for q in ("ab", "ba") for r in ("ab", "ba")]


def test_the_spread_is_of_the_rounds_own_ratios() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([1.0, 2, 3, 4, 5, 6]) == Spread(3.5, 2, 5)
    drifting = [1.0, 2.0, 4.0]
    assert Spread.of_ratio([2 * t for t in drifting], drifting) == Spread(2, 2, 2)


def run_of(*groups: Group) -> Body:
    """A run with these groups, as JSON gives it back."""
    suites: Body = {}
    for group in groups:
        suite = suites.setdefault(group.suite, {"groups": [], "made_at": "2026-01-01", "wall_s": 1.0})
        suite["groups"].append(group.body())
    return {"suites": suites, "quick": False, "machine": {"device": "cpu"}}


def layer_group(channels: int, fused_s: float, **case: Any) -> Group:
    """A large case where batch norm takes 1 s, a copy 0.2 s and fused mbn s=4 what is given."""
    times = {"copy": {"copy": 0.2}, targets.BN: {targets.BOTH: 1.0}, "mbn fused s=4": {targets.BOTH: fused_s}}
    sides = {name: lambda parts=parts: Ready(lambda: parts) for name, parts in times.items()}
    usual = {"shape": [64, channels, 32, 32], "layout": "NHWC", "dtype": "fp32", "relu": False, "large": True}
    return Group("layer", {**usual, **case}, "call", targets.BN, take_turns(sides, 3))


def test_targets_are_judged_by_the_worst_case() -> None:
    def judged(*groups: Group) -> dict[str, Body]:
        return {target["what"]: target for target in targets.judged(run_of(*groups))}

    speed = f"fused mbn s=4 against `{targets.BN}`, forward+backward, large NHWC fp32"
    floor = "bytes: fused mbn s=4 over the floor of four copies, large NHWC fp32"
    found = judged(layer_group(64, 0.5), layer_group(128, 0.625))
    assert found[speed]["met"] is True and found[speed]["measured"]["median"] == pytest.approx(1.6)
    assert found[speed]["case"] == "mbn fused s=4, (64,128,32,32) NHWC fp32"
    assert found[floor]["met"] is False and found[floor]["measured"]["median"] == pytest.approx(0.625 / 0.8)
    found = judged(layer_group(64, 0.5), layer_group(128, 0.7), layer_group(256, 9.0, large=False))
    assert found[speed]["met"] is False and found[speed]["measured"]["median"] == pytest.approx(1 / 0.7)
    found = judged(layer_group(64, 0.5, layout="NCHW"))
    assert found[speed]["met"] is None and found[speed]["why"].startswith("not measured: no case with")
    cuda = [target for target in found.values() if target["device"] == "cuda"]
    assert cuda and all(t["met"] is None and t["why"] == "untested: measured on cpu" for t in cuda)


def test_an_earlier_run_beside_this_one(
    bench: Callable[..., tuple[Body, str]], refused: Callable[..., str]
) -> None:
    words = ("suite=loader", "loader.batch_size=16", "data_dir=none")
    first, _ = bench(*words)
    slower = json.loads(json.dumps(first))
    for group in groups_of(slower):
        for side in group["sides"].values():
            for found in side["parts"].values():
                found["median_s"] *= 1000
    Path("before.json").write_text(json.dumps(slower))
    again, markdown = bench(*words, "against=before.json", "page=docs/performance.md")
    assert len(again["against"]["changes"]) == 3
    for *_, then, now, quotient in again["against"]["changes"]:
        assert quotient == pytest.approx(then / now) and quotient > 10
    assert "## Against before.json" in markdown
    joined, markdown = bench("suite=[]", "join=before.json", "page=docs/performance.md")
    assert joined["suites"] == slower["suites"]
    assert Path("docs/performance.md").read_text() == markdown and "Batches of augmented images" in markdown
    assert "## Against" not in Path("docs/performance.md").read_text()
    slower["machine"]["torch"] = "1.0"
    Path("before.json").write_text(json.dumps(slower))
    assert refused("suite=[]", "join=before.json").startswith("join=before.json: measured with torch 1.0")
    Path("before.json").write_text("{}")
    assert refused("against=before.json") == "against=before.json is no result of this version's bench"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("suite=layers", "suite must be one of layer, step, .*did you mean 'layer'"),
        ("round=3", "unknown key 'round'; did you mean 'rounds'"),
        ("layer.strides=1", "unknown key 'layer.strides'; did you mean 'layer.stride'"),
        ("layer.stride=0,1", r"layer.stride\[0\] must be an int ≥ 1, got 0"),
        ("layer.dtype=fp64", r"layer.dtype\[0\] must be one of fp32, bf16, fp16"),
        ("rounds=2,3", "rounds=2,3: rounds has one value in a run; run it once for each"),
        ("rounds=0", "rounds must be an int ≥ 1, got 0"),
        ("suite=[]", r"suite=\[\]: nothing to measure; there are layer, step"),
        ("against=none.json", "against=none.json: no such file"),
        (f"join=[{__file__}]", f"join={__file__} is no result of this version's bench"),
        ("out=/dev/null", "out=/dev/null: /dev/null: File exists; choose another place"),
        ("page=.", "page=. is no file's name"),
        ("device=tpu", "device must be auto, cpu, cuda or cuda:N"),
        ("norm=mbn", "unknown key 'norm'"),
    ],
)
def test_slips_are_one_line(refused: Callable[..., str], arguments: str, said: str) -> None:
    assert re.match(said, refused(*arguments.split()))
    assert not list(Path().glob("outputs/bench/*"))


def test_help_and_ctrl_c() -> None:
    """Help names the suites; what was measured before an interruption is kept, and said to be a part."""
    command = [sys.executable, "-m", "normbench.bench"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "quick=true" in shown and "process_rounds: 3" in shown
    running = subprocess.Popen([*command, *QUICK, "layer.model=resnet9"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("[layer, "):
            break
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted; what was measured is in" in error
    (written,) = Path().glob("outputs/bench/*.json")
    body = json.loads(written.read_text())
    assert not body["complete"] and list(groups_of(body))
    assert "**Interrupted: what was measured until then.**" in written.with_suffix(".md").read_text()
