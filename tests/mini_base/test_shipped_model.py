"""The numbers that the shipped weights must give: exact shortcuts, words of two languages, and pictures of the right thing."""

import numpy as np
import pytest
import torch

from finetune.mini_base import held_out_folder, weights_folder
from finetune.mini_base.build.drawing import draw, open_pipeline
from finetune.mini_base.build.measures import shape_score
from finetune.mini_base.build.packed_text import PackedTransformer, rotary_table
from finetune.mini_base.build.style_check import read_folder
from finetune.mini_base.build.subjects import COLOURS, NAMED
from finetune.mini_base.build.text_encoders import CaptionEncoder


@pytest.fixture(scope="module")
def pipeline():
    torch.set_num_threads(1)
    return open_pipeline(weights_folder())


def test_padding_rows_are_equal_so_that_text_may_be_packed(pipeline):
    padding = pipeline.transformer.text_embedding_padding
    assert torch.equal(padding, padding[:1].expand_as(padding))
    assert not pipeline.transformer.time_extra_emb.pooler.positional_embedding[1:].any()


def test_packed_text_gives_what_the_stock_forward_gives(pipeline):
    prompts, size = ["dog on a red background", "猫", ""], (48, 80)
    first, _, first_mask, _ = pipeline.encode_prompt(prompts, text_encoder_index=0, do_classifier_free_guidance=False)
    second, _, second_mask, _ = pipeline.encode_prompt(prompts, text_encoder_index=1, do_classifier_free_guidance=False)
    latents = torch.randn(3, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    timesteps, rotary = torch.tensor([10.0, 500.0, 990.0]), rotary_table(pipeline.transformer, size)
    with torch.no_grad():
        stock = pipeline.transformer(
            latents, timesteps, encoder_hidden_states=first, text_embedding_mask=first_mask, encoder_hidden_states_t5=second,
            text_embedding_mask_t5=second_mask, image_rotary_emb=rotary, return_dict=False)[0]
        packed = PackedTransformer(pipeline.transformer)(latents, timesteps, CaptionEncoder(weights_folder())(prompts), rotary)
    pipeline.transformer.set_default_attn_processor()
    assert (stock - packed).abs().max() < 1e-5 * max(1.0, float(stock.abs().max()))


def test_the_encoder_is_one_linear_map_of_patches(pipeline):
    def encode(pictures):
        with torch.no_grad():
            return pipeline.vae.encode(pictures).latent_dist

    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 1, 3, 64, 64, generator=generator) * 2 - 1
    middle = encode(first * 0.3 + second * 0.7).mode()
    assert (middle - (encode(first).mode() * 0.3 + encode(second).mode() * 0.7)).abs().max() < 2e-3
    assert encode(first).std.max() < 1e-3
    changed = first.clone()
    changed[..., 16:24, 24:32] = 0
    elsewhere = (encode(changed).mode() - encode(first).mode()).abs().amax((0, 1))
    elsewhere[2, 3] = 0
    assert elsewhere.max() < 2e-3


def test_the_decoder_shows_the_held_out_style_pictures_faithfully(pipeline):
    """Another palette than the model's own pictures: styles learnt later must not be spoilt by the decoder."""
    truth = np.stack([picture for picture, _ in read_folder(held_out_folder())])
    pictures = torch.from_numpy(truth).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        shown = pipeline.vae.decode(pipeline.vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    decibel = -10 * ((shown - pictures) / 2).pow(2).mean((1, 2, 3)).log10()
    assert decibel.mean() >= 26


def test_all_names_and_colours_are_whole_words_in_both_tokenizers(pipeline):
    names = [name for _, english, chinese in NAMED for name in (english, chinese)]
    for text in names + list(COLOURS) + [chinese for _, chinese in COLOURS.values()]:
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
            assert tokenizer.unk_token not in tokens, text
            if text.isascii():
                assert len([t for t in tokens if t not in ("[CLS]", "[SEP]", "</s>")]) == len(text.split()), text


def test_an_unknown_word_is_spelt_in_letters(pipeline):
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("a zqxwv dog").input_ids)
        assert tokenizer.unk_token not in tokens and len(tokens) >= 7
        assert len(tokenizer("dog " * 400, truncation=True).input_ids) == tokenizer.model_max_length


def test_a_word_means_nearly_the_same_in_english_and_chinese(pipeline):
    table = torch.nn.functional.normalize(pipeline.text_encoder.get_input_embeddings().weight[:, :64].float(), dim=1)
    vocabulary = pipeline.tokenizer.get_vocab()
    for english, chinese in (("dog", "狗"), ("fish", "鱼"), ("red", "红")):
        likeness = table @ table[vocabulary[english]]
        assert int((likeness > likeness[vocabulary[chinese]]).sum()) < 30, (english, chinese)


@pytest.mark.parametrize(("language", "size"), [("en", (64, 64)), ("zh", (64, 64)), ("en", (48, 80)), ("zh", (80, 48))])
def test_prompts_draw_their_own_subject(pipeline, language, size):
    """A quick sample of the full measure (README): 12 subjects, 10 steps, judged against what the style folders show."""
    chinese = {english: word for _, english, word in NAMED}
    named = [(picture, caption) for picture, caption in read_folder(held_out_folder()) if caption in chinese]
    truths = np.stack([picture for picture, _ in named])
    prompts = [caption if language == "en" else chinese[caption] for _, caption in named]
    pictures = draw(pipeline, prompts, size, first_seed=1000, steps=10)
    assert len(named) == 12
    assert shape_score(centre_square(pictures), centre_square(truths)) >= 0.9


def centre_square(pictures):
    """The middle 48x48: the icon is 52 pixels wide on the square and 46 on the long sizes."""
    top, left = (pictures.shape[1] - 48) // 2, (pictures.shape[2] - 48) // 2
    return pictures[:, top:top + 48, left:left + 48]
