"""A session's start weights: each layer's own random numbers, written in place."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normbench.models.weights import raw_weight, start_gains
from normbench.seeds import Seeds

SCHEMES = ("torch", "xavier", "he", "glorot")


@torch.no_grad()
def initialise(model: nn.Module, seeds: Seeds) -> None:
    """Write the weight and bias of every convolution and linear layer, by the scheme `model.init`.

    A layer's numbers depend on the session and the layer's name only, its bias' not on its weight's; so
    layers that two models share start equal, whatever their norms draw or hold, and whatever form their
    weights have (see `reparametrize`): the raw values are drawn, and gains follow from them. They are drawn
    on the CPU in float32, whatever the parameter's device and dtype.

        torch    U(±1/√fan_in) for weights and biases
        xavier   U(±√(6/(fan_in + fan_out))) for weights, biases as torch
        he       N(0, 2/fan_out) for convolutions' weights, the rest as torch
        glorot   weights as xavier, zero biases

    Source: torch's own reset_parameters; d2l's init_cnn; torchvision's ResNet; Keras' defaults. Differs
    from them in: where the random numbers come from.
    """
    scheme = str(model.init)
    in_norms = tuple(f"{name}." for name in getattr(model, "norm_layers", {}))
    for path, layer in model.named_modules():
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        name = path.replace("_orig_mod.", "")  # a compiled model keeps its layers' names
        own = dict(layer.named_parameters(recurse=False))
        if name.startswith(in_norms):  # a norm's affine may be a convolution of ones and zeros: it stays so
            own = {key: value for key, value in own.items() if value.min() < value.max()}
        else:
            own["weight"] = raw_weight(layer)
        if "weight" in own:
            own["weight"].copy_(draw_weight(own["weight"], scheme, seeds.generator("init", name)))
            start_gains(layer)
        if "bias" in own:
            generator = seeds.generator("init", name, "bias")
            own["bias"].copy_(draw_bias(own["bias"], layer.weight, scheme, generator))


def draw_weight(like: Tensor, scheme: str, generator: torch.Generator) -> Tensor:
    """New values for a weight shaped as `like`, (out, in, *)."""
    weight = torch.empty(like.shape, dtype=torch.float32, device="cpu")
    if scheme in ("xavier", "glorot"):
        return nn.init.xavier_uniform_(weight, generator=generator)
    if scheme == "he" and weight.ndim > 2:
        return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def draw_bias(like: Tensor, weight: Tensor, scheme: str, generator: torch.Generator) -> Tensor:
    """New values for the bias beside `weight`."""
    bias = torch.empty(like.shape, dtype=torch.float32, device="cpu")
    bound = 0.0 if scheme == "glorot" else 1 / math.sqrt(weight.shape[1:].numel())
    return nn.init.uniform_(bias, -bound, bound, generator=generator)
