"""Several training resolutions for one set of pictures: which of them each picture gets, never enlarged unless that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.buckets import Placement, Size, assign, candidates, choose_buckets


def fills(size: Size, resolution: int, multiple: int) -> bool:
    """Whether a picture of (height, width) covers some bucket of the full area of this resolution as it is."""
    return any(bucket.height <= size[0] and bucket.width <= size[1] for bucket in candidates(resolution, multiple))


def place_at_each(sizes: Sequence[Size], resolutions: Sequence[int], *, multiple: int, most: int, upscale: bool = False, fit: str = "crop") -> list[list[Placement]]:
    """For each picture its placements, the largest resolution first; at least one, and no bucket twice.

    sizes: (height, width) in pixels.  most: buckets at each resolution.  With one resolution this is `choose_buckets` and
    `assign`. With several, the smallest takes every picture, and a larger one those that fill it without being enlarged
    (all of them with `upscale`): a picture that is enlarged teaches the model blur.
    """
    placed: list[list[Placement]] = [[] for _ in sizes]
    for resolution in sorted(set(resolutions), reverse=True):
        takes_all = upscale or resolution == min(resolutions)
        inside = [number for number, size in enumerate(sizes) if takes_all or fills(size, resolution, multiple)]
        if not inside:
            continue
        buckets = choose_buckets([sizes[number] for number in inside], resolution=resolution, multiple=multiple, most=most, upscale=upscale)
        for number in inside:
            placement = assign(sizes[number], buckets, upscale=upscale, fit=fit)
            has_border = placement.padded and fit == "crop"
            if (takes_all or not has_border) and all(placement.bucket != other.bucket for other in placed[number]):
                placed[number].append(placement)
    return placed
