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
"""Sharing a model on the Hub, which the package does and not the code that a saved model brings"""

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase


class RetroSharingMixin:
    """Makes `push_to_hub` of a RETRO model share everything that others need to run it."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        datastore: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        license: str | None = None,
        retrofit_only: bool = False,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """
        Uploads the model with its code, its tokenizer and its model card in one commit. A push that is interrupted
        changes nothing in the repository. When it is run again, it skips the weights that were already uploaded. The
        card contains the results of `retro evaluate` if `evaluation.json` in the folder of the model belongs to these
        weights. A card that was written by hand, in that folder or in the repository, is kept.

        Args:
            repo_id (`str`):
                Repository, `"user/name"`. It is created if it does not exist.
            datastore (`str`, *optional*):
                Datastore on the Hub, `"user/name"`, that `from_pretrained(..., retriever="auto")` will open, at its
                newest commit at the time of the push.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                Tokenizer to upload. Defaults to the one in the folder that the model was loaded from.
            license (`str`, *optional*):
                Licence in the metadata of the card, such as `"apache-2.0"`.
            retrofit_only (`bool`, *optional*, defaults to `False`):
                Whether to share only the weights that RETRO adds to its base (see
                [`~RetroRetrofitMixin.save_pretrained`]).
            commit_message (`str`, *optional*, defaults to `"Upload model"`):
                Summary of the commit.
            commit_description (`str`, *optional*):
                Description of the commit.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`bool` or `str`, *optional*):
                Access token. Defaults to the stored one or that of the environment.
            revision (`str`, *optional*):
                Branch. It is created if it does not exist.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead of a commit.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
                Largest size of a file of weights. Larger weights are split.
            tags (`list[str]`, *optional*):
                Further tags in the metadata of the card.

        Returns:
            `CommitInfo`: the commit. Its `oid` names the version that was pushed.

        Raises:
            ValueError: If the repository holds another kind of model, or the datastore does not fit this model.
        """
        try:
            from modeling_retro.sharing.model_hub import push_model
        except ImportError as error:
            raise ImportError(
                f"`push_to_hub` needs the package ({error}): `pip install retro-transformers[cpu]`"
            ) from error
        return push_model(
            self,
            repo_id,
            datastore=datastore,
            tokenizer=tokenizer,
            license=license,
            retrofit_only=retrofit_only,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=tags,
        )


__all__ = ["RetroSharingMixin"]
