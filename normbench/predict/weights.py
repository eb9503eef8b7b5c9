"""Which file holds a session's weights, what they were trained with, and a model whose whole state is theirs.

A file of weights alone says nothing of its model: `config.yaml` beside it does. Files are read without
running what they hold, and a model is never used with a tensor that did not come from the file.
"""

import itertools
import pkgutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from normbench import checkpoint
from normbench.config import Config
from normbench.data.options import DatasetOptions
from normbench.plan import hash_of_text, read_json
from normbench.results import Row
from normbench.rules import RULES
from normbench.values import Refused, flag, positive_int

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL, CONFIG, SESSION = "model.pt", "config.yaml", "session.json"
OF_SESSION = (MODEL, CONFIG, SESSION, "epochs.csv", checkpoint.NEWEST, checkpoint.BEFORE)
OURS = ("normbench.models.", "normbench.norms.")
LIBRARIES = ("normbench", "torch", "torchvision")


@dataclass(frozen=True)
class Source:
    """A file of weights, the configuration they were trained with and where it stands, and the row of a
    finished session where the file holds what the row reports."""

    file: Path
    config: Config
    config_file: Path
    row: Row | None

    @property
    def name(self) -> str:
        """What people read: the norm, the model, the data set."""
        choices = self.config.choices
        return f"{choices['norm']}, {choices['model']}, {choices['dataset']}"


@dataclass(frozen=True)
class State:
    """A model's tensors by name.

    Args:
        complete: whether buffers that a state_dict leaves out are among them.
        step, epoch: after which and in which they were taken; None for those that a session reports, and
            where nobody knows.
    """

    tensors: Mapping[str, "Tensor"]
    complete: bool = False
    step: int | None = None
    epoch: int | None = None


def find(given: Path, config: Path | None) -> Source:
    """The weights of a finished session's folder, or of a file with its config.yaml beside it or given."""
    if not given.exists():
        raise Refused(f"{given}: no such file or folder; give a session's folder, model.pt or checkpoint.pt")
    folder = given if given.is_dir() else given.parent
    path = config or folder / CONFIG
    if not path.is_file():
        raise Refused(missing_config(given, path, config is not None))
    read, row = config_of(path), row_of(folder)
    file = of_session(folder, row) if given.is_dir() else given
    return Source(file, read, path, row if file.name == MODEL and config is None else None)


def missing_config(given: Path, path: Path, asked: bool) -> str:
    """Why there is no configuration, and where one may be."""
    if asked:
        return f"--config {path}: no such file; give the config.yaml of the session that wrote the weights"
    if given.is_file():
        return f"{given}: no {CONFIG} beside it; give the session's own by --config"
    deeper = ("*s[0-9]*", "*/*s[0-9]*", "*/*/*s[0-9]*")  # of a setting, a study, all studies
    within = next(itertools.chain(*(given.glob(f"{folders}/{CONFIG}") for folders in deeper)), None)
    hint = f"one is {within.parent}" if within else f"such a folder holds {CONFIG} and {MODEL}"
    return f"{given} is no session's folder; {hint}"


def config_of(path: Path) -> Config:
    """The typed view of a session's config.yaml; Refused where it is none, or was changed since."""
    try:
        text = path.read_text()
        values = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(values, dict):
            raise TypeError("it holds no keys")
        choices, written = values.pop("choices"), values.pop("config_hash", None)
        config = Config.of(values, choices)
        for key in ("precision", "threads"):
            RULES[key](key, values[key])
        DatasetOptions.from_mapping(config.dataset)
        positive_int("batch.eval_size", config.batch["eval_size"])
        for key in ("channels_last", "deterministic"):
            flag(key, values[key])
        for part, group in ((config.norm, "norm"), (config.model, "model")):
            if not isinstance(part["_target_"], str) or not choices[group]:
                raise TypeError(f"{group} names no class")
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise Refused(f"{path} is no session's configuration ({first_line(error)})") from error
    if written is not None and hash_of_text(text) != written:
        raise Refused(
            f"{path} was changed since the session: its values are not those of config_hash={written}; put "
            "them back, or remove that line to use it as it is"
        )
    return config


def row_of(folder: Path) -> Row | None:
    """The row of a finished session; None where it has not finished."""
    path = folder / SESSION
    if not path.is_file():
        return None
    body = read_json(path)
    if not isinstance(body, dict) or not isinstance(body.get("row"), dict):
        raise Refused(f"{path} has no row; remove it to run the session again")
    row: Row = body["row"]
    return row


def of_session(folder: Path, row: Row | None) -> Path:
    """The file in a session's folder that holds what its row reports."""
    saved, checkpointed = folder / MODEL, (folder / checkpoint.NEWEST).is_file()
    so_far = (
        f"; {folder / checkpoint.NEWEST} itself may be given, for its weights so far" if checkpointed else ""
    )
    if row is None:
        raise Refused(f"{folder} has not finished; run its command again{so_far}")
    if saved.is_file():
        return saved
    if checkpointed and reported(folder / checkpoint.NEWEST):
        return folder / checkpoint.NEWEST
    raise Refused(
        f"{folder} did not keep the weights that its row reports; train it with save_model=true{so_far}"
    )


def reported(path: Path) -> bool:
    """Whether a checkpoint is of an ended session, and of the evaluation that its row reports."""
    try:
        body = checkpoint.read(path)
    except checkpoint.Damaged:
        return False
    return bool(body.get("ended")) and body["selection"]["step"] == body["step"]


def read_state(source: Source) -> State:
    """The tensors in the file, on the CPU.

    Raises: Refused — no file of weights, cut off, or changed since.
    """
    with source.file.open("rb") as file:
        head = file.read(len(checkpoint.FORMAT))
    if not head:
        raise Refused(f"{source.file} is empty")
    if head != checkpoint.FORMAT:
        zipped = head.startswith(b"PK\x03\x04")  # as torch's files since 1.6
        return State(tensors_of(state_dict_in(source.file, zipped), source.file))
    try:
        body = checkpoint.read(source.file)
        tensors, step, epoch = body["model"], int(body["step"]), int(body["epoch"])
    except checkpoint.Damaged as error:
        raise Refused(f"{source.file}: {error}") from error
    except Exception as error:  # whatever another's bytes under our head lead to
        raise Refused(f"{source.file} is no session's checkpoint, and is not read further") from error
    return State(tensors_of(tensors, source.file), True, step, epoch)


def state_dict_in(path: Path, zipped: bool) -> Any:
    """What `torch.save(model.state_dict(), path)` wrote."""
    import torch

    if zipped and (part := damaged_part(path)):
        raise Refused(f"{path} is damaged: {part} is not as torch wrote it")
    try:
        with warnings.catch_warnings():  # of pickles that are none of torch's
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading foreign bytes leads to
        why = (
            "it holds more than tensors, and is not read further"
            if zipped
            else "it is cut off, or foreign; give a session's model.pt"
        )
        raise Refused(f"{path} is no state_dict: {why}") from error


def damaged_part(path: Path) -> str | None:
    """The first part of torch's zip file that is damaged; torch itself does not look at checksums, and reads
    nothing of a part whose attributes make it a folder."""
    try:
        with zipfile.ZipFile(path) as file:
            marked = (part.filename for part in file.infolist() if part.external_attr)
            return file.testzip() or next(marked, None)
    except Exception:  # whatever reading a damaged directory leads to
        return "its directory"


def tensors_of(content: Any, path: Path) -> Mapping[str, "Tensor"]:
    """Named tensors with numbers in them; Refused where it is anything else."""
    import torch

    if not isinstance(content, dict) or not content:
        what = "nothing" if content == {} else type(content).__name__
        raise Refused(f"{path} is no state_dict: it holds {what} instead of named tensors")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise Refused(f"{path} is no state_dict: {name!r} is {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise Refused(f"{path}: {name!r} is a sparse, quantized or empty tensor; save plain ones")
    return content


def model_of(source: Source, state: State) -> "nn.Module":
    """The model on the CPU, its whole state written from the file, in evaluation mode.

    Raises: Refused — a tensor too many, too few or of another shape, or state that no file holds.
    """
    import torch

    from normbench.building import build, state_of

    check_targets(source)
    try:
        model = build(source.config)
    except Exception as error:
        raise Refused(f"{source.config_file}: the model cannot be built ({first_line(error)})") from error
    there = dict(state_of(model)) if state.complete else dict(model.state_dict())
    blame = f"{source.file} does not fit model={source.config.choices['model']} {norm_words(source.config)}"
    for name, tensor in there.items():
        if name not in state.tensors:
            raise Refused(f"{blame}: it has no {name} {tuple(tensor.shape)}")
        saved = state.tensors[name]
        if saved.shape != tensor.shape:
            raise Refused(f"{blame}: {name} is {tuple(saved.shape)}, not {tuple(tensor.shape)}")
        if saved.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise Refused(f"{blame}: {name} is {saved.dtype}, not {tensor.dtype}")
    for name, saved in state.tensors.items():
        if name not in there:
            raise Refused(f"{blame}: it has {name} {tuple(saved.shape)}, the model has not")
    for name, why in beside_the_file(model, set(there)):
        raise Refused(f"{source.name}: {name} {why}, so no file holds it; make it a buffer (register_buffer)")
    with torch.no_grad():
        for name, tensor in there.items():
            tensor.copy_(state.tensors[name])
    return model.eval()


def norm_words(config: Config) -> str:
    """`norm=obn`, a class of one's own by its name."""
    target = config.norm["_target_"]
    return f"norm={config.choices['norm']}" + ("" if target.startswith(OURS) else f" ({target})")


def beside_the_file(model: "nn.Module", known: set[str]) -> Iterator[tuple[str, str]]:
    """State of strangers' modules that the file does not hold: plain attributes, buffers kept out of it.

    What ours keep out of a state_dict follows from their options.
    """
    import torch

    for path, part in model.named_modules():
        if type(part).__module__.split(".")[0] in LIBRARIES:
            continue
        prefix = f"{path}." if path else ""
        for name, _ in part.named_buffers(recurse=False):
            if prefix + name not in known:
                yield prefix + name, "is a buffer that is not persistent"
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, "is a plain attribute"


def check_targets(source: Source) -> None:
    """Let a configuration name nothing to be called but modules that one can import, and interpolate nothing,
    for what it writes is resolved and a resolver could make another name.

    A session's folder may come from anywhere; training takes any callable, from one's own command line.
    """
    from torch import nn

    from normbench.building import targets

    for values in (source.config.model, source.config.norm):
        if "${" in str(values):
            raise Refused(f"{source.config_file} holds an interpolation (${{…}}); a session's own holds none")
        for target in targets(values):
            try:
                found: Any = pkgutil.resolve_name(target)
            except Exception as error:
                raise Refused(
                    f"{source.config_file}: {target} cannot be imported ({first_line(error)}); start where "
                    f"`import {target.partition('.')[0]}` works"
                ) from error
            if not (isinstance(found, type) and issubclass(found, nn.Module)):
                raise Refused(
                    f"{source.config_file}: {target} is no torch.nn.Module; predict runs nothing else that a "
                    "file names"
                )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of its innermost cause, or its class where there is none."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next(iter(str(error).splitlines()), "")
    return f"no {text}" if isinstance(error, KeyError) and text else text or type(error).__name__
