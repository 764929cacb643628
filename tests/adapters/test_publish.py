"""Publishing with the real client against a Hub on loopback, with everything that can go wrong on the way."""

from __future__ import annotations

import json

import pytest

from finetune.adapters.adapter_file import write_adapter
from finetune.adapters.publish import PublishedFile, PublishError, check_files, publish
from finetune.errors import BadInput
from tests.adapters.conftest import TOKEN
from tests.adapters.hub_stand_in import Fault
from tests.adapters.test_arithmetic import adapter
from tests.listening import Listening

CARD = b"---\nlicense: apache-2.0\ntags:\n- lora\npipeline_tag: text-to-image\n---\n\n# style\n"


@pytest.fixture
def files(tmp_path):
    weights = write_adapter(tmp_path / "w.safetensors", adapter()).read_bytes()
    return [PublishedFile("README.md", CARD), PublishedFile("pytorch_lora_weights.safetensors", weights), PublishedFile("images/0.png", b"\x89PNG" + b"\0" * 100)]


def send(files, private=True, progress=None, pauses=None):
    waited = [] if pauses is None else pauses
    return publish(files, "me/style", private=private, message="Publish", progress=progress, pause=waited.append)


def test_everything_arrives_in_one_commit_and_the_repository_is_private(hub, files):
    done = send(files)
    assert hub.private is True and done.private
    assert hub.commits == [["README.md", "images/0.png", "pytorch_lora_weights.safetensors"]]
    assert {name: content for name, content in hub.files.items()} == {file.name: file.content for file in files}
    assert done.url == f"{hub.url}/me/style" and done.commit == hub.head


def test_public_only_when_asked_for(hub, files):
    assert send(files, private=False).private is False
    assert hub.private is False


def test_an_existing_public_repository_is_not_filled_by_a_private_upload(hub, files):
    hub.private = False
    with pytest.raises(PublishError, match="is public"):
        send(files)
    assert not hub.requests("PUT|commit")
    assert send(files, private=False).sent


def test_publishing_twice_sends_nothing_twice(hub, files):
    send(files)
    before = len(hub.requests("PUT"))
    again = send(files)
    assert again.sent == () and len(hub.commits) == 1 and len(hub.requests("PUT")) == before
    changed = [PublishedFile("README.md", CARD + b"more\n"), *files[1:]]
    assert send(changed).sent == ("README.md",)
    assert hub.commits[-1] == ["README.md"] and len(hub.files) == 3


@pytest.mark.parametrize(("fault", "said"), [
    pytest.param(Fault("POST /api/repos/create", 401, 9), "does not know the token", id="401"),
    pytest.param(Fault("POST /api/repos/create", 403, 9), "may not write", id="403"),
    pytest.param(Fault("commit/main", 409, 9), "by someone else", id="409"),
    pytest.param(Fault("commit/main", 412, 9), "changed meanwhile", id="412"),
    pytest.param(Fault("commit/main", 413, 9), "too large", id="413"),
    pytest.param(Fault("GET /api/models", 500, 99), "refused", id="500 for ever"),
    pytest.param(Fault("GET /api/models", 0, 99), "connection", id="connection cut for ever"),
])
def test_a_refusal_is_one_clear_line_without_the_token(hub, files, fault, said):
    hub.faults.append(fault)
    with pytest.raises(PublishError, match=said) as caught:
        send(files)
    assert caught.value.fix and TOKEN not in str(caught.value) and "\n" not in caught.value.what
    assert hub.commits == [] and hub.files == {}


@pytest.mark.parametrize("fault", [
    pytest.param(Fault("GET /api/models", 500, 2), id="500 twice"),
    pytest.param(Fault("objects/batch", 500, 1), id="500 in the middle"),
    pytest.param(Fault("commit/main", 503, 1), id="503 at the commit"),
    pytest.param(Fault("GET /api/models", 0, 1), id="connection cut"),
    pytest.param(Fault("commit/main", 0, 1), id="connection cut at the commit"),
])
def test_passing_trouble_is_waited_out(hub, files, fault, monkeypatch):
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own pauses inside one attempt
    hub.faults.append(fault)
    assert send(files).sent
    assert len(hub.commits) == 1


def test_the_hubs_own_wish_to_wait_is_heard(hub, files):
    hub.faults.append(Fault("commit/main", 429, 1, {"Retry-After": "7"}))
    pauses, heard = [], Listening()
    send(files, progress=heard, pauses=pauses)
    assert 7.0 in pauses and any("429" in text for text in heard.said)


def test_after_a_lost_connection_the_next_run_sends_only_the_rest(hub, files):
    hub.faults.append(Fault("commit/main", 500, 99))
    with pytest.raises(PublishError):
        send(files)
    sent = len(hub.requests("PUT"))
    assert sent == 2 and hub.files == {}
    hub.faults.clear()
    send(files)
    assert len(hub.requests("PUT")) == sent
    assert len(hub.files) == 3


def test_the_token_goes_to_the_hub_only(hub, files):
    heard = Listening()
    send(files, progress=heard)
    assert all("authorization" not in {key.lower() for key in headers} for _, _, headers, _ in hub.requests("PUT"))
    assert all(TOKEN not in path and TOKEN.encode() not in body for _, path, _, body in hub.log)
    assert not any(TOKEN in text for text in heard.said)


def test_without_a_token_nothing_is_asked(hub, files, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PublishError, match="no Hub token"):
        send(files)
    assert hub.log == []


@pytest.mark.parametrize(("extra", "said"), [
    (PublishedFile("optimizer.safetensors", b""), "does not belong"),
    (PublishedFile(".DS_Store", b""), "does not belong"),
    (PublishedFile("images/../secret.png", b""), "does not belong"),
    (PublishedFile("training_config.json", b'{"key": "hf_' + b"a" * 24 + b'"}'), "access token"),
    (PublishedFile("training_config.json", b'{"folder": "/home/me/photos"}'), "path of this machine"),
    (PublishedFile("training_config.json", b'{"folder": "C:\\\\Users"}'), "path of this machine"),
])
def test_what_does_not_belong_on_a_page_is_refused_before_any_request(hub, files, extra, said):
    with pytest.raises(BadInput, match=said) as caught:
        send([*files, extra])
    assert hub.log == [] and "a" * 24 not in str(caught.value)


@pytest.mark.parametrize(("prompt", "refused"), [("desk-with-a-lamp-and-a-cup", False), ("a cat sk-abcdefghijklmnopqrstuv", True), ("a cat\nsk-abcdefghijklmnopqrstuv", True)])
def test_a_long_word_with_hyphens_is_no_token(files, prompt, refused):
    """A prompt about a desk could not be published."""
    told = [*files, PublishedFile("training_config.json", json.dumps({"prompt": prompt}).encode())]
    if not refused:
        return check_files(told, "me/style")
    with pytest.raises(BadInput, match="access token"):
        check_files(told, "me/style")


def test_a_path_in_the_weights_header_is_found(tmp_path, files):
    told = write_adapter(tmp_path / "w.safetensors", adapter().with_provenance(base_model="/root/models/base")).read_bytes()
    with pytest.raises(BadInput, match="path of this machine"):
        check_files([files[0], PublishedFile("pytorch_lora_weights.safetensors", told)], "me/style")


@pytest.mark.parametrize("repo", ["style", "me/sty le", "me/../x", "a/b/c", "/style"])
def test_names_that_are_no_repository_are_refused(files, repo):
    with pytest.raises(BadInput, match="not the name of a repository"):
        check_files(files, repo)


def test_the_client_has_the_card_validated_before_anything_is_sent(hub, files):
    broken = [PublishedFile("README.md", b"---\ntags:\n- lora\n---\n"), *files[1:]]
    with pytest.raises(PublishError, match="card was refused"):
        send(broken)
    assert not hub.requests("PUT|commit")
    send(files)
    assert json.loads(hub.requests("validate-yaml")[-1][3])["content"] == CARD.decode()
