"""Captioning models of a few thousand weights with tokenizer and processor, saved as people download them. The weights are
drawn from a seed: what such a model answers means nothing, but it answers the same each time."""

from __future__ import annotations

from pathlib import Path

WORDS = ["a", "fox", "on", "the", "bench", "with", "red", "hat", ".", ","]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(special: list[str], **named: str):
    """Whole words, everything else unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    others = {name: token for name, token in named.items() if name not in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **{k: v for k, v in named.items() if k not in others}, extra_special_tokens=others or None)


def _save(kind: type, config, folder: Path, special: int) -> None:
    """Random models would mostly say special tokens, of which a caption keeps nothing: here words win."""
    import torch

    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[:special].zero_()
    model.save_pretrained(folder)


def save_florence(folder: Path) -> None:
    """Florence-2: four stages of DaViT and a BART."""
    import transformers as t

    tokenizer = _tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>")
    pictures = t.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    pictures.image_seq_length = 5
    vision = t.models.florence2.Florence2VisionConfig(depths=(1, 1, 1, 1), embed_dim=(8, 8, 8, 8), num_heads=(2, 2, 2, 2), num_groups=(2, 2, 2, 2), window_size=2, projection_dim=16, max_position_embeddings=8)
    text = t.BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
                        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    _save(t.Florence2ForConditionalGeneration, t.Florence2Config(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=4), folder, 5)
    t.Florence2Processor(pictures, tokenizer, post_processor_config={"pure_text": {}}).save_pretrained(folder)


def save_blip2(folder: Path) -> None:
    """BLIP-2: a ViT, a Q-Former of two queries and an OPT."""
    import transformers as t

    tokenizer = _tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    vision = t.Blip2VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    queries = t.Blip2QFormerConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, encoder_hidden_size=16)
    text = t.OPTConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=64, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    config = t.Blip2Config(vision_config=vision.to_dict(), qformer_config=queries.to_dict(), text_config=text.to_dict(), num_query_tokens=2, image_token_index=4)
    _save(t.Blip2ForConditionalGeneration, config, folder, 5)
    t.Blip2Processor(t.BlipImageProcessor(size={"height": 28, "width": 28}), tokenizer, num_query_tokens=2).save_pretrained(folder)


def save_qwen(folder: Path, version: str = "2_5") -> None:
    """Qwen2.5-VL or Qwen3-VL; the processor as its parts, since the whole cannot be made without torchvision."""
    import transformers as t
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = CHAT
    ids = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 4, "vision_end_token_id": 5}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 1}
    if version == "2_5":
        patch, vision = 14, {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14, "fullatt_block_indexes": [0], "window_size": 28}
        model, config = t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    else:
        patch, vision = 16, {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        model, config = t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig(text_config=text | {"head_dim": 8, "rope_parameters": rope | {"mrope_interleaved": True}}, vision_config=vision, **ids)
    _save(model, config, folder, len(special))
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, min_pixels=(4 * patch) ** 2, max_pixels=(4 * patch) ** 2).save_pretrained(folder)
