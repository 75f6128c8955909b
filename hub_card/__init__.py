"""Publishing: the card's figures, the check of a repository before it is uploaded, the push, the endpoint, the page."""

import os

# Read when these libraries are imported; set them before to send usage data.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
