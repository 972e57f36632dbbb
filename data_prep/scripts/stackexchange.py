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
Turns a StackExchange dump into pairs for the retriever.

```bash
retro stackexchange --inputs astronomy.stackexchange.com.7z --output_dir astronomy
retro stackexchange --inputs stackoverflow.com-Posts.7z stackoverflow.com-PostLinks.7z --output_dir stackoverflow
retro stackexchange --inputs Posts.xml PostLinks.xml --output_dir site --min_answer_score 3
```

Writes `title_body.jsonl.gz`, `title_answer.jsonl.gz` (with the best answer to a question) and `duplicates.jsonl.gz`
(with the titles of a question and of the question that it repeats). Their lines are `["anchor", "positive"]`.

Posts are read as a stream. A text whose partner has not come yet waits in a temporary SQLite file beside the output,
so dumps of any size need the same memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class StackExchangeArguments:
    """
    Arguments of `retro stackexchange`.
    """

    inputs: list[str] = field(metadata={"help": "Archives .7z, or Posts.xml and PostLinks.xml, of one site."})
    output_dir: str = field(metadata={"help": "Folder for the files of pairs."})
    min_question_score: int = field(default=0, metadata={"help": "Questions with a lower score are left out."})
    min_answer_score: int = field(
        default=1,
        metadata={
            "help": "Answers with a lower score are left out, unless the asker accepted them and none is better."
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(StackExchangeArguments, argv=argv, description=__doc__, prog="retro stackexchange")
    from data_prep.pairs.stackexchange import stackexchange_pairs

    counts = stackexchange_pairs(
        arguments.inputs,
        arguments.output_dir,
        min_question_score=arguments.min_question_score,
        min_answer_score=arguments.min_answer_score,
    )
    for name, pairs in counts.items():
        print(f"{arguments.output_dir}/{name}.jsonl.gz: {pairs} pairs")


if __name__ == "__main__":
    run_command(main)
