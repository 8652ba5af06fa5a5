"""How the page looks: its theme and CSS. Nothing is fetched from other hosts, fonts are those of the system."""
from typing import Any

TITLE = "LlamaGen – pictures, code by code"
PAINT = "#e5487d"
EMPTY = "empty"  # class of an editor without a picture
SHARP = "sharp"  # class of what shows small pictures: enlarged without blur
HEADING = "<h1>LlamaGen</h1><p>Pictures, drawn code by code</p>"
CSS = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
:root:not(.dark) .gradio-container { --body-text-color-subdued: #5b6b80; --block-info-text-color: #5b6b80; }
.gradio-container > .fillable, .gradio-container .main { width: 100% !important; max-width: 1120px !important; }
.html-container:has(.progress), .note .html-container, #heading .html-container { padding: 0 !important; }
#heading h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -.015em; margin: 0; }
#heading p, .note { color: var(--body-text-color-subdued); margin: 0; }
.note { font-size: .9rem; line-height: 1.45; }
.progress { min-height: 2rem; }
.progress p { margin: 0 0 6px; font-size: .9rem; line-height: 1.4; min-height: 1.4em; color: var(--body-text-color); }
.progress .track { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.progress .track div { height: 100%; background: var(--primary-500); transition: width .2s linear; }
.progress.idle .track { visibility: hidden; }
#seeds > *, #keeping > * { align-self: stretch; }
#another, #keep { display: flex; align-items: center; }
.sharp img, .sharp canvas { image-rendering: pixelated; }
#canvas.empty > * { visibility: hidden; }
#canvas.empty::after { content: "Upload a picture, or take one that was drawn"; position: absolute; inset: 0;
  display: grid; place-items: center; text-align: center; color: var(--body-text-color-subdued); }
.pictures .thumbnail-item img { width: 100%; height: 100%; object-fit: contain; }
.pictures .preview img { width: 100%; height: 100%; object-fit: contain; }
.pictures .grid-wrap.fixed-height { min-height: 0; max-height: none; overflow: visible; }
.pictures .grid-wrap .grid-container { grid-template: none / repeat(4, minmax(0, 1fr)); grid-auto-rows: auto; }
.pictures .thumbnail-item.thumbnail-lg { aspect-ratio: 1; height: auto; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 10px !important; }
  #heading h1 { font-size: 1.3rem; }
  .pictures .grid-wrap .grid-container { grid-template: none / repeat(3, minmax(0, 1fr)); }
}
"""
POLICY = "; ".join([  # Content-Security-Policy
    "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:", "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:", "font-src 'self' data:", "connect-src 'self' data: blob:", "worker-src 'self' blob:",
    "object-src 'none'", "base-uri 'self'"])


def theme() -> Any:
    """Gradio's plain theme with quiet colours, and fonts that are there."""
    import gradio as gr
    from gradio.themes.utils.fonts import Font

    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=[Font("sans-serif")],
                             font_mono=[Font("monospace")])
