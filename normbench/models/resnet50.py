"""torchvision's ResNet-50, with its norms, their place, biases, dropout and strides made options."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from normbench.models.init import SCHEMES
from normbench.models.placing import place_norms
from normbench.models.units import MakeNorm, Recipe, Slot, check_task
from normbench.models.weights import reparametrize
from normbench.values import one_of


class Bottleneck(resnet.Bottleneck):  # type: ignore[misc]
    """torchvision's block in the order that a recipe says; its parameters keep their names.

    The shortcut's convolution has a norm slot, and neither activation nor dropout, so `norm_position` and
    `dropout` leave it as it is.
    """

    def configure(self, recipe: Recipe, stride_on: str) -> None:
        """What the constructor, whose arguments torchvision's ResNet chooses, could not be told."""
        self.recipe = recipe
        if stride_on == "1x1":
            self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride
        self.relu = recipe.make_activation(nn.ReLU)  # not in place: what a hook saw of a norm stays
        self.dropout = recipe.make_dropout()
        for name in ("conv3", "bn3"):  # behind the shortcut: slots stand in the order of the forward pass
            layer = getattr(self, name)
            delattr(self, name)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        finish, relu, dropout = self.recipe.finish, self.relu, self.dropout
        y = finish(self.conv1(x), self.bn1, relu, dropout)
        y = finish(self.conv2(y), self.bn2, relu, dropout)
        shortcut = x if self.downsample is None else self.downsample(x)
        return finish(self.conv3(y), self.bn3, relu, dropout, residual=shortcut)


class ResNet50(resnet.ResNet):  # type: ignore[misc]
    """The ImageNet workhorse with 53 norm slots; 23,528,522 parameters for ten classes with batch norm.

    Args:
        stride_on: 3x3, a block's middle convolution (v1.5, torchvision), or 1x1, its first (v1, Keras).
        bias, norm_position, dropout, dropout_position, activation: see `Recipe`; bias=true is Keras'.
        norm_layers: which slots get the norm, see `place_norms`.
        init: torch, xavier, he or glorot, see `initialise`; he is torchvision's, glorot Keras'.
        weight: none, standardized, scaled or weight_norm, see `reparametrize`.

    Shape: (N, in_channels, H, W) → (N, num_classes), from 8×8 up.
    Raises: ValueError — an option out of its range, or smaller images.
    Source: torchvision.models.resnet50, whose code and names it uses; He et al., Deep residual learning for
    image recognition, arXiv 1512.03385. Differs from the source in: activations are not in place. The first
    study's, Keras', is stride_on=1x1 bias=true init=glorot.
    """

    norm_layers: dict[str, nn.Module]

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        norm: MakeNorm,
        stride_on: str = "3x3",
        bias: bool = False,
        norm_position: str = "before",
        norm_layers: str | Sequence[str] = "all",
        dropout: float = 0.0,
        dropout_position: str = "after",
        activation: str | None = None,
        init: str = "he",
        weight: str = "none",
    ) -> None:
        check_task("resnet50", in_channels, num_classes, image_size)
        one_of("stride_on", stride_on, ("3x3", "1x1"))
        one_of("init", init, SCHEMES)
        recipe = Recipe(bias, norm_position, dropout, dropout_position, activation)
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=num_classes, norm_layer=Slot)
        self.init = init
        self.recipe = recipe
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.relu = recipe.make_activation(nn.ReLU)
        self.dropout = recipe.make_dropout()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.configure(recipe, stride_on)
            elif isinstance(module, nn.Conv2d) and bias:
                module.bias = nn.Parameter(torch.zeros(module.out_channels))
        reparametrize(self, weight)
        self.norm_layers = place_norms(self, norm, norm_layers, (in_channels, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.recipe.finish(self.conv1(x), self.bn1, self.relu, self.dropout)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits
