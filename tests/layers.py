"""What the layers' tests share: the layers of `conf/norm/` by name, and inputs for them."""

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from normbench.audit.subject import activations, move_parameters
from normbench.config import conf_dir
from normbench.models.placing import takes

# `custom` names no layer: its `_target_` is the user's to give
NAMES = sorted(path.stem for path in (conf_dir() / "norm").glob("*.yaml") if path.stem != "custom")
__all__ = ["NAMES", "activations", "build", "options"]


def options(name: str) -> dict[str, object]:
    """The YAML's values; a stride that follows the root key is 2, to have something to do."""
    config = OmegaConf.load(conf_dir() / "norm" / f"{name}.yaml")
    if "stride" in config:
        config.stride = 2
    return OmegaConf.to_container(config, resolve=True)


def build(
    name: str,
    num_features: int,
    dtype: torch.dtype = torch.float64,
    spatial_shape: tuple[int, ...] = (5, 3),
    **changes: object,
) -> nn.Module:
    """The layer with parameters away from one and zero, which would hide half the mistakes."""
    make = instantiate(options(name) | changes)
    sized = {"spatial_shape": spatial_shape} if takes(make, "spatial_shape") else {}
    norm = make(num_features, **sized).to(dtype)
    move_parameters(norm)
    return norm
