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
Removes documents from a datastore while others read it. A reader that opens it afterwards does not find them.

```bash
retro remove datastore --documents 3 14
retro remove articles --documents a3 a14
```

Documents are named by the user's own ids if the datastore was chunked with `--id_column`, or else by the numbers that
retrieval returns. Their chunks stay on the disk until `retro compact` removes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import name_leading_words, parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class RemoveArguments:
    """Options of `retro remove`."""

    datastore: str = field(metadata={"help": "The datastore; may be the first word."})
    documents: list[str] = field(
        metadata={"help": "The user's own ids of the documents if the datastore has them, or else their numbers."}
    )
    by_number: bool = field(
        default=False, metadata={"help": "--documents are numbers, even if the documents have ids of the user."}
    )
    refresh_neighbors: bool = field(
        default=False, metadata={"help": "Search stored neighbors again, to replace the removed ones."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = name_leading_words(argv, "datastore")
    (arguments,) = parse_arguments(RemoveArguments, argv=argv, description=__doc__, prog="retro remove")
    from pathlib import Path

    from data_prep.stage_files import process_state
    from data_prep.upkeep.changes import describe_version, has_own_ids, remove_documents
    from modeling_retro.datastore.manifest import read_manifest

    keep_freed_memory()
    documents = arguments.documents
    if arguments.by_number or not has_own_ids(read_manifest(Path(arguments.datastore))):
        wrong = [word for word in documents if not word.isdecimal()]
        if wrong:
            raise ValueError(
                f"--documents is {wrong[0]!r}, expected numbers: the documents of {arguments.datastore} have no other "
                "ids, it was chunked without --id_column"
            )
        documents = [int(word) for word in documents]
    manifest = remove_documents(arguments.datastore, documents, arguments.refresh_neighbors)
    if process_state().is_main_process:
        print(describe_version(manifest))


if __name__ == "__main__":
    run_command(main)
