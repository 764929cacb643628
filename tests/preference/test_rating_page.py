"""The rating page in a real browser, where there is one: keys, what a dead server does, the end."""

import os
import shutil
import socket
import time

import pytest

from finetune.preference.comparisons import ComparisonLog
from tests.preference.pictures import colour_folder

HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"
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
