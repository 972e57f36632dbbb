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
"""What a verification finds"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """
    A problem that was found.

    Args:
        where (`str`): File or folder, relative to the verified folder, or a field of the manifest.
        problem (`str`): Description of the problem.
        remedy (`str`): How to remake the damaged part.
        stage (`str`, *optional*): The stage that [`repair_datastore`] runs again, None if it cannot help.
        split (`str`, *optional*): The split of the damaged part.
        shard (`str`, *optional*): The damaged shard, None for the whole stage.
        unchecked (`bool`, *optional*, defaults to `False`): Whether it could only not be checked.
    """

    where: str
    problem: str
    remedy: str
    stage: str | None = None
    split: str | None = None
    shard: str | None = None
    unchecked: bool = False

    def __str__(self) -> str:
        return f"{self.where} {self.problem}; {self.remedy}"


def short(error: Exception) -> str:
    """The message of an error on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]
