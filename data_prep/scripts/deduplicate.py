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
Removes the training documents that nearly equal a held-out document: 13-gram Jaccard similarity of at least 0.8.

```bash
retro deduplicate --datastore datastore
```

This stage runs after `chunk` of all splits and before `embed`. Candidates come from MinHash signatures (Broder 1997),
and each candidate is verified on the n-grams of its token ids. `duplicates.jsonl` lists the documents that were
removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class DeduplicateArguments:
    """Options of `retro deduplicate`."""

    datastore: str = field(metadata={"help": "The datastore."})
    against: list[str] = field(
        default_factory=list, metadata={"help": "Splits of held-out documents; by default all but train."}
    )
    threshold: float = field(
        default=0.8, metadata={"help": "Smallest Jaccard similarity of documents that are removed."}
    )
    ngram: int = field(default=13, metadata={"help": "Number of tokens in an n-gram."})
    force: bool = field(
        default=False, metadata={"help": "Also remove the embeddings and neighbors of chunks that change."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(DeduplicateArguments, argv=argv, description=__doc__, prog="retro deduplicate")
    from data_prep.deduplicate import deduplicate_documents
    from data_prep.stage_files import process_state

    report = deduplicate_documents(**vars(arguments))
    if process_state().is_main_process:
        print(f"removed {report.documents} near duplicates of held-out documents ({report.chunks} chunks)")


if __name__ == "__main__":
    run_command(main)
