"""Suwen 素问: from a base language model and medical knowledge to a medical model you can trust."""

import logging
import sys

__version__ = "0.1.0"

# On a CPU with AVX512-BF16 bitsandbytes, as it is imported, fetches native code from the hub and runs it, if the
# package `kernels` is installed, and complains if it is not. No code comes from the network here: that package is
# missing for us, without a complaint.
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
