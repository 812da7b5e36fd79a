"""No test needs a network; tokenizers that run threads do not fork well.

Tests see a GPU only where they are run by themselves, `pytest -m gpu`: the others expect the numbers of a CPU. What
they see is one, as in a process that trains; TEST_GPUS names all, for tests of several processes.
"""

import os

from suwen.check_environment import query_gpus, see_one_gpu, select_visible

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    found = select_visible(query_gpus() or [], os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ["TEST_GPUS"] = ",".join(gpu.uuid for gpu in found)
    see_one_gpu()
