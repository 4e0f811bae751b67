"""Every run survives: stopped anywhere, killed, spoiled, spread over processes, it ends as if nothing had happened."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import faults
from eval import is_whole, load_problems, newest_checkpoint
from faults import assert_same, largest_difference, newest, numbers_of, run, start, steps_of
from rounding import assert_close, rounding_of_run

ROOT = Path(__file__).parents[1]
TERM, KILL = signal.SIGTERM, signal.SIGKILL
SFT = dict(n_train=20, levels="1-2", per_device_train_batch_size=8, micro_batch_tokens=64, max_steps=6, save_steps=2,
           eval_steps=3, n_eval=4, max_completion_length=8, warmup_steps=2, logging_steps=1)
GRPO = {**SFT, "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 12, "n_train": 10,
        "num_iterations": 2, "learning_rate": 1e-3, "reward_funcs": ["accuracy", "length"], "shape_silent_groups": True}
DISTILL = {**SFT, "method": "on_policy", "lmbda": 0.6, "learning_rate": 1e-3}

DPO = {**SFT, "eval_dataset_name": "chain", "resample_steps": 2, "round_prompts": 6, "num_generations": 4,
       "max_completion_length": 24, "temperature": 0.5, "learning_rate": 1e-3}
OFFLINE = {"pairs": "offline", "dataset_name": "chain", "error_rate": 0.5, "loss_type": "sigmoid"}


def write_problems(path):
    """Problems whose answer is the one that the tiny model gives most often, so that some of its samples are right."""
    problems = load_problems("chain", "train", DPO["n_train"], levels="1-2")
    path.write_text("".join(json.dumps({"prompt": problem.prompt, "answer": "1"}) + "\n" for problem in problems))


MOE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, moe_intermediate_size=8,
           balance="exact", balance_rows=1, domains="chain,synthetic:1", max_length=48, n_train=10, n_eval=4,
           per_device_train_batch_size=8, max_steps=6, save_steps=2, eval_steps=3, max_completion_length=4,
           warmup_steps=2, logging_steps=1)
SCRIPTS = ["sft", "grpo", "distill", "dpo", "moe"]


@pytest.fixture(scope="module")
def flags(tiny_model):
    """The flags of each script's small run."""
    teacher = tiny_model.with_name("teacher")  # the same, but surer of itself
    if not teacher.exists():
        shutil.copytree(tiny_model, teacher, ignore=shutil.ignore_patterns("checkpoints"))
        weights = load_file(teacher / "model.safetensors")
        weights["lm_head.weight"] *= 2
        save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    problems = tiny_model.with_name("problems.jsonl")
    write_problems(problems)
    return {"sft": SFT, "grpo": {**GRPO, "model_name_or_path": str(tiny_model)},
            "dpo": {**DPO, "model_name_or_path": str(tiny_model), "dataset_name": str(problems)},
            "distill": {**DISTILL, "model_name_or_path": str(tiny_model), "teacher_model_name_or_path": str(teacher)},
            "moe": MOE}


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """whole(script, **changes): the folder of the run that nothing has disturbed, made once."""
    made = {}

    def folder(script, **changes):
        key = (script, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / script
            codes, text = run(script, {**flags[script], **changes, "output_dir": made[key]})
            assert codes == [0], text
        return made[key]

    return folder


def refused(text, script, *words):
    """The run printed one line of its own about what is wrong, with these words, and no traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith(f"{script}.py: ")]
    assert len(lines) == 1 and all(str(word) in lines[0] for word in words), text


# --- resume ---


@pytest.mark.parametrize("script, changes", [("sft", {}), ("grpo", {"beta": 0.1}), ("grpo", {"loss_type": "gspo"}),
                                             ("distill", {}), ("dpo", {}), ("dpo", OFFLINE),
                                             ("moe", {"balance": "bias", "gate": "sigmoid"})])
def test_a_run_stopped_at_every_step_ends_bit_equal(flags, whole, tmp_path, script, changes):
    """SIGTERM in the middle of steps 1 to 6, each in a new process: within and at the end of an epoch (n_train is no
    multiple of a step's rows). The step is finished, saved, exit 143. Of a window of steps on the same rollouts
    (num_iterations 2) the first or the second step is hit, and the stop waits for its end."""
    mine = {**flags[script], **changes, "save_steps": 0, "output_dir": tmp_path / "run"}
    window = mine.get("num_iterations", 1)
    stops, last = ((1, 2, 3, 4, 5), 6) if window == 1 else ((1, 4), 5)
    for step in stops:
        codes, text = run(script, mine, {"signal_at": [step, TERM]})
        ends = step + -step % window
        assert codes == [143] and steps_of(tmp_path / "run")[-1] == ends, text
        assert f"stopped and saved after step {ends}; the same command continues" in text
    codes, text = run(script, mine, {"signal_at": [last, signal.SIGINT]})  # nothing is left to stop
    assert codes == [0], text
    assert_same(tmp_path / "run", whole(script, **changes))
    before, *steps = map(json.loads, numbers_of(tmp_path / "run"))
    assert before["step"] == 0 and all(line["grad_norm"] > 0 for line in steps)  # or equality is no news


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_run_that_dies_in_every_step_ends_bit_equal(flags, whole, tmp_path, script):
    """Killed or crashed in the middle of steps 1 to 6, with a checkpoint at every second one."""
    mine = {**flags[script], "output_dir": tmp_path / "run"}
    for step in range(1, 7):
        fault, code = ({"signal_at": [step, KILL]}, -9) if step in (1, 3, 4) else ({"crash_at": step}, 1)
        codes, text = run(script, mine, fault)
        assert codes == [code], text
        assert steps_of(tmp_path / "run")[-1:] == [step - 1 - (step - 1) % 2][: step > 2]
    codes, text = run(script, mine)
    assert codes == [0] and "continues from" in text, text
    assert_same(tmp_path / "run", whole(script))


def test_ten_kills(flags, whole, tmp_path):
    for script, kills, seed in (("sft", 6, 0), ("grpo", 4, 1)):
        mine = {**flags[script], "save_steps": 1, "output_dir": tmp_path / script}
        for folder in faults.survive_kills(script, mine, kills, seed):
            assert_same(folder, whole(script, save_steps=1))


def test_a_kill_before_the_first_checkpoint(flags, whole, tmp_path):
    """Right before each of the first changes of a file: whatever stands in the folder, the same command goes on."""
    for n in range(1, 6):
        mine = {**flags["sft"], "output_dir": tmp_path / f"run{n}"}
        assert run("sft", mine, {"kill_at_write": [str(tmp_path), n]})[0] == [-9]
        codes, text = run("sft", mine)
        assert codes == [0], text
        assert_same(tmp_path / f"run{n}", whole("sft"))


@pytest.mark.parametrize("n, steps", [(1, []), (2, []), (3, [2]), (5, [4, 6])])  # args.json; state.json thrice; args.json
def test_a_kill_halfway_through_a_file(flags, whole, tmp_path, n, steps):
    mine = {**flags["sft"], "output_dir": tmp_path / "run"}
    assert run("sft", mine, {"kill_in_json": n})[0] == [-9]
    assert steps_of(tmp_path / "run") == steps
    codes, text = run("sft", mine)
    assert codes == [0], text
    assert_same(tmp_path / "run", whole("sft"))


def test_a_kill_while_an_old_run_is_deleted(flags, whole, tmp_path):
    """Right before some of the changes of a file: without --overwrite no half deleted run is gone on with, and a folder
    beside it is nobody's business."""
    mine = {**flags["sft"], "output_dir": tmp_path / "run"}
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old" / "thesis.txt").write_text("years of work")
    for n in (1, 2, 3, 4, 6, 9, 12, 13):
        shutil.copytree(whole("sft", seed=1), tmp_path / "run")
        assert run("sft", {**mine, "overwrite": True}, {"kill_at_write": [str(tmp_path / "run"), n]})[0] == [-9]
        left = json.loads((tmp_path / "run" / "args.json").read_text())
        if not left:
            codes, text = run("sft", {**mine, "seed": 1})
            assert codes == [2]
            refused(text, "sft", "half a run; --overwrite deletes it")
        elif left["flags"]["seed"] == 1:  # or it has begun anew
            assert {*faults.listing(whole("sft", seed=1))} <= {*faults.listing(tmp_path / "run")}
        codes, text = run("sft", {**mine, "overwrite": True})
        assert codes == [0], text
        assert_same(tmp_path / "run", whole("sft"))
        shutil.rmtree(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run.old").iterdir()] == ["thesis.txt"]


def test_overwriting_through_a_link(flags, whole, tmp_path):
    """Where the folder is a link, or a disk of its own, its name cannot be moved."""
    shutil.copytree(whole("sft", seed=1), tmp_path / "elsewhere")
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    codes, text = run("sft", {**flags["sft"], "output_dir": tmp_path / "run", "overwrite": True})
    assert codes == [0] and (tmp_path / "run").is_symlink(), text
    assert_same(tmp_path / "elsewhere", whole("sft"))


def test_nothing_is_left_of_a_save_that_was_killed(flags, whole, tmp_path):
    """Not even where the continued run makes no checkpoint of that step."""
    mine = {**flags["sft"], "output_dir": tmp_path / "run"}
    assert run("sft", {**mine, "save_steps": 1}, {"kill_at_write": ["unfinished", 50]})[0] == [-9]
    assert list((tmp_path / "run" / "checkpoints" / "unfinished").iterdir())
    assert run("sft", mine)[0] == [0]
    assert_same(tmp_path / "run", whole("sft"))
    assert not (tmp_path / "run" / "checkpoints" / "unfinished").exists()


def test_a_kill_at_each_write_of_the_trained_model(flags, whole, tmp_path):
    """After the last checkpoint: the same command finishes the run, and nothing is left of the first attempt."""
    stopped, run_folder, kills = tmp_path / "stopped", tmp_path / "run", 0
    mine = {**flags["sft"], "output_dir": stopped}
    assert run("sft", mine, {"kill_in_export": [str(stopped), 1]})[0] == [-9]
    assert steps_of(stopped) == [4, 6] and not (stopped / "export.tmp").exists()
    mine["output_dir"] = run_folder
    while True:
        shutil.copytree(stopped, run_folder)
        codes, text = run("sft", mine, {"kill_in_export": [str(run_folder), kills + 1]})
        if codes == [0]:
            break
        assert codes == [-9] and not json.loads((run_folder / "args.json").read_text())["finished"], text
        codes, text = run("sft", mine)
        assert codes == [0], text
        assert_same(run_folder, whole("sft"))
        shutil.rmtree(run_folder)
        kills += 1
    assert kills > 10 and not list(run_folder.rglob("*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_left_as_it_is(flags, whole, script):
    """The same command finds it finished, and changes no file."""
    out = whole(script)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    codes, text = run(script, {**flags[script], "output_dir": out})
    assert codes == [0] and "finished already; --overwrite" in text, text
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}


@pytest.mark.parametrize("script", ["sft", "grpo", "distill", "dpo"])  # moe.py's models have no dropout
def test_dropout_is_drawn_by_the_step(flags, tiny_model, tmp_path, script):
    """A model with dropout, killed in its fourth step: the continued run drops what the undisturbed one did."""
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    mine = {**flags[script], "model_name_or_path": tmp_path / "model", "eval_steps": 0}
    for name, dropout in (("without", 0.0), ("whole", 0.5)):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
        codes, text = run(script, {**mine, "output_dir": tmp_path / name})
        assert codes == [0], text
    assert largest_difference(tmp_path / "without", tmp_path / "whole") > 1e-4
    mine["output_dir"] = tmp_path / "run"
    assert run(script, mine, {"signal_at": [4, KILL]})[0] == [-9]
    assert run(script, mine)[0] == [0]
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_flags_change_nothing_that_is_learned(flags, whole, tmp_path, script):
    """Nor may they stand in the way of going on: another half of a step's rows, forwards of a row, recomputation."""
    mine = {**flags[script], "output_dir": tmp_path / "run"}
    codes, text = run(script, mine, {"signal_at": [3, KILL]})
    assert codes == [-9], text
    less = {"per_device_train_batch_size": mine["per_device_train_batch_size"] // 2, "gradient_accumulation_steps": 2,
            "micro_batch_tokens": 1, "gradient_checkpointing": True}
    codes, text = run(script, {**mine, **less})
    assert codes == [0] and "continues from" in text, text
    assert largest_difference(tmp_path / "run", whole(script)) < rounding_of_run(whole(script))


# --- damaged checkpoints ---


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_damaged_checkpoint_is_passed_over(flags, whole, tmp_path, script, capsys):
    """Each file of the newest checkpoint cut short, by half or by a byte, or gone: the one before it is continued."""
    mine = {**flags[script], "output_dir": tmp_path / "run", "save_steps": 1}
    assert run(script, mine, {"crash_at": 6})[0] == [1]
    out = tmp_path / "run"
    older, last = steps_of(out)
    assert (older, last) == ((4, 5) if script == "sft" else (2, 4))
    names = set()
    for name, kind in faults.each_damage(out):
        assert newest_checkpoint(out).name == f"step_{older}", (name, kind)
        assert f"step_{last}: damaged; falling back to the checkpoint before it\n" in capsys.readouterr().err
        names.add(name)
    assert {"model.safetensors", "config.json", "state.json", "tokenizer.json"} <= names
    assert any(name.startswith("optimizer/") for name in names)
    assert newest_checkpoint(out).name == f"step_{last}"  # each_damage has mended it
    (newest(out) / "notes.txt").write_text("what else is put there does no harm")
    assert newest_checkpoint(out).name == f"step_{last}" and not capsys.readouterr().err
    faults.damage(newest(out) / "state.json", "halve")
    codes, text = run(script, mine)
    assert codes == [0] and "falling back" in text, text
    assert_same(out, whole(script, save_steps=1))


def test_a_damaged_checkpoint_is_none_of_the_two_that_are_kept(flags, tmp_path):
    mine = {**flags["sft"], "output_dir": tmp_path / "run"}
    assert run("sft", {**mine, "save_steps": 1}, {"crash_at": 6})[0] == [1]
    assert steps_of(tmp_path / "run") == [4, 5]
    faults.damage(tmp_path / "run/checkpoints/step_5/model.safetensors", "cut")
    codes, text = run("sft", {**mine, "save_steps": 6})
    assert codes == [0] and "step_5: damaged" in text, text
    assert steps_of(tmp_path / "run") == [4, 6] and all(map(is_whole, (tmp_path / "run/checkpoints").iterdir()))


def test_no_whole_checkpoint_left_is_refused(flags, tmp_path):
    mine = {**flags["sft"], "output_dir": tmp_path / "run"}
    assert run("sft", mine, {"crash_at": 6})[0] == [1]
    faults.damage(tmp_path / "run/checkpoints/step_4/state.json", "delete")
    faults.damage(tmp_path / "run/checkpoints/step_2/state.json", "cut")
    codes, text = run("sft", mine)
    assert codes == [2]
    refused(text, "sft", "none of its checkpoints is whole", "--overwrite")


# --- numbers that are not finite ---


def same_weights(older, newer):
    """Model and optimizer of two checkpoints are equal."""
    names = sorted(path.relative_to(older) for path in older.rglob("*.safetensors"))
    assert len(names) == 2
    return all(torch.equal(tensor, load_file(newer / name)[key])
               for name in names for key, tensor in load_file(older / name).items())


@pytest.mark.parametrize("script", ["sft", "grpo"])
@pytest.mark.parametrize("fault", ["nan_loss", "inf_gradient"])
def test_a_bad_step_moves_nothing(flags, tmp_path, script, fault):
    """Weights and optimizer are those of the step before; the step is logged as it was and its rows written down."""
    mine = {**flags[script], "output_dir": tmp_path / "run", "max_steps": 3, "save_steps": 1}
    codes, text = run(script, mine, {fault: [3]})
    assert codes == [0] and "step 3: loss or gradient not finite" in text, text
    before, after = (tmp_path / "run" / "checkpoints" / f"step_{step}" for step in (2, 3))
    assert same_weights(before, after)
    before, *lines = [json.loads(line) for line in numbers_of(tmp_path / "run")]
    assert before["step"] == 0 and [line["step"] for line in lines] == [1, 2, 3]
    assert [math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines] == [True, True, False]
    bad, = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert bad["step"] == 3 and len(bad["rows"]) == (8 if script == "sft" else 4)


def test_bad_steps_in_a_row_end_the_run(flags, tmp_path):
    """After --max_bad_steps, with exit code 1; without the fault the same command goes on from good weights."""
    mine = {**flags["sft"], "output_dir": tmp_path / "run", "save_steps": 1}
    codes, text = run("sft", mine, {"nan_loss": [2, 3, 4]})
    assert codes == [1]
    refused(text, "sft", "3 steps in a row", "--max_bad_steps")
    assert run("sft", mine)[0] == [0]
    assert len((tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()) == 2  # steps 2 and 3 are in the past


@pytest.mark.parametrize("script, save_steps, ranks", [("sft", 1, 1), ("grpo", 0, 1), ("grpo", 1, 1), ("sft", 1, 2)])
def test_a_nan_weight_is_neither_saved_nor_sampled(flags, tmp_path, script, save_steps, ranks):
    """Whichever process has it, all end with exit code 1, and the checkpoints are those from before."""
    mine = spread({**flags[script], "output_dir": tmp_path / "run", "save_steps": save_steps}, ranks)
    codes, text = run(script, mine, {f"nan_weight@{ranks - 1}": 4}, ranks)
    assert codes == [1] * ranks and text.count(f"{script}.py: a weight of the policy is not finite") == ranks, text
    assert steps_of(tmp_path / "run") == ([] if save_steps == 0 else [2] if script == "grpo" else [2, 3])
    assert run(script, mine, ranks=ranks)[0] == [0] * ranks


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_a_reward_that_is_no_number_is_named(flags, tmp_path, value):
    codes, text = run("grpo", {**flags["grpo"], "output_dir": tmp_path / "run"}, {"reward": value})
    assert codes == [1]
    refused(text, "grpo", "reward function accuracy", f"returned {value}")


# --- disk, folders, data ---


@pytest.mark.parametrize("fault, words", [
    ({"file_limit": [4, 1100]}, ["File too large"]),  # metrics.jsonl
    ({"file_limit": [4, 2000]}, ["step 4", "could not be written", "File too large"]),  # a small file of the save
    ({"file_limit": [4, 60_000]}, ["step 4", "could not be written", "File too large"]),  # the weights
    ({"full_at_the_end": 2000}, ["File too large"])])  # the model that is left at the end
def test_a_full_disk_leaves_the_older_checkpoint(flags, whole, tmp_path, fault, words):
    """No file can grow beyond so many bytes, from the middle of step 4 on or after the last step."""
    mine = {**flags["sft"], "output_dir": tmp_path / "run", "logging_steps": 100}  # the output is a file too
    codes, text = run("sft", mine, fault)
    assert codes == [1]
    refused(text, "sft", *words)
    assert steps_of(tmp_path / "run") == ([4, 6] if "full_at_the_end" in fault else [2])
    assert is_whole(newest(tmp_path / "run"))
    assert run("sft", mine)[0] == [0]
    assert_same(tmp_path / "run", whole("sft"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process(flags, whole, tmp_path, rank):
    """Each writes its part of the moments, the first one the weights: all say so."""
    mine = spread({**flags["sft"], "output_dir": tmp_path / "run"}, 2)
    codes, text = run("sft", mine, {f"file_limit@{rank}": [4, 10_000]}, ranks=2)
    assert codes == [1, 1] and text.count("sft.py: the checkpoint of step 4 could not be written (") == 2, text
    assert text.count("File too large") >= 2 and "Traceback" not in text, text
    assert steps_of(tmp_path / "run") == [2]
    assert run("sft", mine, ranks=2)[0] == [0, 0]
    assert largest_difference(tmp_path / "run", whole("sft")) < rounding_of_run(whole("sft"))


def test_a_full_disk_of_the_one_that_logs_ends_all(flags, tmp_path):
    """Only the first process writes metrics.jsonl: the others wait for it, and must not do so for ever."""
    mine = spread({**flags["sft"], "output_dir": tmp_path / "run", "logging_steps": 100}, 2)
    codes, text = run("sft", mine, {"file_limit@0": [4, 1100]}, ranks=2)
    assert codes == [1, 1] and "sft.py: [Errno 27] File too large" in text, text
    assert steps_of(tmp_path / "run") == [2] and run("sft", mine, ranks=2)[0] == [0, 0]


def test_a_read_only_folder_is_reported(flags, whole, tmp_path):
    """At the start, and where it becomes so on the way; what is there is left alone."""
    (tmp_path / "closed").mkdir(mode=0o500)
    codes, text = run("sft", {**flags["sft"], "output_dir": tmp_path / "closed" / "run"}, {"obey_modes": None})
    assert codes == [1]
    refused(text, "sft", "Permission denied", tmp_path / "closed" / "run")
    mine = {**flags["sft"], "output_dir": tmp_path / "run"}
    assert run("sft", mine, {"crash_at": 4})[0] == [1]
    (tmp_path / "run" / "checkpoints").chmod(0o500)
    codes, text = run("sft", mine, {"obey_modes": None})
    assert codes == [1]
    refused(text, "sft", "step 4", "could not be written", "Permission denied")
    (tmp_path / "run" / "checkpoints").chmod(0o700)
    assert run("sft", mine)[0] == [0]
    assert_same(tmp_path / "run", whole("sft"))


def test_a_data_file_that_vanished_or_changed_is_named(flags, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) + "\n" for i in range(20)]
    data.write_text("".join(rows))
    mine = {**flags["sft"], "dataset_name": data, "output_dir": out}
    assert run("sft", mine, {"signal_at": [3, TERM]})[0] == [143]
    for content in (None, rows[1:] + rows[:1], []):
        data.unlink(missing_ok=True) if content is None else data.write_text("".join(content))
        codes, text = run("sft", mine)
        assert codes == [2]
        refused(text, "sft", data)
        assert is_whole(newest(out)) and steps_of(out) == [2, 3]
    data.write_text("\n".join(row.replace(": ", ":  ") for row in rows))  # the rows count, not how they are written
    assert run("sft", mine)[0] == [0]


def test_texts_that_changed_are_named(flags, tmp_path):
    data = tmp_path / "words.txt"
    texts = [f"{i} bottles of beer on the wall, {i} bottles of beer.\n\n\n" for i in range(200)]
    data.write_text("".join(texts))
    mine = {**flags["moe"], "domains": data, "output_dir": tmp_path / "run"}
    assert run("moe", mine, {"signal_at": [3, TERM]})[0] == [143]
    data.write_text("".join(texts[1:] + texts[:1]))
    codes, text = run("moe", mine)
    assert codes == [2]
    refused(text, "moe", data)


# --- one folder, one run ---


def test_other_flags_in_the_folder_are_refused(flags, whole, tmp_path):
    out = tmp_path / "run"
    mine = {**flags["sft"], "output_dir": out}
    assert run("sft", mine, {"crash_at": 3})[0] == [1]
    for changes, words in (({"seed": 1}, ["--seed 1", "has 0", "--overwrite"]),
                           ({"per_device_train_batch_size": 4}, ["per_device_train_batch_size x", "not 4", "--overwrite"])):
        codes, text = run("sft", {**mine, **changes})
        assert codes == [2]
        refused(text, "sft", *words)
    codes, text = run("grpo", {**flags["grpo"], "output_dir": out})
    assert codes == [2]
    refused(text, "grpo", "script sft", "--overwrite")
    assert run("sft", mine)[0] == [0]
    assert_same(out, whole("sft"))
    codes, text = run("sft", {**mine, "seed": 1})
    assert codes == [2]
    refused(text, "sft", "--seed 1", "has 0", "--overwrite")
    assert run("sft", {**mine, "seed": 1, "overwrite": True})[0] == [0]
    assert_same(out, whole("sft", seed=1))


def test_a_folder_that_is_no_run_is_left_alone(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        codes, text = run("sft", {**flags["sft"], "output_dir": tmp_path / "run", "overwrite": overwrite})
        assert codes == [2]
        refused(text, "sft", "--output_dir", "args.json")
    for content, word in (('{"script": ', "damaged"), ("[1]", "another version"), ("1", "another version")):
        (tmp_path / "run" / "args.json").write_text(content)
        codes, text = run("sft", {**flags["sft"], "output_dir": tmp_path / "run"})
        assert codes == [2]
        refused(text, "sft", "--output_dir", word)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
    codes, text = run("sft", {**flags["sft"], "output_dir": tmp_path / "run" / "thesis.txt"})
    assert codes == [2]
    refused(text, "sft", "--output_dir", "thesis.txt")


def test_a_run_of_another_version_is_left_alone(flags, whole, tmp_path):
    """One whose args.json says no format, as those of the first version: refused by name, and only --overwrite helps."""
    out = tmp_path / "run"
    shutil.copytree(whole("sft"), out)
    args = json.loads((out / "args.json").read_text())
    del args["format"]
    (out / "args.json").write_text(json.dumps(args))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    codes, text = run("sft", {**flags["sft"], "output_dir": out})
    assert codes == [2]
    refused(text, "sft", f"--output_dir {out}", "another version", "--overwrite")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run("sft", {**flags["sft"], "output_dir": out, "overwrite": True})[0] == [0]
    assert_same(out, whole("sft"))


@pytest.mark.parametrize("script, flag", [("sft", "model_name_or_path"), ("sft", "dataset_name"), ("moe", "upcycle"),
                                          ("distill", "teacher_model_name_or_path"), ("grpo", "model_name_or_path")])
def test_what_is_read_does_not_lie_where_is_written(flags, whole, tmp_path, script, flag):
    """A run must not delete or replace its model, teacher or data: not in its folder, and --overwrite or not."""
    out, given = tmp_path / "run", tmp_path / "run" / "given"
    shutil.copytree(whole("sft"), out)
    shutil.copytree(flags["grpo"]["model_name_or_path"], given)
    if flag == "dataset_name":
        given = given / "rows.jsonl"
        given.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    (tmp_path / "link.jsonl").symlink_to(given)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        for path in (given, tmp_path / "link.jsonl"):
            codes, text = run(script, {**flags[script], flag: path, "output_dir": out, "overwrite": overwrite})
            assert codes == [2]
            refused(text, script, f"--output_dir {out}: --{flag} {path} is in it")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_long_text_is_not_taken_for_a_path(flags, tmp_path):
    template = "{prompt} " + 300 * "step by step "
    codes, text = run("sft", {**flags["sft"], "prompt_template": template, "max_length": 9999, "max_steps": 1,
                              "eval_steps": 0, "output_dir": tmp_path / "run"})
    assert codes == [0], text


# --- several processes ---


def spread(flags, ranks):
    """The same run over `ranks` processes."""
    return {**flags, "per_device_train_batch_size": flags["per_device_train_batch_size"] // ranks}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(flags, whole, tmp_path, script):
    """Sharded, rows of unequal lengths: after 3 steps the weights of a single process."""
    mine = {**flags[script], "max_steps": 3, "output_dir": tmp_path / "run"}
    codes, text = run(script, spread(mine, 2), ranks=2)
    assert codes == [0, 0] and "Warning" not in text, text
    expected = whole(script, max_steps=3)
    assert largest_difference(tmp_path / "run", expected) < rounding_of_run(expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_process_with_nothing_to_train_on(flags, tmp_path, rows):
    """Only one group has any variance, on one process, and of it 1 row is trained (none on the other process), or 3
    (one more here than there): as with a single process."""
    mine = {**flags["grpo"], "max_steps": 3, "micro_batch_tokens": 1}
    assert run("grpo", {**mine, "output_dir": tmp_path / "one"}, {"one_group": rows})[0] == [0]
    codes, text = run("grpo", spread({**mine, "output_dir": tmp_path / "two"}, 2), {"one_group": rows}, ranks=2)
    assert codes == [0, 0], text
    assert largest_difference(tmp_path / "two", tmp_path / "one") < rounding_of_run(tmp_path / "one")
    _, *lines = [json.loads(line) for line in numbers_of(tmp_path / "two")]
    assert lines and all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_continues_on_another_number_of_processes(flags, whole, tmp_path, script, first, then):
    """Stopped by a signal that only the last process receives, in step 3 (and in a window of rollouts its end is waited
    for); then killed in step 5."""
    mine = {**flags[script], "output_dir": tmp_path / "run"}
    stopped = 3 + -3 % mine.get("num_iterations", 1)
    codes, text = run(script, spread(mine, first), {f"signal_at@{first - 1}": [3, TERM]}, ranks=first)
    assert codes == [143] * first and steps_of(tmp_path / "run")[-1] == stopped, text
    codes, text = run(script, spread(mine, then), {f"signal_at@{then - 1}": [5, KILL]}, ranks=then)
    assert codes[-1] == -9 and all(codes) and steps_of(tmp_path / "run")[-1] == 4, text
    codes, text = run(script, spread(mine, first), ranks=first)
    assert codes == [0] * first and "step_4" in text, text
    expected = whole(script)
    assert largest_difference(tmp_path / "run", expected) < rounding_of_run(expected)
    for line, theirs in zip(numbers_of(tmp_path / "run"), numbers_of(expected), strict=True):
        line, theirs = json.loads(line), json.loads(theirs)
        assert line.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_close(line[name], value, size=max(1.0, abs(value)))


@pytest.mark.parametrize("script", ["sft", "grpo"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_process_ends_all_and_nothing_is_lost(flags, tmp_path, script, victim):
    """SIGKILL in the middle of a step and in a save: the others end by themselves, and the run ends bit-equal."""
    mine = spread({**flags[script], "output_dir": tmp_path / "whole"}, 2)
    assert run(script, mine, ranks=2)[0] == [0, 0]
    mine["output_dir"] = tmp_path / "run"
    for fault in ({f"signal_at@{victim}": [3, KILL]}, {f"kill_at_write@{victim}": ["unfinished", 3]}):
        codes, text = run(script, mine, fault, ranks=2)
        assert codes[victim] == -9 and codes[1 - victim] not in (0, -9), text
    codes, text = run(script, mine, ranks=2)
    assert codes == [0, 0] and "continues from" in text, text
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_process_that_hangs_ends_the_run_within_the_timeout(flags, tmp_path):
    job = start("sft", spread({**flags["sft"], "output_dir": tmp_path / "run", "ddp_timeout": 5}, 2),
                {"hang_at@1": 4}, ranks=2)
    job.processes[0].join(60)
    code = job.processes[0].exitcode
    for process in job.processes:
        process.kill()
    assert code not in (None, 0), job.text()
    assert steps_of(tmp_path / "run") == [2]


def test_torchrun_ends_all_where_one_raises(flags, whole, tmp_path):
    """The real thing: exit code 1 well before the timeout of half an hour. Then one process, started without torchrun,
    finishes the run."""
    mine = {**flags["sft"], "output_dir": tmp_path / "run", "model_name_or_path": flags["grpo"]["model_name_or_path"]}
    two = faults.command_line(spread(mine, 2))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                str(faults.free_port()), str(ROOT / "tests" / "faults.py"), "sft", '{"crash_at@1": 4}', *two]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1 and "an injected crash" in done.stderr, done.stderr
    assert steps_of(tmp_path / "run") == [2]
    alone = [sys.executable, str(ROOT / "tests" / "faults.py"), "sft", "{}", *faults.command_line(mine)]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and "continues from" in done.stdout, done.stderr
    assert run("sft", {**mine, "output_dir": tmp_path / "one"})[0] == [0]
    assert largest_difference(tmp_path / "run", tmp_path / "one") < rounding_of_run(tmp_path / "one")


def test_a_stop_that_torchrun_passes_on_saves(flags, tmp_path):
    """A scheduler sends the signal to all processes, and torchrun then sends it to its own again."""
    mine = {**flags["sft"], "output_dir": tmp_path / "run", "max_steps": 500, "save_steps": 0, "eval_steps": 0,
            "per_device_train_batch_size": 1024}  # steps of a second or more: both signals come within one
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                str(faults.free_port()), str(ROOT / "sft.py"), *faults.command_line(spread(mine, 2))]
    job = subprocess.Popen(torchrun, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while len(numbers_of(tmp_path / "run") if (tmp_path / "run/metrics.jsonl").exists() else ()) < 2:
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.1)
    for worker in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        os.kill(int(worker), TERM)
    time.sleep(0.3)
    job.send_signal(TERM)
    job.wait(timeout=60)
    [step] = steps_of(tmp_path / "run")
    assert 2 <= step < 500 and is_whole(newest(tmp_path / "run"))


# --- wandb ---


def test_wandb_gets_the_numbers_and_finds_its_run_again(flags, tmp_path):
    """Offline: what would be sent lies in the run's folder, of the stopped and of the continued run under one id."""
    pytest.importorskip("wandb")
    mine = {**flags["sft"], "output_dir": tmp_path / "run", "report_to": "wandb",
            "model_name_or_path": flags["grpo"]["model_name_or_path"]}
    script = [sys.executable, str(ROOT / "sft.py"), *faults.command_line(mine)]  # a fork would end without a farewell
    killed = [sys.executable, str(ROOT / "tests" / "faults.py"), "sft", f'{{"signal_at": [3, {TERM:d}]}}', *script[2:]]
    offline = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "RANK": "0"}
    for command, code in ((killed, 143), (script, 0)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=offline)
        assert done.returncode == code, done.stderr
    wanted = json.loads((tmp_path / "run" / "args.json").read_text())["run_id"]
    records = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in records] == 2 * [f"run-{wanted}.wandb"]
    losses = [json.loads(line)["loss"] for line in numbers_of(tmp_path / "run")[1:]]
    for path, own, others in zip(records, (losses[:3], losses[3:]), (losses[3:], losses[:3])):
        data = path.read_bytes()
        assert all(json.dumps(loss).encode() in data for loss in own)
        assert not any(json.dumps(loss).encode() in data for loss in others) and b"eval/accuracy" in data


# --- what a run must not do ---


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_no_socket_is_opened_and_no_pickle_executed(flags, whole, tmp_path, script):
    """Neither in a new run nor in a continued one: no network, no telemetry, nothing in a checkpoint that runs."""
    mine = {**flags[script], "output_dir": tmp_path / "run"}
    forbidden = {"forbid": ["socket.", "pickle."]}
    codes, text = run(script, mine, {**forbidden, "signal_at": [3, TERM]})
    assert codes == [143], text
    codes, text = run(script, mine, forbidden)
    assert codes == [0], text
    assert_same(tmp_path / "run", whole(script))


def test_sources_trust_nothing():
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        for word in ("torch.load", "weights_only=False", "trust_remote_code", "pickle"):
            assert word not in source, f"{path.name}: {word}"


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_memory_is_flat(flags, tmp_path, script):
    """Step 200 has needed no more memory than step 50."""
    mine = {**flags[script], "output_dir": tmp_path / "run", "max_steps": 200, "save_steps": 25, "eval_steps": 25,
            "num_iterations": 1}
    if script == "sft":
        del mine["num_iterations"]
    codes, text = run(script, mine)
    assert codes == [0], text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    growth_mb = (lines[199]["time/peak_memory_gb"] - lines[49]["time/peak_memory_gb"]) * 1024
    assert growth_mb < 4
