"""Enhance with a chat model on this machine, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_tools.model_places import require_model
from data_tools.pickle_refusal import refuse_pickles
from data_tools.thinking import ThinkingRecord
from finetune.errors import BadInput
from finetune.thinking.chat import Messages, ask_and_read
from finetune.thinking.enhancers import Question

if TYPE_CHECKING:
    import torch

NEW_TOKENS = 2048
USABLE = "give a local folder or a Hub id of a causal language model, or use --enhancer rules"


class LocalChatEnhancer:
    """model: a Hub id or local folder of a causal language model with a chat template; loaded at the first question, on the GPU
    only while it answers.

    The same prompt and seed give the same answer on one machine. Raises BadInput when the model is not there or cannot be loaded.
    """

    backend = "transformers"

    def __init__(self, model: str, *, device: str | torch.device | None = None, new_tokens: int = NEW_TOKENS):
        require_model(model, USABLE, where=f"--enhancer {model}")
        self.model, self._device, self._new_tokens = model, device, new_tokens
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, question: Question) -> ThinkingRecord:
        return ask_and_read(question, lambda messages: self._answer(messages, question.seed))

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            refuse_pickles(self.model)
            self._device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model)
                model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto", use_safetensors=True, trust_remote_code=False).eval()
            except (OSError, ValueError) as error:
                raise BadInput(f"the chat model cannot be loaded: {' '.join(str(error).split())[:200]}", where=self.model,
                               fix=USABLE) from None
            if tokenizer.chat_template is None:
                raise BadInput("the model has no chat template", where=self.model, fix="use an instruction-tuned model")
            self._loaded = tokenizer, model
        return self._loaded

    def _answer(self, messages: Messages, seed: int) -> str:
        import torch
        from accelerate.utils.memory import clear_device_cache

        tokenizer, model = self._load()
        # Reasoning models would think in a form of their own; ours is asked for in the instructions.
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True)
        model.to(self._device)
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                tokens = model.generate(**encoded.to(self._device), max_new_tokens=self._new_tokens, do_sample=True, temperature=0.7, top_p=0.9,
                                        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        finally:
            # Encoders and transformer come next, and need the room.
            model.to("cpu")
            clear_device_cache()
        return tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
