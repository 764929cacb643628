"""Captioners that run here, on tiny random models: shapes, order and plumbing; what such models say means nothing."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from data_tools.captioners import Request, captioner
from data_tools.captioners.wd_tagger import as_input
from data_tools.errors import BadInput
from tests.data_tools.pictures import save


@pytest.fixture
def tagger(tmp_path):
    """Tags by the mean of red, green and blue: a network in ONNX with the input and output of the WD taggers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.array([[0, 0, 8, 0], [0, 8, 0, 0], [8, 0, 0, 0]], dtype=np.float32) / 255  # B, G, R in; red, green, blue, sketch out
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0), helper.make_node("MatMul", ["mean", "w"], ["scores"]), helper.make_node("Add", ["scores", "b"], ["shifted"]), helper.make_node("Sigmoid", ["shifted"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.array([1, 2]), "axes"), numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([-4, -4, -4, 9], dtype=np.float32), "b")]
    graph = helper.make_graph(nodes, "tags", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 16, 16, 3])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "model.onnx")
    with open(tmp_path / "selected_tags.csv", "w", newline="") as file:
        csv.writer(file).writerows([["tag_id", "name", "category", "count"], [1, "red_thing", 0, 1], [2, "green", 0, 1], [3, "blue", 4, 1], [4, "sketch", 0, 1]])
    return tmp_path


def test_the_tagger_names_what_is_likely_and_leaves_style_to_the_trigger(tagger, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra tagger")
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}.items():
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    requests = [Request(i, tmp_path / f"{name}.png", "", "") for i, name in enumerate(("red", "blue", "black", "gone"))]
    answers = {request.path.stem: answer for request, answer in captioner("wd-tagger", model=str(tagger)).answers(requests)}
    assert answers["red"].text == "red thing" and answers["blue"].text == "blue"
    assert answers["black"].problem == "no tag is likely enough" and "No such file" in answers["gone"].problem
    kept = dict(captioner("wd-tagger", model=str(tagger), style="keep").answers(requests[:1]))
    assert next(iter(kept.values())).text == "sketch, red thing"


def test_a_tagger_folder_that_lacks_files_is_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra tagger")
    with pytest.raises(BadInput, match="lacks model.onnx and selected_tags.csv"):
        captioner("wd-tagger", model=str(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"no")
    (tmp_path / "selected_tags.csv").write_text("a,b\n")
    with pytest.raises(BadInput, match="not a usable ONNX model"):
        captioner("wd-tagger", model=str(tmp_path))


def test_the_taggers_input_is_bgr_on_a_white_square():
    pixels = as_input(Image.new("RGB", (32, 16), (255, 0, 0)), 16)
    assert pixels.shape == (1, 16, 16, 3) and pixels.dtype == np.float32
    assert (pixels[0, 8, 8] == (0, 0, 255)).all() and (pixels[0, 0, 0] == 255).all()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A vision-language chat model of a few thousand weights with its processor, saved as people download them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llava")
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", "<image>", "user", "assistant", "a", "fox", "on", "bench", "."])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<image>"])
    template = "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}assistant "
    processor = LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer, patch_size=14, vision_feature_select_strategy="full", chat_template=template, image_token="<image>", num_additional_image_tokens=1)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=1, eos_token_id=2)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_select_strategy="full", vision_feature_layer=-1)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_vision_language_model_answers_each_picture_once_and_batches_change_nothing(llava, tmp_path, monkeypatch):
    from data_tools.captioners import transformers_models

    monkeypatch.setattr(transformers_models, "MOST_TOKENS", 6)
    requests = [Request(i, save(tmp_path / f"{i}.png", 40, 30, seed=i), "", "describe") for i in range(3)]
    requests.append(Request(3, tmp_path / "gone.png", "", "describe"))
    single, batched = ({r.number: a for r, a in captioner("vision-language", model=str(llava), batch_size=size).answers(requests)} for size in (1, 3))
    assert set(single) == set(batched) == {0, 1, 2, 3} and "No such file" in single[3].problem
    assert all("describe" not in single[i].text and "user" not in single[i].text.split()[:1] for i in range(3))
    assert [single[i].text for i in range(3)] == [batched[i].text for i in range(3)]


@pytest.mark.parametrize("name", ["vision-language", "florence-2", "blip-2"])
def test_a_model_that_is_not_there_is_a_clear_error(name, tmp_path):
    with pytest.raises(BadInput, match="cannot be loaded"):
        captioner(name, model=str(tmp_path))
