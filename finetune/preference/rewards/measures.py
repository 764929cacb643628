"""Qualities that can be measured without any weights, all with gradients. They make the whole loop testable offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.errors import BadInput
from finetune.preference.rewards.references import check_measure

LUMA = (0.299, 0.587, 0.114)


def luminance(pixels: Tensor) -> Tensor:
    """(B, H, W), ITU-R BT.601."""
    return (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)


def brightness(pixels: Tensor) -> Tensor:
    """Mean luminance, 0..1."""
    return luminance(pixels).mean((1, 2))


def contrast(pixels: Tensor) -> Tensor:
    """Standard deviation of luminance, 0..0.5."""
    return luminance(pixels).flatten(1).std(1)


def saturation(pixels: Tensor) -> Tensor:
    """Mean of largest minus smallest channel, 0..1."""
    return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


def sharpness(pixels: Tensor) -> Tensor:
    """Mean absolute Laplacian of luminance."""
    kernel = pixels.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(luminance(pixels)[:, None], kernel).abs().mean((1, 2, 3))


def warmth(pixels: Tensor) -> Tensor:
    """Mean of red minus blue, -1..1."""
    return (pixels[:, 0] - pixels[:, 2]).mean((1, 2))


def clean_border(pixels: Tensor) -> Tensor:
    """Minus the standard deviation of the outer eighth: 0 is an even ground."""
    height, width = pixels.shape[-2] // 8 or 1, pixels.shape[-1] // 8 or 1
    edges = [pixels[:, :, :height].flatten(2), pixels[:, :, -height:].flatten(2), pixels[:, :, :, :width].flatten(2), pixels[:, :, :, -width:].flatten(2)]
    return -torch.cat(edges, 2).std(2).mean(1)


def palette_distance(pixels: Tensor, colours: Tensor) -> Tensor:
    """Mean distance of each pixel to the nearest of `colours` (n, 3), softened so that gradients flow; 0 is on palette."""
    distances = ((pixels.flatten(2).transpose(1, 2)[:, :, None] - colours.to(pixels)) ** 2).sum(-1)
    return (-torch.logsumexp(-distances * 20, -1) / 20).clamp_min(0).add(1e-6).sqrt().mean(1)


def gram(pixels: Tensor) -> Tensor:
    """(B, 45) correlations of colour and gradient channels over space: texture and palette without place."""
    across = F.pad(pixels[..., 1:] - pixels[..., :-1], (0, 1))
    down = F.pad(pixels[..., 1:, :] - pixels[..., :-1, :], (0, 0, 0, 1))
    channels = torch.cat([pixels, across, down], 1).flatten(2)
    products = channels @ channels.transpose(1, 2) / channels.shape[-1]
    rows, columns = torch.triu_indices(9, 9)
    return products[:, rows, columns]


def style_distance(pixels: Tensor, target: Tensor) -> Tensor:
    """Distance of `gram` to the mean of a style's pictures, (45,)."""
    return (gram(pixels) - target.to(pixels)).norm(dim=1)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness, "contrast": contrast, "saturation": saturation, "sharpness": sharpness, "warmth": warmth, "clean_border": clean_border,
}


@dataclass(frozen=True)
class Measure:
    """A measured quality as a reward. target None: more is better; a number: nearer to it is better.

    settings: for palette {"colours": ["#rrggbb", ...]}, for style {"gram": [45 numbers]}.
    """

    name: str
    target: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    differentiable: bool = True

    def __post_init__(self) -> None:
        check_measure(self.name, self.settings)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.name == "palette":
            return -palette_distance(pixels, torch.tensor([_rgb(colour) for colour in self.settings["colours"]]))
        if self.name == "style":
            return -style_distance(pixels, torch.tensor(self.settings["gram"]))
        value = PLAIN[self.name](pixels)
        return value if self.target is None else -(value - self.target).abs()

    def description(self) -> dict[str, Any]:
        return {"v": 1, "kind": "measure", "measure": self.name, "target": self.target, "settings": dict(self.settings)}


def _rgb(colour: str) -> tuple[float, float, float]:
    digits = colour.removeprefix("#")
    try:
        if len(digits) != 6:
            raise ValueError
        return tuple(int(digits[place:place + 2], 16) / 255 for place in (0, 2, 4))
    except ValueError:
        raise BadInput(f"{colour!r} is not a colour", where="reward", fix="write colours as #rrggbb") from None
