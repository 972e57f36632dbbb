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
"""
Runs a module, and ends it when the process that started it has ended, however that was.

    python -m end_with_parent MODULE ARGUMENT ...

The standard input stream must be a pipe whose other end that process alone holds. It breaks when the process ends.
Everything in the process group of this one ends then.
"""

import os
import runpy
import signal
import sys
import threading
import time


SECONDS_TO_END = 10


def end_when_alone() -> None:
    """Waits until the pipe breaks."""
    while os.read(0, 1024):
        pass
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the signal is for the others and the main thread
    os.killpg(0, signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_when_alone, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
