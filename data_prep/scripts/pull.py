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
Brings the latest version of a datastore in an object store, such as S3, to a folder of this machine.

```bash
retro pull datastore --store s3://bucket/articles
```

The folder is new, or an earlier copy, of which only what changed is brought. Keys come from the environment
(AWS_ACCESS_KEY_ID, …). S3 needs `pip install "retro-transformers[s3]"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class PullArguments:
    """Options of `retro pull`."""

    datastore: str = field(metadata={"help": "Folder of the copy; may be the first word."})
    store: str = field(metadata={"help": "Address of the object store, such as s3://bucket/articles."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(PullArguments, argv=argv, description=__doc__, prog="retro pull")
    from data_prep.object_store import pull_datastore

    version = pull_datastore(arguments.store, arguments.datastore)
    print(f"{arguments.datastore} is version {version} of {arguments.store}")


if __name__ == "__main__":
    run_command(main)
