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
Adds documents to a datastore while others read it: chunks, embeddings, index and neighbors.

```bash
retro add datastore more.jsonl
retro add datastore more.jsonl folder_of_texts --refresh_neighbors
```

A reader keeps the version of the datastore that it opened, and a server switches to the new one by itself. The
documents are read with the options of the earlier ones (`--text_column` of `retro chunk` and so on). If the run is
interrupted, the datastore stays as it was, and the same command resumes the run. The same command after a run that
ended, or was killed at its very end, adds nothing (`--repeat` does), unless the inputs come from standard input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import name_leading_words, parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class UpdateArguments:
    """Options of `retro update`, and of `retro add` too."""

    datastore: str = field(metadata={"help": "The datastore; may be the first word."})
    input: list[str] = field(
        metadata={
            "help": "Files, folders and globs of documents, '-' for jsonl on standard input; may be the next words."
        }
    )
    refresh_neighbors: bool = field(
        default=False,
        metadata={"help": "Search the neighbors of earlier chunks again, because new ones may be nearer."},
    )


@dataclass
class AddArguments(UpdateArguments):
    """Options of `retro add`."""

    repeat: bool = field(
        default=False, metadata={"help": "Add the inputs once more, even if the last change added the very same ones."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = name_leading_words(argv, "datastore", "input")
    (arguments,) = parse_arguments(AddArguments, argv=argv, description=__doc__, prog="retro add")
    from data_prep.stage_files import process_state
    from data_prep.upkeep.changes import add_documents, describe_version

    keep_freed_memory()
    manifest = add_documents(arguments.datastore, arguments.input, arguments.refresh_neighbors, arguments.repeat)
    if process_state().is_main_process:
        print(describe_version(manifest))


if __name__ == "__main__":
    run_command(main)
