"""AutoencoderKL whose encoder is set by hand to an exact linear map of 8x8 patches; only the decoder is trained.

Because the encoder is linear, the latent of an icon on any plain ground is a sum of four fixed latents (`latent_parts`),
so that training the transformer needs no encoder at all.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .foreign_palettes import random_palette
from .rasters import BUCKETS, ICON_EDGE, compose
from .subjects import COLOURS

PATCH = 8
LATENT_CHANNELS = 16
CHANNELS = (16, 48, 48, 64)
GROUPS = 8
LARGE = 512.0


@dataclass
class PatchMap:
    """latent = matrix @ (patch - mean), with pictures in -1..1; `scale` makes the latents' mean square one."""

    mean: torch.Tensor          # [192]
    matrix: torch.Tensor        # [channels, 192]
    scale: float
    channel_std: torch.Tensor   # [channels], of the scaled latents

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, height, width] in -1..1 to unscaled latents."""
        count, _, height, width = pictures.shape
        patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2) - self.mean
        latents = (patches @ self.matrix.T).transpose(1, 2)
        return latents.reshape(count, -1, height // PATCH, width // PATCH)

    def as_tensors(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean, "matrix": self.matrix, "scale": torch.tensor([self.scale], dtype=torch.float64),
                "channel_std": self.channel_std}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "PatchMap":
        return cls(tensors["mean"], tensors["matrix"], float(tensors["scale"][0]), tensors["channel_std"])


def to_model_range(pictures: np.ndarray) -> torch.Tensor:
    """[n, height, width, 3] in 0..1 to [n, 3, height, width] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures, np.float32)).permute(0, 3, 1, 2) * 2 - 1


def ground_colour(name: str, random: np.random.Generator) -> np.ndarray:
    base = np.array(COLOURS[name][0], np.float32) / 255
    if name == "white":
        return base
    return np.clip(base + random.normal(0, 0.02, 3), 0, 1).astype(np.float32)


def mixed_pictures(rasters: dict, count: int, size, random: np.random.Generator, foreign: float = 0.36) -> torch.Tensor:
    """Icons on white or coloured grounds, some of them in foreign palettes; in -1..1."""
    names = list(COLOURS)
    icons = rasters[ICON_EDGE[size]]
    pictures = []
    for _ in range(count):
        icon = icons[random.integers(len(icons))]
        name = names[random.integers(len(names))] if random.random() < 0.6 else "white"
        ground = ground_colour(name, random)
        is_foreign = random.random() < foreign
        pictures.append(random_palette(icon, ground, size, random) if is_foreign else compose(icon, ground, size))
    return to_model_range(np.stack(pictures))


def fit_patch_map(rasters: dict, seed: int, channels: int = LATENT_CHANNELS, pictures: int = 3000) -> tuple[PatchMap, float]:
    """Principal components of patches, half-whitened; also returns the share of variance they keep.

    Half-whitened (divided by the square root of the deviation): without it fine detail drowns in the noise of the
    diffusion, wholly whitened it would count as much as the coarse shape.
    """
    random = np.random.default_rng(seed)
    samples = [mixed_pictures(rasters, 100, BUCKETS[i % 3], random) for i in range(pictures // 100)]
    patches = torch.cat([F.unfold(s, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH) for s in samples])
    mean = patches.mean(0)
    centred = (patches - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels].T
    vectors = vectors * torch.sign(vectors.sum(1, keepdim=True) + 1e-9)
    kept = float(values.sum() / (centred ** 2).sum(1).mean())
    matrix = (vectors / values.sqrt().sqrt()[:, None]).float()
    latents = (centred.float() @ matrix.T)
    scale = float(1 / latents.pow(2).mean().sqrt())
    return PatchMap(mean.float(), matrix, scale, (latents * scale).std(0)), kept


def latent_parts(patch_map: PatchMap, icons: np.ndarray, size) -> torch.Tensor:
    """[icons, 4, channels, h, w], scaled: the icon on black, then what each full colour channel of the ground adds."""
    black = np.zeros(3, np.float32)
    on_black = np.stack([compose(icon, black, size) for icon in icons])
    parts = [patch_map.encode(to_model_range(on_black))]
    for channel in range(3):
        ground = np.eye(3, dtype=np.float32)[channel]
        lit = np.stack([compose(icon, ground, size) for icon in icons])
        parts.append(patch_map.encode(to_model_range(lit)) - parts[0])
    return torch.stack(parts, 1) * patch_map.scale


def new_autoencoder(channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS, layers_per_block=1, latent_channels=channels, norm_num_groups=GROUPS, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)


@torch.no_grad()
def set_encoder(autoencoder: AutoencoderKL, patch_map: PatchMap) -> None:
    """Residual blocks become their shortcuts, the three strided convolutions space-to-depth, the last one the matrix."""
    encoder = autoencoder.encoder
    for parameter in encoder.parameters():
        parameter.zero_().requires_grad_(False)
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.fill_(1)
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1
    places = _set_space_to_depth(encoder)
    last = encoder.down_blocks[2].downsamplers[0].conv
    channels = len(patch_map.matrix)
    for source, (colour, y, x) in enumerate(places):
        for dy in range(2):
            for dx in range(2):
                column = colour * PATCH * PATCH + (y + 4 * dy) * PATCH + x + 4 * dx
                last.weight[:channels, source, dy, dx] = patch_map.matrix[:, column]
    last.bias[:channels] = -(patch_map.matrix @ patch_map.mean)
    _make_last_norm_linear(encoder, channels)
    autoencoder.register_to_config(scaling_factor=patch_map.scale)


def _set_space_to_depth(encoder) -> list[tuple[int, int, int]]:
    """After two levels channel k is one (colour, y, x) of a 4x4 patch; returns that list."""
    places = [(colour, 0, 0) for colour in range(3)]
    for level in range(2):
        conv, deeper = encoder.down_blocks[level].downsamplers[0].conv, []
        for source, (colour, y, x) in enumerate(places):
            for dy in range(2):
                for dx in range(2):
                    conv.weight[len(deeper), source, dy, dx] = 1
                    deeper.append((colour, y + dy * 2 ** level, x + dx * 2 ** level))
        places = deeper
        shortcut = encoder.down_blocks[level + 1].resnets[0].conv_shortcut
        if shortcut is not None:
            for channel in range(len(places)):
                shortcut.weight[channel, channel, 0, 0] = 1
    return places


def _make_last_norm_linear(encoder, channels: int) -> None:
    """The last GroupNorm and SiLU undo themselves: +x and -x stand beside large constants in every group.

    The constants fix mean 0 and a known deviation whatever x is, and silu(u) - silu(-u) = u.
    """
    shortcut, width = encoder.down_blocks[3].resnets[0].conv_shortcut, CHANNELS[3] // GROUPS
    per_group = channels // GROUPS
    for group in range(GROUPS):
        for j in range(per_group):
            plus, minus, channel = group * width + 2 * j, group * width + 2 * j + 1, group * per_group + j
            shortcut.weight[plus, channel, 0, 0] = 1
            shortcut.weight[minus, channel, 0, 0] = -1
            encoder.conv_out.weight[channel, plus, 1, 1] = 0.5
            encoder.conv_out.weight[channel, minus, 1, 1] = -0.5
        for j in range(2 * per_group, width):
            shortcut.bias[group * width + j] = LARGE if j % 2 == 0 else -LARGE
    share_of_constants = 1 - 2 * per_group / width
    encoder.conv_norm_out.weight.fill_(2 * LARGE * share_of_constants ** 0.5)
    encoder.conv_out.bias[channels:] = -20.0    # log variance: practically none
