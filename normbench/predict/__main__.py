"""The door `python -m normbench.predict`: what a session's weights say of images, and how well.

python -m normbench.predict outputs/adhoc/<setting>/s0 --split test
python -m normbench.predict outputs/adhoc/<setting>/s0/model.pt images.csv --format study --out labels.csv
"""

import argparse
import hashlib
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from normbench.config import Config, Values, conf_dir
from normbench.doors import Arguments, one_line_errors, say
from normbench.plan import utc_now, write_whole
from normbench.predict.images import (
    SCALES,
    Chunk,
    Folder,
    Table,
    holds_pictures,
    list_folder,
    read_labels,
)
from normbench.predict.weights import OF_SESSION, find
from normbench.results import git_commit
from normbench.rules import RULES, Rule
from normbench.values import Refused, nearest, one_of, positive_int

if TYPE_CHECKING:
    from normbench.predict.batches import Batches, Place

SPLITS = ("train", "val", "test")
RESIZES = ("squash", "center_crop")
FORMATS = ("table", "study")
OF_CSV = ("labels", "label_column", "scale")


def parser() -> Arguments:
    """The door's options."""
    made = Arguments(
        prog="normbench predict",
        description="Predict with a session's weights; where labels are known, say how good that is.",
        epilog="A CSV has no header; a row is an image's C·H·W values, channel by channel (CHW). They are "
        "integers from 0 to 255 or fractions from 0 to 1, one kind a file: its first value that is neither 0 "
        "nor 1 decides (fractions if between them), or --scale, which takes any number up to it. Images are "
        "normalised, and resized where training resized, as the session's config.yaml says; transparency and "
        "EXIF rotation are left out, as in training.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("weights", type=Path, metavar="WEIGHTS", help="a session's folder, its model.pt or its checkpoint.pt")
    add(
        "images",
        type=Path,
        nargs="?",
        metavar="IMAGES",
        help="a CSV, a picture, or a folder of them: flat, or one folder a class (labels, as ImageFolder)",
    )
    add("--dataset", metavar="NAME", help="a data set instead of images (default: the session's own)")
    add("--split", metavar="PART", help="train, val or test of a data set (default with --dataset: test)")
    add("--data-dir", metavar="DIR", help="where data sets are (default: NORMBENCH_DATA, else the session's)")
    add("--config", type=Path, metavar="FILE", help="the session's config.yaml, if not beside the weights")
    add("--labels", type=Path, metavar="FILE", help="labels of a CSV's rows, one integer a line")
    add("--label-column", type=int, metavar="N", help="column of the CSV that is the label: 1 first, -1 last")
    add("--scale", metavar="MAX", help="the brightest value of a CSV, 255 or 1 (default: by the file)")
    add("--resize", metavar="RULE", help="squash or center_crop pictures, where training resized nothing")
    add("--top", type=int, default=1, metavar="K", help="the K likeliest classes, and top-K accuracy")
    add(
        "--format",
        default="table",
        metavar="FORMAT",
        help="table: index (from 0), label, probability; study: one integer a line (default: table)",
    )
    add(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help="the predictions (default: predictions.csv); with labels also its name with "
        "-metrics.json, -confusion.csv, -confusion.svg",
    )
    add("--batch-size", type=int, metavar="N", help="images at a time (default: the session's in evaluation)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    add("--precision", help="fp32, bf16 or fp16 (default: as trained)")
    return made


@dataclass(frozen=True)
class Asked:
    """The images to predict, found and as far as possible judged; one of the three is there.

    Args:
        what: for people.
        chunks: a CSV's images, the first already read.
        folder: pictures.
        resize: the rule for their size.
        values: a data set's options.
        split: its part.
        own_test: whether it is what the session's row was measured on.
    """

    what: str
    chunks: Iterator[Chunk] | None = None
    folder: Folder | None = None
    resize: str | None = None
    values: Values | None = None
    split: str = "test"
    own_test: bool = False

    @property
    def files(self) -> Sequence[str]:
        """The pictures' names, in order."""
        return self.folder.files if self.folder else ()

    def names(self, num_classes: int) -> list[str]:
        """The classes' names: those of class folders as far as they can be shown, else their numbers."""
        named = self.folder.classes if self.folder else ()
        shown = ["".join(c if c.isprintable() else "?" for c in name) for name in named]
        return shown or [str(label) for label in range(num_classes)]

    def batches(self, place: "Place", data_dir: str) -> "Batches":
        """What the model gets."""
        from normbench.predict.batches import of_folder, of_split, of_table

        if self.chunks is not None:
            return of_table(self.chunks, place)
        if self.folder is not None:
            return of_folder(self.folder, self.resize, place)
        return of_split(self.values or {}, self.split, data_dir, place)


def main() -> None:
    """The door."""
    arguments = parser().parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name that is no UTF-8 is still said
    with one_line_errors("predict"):
        try:
            check(arguments)
            run(arguments)
        except KeyboardInterrupt:
            say("normbench predict: stopped", error=True)
            sys.exit(130)


def check(arguments: argparse.Namespace) -> None:
    """Refuse values that are out of range, and options that would do nothing."""
    given = arguments
    rules: dict[str, Rule] = {name: RULES[name] for name in ("device", "precision")}
    words = {"format": FORMATS, "split": SPLITS, "scale": SCALES, "resize": RESIZES}
    rules |= {name: partial(one_of, allowed=allowed) for name, allowed in words.items()}
    rules |= {"top": positive_int, "batch_size": positive_int}
    for name, rule in rules.items():
        if (value := getattr(given, name)) is not None:
            try:
                rule(f"--{name.replace('_', '-')}", value)
            except ValueError as error:
                raise Refused(str(error)) from error
    if given.label_column is not None and given.label_column != -1 and given.label_column < 1:
        raise Refused(f"--label-column must be -1 or an int ≥ 1, got {given.label_column}")
    if given.labels and given.label_column is not None:
        raise Refused("--labels and --label-column exclude each other; give one")
    if given.format == "study" and given.top > 1:
        raise Refused("--format study writes one integer an image; leave --top out")
    of_set = given.dataset is not None or given.split is not None
    if given.images is None and not of_set:
        raise Refused("no images: give a CSV or a folder, or a part of a data set by --split test")
    if given.images is not None and of_set:
        raise Refused(f"{given.images} and a data set exclude each other; leave --dataset and --split out")
    if given.images is not None and not given.images.exists():
        raise Refused(f"{given.images}: no such file or folder of images")
    is_pictures = given.images is not None and holds_pictures(given.images)
    useless = [*(OF_CSV if of_set or is_pictures else ()), *(() if of_set else ("data_dir",)),
               *(() if is_pictures else ("resize",))]  # fmt: skip
    for name in useless:
        if getattr(given, name) is not None:
            what = {"data_dir": "a data set", "resize": "pictures"}.get(name, "a CSV")
            raise Refused(f"--{name.replace('_', '-')} is for {what} only; leave it out")


def beside(out: Path) -> tuple[Path, Path, Path]:
    """The scores' files: `-metrics.json`, `-confusion.csv`, `-confusion.svg` after the predictions' name."""
    return (
        out.with_name(f"{out.stem}-metrics.json"),
        out.with_name(f"{out.stem}-confusion.csv"),
        out.with_name(f"{out.stem}-confusion.svg"),
    )


def check_out(out: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse a place that cannot be written, before anything is worked out, and files that are read."""
    if out.is_dir():
        raise Refused(f"--out {out} is a folder; name a file in it, like {out / 'predictions.csv'}")
    read = {os.path.realpath(path) for path in inputs if path is not None}
    for path in (out, *beside(out)):
        if os.path.realpath(path) in read:
            raise Refused(f"--out {out} would overwrite {path}; choose another name")
        if path.exists() and not path.is_file():
            raise Refused(f"--out {out}: {path} is no ordinary file; choose another name")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"--out {out}: {there} is no folder that can be written to")


def asked(given: argparse.Namespace, config: Config, batch_size: int) -> Asked:
    """The images, as far as can be told without torch."""
    own, num_classes = config.dataset, int(config.dataset["num_classes"])
    if given.images is None:
        return of_data_set(given, config)
    if holds_pictures(given.images):
        if given.resize and own["resize"]:
            raise Refused(f"--resize {given.resize}: training resized by {own['resize']}; leave it out")
        folder = list_folder(given.images, own["name"], num_classes)
        return Asked(str(given.images), folder=folder, resize=own["resize"] or given.resize)
    channels, height, width = own["shape"]
    table = Table(
        given.images,
        (channels, height, width),
        num_classes,
        given.scale,
        given.label_column,
        read_labels(given.labels, num_classes) if given.labels else None,
    )
    if given.label_column is not None and given.label_column > table.width:
        raise Refused(f"--label-column {given.label_column}: a row has {table.width} values")
    chunks = table.chunks(batch_size)
    return Asked(str(given.images), itertools.chain([next(chunks)], chunks))


def of_data_set(given: argparse.Namespace, config: Config) -> Asked:
    """A part of the session's own data set, or of another whose images have its shape."""
    own, split = config.dataset, given.split or "test"
    name = given.dataset or own["name"]
    there = sorted(file.stem for file in (conf_dir() / "dataset").glob("*.yaml"))
    if name not in there:
        raise Refused(
            f"--dataset {name}: no such data set{nearest(name, there)}; there are {', '.join(there)}"
        )
    values = own
    if name != own["name"]:
        values = yaml.safe_load((conf_dir() / "dataset" / f"{name}.yaml").read_text())
        streamed = values["resize"] is not None
        values |= {"mean": own["mean"], "std": own["std"]}
        values |= {"shape": own["shape"], "resize": own["resize"] or values["resize"]} if streamed else {}
        for key, what in (("shape", "images"), ("num_classes", "classes")):
            if values[key] != own[key]:
                raise Refused(
                    f"--dataset {name} has {what} {values[key]}, the model was trained on {own[key]}"
                )
    if split == "val" and not values["val_fraction"]:
        raise Refused(
            f"--split val: {name} has no validation part (dataset.val_fraction=0); use train or test"
        )
    return Asked(
        f"{name}, {split} part", values=values, split=split, own_test=(values, split) == (own, "test")
    )


def run(given: argparse.Namespace) -> None:
    """Read, predict, write, say."""
    source = find(given.weights, given.config)
    config = source.config
    num_classes, precision = int(config.dataset["num_classes"]), given.precision or config.precision
    if given.top > num_classes:
        raise Refused(f"--top {given.top}: the model knows {num_classes} classes")
    batch_size = given.batch_size or config.batch["eval_size"]
    kept = [source.file.with_name(name) for name in OF_SESSION]
    check_out(given.out, [source.file, source.config_file, given.images, given.labels, *kept])
    wanted = asked(given, config, batch_size)

    import torch  # dear, and what comes before may be refused

    from normbench import device as machine
    from normbench.predict import scores
    from normbench.predict.batches import Place
    from normbench.predict.weights import model_of, read_state
    from normbench.training import settings_of

    machine.tune_allocator()
    device = machine.pick(given.device)
    state = read_state(source)
    model = model_of(source, state)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    step = "" if state.step is None else f", after step {state.step} in epoch {state.epoch}"
    say(f"weights: {source.file} ({source.name}{step})")
    data_dir = given.data_dir or os.environ.get("NORMBENCH_DATA") or config.data_dir
    with settings_of(config, device):
        torch.backends.cudnn.deterministic = True
        batches = wanted.batches(Place(config, device, batch_size), data_dir)
        try:
            found = scores.predict(model.to(device), batches, device, precision, given.top)
        except scores.NotFinite as error:
            diverged = source.row is not None and source.row.get("status") == "diverged"
            cure = "" if precision == "fp32" else "; try --precision fp32"
            raise Refused(
                f"{source.file}: {error}{'; its session diverged' if diverged else cure}"
            ) from error
        except torch.OutOfMemoryError as error:
            raise Refused(
                f"--batch-size {batch_size} does not fit into {device}; give a smaller one"
            ) from error
        threads = torch.get_num_threads()
    say(f"images: {wanted.what}: {len(found.classes):,}")
    if config.norm.get("track_running_stats") is False:
        say("note: track_running_stats=false measures each batch, so predictions depend on --batch-size")
    scored, names = scores.score(found, num_classes), wanted.names(num_classes)
    device_name = machine.name_of(device)
    if scored:
        say(scores.headline(scored))
        if wanted.own_test and source.row and precision == config.precision:
            say(scores.against_row(scored, source.row, device_name))
        scores.show_confusion(scored, names)
    provenance = {
        "weights": str(source.file),
        "weights_sha256": hashlib.sha256(source.file.read_bytes()).hexdigest(),
        "step": state.step,
        "epoch": state.epoch,
        "model": source.name,
        "of": wanted.what,
        "precision": precision,
        "batch_size": batch_size,
        "device": str(device),
        "device_name": device_name,
        "threads": threads,
        "torch_version": torch.__version__,
        "git_commit": git_commit(),
        "made_at": utc_now(),
    }
    texts = [scores.predictions_text(found, given.format == "study", wanted.files)]
    texts += scores.texts_of(scored, names, provenance) if scored else ()
    write(given.out, texts)


def write(out: Path, texts: Sequence[str]) -> None:
    """Write the predictions and, where there are any, the scores; without them what an earlier run left
    there goes, for it is of other predictions."""
    paths = (out, *beside(out))
    earlier = [path for path in paths[len(texts) :] if path.exists()]
    for path in earlier:
        path.unlink()
    for path, text in zip(paths, texts, strict=False):
        write_whole(path, text.encode("utf-8", "surrogateescape"))  # a picture's name may be no UTF-8
    say(f"written: {', '.join(map(str, paths[: len(texts)]))}")
    if earlier:
        say(f"removed: {', '.join(map(str, earlier))}, of earlier predictions")


if __name__ == "__main__":
    main()
