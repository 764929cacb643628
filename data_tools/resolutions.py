"""Several training resolutions for one set of pictures: which of them each picture gets, never enlarged unless that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.bucket_choice import choose_buckets
from data_tools.buckets import Placement, Size, assign, candidates


def fills(size: Size, resolution: int, multiple: int, longest: int | None = None) -> bool:
    """Whether a picture of (height, width) covers some bucket of the full area of this resolution as it is."""
    return any(bucket.height <= size[0] and bucket.width <= size[1] for bucket in candidates(resolution, multiple, longest=longest))


def place_at_each(sizes: Sequence[Size], resolutions: Sequence[int], *, multiple: int, most: int, upscale: bool = False, fit: str = "crop",
                  others: Sequence[Size] = (), longest: int | None = None) -> list[list[Placement]]:
    """For each picture its placements, the largest resolution first; at least one, and no bucket twice.

    sizes: (height, width) in pixels.  most: buckets at each resolution.  others: pictures that go into the buckets of `sizes`
    without a say in which there are; their placements come after.  longest: side that no bucket may exceed.  With one resolution this is `choose_buckets` and
    `assign`. With several, the smallest takes every picture, and a larger one those that fill it without being enlarged
    (all of them with `upscale`): a picture that is enlarged teaches the model blur.
    """
    everyone = [*sizes, *others]
    placed: list[list[Placement]] = [[] for _ in everyone]
    for resolution in sorted(set(resolutions), reverse=True):
        takes_all = upscale or resolution == min(resolutions)
        inside = [number for number, size in enumerate(everyone) if takes_all or fills(size, resolution, multiple, longest)]
        deciding = [number for number in inside if number < len(sizes)]
        if not deciding:
            continue
        buckets = choose_buckets([sizes[number] for number in deciding], resolution=resolution, multiple=multiple, most=most, upscale=upscale, longest=longest)
        used = sorted({assign(sizes[number], buckets, upscale=upscale, fit=fit).bucket for number in deciding})
        for number in inside:
            placement = assign(everyone[number], buckets if number < len(sizes) else used, upscale=upscale, fit=fit)
            has_border = placement.padded and fit == "crop"
            if (takes_all or not has_border) and all(placement.bucket != other.bucket for other in placed[number]):
                placed[number].append(placement)
    return placed
