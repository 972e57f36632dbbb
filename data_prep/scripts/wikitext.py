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
Writes the texts of a data set as lines `{"text": ...}` in one file for each split:

    retro wikitext --output_dir data/
    retro chunk --input data/wikitext_train.jsonl ...

Any data set of texts on the Hub or on the disk can replace WikiText:

    retro wikitext --source my_texts/ --name mine --output_dir data/
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class WikitextArguments:
    """
    Arguments of `retro wikitext`.

    Args:
        output_dir (`str`):
            Folder of `{name}_{split}.jsonl`.
        source (`str`, *optional*, defaults to `"Salesforce/wikitext"`):
            Name of a data set on the Hub, or a file or folder of text, jsonl, csv or parquet files.
        dataset_config (`str`, *optional*):
            Configuration of the data set. Defaults to `"wikitext-103-raw-v1"` for WikiText, else to none.
        splits (`list[str]`, *optional*):
            Which splits to write. Defaults to all there are.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.
        longer_than (`int`, *optional*, defaults to 100):
            Only rows of more characters are written; WikiText's shorter ones are headings and blank lines.
        name (`str`, *optional*, defaults to `"wikitext"`):
            First part of the names of the files.
    """

    output_dir: str = field(metadata={"help": "Folder of the files {name}_{split}.jsonl."})
    source: str = field(
        default="Salesforce/wikitext",
        metadata={"help": "Name of a data set on the Hub, or a file or folder of text, jsonl, csv or parquet files."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the data set; wikitext-103-raw-v1 for WikiText, else none."},
    )
    splits: list[str] | None = field(default=None, metadata={"help": "Splits to write; all there are if not given."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    longer_than: int = field(default=100, metadata={"help": "Only rows of more characters are written."})
    name: str = field(default="wikitext", metadata={"help": "First part of the names of the files."})


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_arguments(WikitextArguments, argv=argv, description=__doc__, prog="retro wikitext")
    from data_prep.span_corruption.tasks import open_texts
    from data_prep.span_corruption.wikitext import write_texts

    config = args.dataset_config
    if config is None and args.source == WikitextArguments.source:
        config = "wikitext-103-raw-v1"
    splits = open_texts(args.source, config)
    if args.splits is not None:
        if missing := [split for split in args.splits if split not in splits]:
            raise ValueError(f"{args.source} has no split {', '.join(missing)}; it has {', '.join(splits)}")
        splits = {split: splits[split] for split in args.splits}
    written = write_texts(splits, args.output_dir, args.name, args.text_column, args.longer_than)
    for split, count in written.items():
        print(f"{Path(args.output_dir, f'{args.name}_{split}.jsonl')}: {count:,} rows")


if __name__ == "__main__":
    run_command(main)
