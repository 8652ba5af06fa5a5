"""How the page looks: its theme and CSS. Nothing is fetched from other hosts, fonts are those of the system."""
from typing import Any

TITLE = "LlamaGen – pictures, code by code"
PAINT = "#e5487d"
SHARP = "sharp"  # class of what shows small pictures: enlarged without blur
CSS = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.gradio-container { max-width: 1160px !important; margin: 0 auto !important; }
#heading { padding: 10px 2px 2px; }
#heading h1 { font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; margin: 0; }
#heading p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.model-facts, .note { color: var(--body-text-color-subdued); font-size: .85rem; }
.note { margin: 0 2px; }
.progress { min-height: 2.6rem; }
.progress p { margin: 0 2px 6px; font-size: .9rem; color: var(--body-text-color); }
.progress .track { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.progress .track div { height: 100%; background: var(--primary-500); }
.progress.idle .track { visibility: hidden; }
.sharp img, .sharp canvas { image-rendering: pixelated; }
.pictures .thumbnail-item img { width: 100%; height: 100%; object-fit: contain; }
.pictures .preview img, .pictures .preview .media-button { width: 100%; height: 100%; object-fit: contain; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #heading h1 { font-size: 1.25rem; }
}
"""
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
          "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
          "object-src 'none'; base-uri 'self'")  # Content-Security-Policy


def theme() -> Any:
    """Gradio's plain theme with quiet colours, and fonts that are there."""
    import gradio as gr
    from gradio.themes.utils.fonts import Font

    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=[Font("sans-serif")],
                             font_mono=[Font("monospace")])
