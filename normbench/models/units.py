"""What the networks are made of: a layer, its norm slot, activation and dropout, in a chosen order."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from normbench.norms.fusable import FusableBatchNorm
from normbench.values import below_one, flag, one_of, positive_int

MakeNorm = Callable[..., nn.Module]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


@dataclass(frozen=True)
class Recipe:
    """How every unit of a model is put together.

    Args:
        bias: of the layers that stand directly before a norm slot.
        norm_position: before or after the activation.
        dropout: the probability of a zero; 0 for none.
        dropout_position: before, directly before the norm slot, or after, at the end of the unit.
        activation: a name of ACTIVATIONS in place of the model's own, which None keeps; "none" leaves it to
            norms that hold one.
    """

    bias: bool
    norm_position: str
    dropout: float
    dropout_position: str
    activation: str | None = None

    def __post_init__(self) -> None:
        flag("bias", self.bias)
        one_of("norm_position", self.norm_position, ("before", "after"))
        below_one("dropout", self.dropout)
        one_of("dropout_position", self.dropout_position, ("before", "after"))
        if self.activation is not None:
            one_of("activation", self.activation, ACTIVATIONS)

    def make_activation(self, own: Callable[[], nn.Module]) -> nn.Module:
        """The chosen activation, else the model's own."""
        return own() if self.activation is None else ACTIVATIONS[self.activation]()

    def make_dropout(self) -> nn.Module:
        """A layer that draws nothing where the probability is 0."""
        return nn.Dropout(self.dropout) if self.dropout else nn.Identity()

    def finish(
        self,
        x: Tensor,
        norm: nn.Module,
        activation: nn.Module,
        dropout: nn.Module,
        residual: Tensor | None = None,
    ) -> Tensor:
        """What follows a unit's layer; a residual is added just before the activation.

        before   x → [dropout] → norm → + residual → activation → [dropout]
        after    x → + residual → activation → [dropout] → norm → [dropout]

        Where nothing stands between a norm's operator and a ReLU, the operator does both.
        """
        dropout_first = self.dropout_position == "before"
        if self.norm_position == "before":
            x = dropout(x) if dropout_first else x
            plain = residual is None and type(activation) is nn.ReLU
            if plain and isinstance(norm, FusableBatchNorm) and norm.fused(x):
                x = norm(x, relu=True)
                return x if dropout_first else dropout(x)
            x = norm(x)
        if residual is not None:
            x = x + residual
        x = activation(x)
        if self.norm_position == "after":
            x = norm(dropout(x) if dropout_first else x)
        return x if dropout_first else dropout(x)


class Slot(nn.Module):
    """Where a norm may stand; a placeholder that remembers what it saw, (N, C, *) → the same."""

    def __init__(self, num_features: int, kind: str = "conv") -> None:
        super().__init__()
        self.num_features = num_features
        self.kind = kind
        self.spatial_shape: tuple[int, ...] = ()
        self.fed_by: str | None = None  # who signed the input, see `seen_by_slots`

    def forward(self, x: Tensor) -> Tensor:
        self.spatial_shape = tuple(x.shape[2:])
        self.fed_by = getattr(x, "normbench_made_by", None)
        return x.view_as(x)  # unsigned: a norm will stand here


class ConvUnit(nn.Module):
    """A square convolution that keeps the map's size but for its stride, then norm, activation, dropout.

    Args:
        padding: null keeps the size, `dilation * (kernel_size // 2)`.
        activation: the class of the model's own.

    Shape: (N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉), for the padding null.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        recipe: Recipe,
        *,
        activation: Callable[[], nn.Module],
        kernel_size: int = 3,
        conv_stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=conv_stride,
            padding=dilation * (kernel_size // 2) if padding is None else padding,
            dilation=dilation,
            bias=recipe.bias,
        )
        self.norm: nn.Module = Slot(out_channels)
        self.activation = recipe.make_activation(activation)
        self.dropout = recipe.make_dropout()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.recipe.finish(self.conv(x), self.norm, self.activation, self.dropout, residual)


class LinearUnit(nn.Module):
    """A linear layer, then norm, activation, dropout. (N, in_features) → (N, out_features)."""

    def __init__(
        self, in_features: int, out_features: int, recipe: Recipe, *, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.linear = nn.Linear(in_features, out_features, bias=recipe.bias)
        self.norm: nn.Module = Slot(out_features, "fc")
        self.activation = recipe.make_activation(activation)
        self.dropout = recipe.make_dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.recipe.finish(self.linear(x), self.norm, self.activation, self.dropout)


def check_task(
    model: str, in_channels: int, num_classes: int, image_size: tuple[int, int], smallest: int = 8
) -> None:
    """Refuse images that the model cannot take, and a number of channels or classes that is none."""
    positive_int("in_channels", in_channels)
    positive_int("num_classes", num_classes)
    if len(image_size) != 2:
        raise ValueError(f"image_size must be (height, width), got {tuple(image_size)}")
    height, width = (positive_int("image_size", side) for side in image_size)
    if min(height, width) < smallest:
        raise ValueError(f"{model} needs images of at least {smallest}×{smallest}, got {height}×{width}")
