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
Updates the documents of a datastore: adds new documents, and replaces those that changed.

```bash
retro update articles articles.jsonl
```

Documents are recognized by the user's own id, so the datastore must have been chunked with `--id_column`. A document
with the same text is only read. Documents that the inputs lack stay in the datastore; `retro remove` removes them.
"""

from collections.abc import Sequence

from data_prep.arguments import name_leading_words, parse_arguments, run_command
from data_prep.memory import keep_freed_memory
from data_prep.scripts.add import UpdateArguments


def main(argv: Sequence[str] | None = None) -> None:
    argv = name_leading_words(argv, "datastore", "input")
    (arguments,) = parse_arguments(UpdateArguments, argv=argv, description=__doc__, prog="retro update")
    from data_prep.stage_files import process_state
    from data_prep.upkeep.changes import describe_version, update_documents

    keep_freed_memory()
    manifest = update_documents(arguments.datastore, arguments.input, arguments.refresh_neighbors)
    if process_state().is_main_process:
        print(describe_version(manifest))


if __name__ == "__main__":
    run_command(main)
