"""Where in a picture its loss counts."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.buckets import Bucket, place
from data_tools.progress import Progress
from data_tools.records import ImageRecord
from finetune.errors import DataError
from finetune.training.encoding_cache import EncodingCache
from finetune.training.masks import encode_masks, mask_keys, place_weights
from finetune.training.pixels import load_mask, load_pixels
from finetune.training.training_set import TrainingPicture


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4).filter(lambda values: max(values) > 0.01), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_weights_are_one_on_average_and_follow_the_mask(values, unmasked):
    mask = torch.tensor(values).view(2, 2)
    weights = place_weights(mask, unmasked)
    assert weights.shape == (1, 2, 2) and weights.mean().item() == pytest.approx(1, abs=1e-5)
    raised = mask.clamp(min=unmasked)
    assert torch.allclose(weights[0] * raised.mean(), raised, atol=1e-5)


def test_an_unmasked_weight_of_one_makes_all_places_alike():
    assert torch.equal(place_weights(torch.tensor([[0.0, 1.0]]), 1.0), torch.ones(1, 1, 2))


@pytest.mark.parametrize("size, fit", [((120, 60), "crop"), ((60, 120), "crop"), ((120, 60), "pad"), ((30, 30), "crop")])
def test_a_mask_is_cut_exactly_as_its_picture(tmp_path, size, fit):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    placement = place((size[1], size[0]), Bucket(48, 48), fit=fit)
    picture = load_pixels(tmp_path / "a.png", placement, "#000000")
    assert np.abs(load_mask(tmp_path / "a.png", placement).astype(int) - picture[..., 0]).max() <= 1


def with_mask(tmp_path, mask):
    mask.save(tmp_path / "mask.png")
    record = ImageRecord(tmp_path / "a.png", 64, 64, "hash", mask=tmp_path / "mask.png")
    return TrainingPicture(record, place((64, 64), Bucket(64, 64)), mask_hash=hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest())


def encoded(tmp_path, mask, unmasked_weight=0.0):
    cache, picture = EncodingCache(tmp_path / "cache"), with_mask(tmp_path, mask)
    cache.put("a" * 64, {"mean": torch.zeros(4, 8, 8)})
    keys = mask_keys([picture, TrainingPicture(picture.record, picture.placement)], ["a" * 64, "b" * 64])
    encode_masks([picture], keys[:1], ["a" * 64], unmasked_weight, cache, Progress())
    return cache, keys


def test_a_mask_is_brought_down_to_the_latent_grid_whatever_its_own_size(tmp_path):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.paste(128, (16, 0, 32, 16))
    cache, keys = encoded(tmp_path, mask.resize((64, 64), Image.Resampling.NEAREST))
    grid = cache.get(keys[0])["mask"]
    assert grid.shape == (8, 8) and keys[1] is None
    assert torch.equal(grid[:, :4], torch.ones(8, 4)) and torch.allclose(grid[:4, 4:], torch.tensor(128 / 255)) and not grid[4:, 4:].any()


def test_a_place_that_is_covered_in_part_does_not_count_at_all(tmp_path):
    """A latent answers for all its pixels at once: what of it counts a little is learned whole."""
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 64, 6))
    mask.paste(0, (63, 63, 64, 64))
    mask.paste(200, (20, 40, 21, 41))
    cache, keys = encoded(tmp_path, mask)
    wanted = torch.ones(8, 8)
    wanted[0], wanted[7, 7], wanted[5, 2] = 0, 0, 200 / 255
    assert torch.allclose(cache.get(keys[0])["mask"], wanted)


def test_a_mask_too_fine_for_the_latents_is_refused_with_their_size(tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (3, 0, 13, 64))
    with pytest.raises(DataError, match="no place of 8x8 pixels.*at 64x64") as refusal:
        encoded(tmp_path, mask)
    assert "data.resolution" in refusal.value.fix


def test_a_mask_that_leaves_nothing_is_named_unless_what_it_leaves_out_counts_a_little(tmp_path):
    with pytest.raises(DataError, match="leaves nothing") as refusal:
        encoded(tmp_path, Image.new("L", (64, 64)))
    assert refusal.value.where.endswith("mask.png") and "unmasked_weight" in refusal.value.fix
    cache, keys = encoded(tmp_path, Image.new("L", (64, 64)), unmasked_weight=0.1)
    assert torch.allclose(place_weights(cache.get(keys[0])["mask"], 0.1), torch.ones(1, 8, 8))
