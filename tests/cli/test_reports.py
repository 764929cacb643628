"""report.html is whole, escaped and closed; doctor and quickstart say what is true."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from PIL import Image

from finetune import doctor, mini_base
from finetune.quickstart import held_out, quickstart_recipe
from finetune.training.report import write_report
from finetune.training.run_folder import RunFolder

HOSTILE = '<script>alert("x")</script>.png'


def finished_run(folder) -> RunFolder:
    run = RunFolder(folder)
    run.samples.mkdir(parents=True)
    run.recipe.write_text('[base]\nmodel = "<b>mini</b>"\n')
    run.write_json(run.data_summary, {"pictures": 5, "left_out": [{"path": HOSTILE, "reason": "cut off & broken"}]})
    for step in range(1, 40):
        run.append_log({"step": step, "loss": 1 / step if step != 7 else float("nan"), "lr": 1e-3, "grad_norm": 0.5, "seconds": 0.1})
    run.write_json(run.result, {"steps": 39, "resumed_from": 20, "seconds": 4.2, "peak_memory_bytes": 2**28, "reasons": {"optimizer": "adamw: <no GPU>"},
                                "verified": {"keys": 8, "placed": 8, "changed": True, "change": 0.31, "restored": True, "baked_equals_attached": True}})
    for step in (0, 20, 39):
        Image.new("RGB", (64, 64), (step, 0, 0)).save(run.samples / f"step-{step:06d}-00.png")
    Image.new("RGB", (3000, 400), "navy").save(run.sheet)
    return run


def test_the_report_says_everything_and_runs_and_loads_nothing(tmp_path):
    run = finished_run(tmp_path / "run")
    page = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in page and HOSTILE not in page and "&lt;script&gt;" in page and "cut off &amp; broken" in page
    assert "&lt;b&gt;mini" in page and "adamw: &lt;no GPU&gt;" in page
    assert "8 of 8" in page and "resumed after step 20" in page and "step 20" in page and page.count("<polyline") == 6
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http://" not in page and "https://" not in page
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'" in page.replace("&#39;", "'")
    assert "nan" not in "".join(re.findall(r'points="([^"]*)"', page))
    assert len(page) < 400_000, "a wide sheet was not reduced"


def test_a_run_that_is_not_finished_has_a_report_too(tmp_path):
    run = RunFolder(tmp_path / "new")
    run.path.mkdir()
    assert "No step has been logged" in write_report(run).read_text(encoding="utf-8")


def test_doctor_names_what_is_here_and_what_is_in_the_way(brushwork, monkeypatch):
    said = brushwork("doctor", "--json")
    assert said.code == (0 if said.data["ok"] else 1)
    assert said.data["packages"]["torch"]["ok"] and said.data["embedded model"]["mini"]["ok"]
    assert "data_tools" in said.data["program"]["data_tools"]["value"]
    monkeypatch.setattr(mini_base, "weights_folder", lambda: mini_base.style_folder() / "none")
    missing = [finding for finding in doctor.examine() if not finding.ok]
    assert [finding.name for finding in missing if finding.group == "embedded model"] == ["mini"] and all(finding.fix for finding in missing)


def test_the_quickstart_measures_on_subjects_that_it_does_not_train():
    subjects = held_out()
    trained = {path.with_suffix(".txt").read_text(encoding="utf-8").strip().lower() for path in mini_base.style_folder().glob("*.png")}
    assert len(subjects.captions) == len(subjects.pictures) >= 20
    assert trained.isdisjoint(caption.lower() for caption in subjects.captions)
    recipe = quickstart_recipe(subjects)
    assert recipe.training.optimizer == "adamw8bit" and recipe.data.trigger == mini_base.TRIGGER
    assert recipe.samples.prompts == subjects.captions and recipe.data.folder == mini_base.style_folder()
    assert json.loads(json.dumps(recipe.settings()))
