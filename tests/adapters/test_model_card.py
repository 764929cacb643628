"""The card: right fields for the Hub, and no text of a user or a file that becomes markup."""

from __future__ import annotations

import json
import re
import urllib.request

import pytest
import yaml
from huggingface_hub import ModelCard

from finetune.adapters.licensing import LicencePlan
from finetune.adapters.loading_snippets import SnippetFacts
from finetune.adapters.model_card import CardFacts, GalleryPicture, code, escaped, render_card

OPEN = LicencePlan("apache-2.0", "Apache-2.0", "https://example.org")
TENCENT = LicencePlan("other", "tencent-hunyuan-community", "https://example.org/LICENSE", "notice", True, "European Union", "tencent-hunyuan-community")
NASTY = 'a "cat" `x` <script>alert(1)</script> ![p](javascript:alert(1)) | --- \n---\nlicense: mit\n\u202e[link](https://evil.example) www.evil.example'


def facts(**changes) -> CardFacts:
    snippet = SnippetFacts("me/style", "pytorch_lora_weights.safetensors", "owner/base", "a cat", {"x": 4}, "pipeline", {})
    values = {"title": "Style", "base": "owner/base", "base_name": "owner/base", "base_revision": "abc", "family": "flux", "licence": OPEN, "trigger": "sks style", "snippet": snippet, "proven": True}
    return CardFacts(**values | changes)


def header(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))


def test_the_header_has_what_the_hub_shows():
    card = render_card(facts(gallery=[GalleryPicture("images/0.png", "a cat, sks style")], sheet="images/before_after.png"))
    data = header(card)
    assert data["base_model"] == "owner/base" and data["base_model_relation"] == "adapter"
    assert data["license"] == "apache-2.0" and data["pipeline_tag"] == "text-to-image" and data["library_name"] == "diffusers"
    assert data["instance_prompt"] == "sks style"
    assert data["widget"] == [{"text": "a cat, sks style", "output": {"url": "images/0.png"}}]
    assert {"lora", "template:diffusion-lora", "text-to-image"} <= set(data["tags"])
    assert "<Gallery />" in card and "images/before_after.png" in card


def test_a_community_licence_is_named_linked_and_its_territory_said():
    card = render_card(facts(licence=TENCENT))
    data = header(card)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tencent-hunyuan-community", "LICENSE.txt")
    assert "European Union" in card and "LICENSE.txt" in card and "Notice.txt" in card and "modified" in card


def test_a_base_that_is_not_on_the_hub_is_not_linked():
    card = render_card(facts(base=None, base_name="the small model"))
    assert "base_model" not in header(card) and "the small model" in card


def test_training_what_was_left_out_and_evaluation_stand_in_the_card():
    rows = [{"measure": "style", "value": 0.25, "delta": -0.5, "low": -0.6, "high": -0.4, "verdict": "better"}, {"measure": "drift", "value": 0.0, "low": None, "high": None, "no_interval": "all prompts alike"}]
    card = render_card(facts(training={"pictures": 20, "data hash": "abc123"}, left_out={"too small": 2, "cannot be opened": 1}, evaluation=rows,
                             evaluation_notes=["95%, percentile bootstrap"], limits=["It draws no hands."]))
    for text in ("abc123", "3 pictures", "2: too small", "0.25", "-0.6 to -0.4", "| all prompts alike |", "95%", "no hands"):
        assert text in card, text
    assert "No picture of the data was left out." in render_card(facts(training={"pictures": 20}))


def test_only_a_proven_adapter_is_called_proven():
    assert "proven to load" in render_card(facts()) and "proven to load" not in render_card(facts(proven=False))


@pytest.mark.parametrize("where", ["title", "trigger", "prompt", "training", "left_out", "limits", "evaluation"])
def test_a_hostile_text_stays_text(where):
    changes = {
        "title": {"title": NASTY}, "trigger": {"trigger": NASTY}, "prompt": {"gallery": [GalleryPicture("images/0.png", NASTY)]},
        "training": {"training": {NASTY: NASTY}}, "left_out": {"training": {"a": 1}, "left_out": {NASTY: 1}}, "limits": {"limits": [NASTY]},
        "evaluation": {"evaluation": [{"measure": NASTY, "verdict": NASTY}]},
    }[where]
    card = render_card(facts(**changes))
    data, body = header(card), re.sub(r"^---\n.*?\n---\n", "", card, flags=re.DOTALL)
    assert data["license"] == "apache-2.0" and set(data) <= {"base_model", "base_model_relation", "instance_prompt", "library_name", "license", "pipeline_tag", "tags", "widget"}
    outside_code = "".join(part for number, part in enumerate(body.split("`")) if number % 2 == 0)
    assert "<script" not in outside_code and "](javascript" not in outside_code and "https://evil" not in outside_code and "www.evil" not in outside_code
    assert "\u202e" not in card
    assert ModelCard(card).data.license == "apache-2.0"


def test_escaping_keeps_the_words():
    assert escaped("plain words, 1.5 - ok") == "plain words, 1.5 - ok"
    assert "&#124;" in escaped("a|b") and "&#60;" in escaped("<b>")
    assert code("a`b\nc") == "`a'b c`"


def test_the_hubs_own_validation_passes(hub):
    card = ModelCard(render_card(facts(licence=TENCENT, gallery=[GalleryPicture("images/0.png", NASTY)])))
    card.validate()
    answer = urllib.request.urlopen(urllib.request.Request(hub.url + "/api/validate-yaml", json.dumps({"content": str(card), "repoType": "model"}).encode(), method="POST"))
    assert json.loads(answer.read())["errors"] == []
