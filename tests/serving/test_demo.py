# Copyright 2026 The RETRO for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The page in a browser, and as a Space that runs by itself."""

import os
import shutil
import socket
import subprocess
import sys
import time

import httpx
import pytest
from tiny_server import save_model

from trainers.cli import main


@pytest.fixture(scope="module")
def space(tiny_datastore_dir, tmp_path_factory):
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(tiny_datastore_dir, folder / "datastore")
    save_model("joint", tiny_datastore_dir, folder / "model")
    main(["demo", "--folder", str(folder), "--export", str(folder / "space")])
    return folder / "space"


def test_an_exported_space_holds_all_that_it_needs(space, capsys):
    card = (space / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntitle: ") and "sdk: gradio\nsdk_version: " in card and "app_file: app.py" in card
    requirements = (space / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in requirements)
    assert {"torch", "transformers", "faiss-cpu"} <= {line.split("==")[0] for line in requirements}
    for name in ("app.py", "model/config.json", "datastore/datastore.json", "serving/page.py"):
        assert (space / name).is_file()
    assert not space.with_name("space.partial").exists()
    with pytest.raises(SystemExit):
        main(["demo", "--folder", str(space.parent), "--export", str(space)])
    assert "not empty" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    pytest.importorskip("gradio")
    with pytest.raises(SystemExit):
        main(["demo", "--folder", str(tmp_path)])
    assert "run `retro quickstart` first" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_streams_and_shows_neighbors_in_a_browser(space):
    """The exported Space in Debian's Chromium, on a narrow and a wide window."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or pytest.skip("there is no chromium")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment)
    try:
        for _ in range(240):
            try:
                httpx.get(f"http://127.0.0.1:{port}")
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.5)
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            for width, height in ((390, 844), (1280, 900)):
                page = browser.new_page(viewport={"width": width, "height": height})
                page.goto(f"http://127.0.0.1:{port}")
                page.get_by_label("Prompt").fill("retro looks things up in a datastore <b>${1+1}</b> retro looks")
                page.get_by_role("button", name="Continue").click()
                page.wait_for_function("document.querySelectorAll('#on .generated').length >= 1", timeout=60_000)
                page.wait_for_function("document.querySelector('#off .retro-plain')")
                page.get_by_role("button", name="Stop").click()
                page.wait_for_timeout(1000)
                assert "<b>${1+1}</b>" in page.locator("#on .retro-text").inner_text()
                token = page.locator("#on label.c1 span[data-worth]").first
                token.hover()
                assert page.locator("#on .retro-panel.p1").is_visible()
                assert "document" in page.locator("#on .retro-panel.p1").inner_text()
                assert " bits: " in token.get_attribute("data-worth")
                assert page.locator("#on .retro-panel:visible").count() == 1
                token.click()
                page.mouse.move(2, 2)
                assert page.locator("#on .retro-panel.p1").is_visible()  # what was clicked stays
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.get_by_role("tab", name="Measure a text").click()
                page.get_by_label("Text", exact=True).fill("retro looks things up in a datastore δέλτα")
                page.get_by_role("button", name="Measure").click()
                page.locator("#sentence").get_by_text("bits per byte").wait_for(timeout=60_000)
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()
