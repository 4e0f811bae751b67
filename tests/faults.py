"""Runs the training scripts in processes of their own, with a fault where one is wanted: test_survive.py and soak.py.

The processes are forked from a server that has imported everything once: each is new, shares nothing with the one
before it, and costs a fraction of the five seconds that Python and torch need to start.
"""

import ctypes
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  PYTHONPATH=os.pathsep.join(sys.path[:2]))

import matplotlib.figure  # noqa: F401  the server should have everything that a run imports late
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import distill
import dpo
import eval as ground
import grpo
import moe
import sft
from rounding import EPSILON


SCRIPTS = {"sft": sft, "grpo": grpo, "distill": distill, "dpo": dpo, "moe": moe}
SMALLER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
               head_dim=16)  # 20,000 parameters
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["faults"])


# --- faults: each takes (script, argument) and changes the process it is called in ---


def in_step(script, step, act):
    """Calls act(policy, optimizer) in the middle of optimizer step `step` (from 1): gradients are there, no update."""
    train_step, clip = script.train_step, nn.utils.clip_grad_norm_

    def stepping(policy, optimizer, batches, loss_of, number, config, world):
        def clipping(parameters, max_norm):
            act(policy, optimizer)
            return clip(parameters, max_norm)

        nn.utils.clip_grad_norm_ = clipping if number + 1 == step else clip
        return train_step(policy, optimizer, batches, loss_of, number, config, world)

    script.train_step = stepping


def signal_at(script, arguments):
    """This process sends itself a signal in the middle of a step."""
    step, number = arguments
    in_step(script, step, lambda policy, optimizer: os.kill(os.getpid(), number))


def crash_at(script, step):
    """An exception that nobody expects."""
    def crash(policy, optimizer):
        raise RuntimeError("an injected crash")
    in_step(script, step, crash)


def hang_at(script, step):
    """A step that does not come to an end."""
    def hang(policy, optimizer):
        print("hanging", flush=True)
        time.sleep(600)
    in_step(script, step, hang)


def nan_loss(script, steps):
    """The loss of these steps is NaN."""
    train_step = script.train_step

    def stepping(policy, optimizer, batches, loss_of, number, config, world):
        def spoiled(policy, batch):
            loss, numbers = loss_of(policy, batch)
            return loss * (math.nan if number + 1 in steps else 1.0), numbers
        return train_step(policy, optimizer, batches, spoiled, number, config, world)

    script.train_step = stepping


def spoil(tensor, value):
    """Overwrites one number of a tensor, on this process's part of it."""
    (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1)[0] = value


def inf_gradient(script, steps):
    """One number of the gradient of these steps is inf."""
    for step in steps:
        in_step(script, step, lambda policy, optimizer: spoil(list(policy.parameters())[-1].grad, math.inf))


def nan_weight(script, step):
    """From the middle of this step on, one weight is NaN."""
    in_step(script, step, lambda policy, optimizer: spoil(list(policy.parameters())[-1].data, math.nan))


def reward(script, value):
    """The reward function `accuracy` returns this."""
    script.REWARDS["accuracy"] = lambda problem, row, pace, config: value


def one_group(script, rows):
    """Only the first prompt's completions score differently, and but so many of its rows are trained on."""
    credit, update = script.credit, script.Update.__init__

    def crediting(groups, pace, n_rows, config):
        for group in groups[1:]:
            for row in group.rows:
                row.reward = 0.5
        credit(groups, pace, n_rows, config)

    def fewer(self, *arguments):
        update(self, *arguments)
        self.rows = self.rows[:rows]

    script.credit, script.Update.__init__ = crediting, fewer


def file_limit(script, arguments):
    """From the middle of a step on, no file can grow beyond so many bytes, as on a full disk."""
    step, size = arguments
    in_step(script, step, lambda policy, optimizer: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def at_the_end(script, act):
    """Calls act() once the last checkpoint is written, before the trained model is."""
    finish_run = script.finish_run

    def finishing(*arguments):
        act()
        return finish_run(*arguments)

    script.finish_run = finishing


def full_at_the_end(script, size):
    """No file can grow beyond so many bytes once the last checkpoint is written."""
    at_the_end(script, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def obey_modes(script, _):
    """Root gives up the right to write where file modes forbid it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    for i in range(3):
        sets[i] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def at_writes(folder, act):
    """Calls act() before this process changes anything in `folder`."""
    def hook(event, arguments):
        if event in WRITES and isinstance(arguments[0], (str, bytes, Path)) and folder in str(arguments[0]):
            if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
                act()
    sys.addaudithook(hook)


def slow_writes(script, arguments):
    """Sleeps before each change of a file, so that most of the time passes in saving."""
    folder, seconds = arguments
    at_writes(folder, lambda: time.sleep(seconds))


def kill_at_write(script, arguments):
    """SIGKILL right before the n-th change of a file."""
    folder, n = arguments
    left = iter(range(n - 1, -1, -1))
    at_writes(folder, lambda: next(left, 0) or os.kill(os.getpid(), signal.SIGKILL))


def kill_in_export(script, arguments):
    """SIGKILL right before the n-th change of a file after the last checkpoint."""
    at_the_end(script, lambda: kill_at_write(script, arguments))


def kill_in_json(script, n):
    """SIGKILL when half of the n-th JSON file is written."""
    left, dump = iter(range(n - 1, -1, -1)), json.dump

    def dumping(value, file, **options):
        if next(left, None) == 0:
            file.write(json.dumps(value, **options)[:20])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        dump(value, file, **options)

    json.dump = dumping


def forbid(script, prefixes):
    """Any event of these kinds (see Python's table of audit events) ends the process: exit code 99."""
    def hook(event, arguments):
        if event.startswith(tuple(prefixes)):
            print(f"forbidden: {event} {arguments}", flush=True)
            os._exit(99)
    sys.addaudithook(hook)


FAULTS = {function.__name__: function for function in (
    signal_at, crash_at, hang_at, nan_loss, inf_gradient, nan_weight, reward, one_group, file_limit, full_at_the_end,
    obey_modes, slow_writes, kill_at_write, kill_in_export, kill_in_json, forbid)}


# --- processes ---


class Job(NamedTuple):
    processes: list  # one a rank
    log: Path  # what all of them print
    offset: int  # where their output starts in it

    def wait(self, timeout=120):
        """Their exit codes, negative for a signal; fails where one still runs after `timeout` seconds."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        slow = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not slow, f"ranks {slow} still ran after {timeout} s\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self):
        """What they have printed so far."""
        return self.log.read_bytes()[self.offset :].decode() if self.log.exists() else ""


def child(name, flags, faults, environment, log):
    """One process of a run, from its command line to its exit code."""
    os.environ.update(environment)
    if log:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a kill
    script, rank = SCRIPTS[name], int(os.environ.get("RANK", 0))
    ground.TINY.update(SMALLER)
    torch.optim.AdamW = partial(torch.optim.AdamW, eps=EPSILON)  # or two runs could not be compared: see rounding.py
    ground.plot_runs = lambda runs, path: path.write_bytes(b"")  # drawing takes longer than all else
    for fault, argument in faults.items():
        fault, _, only = fault.partition("@")  # "crash_at@1": on rank 1 alone
        if not only or int(only) == rank:
            FAULTS[fault](script, argument)
    sys.argv = [f"{name}.py", *flags]
    script.launch(script.main, script.Config)


def command_line(flags):
    """{"seed": 1, "reward_funcs": ["a", "b"]} as arguments."""
    arguments = []
    for flag, value in flags.items():
        arguments += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, flags, faults=None, ranks=1):
    """Starts a run, on several processes where asked for: Job. Its output is added to <output_dir>.log."""
    log = Path(f"{flags['output_dir']}.log")
    offset = log.stat().st_size if log.exists() else 0
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                   "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in range(ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = script, command_line(flags), faults or {}, own, str(log)
        processes.append(FORKS.Process(target=child, args=arguments, daemon=True))
        processes[-1].start()
    return Job(processes, log, offset)


def run(script, flags, faults=None, ranks=1, timeout=120):
    """A run from start to end: (exit codes, what it printed)."""
    job = start(script, flags, faults, ranks)
    return job.wait(timeout), job.text()


# --- what a run leaves ---


def numbers_of(folder):
    """The lines of metrics.jsonl without the keys under time/, as text (in which NaN equals NaN)."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in line.items() if not key.startswith("time/")}) for line in lines]


def steps_of(folder):
    """The steps of which a run has checkpoints."""
    return sorted(int(path.name[5:]) for path in Path(folder).glob("checkpoints/step_*[0-9]"))


def newest(folder):
    """The newest checkpoint's folder."""
    return Path(folder) / "checkpoints" / f"step_{steps_of(folder)[-1]}"


def listing(folder):
    """The files of a run by their paths in it, those of older checkpoints left out."""
    older = [f"checkpoints/step_{step}/" for step in steps_of(folder)[:-1]]
    names = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.startswith(tuple(older)))


def assert_same(run, expected):
    """Weights, optimizer, sampler state, numbers, samples and file names of two runs are equal, bit by bit."""
    run, expected = Path(run), Path(expected)
    assert listing(run) == listing(expected)
    assert numbers_of(run) == numbers_of(expected)
    for name in listing(expected):
        if name.endswith(".safetensors"):
            ours, theirs = load_file(run / name), load_file(expected / name)
            assert ours.keys() == theirs.keys(), name
            for key in theirs:
                assert torch.equal(ours[key], theirs[key]), f"{name}: {key} differs"
        elif name.endswith("state.json"):
            ours, theirs = (json.loads((folder / name).read_text()) for folder in (run, expected))
            del ours["sizes"], theirs["sizes"]  # transformers writes other notes where a model came from a checkpoint
            assert json.dumps(ours) == json.dumps(theirs), name
        elif name.endswith(("samples.jsonl", "pairs.jsonl", "bad_steps.jsonl")):
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name


def largest_difference(run, expected):
    """Of any weight of the two runs' final models."""
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (run, expected))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


# --- campaigns, short in the suite and long in the soak ---


def survive_kills(script, flags, n_kills, seed, ranks=1):
    """SIGKILLs runs over and over, each continued to its end, until n_kills have hit: the folders of the runs.

    Half of the kills hit right before a random change of a file, the others at a random moment of processes whose
    writing is slowed down, so that most of them find it in a save. Of several processes one is hit; the others must
    end by themselves.
    """
    rng, folders, kills = random.Random(seed), [], 0
    while kills < n_kills:
        folders.append(Path(f"{flags['output_dir']}_{len(folders)}"))
        out, codes = str(folders[-1]), None
        while codes is None or any(codes):
            faults, victim = {}, rng.randrange(ranks)
            if kills < n_kills:
                faults = rng.choice([{f"kill_at_write@{victim}": [out, rng.randint(1, 60)]},
                                     {"slow_writes": [out, 0.02]}])
            job = start(script, {**flags, "output_dir": out}, faults, ranks)
            if "slow_writes" in faults:
                job.processes[victim].join(rng.uniform(0.3, 2.5) * ranks)
                job.processes[victim].kill()
            codes = job.wait()
            kills += codes[victim] == -signal.SIGKILL
            assert not any(codes) or codes[victim] == -signal.SIGKILL, job.text()
    return folders


def damage(path, kind):
    """Deletes a file, or cuts off its second half or only its last byte."""
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2 if kind == "halve" else -1])


def each_damage(run):
    """Damages each file of the run's newest checkpoint in each way, one at a time: yields its name and the kind.

    What it was before is put back after each.
    """
    checkpoint = newest(run)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        before = path.read_bytes()
        for kind in ("halve", "cut", "delete"):
            damage(path, kind)
            yield str(path.relative_to(checkpoint)), kind
            path.write_bytes(before)


if __name__ == "__main__":  # under torchrun: python faults.py sft '{"crash_at@1": 2}' --output_dir ...
    child(sys.argv[1], sys.argv[3:], json.loads(sys.argv[2]), {"CUDA_VISIBLE_DEVICES": ""}, None)
