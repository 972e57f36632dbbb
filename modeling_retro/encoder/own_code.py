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
"""Names what needs code of its own, without importing any model"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def no_code_of(what: str) -> Iterator[None]:
    """
    Makes the error of transformers a `ValueError` of one line if something inside the block needs code of its own and
    `trust_remote_code` is `False`.

    Args:
        what (`str`): The thing that is loaded, and its name.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{what} needs code of its own, which is never run; choose another") from error
