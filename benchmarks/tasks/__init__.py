"""
The kinds of task, one module each: what a system computes, and how it is scored.

A kind has `run(system, data, protocol, clip) -> {metric: Measure}` and lists the settings of a protocol it reads:
`SETTINGS` always, `BY_LANGUAGE` unless it is measured `by: embedding`, `OPTIONAL` where they are given.
"""

from . import answers, generation, image, response, vqa

KINDS = {"response": response, "image": image, "answers": answers, "vqa": vqa, "generation": generation}
