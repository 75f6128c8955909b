"""What was chosen on validation by `benchmarks.real.prompts` and `benchmarks.real.study`, and the demo's settings."""

from train.canonical import Setting

from .spaces import Fit

# Read at the last word's token: [RET] starts from that token's embedding and takes its place.
RET_PROMPT, RET_INIT = "\nKeywords:", " the"
PAIRS = 5000
CANONICAL = Setting("pooled", 64, 0.1, 2.0)
FITS = {
    "DAT": Fit(8e-3, 0.5),
    "DAT, no noise": Fit(2e-3, 0.0),
    "FROMAGe's heads": Fit(8e-3, 0.5),
}
