"""Enhancers: rules, endpoint and local model give checked records; wrong answers leave the original prompt in use."""

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from data_tools.thinking import read_record
from finetune.errors import BadInput, BrushworkError
from finetune.thinking.endpoint import EndpointEnhancer
from finetune.thinking.enhancers import think, wants_thinking
from finetune.thinking.local_model import LocalChatEnhancer
from finetune.thinking.picture import store_beside

PROMPT = 'three red cats on a box, "HI"'
GOOD = {"elements": [{"id": "e1", "name": "cat", "count": 3, "attributes": ["red"]}, {"id": "e2", "name": "box", "count": 1, "attributes": []}],
        "relations": [{"a": "e1", "relation": "on", "b": "e2"}], "composition": "centred", "environment": "", "lighting": "soft", "palette": ["red"],
        "style": [], "text": ["HI"], "details": [], "enhanced": 'Three red cats sit on a cardboard box with the text "HI".'}


def words(text):
    return {"choices": [{"message": {"content": text}}]}


def thought(**changes):
    return words(f"<think>three cats, one box</think><answer>{json.dumps(GOOD | changes)}</answer>")


@pytest.fixture
def server():
    """A real endpoint on this machine that answers from a script: (status, headers, body) or bytes to be cut off."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append((self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, headers, body = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.asked, http.script, http.waits = [], [], []
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()


def enhancer(server):
    return EndpointEnhancer(f"http://127.0.0.1:{server.server_port}/v1", "tiny", timeout=60, wait=server.waits.append)


def test_rules_are_the_default_and_keep_within_the_token_limits():
    record = think(f"<think> {PROMPT}", token_counts=lambda text: {"BERT": (len(text.split()), 12)})
    assert record.ok and record.prompt == PROMPT and record.backend == "rules"
    assert len(record.enhanced.split()) <= 12
    too_long = think(PROMPT, token_counts=lambda text: {"BERT": (len(text.split()), 3)})
    assert (too_long.ok, too_long.enhanced) == (False, PROMPT)


@pytest.mark.parametrize("prompt", ["", "  ", "<think>", "a" * 10_001])
def test_prompts_that_cannot_be_thought_about_are_bad_input(prompt):
    with pytest.raises(BadInput):
        think(prompt)


@pytest.mark.parametrize("prompt, wanted", [
    ("a cat", False), ("<think> a cat", True), ("a cat, a dog, a bird, a fish and a cow", False), ("a cat, a dog, a bird, a fish, a cow and a box", True),
    ("猫、狗、鸟、鱼、牛和马", True), ("six cats", False)])
def test_thinking_starts_by_itself_above_five_elements(prompt, wanted):
    assert wants_thinking(prompt) is wanted


def test_an_endpoints_structured_answer_becomes_the_record(server):
    server.script = [(200, {}, thought())]
    record = think(PROMPT, enhancer=enhancer(server), seed=3)
    assert record.ok and record.enhanced == GOOD["enhanced"] and record.trace == "three cats, one box"
    assert (record.backend, record.model, record.seed, record.lighting) == ("endpoint", "tiny", 3, "soft")
    path, _, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "tiny" and body["messages"][-1] == {"role": "user", "content": PROMPT}


def test_plain_words_are_an_answer_too(server):
    server.script = [(200, {}, words('<think>x</think><recaption>three red cats\non a wooden box, "HI"</recaption>'))]
    record = think(PROMPT, enhancer=enhancer(server))
    assert record.ok and record.enhanced == 'three red cats on a wooden box, "HI"'
    assert [element.name for element in record.elements] == ["cat", "box"]


def test_the_trigger_and_the_language_are_told_to_the_model(server):
    server.script = [(200, {}, words("<answer>zorp 风格，两只红色的猫</answer>"))]
    record = think("zorp 风格，两只红色的猫在跑", enhancer=enhancer(server), trigger="zorp")
    assert record.ok and record.language == "zh"
    assert "zorp" in server.asked[0][2]["messages"][0]["content"] and "你" in server.asked[0][2]["messages"][0]["content"]


UNUSABLE = {
    "lost text": (thought(enhanced="three red cats on a box"), "lost"),
    "lost number": (thought(enhanced='red cats on a box, "HI"'), "number 3"),
    "no enhanced prompt": (thought(enhanced=None), "enhanced"),
    "broken relation": (thought(relations=[{"a": "e1", "relation": "on", "b": "e7"}]), "e7"),
    "tag inside": (thought(enhanced=GOOD["enhanced"] + "<think>"), "does not belong"),
    "too long": (thought(enhanced=GOOD["enhanced"] + " very" * 100), "longer"),
    "broken JSON": (words('<answer>{"enhanced": "three</answer>'), "broken JSON"),
    "unclosed": (words("<think>three red cats"), "never closed"),
    "refusal": (words("I am sorry, I cannot help."), "lost"),
    "null": ({"choices": [{"message": {"content": None}}]}, "no prompt"),
    "no choices": ({"choices": []}, "no prompt"),
    "error object": ({"error": {"message": "overloaded"}}, "no prompt"),
    "not JSON": (b"<html>", "no prompt"),
    "not UTF-8": (b'{"choices": [{"message": {"content": "\xff\xfe"}}]}', ""),
}


@pytest.mark.parametrize("answer, reason", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_answers_are_asked_for_once_more_then_the_prompt_stands(server, answer, reason, tmp_path):
    server.script = [(200, {}, answer)]
    record = think(PROMPT, enhancer=enhancer(server), token_counts=lambda text: {"T5": (len(text.split()), 40)})
    assert (record.ok, record.enhanced) == (False, PROMPT)
    assert reason in record.reason
    assert len(server.asked) == 2
    if answer != UNUSABLE["not UTF-8"][0]:
        assert record.reason in server.asked[1][2]["messages"][-1]["content"]
    # A reason that names a tag, as that of an answer which was cut off, kept the record from being written.
    assert read_record(store_beside(tmp_path / "picture.png", record)) == record


def test_a_second_answer_that_is_in_order_is_taken(server):
    server.script = [(200, {}, words("<think>")), (200, {}, thought())]
    assert think(PROMPT, enhancer=enhancer(server)).enhanced == GOOD["enhanced"]


def test_busy_servers_are_asked_again_as_late_as_they_say(server):
    server.script = [(429, {"Retry-After": "7"}, {}), (503, {}, {}), (200, {}, thought())]
    assert think(PROMPT, enhancer=enhancer(server)).ok
    assert server.waits == [7.0, 2.0]


def test_half_an_answer_is_asked_for_again(server):
    server.script = [(200, {"Content-Length": "100000"}, b"{"), (200, {}, thought())]
    assert think(PROMPT, enhancer=enhancer(server)).ok
    assert len(server.asked) == 2


def test_a_refusing_server_is_one_clear_error_without_the_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.script = [(401, {}, {"error": {"message": "bad key"}})]
    with pytest.raises(BrushworkError, match="answered 401: bad key") as caught:
        think(PROMPT, enhancer=enhancer(server))
    assert "sk-secret" not in str(caught.value)
    assert len(server.asked) == 1 and server.asked[0][1]["Authorization"] == "Bearer sk-secret"


def test_no_server_and_no_address():
    waits = []
    # Bound and not listening: nobody else can answer there in the meantime.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(BrushworkError, match="gave no answer"):
            think(PROMPT, enhancer=EndpointEnhancer(f"http://127.0.0.1:{held.getsockname()[1]}/v1", "tiny", timeout=60, wait=waits.append))
    assert waits == [1.0, 2.0, 4.0, 8.0]
    for url in ("file:///etc/passwd", "localhost:8000", "http://"):
        with pytest.raises(BadInput):
            EndpointEnhancer(url, "tiny")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A random two-layer chat model that any computer can run; what it says is noise."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         max_position_embeddings=16384, eos_token_id=fast.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_that_talks_noise_leaves_the_prompt_in_use(chat_folder):
    local = LocalChatEnhancer(str(chat_folder), new_tokens=12)
    record = think(PROMPT, enhancer=local, seed=1)
    assert (record.ok, record.enhanced, record.backend) == (False, PROMPT, "transformers")
    assert record.raw and record.reason
    assert think(PROMPT, enhancer=local, seed=1).raw == record.raw
    assert think(PROMPT, enhancer=local, seed=2).raw != record.raw


def test_a_local_model_is_on_the_device_only_while_it_answers(chat_folder, monkeypatch):
    """What draws comes after it, and needs the room."""
    device, moves = torch.device("cpu", 0), []  # a CPU by another name stands for the GPU
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *to, **options: moves.append(str(to[0])) or move(module, *to, **options))
    think(PROMPT, enhancer=LocalChatEnhancer(str(chat_folder), device=device, new_tokens=4), seed=1)
    assert moves[0] == "cpu:0" and moves[-1] == "cpu" and moves.count("cpu:0") == moves.count("cpu")


def test_a_chat_model_that_is_a_pickle_is_never_opened(chat_folder, tmp_path):
    for file in chat_folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"would be opened")
    with pytest.raises(BadInput, match="a pickle can run code when it is opened and is never read"):
        think(PROMPT, enhancer=LocalChatEnhancer(str(tmp_path)))


def test_a_folder_without_a_chat_model_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="cannot be loaded"):
        think(PROMPT, enhancer=LocalChatEnhancer(str(tmp_path)))
