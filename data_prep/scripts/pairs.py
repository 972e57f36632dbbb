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
Reads pairs of texts for training the retriever from jsonl files, the Hub, public collections or a datastore.

```bash
retro pairs --sources train.jsonl.gz --output_dir pairs              # read, check and store
retro pairs --sources user/pairs --columns question answer --output_dir pairs
retro pairs --download WikiAnswers --output_dir collections          # a set of recipes/sentence_pairs.tsv
retro pairs --datastore datastore --output_dir pairs                 # no labels: from the documents themselves
```

A pair set is a `datasets.Dataset` with the columns `anchor` and `positive`. It may have hard negatives `negative_1`,
`negative_2`, …, of which all rows have the same number. All of these may be tokenized, with names such as
`anchor_input_ids`. The columns `anchor_document_id`, `positive_document_id`, … are optional: with them, texts of one
document are not used as negatives of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class PairsArguments:
    """
    Arguments of `retro pairs`. Give one of `sources`, `download` and `datastore`.
    """

    output_dir: str = field(metadata={"help": "Folder to write; for `download`, the folder of the files."})
    sources: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files .jsonl, .json, .csv or .tsv[.gz|.zst], a folder of `save_to_disk`, or a Hub dataset."
        },
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of anchor, positive and hard negatives, if they have other names."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the label, if it is not label, labels, is_duplicate or score."}
    )
    min_score: float | None = field(
        default=None, metadata={"help": "Lowest label or score of two texts that belong together. By default 0 or 1."}
    )
    split: str = field(default="train", metadata={"help": "Split of the Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the Hub dataset."})
    num_negatives: int | None = field(
        default=None, metadata={"help": "Number of hard negatives. Defaults to that of the first record."}
    )
    skip_bad_lines: bool = field(default=False, metadata={"help": "Leave malformed lines out instead of stopping."})
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes that read the files, and share their lines."}
    )
    download: list[str] | None = field(default=None, metadata={"help": "Names of sets in the recipe to download."})
    recipe: str | None = field(
        default=None, metadata={"help": "List of sets: name, pairs, weight, path. By default that of the package."}
    )
    datastore: str | None = field(default=None, metadata={"help": "Datastore to make pairs of chunks from."})
    kinds: list[str] = field(
        default_factory=lambda: ["continuation", "entity", "title"],
        metadata={"help": "Pairs of chunks to make: continuation, entity, title."},
    )
    max_documents: int = field(default=10, metadata={"help": "Names and titles in more documents are not used."})
    min_tokens: int = field(default=16, metadata={"help": "Shorter chunks are left out."})
    max_chunks: int = field(default=1_000_000, metadata={"help": "Largest number of chunks to use."})
    seed: int = field(default=0, metadata={"help": "Seed of the random choices among chunks."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(PairsArguments, argv=argv, description=__doc__, prog="retro pairs")
    from data_prep.pairs.collections import RECIPE_PATH, download_pairs
    from data_prep.pairs.corpus import pairs_from_datastore
    from data_prep.pairs.pairs import load_pairs
    from modeling_retro import RetroDatastore
    from modeling_retro.durable_files_retro import whole

    if sum(given is not None for given in (arguments.sources, arguments.download, arguments.datastore)) != 1:
        raise ValueError("give one of --sources, --download and --datastore")
    if arguments.download is not None:
        for path in download_pairs(
            arguments.download, arguments.output_dir, arguments.recipe or RECIPE_PATH, revision=arguments.revision
        ):
            print(path)
        return
    if arguments.datastore is not None:
        pairs = pairs_from_datastore(
            RetroDatastore.from_pretrained(arguments.datastore),
            kinds=arguments.kinds,
            max_documents=arguments.max_documents,
            min_tokens=arguments.min_tokens,
            max_chunks=arguments.max_chunks,
            seed=arguments.seed,
        )
    else:
        pairs = load_pairs(
            arguments.sources,
            columns=arguments.columns,
            split=arguments.split,
            revision=arguments.revision,
            num_negatives=arguments.num_negatives,
            skip_bad_lines=arguments.skip_bad_lines,
            num_proc=arguments.num_proc,
            label_column=arguments.label_column,
            min_score=arguments.min_score,
        )
    with whole(Path(arguments.output_dir)) as temporary:
        pairs.save_to_disk(temporary)
    print(f"{len(pairs)} pairs with the columns {', '.join(pairs.column_names)}")


if __name__ == "__main__":
    run_command(main)
