"""Captioners that run here, on tiny random models: plumbing and order; what such models say means nothing, except the tagger's tags."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from data_tools.captioners import Request, captioner
from data_tools.captioners.embeddings import pairs_by_embedding
from data_tools.captioners.wd_tagger import as_input
from data_tools.errors import BadInput
from tests.data_tools import tiny_captioners
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


@pytest.mark.parametrize("use", [lambda folder: captioner("blip-2", model=folder), lambda folder: pairs_by_embedding([], folder, 0.9)], ids=["captions", "embeddings"])
def test_a_model_that_is_a_pickle_is_never_opened(tmp_path, use):
    (tmp_path / "pytorch_model.bin").write_bytes(b"would be opened")
    with pytest.raises(BadInput, match="a pickle can run code when it is opened and is never read"):
        use(str(tmp_path))


def test_the_taggers_input_is_bgr_on_a_white_square():
    pixels = as_input(Image.new("RGB", (32, 16), (255, 0, 0)), 16)
    assert pixels.shape == (1, 16, 16, 3) and pixels.dtype == np.float32
    assert (pixels[0, 8, 8] == (0, 0, 255)).all() and (pixels[0, 0, 0] == 255).all()


PROMPT = "a fox with a red hat on the bench"
LOCAL = {
    "florence-2": ("florence-2", tiny_captioners.save_florence, {}), "blip-2": ("blip-2", tiny_captioners.save_blip2, {}),
    "qwen2.5-vl": ("vision-language", tiny_captioners.save_qwen, {"version": "2_5"}), "qwen3-vl": ("vision-language", tiny_captioners.save_qwen, {"version": "3"}),
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_model_answers_each_picture_once_and_batches_change_nothing(name, tmp_path, monkeypatch):
    from data_tools.captioners import transformers_models

    monkeypatch.setattr(transformers_models, "MOST_TOKENS", 6)
    way, make, options = LOCAL[name]
    make(tmp_path / "model", **options)
    requests = [Request(i, save(tmp_path / f"{i}.png", 40 + 30 * i, 50, seed=i), "Be exact.", PROMPT) for i in range(3)]
    requests.append(Request(3, tmp_path / "gone.png", "", "a fox"))
    single, batched = ({r.number: a for r, a in captioner(way, model=str(tmp_path / "model"), batch_size=size).answers(requests)} for size in (1, 3))
    assert set(single) == set(batched) == {0, 1, 2, 3} and "No such file" in single[3].problem
    assert all(single[i].text and 0 < single[i].tokens_out <= 6 and not single[i].problem for i in range(3))
    assert [single[i].text for i in range(3)] == [batched[i].text for i in range(3)]
    # Each token of these models is a word, and the prompt alone has more of them than an answer may have.
    assert len(PROMPT.split()) > 6 and all(len(single[i].text.split()) <= single[i].tokens_out for i in range(3)), "the prompt is not part of an answer"


@pytest.mark.parametrize("name", ["vision-language", "florence-2", "blip-2"])
def test_a_model_that_is_not_there_is_a_clear_error(name, tmp_path):
    with pytest.raises(BadInput, match="cannot be loaded"):
        captioner(name, model=str(tmp_path))
