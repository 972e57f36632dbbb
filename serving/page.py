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
"""Shows a reading as HTML: tokens colored by their worth, and the neighbors of the chunk under the cursor"""

import itertools
from html import escape

from .reading import Neighbor, Piece, Reading, StepCounter, Stretch


# Number of bits from which on a token has the full color.
FULL_BITS = 4.0
# Blue and orange, which people who cannot distinguish red and green can distinguish.
HELPED, HARMED = (38, 132, 255), (255, 122, 26)

_names = itertools.count()

CSS = """
.retro { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; position: relative; }
.retro > div { flex: 1 1 280px; min-width: 0; box-sizing: border-box; }
.retro input { position: absolute !important; left: 0; top: 0; width: 1px !important; height: 1px !important;
  min-width: 0 !important; margin: 0 !important; border: 0 !important; opacity: 0; pointer-events: none; }
.retro .retro-plain { padding-bottom: 12px; }
.retro-text, .retro-plain { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; line-height: 1.75;
  border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 12px 64px; position: relative; }
.retro-text label { display: inline; cursor: pointer; font: inherit; color: inherit; }
.retro-text span { border-radius: 3px; }
.retro-text .generated { border-bottom: 1px dotted currentColor; }
.retro-text label:hover { box-shadow: 0 2px 0 0 var(--body-text-color-subdued); }
.retro-text::after, .retro-text span[data-worth]:hover::after { position: absolute; left: 0; right: 0; bottom: 0;
  padding: 4px 12px; font-size: 13px; line-height: 1.6; white-space: normal; border-radius: 0 0 8px 8px;
  border-top: 1px solid var(--border-color-primary); background: var(--background-fill-secondary);
  color: var(--body-text-color-subdued); }
.retro-text::after { content: "Point at a token: its worth and its neighbors. Click to keep them."; }
.retro-text span[data-worth]:hover::after { content: attr(data-worth); color: var(--body-text-color); z-index: 1; }
.retro-panel { display: none; }
.retro-panel h4 { margin: 0 0 8px; font-size: 14px; font-weight: 600; }
.retro-neighbor { border-left: 3px solid rgb(38, 132, 255); padding: 2px 0 2px 10px; margin-bottom: 14px; }
.retro-neighbor small { display: block; font-size: 12px; color: var(--body-text-color-subdued); margin-bottom: 4px; }
.retro-neighbor div { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; line-height: 1.55;
  max-height: 16em; overflow-y: auto; }
.retro-neighbor mark { background: rgba(250, 204, 21, 0.45); color: inherit; border-radius: 3px; }
.retro-legend { font-size: 13px; color: var(--body-text-color-subdued); line-height: 2; }
.retro-legend span { border-radius: 3px; padding: 1px 6px; color: var(--body-text-color); }
.retro-legend mark { background: rgba(250, 204, 21, 0.45); color: var(--body-text-color); border-radius: 3px;
  padding: 1px 6px; }
"""


def background(worth: float) -> str:
    """The background color, as CSS, of a token whose neighbors saved `worth` bits."""
    red, green, blue = HELPED if worth > 0 else HARMED
    return f"rgba({red}, {green}, {blue}, {min(1.0, abs(worth) / FULL_BITS) * 0.7:.2f})"


def legend() -> str:
    """A legend of the colors."""
    helped, harmed = background(FULL_BITS), background(-FULL_BITS)
    return (
        '<div class="retro-legend">'
        f'<span style="background: {helped}">neighbors made the token likelier</span> '
        f'<span style="background: {harmed}">less likely</span> '
        f"full color from {FULL_BITS:.0f} bits on · dotted below: generated · "
        "<mark>in the neighbor and in the text that read it</mark></div>"
    )


def reading_html(reading: Reading) -> str:
    """
    Shows the text of a reading, and beside it the neighbors of one of its chunks. This is the chunk under the cursor,
    or else the chunk that was clicked, or else the last chunk that read neighbors.

    Args:
        reading ([`Reading`]): The text.

    Returns:
        `str`: HTML for a page with [`CSS`].
    """
    name = f"retro{next(_names)}"
    stretches = reading.stretches
    chosen = max((n for n, stretch in enumerate(stretches) if stretch.neighbors), default=0)
    radios, labels, panels, rules = [], [], [], []
    for n, stretch in enumerate(stretches):
        checked = " checked" if n == chosen else ""
        radios.append(
            f'<input type="radio" name="{name}" id="{name}-{n}" aria-label="neighbors of chunk {n}"{checked}>'
        )
        tokens = "".join(map(_token, stretch.pieces))
        labels.append(f'<label for="{name}-{n}" class="c{n}">{tokens}</label>')
        panels.append(f'<div class="retro-panel p{n}">{_panel(n, stretch, reading.is_question)}</div>')
        # The chunk under the cursor has priority over the one that was clicked.
        rules += [
            f"#{name}:not(:has(label:hover)):has(#{name}-{n}:checked) .p{n} {{ display: block; }}",
            f"#{name}:has(.c{n}:hover) .p{n} {{ display: block; }}",
            f"#{name}:has(#{name}-{n}:focus-visible) .c{n} {{ outline: 2px solid rgb(38, 132, 255); }}",
        ]
    return (
        f'<style>{"".join(rules)}</style><div class="retro" id="{name}">{"".join(radios)}'
        f'<div class="retro-text">{"".join(labels)}</div><div>{"".join(panels)}</div></div>'
    )


def steps_html(steps: StepCounter) -> str:
    """Says in how many steps drafts write a continuation."""
    if steps.num_steps == 0:
        return ""
    return (
        f'<div class="retro-legend">{steps.num_tokens} tokens. With drafts from the neighbors they take '
        f"{steps.num_steps} steps: {steps.num_tokens / steps.num_steps:.1f} tokens a step.</div>"
    )


def plain_html(prompt: str, continuation: str) -> str:
    """Shows a prompt and its continuation without neighbors."""
    return (
        f'<div class="retro"><div class="retro-plain">{escape(prompt)}'
        f'<span style="border-bottom: 1px dotted currentColor">{escape(continuation)}</span></div></div>'
    )


def _token(piece: Piece) -> str:
    probability = 100 * 2**-piece.bits_on, 100 * 2**-piece.bits_off
    tip = f"{piece.worth:+.2f} bits: {probability[0]:.1f} % with neighbors, {probability[1]:.1f} % without"
    kind = "" if piece.is_given else ' class="generated"'
    style = f' style="background: {background(piece.worth)}"' if abs(piece.worth) >= 0.05 else ""
    return f'<span data-worth="{tip}" title="{tip}"{kind}{style}>{escape(piece.text)}</span>'


def _panel(number: int, stretch: Stretch, is_question: bool) -> str:
    if not stretch.neighbors:
        before = ": nothing had been looked up before it." if number == 0 else "."
        return f"<h4>Chunk {number + 1} read no neighbors{before}</h4>"
    worth = sum(piece.worth for piece in stretch.pieces)
    what = "what was found for the question" if is_question else f"the neighbors of chunk {number}"
    heading = f"Chunk {number + 1} read {what}, worth {worth:+.1f} bits"
    return f"<h4>{heading}</h4>" + "".join(map(_neighbor, stretch.neighbors))


def _neighbor(neighbor: Neighbor) -> str:
    text = "".join(f"<mark>{escape(part)}</mark>" if copied else escape(part) for part, copied in neighbor.parts)
    return (
        f'<div class="retro-neighbor"><small>{escape(neighbor.source)} · score {neighbor.score:.2f}</small>'
        f"<div>{text}</div></div>"
    )
