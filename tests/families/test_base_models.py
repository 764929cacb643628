"""Finding a base: what is needed is fetched, what is missing or of another kind is named before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from finetune.errors import BaseModelError
from finetune.families import base_models, registry
from finetune.families.base_models import locate_base
from finetune.families.loading import load_pipeline
from tests.tiny_models import hunyuan_dit, hunyuan_image_2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    hunyuan_dit.build().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def test_a_local_folder_is_found_with_its_family_and_licence(base):
    found = locate_base(str(base))
    assert found.family.facts.name == "hunyuan_dit" and found.folder == base and found.revision is None
    assert "Tencent Hunyuan is licensed" in found.licence.notice and found.licence.territory == "European Union"


def test_the_embedded_base_has_its_own_licence():
    found = locate_base("mini", parts=())
    assert found.family.facts.name == "hunyuan_dit" and found.licence.identifier == "apache-2.0"


@pytest.mark.parametrize("name", ["nothing-like-this", "./no/such/folder", "a b/c", "x" * 5000, "~nobody-of-this-name/base"])
def test_an_unknown_base_is_named(name):
    with pytest.raises(BaseModelError, match="there is no base called") as caught:
        locate_base(name)
    assert "mini" in caught.value.fix and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["someone/model@v2", "someone/model..", "someone/" + "m" * 300, "someone/\udcff"])
def test_what_can_be_no_hub_id_is_refused_in_words(name):
    with pytest.raises(BaseModelError, match="no base on the Hub can be called so") as caught:
        locate_base(name)
    assert "owner/name alone" in caught.value.fix and caught.value.exit_code == 2


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="no model_index.json"):
        locate_base(str(tmp_path))


def test_a_base_of_another_kind_is_refused_with_what_would_do(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(BaseModelError, match="StableDiffusionXLPipeline") as caught:
        locate_base(str(tmp_path))
    assert "HunyuanDiTPipeline" in caught.value.fix


def test_a_broken_index_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{not json")
    with pytest.raises(BaseModelError, match="cannot be read"):
        locate_base(str(tmp_path))


def test_an_incomplete_folder_is_refused_for_the_parts_that_need_it(copy):
    shutil.rmtree(copy / "text_encoder_2")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="text_encoder_2, vae missing"):
        locate_base(str(copy))
    assert locate_base(str(copy), parts={"transformer"}).folder == copy


def test_missing_damaged_and_misshapen_weights_are_named(copy):
    from safetensors.torch import load_file, save_file

    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    lost = dict(tensors)
    del lost["blocks.0.attn1.to_q.weight"]
    save_file(lost, weights)
    with pytest.raises(BaseModelError, match=r"lack 1 tensors, first blocks\.0\.attn1\.to_q\.weight"):
        load_pipeline(copy, frozenset({"transformer"}), torch.float32)
    save_file({**tensors, "proj_out.bias": torch.zeros(3)}, weights)
    with pytest.raises(BaseModelError, match=r"proj_out\.bias has shape \[3\]"):
        load_pipeline(copy, frozenset({"transformer"}), torch.float32)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="damaged"):
        load_pipeline(copy, frozenset({"transformer"}), torch.float32)


def test_sharded_weights_load_and_a_missing_shard_is_named(base, copy):
    whole = load_pipeline(base, frozenset({"transformer"}), torch.float32).transformer
    shutil.rmtree(copy / "transformer")
    whole.save_pretrained(copy / "transformer", max_shard_size="100KB")
    shards = sorted((copy / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    found = load_pipeline(copy, frozenset({"transformer"}), torch.float32).transformer
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in found.state_dict().items())
    shards[0].unlink()
    with pytest.raises(BaseModelError, match=shards[0].name):
        load_pipeline(copy, frozenset({"transformer"}), torch.float32)


def test_code_that_comes_with_a_model_is_not_run(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"] = ["my_model", "MyTransformer"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="my_model.MyTransformer"):
        load_pipeline(copy, frozenset({"transformer"}), torch.float32)


def test_only_needed_files_are_downloaded():
    index = {"_class_name": "HunyuanDiTPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "transformer": ["diffusers", "HunyuanDiT2DModel"],
             "text_encoder": ["transformers", "BertModel"], "tokenizer": ["transformers", "BertTokenizer"], "vae": ["diffusers", "AutoencoderKL"],
             "safety_checker": [None, None]}
    listing = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
               "transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
               "transformer/diffusion_pytorch_model.bin", "text_encoder/config.json", "text_encoder/model.safetensors.index.json",
               "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors", "text_encoder/pytorch_model.bin",
               "tokenizer/vocab.txt", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "flax_model.msgpack"]
    configurations = ["model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "transformer/config.json", "vae/config.json"]
    assert base_models.needed_files(index, frozenset(), listing) == configurations
    assert set(base_models.needed_files(index, frozenset({"transformer"}), listing)) - set(configurations) == {"transformer/diffusion_pytorch_model.safetensors"}
    assert set(base_models.needed_files(index, frozenset({"text"}), listing)) - set(configurations) == {
        "tokenizer/vocab.txt", "text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors"}


def test_variants_of_one_pipeline_are_told_apart_and_the_distilled_one_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    for pipeline, config, name in (("FluxPipeline", {"guidance_embeds": True}, "flux_dev"), ("FluxPipeline", {"guidance_embeds": False}, "flux_schnell"),
                                   ("HunyuanImagePipeline", {"use_meanflow": False}, "hunyuan_image_2")):
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        assert registry.family_name(pipeline, tmp_path) == name
    hunyuan_image_2.build(distilled=True).save_pretrained(tmp_path / "distilled")
    with pytest.raises(BaseModelError, match="wrong target") as caught:
        locate_base(str(tmp_path / "distilled"))
    assert "base model" in caught.value.fix


def test_a_mistyped_family_gets_the_nearest_name():
    with pytest.raises(BaseModelError) as caught:
        registry.family("hunyuan_dti")
    assert "hunyuan_dit" in caught.value.fix


def test_hunyuan_image_3_is_refused_with_numbers_before_any_download(tmp_path):
    with pytest.raises(BaseModelError, match=r"150\.8 GiB in bfloat16.*43\.9 GiB in NF4.*this machine has \d+ GiB"):
        locate_base("tencent/HunyuanImage-3.0")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hunyuan_image_3_moe", "architectures": ["HunyuanImage3ForCausalMM"]}))
    with pytest.raises(BaseModelError, match="HunyuanImage-3.0 is not trained here"):
        locate_base(str(tmp_path))
