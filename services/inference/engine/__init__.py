"""Generates answers with llama.cpp: one thread, which knows neither asyncio nor NATS."""

import os

# How often llama.cpp's threads check for the next step before they sleep. GNU OpenMP reads this
# when it is loaded, with llama_cpp. By default they spin for milliseconds, and keep nats-server and
# the edge off the cores (docs/decisions/0113). The environment of the process may say otherwise.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
