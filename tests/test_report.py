"""The report: it says what the comparison found, whatever a study has or lacks, and every name is text."""

import json
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from studies import make_study, values_of, warn, write_profile, write_traces

from normbench.figures import BAND, CYCLE, FAINT, INK, SOFT, Sketch, words_of
from normbench.plan import write_json
from normbench.profile import record
from normbench.report import __main__ as door
from normbench.report import curves, drawing
from normbench.report.evidence import differences_of
from normbench.report.layers import profile_of, step_table
from normbench.report.markdown import plain, with_code
from normbench.stats import __main__ as stats

ARMS = {"obn": 0.0, "mbn-stride2": 0.0, "nn": -0.03}
HOSTILE = '<script>alert("1")</script>, \'$x$\' & "q"'
Runner = Callable[..., str]


class Page(HTMLParser):
    """A page's texts by tag, its figures, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.figures: list[str | None] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.open.append(tag)
        self.scripts += tag == "script"
        self.ids += [str(named["id"])] if "id" in named else []
        if tag == "svg":
            self.figures.append(named.get("aria-label"))
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            text = " ".join(data.split())
            self.texts.setdefault(self.open[-1], []).append(text)
            self.said += [text] if self.open[-1] not in ("script", "style", "title") else []

    @property
    def words(self) -> str:
        """All texts, in order."""
        return " ".join(self.said)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Run the door; what it wrote."""

    def run(study: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["report", str(study), *arguments])
        door.main()
        given = door.parser().parse_args([str(study), *arguments])
        return ((given.out or study) / f"report.{given.format}").read_text()

    return run


@pytest.fixture
def refused(report: Runner, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line that the door refuses with."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            report(*map(str, arguments))  # type: ignore[arg-type]
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("normbench report: ")
        return said

    return run


def nothing_drawn(sketches: list[object], *given: object) -> list[None]:
    return [None] * len(sketches)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: what is tested is what is said."""
    monkeypatch.setattr("normbench.report.sections.drawings_of", nothing_drawn)


@pytest.mark.slow
def test_the_page_says_what_stats_found(report: Runner, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    study = make_study(Path("outputs"), ARMS, 10, question="Does it matter?")
    write_traces(next(study.glob("obn-*/s0")))
    write_profile(study / "profile" / "one", ["obn", "nn"], layers=3)
    page = Page(report(study, "--margin", "test_acc=0.005"))
    ours = (study / "comparisons.csv").read_text()
    monkeypatch.setattr(sys, "argv", ["stats", str(study), "--margin", "test_acc=0.005"])
    stats.main()
    assert ours == (study / "comparisons.csv").read_text()
    table = pd.read_csv(study / "comparisons.csv")
    for row in table.itertuples():
        assert f"{row.verdict}: {row.reason}" in page.words
    assert page.texts["h1"] == ["Does it matter?"]
    said = page.said
    assert said.index("Does it matter?") < said.index("different") < said.index("Comparison", 20)
    names = {path.stem for path in (study / "figures").glob("*.svg")}
    assert names == {
        "test_acc-sessions", "test_acc-differences", "epoch_time_s-sessions", "epoch_time_s-differences",
        "epoch_time_s-order", "curves-test_acc", "curves-train_loss", "layers-alone", "layers-model",
        "roofline", "steps", "traces-norms-prep.norm", "traces-norms-layer1.norm",
        "traces-norms-prep.norm-obn", "traces-norms-layer1.norm-obn", "traces-features-prep.norm",
        "traces-features-layer1.norm", "traces-logits",
    }  # fmt: skip
    assert len(page.figures) == 2 * len(names) and all(page.figures)
    forest = next(alt for alt in page.figures if alt and alt.startswith("test_acc against obn"))
    assert all(f"{row.treatment} " in forest and row.verdict in forest for row in table[:2].itertuples())
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert "data-reload" not in (study / "report.html").read_text() and page.scripts == 1


@pytest.mark.usefixtures("no_figures")
def test_the_finding_tells_what_it_is_worth(report: Runner) -> None:
    study = make_study(Path("outputs"), ARMS, 4)
    for file in study.glob("nn-*/s[0-2]/session.json"):
        body = json.loads(file.read_text())
        write_json(file, body | {"row": body["row"] | {"status": "diverged"}})
    warn(next(study.glob("mbn-*/s0")), "never moved: layer1.gate")
    _, finding, warned, *_ = report(study, "--format", "md").split("\n\n")
    assert "3 of 4 diverged)" in finding and "time per epoch" in finding and finding.count("diverged") == 1
    assert "not comparable (too few sessions): " in finding
    assert warned == "The manifests of mbn-stride2 hold warnings: read them below."


def test_losses_have_numbers_at_their_axis_and_missing_arms_are_named() -> None:
    rows = pd.DataFrame({"epoch": [1, 2], "session": "s0", "train_loss": [2.4, 1.9]})
    lost = rows.assign(train_loss=float("nan"))
    for scale, low in (("linear", 1.9), ("log", 0.1)):
        one = rows.assign(train_loss=[2.4, low])
        figure = curves.curves_figure({"obn": one, "nn": lost}, "train_loss", "", 8.0)
        assert figure is not None and figure.axes[0].get_yscale() == scale
        figure.canvas.draw()
        ends = figure.axes[0].get_ylim()
        assert sum(ends[0] <= y <= ends[1] for y in figure.axes[0].get_yticks()) >= 2
        assert "No finite value: nn." in str(words_of(figure)["caption"].get_label())


@pytest.mark.usefixtures("no_figures")
def test_the_finding_names_every_arm_under_its_verdict(report: Runner) -> None:
    study = make_study(Path("outputs"), ARMS, 12)
    text = report(study, "--margin", "test_acc=0.01", "--format", "md")
    _, finding, *_ = text.split("\n\n")
    assert finding.startswith("Test accuracy against obn: different: nn (−0.0")
    assert "equivalent within ±0.01: mbn-stride2; time per epoch against obn: different: " in finding


@pytest.mark.usefixtures("no_figures")
def test_warnings_what_ran_and_differences_are_told_by_arm(report: Runner) -> None:
    study = make_study(Path("outputs"), ARMS, 3)
    warn(study / "mbn-stride2-resnet9-digits-0000000001" / "s1", "norm.stride=2 changed nothing")
    for folder in study.glob("nn-*/s*"):
        warn(folder, "never moved: layer1.gate")
    body = json.loads((next(study.glob("obn-*/s2")) / "session.json").read_text())
    body["manifest"]["norm_layers"][0]["ops"]["forward"] = {"aten.mean": 2}
    (next(study.glob("obn-*/s2")) / "session.json").write_text(json.dumps(body))
    text = report(study, "--format", "md")
    assert "| mbn-stride2 | warning | norm.stride=2 changed nothing | 1 of 3: s1 |" in text
    assert "| nn | warning | never moved: layer1.gate | 3 of 3: all |" in text
    assert "| norm.stride |  | 2 |  |" in text and "other operators or shapes in s2" in text
    assert "| torch\\_version | 2.15.0 |" in text and "native\\_batch\\_norm" in text
    assert "| images | 1437 train, 360 test |".replace("1437", "1,437") in text


def test_arms_that_lack_a_key_say_nothing_of_it() -> None:
    facts = differences_of({"a": {"norm": {"eps": 1e-5, "stride": 2}}, "b": {"norm": {"eps": 1e-5}}})
    assert [(fact.name, list(fact.values)) for fact in facts] == [("norm.stride", ["2", ""])]


def hostile_study() -> Path:
    """A study whose every name is an attack."""
    study = make_study(Path("outputs"), {"obn": 0.0, "mbn": 0.001}, 5, name="a, b <b>", question=HOSTILE)
    for path in [*study.glob("*/s*/session.json"), *study.glob("plan-*.json")]:
        path.write_text(
            path.read_text().replace('mbn-resnet9-digits"', 'mbn-<img src=x onerror=alert(1)>,$a$"')
        )
    for folder in study.glob("mbn-*/s*"):
        warn(folder, HOSTILE)
    write_traces(next(study.glob("mbn-*/s0")))
    path = next(study.glob("mbn-*/s0")) / "traces" / "norms.csv"
    path.write_text(path.read_text().replace("prep.norm", "<script>x</script>"))
    return study


def test_hostile_names_stay_text(report: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    study = hostile_study()
    text = report(study, "--metric", "test_acc")
    page = Page(text)
    assert page.texts["h1"] == [" ".join(HOSTILE.split())] and page.scripts == 1
    assert "<img" not in text and "<script>x" not in text and "onerror" in page.words
    assert any("<img src=x onerror=alert(1)>,$a$" in words for words in page.texts["text"])
    for file in (study / "figures").iterdir():
        assert "<script" not in file.read_text() and "<img" not in file.read_text()
    monkeypatch.setattr("normbench.report.sections.drawings_of", nothing_drawn)
    markdown = report(study, "--format", "md")
    assert "<script" not in markdown and "<img" not in markdown and "&lt;img" in markdown


def test_markdown_shows_what_is_said() -> None:
    assert plain("a|b *c* `d`\n<e> &amp; $f$") == r"a\|b \*c\* \`d\` &lt;e> &amp;amp; \$f\$"
    assert with_code("see `a_b`, not\n\na_b") == r"see `a_b`, not a\_b"
    assert with_code("```<b>`") == "`<b>`"  # an empty piece of code would open one that never ends


def test_a_label_that_looks_like_a_colour_stays(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    def make(width: float) -> Figure:
        figure = Figure(figsize=(width, 2))
        figure.text(0.1, 0.5, "style=\"fill: #222222;\" <b> 'DejaVu Sans' 漢", color="#222222")
        return figure

    drawn = drawing.drawing_of("one", Sketch(("one",), make, 'an "alt" <b>'), tmp_path)
    assert drawn is not None
    assert (
        "fill: #222222;\" &lt;b&gt; 'DejaVu Sans' 漢" in drawn.wide and "fill: var(--c222222)" in drawn.wide
    )
    assert "&quot;alt&quot; &lt;b&gt;" in drawn.narrow and "#222222;" in drawn.file.read_text()


def test_the_page_has_every_colour_in_light_dark_and_print() -> None:
    style = (Path(drawing.__file__).parent / "page.css").read_text()
    assert {style.count(f"--c{colour[1:]}:") for colour in (*CYCLE, INK, SOFT, FAINT, BAND)} == {3}


def test_a_profiles_arms_have_the_colours_of_the_studys(tmp_path: Path) -> None:
    folder = write_profile(tmp_path, ["mbn-stride2", "gn", "obn"], layers=2)
    profile = profile_of(tmp_path, folder, [])
    assert profile is not None
    norms = [(arm.partition("-")[0], values_of(arm, "", "")["norm"]) for arm in ("obn", "mbn", "mbn-stride2")]
    options = [(name, {k: v for k, v in norm.items() if k != "_partial_"}) for name, norm in norms]
    assert profile.places(options) == [2, 3, 0]
    head, rows = step_table(profile)
    assert head[:2] == ["arm", "step (ms)"] and [row[0] for row in rows] == ["mbn stride=2", "gn", "obn"]
    step = record.step_row(profile.body["arms"][0], profile.body["without"]["resnet9"])
    assert float(rows[0][1]) == pytest.approx(1e3 * step["step_median_s"], rel=1e-3)
    assert float(rows[0][3]) == pytest.approx(100 * step["norm_share_by_layers"], rel=1e-3)


@pytest.mark.usefixtures("no_figures")
def test_unfinished_studies_have_a_page(report: Runner) -> None:
    study = make_study(Path("outputs"), ARMS, 4, finished=0)
    page = Page(report(study))
    assert "No session has ended yet" in page.words and "0 of 12 done, 12 to run" in page.words
    assert not (study / "comparisons.csv").exists()
    study = make_study(Path("half"), ARMS, 4, finished=7)
    page = Page(report(study))
    assert "7 of 12 done" in page.words and "Comparison" in page.words


@pytest.mark.usefixtures("no_figures")
def test_what_cannot_be_read_beside_the_results_is_a_notice(report: Runner) -> None:
    study = make_study(Path("outputs"), ARMS, 3)
    session = next(study.glob("obn-*/s0"))
    write_traces(session)
    (session / "traces" / "features.csv").write_text("epoch,layer\n1,x\n")
    (next(study.glob("nn-*/s1")) / "epochs.csv").write_text("epoch,train_loss\n1,many\n")
    write_json(study / "profile" / "one" / "profile.json", {"format": 0})
    damaged = next(study.glob("mbn-*/s2")) / "session.json"
    write_json(damaged, json.loads(damaged.read_text()) | {"manifest": {"norm_layers": ["x"], "notes": 3}})
    words = Page(report(study)).words
    assert "features.csv cannot be read: no column 'step'" in words
    assert "profile.json is no result of this version's profile" in words
    assert "epochs.csv cannot be read" in words and "s2/session.json has a damaged manifest; remove" in words
    # a row that is being written is left for the next look
    with (next(study.glob("nn-*/s0")) / "epochs.csv").open("a") as file:
        file.write("9,10")
    report(study)


def test_mistakes_cost_one_line(refused: Callable[..., str]) -> None:
    study = make_study(Path("outputs"), ARMS, 3)
    assert "no sessions under nowhere" in refused("nowhere")
    assert "is a file; give a folder" in refused(study, "--out", next(study.glob("plan-*.json")))
    assert "is a file; give a study's folder" in refused(next(study.glob("plan-*.json")))
    assert "--profile=nowhere: no such file; give the folder of" in refused(study, "--profile", "nowhere")
    assert "baseline 'xyz': no such arm" in refused(study, "--baseline", "xyz")
    assert "--margin 0.1: name the metric" in refused(study, "--margin", "0.1")
    assert "--alpha must lie between 0 and 1" in refused(study, "--alpha", "2")
    write_json(study / "p" / "profile.json", {"format": 2, "arms": []})
    assert "is no result of this version's profile" in refused(study, "--profile", study / "p")
    (next(study.glob("nn-*/s1")) / "session.json").write_text("{")
    assert "is damaged" in refused(study)
    assert not (study / "report.html").exists()


@pytest.mark.usefixtures("no_figures")
def test_watching_rewrites_what_changed_and_ends_with_the_sweep(
    report: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(Path("outputs"), ARMS, 4)
    kept = Path("kept")
    later = sorted(study.glob("*/s3"))
    for folder in later:
        shutil.copytree(folder, kept / folder.relative_to(study))
        shutil.rmtree(folder)
    naps: list[str] = []

    def nap(seconds: float) -> None:
        assert seconds == 7
        naps.append((study / "report.html").read_text())
        if len(naps) == 2:  # at the first nothing has changed
            for folder in later:
                shutil.copytree(kept / folder.relative_to(study), folder)

    monkeypatch.setattr(door.time, "sleep", nap)
    monkeypatch.setattr(door.os, "nice", lambda by: by)
    text = report(study, "--watch", "7")
    assert len(naps) == 2 and naps[0] == naps[1] and 'data-reload="7.0"' in naps[0]
    assert "9 of 12 done" in Page(naps[0]).words
    assert "data-reload" not in text and "12 of 12 done" in Page(text).words
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "9 of 12 done" in said[0] and "12 of 12 done" in said[1]


@pytest.mark.usefixtures("no_figures")
def test_a_watched_page_stops_to_load_itself_when_interrupted(
    report: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(Path("outputs"), ARMS, 4, finished=2)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(door.time, "sleep", interrupt)
    monkeypatch.setattr(door.os, "nice", lambda by: by)
    # a comparison that cannot be made yet is waited for
    text = report(study, "--watch", "--baseline", "gn")
    assert "data-reload" not in text and "no comparison yet: baseline 'gn'" in Page(text).words


@pytest.mark.usefixtures("no_figures")
def test_groups_have_tables_of_their_own(report: Runner) -> None:
    study = make_study(Path("outputs"), {"obn": 0.0, "mbn": 0.0, "gn": 0.0}, 3)
    text = report(study, "--by", "dataset", "--metric", "test_acc", "--metric", "test_loss", "--out", "there",
                  "--format", "md")  # fmt: skip
    assert "**dataset=digits test\\_acc against obn**" in text and "test\\_loss against obn" in text
    assert sorted(path.name for path in Path("there").iterdir()) == ["comparisons.csv", "report.md"]
    assert "normbench.stats outputs/made --metric test_acc --metric test_loss --by dataset`" in text
