"""Chats with pictures for models of the Qwen-VL family, without the video half of their processors, which needs torchvision."""

from __future__ import annotations

from typing import Any

from data_tools.errors import BadInput

IMAGE_TOKEN = "<|image_pad|>"


class PictureChats:
    """Does for still pictures what the model's own processor does: the same pixels, the same tokens.

    image_processor: makes patches and says how many a picture has.  tokenizer: with the model's chat template.
    """

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def load(cls, model: str, revision: str | None = None) -> PictureChats:
        """From a folder or Hub id. Raises BadInput where the model is not of this family."""
        import transformers

        image_processor = transformers.AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision)
        if not hasattr(image_processor, "merge_size") or IMAGE_TOKEN not in tokenizer.get_vocab() or not tokenizer.chat_template:
            raise BadInput(f"{model} needs torchvision to read pictures", fix="install the torchvision that fits your torch")
        return cls(image_processor, tokenizer)

    def apply_chat_template(self, chats: list[list[dict]], *, padding: bool = False, **settings: Any) -> dict[str, Any]:
        """input_ids, attention_mask, mm_token_type_ids (1 where a picture is) of shape (chats, tokens), pixel_values, image_grid_thw.

        settings: as a processor takes them; answers are always token ids in torch tensors.
        """
        pictures = [part["image"] for chat in chats for message in chat for part in message["content"] if part["type"] == "image"]
        seen = self.image_processor(images=pictures, return_tensors="pt")
        patches = iter(seen["image_grid_thw"].prod(-1).tolist())
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=settings.get("add_generation_prompt", False))
        inputs = self.tokenizer([self._with_room(text, patches) for text in texts], padding=padding, add_special_tokens=False, return_tensors="pt")
        return {**inputs, **seen, "mm_token_type_ids": (inputs["input_ids"] == self.image_token_id).long()}

    def _with_room(self, text: str, patches: Any) -> str:
        """The text with one image token for each patch that the model will see, in place of the template's single one."""
        before, *after = text.split(self.image_token)
        return before + "".join(self.image_token * (next(patches) // self.image_processor.merge_size**2) + part for part in after)

    def batch_decode(self, tokens: Any, **settings: Any) -> list[str]:
        """Token ids (chats, tokens) to texts."""
        return self.tokenizer.batch_decode(tokens, **settings)
