"""Sliders that need neither kernel nor network: every frame is drawn once, a few lines of script show one at a time."""

import base64
import hashlib
import html
import itertools
import json
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchtop.plots import png
from benchtop.report import display

MOST_FRAMES = 12
MOST_BYTES = 120_000

# The same output is alive in JupyterLab, Colab, VS Code and the static page: it depends on nothing but the browser.
SCRIPT = """(function(){{
var box=document.getElementById("{id}");if(!box)return;
var knobs=box.querySelectorAll("input"),frames=box.querySelectorAll("img");
function turn(){{var k=0;knobs.forEach(function(s){{var names=JSON.parse(s.dataset.values);
k=k*names.length+Number(s.value);s.setAttribute("aria-valuetext",names[s.value]);
box.querySelector('output[for="'+s.id+'"]').textContent=names[s.value];}});
frames.forEach(function(f,i){{f.hidden=i!==k;}});}}
knobs.forEach(function(s){{s.addEventListener("input",turn);}});turn();}})();"""


def explore(
    draw: Callable[..., Figure], *, alt: str | Callable[..., str], colours: int = 24, **values: list[Any]
) -> None:
    """A figure with one or two sliders, for a reader with a kernel or without.

    ``draw(name=value, ...)`` returns a figure; each keyword gives the values of one slider, in order. ``alt`` is a
    template (``"Spectrum at rank {rank}"``) or a function of the same keywords. ``colours``: see `plots.png`.
    Raises ValueError beyond two sliders, 12 frames or 120 KB: those are the limits of a pleasant page.
    """
    if not 1 <= len(values) <= 2:
        raise ValueError(
            f"explore got {len(values)} sliders: give the values of one or two, explore(draw, rank=[1, 2, 4])"
        )
    settings = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    if not 2 <= len(settings) <= MOST_FRAMES:
        raise ValueError(f"explore would draw {len(settings)} frames: choose values that give 2 to {MOST_FRAMES}")
    describe = alt.format if isinstance(alt, str) else alt
    alts = [describe(**setting) for setting in settings]
    frames = [base64.b64encode(png(draw(**setting), colours)).decode() for setting in settings]
    page = slider_html(frames, alts, {name: [_word(v) for v in row] for name, row in values.items()})
    if len(page) > MOST_BYTES:
        raise ValueError(
            f"the slider has {len(page) // 1000} KB, the limit is {MOST_BYTES // 1000}: fewer frames or a smaller figsize"
        )
    display({"text/html": page, "text/plain": f"[slider over {', '.join(values)}: {alts[0]} ...]"})


def slider_html(frames: list[str], alts: list[str], values: dict[str, list[str]]) -> str:
    """The output itself: ``frames`` are base64 PNGs in row-major order of ``values`` (slider name -> words)."""
    key = "explore-" + hashlib.sha256("".join([*frames, *alts]).encode()).hexdigest()[:10]
    knobs = "".join(_knob(f"{key}-{i}", name, words) for i, (name, words) in enumerate(values.items()))
    pictures = "".join(
        f'<img src="data:image/png;base64,{frame}" alt="{html.escape(alt)}"{" hidden" if i else ""} style="max-width:100%">'
        for i, (frame, alt) in enumerate(zip(frames, alts))
    )
    return f'<div id="{key}" class="benchtop-explore">{knobs}<div>{pictures}</div></div><script>{SCRIPT.format(id=key)}</script>'


def _knob(key: str, name: str, words: list[str]) -> str:
    name, names = html.escape(name.replace("_", " ")), html.escape(json.dumps(words))
    return (
        f'<p><label for="{key}">{name}</label> '
        f'<input type="range" id="{key}" min="0" max="{len(words) - 1}" value="0" step="1" data-values="{names}" '
        f'aria-valuetext="{html.escape(words[0])}" autocomplete="off"> <output for="{key}">{html.escape(words[0])}</output></p>'
    )


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
