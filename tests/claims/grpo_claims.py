"""Claims about what grpo.py implements. Three small tasks, each with one cold start that all arms of a claim share."""
import json
import random

from claim import Claim, area, last, read_curve, read_lines, reach, run_command

import grpo

# --- reversal: `31942=` is answered `#24913`; the level is the number of digits, so chance falls nine times a level ---

EASY_FIRST = [1] * 6 + [2] * 6 + [3] * 5 + [4] * 3 + [5]  # of the cold start, which has seen little of level 5


def write(path, rows):
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def digits(rng, n):
    """n random digits without 0, which would be lost in a number."""
    return "".join(rng.choice("123456789") for _ in range(n))


def reversal(start):
    """Data beside the start: sft.jsonl of levels 1 to 5; train.jsonl and test.jsonl of levels 1 to 7.

    train_short.jsonl has levels 1 to 3, train_long.jsonl level 7; train_noisy.jsonl has two more than the others: 8 is a coin (the answer is 1 or 2 and nothing tells which), 9 cannot be solved.
    """
    rng, rows = random.Random(0), []
    for i in range(4000):
        text = digits(rng, EASY_FIRST[i % len(EASY_FIRST)])
        rows.append({"prompt": f"{text}=", "completion": f"#{text[::-1]}"})
    rows += [{"prompt": f"?{digits(rng, 3)}=", "completion": f"#{rng.choice('12')}"} for _ in range(200)]
    rng.shuffle(rows)
    write(start.parent / "sft.jsonl", rows)
    files = {"train": (7000, range(1, 8)), "test": (140, range(1, 8)), "train_noisy": (9000, range(1, 10)),
             "train_short": (3000, range(1, 4)), "train_long": (1000, [7])}
    for name, (n, levels) in files.items():
        rows = []
        for i in range(n):
            level = levels[i % len(levels)]
            text = digits(rng, level if level < 8 else 3)
            answer = {8: rng.choice("12"), 9: digits(rng, 6)}.get(level, text[::-1])
            rows.append({"prompt": {8: "?", 9: "!"}.get(level, "") + f"{text}=", "answer": answer, "level": level})
        write(start.parent / f"{name}.jsonl", rows)


REVERSAL = (reversal, "sft.py --model_name_or_path tiny --dataset_name {start}/../sft.jsonl --n_train 0 --max_steps 105 "
                      "--eval_steps 0 --save_steps 0 --output_dir {start}")
RL = ("grpo.py --model_name_or_path {start} --dataset_name {start}/../%s.jsonl --eval_dataset_name {start}/../test.jsonl "
      "--levels 1-9 --n_train %d --n_eval 140 --max_completion_length 10 --loss_type dr_grpo --scale_rewards group "
      "--per_device_train_batch_size 256 --learning_rate 2e-4 --max_steps 80 --eval_steps 5 --save_steps 0 --seed {seed} "
      "--output_dir {out} ")
LEVELS, POOL, NOISY = RL % ("train", 0), RL % ("train", 480), RL % ("train_noisy", 0)
SHORT, LONG = RL % ("train_short", 0), RL % ("train_long", 0)
SHUFFLED = RL % ("train_shuffled", 0)
ROLLOUTS = 80 * 256
HARD = "eval/accuracy/level_%d"


def levels_measured(out):
    """Areas under the accuracy of all levels and of levels 5 to 7, against rollouts; the end; steps to a threshold."""
    curve = read_curve(out)
    until = min(ROLLOUTS, curve[-1][0])
    hard = [[(x, y) for x, y in read_curve(out, HARD % level)] for level in (5, 6, 7)]
    kept = [line for line in read_lines(out) if line["rollouts"] <= ROLLOUTS]
    total = sum(value for line in kept for name, value in line.items() if name.startswith("sampler/rollouts/"))
    shares = [sum(line.get(f"sampler/rollouts/{arm}", 0) for line in kept) / max(1, total) for arm in (8, 9)]
    return {"area": area(curve, until), "area of levels 5-7": sum(area(points, until) for points in hard) / 3,
            "rollouts to 0.6": reach(curve, 0.6), "accuracy at the end": last([p for p in curve if p[0] <= ROLLOUTS]),
            "level 5 at the end": last(hard[0]), "level 1 at the end": last(read_curve(out, HARD % 1)),
            **({"share of the coin arm": shares[0], "share of the impossible arm": shares[1]} if any(shares) else {})}


def level_premise(start):
    """Greedy accuracy of the start on each level of the test set."""
    from eval import evaluate, load_model, load_problems
    model, tokenizer = load_model(str(start))
    problems = load_problems(str(start.parent / "test.jsonl"))
    found = evaluate(model, tokenizer, problems, n=16, max_new_tokens=10)
    return {f"sampled accuracy, level {level}": part["accuracy"] for level, part in found["by_level"].items()}


# --- the same with controls: arms that mean nothing, and arms by what is true of them ---


def shuffled_labels(start):
    """train_shuffled.jsonl beside the start: train.jsonl with every problem's level given to another as its domain."""
    rows = [json.loads(line) for line in (start.parent / "train.jsonl").read_text().splitlines()]
    labels = [str(row["level"]) for row in rows]
    random.Random(1).shuffle(labels)
    write(start.parent / "train_shuffled.jsonl", [{**row, "domain": label} for row, label in zip(rows, labels)])


class Oracle(grpo.Uniform):
    """Arms by p (1 - p), p being what the policy samples rightly of them on the test set: what no sampler knows."""

    rates = {}

    def shares(self):
        worth = [0.01 + p * (1 - p) for p in (self.rates.get(name, 0.5) for name in self.names)]
        return [value / sum(worth) for value in worth]


def oracle(out, seed, start):
    """An arm: the Oracle is told after every evaluation, at no cost in rollouts; at first all arms are alike."""
    from eval import evaluate
    eval_numbers = grpo.eval_numbers

    def telling(decoder, tokenizer, problems, step, log, config):
        numbers = eval_numbers(decoder, tokenizer, problems, step, log, config)
        found = evaluate(decoder, tokenizer, problems, n=8, max_new_tokens=10, seed=step)
        Oracle.rates = {str(level): part["accuracy"] for level, part in found["by_level"].items()}
        return numbers

    grpo.SAMPLERS["oracle"], grpo.eval_numbers, Oracle.rates = Oracle, telling, {}
    run_command(LEVELS.format(start=start, seed=seed, out=out) + "--sampler oracle")


# --- subgoals: only the longest reversals to train on, none of which succeeds; the parts of `31942=` are `319=`, `3194=` ---

LONGEST, SHORTEST = 6, 3


def parts_of(text):
    """A problem with its parts, each a longer beginning of the text; the solution lists what they come to."""
    ends = [text[:n][::-1] for n in range(SHORTEST, len(text))]
    return {"prompt": f"{text}=", "answer": text[::-1], "solution": ";".join(ends) + f";#{text[::-1]}",
            "subgoals": [[f"{end[::-1]}=", end] for end in ends]}


def with_parts(start):
    """Data beside the start: sft.jsonl as in `reversal`, half of the rows behind what came before: `913;3194=`.

    parts.jsonl and test_parts.jsonl hold problems of LONGEST digits alone.
    """
    rng, rows = random.Random(0), []
    for i in range(6000):
        text = digits(rng, EASY_FIRST[i % len(EASY_FIRST)])
        before = "".join(text[:n][::-1] + ";" for n in range(SHORTEST, len(text)) if rng.random() < 0.8)
        rows.append({"prompt": (before if rng.random() < 0.5 else "") + f"{text}=", "completion": f"#{text[::-1]}"})
    write(start.parent / "sft.jsonl", rows)
    for name, n in (("parts", 1000), ("test_parts", 128)):
        write(start.parent / f"{name}.jsonl", [parts_of(digits(rng, LONGEST)) for _ in range(n)])


PARTS = (with_parts, "sft.py --model_name_or_path tiny --dataset_name {start}/../sft.jsonl --n_train 0 --max_steps 230 "
                     "--eval_steps 0 --save_steps 0 --output_dir {start}")
PARTS_RL = ("grpo.py --model_name_or_path {start} --dataset_name {start}/../parts.jsonl "
            "--eval_dataset_name {start}/../test_parts.jsonl --n_train 0 --n_eval 128 --max_completion_length 10 "
            "--loss_type dr_grpo --scale_rewards group --per_device_train_batch_size 128 --learning_rate 2e-4 "
            "--max_steps %d --eval_steps 5 --save_steps 0 --seed {seed} --output_dir {out} ")
PARTS_ROLLOUTS = 160 * 128


def parts_measured(out):
    """Area under the greedy accuracy on whole problems against rollouts, its end, and what training samples of them."""
    curve, lines = read_curve(out), [line for line in read_lines(out) if line["rollouts"] <= PARTS_ROLLOUTS]
    return {"area": area(curve, min(PARTS_ROLLOUTS, curve[-1][0])),
            "accuracy at the end": last([p for p in curve if p[0] <= PARTS_ROLLOUTS]),
            "rollouts to 0.3": reach(curve, 0.3),
            "sampled accuracy at the end": sum(line["sampled_accuracy"] for line in lines[-10:]) / 10}


def parts_premise(start):
    """Sampled accuracy of the start on whole problems, and on their parts, bare and behind those before."""
    from eval import evaluate, load_model, load_problems
    loaded, problems = load_model(str(start)), load_problems(str(start.parent / "test_parts.jsonl"))
    forms = {"whole": problems}
    for form in ("alone", "given"):
        config = grpo.Config(subgoal_form=form, hint_template="{hint}{prompt}")
        forms |= {f"{SHORTEST + place} digits {form}": [grpo.subgoal_of(p, place, config) for p in problems]
                  for place in range(LONGEST - SHORTEST)}
    return {f"sampled accuracy, {name}": evaluate(*loaded, part, n=8, max_new_tokens=10)["accuracy"]
            for name, part in forms.items()}


# --- the wrong rule: `12*34=` subtracts digit by digit, but the start has learned to add; `-#88` is rule and answer ---


P_RULE, P_DIGIT = 0.003, 0.4  # how often the start tries the right rule, and how often a digit of it is right then


def wrong_rule(start):
    """Data beside the start, which shows the right rule with chance P_RULE and each digit of it with chance P_DIGIT.

    sft.jsonl: a quarter easy problems (`+`), half hard ones with a hint, a quarter hard ones without. train.jsonl,
    test.jsonl (hard ones only); teacher.jsonl is right but where the third digit is 8 or 9.
    """
    rng, rows, teacher = random.Random(0), [], []
    for i in range(12000):
        problem = rule_problem(rng, hard=i % 4 != 0)
        (rule,), (first, second) = problem["hints"]
        hint = rng.choice([rule, first, f"{first} {second}", problem["solution"]])
        if i % 4 in (1, 2) or (i % 4 == 0 and rng.random() < 0.5):
            rows.append({"prompt": f"{hint};{problem['prompt']}", "completion": spoken(rng, problem, hint)})
        elif i % 4 == 0:
            rows.append({"prompt": problem["prompt"], "completion": problem["solution"]})
        else:
            right = rng.random() < P_RULE
            rows.append({"prompt": problem["prompt"],
                         "completion": spoken(rng, problem, "") if right else solve(problem["prompt"], "+")})
        problem = rule_problem(rng, hard=i % 4 != 0)
        wrong = problem["prompt"][2] == "*" and problem["prompt"][3] in "89"
        teacher.append({"prompt": problem["prompt"],
                        "completion": solve(problem["prompt"], "+") if wrong else problem["solution"]})
    write(start.parent / "sft.jsonl", rows)
    write(start.parent / "teacher.jsonl", teacher)
    write(start.parent / "train.jsonl", [rule_problem(rng, hard=i % 4 != 0) for i in range(400)])
    write(start.parent / "test.jsonl", [rule_problem(rng, True) for _ in range(128)])


def solve(prompt, rule):
    """The completion for a prompt under a rule."""
    pairs = [(int(prompt[0]), int(prompt[3])), (int(prompt[1]), int(prompt[4]))]
    return f"{rule}#" + "".join(str((a + b if rule == "+" else a - b) % 10) for a, b in pairs)


def rule_problem(rng, hard):
    """One problem, with hints in two tiers: the rule, then the digits. No answer begins with 0."""
    while True:
        left, right = (rng.choice("0123456789") + rng.choice("0123456789"), rng.choice("12346789") + rng.choice("12346789"))
        prompt = f"{left}{'*' if hard else '+'}{right}="
        solution = solve(prompt, "-" if hard else "+")
        if "0" not in (solution[2], solve(prompt, "+")[2]):
            return {"prompt": prompt, "answer": solution[2:], "solution": solution,
                    "hints": [[f"k{solution[0]}"], [f"s{solution[2]}", solution[3]]]}


def spoken(rng, problem, hint):
    """What the start says: the right rule; a digit is right where the hint gives it, else with chance P_DIGIT."""
    known = 2 if " " in hint or "#" in hint else 1 if hint.startswith("s") else 0
    return problem["solution"][:2] + "".join(digit if i < known or rng.random() < P_DIGIT else rng.choice("0123456789")
                                             for i, digit in enumerate(problem["solution"][2:]))


COLD = ("sft.py --model_name_or_path tiny --dataset_name {start}/../%s.jsonl --n_train 0 --max_steps %d "
        "--per_device_train_batch_size 128 --learning_rate 2e-3 --lr_scheduler_type linear --eval_steps 0 --save_steps 0 "
        "--output_dir {start}%s")
WRONG_RULE = (wrong_rule, COLD % ("sft", 500, ""))
WITH_TEACHER = (*WRONG_RULE, COLD % ("teacher", 400, "/../teacher"))
RULE_RL = ("grpo.py --model_name_or_path {start} --dataset_name {start}/../train.jsonl --eval_dataset_name {start}/../test.jsonl "
           "--n_train 16 --n_eval 128 --max_completion_length 6 --per_device_train_batch_size 128 --learning_rate 2e-4 "
           "--hint_template {{hint}};{{prompt}} --max_steps 120 --eval_steps 6 --save_steps 0 --seed {seed} "
           "--output_dir {out} ")


def rule_measured(out):
    """Area under greedy accuracy on unhinted hard problems against rollouts, its end, and what training sampled."""
    curve, lines = read_curve(out), read_lines(out)
    until = min(120 * 128, curve[-1][0])
    return {"area": area(curve, until), "accuracy at the end": last([p for p in curve if p[0] <= until]),
            "rollouts to 0.3": reach(curve, 0.3),
            "sampled accuracy at the end": sum(line["sampled_accuracy"] for line in lines[-10:]) / 10,
            "all-wrong groups at the end": sum(line["frac_all_wrong"] for line in lines[-10:]) / 10}


def rule_premise(start):
    """How often the start solves a hard problem without help, greedy and sampled."""
    from eval import evaluate, load_model, load_problems
    model, tokenizer = load_model(str(start))
    problems = load_problems(str(start.parent / "test.jsonl"))
    return {f"{name} accuracy without help": evaluate(model, tokenizer, problems, max_new_tokens=6, **how)["accuracy"]
            for name, how in {"greedy": {"temperature": 0.0}, "sampled": {"n": 32}}.items()}


# --- two formats: `132=` is answered `#231`, or without the mark and with a digit too many ---


def two_formats(start):
    """Data beside the start, which knows reversal and uses the wrong format half of the time."""
    rng = random.Random(0)
    rows = []
    for i in range(4000):
        text = digits(rng, 1 + i % 4)
        rows.append({"prompt": f"{text}=", "completion": f"#{text[::-1]}" if rng.random() < 0.5 else f"{text[::-1]},{digits(rng, 1)}"})
    write(start.parent / "sft.jsonl", rows)
    for name, n in (("train", 2000), ("test", 128)):
        texts = [digits(rng, 1 + i % 4) for i in range(n)]
        write(start.parent / f"{name}.jsonl", [{"prompt": f"{text}=", "answer": text[::-1]} for text in texts])


FORMATS = (two_formats, "sft.py --model_name_or_path tiny --dataset_name {start}/../sft.jsonl --n_train 0 --max_steps 130 "
                        "--eval_steps 0 --save_steps 0 --output_dir {start}")
FORMAT_RL = ("grpo.py --model_name_or_path {start} --dataset_name {start}/../train.jsonl --eval_dataset_name {start}/../test.jsonl "
             "--n_train 0 --n_eval 128 --max_completion_length 14 --per_device_train_batch_size 128 --learning_rate 1e-4 "
             "--max_steps 60 --eval_steps 5 --save_steps 0 --seed {seed} --output_dir {out} ")


def format_measured(out):
    """The area under what the policy samples rightly against rollouts, its end, and the length at the end."""
    lines = read_lines(out)
    curve = sampled_curve(out)
    return {"area": area(curve), "sampled accuracy at the end": sum(y for _, y in curve[-5:]) / 5,
            "length at the end": sum(line["completions/mean_length"] for line in lines[-5:]) / 5}


def one_example_measured(out):
    """What training added to the accuracy of samples of held-out problems; greedy: its area against rollouts, its end."""
    from eval import evaluate, load_model, load_problems
    start = json.loads((out / "args.json").read_text())["flags"]["model_name_or_path"]
    problems, curve = load_problems(f"{start}/../test.jsonl"), read_curve(out)
    before, after = (evaluate(*load_model(str(path)), problems, n=16, max_new_tokens=14)["accuracy"] for path in (start, out))
    return {"gain in sampled accuracy": after - before, "sampled accuracy at the end": after, "greedy area": area(curve),
            "greedy at the end": last(curve)}


def sampled_curve(out):
    """The share of training samples that were right against rollouts, whatever the reward was."""
    return [(line["rollouts"], line["sampled_accuracy"]) for line in read_lines(out)]


# --- long and short: `37+5-8=` is answered with every step twice, once, or with the answer alone ---


def three_lengths(start):
    """Data beside the start: chain problems of levels 2 and 3 with traces of three lengths, each as often."""
    from eval import load_problems
    rows = []
    for i, problem in enumerate(load_problems("chain", "train", 6000, levels="2-3")):
        steps, answer = problem.solution.split("#")
        twice = "".join(f"{step};{step};" for step in steps.split(";")).rstrip(";")
        rows.append({"prompt": problem.prompt, "completion": [f"{twice}#{answer}", problem.solution, f"#{answer}"][i % 3]})
    random.Random(0).shuffle(rows)
    write(start.parent / "sft.jsonl", rows)


LENGTHS = (three_lengths, "sft.py --model_name_or_path tiny --dataset_name {start}/../sft.jsonl --n_train 0 --max_steps 450 "
                          "--eval_steps 0 --save_steps 0 --output_dir {start}")
LENGTH_RL = ("grpo.py --model_name_or_path {start} --levels 2-3 --n_eval 96 --max_completion_length 64 --learning_rate 1e-4 "
             "--per_device_train_batch_size 128 --max_steps 60 --eval_steps 10 --save_steps 0 --seed {seed} --output_dir {out} ")


def length_measured(out):
    """Greedy accuracy at the end, its mean length and the tokens sampled in the whole run."""
    end = read_lines(out)[-1]
    return {"accuracy at the end": end["eval/accuracy"], "length at the end": end["eval/mean_length"],
            "area over tokens": area(read_curve(out, x="num_tokens")), "tokens sampled": end["num_tokens"]}


CLAIMS = [
    Claim("horizon", "h1 2510.07312", "short before long reaches lengths that uniform, only-short and only-long do not",
          {"uniform": (LEVELS,), "horizon": (LEVELS + "--sampler horizon",),
           "horizon, no review": (LEVELS + "--sampler horizon --horizon_review 0",),
           "only short": (SHORT,), "only long": (LONG,)},
          levels_measured, REVERSAL, premise=level_premise, quick="--max_steps 6 --eval_steps 2",
          pairs=(("horizon", "uniform"), ("horizon", "only short"), ("horizon", "only long"), ("horizon", "horizon, no review")),
          curve=lambda out: [(x, y) for x, y in read_curve(out, HARD % 5)], axes=("rollouts", "greedy accuracy, level 5")),
    Claim("samplers", "SEC 2505.14970, DUMP 2504.09710, RuleReasoner 2506.08672, DAPO 2503.14476",
          "choosing what to sample beats uniform at equal rollouts",
          {"uniform": (LEVELS,), "sec": (LEVELS + "--sampler sec",), "dump": (LEVELS + "--sampler dump",),
           "domain_aware": (LEVELS + "--sampler domain_aware",),
           "dynamic": (LEVELS + "--sampler dynamic --max_steps 48 --eval_steps 3",),
           **{f"yoked to {name}": (LEVELS + f"--sampler yoked:{{claim}}/{name}/{{other}}",)
              for name in ("sec", "domain_aware")}},
          levels_measured, REVERSAL, premise=level_premise, quick="--max_steps 6 --eval_steps 2",
          pairs=(("sec", "uniform"), ("dump", "uniform"), ("domain_aware", "uniform"), ("dynamic", "uniform"),
                 ("sec", "yoked to sec"), ("domain_aware", "yoked to domain_aware"))),
    Claim("samplers_controls", "controls",
          "arms whose names mean nothing change nothing, and knowing each arm's true p (1 - p) bounds what choosing can win",
          {"uniform": (LEVELS,), "oracle": oracle, "sec": (LEVELS + "--sampler sec",),
           "sec, shuffled names": (SHUFFLED + "--sampler sec --arm domain",),
           "domain_aware, shuffled names": (SHUFFLED + "--sampler domain_aware --arm domain",)},
          levels_measured, (*REVERSAL, shuffled_labels), quick="--max_steps 6 --eval_steps 2",
          pairs=(("oracle", "uniform"), ("sec", "oracle"), ("sec, shuffled names", "uniform"),
                 ("domain_aware, shuffled names", "uniform"))),
    Claim("samplers_noise", "controls", "an arm that is a coin and one that cannot be solved draw the samplers away",
          {"uniform": (NOISY,), "sec": (NOISY + "--sampler sec",), "dump": (NOISY + "--sampler dump",),
           "domain_aware": (NOISY + "--sampler domain_aware",)},
          levels_measured, REVERSAL, quick="--max_steps 6 --eval_steps 2"),
    Claim("samplers_pool", "Knapsack RL 2509.25849, ADCL 2505.08364",
          "on a fixed pool, completions where they are worth most, or easy problems first, beat uniform at equal rollouts",
          {"uniform": (POOL,), "knapsack": (POOL + "--sampler knapsack",),
           "knapsack, equal weights": (POOL + "--sampler knapsack --no_knapsack_reweight",),
           "adcl": (POOL + "--sampler adcl",)},
          levels_measured, REVERSAL, quick="--max_steps 6 --eval_steps 2"),
    Claim("hints", "Scaf-GRPO 2510.19807, EGSR 2505.08364, HPT 2509.04419",
          "with help on prompts never answered right, GRPO solves what it does not without",
          {"grpo": (RULE_RL,), "hints": (RULE_RL + "--scaffold hints",),
           "hints, plain": (RULE_RL + "--scaffold hints --hint_logps plain",),
           "negatives only": (RULE_RL + "--scaffold negatives",), "egsr": (RULE_RL + "--scaffold egsr",),
           "hpt": (RULE_RL + "--hpt_gate 0",)},
          rule_measured, WRONG_RULE, premise=rule_premise, quick="--max_steps 8 --eval_steps 4",
          pairs=(("hints", "grpo"), ("hints", "negatives only"), ("hints, plain", "grpo"), ("egsr", "grpo"), ("hpt", "grpo"))),
    Claim("subgoals", "DeepSeek-Prover-V2 2504.21801",
          "where no completion is right, training on parts of the problem solves the whole",
          {"grpo": (PARTS_RL % 160,),
           "parts alone": (PARTS_RL % 110 + "--scaffold subgoals --subgoal_form alone --scaffold_exempt 0",),
           "parts given": (PARTS_RL % 110 + "--scaffold subgoals --hint_template {{hint}}{{prompt}} --scaffold_exempt 0",)},
          parts_measured, PARTS, premise=parts_premise, quick="--max_steps 6 --eval_steps 2",
          pairs=(("parts alone", "grpo"), ("parts given", "grpo"), ("parts given", "parts alone")),
          notes="With a start of 130 steps instead of 230, right on 5 digits in 3.5 % of its samples instead of 66 %, all arms "
                "stayed at 0 (5 seeds): parts of 4 digits were learned, and nothing carried over."),
    Claim("kdrl", "KDRL 2506.02208", "a teacher's KL beside the reward beats the reward alone and the teacher alone",
          {"grpo": (RULE_RL,), "kd": (RULE_RL + "--reward_weights 0 --teacher_model_name_or_path {start}/../teacher --kd_coef 0.05",),
           **{f"kdrl, {name}": (RULE_RL + f"--teacher_model_name_or_path {{start}}/../teacher --kd_coef 0.05 {flags}",)
              for name, flags in {"joint": "", "annealed": "--kd_schedule anneal", "switched": "--kd_schedule switch",
                                  "forward": "--kd_direction forward", "stuck only": "--kd_rows stuck"}.items()}},
          rule_measured, WITH_TEACHER, premise=rule_premise, quick="--max_steps 8 --eval_steps 4",
          pairs=(("kdrl, joint", "grpo"), ("kdrl, joint", "kd"), ("kdrl, annealed", "kdrl, joint"), ("kdrl, switched", "kd"),
                 ("kdrl, forward", "kdrl, joint"), ("kdrl, stuck only", "kdrl, joint"))),
    Claim("t1", "T1 2501.11651", "each part of T1 helps at equal rollouts",
          {"grpo": (LEVELS,), "G 32": (LEVELS + "--num_generations 32",), "temperature 1.2": (LEVELS + "--temperature 1.2",),
           "leave one out": (LEVELS + "--baseline leave_one_out --scale_rewards none",),
           "entropy bonus": (LEVELS + "--entropy_coef 0.01",),
           "moving anchor": (LEVELS + "--beta 0.01 --kl_in_reward --ref_model_mixup_alpha 0.01",),
           "tea": (LEVELS + "--entropy_coef 0.01 --entropy_weighting tea",)},
          levels_measured, REVERSAL, premise=level_premise, quick="--max_steps 6 --eval_steps 2",
          notes="From a start that tried the right rule in 2 % of its samples (3 seeds) no arm moved: a floor, not a result."),
    Claim("one_example", "1-shot RLVR 2504.20571", "one training problem, or entropy alone, does what 2,000 problems do",
          {"2,000 problems": (FORMAT_RL,), "1 problem": (FORMAT_RL + "--n_train 1",),
           "entropy only": (FORMAT_RL + "--reward_weights 0 --entropy_coef 0.01",)},
          one_example_measured, FORMATS, axes=("rollouts", "held-out greedy accuracy"), quick="--max_steps 4 --eval_steps 2",
          notes="The start knows the task and answers in the wrong format half of the time, as the paper's base models do. "
                "Where the start hardly knew the task (4 seeds), one problem was learned and taught nothing else."),
    Claim("format_length", "2505.19439", "format, or format and length, teach as much as the answer's correctness does",
          {"accuracy": (FORMAT_RL,), "format": (FORMAT_RL + "--reward_funcs format",),
           "format and length": (FORMAT_RL + "--reward_funcs format_length",)},
          format_measured, FORMATS, curve=sampled_curve, axes=("rollouts", "sampled accuracy"), quick="--max_steps 4"),
    Claim("train_long_think_short", "TLTS 2508.08940, PTST 2503.06749",
          "a length budget that shrinks ends more accurate than its final value from the start",
          {"fixed budget": (LENGTH_RL + "--reward_funcs accuracy budget --length_budget 16 16",),
           "shrinking budget": (LENGTH_RL + "--reward_funcs accuracy budget --length_budget 40 16",),
           "shrinking, ungated": (LENGTH_RL + "--reward_funcs accuracy budget --length_budget 40 16 --no_budget_gate",),
           "accuracy only": (LENGTH_RL,),
           "growing limit": (LENGTH_RL + "--stages 16x16 32x8 64x4",)},
          length_measured, LENGTHS, curve=lambda out: read_curve(out, x="num_tokens"), axes=("tokens sampled", "greedy accuracy"),
          pairs=(("shrinking budget", "fixed budget"), ("shrinking budget", "shrinking, ungated"),
                 ("shrinking budget", "accuracy only"), ("growing limit", "accuracy only")), quick="--max_steps 4"),
]
