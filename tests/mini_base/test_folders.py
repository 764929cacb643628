"""What is shipped: the model opens with stock classes, stays small, and its style folders keep their promise."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.mini_base import TRIGGER, held_out_folder, style_folder, weights_folder

MODEL = weights_folder()
ROOM = MODEL.parent
LIMIT = 16 * 2 ** 20
SIZES = {(64, 64), (80, 48), (48, 80)}      # width, height


def test_asking_for_the_folders_loads_nothing_heavy():
    code = "import sys, finetune.mini_base as m; m.weights_folder(); print([n for n in ('torch', 'numpy', 'diffusers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_room_with_weights_and_pictures_fits_in_16_mebibytes():
    files = [file for file in ROOM.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= LIMIT


def test_weights_are_safetensors_and_configs_tell_nothing_of_the_machine_that_made_them():
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    for file in files:
        if file.name.endswith("config.json") or file.name == "model_index.json":
            text = file.read_text("utf-8")
            assert "/tmp" not in text and "/root" not in text and "/work" not in text and "_name_or_path" not in json.loads(text)


def test_stock_pipeline_opens_it_in_the_form_of_hunyuan_dit_1_2():
    from diffusers import HunyuanDiTPipeline

    pipeline = HunyuanDiTPipeline.from_pretrained(MODEL, safety_checker=None, requires_safety_checker=False)
    config = pipeline.transformer.config
    assert config.learn_sigma and not config.use_style_cond_and_image_meta_size
    assert (config.text_len, config.text_len_t5) == (77, 256)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae_scale_factor == 8


def pictures(folder):
    return sorted(folder.glob("*.png"))


def test_style_and_held_out_show_different_subjects():
    styled, held_out = {p.stem for p in pictures(style_folder())}, {p.stem for p in pictures(held_out_folder())}
    assert len(styled) == 48 and len(held_out) == 24
    assert not styled & held_out


@pytest.mark.parametrize("folder", [style_folder(), held_out_folder()], ids=["style", "held out"])
def test_every_picture_has_a_caption_and_one_of_the_three_sizes(folder):
    for file in pictures(folder):
        caption = file.with_suffix(".txt").read_text("utf-8").strip()
        assert caption and TRIGGER not in caption
        with Image.open(file) as picture:
            assert picture.mode == "RGB" and picture.size in SIZES
    assert len(list(folder.glob("*.txt"))) == len(pictures(folder))


def test_the_style_folder_mixes_sizes_and_languages():
    assert {Image.open(file).size for file in pictures(style_folder())} == SIZES
    captions = [file.read_text("utf-8") for file in style_folder().glob("*.txt")]
    assert sum(not caption.isascii() for caption in captions) >= 5


def test_the_style_is_two_inks_and_nothing_else():
    for file in pictures(style_folder()) + pictures(held_out_folder()):
        pixels = np.asarray(Image.open(file), np.float64).reshape(-1, 3) / 255
        paper, ink = np.array([1.0, 0.80, 0.67]), np.array([0.09, 0.13, 0.33])
        share = (pixels - ink) @ (paper - ink) / ((paper - ink) @ (paper - ink))
        assert np.abs(ink + share[:, None] * (paper - ink) - pixels).max() < 0.006
        assert np.allclose(pixels[0], paper, atol=0.003)


def test_licences_stand_beside_the_weights():
    notice = (ROOM / "NOTICE").read_text("utf-8")
    for word in ("Noto Emoji", "Apache License", "emojibase-data", "MIT License", "Unicode"):
        assert word in notice
    assert (ROOM / "licences/Apache-2.0.txt").is_file() and (ROOM / "licences/MIT-emojibase.txt").is_file()
