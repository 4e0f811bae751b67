"""What all tests share: one thread a process, no hub, and a model to start from."""

import os
import signal
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a model of 20,000 parameters that sft.py has trained on `chain` for 60 steps: it writes sums that
    are wrong and ends them, so its completions differ in length and none is right."""
    import eval as ground
    import sft

    folder = tmp_path_factory.mktemp("models") / "tiny"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=1, head_dim=16).items():
            patch.setitem(ground.TINY, name, value)
        sft.main(sft.Config(output_dir=str(folder), n_train=500, levels="1-2", per_device_train_batch_size=32,
                            max_steps=60, learning_rate=1e-2, warmup_steps=20, eval_steps=0,
                            save_steps=0))
    for number, handler in handlers.items():  # main has installed its own
        signal.signal(number, handler)
    return folder
