"""The server of the rating page over a real socket: who is let in, what leaves, what a kill loses."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

from PIL import Image

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import ComparisonLog, Judgement
from tests.preference.conftest import ROOT
from tests.preference.pictures import colour_folder


def test_the_server_lets_in_only_its_own_page(tmp_path, serve):
    folder = colour_folder(tmp_path / "folder")
    (tmp_path / "secret.txt").write_text("secret")
    server = serve(folder.root, "--port", "0")
    assert server.host.startswith("127.0.0.1:")
    assert server.request("/?token=" + server.token, **{"x-brushwork-token": None})[0] == 200
    foreign = [
        {"x-brushwork-token": None}, {"x-brushwork-token": "wrong"}, {"host": "evil.example"}, {"host": "evil.example:" + server.host.split(":")[1]},
        {"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
    ]
    for headers in foreign:
        assert server.request("/api/state", **headers)[0] == 403, headers
        assert server.request("/api/undo", {"id": "x"}, **headers)[0] == 403, headers
    assert server.request("/api/state", origin=f"http://{server.host}")[0] == 200
    for path in ("/../secret.txt", "/%2e%2e/secret.txt", "/pictures/../secret.txt", "/candidates.jsonl", "/api/pictures/..%2f..%2fsecret.txt", "/api/pictures/c0-0", "/page.css/../../guard.py", "/server.py"):
        status, _, content = server.request(path)
        assert status in (403, 404) and b"secret" not in content, path
    status, headers, _ = server.request("/?token=" + server.token)
    assert "default-src 'none'" in headers["content-security-policy"] and "unsafe-inline" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"


def test_strange_requests_are_refused_and_write_nothing(tmp_path, serve):
    folder = colour_folder(tmp_path / "folder")
    server = serve(folder.root, "--port", "0")
    key = server.state()["questions"][0]["key"]
    good = {"id": "1", "question": key, "position": 0}
    strange = [b"", b"{", b"[]", b"[" * 5000, b"x" * 20_000, {}, good | {"id": 3}, good | {"id": "x" * 65}, good | {"id": "\ud800"}, good | {"id": "\x1b[31m"}, good | {"question": "no"}, good | {"position": 7}, good | {"position": "0"},
               good | {"position": True}, good | {"tie": True}, good | {"ms": -4}, good | {"ms": 1e99}, good | {"ranking": "x"}, good | {"points": []}]
    for body in strange:
        assert server.request("/api/answer", body)[0] in (400, 413), body
    assert not (folder.root / "comparisons.jsonl").exists()
    assert server.request("/api/answer", good)[0] == 200 and server.request("/api/answer", good)[0] == 200
    assert len(folder.log().judgements()) == 1


def test_pictures_tell_nothing_about_themselves(tmp_path, serve):
    from finetune.sampling import save_picture

    folder = colour_folder(tmp_path / "folder")
    for candidate in folder.candidates().values():
        save_picture(Image.new("RGB", (16, 16), "red"), folder.picture(candidate), {"seed": 4711, "adapter": "secret-style"})
    server = serve(folder.root, "--port", "0")
    text = server.request("/api/state")[2].decode()
    assert not re.search(r"c\d-\d|seed|pictures/c", text)
    name = json.loads(text)["questions"][0]["pictures"][0]
    _, headers, content = server.request(f"/api/pictures/{name}")
    assert headers["content-type"] == "image/png" and b"4711" not in content and b"secret-style" not in content
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (16, 16) and not image.info


def test_killing_the_server_again_and_again_loses_no_answer(tmp_path, serve):
    folder = colour_folder(tmp_path / "folder", prompts=4)
    acknowledged = []
    for turn in range(3):
        server = serve(folder.root, "--port", "0")
        for number in range(3):
            question = server.state()["questions"][0]
            identity = f"{turn}-{number}"
            if server.request("/api/answer", {"id": identity, "question": question["key"], "position": 0})[0] == 200:
                acknowledged.append(identity)
        server.kill()
        assert {judgement.id for judgement in ComparisonLog(folder.root / "comparisons.jsonl").refresh().judgements()} == set(acknowledged)
    assert len(acknowledged) == 9


def test_a_thousand_answers_do_not_slow_it_down(tmp_path):
    """Processor time of an answer, not the clock, after 970 others, against a bound far below what a person notices."""
    from finetune.preference.rating_page.server import RatingApplication
    from finetune.preference.rating_plan import PlanSettings
    from finetune.preference.rating_session import Answer, RatingSession

    folder = colour_folder(tmp_path / "folder", prompts=40, per_prompt=8, size=2)
    session = RatingSession(CandidateFolder.existing(folder.root), "ada", PlanSettings(wanted=1000))
    while len(session.plan.questions) < 970:
        session.plan.grow()
    records = [Judgement("ada", "pair", question.prompt_id, "x", question.items, choice=question.items[0]).to_record() for question in session.plan.questions[:970]]
    (folder.root / "comparisons.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    application, spent = RatingApplication(session), []
    while question := next(iter(session.upcoming(1)), None):
        began = time.process_time()
        session.answer(Answer(f"a{len(spent)}", question.key, position=0))
        application.state()
        spent.append(time.process_time() - began)
    assert session.progress() == {"answered": 1000, "skipped": 0, "total": 1000}
    assert sorted(spent)[len(spent) // 2] < 0.1


def test_ctrl_c_ends_with_a_summary(tmp_path, serve):
    folder = colour_folder(tmp_path / "folder")
    server = serve(folder.root, "--port", "0", "--json")
    server.request("/api/answer", {"id": "1", "question": server.state()["questions"][0]["key"], "position": 0})
    server.process.send_signal(signal.SIGINT)
    out, _ = server.process.communicate(timeout=300)
    assert server.process.returncode == 0 and json.loads(out)["answered"] == 1


def test_a_judgement_of_another_program_is_seen_by_the_running_page(tmp_path, serve):
    folder = colour_folder(tmp_path / "folder")
    server = serve(folder.root, "--port", "0")
    question = server.state()["questions"][0]
    plan = json.loads(folder.plan.read_text())["questions"]
    items = [tuple(entry["items"]) for entry in plan]
    for pair in items:
        folder.log().append(Judgement("ada", "pair", "p", "x", pair, choice=pair[0]))
    assert question["key"] not in [one["key"] for one in server.state()["questions"]]


def test_listening_everywhere_is_refused(tmp_path):
    folder = colour_folder(tmp_path / "folder")
    result = subprocess.run([sys.executable, "-m", "finetune", "prefer", "rate", str(folder.root), "--annotator", "ada", "--no-browser", "--host", "0.0.0.0", "--json"],
                            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2 and "every address" in json.loads(result.stdout)["error"]["what"]
