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
"""Memory of tensors on the CPU."""

import os
import platform
import subprocess
import sys

import pytest


PAGE_FAULTS = """
import resource, torch
from data_prep.memory import keep_freed_memory
{call}
for repeat in range(31):
    tensor = torch.ones(16 * 2**20)
    del tensor
    if repeat == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc knows the settings")
def test_memory_that_a_tensor_freed_is_used_again():
    # The same settings in the environment of the tests would leave nothing to compare with.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = []
    for call in ("", "keep_freed_memory()"):
        command = [sys.executable, "-c", PAGE_FAULTS.format(call=call)]
        result = subprocess.run(command, env=environment, capture_output=True, check=True)
        faults.append(int(result.stdout))
    assert faults[1] < faults[0] / 2


RESIDENT = """
import psutil, torch
from data_prep.memory import keep_freed_memory, return_freed_memory
keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(64)]
last = torch.ones(1)
del blocks
before = psutil.Process().memory_info().rss
return_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc knows the settings")
def test_freed_memory_is_given_back_between_stages():
    result = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, check=True)
    assert int(result.stdout) > 200 * 2**20
