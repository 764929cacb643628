"""The build's parts on made-up subjects: exact shortcuts, and the same bytes from the same seed."""

import json

import numpy as np
import pytest
import torch

from finetune.mini_base import weights_folder
from finetune.mini_base.build.autoencoder import fit_patch_map, latent_parts, new_autoencoder, set_encoder, to_model_range
from finetune.mini_base.build.decoder import DecoderPlan, train_decoder
from finetune.mini_base.build.measures import ground_name, palette_distance, shape_score
from finetune.mini_base.build.muon import orthogonalise
from finetune.mini_base.build.packages import check_packages
from finetune.mini_base.build.rasters import BUCKETS, EDGES, ICON_EDGE, compose
from finetune.mini_base.build.style_folder import choose, styled
from finetune.mini_base.build.subjects import COLOURS, NAMED, Subject, is_held_out, training_caption
from finetune.mini_base.build.transformer import TransformerPlan, train_transformer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rasters():
    """Eight icons of coloured discs and bars, at both edges."""
    random = np.random.default_rng(0)
    icons = {edge: [] for edge in EDGES}
    for number in range(8):
        colour, middle, radius = random.random(3), 0.3 + 0.4 * random.random(2), 0.15 + 0.2 * random.random()
        for edge in EDGES:
            y, x = (np.mgrid[:edge, :edge] + 0.5) / edge
            inside = np.hypot(y - middle[0], x - middle[1]) < radius if number % 2 else np.abs(y - middle[0]) < radius / 2
            rgba = np.concatenate([np.broadcast_to(colour, (edge, edge, 3)), np.ones((edge, edge, 1))], -1) * inside[..., None]
            icons[edge].append((rgba * 255).round().astype(np.uint8))
    return {edge: np.stack(pictures) for edge, pictures in icons.items()}


@pytest.fixture(scope="module")
def patch_map(rasters):
    return fit_patch_map(rasters, seed=1, pictures=600)[0]


SUBJECTS = [Subject(f"icon-{number}", (english,), (chinese,), ()) for number, (_, english, chinese) in enumerate(NAMED[:8])]


@pytest.mark.parametrize("size", BUCKETS)
def test_the_encoder_network_is_the_patch_map(rasters, patch_map, size):
    autoencoder = new_autoencoder()
    set_encoder(autoencoder, patch_map)
    pictures = to_model_range(np.stack([compose(icon, np.array([0.2, 0.5, 0.7]), size) for icon in rasters[ICON_EDGE[size]]]))
    with torch.no_grad():
        difference = autoencoder.encode(pictures).latent_dist.mode() - patch_map.encode(pictures)
    assert difference.abs().max() < 2e-3


@pytest.mark.parametrize("size", BUCKETS)
def test_latents_of_an_icon_on_any_ground_are_a_sum_of_four(rasters, patch_map, size):
    ground, icons = np.array([0.2, 0.5, 0.7], np.float32), rasters[ICON_EDGE[size]]
    parts = latent_parts(patch_map, icons, size)
    summed = parts[:, 0] + (parts[:, 1:] * torch.from_numpy(ground).view(1, 3, 1, 1, 1)).sum(1)
    direct = patch_map.encode(to_model_range(np.stack([compose(icon, ground, size) for icon in icons]))) * patch_map.scale
    assert (summed - direct).abs().max() < 1e-4


def test_training_the_transformer_twice_gives_the_same_bits(rasters, patch_map, tmp_path):
    def train():
        plan = TransformerPlan(steps=3, batch=4, seed=7)
        return train_transformer(SUBJECTS, rasters, patch_map, weights_folder(), plan, tmp_path, report=lambda line: None).state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_the_decoder_twice_gives_the_same_bits(rasters, patch_map):
    def train():
        return train_decoder(rasters, patch_map, DecoderPlan(steps=3, batch=2), report=lambda line: None).state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_orthogonalised_update_moves_in_every_direction_alike():
    for shape in ((24, 64), (64, 24)):
        matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
        values = torch.linalg.svdvals(orthogonalise(matrices))
        assert values.max() < 1.3 and values.min() > 0.5


def test_about_a_sixth_of_the_combinations_is_never_trained_and_none_on_white():
    held_out = [is_held_out(row, colour) for row in range(300) for colour in COLOURS if colour != "white"]
    assert 0.14 < np.mean(held_out) < 0.19
    assert not any(is_held_out(row, "white") for row in range(300))


def test_captions_come_in_both_languages_and_name_the_ground():
    random = np.random.default_rng(2)
    captions = [training_caption(SUBJECTS[0], "red", random) for _ in range(400)]
    chinese = [caption for caption in captions if not caption.isascii()]
    assert 0.33 < len(chinese) / len(captions) < 0.47
    assert all("红色" in caption and "狗" in caption for caption in chinese)
    assert all("red" in caption and "dog" in caption for caption in captions if caption.isascii())


def test_named_subjects_are_48_different_words_in_each_language():
    for column in range(3):
        assert len({row[column] for row in NAMED}) == 48


def test_style_and_held_out_are_chosen_apart():
    subjects = [Subject(icon, (english,), (chinese,), ()) for icon, english, chinese in NAMED]
    subjects += [Subject(f"thing-{number}", ("thing",), ("物",), ()) for number in range(80)]
    trained, held_out = choose(subjects, 5)
    assert (len(trained), len(held_out)) == (48, 24) and not set(trained) & set(held_out)


def test_measures_know_right_from_wrong(rasters):
    size = (64, 64)
    white = np.stack([compose(icon, np.ones(3), size) for icon in rasters[52]])
    print_ = np.stack([styled(icon, size) for icon in rasters[52]]) / 255
    assert shape_score(white, white) == 1.0
    assert shape_score(white, np.roll(white, 1, axis=0)) == 0.0
    assert palette_distance(white, white) == 0.0 and palette_distance(white, print_) > 0.7
    blue = compose(rasters[52][0], np.array(COLOURS["blue"][0]) / 255, size)
    assert ground_name(blue) == "blue"


def test_packages_of_another_version_are_refused(tmp_path):
    package = tmp_path / "@iconify-json/noto"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": "0.0.1"}))
    with pytest.raises(SystemExit, match="the build needs 1.2.9"):
        check_packages(tmp_path)
    with pytest.raises(SystemExit, match="missing"):
        check_packages(tmp_path / "nowhere")
