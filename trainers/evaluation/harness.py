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
"""RETRO models in the [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness)."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from modeling_retro import RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.joint_call_retro import begin_before_passages
from modeling_retro.retriever.retriever import RetroRetriever, open_datastore
from trainers.load_model import load_retro_model

from ..prompts import split_beginning
from .questions import encode_passages


# In the place of tokens in front of a question, which the model does not see but counts.
HIDDEN = -1
# Between a prompt and the number of its request, whose document may hold passages.
MARK = "\0"


@register_model("retro")
class RetroLM(HFLM):
    """
    A RETRO model as the harness evaluates it. Without retrieval it answers as the harness's own `hf` does for the
    decoder.

    With retrieval, the last chunk of the context of a question, or all of a shorter one, is looked up. A
    [`RetroJointForCausalLM`] reads the whole question and the answer with these passages in sight. For a
    [`RetroForCausalLM`] the context is padded on the left to whole chunks, with padding that the model does not see,
    and every chunk that a request completes is looked up (see [`RetroRetriever.close_chunks`]). Texts whose likelihood
    is asked for as a whole are not padded, and their chunks are looked up.

    A task that generates may bring the passages of its questions itself, as texts in the field `passages` of its
    documents. Nothing is looked up for these.

    Args:
        pretrained (`str` or [`~transformers.PreTrainedModel`]):
            Folder or Hub id of a RETRO model or of any causal language model, or a RETRO model.
        datastore (`str` or [`RetroDatastore`]):
            Folder or Hub id of the datastore, or the datastore. Texts are tokenized with its tokenizer.
        k (`int`, *optional*, defaults to 2):
            Number of neighbors of a chunk.
        retrieval (`bool`, *optional*, defaults to `True`):
            Whether to look up neighbors.
        in_front (`bool`, *optional*, defaults to `False`):
            Whether the model runs without retrieval and has the neighbors of the end of a question in front of it, as
            one would do without RETRO. Texts whose likelihood is asked for as a whole have none.
        passages (`str`, *optional*, defaults to `"apart"`):
            How a [`RetroJointForCausalLM`] reads the passages of a question: `"apart"`, or `"in_order"`, as one text.
        reader (`str`, *optional*):
            Adapters that were trained to read neighbors, for a model that is wrapped.
        reread_tokens (`int`, *optional*):
            Number of tokens at the end of a chunk that are read again (see [`RetroJointConfig`]). Defaults to that of
            the model.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the model.
        device (`str`, *optional*):
            Where the model computes; an accelerator if there is one.
        kwargs:
            Passed to `HFLM`: `batch_size`, `max_length`, `add_bos_token`, …

    Raises:
        ValueError: If the model does not fit the datastore, if `k` is below 1, or if `in_front` has no retrieval.

    Example:

    ```python
    >>> import lm_eval
    >>> from trainers import RetroLM

    >>> model = RetroLM("path/to/model", "path/to/datastore", k=2, batch_size=8)
    >>> results = lm_eval.simple_evaluate(model, tasks=["lambada_openai"])
    ```"""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        datastore: str | RetroDatastore,
        k: int = 2,
        retrieval: bool = True,
        in_front: bool = False,
        passages: str = "apart",
        reader: str | None = None,
        reread_tokens: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        **kwargs: Any,
    ):
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1; `retrieval=False` evaluates without neighbors")
        if in_front and not retrieval:
            raise ValueError("in_front is true and retrieval false; neighbors in front of a question are looked up")
        if isinstance(datastore, str):
            datastore = open_datastore(datastore)
        if isinstance(pretrained, str):
            reading = {"reader": reader, "reread_tokens": reread_tokens}
            pretrained = load_retro_model(pretrained, datastore, dtype=getattr(torch, dtype), **reading)
        pretrained = pretrained.to(device or PartialState().device)
        pretrained.config.num_neighbors = k
        self.retriever = RetroRetriever(datastore) if retrieval else None
        self.in_front = in_front
        self.passages = passages
        self.is_joint = isinstance(pretrained, RetroJointForCausalLM)
        self._documents: list[dict[str, Any]] = []  # those of the requests that are answered
        self._in_sight: dict[str, Any] = {}  # the passages of the batch that is answered
        pretrained.set_retriever(None if in_front else self.retriever)
        # The harness sets a pad token, which the datastore's tokenizer must not have from then on.
        super().__init__(pretrained, tokenizer=copy.deepcopy(datastore.tokenizer), backend="causal", **kwargs)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        if self.retriever is not None:
            requests = [
                # Windows of a whole text have no question.
                (texts, context, answer)
                if texts is None
                else (texts, self._looked_up(context, self.max_length + 1 - len(answer)), answer)
                for texts, context, answer in requests
            ]
        return super()._loglikelihood_tokens(requests, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers requests. Each is numbered, so that the passages of its document are found when it is tokenized."""
        self._documents = [request.doc for request in requests]
        marked = [
            replace(request, arguments=(f"{request.args[0]}{MARK}{number}", *request.args[1:]))
            for number, request in enumerate(requests)
        ]
        return super().generate_until(marked, disable_tqdm=disable_tqdm)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (inps[:, 0] < 0).any():
            return super()._model_call(inps, *args, **kwargs)
        if self.is_joint:
            length = self.retriever.datastore.neighbor_length
            number = self.config.num_neighbors
            front, inps = inps.split([number * length, inps.shape[1] - number * length], dim=1)
            front = front.view(len(inps), number, length)
            inputs = {
                "passage_input_ids": (HIDDEN - 1 - front).clamp(min=0),
                "passage_attention_mask": front < HIDDEN,
                "passages": self.passages,
                **begin_before_passages(inps, None, self.tokenizer.bos_token_id),
            }
        else:
            mask = (inps != HIDDEN).long()
            # Contexts are whole chunks, so that each token has the position of its column.
            position_ids = torch.arange(inps.shape[1], device=inps.device).expand_as(inps) * mask
            inps = inps.masked_fill(mask == 0, self.tokenizer.pad_token_id)
            inputs = {"attention_mask": mask, "position_ids": position_ids}
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(inps, **inputs).logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        in_sight = {
            name: value.to(self.device) if torch.is_tensor(value) else value for name, value in self._in_sight.items()
        }
        if self.retriever is not None and not self.in_front and not self.is_joint:
            mask = kwargs["attention_mask"]
            missing = -mask.sum(-1, keepdim=True) % self.retriever.datastore.chunk_size
            kwargs["position_ids"] = (mask.cumsum(-1) - 1 + missing) * mask
        return super()._model_generate(context, *args, **kwargs, **in_sight)

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Tokens of prompts, padded on the left.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor]`: tokens and attention mask `[B, T]`.
        """
        numbered = [text.rpartition(MARK) for text in strings]
        strings = [text for text, _, _ in numbered]
        given = [self._documents[int(number)].get("passages") for _, _, number in numbered]
        self._in_sight = {}
        if self.retriever is None:
            return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)
        input_ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        room = left_truncate_len or self.max_length
        if self.is_joint and not self.in_front:
            passages, passage_mask = self._passages(rows, given)
            self._in_sight = {
                "passage_input_ids": passages,
                "passage_attention_mask": passage_mask,
                "passages": self.passages,
            }
            rows = [row[-self._room(room, mask.sum().item()) :] for row, mask in zip(rows, passage_mask, strict=True)]
        else:
            rows = [self._looked_up(row, room, texts) for row, texts in zip(rows, given, strict=True)]
        length = max(map(len, rows))
        input_ids = torch.tensor([[HIDDEN] * (length - len(row)) + row for row in rows])
        mask = input_ids != HIDDEN
        return input_ids.masked_fill(~mask, self.tokenizer.pad_token_id), mask.long()

    def _looked_up(self, tokens: list[int], max_tokens: int, given: Sequence[str] | None = None) -> list[int]:
        """
        A question as the model gets it: in whole chunks, with hidden tokens in front, or behind its passages. Those of
        a joint model are k·r negative numbers.
        """
        chunk_size = self.retriever.datastore.chunk_size
        if not self.in_front and not self.is_joint:
            if given:
                raise ValueError(
                    f"the document of a question holds passages, which a {type(self.model).__name__} cannot take; "
                    "evaluate it with in_front or retrieval=False, or wrap the model for joint reading"
                )
            if max_tokens < chunk_size:
                raise ValueError(
                    f"max_length is {self.max_length}, which leaves no whole chunk of {chunk_size} tokens for the "
                    "question"
                )
            tokens = tokens[-(max_tokens // chunk_size * chunk_size) :]
            return [HIDDEN] * (-len(tokens) % chunk_size) + tokens
        passages, mask = self._passages([tokens], [given])
        if self.in_front:
            before, tokens = split_beginning(tokens, self.tokenizer.bos_token_id)
            front = before + passages[mask].tolist()
        else:
            front = (HIDDEN - 1 - passages).masked_fill(~mask, HIDDEN).flatten().tolist()
        return front + tokens[-self._room(max_tokens, len(front)) :]

    def _passages(
        self, rows: Sequence[list[int]], given: Sequence[Sequence[str] | None]
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The passages `[B, k, r]` of questions: those of their documents, or what their last chunks find."""
        datastore = self.retriever.datastore
        found = []
        for tokens, texts in zip(rows, given, strict=True):
            if texts:
                found.append(encode_passages(self.tokenizer, [texts], datastore.neighbor_length))
                continue
            last = torch.full((1, datastore.chunk_size), self.tokenizer.pad_token_id)
            last[0, -len(tokens[-datastore.chunk_size :]) :] = torch.tensor(tokens[-datastore.chunk_size :])
            neighbors = self.retriever.retrieve(last, self.config.num_neighbors)
            found.append((neighbors.neighbor_input_ids, neighbors.neighbor_attention_mask))
        number = max(ids.shape[1] for ids, _ in found)
        padded = [
            [torch.nn.functional.pad(each, (0, 0, 0, number - each.shape[1])) for each in pair] for pair in found
        ]
        return torch.cat([ids for ids, _ in padded]), torch.cat([mask for _, mask in padded])

    def _room(self, max_tokens: int, num_front: int) -> int:
        """The number of tokens that a question may have behind its passages."""
        if max_tokens <= num_front:
            raise ValueError(
                f"max_length is {self.max_length}, which leaves no token for the question behind neighbors of "
                f"{num_front} tokens"
            )
        return max_tokens - num_front


__all__ = ["RetroLM"]
