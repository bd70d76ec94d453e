"""How the page looks: a light, calm theme of system fonts; nothing is fetched from elsewhere."""

import gradio as gr

# each system's own face; one that has kana and kanji comes before the generic ones
FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Hiragino Sans",
    "Yu Gothic UI",
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "sans-serif",
)
MONOSPACE = ("ui-monospace", "SFMono-Regular", "Consolas", "DejaVu Sans Mono", "monospace")

# The chat fills the window; on a narrow screen the settings stand below it.
CSS = """
.gradio-container .main.fillable { max-width: 1240px; margin: 0 auto;
  padding: 1.1rem 1.5rem .5rem; }
#head { margin-bottom: -.35rem; }
#head > * { padding: 0 .2rem; }
#head h1 { margin: 0; font-size: 1.3rem; font-weight: 650; letter-spacing: -.01em; }
#head p { margin: 0; font-size: .8rem; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere; }
#columns { gap: 1.25rem; align-items: flex-start; }
#talk { gap: .6rem; flex-wrap: nowrap; height: calc(100dvh - 5.6rem); }
#talk > * { flex: none; }
#chat { flex: 1 1 0 !important; min-height: 160px; }
#chat, #ask, #settings { border: 1px solid var(--border-color-primary) !important;
  border-radius: 14px; background: var(--block-background-fill); }
#chat .top-panel { top: 8px; right: 8px; border: 0; box-shadow: none; }
#chat .message { border-radius: 12px; box-shadow: none; }
#ask { align-items: flex-end; gap: .5rem; padding: .4rem; }
#ask:focus-within { border-color: var(--color-accent) !important; }
#ask textarea { border: 0; box-shadow: none; background: transparent; padding: .55rem .7rem; }
#ask button { border-radius: 10px; padding: .5rem 1rem; font-size: .95rem; }
#chat .placeholder-content { color: var(--body-text-color-subdued); }
#status { min-height: 1.3rem; padding: 0 .7rem; }
#status p { margin: 0; font-size: .8rem; color: var(--body-text-color-subdued); }
#settings { gap: 0; padding: .3rem; flex-wrap: nowrap; }
#settings > * { flex: none; }
#settings .form { gap: 0; }
@media (min-width: 861px) {
  #columns { flex-wrap: nowrap; }
  #settings { flex: 0 0 330px !important; max-height: calc(100dvh - 5.6rem); overflow-y: auto; }
}
@media (max-width: 860px) {
  .gradio-container .main.fillable { padding: .75rem .75rem 1.5rem; }
  #columns { gap: .75rem; }
  #ask textarea { font-size: 16px; } /* at less, iOS zooms in on focus */
}
"""


def theme() -> gr.Theme:
    """Soft teal on warm white; the dark variant follows the visitor's system."""
    return gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="stone",
        radius_size="lg",
        font=FONTS,
        font_mono=MONOSPACE,
    ).set(
        body_background_fill="*neutral_50",
        block_background_fill="white",
        block_border_width="0px",
        block_shadow="none",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_info_text_size="*text_xs",
        input_background_fill="*neutral_50",
        input_border_width="1px",
        input_border_color="*neutral_200",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_large_text_weight="600",
        slider_color="*primary_500",
        checkbox_border_color_dark="*neutral_500",
        color_accent_soft="*primary_50",
        border_color_accent_subdued="*primary_100",
    )
