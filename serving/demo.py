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
"""The functions of the page of `retro demo`, and the page itself"""

from collections.abc import Iterator

import gradio as gr

from modeling_retro import RetroJointForCausalLM
from modeling_retro.durable_files_retro import public_name
from trainers.generation import short_question
from trainers.prompts import PromptEncoder

from .load import LoadedModel
from .page import CSS, legend, plain_html, reading_html, steps_html
from .reading import continue_both_ways, read_text
from .sampling import SamplingParameters


# Largest number of tokens of a text that is measured.
MAX_TEXT_TOKENS = 1024


class Demo:
    """
    The functions of the page, without the page.

    Args:
        loaded ([`LoadedModel`]): Model and datastore.
        model (`str`, *optional*): Name of the model on the page.
        datastore (`str`, *optional*): Name of the datastore on the page.
    """

    def __init__(self, loaded: LoadedModel, model: str = "The model", datastore: str = "its datastore"):
        # Only the last part of a folder is shown.
        self.model_name, self.datastore_name = public_name(model), public_name(datastore)
        self.model = loaded.model
        self.retriever = loaded.retriever
        self.end_tokens = loaded.end_tokens
        self.prompts = PromptEncoder(loaded.retriever.datastore.tokenizer)

    def example(self) -> str:
        """An example of a prompt: the first whole chunk of the held-out documents, or else one of the datastore."""
        datastore = self.retriever.datastore
        name = "validation" if "validation" in datastore.manifest.splits else "train"
        chunks = datastore.split(name).chunks
        is_whole = chunks.length == datastore.chunk_size
        ids, mask = chunks.take([int(is_whole.argmax())])
        return datastore.tokenizer.decode(ids[0][mask[0]].tolist(), skip_special_tokens=True)

    def continue_prompt(
        self, prompt: str, num_neighbors: int, temperature: float, max_tokens: int, seed: int
    ) -> Iterator[tuple[str, str]]:
        """
        Continues a prompt with neighbors and without. A question of less than a chunk is looked up by its own text.

        Yields:
            `tuple[str, str]`: HTML of the text with neighbors and of the text without.

        Raises:
            ValueError: If the prompt is empty or too long.
        """
        ids = self._encode(prompt)
        sampling = SamplingParameters(temperature=temperature, top_p=0.95, seed=seed)
        tokenizer, query = self.retriever.datastore.tokenizer, None
        # A model with cross attention reads neighbors from the next chunk on.
        reads_jointly = isinstance(self.model, RetroJointForCausalLM)
        question = short_question(prompt, tokenizer, self.model.config.chunk_size) if reads_jointly else None
        if question is not None:
            query = self.prompts.encode_query(question)
        arguments = (ids, num_neighbors, max_tokens, sampling, self.end_tokens, query)
        for comparison in continue_both_ways(self.model, self.retriever, *arguments):
            yield reading_html(comparison.on) + steps_html(comparison.steps), plain_html(prompt, comparison.off)

    def measure_text(self, text: str, num_neighbors: int) -> tuple[str, str]:
        """
        Measures a text with neighbors and without.

        Returns:
            `tuple[str, str]`: a sentence in Markdown, and HTML of the text.

        Raises:
            ValueError: If the text is empty or too long.
        """
        reading = read_text(self.model, self.retriever, self._encode(text), num_neighbors)
        on, off = reading.bits_per_byte()
        return (
            f"**{on:.3f}** bits per byte with neighbors, **{off:.3f}** without: neighbors saved {off - on:+.3f}",
            reading_html(reading),
        )

    def _encode(self, text: str) -> list[int]:
        ids = self.prompts.encode_text(text)
        if len(ids) > MAX_TEXT_TOKENS:
            raise ValueError(f"the text has {len(ids)} tokens, more than the {MAX_TEXT_TOKENS} that this page takes")
        return ids


def create_page(demo: Demo) -> gr.Blocks:
    """
    Makes the page as a gradio app.

    Args:
        demo ([`Demo`]): The functions of the page.
    """
    size = demo.retriever.datastore.chunk_size
    num_chunks = len(demo.retriever.datastore.chunks)

    def continue_prompt(*arguments) -> Iterator[tuple[str, str]]:
        try:
            yield from demo.continue_prompt(*arguments)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def measure_text(*arguments) -> tuple[str, str]:
        try:
            return demo.measure_text(*arguments)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def neighbors_slider() -> gr.Slider:
        value = max(1, demo.model.config.num_neighbors)
        return gr.Slider(0, 8, value=value, step=1, label="k: neighbors of each chunk", min_width=150)

    example = demo.example()
    with gr.Blocks(title="RETRO: what looking up is worth") as page:
        gr.Markdown(
            f"# What looking up is worth\n{demo.model_name} looks up each {size} tokens that it has read among "
            f"{num_chunks:,} chunks of {demo.datastore_name}, and reads the neighbors while it predicts the next "
            f"{size}. "
            f"A question of fewer tokens is looked up at once, and its answer reads what was found."
        )
        gr.HTML(f"<style>{CSS}</style>{legend()}")
        with gr.Tab("Continue a prompt"):
            prompt = gr.Textbox(example, label="Prompt", lines=4, max_lines=10)
            with gr.Row():
                k = neighbors_slider()
                temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0: likeliest)", min_width=150)
                length = gr.Slider(size, 8 * size, value=2 * size, step=size, label="Tokens", min_width=150)
                seed = gr.Number(0, precision=0, label="Seed", min_width=80)
            with gr.Row():
                go = gr.Button("Continue", variant="primary")
                stop = gr.Button("Stop")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    gr.Markdown("### With neighbors")
                    on = gr.HTML(elem_id="on")
                with gr.Column(scale=1, min_width=280):
                    gr.Markdown("### Without")
                    off = gr.HTML(elem_id="off")
            running = go.click(
                continue_prompt, [prompt, k, temperature, length, seed], [on, off], show_progress="minimal"
            )
            stop.click(None, cancels=running)
        with gr.Tab("Measure a text"):
            text = gr.Textbox(label="Text", lines=8, max_lines=20, placeholder="Paste a text of some hundred words.")
            text_k = neighbors_slider()
            measure = gr.Button("Measure", variant="primary")
            sentence, reading = gr.Markdown(elem_id="sentence"), gr.HTML(elem_id="reading")
            measure.click(measure_text, [text, text_k], [sentence, reading], show_progress="minimal")
    return page
