"""Predictions, how good they are where the labels are known, and the files that say so."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn import functional

from normbench.norms.base import widen
from normbench.predict.batches import Batches
from normbench.results import Row, finite
from normbench.training import AUTOCAST

Ints = npt.NDArray[np.int64]
PRINTED = 20  # classes up to which the whole confusion matrix is printed
CONFUSED = 10  # pairs that are printed of a larger one


@dataclass(frozen=True)
class Predictions:
    """Of n images: the `top` likeliest classes (n, top), their probabilities (n, top), the labels (n,) where
    they are known, and then the mean loss in nats."""

    classes: Ints
    probabilities: npt.NDArray[np.float64]
    labels: Ints | None
    loss: float | None


class NotFinite(ArithmeticError):
    """Logits that say nothing; its text names the first image, from 1."""


@torch.no_grad()
def predict(
    model: nn.Module, batches: Batches, device: torch.device, precision: str, top: int
) -> Predictions:
    """What a model in evaluation mode says of every batch; of equal logits the first class wins.

    A terminal shows how many images are done.

    Raises: NotFinite — logits that are not.
    """
    dtype = AUTOCAST.get(precision)
    classes, probabilities, truth, losses = [], [], [], []
    seen = 0
    with Console(stderr=True).status("reading") as status:
        for x, y in batches:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = model(x)
            logits = widen(logits)
            good = logits.isfinite().all(1)
            if not good.all():
                first = seen + int(good.logical_not().nonzero()[0, 0]) + 1
                raise NotFinite(f"the logits of image {first} are not finite")
            order = logits.sort(stable=True, dim=1, descending=True).indices[:, :top]
            classes.append(order.cpu())
            probabilities.append(logits.double().softmax(1).gather(1, order).cpu())
            if y is not None:
                losses.append(functional.cross_entropy(logits, y.to(device), reduction="sum").double().cpu())
                truth.append(y.cpu())
            seen += len(x)
            status.update(f"{seen:,} images")
    labels = torch.cat(truth).numpy() if truth else None
    loss = float(torch.stack(losses).sum()) / seen if losses else None
    return Predictions(torch.cat(classes).numpy(), torch.cat(probabilities).numpy(), labels, loss)


@dataclass(frozen=True)
class Scores:
    """How good predictions are. Accuracies and F1 are fractions; `confusion` (classes, classes) counts images
    by their label (rows) and the predicted class (columns); `top_acc` is the accuracy of the first `top`."""

    images: int
    acc: float
    loss: float
    micro_f1: float
    macro_f1: float
    top: int
    top_acc: float
    confusion: Ints

    @property
    def standard_error(self) -> float:
        """Of the accuracy, binomial: what drawing other test images would change."""
        return float(np.sqrt(self.acc * (1 - self.acc) / self.images))


def score(found: Predictions, num_classes: int) -> Scores | None:
    """The scores; None where no labels are known. Macro-F1 is over the classes that occur, as in the rows."""
    if found.labels is None or found.loss is None:
        return None
    from sklearn.metrics import confusion_matrix, f1_score

    from normbench.course import macro_f1

    guess, truth = found.classes[:, 0], found.labels
    return Scores(
        images=len(truth),
        acc=float((guess == truth).mean()),
        loss=found.loss,
        micro_f1=float(f1_score(truth, guess, average="micro")),
        macro_f1=macro_f1(torch.from_numpy(truth), torch.from_numpy(guess)),
        top=found.classes.shape[1],
        top_acc=float((found.classes == truth[:, None]).any(1).mean()),
        confusion=confusion_matrix(truth, guess, labels=np.arange(num_classes)),
    )


def predictions_text(found: Predictions, study: bool, files: Sequence[str]) -> str:
    """The predictions' CSV: an integer a line as the third study's, or a row an image under a header."""
    if study:
        return "".join(f"{label}\n" for label in found.classes[:, 0])
    top = found.classes.shape[1]
    header = ["index", "label", "probability"]
    header += [f"{name}_{k}" for k in range(2, top + 1) for name in ("label", "probability")]
    header += ["true_label"] if found.labels is not None else []
    header += ["file"] if files else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for index, (labels, chances) in enumerate(zip(found.classes, found.probabilities, strict=True)):
        cells: list[Any] = [index]
        for label, chance in zip(labels, chances, strict=True):
            cells += [label, f"{chance:.6g}"]
        cells += [found.labels[index]] if found.labels is not None else []
        cells += [files[index]] if files else []
        writer.writerow(cells)
    return text.getvalue()


def confusion_text(scores: Scores, names: Sequence[str]) -> str:
    """The confusion matrix as CSV: a row a true class, a column a predicted one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true_label", *names])
    writer.writerows([name, *counts] for name, counts in zip(names, scores.confusion.tolist(), strict=True))
    return text.getvalue()


def metrics_text(scores: Scores, provenance: dict[str, Any]) -> str:
    """The scores as JSON, with what they were made from."""
    body = {
        "images": scores.images,
        "acc": scores.acc,
        "acc_se": scores.standard_error,
        "loss": scores.loss,
        "micro_f1": scores.micro_f1,
        "macro_f1": scores.macro_f1,
        **({f"top{scores.top}_acc": scores.top_acc} if scores.top > 1 else {}),
        **provenance,
    }
    return json.dumps(finite(body), indent=1, ensure_ascii=False)


def texts_of(scores: Scores, names: Sequence[str], provenance: dict[str, Any]) -> list[str]:
    """The scores' files: JSON, CSV, SVG."""
    from normbench.figures import svg_of  # with matplotlib, needed where labels are known
    from normbench.predict.figures import confusion_figure

    title = f"{scores.images:,} images, accuracy {scores.acc:.4f}"
    figure = svg_of(confusion_figure(scores.confusion, names, title), "confusion")
    return [metrics_text(scores, provenance), confusion_text(scores, names), figure]


def headline(scores: Scores) -> str:
    """`accuracy 0.9944 (se 0.0039, 360 images), micro-F1 0.9944, macro-F1 0.9942, loss 0.0231`."""
    top = f", top-{scores.top} {scores.top_acc:.4f}" if scores.top > 1 else ""
    return (
        f"accuracy {scores.acc:.4f} (se {scores.standard_error:.4f}, {scores.images:,} images){top}, "
        f"micro-F1 {scores.micro_f1:.4f}, macro-F1 {scores.macro_f1:.4f}, loss {scores.loss:.4f}"
    )


def against_row(scores: Scores, row: Row, device_name: str) -> str:
    """Whether the session's row says the same of its test set."""
    said = {"test_acc": row.get("test_acc"), "test_macro_f1": row.get("test_macro_f1")}
    if said == {"test_acc": scores.acc, "test_macro_f1": scores.macro_f1}:
        return "equal to the session's row: test_acc and test_macro_f1"
    shown = ", ".join(f"{name} {value}" for name, value in said.items())
    there = row.get("device_name")
    elsewhere = f", on {there} and not {device_name}" if there != device_name else ""
    return f"NOT equal to the session's row, which says {shown}{elsewhere}"


def show_confusion(scores: Scores, names: Sequence[str]) -> None:
    """Print the confusion matrix, of many classes the pairs most often confused."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    if len(names) > PRINTED:
        wrong = scores.confusion * ~np.eye(len(names), dtype=bool)
        order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
        pairs = [np.unravel_index(place, wrong.shape) for place in order if wrong.flat[place]]
        said = ", ".join(f"{names[true]} as {names[guess]} {wrong[true, guess]:,}" for true, guess in pairs)
        console.print(Text(f"most often confused: {said or 'none'}"), soft_wrap=True)
        return
    console.print("rows: true label, columns: prediction")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    table.add_column("", justify="left", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for name, counts in zip(names, scores.confusion.tolist(), strict=True):
        table.add_row(Text(name), *(f"{n:,}" if n else "·" for n in counts))
    console.print(table)
