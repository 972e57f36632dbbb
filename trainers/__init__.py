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
"""Training and measurement of the language models and of the retriever, and the command `retro`"""

from typing import TYPE_CHECKING

from modeling_retro import lazy_names, refuse_windows


refuse_windows(__name__)


if TYPE_CHECKING:
    from .evaluation.evaluate import evaluate_retro as evaluate_retro
    from .evaluation.harness import RetroLM as RetroLM
    from .evaluation.harness_tasks import write_tasks as write_tasks
    from .evaluation.in_front import in_front_bits as in_front_bits
    from .evaluation.knn_lm import build_knn_store as build_knn_store
    from .evaluation.knn_lm import neighbor_distribution as neighbor_distribution
    from .evaluation.operations import operations_per_token as operations_per_token
    from .evaluation.options import EvaluationOptions as EvaluationOptions
    from .evaluation.questions import hidden_questions as hidden_questions
    from .evaluation.report import RetroEvaluation as RetroEvaluation
    from .evaluation.report import bootstrap_interval as bootstrap_interval
    from .evaluation.rivals import evaluate_rivals as evaluate_rivals
    from .generation import format_chunks as format_chunks
    from .generation import generate_with_neighbors as generate_with_neighbors
    from .language_model.collator import ChunkRows as ChunkRows
    from .language_model.collator import DataCollatorForRetro as DataCollatorForRetro
    from .language_model.config import RetroTrainingArguments as RetroTrainingArguments
    from .language_model.muon import MuonWithAdamW as MuonWithAdamW
    from .language_model.streaming import RetroStreamTrainer as RetroStreamTrainer
    from .language_model.streaming import load_document_stream as load_document_stream
    from .language_model.teacher import teach as teach
    from .language_model.trainer import RetroTrainer as RetroTrainer
    from .language_model.trainer import config_for_datastore as config_for_datastore
    from .load_model import load_retro_model as load_retro_model
    from .retriever.collator import SiameseDataCollator as SiameseDataCollator
    from .retriever.config import RetrieverTrainingArguments as RetrieverTrainingArguments
    from .retriever.distillation import distill_encoder as distill_encoder
    from .retriever.hard_negatives import mine_negatives as mine_negatives
    from .retriever.losses import CachedMultipleNegativesRankingLoss as CachedMultipleNegativesRankingLoss
    from .retriever.losses import MultipleNegativesRankingLoss as MultipleNegativesRankingLoss
    from .retriever.neighbor_preference import mine_neighbors as mine_neighbors
    from .retriever.trainer import NoDuplicatesBatchSampler as NoDuplicatesBatchSampler
    from .retriever.trainer import RetrieverTrainer as RetrieverTrainer
    from .span_corruption import DataCollatorForSpanCorruption as DataCollatorForSpanCorruption


_MODULES = {
    "CachedMultipleNegativesRankingLoss": "retriever.losses",
    "ChunkRows": "language_model.collator",
    "DataCollatorForRetro": "language_model.collator",
    "DataCollatorForSpanCorruption": "span_corruption",
    "EvaluationOptions": "evaluation.options",
    "MultipleNegativesRankingLoss": "retriever.losses",
    "MuonWithAdamW": "language_model.muon",
    "NoDuplicatesBatchSampler": "retriever.trainer",
    "RetrieverTrainer": "retriever.trainer",
    "RetrieverTrainingArguments": "retriever.config",
    "RetroEvaluation": "evaluation.report",
    "RetroLM": "evaluation.harness",
    "RetroStreamTrainer": "language_model.streaming",
    "RetroTrainer": "language_model.trainer",
    "RetroTrainingArguments": "language_model.config",
    "SiameseDataCollator": "retriever.collator",
    "bootstrap_interval": "evaluation.report",
    "build_knn_store": "evaluation.knn_lm",
    "config_for_datastore": "language_model.trainer",
    "distill_encoder": "retriever.distillation",
    "evaluate_retro": "evaluation.evaluate",
    "evaluate_rivals": "evaluation.rivals",
    "format_chunks": "generation",
    "generate_with_neighbors": "generation",
    "hidden_questions": "evaluation.questions",
    "in_front_bits": "evaluation.in_front",
    "load_document_stream": "language_model.streaming",
    "load_retro_model": "load_model",
    "mine_negatives": "retriever.hard_negatives",
    "mine_neighbors": "retriever.neighbor_preference",
    "neighbor_distribution": "evaluation.knn_lm",
    "operations_per_token": "evaluation.operations",
    "teach": "language_model.teacher",
    "write_tasks": "evaluation.harness_tasks",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
__all__ = sorted(_MODULES)
