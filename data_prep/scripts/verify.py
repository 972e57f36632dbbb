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
Computes all checksums, counts and cross-references of a datastore or a model again, and lists what is wrong.

```bash
retro verify datastore
retro verify datastore --repair --input documents.jsonl held_out.jsonl
retro verify model
```

Each finding names the stage that remakes the damaged part. `--repair` remakes only the damaged parts: shards of chunks
from the inputs that they were made from, and everything else from the chunks. The exit code is 1 if anything is wrong,
or still wrong after the repair, and 2 if nothing is wrong, but something could not be checked.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class VerifyArguments:
    """Options of `retro verify`."""

    path: str = field(metadata={"help": "Folder or Hub id of a datastore, or folder of a model; may stand first."})
    repair: bool = field(default=False, metadata={"help": "Remake the damaged parts of a datastore."})
    input: list[str] = field(
        default_factory=list,
        metadata={"help": "With --repair: the inputs that the datastore was made from, wherever they are now."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--path")
    (arguments,) = parse_arguments(VerifyArguments, argv=argv, description=__doc__, prog="retro verify")
    from pathlib import Path

    from data_prep.upkeep.verify import repair_datastore, verify
    from modeling_retro.datastore.datastore import RetroDatastore
    from modeling_retro.datastore.manifest import MANIFEST_NAME

    path = Path(arguments.path)
    if not path.is_dir():
        path = RetroDatastore.from_pretrained(arguments.path).path
    if arguments.repair and not (path / MANIFEST_NAME).is_file():
        raise ValueError(f"--repair is for datastores, {path} is none")
    findings = repair_datastore(path, arguments.input) if arguments.repair else verify(path)
    for finding in findings:
        print(str(finding))
    if findings:
        sys.exit(2 if all(finding.unchecked for finding in findings) else 1)
    print(f"{arguments.path}: nothing is wrong")


if __name__ == "__main__":
    run_command(main)
