"""What a claim is, how its runs are made, and what is computed from them. Used by run.py and the *_claims.py files."""
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from eval import bootstrap_interval  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def read_lines(folder):
    """The lines of a run's metrics.jsonl: list of dict."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_curve(folder, key="eval/accuracy", x="rollouts"):
    """[(x, value)] of every line of a run's metrics.jsonl that has both numbers."""
    return [(line[x], line[key]) for line in read_lines(folder) if key in line and x in line]


def area(curve, until=None):
    """The mean height of a curve [(x, y)] from 0 to `until` (its last x where None): trapezoids; constant before its
    first point; a later `until` than the curve's last point raises ValueError, since nothing is known there."""
    xs, ys = (np.array(values, dtype=float) for values in zip(*curve))
    until = until or xs[-1]
    if until > xs[-1]:
        raise ValueError(f"the curve ends at {xs[-1]}, before {until}")
    xs, ys = np.append(0.0, xs), np.append(ys[0], ys)
    inside = xs < until
    xs, ys = np.append(xs[inside], until), np.append(ys[inside], np.interp(until, xs, ys))
    return float(((xs[1:] - xs[:-1]) * (ys[1:] + ys[:-1])).sum() / 2 / until)


def reach(curve, threshold):
    """The first x at which the curve is at or above the threshold, by straight lines; None: never (censored)."""
    before = None
    for x, y in curve:
        if y >= threshold:
            if before is None or y == before[1]:
                return float(x)
            return float(before[0] + (x - before[0]) * (threshold - before[1]) / (y - before[1]))
        before = x, y
    return None


def last(curve):
    """The last value of a curve."""
    return curve[-1][1]


@dataclass(frozen=True)
class Claim:
    """One sentence that numbers can contradict, and the runs that try.

    Command lines are those of the scripts, with {start}, {out}, {seed}, {claim} (the folder of all its runs) and
    {other} (another seed) filled in. `measure(out)` reads one run's
    folder and returns its figures; the first is the main one, of which more is better. `curve(out)` is what the
    picture shows.
    """

    name: str
    source: str  # paper
    says: str
    arms: dict  # name -> command lines, or functions(out, seed, start), or one function; the first is the baseline
    measure: Callable  # (folder) -> {figure: number or None}
    start: tuple = ()  # command lines or functions(start) that make what all runs begin from; made once for all seeds
    pairs: tuple = ()  # (arm, against) to compare; empty: every arm against the first
    curve: Callable | None = read_curve  # (folder) -> [(x, y)]; None: no curve is drawn
    axes: tuple = ("rollouts", "accuracy")
    seeds: int = 5
    quick: str = ""  # flags added to every arm's commands by --quick
    premise: Callable | None = None  # (start folder) -> {name: number} that must hold for the comparison to mean much
    notes: str = ""  # what was tried, what to beware of


MEASURED_WITH = {  # defaults that were others when the claims were measured; a command's own flags stand behind them
    **dict.fromkeys(("dpo.py", "grpo.py"), "--eval_on_start False"),
    "distill.py": "--eval_on_start False --warmup_steps 10 --trace_temperature 1",
    **dict.fromkeys(("sft.py", "moe.py"), "--eval_on_start False --warmup_steps 20")}


def run_command(command):
    """One command line in this process; raises RuntimeError where it does not end well."""
    script, *words = shlex.split(command)
    sys.argv = [script, *MEASURED_WITH[script].split(), *words]
    module = importlib.import_module(script.removesuffix(".py"))
    try:
        module.launch(module.main, module.Config)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}: {command}") from end


def run_arm(commands, log, **places):
    """Runs an arm's command lines and calls its functions, with everything printed going to the file `log`.

    Beside it goes a file `.cpu` with the seconds of processor time; a finished run that is only looked at again, which
    takes next to none, does not change it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    try:
        for command in [commands] if callable(commands) else commands:
            if callable(command):
                command(**{name: place for name, place in places.items() if name not in ("claim", "other")})
            else:
                run_command(command.format(**places))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    spent = log.with_suffix(".cpu")
    spent.write_text(str(max(time.process_time(), cpu_seconds(log))))
    os._exit(0)


def cpu_seconds(log):
    """What the run with this log has cost in processor time, 0 where nobody has written it down."""
    spent = log.with_suffix(".cpu")
    return float(spent.read_text()) if spent.exists() else 0.0


def run_all(tasks, jobs):
    """Runs (commands, log, places) in forked processes, `jobs` at a time; RuntimeError with a log's end on a failure."""
    fork, waiting, running = multiprocessing.get_context("fork"), list(tasks), []
    total, began = len(waiting), time.perf_counter()
    while waiting or running:
        while waiting and len(running) < jobs:
            commands, log, places = waiting.pop(0)
            process = fork.Process(target=run_arm, args=(commands, log), kwargs=places)
            process.start()
            running.append((process, log))
        time.sleep(0.1)
        for process, log in [pair for pair in running if not pair[0].is_alive()]:
            process.join()
            running.remove((process, log))
            if process.exitcode:
                for other, _ in running:
                    other.terminate()
                raise RuntimeError(f"{log}:\n" + "\n".join(log.read_text().splitlines()[-12:]))
            done = total - len(waiting) - len(running)
            print(f"{done:>4}/{total} runs, {time.perf_counter() - began:.0f} s", flush=True)


def start_folder(claim, runs, jobs):
    """Where the claim's shared start lies; it is made where it is not there."""
    if not claim.start:
        return None
    words = "\n".join(inspect.getsource(part) if callable(part) else part for part in claim.start)
    folder = runs / ("start-" + hashlib.sha256(words.encode()).hexdigest()[:12])
    if not (folder / "made").exists():
        (folder / "run").mkdir(parents=True, exist_ok=True)  # so that {start}/.. is a place
        run_all([(claim.start, folder / "log.txt", {"start": folder / "run"})], jobs)
        (folder / "made").touch()
    return folder / "run"


T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2, 3, ... 10 seeds


def compare(figures, arm, against, name):
    """Paired by seed: {difference, low, high, t_low, t_high, wins, losses} of `arm` minus `against`.

    low and high are the bootstrap's 95 %, which for a handful of seeds is too narrow (with 3 it holds the truth about
    three times in four); t_low and t_high are Student's, which is right for normal differences and wide for others.
    Seeds in which either is None (never reached) are left out of the difference and counted as `censored`.
    """
    pairs = [(figures[arm][seed][name], figures[against][seed][name]) for seed in figures[arm]]
    differences = [round(a - b, 9) for a, b in pairs if a is not None and b is not None]
    n = len(differences)
    found = {"arm": arm, "against": against, "figure": name, "censored": len(pairs) - n,
             "difference": None, "low": None, "high": None, "t_low": None, "t_high": None,
             "wins": sum(d > 0 for d in differences), "losses": sum(d < 0 for d in differences)}
    if n:
        found["difference"] = float(np.mean(differences))
    if n > 1:
        found["low"], found["high"] = bootstrap_interval(differences)
        half = T_975[min(n, 10) - 2] * float(np.std(differences, ddof=1)) / n**0.5
        found |= {"t_low": found["difference"] - half, "t_high": found["difference"] + half}
    numbers = {key: round(value, 9) + 0.0 for key, value in found.items() if isinstance(value, float)}
    return found | numbers  # rounded, since of a difference of 0 arithmetic may leave 1e-17


def verdict(comparison, words=("better", "worse")):
    """The word for up or down where both intervals leave out 0, `leans` before it where only the bootstrap's does."""
    low, high = comparison["low"], comparison["high"]
    if low is None or low <= 0 <= high:
        return "no difference seen"
    leans = "leans " if comparison["t_low"] <= 0 <= comparison["t_high"] else ""
    return leans + words[0 if low > 0 else 1]


def run_claim(claim, seeds, quick=False, jobs=1, runs=ROOT / "runs" / "claims"):
    """All runs of a claim and what they show: the dict that results/NAME.json holds. Finished runs are not repeated."""
    extra = claim.quick if quick else ""
    folder = runs / ("quick" if quick else "") / claim.name
    start = start_folder(claim, runs, jobs)
    tasks = []
    for arm, commands in claim.arms.items():  # arm by arm, so that an arm can replay the runs of one before it
        if not callable(commands):
            commands = tuple(part if callable(part) else f"{part} {extra}" for part in commands)
        for seed in range(seeds):
            out = folder / arm.replace("/", "_").replace(" ", "_") / str(seed)
            tasks.append((commands, out.with_name(f"{seed}.log"), {"out": out, "seed": seed, "start": start,
                                                                     "claim": folder, "other": (seed + 1) % seeds}))
    run_all(tasks, jobs)
    logs = [log for _, log, _ in tasks] + ([start.parent / "log.txt"] if start else [])
    figures, curves = {}, {}
    for (_, _, places), (arm, seed) in zip(tasks, [(arm, seed) for arm in claim.arms for seed in range(seeds)]):
        figures.setdefault(arm, {})[str(seed)] = claim.measure(places["out"])
        curves.setdefault(arm, {})[str(seed)] = claim.curve(places["out"]) if claim.curve else []
    pairs = claim.pairs or [(arm, next(iter(claim.arms))) for arm in list(claim.arms)[1:]]
    names = list(next(iter(figures[next(iter(figures))].values())))
    comparisons = [compare(figures, arm, against, name) for arm, against in pairs for name in names]
    words = {arm: [part.__name__ if callable(part) else part for part in ([parts] if callable(parts) else parts)]
             for arm, parts in {"start": claim.start, **claim.arms}.items()}
    return {"name": claim.name, "source": claim.source, "says": claim.says, "notes": claim.notes, "seeds": seeds,
            "command": f"python tests/claims/run.py {claim.name} --seeds {seeds}", "date": str(date.today()),
            "cpu_minutes": sum(map(cpu_seconds, logs)) / 60, "commands": words,
            "premise": claim.premise(start) if claim.premise else {}, "figures": figures, "comparisons": comparisons,
            "axes": list(claim.axes), "curves": curves,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "matplotlib": matplotlib.__version__}}


def draw(result, path):
    """The picture of a result: the arms' curves (thin: each seed, thick: their mean), and the paired differences."""
    main = next(iter(next(iter(next(iter(result["figures"].values())).values()))))
    shown = [c for c in result["comparisons"] if c["figure"] == main and c["low"] is not None]
    curves = {arm: seeds for arm, seeds in result["curves"].items() if any(seeds.values())}
    figure = Figure(figsize=(12 if curves else 7, max(3.6, 0.42 * len(shown) + 1.8)), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    for i, (arm, seeds) in enumerate(curves.items()):
        known = [np.array(curve, dtype=float) for curve in seeds.values() if curve]
        grid = np.linspace(max(c[0, 0] for c in known), min(c[-1, 0] for c in known), 60)
        for curve in known:
            axes[0].plot(curve[:, 0], curve[:, 1], color=f"C{i % 10}", alpha=0.2, linewidth=0.8)
        axes[0].plot(grid, np.mean([np.interp(grid, c[:, 0], c[:, 1]) for c in known], axis=0), color=f"C{i % 10}",
                     linestyle="-" if i < 10 else "--", linewidth=2, label=arm)
    if curves:
        axes[0].set(xlabel=result["axes"][0], ylabel=result["axes"][1])
        axes[0].legend(fontsize=8)
        axes[0].grid(alpha=0.3)
    for y, c in enumerate(reversed(shown)):
        axes[-1].errorbar(c["difference"], y, xerr=[[max(0, c["difference"] - c["low"])], [max(0, c["high"] - c["difference"])]],
                          fmt="o", color={"better": "C2", "worse": "C3"}.get(verdict(c), "0.4"), capsize=3)
        for seed, values in result["figures"][c["arm"]].items():
            other = result["figures"][c["against"]][seed][main]
            if values[main] is not None and other is not None:
                axes[-1].plot(values[main] - other, y, "|", color="0.6", markersize=9)
    axes[-1].axvline(0, color="0.3", linewidth=0.8)
    axes[-1].set_yticks(range(len(shown)), [f"{c['arm']} − {c['against']}" for c in reversed(shown)])
    axes[-1].set(xlabel=f"{main}: paired difference, 95 % interval", ylim=(-0.6, len(shown) - 0.4))
    axes[-1].grid(axis="x", alpha=0.3)
    figure.suptitle(f"{result['name']} ({result['seeds']} seeds)")
    figure.savefig(path)


def save(result):
    """Writes results/NAME.json and NAME.png."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['name']}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / f"{result['name']}.png")
