"""`brushwork publish` from a run folder to the page, and the very lines of the card loading what was published."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.attach import attach
from finetune.recipe import dump_recipe, load_recipe
from finetune.sampling import save_picture
from finetune.training.run_folder import RunFolder
from tests.adapters.conftest import TOKEN
from tests.adapters.small_model import run as forward
from tests.adapters.small_model import tiny_transformer, trained_adapter

CALL = {"height": 64, "width": 64, "steps": 1, "guidance": 2.0}


@pytest.fixture
def brushwork(capfd):
    """Call the command in this process: exit code, standard output, standard error."""
    from finetune.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        return stop.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A finished run on a base that the Hub knows as owner/tiny; a folder of that name lies in the working directory."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "run")
    recipe = load_recipe({"base": {"model": "owner/tiny"}, "data": {"folder": "photos", "trigger": "sks style"}, "training": {"steps": 10}, "publish": {"private": True}})
    run.path.mkdir()
    run.recipe.write_text(dump_recipe(recipe))
    adapter = trained_adapter().with_provenance(base_model="owner/tiny", family="hunyuan_dit", trigger="sks style", data_hash="d" * 64, recipe_hash="r" * 64)
    write_adapter(run.adapter_file, adapter)
    for step in (0, 10):
        for number in range(2):
            save_picture(Image.new("RGB", (8, 8), (step, number, 0)), run.samples / f"step-{step:06d}-{number:02d}.png", {"prompt": f"sks style, a cat {number}", **CALL})
    Image.new("RGB", (16, 8)).save(run.sheet)
    run.write_json(run.result, {"verified": {"keys": 64, "placed": 64, "changed": True}, "steps": 10})
    run.write_json(run.data_summary, {"data_hash": "d" * 64, "pictures": 6, "left_out": [{"path": str(tmp_path / "secret name.png"), "reason": "too small"}]})
    return run


@pytest.fixture
def licence_file(tmp_path):
    (tmp_path / "agreement.txt").write_text("The whole agreement.")
    return str(tmp_path / "agreement.txt")


def test_a_dry_run_shows_the_tree_and_the_card_and_asks_nobody(run_folder, hub, brushwork):
    code, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and hub.log == []
    assert [file["name"] for file in told["files"]] == ["README.md", "pytorch_lora_weights.safetensors", "images/0.png", "images/1.png", "images/before_after.png", "training_config.json", "Notice.txt"]
    assert told["fetched_on_upload"] == ["LICENSE.txt (from owner/tiny)"] and told["private"] is True
    assert "European Union" in told["card"]
    code, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--dry-run")
    assert code == 0 and "images/before_after.png" in out and "instance_prompt: sks style" in out


def test_the_page_has_everything_and_nothing_private(run_folder, hub, brushwork, licence_file):
    code, out, err = brushwork("publish", str(run_folder.path), "me/style", "--licence-file", licence_file, "--json")
    assert code == 0 and TOKEN not in out + err
    assert hub.private is True and len(hub.commits) == 1
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors", "images/0.png", "images/1.png", "images/before_after.png", "training_config.json", "Notice.txt", "LICENSE.txt"}
    assert hub.files["LICENSE.txt"] == b"The whole agreement." and "Tencent Hunyuan is licensed" in hub.files["Notice.txt"].decode()
    everything = b"".join(content for name, content in hub.files.items() if name != "LICENSE.txt")
    for secret in (b"photos", b"secret name", TOKEN.encode(), str(run_folder.path).encode()):
        assert secret not in everything
    card = hub.files["README.md"].decode()
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))
    assert data["base_model"] == "owner/tiny" and data["license"] == "other" and len(data["widget"]) == 2
    assert "too small" in card and "d" * 64 in card
    config = json.loads(hub.files["training_config.json"])
    assert config["training"]["steps"] == 10 and "folder" not in config["data"]
    from PIL import Image

    (run_folder.path / "published.png").write_bytes(hub.files["images/0.png"])
    assert not Image.open(run_folder.path / "published.png").info


@pytest.fixture
def unknown_base(tmp_path):
    """An adapter file of a base whose licence no table has."""
    return str(write_adapter(tmp_path / "style.safetensors", trained_adapter().with_provenance(base_model="owner/new", family="unheard_of")))


def test_a_licence_of_ones_own_goes_along_and_is_what_the_card_links(unknown_base, hub, brushwork, licence_file):
    code, _, err = brushwork("publish", unknown_base, "me/style", "--licence", "other", "--licence-name", "studio-1.0", "--licence-file", licence_file)
    assert code == 0, err
    card = hub.files["README.md"].decode()
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "studio-1.0", "LICENSE.txt")
    assert hub.files["LICENSE.txt"] == b"The whole agreement." and "Notice.txt" not in hub.files and "[LICENSE.txt](LICENSE.txt)" in card


@pytest.mark.parametrize(("given", "said"), [
    (("--licence", "other"), "has no name"),
    (("--licence", "other", "--licence-name", "studio-1.0"), "text of studio-1.0 is not given"),
    (("--licence", "mit", "--licence-name", "studio-1.0"), "has its name already"),
    (("--licence", "mit", "--licence-file"), "no text goes along with mit"),
])
def test_a_licence_that_lacks_something_or_has_too_much_is_refused(unknown_base, hub, brushwork, licence_file, given, said):
    code, _, err = brushwork("publish", unknown_base, "me/style", *given, *([licence_file] if given[-1] == "--licence-file" else []))
    assert code == 2 and said in err and hub.log == []


def test_the_card_says_how_many_steps_the_weights_have_seen(run_folder, hub, brushwork):
    run_folder.write_json(run_folder.result, {**json.loads(run_folder.result.read_text()), "exported_step": 6})
    _, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--dry-run", "--json")
    assert "6 of 10" in json.loads(out)["card"]


def test_the_card_names_the_optimizer_that_the_run_chose(run_folder, hub, brushwork):
    def card():
        return json.loads(brushwork("publish", str(run_folder.path), "me/style", "--dry-run", "--json")[1])["card"]

    assert re.search(r"optimizer \| auto", card())
    run_folder.write_json(run_folder.plan, {"estimate": {"settings": {"optimizer": "adamw8bit"}}})
    assert re.search(r"optimizer \| adamw8bit", card())


def test_the_evaluation_of_a_run_stands_in_its_card(run_folder, hub, brushwork):
    run_folder.write_json(run_folder.path / "evaluation.json", {
        "adapters": [{"name": "style"}], "interval": "95%, percentile bootstrap", "caution": "", "left_out": {"aesthetics": "needs a download"},
        "rows": [{"adapter": "base", "measure": "palette", "value": 1.0}, {"adapter": "style", "measure": "palette", "value": 0.25, "delta": -0.75, "low": -0.8, "high": -0.7, "verdict": "better"}],
    })
    _, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--dry-run", "--json")
    card = json.loads(out)["card"]
    assert "-0.8 to -0.7" in card and "aesthetics was not measured" in card and "95%" in card


@pytest.mark.parametrize(("change", "arguments", "said"), [
    pytest.param(None, ["--licence", "mit"], "must be passed on", id="a licence that the base does not allow"),
    pytest.param(lambda run: run.result.unlink(), [], "not proven", id="a run that was not proven"),
    pytest.param(lambda run: run.adapter_file.unlink(), [], "no adapter yet", id="a run without an adapter"),
    pytest.param(lambda run: write_adapter(run.adapter_file, trained_adapter(size=0.0).with_provenance(base_model="owner/tiny", family="hunyuan_dit")), [], "no effect", id="an adapter without effect"),
    pytest.param(lambda run: write_adapter(run.adapter_file, trained_adapter().with_provenance(base_model=str(run.path), family="hunyuan_dit")), [], "local folder", id="a base that is a local folder"),
    pytest.param(lambda run: write_adapter(run.adapter_file, trained_adapter().with_provenance(base_model="owner/tiny", family="hunyuan_dit", trigger="hf_" + "k" * 24)), [], "access token", id="a token in the trigger"),
])
def test_what_must_not_go_out_does_not(run_folder, hub, brushwork, licence_file, change, arguments, said):
    if change:
        change(run_folder)
    code, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--licence-file", licence_file, "--json", *arguments)
    assert code == 2 and said in json.loads(out)["error"]["what"]
    assert not hub.requests("PUT|commit|create")


def test_a_base_in_a_local_folder_is_published_under_its_name_on_the_hub(run_folder, hub, brushwork, licence_file):
    write_adapter(run_folder.adapter_file, trained_adapter().with_provenance(base_model=str(run_folder.path), family="hunyuan_dit"))
    code, _, _ = brushwork("publish", str(run_folder.path), "me/style", "--base-model", "owner/tiny", "--licence-file", licence_file, "--json")
    assert code == 0 and str(run_folder.path).encode() not in b"".join(hub.files.values())


def test_the_very_lines_of_the_card_draw_with_the_published_adapter(run_folder, hub, brushwork, licence_file, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    from tests.tiny_models.hunyuan_dit import build

    build().save_pretrained(Path("owner/tiny"))
    code, _, _ = brushwork("publish", str(run_folder.path), "me/style", "--base-model", "owner/tiny", "--licence-file", licence_file, "--json")
    assert code == 0
    shutil.rmtree(run_folder.path)
    lines = re.search(r"```python\n(.*?)```", hub.files["README.md"].decode(), re.DOTALL).group(1)
    assert "brushwork" not in lines and "finetune" not in lines
    names: dict = {}
    exec(compile(lines, "card", "exec"), names)
    assert Path("picture.png").stat().st_size > 0
    assert isinstance(names["pipeline"], DiffusionPipeline)
    ours = tiny_transformer()
    attach(ours, trained_adapter(), "style")
    torch.testing.assert_close(forward(names["pipeline"].transformer), forward(ours), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(forward(names["pipeline"].transformer), forward(tiny_transformer()))


def test_a_file_alone_can_be_published(run_folder, hub, brushwork, licence_file, tmp_path):
    code, out, _ = brushwork("publish", str(run_folder.adapter_file), "me/style", "--licence-file", licence_file, "--public", "--json")
    assert code == 0 and json.loads(out)["private"] is False
    card = hub.files["README.md"].decode()
    assert "proven to load" not in card and "nothing is known here of how it was trained" in card
    (tmp_path / "again.safetensors").write_bytes(hub.files["pytorch_lora_weights.safetensors"])
    published = read_adapter(tmp_path / "again.safetensors")
    assert all(published.tensors[key].equal(value) for key, value in trained_adapter().tensors.items())


def test_the_page_can_be_written_into_a_folder_instead(run_folder, hub, brushwork, licence_file, tmp_path):
    code, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--folder", str(tmp_path / "page"), "--licence-file", licence_file, "--json")
    assert code == 0 and hub.log == []
    found = {str(path.relative_to(tmp_path / "page")) for path in (tmp_path / "page").rglob("*") if path.is_file()}
    assert found == {file["name"] for file in json.loads(out)["files"]}
    code, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--folder", str(tmp_path / "page"), "--licence-file", licence_file, "--json")
    assert code == 2 and "not empty" in json.loads(out)["error"]["what"]


def test_the_repository_of_the_recipe_is_taken_when_none_is_named(run_folder, hub, brushwork):
    code, out, _ = brushwork("publish", str(run_folder.path), "--dry-run", "--json")
    assert code == 2 and "not named" in json.loads(out)["error"]["what"]
    run_folder.recipe.write_text(run_folder.recipe.read_text().replace("[publish]", '[publish]\nrepo = "me/from-recipe"'))
    code, out, _ = brushwork("publish", str(run_folder.path), "--dry-run", "--json")
    assert code == 0 and json.loads(out)["repo"] == "me/from-recipe"


def test_thinking_tokens_go_along_with_the_adapter_that_needs_them(run_folder, hub, brushwork, licence_file):
    from finetune.families.hunyuan_dit import FACTS
    from finetune.thinking.tokens import FILE_NAME, ThinkingTokens, write_tokens

    told = write_tokens(run_folder.adapter, ThinkingTokens(torch.randn(4, 24), FACTS.text_stream))
    write_adapter(run_folder.adapter_file, read_adapter(run_folder.adapter_file).with_provenance(thinking_tokens=told))
    code, _, _ = brushwork("publish", str(run_folder.path), "me/style", "--licence-file", licence_file, "--json")
    assert code == 0 and hub.files[FILE_NAME] == (run_folder.adapter / FILE_NAME).read_bytes()
    assert "thinking tokens" in hub.files["README.md"].decode()
    (run_folder.adapter / FILE_NAME).unlink()
    code, out, _ = brushwork("publish", str(run_folder.path), "me/style", "--licence-file", licence_file, "--json")
    assert code == 2 and "thinking tokens" in json.loads(out)["error"]["what"]
