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
Generating 448 tokens after a prompt of 64 with retrieval at every chunk, against RETRO-pytorch's sampler, and ON
against OFF. Retrieval itself costs nothing here on either side: neighbors come from a table.

    python benchmarks/generation.py --repeats 3
"""

import argparse

import torch
from retro_pytorch_peer import (
    CHUNK_SIZE,
    NEIGHBOR_LENGTH,
    NUM_NEIGHBORS,
    SEQ_LEN,
    VOCAB_SIZE,
    forward_flops,
    load_peer,
    make_model,
    median_seconds,
)


class TableRetriever:
    """The same neighbors for every chunk."""

    def __init__(self):
        self.neighbors = torch.randint(1, VOCAB_SIZE, (NUM_NEIGHBORS, NEIGHBOR_LENGTH))

    def retrieve(self, chunk_input_ids, k):
        self.neighbor_input_ids = self.neighbors.expand(len(chunk_input_ids), -1, -1)
        self.neighbor_attention_mask = torch.ones_like(self.neighbor_input_ids, dtype=torch.bool)
        return self


def check_length(sequences: torch.Tensor) -> None:
    if sequences.shape[1] != SEQ_LEN:
        raise RuntimeError(f"generated up to {sequences.shape[1]} tokens, not {SEQ_LEN}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    retriever = TableRetriever()
    peer, wrapper_class = load_peer()
    peer.eval()
    wrapper = wrapper_class.__new__(wrapper_class)
    torch.nn.Module.__init__(wrapper)
    wrapper.retro, wrapper.chunk_size, wrapper.max_seq_len = peer, CHUNK_SIZE, SEQ_LEN - 1
    wrapper.fetch_knn_chunks_fn = lambda chunks: retriever.retrieve(chunks, NUM_NEIGHBORS).neighbor_input_ids
    ours = make_model().eval()
    ours.set_retriever(retriever)
    prompt = torch.randint(1, VOCAB_SIZE, (1, CHUNK_SIZE))
    # The peer keeps the likeliest tenth of the vocabulary.
    sampling = {"do_sample": True, "top_k": VOCAB_SIZE // 10, "max_new_tokens": SEQ_LEN - CHUNK_SIZE}

    def on():
        check_length(ours.generate(prompt, **sampling))

    def off():
        with ours.retrieval(False):
            check_length(ours.generate(prompt, **sampling))

    functions = {"peer": lambda: check_length(wrapper.generate(prompt)), "on": on, "off": off}
    seconds = median_seconds(functions, arguments.repeats, warm_up=False)
    on, off = (forward_flops(ours, 1, SEQ_LEN, neighbors=neighbors) for neighbors in (True, False))
    new = SEQ_LEN - CHUNK_SIZE
    print(f"{torch.get_num_threads()} threads, {new} tokens after {CHUNK_SIZE}")
    print(f"RETRO-pytorch  {seconds['peer']:7.2f} s   {new / seconds['peer']:7.1f} tokens/s")
    print(f"this package   {seconds['on']:7.2f} s   {new / seconds['on']:7.1f} tokens/s")
    print(f"ratio          {seconds['peer'] / seconds['on']:7.1f} x")
    print(f"ON / OFF       {seconds['on'] / seconds['off']:7.2f} x, by operations {on / off:.2f} x")


if __name__ == "__main__":
    main()
