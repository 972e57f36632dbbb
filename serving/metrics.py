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
"""The counters of the server, in the format of Prometheus"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import CompletionEngine


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """
    Counters of a server.

    Args:
        engine ([`CompletionEngine`]): The engine of the server.
    """

    def __init__(self, engine: CompletionEngine):
        self.registry = CollectorRegistry()
        self.requests = self._make(Counter, "retro_requests", "Requests", ["path", "status"])
        self.prompt_tokens = self._make(Counter, "retro_prompt_tokens", "Tokens of prompts")
        self.generated_tokens = self._make(Counter, "retro_generated_tokens", "Tokens generated")
        self.steps = self._make(
            Counter, "retro_decoding_steps", "Forward passes that chose generated tokens, counted for each completion"
        )
        self.drafted_tokens = self._make(Counter, "retro_drafted_tokens", "Tokens drafted from neighbors and text")
        self.confirmed_tokens = self._make(Counter, "retro_confirmed_tokens", "Drafted tokens that were confirmed")
        self.retrieved_chunks = self._make(Counter, "retro_retrieved_chunks", "Chunks looked up")
        self.cancelled = self._make(Counter, "retro_cancelled_requests", "Requests whose client left")
        self.first_token = self._make(
            Histogram, "retro_time_to_first_token_seconds", "Time to the first token", buckets=SECONDS
        )
        self.duration = self._make(Histogram, "retro_request_seconds", "Time of a whole request", buckets=SECONDS)
        running = self._make(Gauge, "retro_running_completions", "Completions that run")
        running.set_function(lambda: engine.num_running)
        waiting = self._make(Gauge, "retro_waiting_completions", "Completions that wait")
        waiting.set_function(lambda: engine.num_waiting)
        kept = self._make(Gauge, "retro_state_bytes", "Size of the states of neighbors and rows that are kept")
        kept.set_function(lambda: engine.state_bytes)

    def _make(self, kind: type, name: str, text: str, labels: tuple[str, ...] | list[str] = (), **options):
        return kind(name, text, labels, registry=self.registry, **options)

    def text(self) -> bytes:
        """All counters in the format of Prometheus."""
        return generate_latest(self.registry)
