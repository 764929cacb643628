"""The rating page over a real socket: who is let in, what leaves, and a real browser where there is one."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import ComparisonLog, Judgement
from tests.preference.pictures import colour_folder

ROOT = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"


class Server:
    """`brushwork prefer rate` in a process of its own."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "finetune", "prefer", "rate", str(folder), "--annotator", "ada", "--no-browser", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"http://(\S+)/\?token=(\S+)", line):
                self.host, self.token = found.groups()
                break
        self.url = f"http://{self.host}/?token={self.token}"

    def request(self, path, body=None, **headers):
        sent = {"x-brushwork-token": self.token, **headers}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.host}{path}", data, {name: value for name, value in sent.items() if value is not None})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def state(self):
        return json.loads(self.request("/api/state")[2])

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait(300)


@pytest.fixture
def serve():
    started = []

    def start(folder, *options):
        started.append(Server(folder, *options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()
        server.process.stdout.close()
        server.process.stderr.close()


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
    strange = [b"", b"{", b"[]", b"[" * 5000, b"x" * 20_000, {}, good | {"id": 3}, good | {"id": "x" * 65}, good | {"question": "no"}, good | {"position": 7}, good | {"position": "0"},
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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,800", "--lang=en-US"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except WebDriverException as problem:
        pytest.skip(f"the Chromium of this machine does not start: {problem.msg}")
    yield driver
    driver.quit()


def until(condition, seconds=300):
    """Wait for a condition; the value that made it true."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it never happened")


def lasting_port():
    """A free port below those that the system hands out by itself, so that nobody has it while a server is away."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return str(port)
    raise AssertionError("no port is free")


def shown(browser):
    """The question on screen, drawn and ready for keys."""
    return browser.execute_script("const s = document.getElementById('stage'); return s.querySelector('img') ? s.dataset.question : null")


def press(browser, key):
    """One key; the page takes an answer only after a picture was visible for a moment."""
    from selenium.webdriver import ActionChains

    before = until(lambda: shown(browser))
    time.sleep(0.25)
    ActionChains(browser).send_keys(key).perform()
    return before


def judgements(folder):
    return ComparisonLog(folder.root / "comparisons.jsonl").refresh().judgements()


@needs_browser
def test_rating_pairs_with_the_keyboard_alone(tmp_path, serve, browser):
    from selenium.webdriver.common.keys import Keys

    folder = colour_folder(tmp_path / "folder", words=HOSTILE)
    server = serve(folder.root, "--port", "0", "--questions", "6")
    browser.get(server.url)
    for number, key in enumerate((Keys.ARROW_LEFT, Keys.ARROW_RIGHT, "0", "x"), 1):
        before = press(browser, key)
        until(lambda: len(judgements(folder)) == number and shown(browser) != before)
    left, right, tie, bad = judgements(folder)
    assert left.choice == left.shown[0] and right.choice == right.shown[1] and tie.tie and not tie.both_bad and bad.both_bad
    assert all(judgement.ms >= 150 for judgement in (left, right, tie, bad))
    assert HOSTILE in browser.find_element("id", "prompt").text and browser.title == "ada · Brushwork"
    press(browser, "u")
    until(lambda: len(judgements(folder)) == 3)
    before = press(browser, "s")
    until(lambda: shown(browser) not in (None, before))
    browser.execute_script("localStorage.setItem('brushwork.language', 'en')")
    press(browser, "l")
    until(lambda: "一样好" in browser.find_element("id", "keys").text)
    press(browser, "l")
    press(browser, " ")
    until(lambda: browser.find_elements("css selector", ".flicker"))
    press(browser, Keys.ARROW_LEFT)
    until(lambda: len(judgements(folder)) == 4)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@needs_browser
def test_a_click_made_while_the_server_was_dead_arrives_later(tmp_path, serve, browser):
    from selenium.webdriver.common.keys import Keys

    folder = colour_folder(tmp_path / "folder")
    server = serve(folder.root, "--port", lasting_port(), "--questions", "6")
    browser.get(server.url)
    until(lambda: shown(browser))
    server.kill()
    press(browser, Keys.ARROW_LEFT)
    until(lambda: "not saved" in browser.find_element("id", "trouble").text)
    assert not (folder.root / "comparisons.jsonl").exists()
    again = serve(folder.root, "--port", server.host.split(":")[1], "--questions", "6")
    assert again.host == server.host
    browser.get(again.url)
    until(lambda: len(judgements(folder)) == 1)
    until(lambda: browser.execute_script("return !Object.keys(localStorage).some((name) => name.includes('outbox'))"))


@needs_browser
def test_ranking_and_scoring_with_the_keyboard_alone(tmp_path, serve, browser):
    from selenium.webdriver.common.keys import Keys

    folder = colour_folder(tmp_path / "folder")
    browser.get(serve(folder.root, "--port", "0", "--mode", "rank", "--set-size", "3", "--questions", "2").url)
    for key in ("3", "1", "="):
        press(browser, key)
    press(browser, Keys.ENTER)
    assert not (folder.root / "comparisons.jsonl").exists()  # one picture has no place yet
    press(browser, "2")
    press(browser, Keys.ENTER)
    [ranked] = until(lambda: judgements(folder))
    assert [dict(zip(ranked.items, ranked.ranking, strict=True))[item] for item in ranked.shown] == [2, 2, 1]
    browser.get(serve(folder.root, "--port", "0", "--mode", "score", "--criteria", "alignment,style").url)
    for key in ("4", Keys.ARROW_UP, "2", "5"):
        press(browser, key)
    scored = until(lambda: len(judgements(folder)) == 2 and judgements(folder)[1])
    assert scored.axes == {"alignment": 2, "style": 5}


@needs_browser
def test_the_end_tells_what_was_done_and_closes_the_server(tmp_path, serve, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    folder = colour_folder(tmp_path / "folder")
    server = serve(folder.root, "--port", "0", "--questions", "2")
    browser.get(server.url)
    press(browser, Keys.ARROW_LEFT)
    until(lambda: len(judgements(folder)) == 1)
    press(browser, "s")
    until(lambda: "see the skipped one again" in browser.find_element("id", "stage").text)
    ActionChains(browser).send_keys("r").perform()
    press(browser, Keys.ARROW_RIGHT)
    until(lambda: "2\nanswers" in browser.find_element("id", "stage").text)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert server.process.wait(300) == 0 and len(judgements(folder)) == 2


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
