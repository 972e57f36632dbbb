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
Shows the passages of a datastore that answer a question or resemble a text, and where they come from. Passages of the
same text count once.

    retro search datastore "How do I save a checkpoint?"
    retro search datastore "How do I save a checkpoint?" "What is a chunk?" --k 2 --json
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from data_prep.arguments import name_leading_words, parse_arguments, run_command


@dataclass
class SearchArguments:
    """
    Arguments of `retro search`.
    """

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore, or address of a database."})
    text: list[str] = field(metadata={"help": "Texts to look up, of any length."})
    k: int = field(default=4, metadata={"help": "Number of passages for each text."})
    retriever: str | None = field(
        default=None,
        metadata={
            "help": "How passages are found. Defaults to dense, or bm25 without an index of embeddings.",
            "choices": ["dense", "bm25", "hybrid", "rerank"],
        },
    )
    json: bool = field(default=False, metadata={"help": "Print a line of JSON for each passage, with its whole text."})


def main(argv: Sequence[str] | None = None) -> None:
    argv = name_leading_words(argv, "datastore", "text")
    (arguments,) = parse_arguments(SearchArguments, argv=argv, description=__doc__, prog="retro search")
    if arguments.k < 1:
        raise ValueError(f"--k is {arguments.k}, expected at least 1")
    from modeling_retro import RetroRetriever

    retriever = RetroRetriever.from_pretrained(arguments.datastore, retriever=arguments.retriever)
    for text, passages in zip(arguments.text, retriever.search(arguments.text, arguments.k), strict=True):
        if len(arguments.text) > 1 and not arguments.json:
            print(f"== {text}")
        for rank, passage in enumerate(passages, start=1):
            if arguments.json:
                source = passage.source.to_dict() if passage.source is not None else None
                print(json.dumps({"query": text, "rank": rank, **asdict(passage), "source": source}))
                continue
            source = str(passage.source or f"document {passage.document_id}")
            print(f"{rank}. {source} ({passage.score:.2f})")
            print(textwrap.indent(textwrap.fill(passage.text.strip(), 100), "   "))


if __name__ == "__main__":
    run_command(main)
