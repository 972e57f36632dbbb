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
"""Renders chat templates in a process of its own, because a template may come from others and is a program"""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase


SECONDS = 5.0
MEMORY_BYTES = 2 << 30
MAX_CHARACTERS = 10_000_000


class ChatTemplate:
    """
    The chat template of a tokenizer. A template that does not end, or that takes too much memory, ends with its
    process, and the next conversation gets a new one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        seconds (`float`, *optional*, defaults to 5.0): Time for one conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seconds: float = SECONDS):
        self.tokenizer = tokenizer
        self.seconds = seconds
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """
        Writes a conversation, up to the beginning of the next answer, as
        [`~transformers.PreTrainedTokenizerBase.apply_chat_template`] does.

        Args:
            messages (`Sequence[Mapping[str, str]]`): The messages, each with a `role` and a `content`.

        Raises:
            ValueError: If there is no template, or if it refuses the messages, fails or does not end.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template; use /v1/completions")
        options = {"chat_template": self.tokenizer.get_chat_template(), **self.tokenizer.special_tokens_map}
        # A template that hangs must not make others wait for longer than itself.
        if not self._lock.acquire(timeout=2 * self.seconds):
            raise ValueError("the chat templates of other conversations take too long; try again later")
        try:
            answer = self._ask(json.dumps({"conversations": [messages], "add_generation_prompt": True, **options}))
        finally:
            self._lock.release()
        if not answer:
            raise ValueError(f"the chat template of the model did not end within {self.seconds:g} seconds")
        answer = json.loads(answer)
        if "error" in answer:
            raise ValueError(f"the chat template of the model refuses the messages: {answer['error']}")
        return answer["text"]

    def _ask(self, question: str) -> str:
        """The line with which the process answers, empty if it did not in time."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        timer = threading.Timer(self.seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            self.close()
        return answer

    def _start(self) -> subprocess.Popen:
        words = [sys.executable, "-m", "trainers.chat_template"]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths}
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", env=environment)
        process.stdout.readline()  # it has imported what it needs
        return process

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None


def _answer(question: str) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(**json.loads(question))
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # whatever the program in the template did
        return {"error": str(error)[:1000]}
    return {"text": text} if len(text) <= MAX_CHARACTERS else {"error": f"it writes {len(text)} characters"}


def main() -> None:
    import transformers.utils.chat_template_utils  # noqa: F401

    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ValueError, OSError):
        print("warning: this system does not limit the memory of chat templates", file=sys.stderr)
    print("ready", flush=True)
    for question in sys.stdin:
        print(json.dumps(_answer(question)), flush=True)


if __name__ == "__main__":
    main()
