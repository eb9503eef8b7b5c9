"""From a config to a model: built without touching the random state, tried out before data is opened."""

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hydra import utils as hydra_utils
from hydra.errors import InstantiationException
from torch import Tensor, nn

from normbench import ranks
from normbench.config import SYNC_BN, Config
from normbench.data.options import DatasetOptions
from normbench.seeds import Seeds
from normbench.values import Refused

MODULE_ATTRIBUTES = vars(nn.Module()).keys()


def build(config: Config) -> nn.Module:
    """The model with its norm layers, on the CPU; `model.norm_layers` holds the modules that `norm` returned.

    What a constructor draws comes from a fixed seed and leaves the global generator as it was; `initialise`
    writes the session's own weights afterwards.
    """
    channels, *size = config.dataset["shape"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = make(config.model)(
            in_channels=channels,
            num_classes=config.dataset["num_classes"],
            image_size=tuple(size),
            norm=make(config.norm),
        )
    return model


def make(values: dict[str, Any]) -> Any:
    """The callable that a `_target_` and its options name."""
    target = values.get("_target_")
    if values.get("_partial_") is not True:
        raise Refused(f"{target}: a layer's or model's YAML needs _partial_: true")
    # Hydra 1.4 asks for the targets that a caller trusts: all that a person's own configuration names
    trusted = getattr(hydra_utils, "execution_whitelist", None)
    try:
        with trusted(targets(values)) if trusted else contextlib.nullcontext():
            return hydra_utils.instantiate(values)
    except InstantiationException as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise Refused(f"{target}: {type(reason).__name__}: {str(reason).splitlines()[0]}") from error


def targets(values: Any) -> list[str]:
    """Every `_target_` in a configuration."""
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    own = [str(values["_target_"])] if isinstance(values, dict) and "_target_" in values else []
    return [*own, *(target for value in inner for target in targets(value))]


def check_builds(config: Config) -> None:
    """Build the model and push batches of the right shape through it without arithmetic.

    Raises:
        Refused — an option that only a constructor can judge, or a batch that a norm cannot take.
    """
    options = DatasetOptions.from_mapping(config.dataset)
    chosen = f"model={config.choices['model']} norm={config.choices['norm']}"
    try:
        model = build(config)
    except (ValueError, TypeError) as error:
        raise Refused(f"{chosen}: {error}") from error
    except Exception as error:
        if str(config.norm["_target_"]).startswith("normbench."):
            raise
        raise Refused(f"{chosen}: {type(error).__name__}: {error}") from error
    if config.trace:
        from normbench.traces import choosing  # which needs what is here

        choosing.check(model, config.trace, config.traces)
    channels, *size = options.shape
    if config.pack:
        from normbench.packing import packed  # which needs what is here

        try:
            model, channels = packed(model, config.pack), config.pack * channels
        except ValueError as error:
            raise Refused(f"pack={config.pack} {chosen}: {error}") from error
    shape = (channels, *size)
    model.to("meta").train()
    cut = ranks.Cut.here(config.batch["size"], config.batch["micro"])
    together = cut.ranks if config.norm["_target_"] == SYNC_BN else 1  # shares that are measured as one
    images, samples = min(config.batch["size"], options.train_samples), options.train_samples
    last = 0 if options.drop_last else samples % images
    parts = "" if cut.parts == 1 else f" in {cut.parts} parts"
    blame = f"batch.size={images}{parts}"
    try_out(model, (images // cut.parts * together, *shape), blame)
    if last:
        blame = f"an epoch's last batch has {last} of {blame} samples; use dataset.drop_last=true"
        try_out(model, (last // cut.parts * together, *shape), blame)


def norm_layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the model's `norm` callable returned, by name, whatever their class."""
    layers: dict[str, nn.Module] = model.norm_layers  # type: ignore[assignment]
    return layers


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model, by name."""
    yield from itertools.chain(model.named_parameters(), model.named_buffers())


def remake_strangers(model: nn.Module, seeds: Seeds) -> None:
    """Give a stranger's norm layers, in place, the state that a new layer of the session would have.

    Ours keep all state in parameters and buffers and draw nothing. Another's class may draw its parameters,
    or keep running averages in plain attributes, which would go from one session into the next.
    """
    makers: dict[str, Callable[[], nn.Module]] = model.norm_makers  # type: ignore[assignment]
    for name, layer in norm_layers_of(model).items():
        if type(layer).__module__.startswith("normbench."):
            continue
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.number("init", name))
            fresh = dict(makers[name]().named_modules())
        for path, part in layer.named_modules():
            if path in fresh:
                copy_state(part, fresh[path])


@torch.no_grad()
def copy_state(part: nn.Module, fresh: nn.Module) -> None:
    """One module's own parameters, buffers and plain attributes, without its children's or its hooks.

    What a forward pass has added since is taken away.
    """
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(fresh, kind).items():
            there = getattr(part, kind).get(name)
            if there is not None and tensor is not None and there.shape == tensor.shape:
                there.copy_(tensor)
        for name in getattr(part, kind).keys() - getattr(fresh, kind).keys():
            del getattr(part, kind)[name]
    for name in vars(part).keys() - vars(fresh).keys() - MODULE_ATTRIBUTES:
        del vars(part)[name]
    for name, value in vars(fresh).items():
        if name in MODULE_ATTRIBUTES or isinstance(value, types.FunctionType):
            continue
        there = vars(part).get(name)
        if isinstance(value, torch.Tensor) and isinstance(there, torch.Tensor):
            value = value.to(there.device)
        vars(part)[name] = value


def try_out(model: nn.Module, shape: tuple[int, ...], blame: str) -> None:
    """One forward pass on the meta device; a stranger's layer may fail there and still train."""
    try:
        model(torch.zeros(shape, device="meta"))
    except ValueError as error:
        raise Refused(f"{blame}: {error}") from error
    except (RuntimeError, NotImplementedError, TypeError):
        return
