"""The parts of the page: what is chosen, the pictures with their buttons, the picture to paint on."""
import html
from typing import Any

import numpy as np

from autoregressive.serve.page_jobs import (
    EXAMPLE_PROMPTS,
    class_choices,
    defaults_of,
    edit_note,
    enlarged,
    facts_of_card,
)
from autoregressive.serve.page_style import EMPTY, PAINT, SHARP
from autoregressive.serve.progress import Progress
from autoregressive.serve.protocol import MOST_IMAGES, ModelCard

VALUES = ("chosen", "prompt", "count", "seed", "cfg_scale", "temperature", "top_k", "top_p", "steps")  # see `asked_job`
OF_MODEL = ("model", "chosen", "prompt", "prompts", "cfg_scale", "temperature", "top_k", "top_p", "steps")


def for_model(card: ModelCard) -> dict[str, dict[str, Any]]:
    """What the controls `OF_MODEL` show for a model: their properties."""
    values, of_class, arpg = defaults_of(card), card.condition == "class", card.family == "arpg"
    choices = class_choices(card) if of_class else []
    return {"model": {"info": facts_of_card(card)},
            "chosen": {"choices": choices, "value": choices[min(1, len(choices) - 1)][1] if choices else None,
                       "visible": of_class},
            "prompt": {"visible": not of_class}, "prompts": {"visible": not of_class},
            "cfg_scale": {"value": values["cfg_scale"], "maximum": max(20, 2 * values["cfg_scale"])},
            "temperature": {"value": values["temperature"]},
            "top_k": {"value": values["top_k"], "maximum": card.vocab_size}, "top_p": {"value": values["top_p"]},
            "steps": {"value": values["steps"] or 1, "maximum": card.grid[0] * card.grid[1], "visible": arpg}}


def controls(models: list[str], card: ModelCard, *, seed: int) -> dict[str, Any]:
    """What is drawn, and how; as for the model `card`."""
    import gradio as gr

    own = for_model(card)
    made = {"model": gr.Dropdown(models, value=card.name, **own["model"], label="Model", filterable=False,
                                 elem_id="model", interactive=True),
            "chosen": gr.Dropdown(**own["chosen"], label="Class", info="A name, or a number", allow_custom_value=True,
                                  elem_id="class", interactive=True),
            "prompt": gr.Textbox(EXAMPLE_PROMPTS[0], **own["prompt"], label="Prompt", lines=2, max_lines=6,
                                 elem_id="prompt", interactive=True)}
    made["prompts"] = gr.Dataset(**own["prompts"], components=[made["prompt"]], label="For example",
                                 samples=[[prompt] for prompt in EXAMPLE_PROMPTS], elem_id="prompts")
    made["count"] = gr.Slider(1, MOST_IMAGES, value=8, step=1, label="Pictures", elem_id="count")
    with gr.Row(equal_height=True, elem_id="seeds"):
        made["seed"] = gr.Number(seed, label="Seed", precision=0, elem_id="seed", min_width=110, interactive=True)
        made["another"] = gr.Checkbox(True, label="new each time", elem_id="another", min_width=110)
    with gr.Accordion("Guidance and sampling", open=False, elem_id="sampling"):
        made["cfg_scale"] = gr.Slider(0, **own["cfg_scale"], step=0.1, label="Guidance", elem_id="cfg-scale",
                                      info="How strongly class or prompt are followed; 1: not beyond the model")
        made["temperature"] = gr.Slider(0, 2, **own["temperature"], step=0.05, label="Temperature",
                                        elem_id="temperature", info="Lower is safer, higher more varied")
        made["top_k"] = gr.Slider(0, **own["top_k"], step=1, label="Top-k", elem_id="top-k",
                                  info="Only the k likeliest codes; 0: all")
        made["top_p"] = gr.Slider(0, 1, **own["top_p"], step=0.01, label="Top-p", elem_id="top-p",
                                  info="Only the likeliest codes, up to this share of the probability")
        made["steps"] = gr.Slider(1, **own["steps"], step=1, label="Steps", elem_id="steps",
                                  info="Fewer are faster: each step draws more codes at once")
    return made


def pictures(kind: str, *, go: str, onward: str) -> dict[str, Any]:
    """A button that draws, one that stops, how far it is, the pictures, and a button to paint on one of them."""
    import gradio as gr

    with gr.Row():
        made = {"go": gr.Button(go, variant="primary", elem_id=kind, scale=3, min_width=120),
                "stop": gr.Button("Stop", interactive=False, elem_id=f"{kind}-stop", scale=1, min_width=80)}
    made["status"] = gr.HTML(status(None), elem_id=f"{kind}-status")
    made["gallery"] = gr.Gallery(columns=4, height="auto", format="png", type="numpy", interactive=False,
                                 show_label=False, object_fit="contain", buttons=["download", "fullscreen"],
                                 elem_id=f"{kind}-pictures", elem_classes="pictures", visible=False)
    made["onward"] = gr.Button(onward, size="sm", elem_id=f"{kind}-onward", interactive=False, visible=False)
    made["selected"] = gr.State(0)
    return made


SEEN = ("gallery", "status", "go", "stop", "onward")


def seen(progress: Progress, *, sharp: bool, seed: int | None = None, captions: list[str] | None = None) -> list[Any]:
    """Updates of the parts `SEEN` of `pictures`."""
    import gradio as gr

    running = progress.state == "running"
    shown = [*zip(progress.pictures, captions, strict=True)] if captions else [*progress.pictures]
    return [gr.update(value=shown, visible=True, elem_classes=["pictures", *[SHARP] * sharp]),
            status(progress, seed=seed), gr.update(interactive=not running), gr.update(interactive=running),
            gr.update(interactive=not running, visible=True)]


def status(progress: Progress | None, *, seed: int | None = None) -> str:
    """How far it is, as HTML."""
    words = "" if progress is None else progress.words()
    if seed is not None:
        words += f" · seed {seed}"
    running = progress is not None and progress.state == "running"
    width = 100 * progress.share if running else 0
    idle = "" if running else " idle"
    return (f'<div class="progress{idle}" role="status"><p>{html.escape(words)}</p>'
            f'<div class="track"><div style="width:{width:.1f}%"></div></div></div>')


def editor(card: ModelCard) -> dict[str, Any]:
    """A picture to paint on."""
    import gradio as gr

    made = {"note": gr.HTML(html.escape(edit_note(card)), elem_classes="note", elem_id="edit-note"),
            "picture": gr.State(None)}
    with gr.Row():
        made["upload"] = gr.UploadButton("Upload a picture", file_types=["image"], size="sm", min_width=120,
                                         elem_id="upload")
        made["clear"] = gr.Button("Remove the paint", size="sm", elem_id="clear", min_width=120, interactive=False)
    made["canvas"] = gr.ImageEditor(
        type="numpy", image_mode="RGBA", sources=(), transforms=(), layers=False, format="png", buttons=[],
        brush=gr.Brush(default_size=60, colors=[PAINT], color_mode="fixed"), show_label=False, elem_id="canvas",
        elem_classes=EMPTY, interactive=True)
    with gr.Row(equal_height=True, elem_id="keeping"):
        made["keep"] = gr.Checkbox(True, label="keep the rest as it is", elem_id="keep", min_width=130)
        made["feather"] = gr.Slider(0, 16, value=4, step=1, label="Blend over (pixels)", elem_id="feather",
                                    min_width=130)
    return made


def on_canvas(picture: np.ndarray | None, *, sharp: bool) -> Any:
    """Update of the editor's canvas: the picture (H, W, 3) without paint."""
    import gradio as gr

    if picture is None:
        return gr.update(value=None, elem_classes=EMPTY)
    large = enlarged(picture)
    return gr.update(value={"background": large, "layers": [], "composite": None}, canvas_size=large.shape[1::-1],
                     elem_classes=[SHARP] * sharp)


