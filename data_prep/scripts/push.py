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
Publishes a datastore in an object store, such as S3, or the next version of one that was pulled from there.

```bash
retro push datastore --store s3://bucket/articles
```

Only files that the store lacks are uploaded. A version is published in one step, and refused if another one was
published since the datastore was pulled. Keys come from the environment (AWS_ACCESS_KEY_ID, …). S3 needs `pip install
"retro-transformers[s3]"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class PushArguments:
    """Options of `retro push`."""

    datastore: str = field(metadata={"help": "The datastore; may be the first word."})
    store: str = field(metadata={"help": "Address of the object store, such as s3://bucket/articles."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(PushArguments, argv=argv, description=__doc__, prog="retro push")
    from data_prep.object_store import push_datastore

    version = push_datastore(arguments.datastore, arguments.store)
    print(f"{arguments.store} holds version {version}")


if __name__ == "__main__":
    run_command(main)
