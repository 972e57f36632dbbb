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
Removes the chunks of removed documents from the disk, and builds the indexes of the datastore again.

```bash
retro compact datastore
retro compact datastore --refresh_neighbors
```

Documents keep their numbers, and chunks get new ones. A reader keeps the version of the datastore that it opened. A
later change removes the files of this version, when nobody reads them any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import name_leading_words, parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class CompactArguments:
    """Options of `retro compact`."""

    datastore: str = field(metadata={"help": "The datastore; may be the first word."})
    refresh_neighbors: bool = field(
        default=False, metadata={"help": "Search stored neighbors again that were found in an earlier version."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = name_leading_words(argv, "datastore")
    (arguments,) = parse_arguments(CompactArguments, argv=argv, description=__doc__, prog="retro compact")
    from data_prep.stage_files import process_state
    from data_prep.upkeep.changes import compact_datastore, describe_version

    keep_freed_memory()
    manifest = compact_datastore(arguments.datastore, arguments.refresh_neighbors)
    if process_state().is_main_process:
        print(describe_version(manifest))


if __name__ == "__main__":
    run_command(main)
