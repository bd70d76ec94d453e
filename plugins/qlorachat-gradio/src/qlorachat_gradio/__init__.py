"""A chat page in the browser for qlorachat, on Gradio; importing this imports no gradio."""

import os

# read by gradio when its pages are built: nothing about them may leave the machine
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
