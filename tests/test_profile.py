"""The profile door: its rows follow from its raw times, its hooks from what ran, its bytes from probing."""

import contextlib
import csv
import gzip
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normbench import cli
from normbench.bench.interleaved import Clock
from normbench.norms.bn import BatchNorm
from normbench.norms.ghost import GhostBatchNorm
from normbench.norms.mbn import MBN
from normbench.profile import compare, measuring, record, traffic, watching

QUICK = ("quick=true", "device=cpu", "model.width=2")


class Halved(nn.Module):
    """A stranger's layer: no class of ours, a batch's mean without gradient, an option."""

    def __init__(self, num_features: int, *, by: float = 2.0) -> None:
        super().__init__()
        self.by = by
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3), keepdim=True)
        return (x - mean) / self.by * self.weight.view(1, -1, 1, 1)


def run(*arguments: str) -> Path:
    """A quick command in this process: its folder."""
    before, threads = set(Path().glob("outputs/profile/*")), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["profile", *QUICK, *arguments])
        try:
            cli.run("profile")
        finally:
            torch.set_num_threads(threads)
    (written,) = set(Path().glob("outputs/profile/*")) - before
    return written.absolute()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of two arms, with a page in docs/ beside outputs/; and what the command said."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(tmp_path_factory.mktemp("both"))
        folder = run("norm=mbn", "stride=1,4", "dataset=cifar10", "name=both", "page=docs/page.md")
    return folder, said.getvalue()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a command is refused."""

    def refuse(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["profile", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run("profile")
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("normbench profile: ")
        return said.removeprefix("normbench profile: ").rstrip()

    return refuse


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_layer_alone_and_in_the_model(both: tuple[Path, str]) -> None:
    folder, said = both
    body = json.loads((folder / "profile.json").read_text())
    rows = rows_of(folder / "layers.csv")
    assert folder.name == "both" and body["complete"] and list(rows[0]) == record.LAYER_COLUMNS
    assert [r["place"] for r in rows] == ["alone", "model"] * 16
    assert {r["arm"] for r in rows} == {"mbn stride=1", "mbn stride=4"} and {r["stride"] for r in rows} == {
        "1",
        "4",
    }
    first, second = rows[:2]
    assert first["shape"] == "4x2x32x32" and first["dataset"] == "cifar10"  # no data file was there
    assert first["torch_version"] == torch.__version__ and first["device_name"] and first["driver_version"]
    for row in rows:
        for which in ("forward", "backward"):
            low, middle, high = (float(row[f"{which}_{kind}_s"]) for kind in ("p20", "median", "p80"))
            assert 0 < low <= middle <= high
            rate = float(row[f"{which}_bytes"]) / middle / 1e9
            assert float(row[f"{which}_gb_per_s"]) == pytest.approx(rate)
            assert row[f"{which}_operators"]
        assert float(row["copy_gb_per_s"]) > 0
    tensor = 4 * 2 * 32 * 32 * 4
    assert [int(first[f"{which}_bytes"]) for which in ("forward", "backward")] == [3 * tensor, 5 * tensor]
    assert float(first["peak_memory_mib"]) * 2**20 >= 2 * tensor  # y and dx
    assert second["peak_memory_mib"] == "" and first["share_of_step"] == ""
    strided = next(r for r in rows if r["stride"] == "4")  # whole rows: every 4th of them
    assert [int(strided[f"{which}_bytes"]) for which in ("forward", "backward")] == [
        2.25 * tensor,
        3.5 * tensor,
    ]
    check_shares(body, rows, rows_of(folder / "steps.csv"))
    check_trace(folder)
    docs = folder.parents[2] / "docs"
    page = (docs / "page.md").read_text()
    assert "mbn stride=4" in said and "norms, by difference" in said and "res1a.norm" in said
    assert "A quick run" in page
    for name in ("layers-model", "layers-alone", "roofline", "steps"):
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")
        assert f"(page/resnet9-cifar10-{name}.svg)" in page
        assert (docs / f"page/resnet9-cifar10-{name}.svg").is_file()


def check_shares(body: dict[str, Any], rows: list[dict[str, str]], steps: list[dict[str, str]]) -> None:
    """Shares are ratios of the same rounds; the sum is less the ReLU that layers have inside."""
    assert [s["arm"] for s in steps] == ["mbn stride=1", "mbn stride=4"]
    for arm, row in zip(body["arms"], steps, strict=True):
        bare = body["without"][arm["without"]]
        assert bare["relus"].keys() == {layer["layer"] for layer in arm["layers"]}
        shares = []
        for i, step in enumerate(arm["step_s"]):
            empty = bare["empty"].values()
            own, nothing = (
                sum(layer["forward_s"][i] + layer["backward_s"][i] for layer in layers)
                for layers in (arm["layers"], empty)
            )
            inside = [layer["layer"] for layer in arm["layers"] if layer["relu_inside"]]
            relus = sum(
                bare["relus"][name][f"{which}_s"][i] for name in inside for which in ("forward", "backward")
            )
            shares.append((own - nothing - relus) / step)
        assert float(row["norm_share_by_layers"]) == pytest.approx(statistics.median(shares))
        lost = [(a - b) / a for a, b in zip(arm["step_s"], bare["step_s"], strict=True)]
        assert float(row["norm_share_by_difference"]) == pytest.approx(statistics.median(lost))
        assert (
            row["rounds"] == "3" and row["agrees"] == "" and row["gap_low"] == ""
        )  # too few for an interval
        own_rows = [r for r in rows if r["arm"] == arm["arm"] and r["place"] == "model"]
        assert 0 < sum(float(r["share_of_step"]) for r in own_rows) < 1


def check_trace(folder: Path) -> None:
    """One file for Perfetto, and the same where TensorBoard's plugin looks."""
    text = (folder / "trace.json").read_bytes()
    names = {event.get("name") for event in json.loads(text)["traceEvents"]}
    assert {"step: mbn stride=1", "step: mbn stride=4", "norm: prep.norm"} <= names
    (copy,) = (folder / "tensorboard").glob("*.pt.trace.json.gz")
    assert gzip.decompress(copy.read_bytes()) == text


def test_arms_of_different_norms_share_a_run_without_norms(both: tuple[Path, str]) -> None:
    arms = 'arms=["norm=obn,nn","norm=mbn stride=2 norm.impl=reference"]'
    folder = run(arms, "channels_last=true", "--compare", str(both[0] / "layers.csv"))
    body = json.loads((folder / "profile.json").read_text())
    assert [arm["arm"] for arm in body["arms"]] == ["obn", "nn", "mbn stride=2 impl=reference"]
    assert len(body["without"]) == 1 and (folder / "compare.svg").is_file()
    rows = rows_of(folder / "layers.csv")
    assert {r["fused"] for r in rows} == {"false"} and {r["relu_inside"] for r in rows} == {"false"}
    nothing = next(r for r in rows if r["norm"] == "nn")
    assert nothing["forward_bytes"] == "0" and nothing["forward_operators"] == ""
    obn = next(r for r in rows if r["norm"] == "obn")
    assert "batch_norm" in obn["forward_operators"] and "backward" in obn["backward_operators"]
    wide = next(r for r in rows if r["stride"] == "2")  # channels last, positions can be skipped
    assert int(wide["forward_bytes"]) / int(obn["forward_bytes"]) == pytest.approx(2.25 / 3)


def test_a_strangers_layer_is_profiled_and_its_bytes_are_found() -> None:
    folder = run("norm=custom", f"norm._target_={__name__}.Halved", "+norm.by=2,3", "model.norm_layers=first")
    rows = rows_of(folder / "layers.csv")
    assert [r["arm"] for r in rows[::2]] == ["Halved by=2", "Halved by=3"]
    tensor = 4 * 2 * 8 * 8 * 4  # the batch has to be seen forward; backward nothing waits for it
    assert {(r["forward_bytes"], r["backward_bytes"]) for r in rows} == {(str(3 * tensor), str(3 * tensor))}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["norm=obn,mbn", "stride=1,2"], "stride=1: norm=obn has no stride; use "),
        (["stride=4"], "stride=4: norm=obn has no stride"),
        (["norm=mbn", "stride=0"], "stride must be an int ≥ 1, got 0"),
        (["epochs=3"], "unknown key 'epochs'"),
        (["norm=mbn", "stride=2,2"], "two arms are one setting (mbn stride=2); give it once"),
        (["model=resnet9,lenet"], "model has one value in a profile; run it once for each"),
        (["rounds=0"], "rounds must be an int ≥ 1, got 0"),
        (["dataset.augment.flip=0.5"], "dataset.augment.flip changes nothing here"),
        (["batch.micro=2"], "batch.micro changes nothing here"),
        (["dataset=cifar10", "dataset.shape=[3,16,16]"], "dataset.shape must be [3, 32, 32] for cifar10"),
        (["compare=none.csv"], "compare=none.csv: no such file"),
        (["--compare=none.csv"], "compare=none.csv: no such file"),
        (["--compare"], "--compare needs a file"),
        (
            ["join=[nowhere]", "page=p.md"],
            "join=nowhere: no such file; give the folder of an earlier profile",
        ),
        (["join=[nowhere]"], "join=nowhere: no such file"),
        (["name=../x"], "name must be a word of letters, digits and . + = ~ - _, got '../x'"),
        (["page=."], "page=. is no Markdown file's name, like docs/profile.md"),
        (["page=page.txt"], "page=page.txt is no Markdown file's name"),
        (["arms=[]"], "arms=[] measures nothing; with join=[folders] page=docs/profile.md it makes a page"),
        (["arms=[]", "norm=mbn"], "arms=[] measures nothing, so norm changes nothing; leave it out"),
        (
            ['arms=["norm=mbn","norm=mbn stride=1"]'],
            "two arms are one setting (mbn and mbn stride=1); give it",
        ),
        (['arms=["norm=obn"]', "norm=mbn"], "norm: set by arms='norm=obn'; leave it out of the command"),
        (['arms=["rounds=3"]'], "arms: 'rounds=3' sets rounds, which is one for all arms"),
        (["arms=3"], "arms must be a list like"),
        (["model.norm_layers=none"], "the model has no norm layers"),
        (["norm=gn", "norm.num_groups=6"], "num_groups=6 does not divide num_features=64"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    refused: Callable[..., str], arguments: list[str], said: str
) -> None:
    assert said in refused(*arguments)
    assert not Path("outputs/profile").exists() or not any(Path("outputs/profile").iterdir())


def test_a_finished_profile_is_never_overwritten(refused: Callable[..., str]) -> None:
    Path("outputs/profile/mine").mkdir(parents=True)
    Path("outputs/profile/mine/profile.json").touch()
    assert refused("name=mine") == (
        "name=mine: outputs/profile/mine is there already; choose another name, or remove it"
    )


def test_tables_of_other_times(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels.csv"
    lines = ["run,bn_index_forward_order,layer_name,fwd_ns,bwd_ns"]
    for run, times in (("A/MBN_S2/1", 1), ("B/MBN_S2/2", 11), ("B/OBN/3", 3)):  # 11 steps in one table
        lines += [f"{run},{i},bn,{(i + 1) * 1000 * times},{2000 * times}" for i in range(2)]
    kernels.write_text("\n".join(lines))
    mbn, obn = compare.read_times(str(kernels))
    assert (mbn.arm, mbn.stride) == ("MBN", 2) and (obn.arm, obn.stride) == ("OBN", None)
    assert mbn.times_s == {"forward": [1e-6, 2e-6], "backward": [2e-6, 2e-6]}
    bars = tmp_path / "bars.csv"
    head = "model,direction,stride,bn_index_forward_order,wall_ns_read"
    bars.write_text(f"{head}\nOBN,forward,1,0,866000\nOBN,backward,1,0,1619000\n")
    (one,) = compare.read_times(str(bars))
    assert one.times_s["forward"] == [pytest.approx(866e-6)]
    compare.check_layers("bars.csv", [one], 1)
    with pytest.raises(ValueError, match="OBN has 1 norm layers, 8 in the model"):
        compare.check_layers("bars.csv", [one], 8)
    for text, said in (
        ("a,b\n1,2\n", "no table of layer times"),
        (f"{head}\nOBN,forward,1,0,866000\n", "lacks layers in its backward pass"),
        (f"{head}\nOBN,forward,x,0,866000\n", "cannot be read"),
        (f"{head}\nOBN,forward,1,0,nan\n", "wall_ns_read must be above 0, got nan"),
        ("", "no table of layer times"),
    ):
        bars.write_text(text)
        with pytest.raises(ValueError, match=said):
            compare.read_times(str(bars))


def test_pages_are_made_of_earlier_profiles(
    both: tuple[Path, str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = both
    monkeypatch.setattr(sys, "argv", ["profile", "arms=[]", f"join=[{folder},{folder}]", "page=two.md"])
    cli.run("profile")
    page = Path("two.md").read_text()
    assert page.count("## resnet9, cifar10's images (3×32×32)") == 2
    for name in ("resnet9-cifar10-steps.svg", "resnet9-cifar10-2-steps.svg"):
        assert f"(two/{name})" in page and (Path("two") / name).is_file()
    body = json.loads((folder / "profile.json").read_text())
    del body["arms"][0]["layers"][3]["forward_s"]
    Path("damaged.json").write_text(json.dumps(body))
    said = "join=damaged.json: what it holds is damaged; give another profile's folder"
    assert refused("arms=[]", "join=[damaged.json]", "page=p.md") == said
    assert refused("join=[damaged.json]", "page=p.md") == said  # before anything is measured


def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = measuring.measure_alone

    def cut(*arguments: Any) -> Iterator[Any]:
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure_alone", cut)
    with pytest.raises(SystemExit) as ended:
        run("name=cut", "model.norm_layers=[prep.norm,layer3.norm]")
    said = capsys.readouterr().err
    assert ended.value.code == 130 and said == "interrupted; what was measured is in outputs/profile/cut\n"
    folder = Path("outputs/profile/cut")
    assert [r["place"] for r in rows_of(folder / "layers.csv")] == ["alone", "model", "model"]
    assert not json.loads((folder / "profile.json").read_text())["complete"]


def test_a_disk_that_is_full_at_the_end_keeps_the_times(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(measuring, "measure_alone", lambda *arguments: iter(()))
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda profiler, path: None)
    said = refused(*QUICK, "name=full", "model.norm_layers=last")
    assert "cannot all be written: outputs/profile/full/trace.json: the profiler could not write it" in said
    assert "outputs/profile/full has layers-model.svg, layers.csv, profile.json, " in said


@pytest.mark.parametrize(
    ("layer", "shape", "last", "units"),
    [
        (BatchNorm(3), (4, 3, 8, 8), False, (3, 5)),
        (MBN(3, stride=4, impl="reference"), (4, 3, 8, 8), False, (2.25, 3.5)),
        (MBN(3, stride=4, impl="reference"), (4, 3, 8, 8), True, (2 + 1 / 16, 3 + 2 / 16)),
        (MBN(3, stride=4, sample="batch"), (8, 3, 8, 8), False, (2.25, 3.5)),
        (MBN(3, stride=8, impl="reference"), (4, 3, 4, 4), False, (2.25, 3.5)),  # the first row is there
        (BatchNorm(3), (6, 3), False, (3, 5)),
        (nn.GroupNorm(1, 3), (4, 3, 8, 8), False, (2, 3)),
        (GhostBatchNorm(3, ghost_batch_size=2), (8, 3, 8, 8), False, (3, 5)),  # every part sees itself
        (nn.Identity(), (4, 3, 8, 8), False, (0, 0)),
        (Halved(3), (4, 3, 8, 8), False, (3, 3)),
    ],
)
def test_bytes_that_a_layer_moves_are_found_by_probing(
    layer: nn.Module, shape: tuple[int, ...], last: bool, units: tuple[float, float]
) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layout = torch.channels_last if last else torch.contiguous_format
    size, float32, cpu = 4 * math.prod(shape), torch.float32, torch.device("cpu")
    found = traffic.bytes_of(layer, shape, (float32, float32), layout, cpu)
    assert found == pytest.approx([unit * size for unit in units])
    half = traffic.bytes_of(layer, shape, (torch.bfloat16, float32), layout, cpu)
    assert half is not None and (half == (0, 0) or half[0] == found[0] - (units[0] - 1) * size / 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_hooks_mark_each_layer_once_in_both_passes() -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            torch.randn(400, 400) @ torch.randn(400, 400)
            return gradients[0] * 2

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Slow.apply(x) + x  # type: ignore[no-any-return, no-untyped-call]

    model = nn.Sequential(nn.Linear(3, 3), Layer(), nn.ReLU(), nn.Linear(3, 3), Layer())
    layers = {"one": model[1], "two": model[4]}
    clock = Clock(torch.device("cpu"))
    with watching.watched(layers, clock) as watch:
        model(torch.randn(2, 3)).sum().backward()
        found = watch.seconds(1)
    both = {"forward", "backward"}
    assert {name: set(passes) for name, passes in found.items()} == {"one": both, "two": both}
    assert all(seconds > 0 for passes in found.values() for seconds in passes.values())
    assert not watch.seen["one"].relu and watch.seen["one"].shape == (2, 3)
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks
    with watching.watched_relus(model, layers, clock) as relus:
        model(torch.randn(2, 3)).sum().backward()
    assert set(relus.seconds(1)) == {"one"}  # nothing stands behind the other


def test_the_interval_of_a_gap_needs_six_rounds() -> None:
    assert record.interval_of_median([1.0, 2.0, 3.0]) == (None, None)
    low, high = record.interval_of_median([float(i) for i in range(1, 8)])
    assert (low, high) == (1.0, 7.0)
    arm: dict[str, Any] = {
        "arm": "a",
        "odd_share": 0.0,
        "step_s": [10.0] * 7,
        "observed_step_s": [10.0] * 7,
        "layers": [{"layer": "n", "relu_inside": True, "forward_s": [2.0] * 7, "backward_s": [1.25] * 7}],
    }
    bare: dict[str, Any] = {
        "step_s": [8.0] * 7,
        "odd_share": 0.0,
        "relus": {"n": {"forward_s": [0.5] * 7, "backward_s": [0.5] * 7}},
        "empty": {"n": {"forward_s": [0.25] * 7, "backward_s": []}},
    }
    row = record.step_row(arm, bare)
    assert row["norm_share_by_layers"] == pytest.approx(0.2) and row[
        "norm_share_by_difference"
    ] == pytest.approx(0.2)
    assert row["agrees"] is True and row["relu_inside_median_s"] == 1
    assert record.step_row(arm, bare | {"odd_share": 0.01})["agrees"] is None
    row = record.step_row(arm, bare | {"step_s": [7.0] * 7})
    assert row["gap"] == pytest.approx(-0.1) and row["agrees"] is False
    assert record.agreement(-0.3, 0.2, 0.25) is None and record.agreement(-0.1, 0.2, 0.25) is True
