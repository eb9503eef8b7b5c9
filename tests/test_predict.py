"""`predict`: the row's own numbers from every kind of input, weights all from the file, one-line errors."""

import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Planner, Trainer
from PIL import Image

from normbench import checkpoint, figures
from normbench.plan import write_whole
from normbench.predict import __main__ as door
from normbench.predict import images
from normbench.predict.batches import Place, of_folder, of_split
from normbench.predict.figures import confusion_figure
from normbench.predict.images import Table, list_folder
from normbench.predict.scores import Predictions, predictions_text, score
from normbench.predict.weights import config_of
from normbench.values import Refused

Predict = Callable[..., str]
SMALL = ["model.width=4", "batch.size=64", "dataset.train_subset=192", "threads=1", "tensorboard=false"]
TINY = [*SMALL, "epochs=2"]
KEPT = ["save_model=true", "checkpoint.keep=true", "checkpoint.every=1epoch"]


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Predict:
    """What a `predict` command prints, or with `fails` the one line it is refused with."""

    def run(*arguments: object, fails: bool = False, draws: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        if not draws:  # which takes longer than all else
            monkeypatch.setattr(figures, "svg_of", lambda *_: "<svg/>")
        capsys.readouterr()
        if not fails:
            door.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            door.main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.err.count("\n") == 1, said
        return said.err.removeprefix("normbench predict: ").rstrip()

    return run


@pytest.fixture
def session(train: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished session on the digits with its weights and its last checkpoint, trained once."""
    trained = tmp_path_factory.getbasetemp() / "predict-session"
    if not trained.exists():
        train(*TINY, *KEPT, f"out={trained}")
    shutil.copytree(next(trained.glob("adhoc/*/s0")), "s0")
    return Path("s0")


def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The 360 images of the test set (n, 64) from 0 to 255, and their labels."""
    from sklearn.datasets import load_digits

    bunch, order = load_digits(), np.random.default_rng(0).permutation(1797)[1437:]
    return np.rint(bunch.images[order] * 255 / 16).astype(int).reshape(360, 64), bunch.target[order]


def seen(batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All images, and all labels where they are known."""
    labels = [y for _, y in batches if y is not None]
    return torch.cat([x for x, _ in batches]), torch.cat(labels) if labels else None


def row_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "session.json").read_text())["row"]  # type: ignore[no-any-return]


def table(path: str = "predictions.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(path: str = "predictions-metrics.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())  # type: ignore[no-any-return]


def test_the_own_test_set_gives_the_rows_numbers(session: Path, predict: Predict) -> None:
    row, predictions = row_of(session), []
    for weights in (session, session / "model.pt"):
        said = predict(weights, "--split", "test", "--top", 3, draws=weights == session)
        assert "equal to the session's row: test_acc and test_macro_f1" in said
        found = metrics()
        assert (found["acc"], found["macro_f1"]) == (row["test_acc"], row["test_macro_f1"])
        assert found["loss"] == pytest.approx(row["test_loss"], rel=1e-6)
        assert found["micro_f1"] == pytest.approx(found["acc"]) and found["images"] == 360
        predictions.append(Path("predictions.csv").read_text())
        assert len(Path("predictions-confusion.svg").read_text()) > 10_000 or weights != session
    assert predictions[0] == predictions[1]
    rows = table()
    assert list(rows[0]) == [
        *(
            "index",
            "label",
            "probability",
            "label_2",
            "probability_2",
            "label_3",
            "probability_3",
            "true_label",
        )
    ]
    first = np.array([[int(r["label"]), int(r["label_2"]), int(r["label_3"])] for r in rows])
    truth = np.array([int(r["true_label"]) for r in rows])
    assert (truth == digits()[1]).all() and [int(r["index"]) for r in rows] == list(range(360))
    assert metrics()["top3_acc"] == (first == truth[:, None]).any(1).mean() > metrics()["acc"]
    assert metrics()["acc"] == (first[:, 0] == truth).mean()
    with open("predictions-confusion.csv") as file:
        matrix = np.array([[int(n) for n in line[1:]] for line in list(csv.reader(file))[1:]])
    assert matrix.sum() == 360 and np.trace(matrix) == round(360 * metrics()["acc"])
    assert (matrix.sum(1) == np.bincount(truth)).all()
    assert (matrix.sum(0) == np.bincount(first[:, 0], minlength=10)).all()


def test_a_row_that_says_otherwise_is_said(session: Path, predict: Predict) -> None:
    text, row = (session / "session.json").read_text(), row_of(session)
    text = text.replace(f'"test_acc": {row["test_acc"]}', '"test_acc": 0.25')
    (session / "session.json").write_text(text.replace(row["device_name"], "Abacus"))
    said = predict(session, "--split", "test")
    assert "NOT equal to the session's row, which says test_acc 0.25, " in said
    assert f", on Abacus and not {row['device_name']}\n" in said


def test_every_way_to_write_the_images_gives_the_same_predictions(session: Path, predict: Predict) -> None:
    images, labels = digits()
    np.savetxt("integers.csv", images, fmt="%d", delimiter=",")
    np.savetxt("exponents.csv", images, delimiter=",")
    np.savetxt("fractions.csv", images / 255, fmt="%.8f", delimiter=",")
    np.savetxt("first.csv", np.c_[labels, images], fmt="%d", delimiter=",")
    np.savetxt("last.csv", np.c_[images / 255, labels], fmt="%.8f", delimiter=",")
    np.savetxt("labels.csv", labels, fmt="%d")
    for label in range(10):
        Path("classes", str(label)).mkdir(parents=True)
    Path("flat").mkdir()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.fromarray(image.reshape(8, 8).astype(np.uint8))
        picture.save(f"flat/{i:03}.png")
        picture.convert("RGB").save(f"classes/{label}/{i:03}.png")
    config = config_of(session / "config.yaml")
    x, y = seen(list(of_split(config.dataset, "test", ".", Place(config, torch.device("cpu"), 100))))
    for arguments in (
        ("integers.csv",),
        ("exponents.csv", "--labels", "labels.csv", "--batch-size", "7"),
        ("fractions.csv", "--labels", "labels.csv"),
        ("fractions.csv", "--scale", "1"),
        ("first.csv", "--label-column", "1"),
        ("last.csv", "--label-column", "-1", "--batch-size", "359"),
        ("flat",),
        ("flat/000.png",),
    ):
        given = door.parser().parse_args(["s0", *arguments])
        asked = door.asked(given, config, given.batch_size or 100)
        images, truth = seen(list(asked.batches(Place(config, torch.device("cpu"), 100), ".")))
        torch.testing.assert_close(images, x[: len(images)], rtol=1e-5, atol=1e-5)
        assert len(images) == (1 if arguments[0].endswith(".png") else 360)
        assert truth is None if len(arguments) == 1 or "--scale" in arguments else torch.equal(truth, y)
    acc, macro_f1 = row_of(session)["test_acc"], row_of(session)["test_macro_f1"]
    predict(session, "classes")
    in_order = sorted(table(), key=lambda row: row["file"].split("/")[1])
    assert metrics()["acc"] == acc and metrics()["macro_f1"] == pytest.approx(macro_f1, abs=1e-12)
    predict(session, "first.csv", "--label-column", "1")
    assert (metrics()["acc"], metrics()["macro_f1"]) == (acc, macro_f1)
    assert [row["label"] for row in table()] == [row["label"] for row in in_order]
    assert "removed: predictions-metrics.json, " in predict(session, "flat")
    assert not Path("predictions-metrics.json").exists()
    assert table()[5]["file"] == "005.png" and "true_label" not in table()[0]
    predict(session, "integers.csv", "--format", "study", "--out", "deep/er/study.csv")
    assert Path("deep/er/study.csv").read_text().split() == [row["label"] for row in table()]


@pytest.mark.slow
def test_a_packs_sessions_on_all_parts_of_their_data_set_with_the_weights_of_the_best_epoch(
    train: Trainer, predict: Predict
) -> None:
    parts = ["dataset.val_fraction=0.25", "dataset.test_subset=32", "select=best_val"]
    packed = ["pack=2", "session=0,1", "norm=mbn", "stride=2", "channels_last=true", "precision=bf16"]
    plan = train(*TINY, "save_model=true", *parts, *packed)
    folders = [plan.session_folder(planned) for planned in plan.sessions]
    for folder in folders:
        assert "equal to the session's row" in predict(folder, "--split", "test")
        assert (metrics()["images"], metrics()["precision"]) == (32, "bf16")
    predict(folders[1], "--split", "val")
    assert (metrics()["acc"], metrics()["images"]) == (row_of(folders[1])["val_acc"], 359)
    predict(folders[1], "--split", "train", "--batch-size", 50)
    assert metrics()["images"] == 192


def test_a_checkpoint_is_the_session_so_far(session: Path, predict: Predict) -> None:
    (session / "model.pt").unlink()
    assert "s0/checkpoint.pt" in predict(session, "--split", "test")  # kept, of the row's step
    assert (metrics()["acc"], metrics()["step"]) == (row_of(session)["test_acc"], 6)
    (session / "checkpoint-before.pt").replace(session / "checkpoint.pt")
    said = predict(session / "checkpoint.pt", "--split", "test")
    assert "after step 3 in epoch 1)" in said and "session's row" not in said
    so_far = (session / "epochs.csv").read_text().splitlines()[1].split(",")[7]
    assert (metrics()["acc"], metrics()["step"], metrics()["epoch"]) == (float(so_far), 3, 1)
    assert predict(session, "--split", "test", fails=True) == (
        "s0 did not keep the weights that its row reports; train it with save_model=true; s0/checkpoint.pt "
        "itself may be given, for its weights so far"
    )
    (session / "session.json").unlink()
    assert "s0 has not finished; run its command again; s0/checkpoint.pt" in predict(
        session, "--split", "test", fails=True
    )


LAYERS = """
import torch
from torch import nn

class Shift(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_features))
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True) + self.bias.view(-1, 1, 1)

class Hidden(Shift):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.moving = torch.zeros(num_features)

class Forgotten(Shift):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.register_buffer("moving", torch.zeros(num_features), persistent=False)

def shift(num_features):
    return Shift(num_features)
"""


@pytest.mark.slow
def test_a_layer_of_ones_own_works_where_the_file_holds_its_whole_state(
    train: Trainer, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("layers_of_predict.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    shift = "norm._target_=layers_of_predict.Shift"
    plan = train(*SMALL, "steps=1", "save_model=true", "norm=custom", shift)
    folder = plan.session_folder(plan.sessions[0])
    assert "equal to the session's row" in predict(folder, "--split", "test")
    unhashed = re.sub("config_hash.*\n", "", (folder / "config.yaml").read_text())
    for name, why in (
        ("Hidden", "prep.norm.moving is a plain attribute, so no file holds it"),
        ("Forgotten", "prep.norm.moving is a buffer that is not persistent, so no file holds it"),
        ("shift", "layers_of_predict.shift is no torch.nn.Module"),
    ):
        (folder / "config.yaml").write_text(unhashed.replace("predict.Shift", f"predict.{name}"))
        assert why in predict(folder, "--split", "test", fails=True)
    sys.modules.pop("layers_of_predict")
    Path("layers_of_predict.py").unlink()
    assert "layers_of_predict.shift cannot be imported (No module named 'layers_of_predict')" in predict(
        folder, "--split", "test", fails=True
    )


def test_weights_that_are_not_the_models_name_the_first_tensor(session: Path, predict: Predict) -> None:
    state = torch.load(session / "model.pt", weights_only=True)
    first, *_, last = state
    blame = "s0/model.pt does not fit model=resnet9 norm=obn: "
    for changed, why in (
        ({name: state[name] for name in state if name != first}, f"it has no {first} (4, 1, 3, 3)"),
        ({**state, last: torch.ones(3, 2)}, f"{last} is (3, 2), not ({len(state[last])},"),
        ({**state, "extra": torch.ones(2)}, "it has extra (2,), the model has not"),
        ({**state, first: state[first].long()}, f"{first} is torch.int64, not torch.float32"),
    ):
        torch.save(changed, session / "model.pt")
        assert predict(session, "--split", "test", fails=True).startswith(blame + why)
    for odd in (state[first].to_sparse(), state[first].to("meta")):
        torch.save({**state, first: odd}, session / "model.pt")
        assert f"{first!r} is a sparse, quantized or empty" in predict(session, "--split", "test", fails=True)
    torch.save({**state, first: state[first] * float("nan")}, session / "model.pt")
    not_finite = "s0/model.pt: the logits of image 1 are not finite"
    assert predict(session, "--split", "test", fails=True) == not_finite
    text = (session / "session.json").read_text()
    (session / "session.json").write_text(text.replace('"status": "ok"', '"status": "diverged"'))
    assert predict(session, "--split", "test", fails=True) == not_finite + "; its session diverged"


class Touches:
    """A pickle that would make a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def test_files_that_are_no_weights(session: Path, predict: Predict) -> None:
    path, whole = session / "model.pt", (session / "model.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1

    def refused(content: bytes) -> str:
        path.write_bytes(content)
        return predict(path, "--split", "test", fails=True)

    foreign = "s0/model.pt is no state_dict: it is cut off, or foreign; give a session's model.pt"
    assert refused(b"0,1,2\n") == refused(pickle.dumps(Touches())) == foreign
    assert refused(b"") == "s0/model.pt is empty"
    assert refused(whole[:-7]) == "s0/model.pt is damaged: its directory is not as torch wrote it"
    assert re.search("is damaged: archive/.* is not as torch wrote it", refused(bytes(flipped)))
    marked = bytearray(whole)  # one bit makes the last part a folder, of which torch reads nothing
    marked[whole.rindex(b"PK\1\2") + 38] ^= 16
    assert "is not as torch wrote it" in refused(bytes(marked))
    for content, why in (
        ({"a": Touches()}, "it holds more than tensors, and is not read further"),
        ({"model": {"w": torch.ones(1)}}, "'model' is dict, not a tensor"),
        (torch.ones(2), "it holds Tensor instead of named tensors"),
    ):
        torch.save(content, path)
        assert predict(path, "--split", "test", fails=True) == f"s0/model.pt is no state_dict: {why}"
    saved = session / "checkpoint.pt"
    end = saved.read_bytes()
    for body in ({"model": {"a": Touches()}, "step": 1, "epoch": 1}, {"step": 1, "epoch": 1}, [1]):
        buffer = io.BytesIO()
        torch.save(body, buffer)
        head = {"epoch": 1, "step": 1, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
        saved.write_bytes(checkpoint.FORMAT + json.dumps(head).encode() + b"\n" + buffer.getvalue())
        assert predict(saved, "--split", "test", fails=True) == (
            "s0/checkpoint.pt is no session's checkpoint, and is not read further"
        )
    assert not Path("ran").exists()
    saved.write_bytes(end[:-9])
    assert predict(saved, "--split", "test", fails=True) == (
        "s0/checkpoint.pt: it is damaged: its checksum does not fit"
    )


def test_the_configuration_is_the_sessions(session: Path, predict: Predict) -> None:
    config, text = session / "config.yaml", (session / "config.yaml").read_text()
    shutil.copy(session / "model.pt", "alone.pt")
    assert predict("alone.pt", "--split", "test", fails=True) == (
        "alone.pt: no config.yaml beside it; give the session's own by --config"
    )
    assert "session's row" not in predict("alone.pt", "--config", config, "--split", "test")
    config.write_text(text.replace("momentum: 0.1", "momentum: 0.2"))
    assert "config.yaml was changed since the session" in predict(session, "--split", "test", fails=True)
    hashed = next(line for line in text.splitlines() if line.startswith("config_hash"))
    for changes, why in (
        (
            [(hashed, ""), ("normbench.norms.obn.FusedBatchNorm", "os.system")],
            "os.system is no torch.nn.Module",
        ),
        (
            [
                (hashed, ""),
                ("eps: 1.0e-05", "eps: {_target_: normbench.models.init.torch.os.mkdir, path: ran}"),
            ],
            "normbench.models.init.torch.os.mkdir is no torch.nn.Module",
        ),
        (
            [(hashed, ""), ("eps: 1.0e-05", 'eps: "${oc.create:{_target_: os.mkdir, path: ran}}"')],
            "s0/config.yaml holds an interpolation",
        ),
        (
            [(hashed, ""), ("width: 4", "width: x")],
            "s0/config.yaml: the model cannot be built (width must be",
        ),
        ([(hashed, ""), ("deterministic: false", "deterministic: 0")], "(deterministic must be true or"),
        ([(hashed, ""), ("shape:\n  - 1", "shape:\n  - -1")], "no session's configuration (dataset.shape[0]"),
        ([(text, "- 1")], "no session's configuration (it holds no keys)"),
        ([(text, "{")], "no session's configuration (while parsing"),
    ):
        new = text
        for old, put in changes:
            assert old in new
            new = new.replace(old, put)
        config.write_text(new)
        assert why in predict(session, "--split", "test", fails=True)
    assert not Path("ran").exists()
    shutil.copytree("s0", "outputs/study/setting/s0")
    assert predict("outputs/study/setting/s0/..", "--split", "test", fails=True).endswith("setting/s0/../s0")
    for folder in ("outputs", "outputs/study", "outputs/study/setting"):
        said = predict(folder, "--split", "test", fails=True)
        assert said == f"{folder} is no session's folder; one is outputs/study/setting/s0"
    Path("outputs/study/setting/s0/config.yaml").unlink()
    said = predict("outputs", "--split", "test", fails=True)
    assert said == "outputs is no session's folder; such a folder holds config.yaml and model.pt"


ZEROS = ",".join(["0"] * 11)
ROW = ZEROS + ",7"


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ("", {}, "is empty; a row of 12 values is an image"),
        (f"{ROW}\n{ZEROS}\n", {}, "row 2 has 11 values, not 12 (3×2×2)"),
        (f"{ROW},4\n", {}, "row 1 has 13 values, not 12 (3×2×2); where one is the label, --label"),
        (f"{ROW}\n{ROW}\n", {"label_column": 1}, "row 1 has 12 values, not 13 (3×2×2 and a label)"),
        ("a,b\n", {}, "row 1, column 1: 'a' is no number; a header has no place here"),
        (ROW.replace(",", ";"), {}, "row 1, column 1: '0;0;0;0;0;0;0;0;0;0;0;7' is no number; commas"),
        (f"{ROW}\n{ZEROS},x\n", {}, "row 2, column 12: 'x' is no number"),
        (f"{ZEROS},1_0\n", {}, "row 1, column 12: '1_0' is no number"),
        (f"{ROW}\n\n{ROW}\n", {}, "row 2 is empty"),
        (f"{ROW}\n{ZEROS},256\n", {}, "row 2, column 12: 256 is not an integer from 0 to 255"),
        (f"{ROW}\n{ZEROS},nan\n", {}, "row 2, column 12: nan is not an integer from 0 to 255"),
        (f"{ZEROS},-0.5\n", {}, "-0.5 is not an integer from 0 to 255; give the values from before their"),
        (f"{ROW}\n{ZEROS},0.5\n", {}, "0.5 is not an integer from 0 to 255, as the file's first value"),
        (f"{ZEROS},0.5\n{ROW}\n", {}, "row 2, column 12: 7 is not a number from 0 to 1, as the file's first"),
        (f"{ZEROS},300.5", {"scale": "255"}, "row 1, column 12: 300.5 is not a number from 0 to 255"),
        (f"{ROW},\n", {}, "row 1, column 13: '' is no number; a row ends without a comma"),
        (ROW.replace("7", '"7"'), {}, "row 1, column 12: '\"7\"' is no number; numbers take no quotes"),
        ("7" * 2000, {}, "row 1 is longer than 12 values are"),
        (f"{ROW}\n", {"scale": "1"}, "row 1, column 12: 7 is not a number from 0 to 1"),
        (f"{ZEROS},1\n", {}, "holds zeros and ones alone up to row 1; say which is the brightest"),
        (f"3,{ROW}\n3,{ZEROS},300\n", {"label_column": 1}, "row 2, column 13: 300 is not an integer"),
        (f"{ROW},3\n{ZEROS},300,3\n", {"label_column": -1}, "row 2, column 12: 300 is not an integer"),
        (f"{ROW},3\n{ROW},4\n", {"label_column": -1}, "row 2, column 13: label 4 is not an integer"),
        (f"{ROW}\n" * 3, {"labels": np.array([1, 2])}, "has more rows than --labels, which has 2"),
        (f"{ROW}\n", {"labels": np.array([1, 2])}, "has 1 rows, fewer than --labels, which has 2"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_by_row_and_column(text: str, options: Any, why: str) -> None:
    Path("images.csv").write_text(text)
    for rows in (1, 100):
        with pytest.raises(Refused) as refused:
            list(Table(Path("images.csv"), (3, 2, 2), 4, **options).chunks(rows))
        assert str(refused.value).startswith("images.csv") and why in str(refused.value)


def test_a_table_is_read_in_parts_and_its_scale_is_the_whole_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("images.csv").write_text(f"\ufeff{ZEROS},1\r\n{ZEROS},0.5\r\n{ROW}\r\n\n")
    chunks = Table(Path("images.csv"), (3, 2, 2), 4).chunks(1)
    black, half = next(chunks), next(chunks)  # before the mistake in row 3
    assert (black[0][0, 2, 1].tolist(), half[0][0, 2, 1].tolist()) == ([0, 255], [0, 127.5])
    with pytest.raises(Refused, match="row 3"):
        next(chunks)
    Path("images.csv").write_text(f"{ZEROS},1\n{ZEROS},1\n{ROW}\n")
    monkeypatch.setattr(images, "UNDECIDED", 12)  # values that wait for one that tells
    with pytest.raises(Refused, match="up to row 2"):
        next(Table(Path("images.csv"), (3, 2, 2), 4).chunks(1))
    Path("images.csv").write_text(f"{ZEROS},0.5\n")
    values, _ = next(Table(Path("images.csv"), (3, 2, 2), 4, scale="255").chunks(9))
    assert values.max() == 0.5
    Path("images.csv").write_text(f"{','.join(map(str, range(12)))}\n")
    values, _ = next(Table(Path("images.csv"), (3, 2, 2), 4).chunks(9))
    assert (values == np.arange(12).reshape(1, 3, 2, 2)).all()  # CHW


def test_a_mistake_late_in_a_table_costs_no_earlier_result(session: Path, predict: Predict) -> None:
    rows = [",".join(["7"] * 64)] * 5
    Path("images.csv").write_text("\n".join([*rows, "8"]))
    Path("predictions.csv").write_text("earlier")
    assert "row 6 has 1 values" in predict(session, "images.csv", "--batch-size", 2, fails=True)
    predict(session, "images.csv", "--batch-size", 2, "--out", "new/predictions.csv", fails=True)
    assert Path("predictions.csv").read_text() == "earlier"
    assert sorted(os.listdir()) == ["images.csv", "predictions.csv", "s0"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("s0", "no images: give a CSV or a folder, or a part of a data set by --split test"),
        ("nowhere images.csv", "nowhere: no such file or folder; give a session's folder, model.pt or"),
        ("s0 nowhere.csv", "nowhere.csv: no such file or folder of images"),
        ("s0 --split tset", "--split must be one of train, val, test, got 'tset'; did you mean 'test'?"),
        ("s0 --split val", "--split val: digits has no validation part"),
        ("s0 --dataset digts", "--dataset digts: no such data set; did you mean 'digits'?"),
        (
            "s0 --dataset cifar10",
            "--dataset cifar10 has images [3, 32, 32], the model was trained on [1, 8, 8]",
        ),
        ("s0 images.csv --split test", "images.csv and a data set exclude each other"),
        ("s0 images.csv --out images.csv", "--out images.csv would overwrite images.csv; choose another"),
        ("s0 images.csv --out s0/epochs.csv", "--out s0/epochs.csv would overwrite s0/epochs.csv; choose"),
        ("s0 images.csv --out pipe", "--out pipe: pipe is no ordinary file; choose another name"),
        ("s0 images.csv --tpo 2", "unrecognized arguments: --tpo 2; see --help"),
        ("s0 images.csv --out s0", "--out s0 is a folder; name a file in it, like s0/predictions.csv"),
        ("s0 images.csv --out images.csv/a.csv", "--out images.csv/a.csv: "),
        ("s0 images.csv --top 11", "--top 11: the model knows 10 classes"),
        ("s0 images.csv --top 2 --format study", "--format study writes one integer an image; leave --top"),
        ("s0 images.csv --format json", "--format must be one of table, study, got 'json'"),
        ("s0 images.csv --resize squash", "--resize is for pictures only; leave it out"),
        ("s0 --split test --scale 1", "--scale is for a CSV only; leave it out"),
        ("s0 images.csv --labels labels.txt --label-column 1", "--labels and --label-column exclude each"),
        ("s0 images.csv --labels labels.txt", "labels.txt: row 2: 'cat' is not an integer from 0 to 9"),
        ("s0 images.csv --label-column -2", "--label-column must be -1 or an int ≥ 1, got -2"),
        ("s0 images.csv --label-column 99", "--label-column 99: a row has 65 values"),
        ("s0 images.csv --batch-size 0", "--batch-size must be an int ≥ 1, got 0"),
        ("s0 images.csv --device gpu", "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_a_wrong_command_is_one_line(session: Path, predict: Predict, arguments: str, why: str) -> None:
    Path("images.csv").write_text(",".join(["7"] * 64))
    Path("labels.txt").write_text("1\ncat\n")
    os.mkfifo("pipe")
    assert predict(*arguments.split(), fails=True).startswith(why)


def test_what_is_no_ordinary_file_is_never_replaced() -> None:
    os.mkfifo("pipe")
    with pytest.raises(Refused, match="pipe is no ordinary file"):
        write_whole(Path("pipe"), "text")
    assert Path("pipe").is_fifo() and os.listdir() == ["pipe"]


def pictures(*names: str, size: tuple[int, int] = (8, 8)) -> None:
    """PNGs of noise."""
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(name)


def test_a_folder_says_its_labels_or_has_none() -> None:
    pictures("flat/b.png", "flat/a.PNG", "numbered/10/x.png", "numbered/2/y.png", "named/cat/x.png",
             "named/ant/deep/y.png", "mixed/x.png", "mixed/cat/y.png")  # fmt: skip
    Path("flat/.hidden.png").touch()
    Path("flat/notes.txt").touch()
    Path("flat/lost.png").symlink_to("nowhere")  # left for the reader, who says that it is not there
    Path("flat/folder.png").mkdir()
    pictures("numbered/2/.ipynb_checkpoints/y-checkpoint.png")
    Path("numbered/2/circle").symlink_to("..")
    Path("empty/inside").mkdir(parents=True)
    flat = list_folder(Path("flat"), "cifar10", 10)
    assert (list(flat.files), flat.labels, flat.classes) == (["a.PNG", "b.png", "lost.png"], None, ())
    numbered = list_folder(Path("numbered"), "fashion_mnist", 11)
    assert numbered.labels is not None and dict(zip(numbered.files, numbered.labels, strict=True)) == {
        "10/x.png": 10, "2/circle/10/x.png": 2, "2/y.png": 2,
    }  # fmt: skip
    named = list_folder(Path("named"), "cifar10", 2)
    assert named.labels is not None and list(named.classes) == ["ant", "cat"]
    assert dict(zip(named.files, named.labels, strict=True)) == {"ant/deep/y.png": 0, "cat/x.png": 1}
    for folder, dataset, classes, why in (
        ("empty", "cifar10", 10, "holds no pictures (.jpg"),
        ("mixed", "cifar10", 10, "holds pictures (x.png) beside folders of them (cat)"),
        (
            "named",
            "cifar10",
            10,
            "has 2 class folders, the model 10 classes; name them by their labels, 0 to 9",
        ),
        ("named", "fashion_mnist", 2, "fashion_mnist's labels are no order of names"),
        ("numbered", "cifar10", 10, "numbered/10: the model knows classes 0 to 9"),
        (
            "numbered",
            "imagenette",
            10,
            "has 2 class folders, the model 10 classes; put the pictures into one",
        ),
    ):
        with pytest.raises(Refused) as refused:
            list_folder(Path(folder), dataset, classes)
        assert why in str(refused.value)


def test_pictures_that_the_model_cannot_take(session: Path, predict: Predict) -> None:
    pictures("large/a.png", size=(9, 8))
    assert predict(session, "large", fails=True) == (
        "large/a.png is 9 wide and 8 high, not 8 and 8, and training resized nothing; choose --resize squash "
        "or --resize center_crop"
    )
    predict(session, "large", "--resize", "squash")
    assert predict(session, "large/a.png", fails=True).startswith("large/a.png is 9 wide and 8 high, not")
    pictures("broken/a.png", "broken/b.png")
    Path("broken/b.png").write_bytes(Path("broken/a.png").read_bytes()[:60])
    assert predict(session, "broken", fails=True).startswith("broken/b.png cannot be read as an image (")
    Path("deep").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep/a.png")
    assert "deep/a.png has more than 8 bits a value" in predict(session, "deep", fails=True)


def test_a_folder_set_is_resized_as_its_evaluation_does(plan_of: Planner) -> None:
    names = [
        f"imagenette2-160/{part}/n{c}/{i}.png"
        for part in ("train", "val")
        for c in range(2)
        for i in range(3)
    ]
    pictures(*names, size=(50, 40))
    sizes = [
        "dataset=imagenette",
        "batch.size=2",
        "dataset.workers=0",
        "dataset.num_classes=2",
        "dataset.train_size=6",
        "dataset.test_size=6",
        "dataset.shape=[3,32,24]",
    ]
    plan = plan_of(*sizes)
    place = Place(plan.config(plan.sessions[0]), torch.device("cpu"), 4)
    folder = list_folder(Path("imagenette2-160/val"), "imagenette", 2)
    for rule in ("squash", "center_crop", "random_resized_crop"):
        ours = list(of_folder(folder, rule, place))
        theirs = list(of_split(place.config.dataset | {"resize": rule}, "test", ".", place))
        assert len(ours) == len(theirs) == 2
        for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
            assert y is not None and other_y is not None
            assert torch.equal(x, other_x) and torch.equal(y, other_y)


@pytest.mark.data
def test_another_data_set_is_normalised_as_the_sessions(plan_of: Planner) -> None:
    plan = plan_of("dataset=mnist")
    config = plan.config(plan.sessions[0])
    given = door.parser().parse_args(["s0", "--dataset", "fashion_mnist"])
    asked = door.of_data_set(given, config)
    place = Place(config, torch.device("cpu"), 5)
    x, labels = next(asked.batches(place, os.environ["NORMBENCH_DATA"]))
    (mean,), (std,) = config.dataset["mean"], config.dataset["std"]
    assert x.min().item() == pytest.approx(-mean / std, rel=1e-5)
    assert labels is not None and labels.tolist() == [9, 2, 1, 1, 6] and not asked.own_test


def test_scores_by_hand() -> None:
    classes = np.array([[0, 1], [1, 0], [1, 2], [2, 1]])
    chances = np.array([[0.9, 0.05], [0.5, 0.4], [0.6, 0.3], [0.7, 0.2]])
    found = Predictions(classes, chances, np.array([0, 0, 2, 2]), loss=0.5)
    scores = score(found, 4)
    assert scores is not None and (scores.images, scores.acc, scores.top_acc) == (4, 0.5, 1.0)
    assert scores.confusion.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    # F1 of class 0: 2/3, of 1: 0, of 2: 2/3; class 3 does not occur
    assert scores.macro_f1 == pytest.approx(4 / 9) and scores.micro_f1 == pytest.approx(0.5)
    assert scores.standard_error == pytest.approx(0.25)
    assert predictions_text(found, False, ["a,b.png", "c", "d", "e"]).splitlines()[:2] == [
        "index,label,probability,label_2,probability_2,true_label,file",
        '0,0,0.9,1,0.05,0,"a,b.png"',
    ]
    assert predictions_text(found, True, []) == "0\n1\n1\n2\n"


@pytest.mark.parametrize("count", [2, 30, 50])
def test_the_figure_is_whole_and_shows_names_as_text(count: int) -> None:
    confusion = np.random.default_rng(0).integers(0, 50, (count, count))
    confusion[1] = 0  # a class without images
    names = ["<script>alert(1)</script>", "$x^2$ & co", *map(str, range(2, count))]
    drawn = figures.svg_of(confusion_figure(confusion, names, "3 images"), "confusion")
    assert count > 2 or drawn == figures.svg_of(confusion_figure(confusion, names, "3 images"), "confusion")
    texts = [node.text for node in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert (names[0] in texts and names[1] in texts) == (count <= 40)
    assert (f"{confusion[0, 0]}" in texts) == (count <= 20) or count > 20
