"""From a config to a model: built without touching the random state, tried out before data is opened."""

from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from normbench.config import Config
from normbench.data.options import DatasetOptions
from normbench.values import Refused


def build(config: Config) -> nn.Module:
    """The model with its norm layers, on the CPU; `model.norm_layers` holds the modules that `norm` returned.

    What a constructor draws comes from a fixed seed and leaves the global generator as it was; `initialise`
    writes the session's own weights afterwards.
    """
    channels, *size = config.dataset["shape"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = make(config.model)(
            in_channels=channels,
            num_classes=config.dataset["num_classes"],
            image_size=tuple(size),
            norm=make(config.norm),
        )
    return model


def make(values: dict[str, Any]) -> Any:
    """The callable that a `_target_` and its options name."""
    try:
        return instantiate(values)
    except InstantiationException as error:
        raise Refused(f"{values.get('_target_')}: {str(error).splitlines()[0]}") from error


def check_builds(config: Config) -> None:
    """Build the model and push batches of the right shape through it without arithmetic.

    Raises:
        Refused — an option that only a constructor can judge, or a batch that a norm cannot take.
    """
    options = DatasetOptions.from_mapping(config.dataset)
    try:
        model = build(config)
    except (ValueError, TypeError) as error:
        raise Refused(f"model={config.choices['model']} norm={config.choices['norm']}: {error}") from error
    model.to("meta").train()
    size, samples = min(config.batch["size"], options.train_samples), options.train_samples
    last = 0 if options.drop_last else samples % size
    try_out(model, (size, *options.shape), f"batch.size={size}")
    if last:
        blame = f"an epoch's last batch has {last} of batch.size={size} samples; use dataset.drop_last=true"
        try_out(model, (last, *options.shape), blame)


def norm_layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the model's `norm` callable returned, by name, whatever their class."""
    layers: dict[str, nn.Module] = model.norm_layers  # type: ignore[assignment]
    return layers


def try_out(model: nn.Module, shape: tuple[int, ...], blame: str) -> None:
    """One forward pass on the meta device; a stranger's layer may fail there and still train."""
    try:
        model(torch.zeros(shape, device="meta"))
    except ValueError as error:
        raise Refused(f"{blame}: {error}") from error
    except (RuntimeError, NotImplementedError):
        return
