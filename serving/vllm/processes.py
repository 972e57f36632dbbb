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
"""vLLM processes that belong to a server"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


CONNECTOR_DIR = Path(__file__).with_name("connector")
# Seconds that a process has to end by itself.
_SECONDS_TO_END = 10


def connector_config(max_gib: float) -> str:
    """The value of `--kv-transfer-config` of vLLM, with the largest size of the states that are kept in gibibytes."""
    return json.dumps(
        {
            "kv_connector": "RetroConnector",
            "kv_connector_module_path": "retro_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"max_gib": max_gib},
        }
    )


class EngineProcess:
    """
    A vLLM process on a free port of 127.0.0.1. It writes to the standard error stream of the server, and ends with it.

    Args:
        python (`str`): The interpreter of the environment that has vLLM.
        model (`str`): Folder or Hub id of the decoder.
        dtype (`str`): Type of the weights.
        max_gib (`float`): Largest size of the states of texts and rows that it keeps, in gibibytes.
        arguments (`Sequence[str]`, *optional*): More arguments of the server of vLLM.
        reader (`tuple[str, Path]`, *optional*): Name and folder of the adapter with which texts are read.

    Attributes:
        url (`str`): Its address.
        has_served (`bool`): Whether it has answered since it was started.
    """

    def __init__(
        self,
        python: str,
        model: str,
        dtype: str,
        max_gib: float,
        arguments: Sequence[str] = (),
        reader: tuple[str, Path] | None = None,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [python, "-m", "end_with_parent", "vllm.entrypoints.openai.api_server"]
        self._command += ["--model", model, "--dtype", dtype]
        self._command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--kv-transfer-config",
            connector_config(max_gib),
        ]
        self._command += ["--no-enable-prefix-caching", "--skip-tokenizer-init", "--generation-config", "vllm"]
        self._command += ["--disable-uvicorn-access-log", *arguments]
        if reader is not None:
            rank = json.loads((reader[1] / "adapter_config.json").read_text(encoding="utf-8"))["r"]
            self._command += ["--enable-lora", "--lora-modules", f"{reader[0]}={reader[1]}"]
            self._command += ["--max-lora-rank", str(max(8, 1 << (rank - 1).bit_length()))]
        self.has_served = False
        self._process: subprocess.Popen | None = None

    def ensure_running(self) -> bool:
        """
        Starts the process, or starts it again if it has ended. It answers some time later. Returns `False` if it has
        ended without having served.
        """
        if self._process is not None and self._process.poll() is None:
            return True
        if self._process is not None:
            if not self.has_served:
                return False
            self.has_served = False
            print(f"vLLM has ended with {self._process.returncode} and is started again", file=sys.stderr)
        else:
            print(f"starting {shlex.join(self._command)}", file=sys.stderr)
        # Packages of this environment would stand in front of those of the other one.
        environment = {**os.environ, "PYTHONPATH": str(CONNECTOR_DIR), "VLLM_NO_USAGE_STATS": "1"}
        # A session of its own, so that Ctrl-C reaches the server first, which lets running answers end.
        # The pipe breaks when this process ends, even if it is killed.
        self._process = subprocess.Popen(
            self._command, env=environment, stdin=subprocess.PIPE, stdout=sys.stderr, start_new_session=True
        )
        return True

    def stop(self) -> None:
        """Ends the process and those that it has started."""
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
