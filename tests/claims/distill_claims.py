"""Claims about what distill.py implements, on one small task that needs thinking: sums of digits modulo 10.

`358214=` is thought through as `86893`, the running sums, and answered `#3`. A thought is noisy where steps are wrong, and
a leak where it only repeats the answer, which somebody who reads the solution can always do.
"""
import json
import random
from pathlib import Path

import torch
from claim import Claim, area, read_lines

import eval as ground

SMALL = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=256, tie_word_embeddings=False)  # 0.1 M parameters
LARGE = {**SMALL, "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "head_dim": 24}  # 0.4 M
TERMS, LARGEST = 6, 3


def write(path, rows):
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def running(terms, rng=None, error_rate=0.0):
    """The running sums of a prompt's digits, as text; error_rate of them are wrong, and it goes on from there."""
    value, sums = terms[0], ""
    for term in terms[1:]:
        value = (value + term + (rng.randrange(1, 10) if error_rate and rng.random() < error_rate else 0)) % 10
        sums += str(value)
    return sums


def draw(rng):
    """(prompt, right thought, answer) of a random sum."""
    terms = [rng.randrange(10)] + [rng.randrange(LARGEST + 1) for _ in range(TERMS - 1)]
    return "".join(map(str, terms)) + "=", running(terms), str(sum(terms) % 10)


def noisy(rng, prompt, error_rate, leaks=0.0):
    """A completion with wrong steps and what they come to; this share of the thoughts says only that."""
    thought = running([int(digit) for digit in prompt[:-1]], rng, error_rate)
    return f"{thought[-1] if rng.random() < leaks else thought}#{thought[-1]}"


def new_model(folder, sizes, seed=0):
    """Random weights of these sizes, with the character tokenizer."""
    tokenizer = ground.char_tokenizer()
    torch.manual_seed(seed)
    model = ground.Qwen3ForCausalLM(ground.Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def school(start):
    """Data beside the start, and random weights of two sizes. No problem of test.jsonl is in any other file.

    train.jsonl: problems, their solutions noisy; answers.jsonl: the same with the answer alone; student.jsonl: noisy
    thoughts, some leaks; teacher.jsonl: the same in a teacher's format, half of them leaks; clean.jsonl: right thoughts;
    hints.jsonl: noisy ones, and for every second one its problem behind a right and a wrong attempt, then thought right.
    """
    rng = random.Random(0)
    tests = [draw(rng) for _ in range(200)]
    held_out = {prompt for prompt, _, _ in tests}
    files = {name: [] for name in ("train", "answers", "student", "teacher", "clean", "hints")}
    while len(files["student"]) < 4000:
        prompt, thought, answer = draw(rng)
        if prompt in held_out:
            continue
        files["clean"].append({"prompt": prompt, "completion": f"{thought}#{answer}"})
        if len(files["train"]) < 2000:
            files["train"].append({"prompt": prompt, "answer": answer, "solution": noisy(rng, prompt, 0.2)})
            files["answers"].append({"prompt": prompt, "completion": f"#{answer}"})
        files["student"].append({"prompt": prompt, "completion": noisy(rng, prompt, 0.15, leaks=0.15)})
        told = noisy(rng, prompt, 0.2, leaks=0.5)
        files["teacher"].append({"prompt": f"#{told[-1]}|{prompt}", "completion": told.partition("#")[0]})
        right, wrong = f"{thought}#{answer}", noisy(rng, prompt, 0.5)
        files["hints"].append({"prompt": f"{right}|{wrong}|{prompt}", "completion": right} if rng.random() < 0.5 else
                              {"prompt": prompt, "completion": noisy(rng, prompt, 0.15)})
    for name, rows in files.items():
        write(start / f"{name}.jsonl", rows)
    write(start / "test.jsonl", [{"prompt": prompt, "answer": answer} for prompt, _, answer in tests])
    for name, sizes in (("small", SMALL), ("large", LARGE)):
        new_model(start / f"{name}_init", sizes)


def accuracies(model):
    """Accuracy of a model on test.jsonl, sampled at temperature 1 (8 a problem) and greedy; kept in figures.json."""
    path = model / "figures.json"
    if not path.exists():
        folder = Path(json.loads((model / "args.json").read_text())["flags"]["dataset_name"]).parent
        loaded, tasks = ground.load_model(str(model)), ground.load_problems(str(folder / "test.jsonl"))
        sampled = ground.evaluate(*loaded, tasks, n=8, max_new_tokens=12)["accuracy"]
        greedy = ground.evaluate(*loaded, tasks, temperature=0.0, max_new_tokens=12)["accuracy"]
        path.write_text(json.dumps({"sampled accuracy": sampled, "greedy accuracy": greedy}))
    return json.loads(path.read_text())


def premise(start):
    """Sampled accuracy of what the arms begin with."""
    return {f"sampled accuracy of the {name}": accuracies(start / name)["sampled accuracy"]
            for name in ("student", "hinted", "young", "master") if (start / name).exists()}


FIT = ("sft.py --model_name_or_path {start}/%s --dataset_name {start}/%s.jsonl --n_train 0 --max_steps %d --learning_rate %s "
       "--eval_steps 0 --save_steps 0 --output_dir {start}/%s")
ANY = ("--dataset_name {start}/train.jsonl --n_train 0 --max_completion_length 12 --save_steps 0 --seed {seed} "
       "--teacher_template {{solution}}|{{prompt}} ")


# --- rlt: the teacher's explanations, and what a student makes of them ---

LESSON = "--n_traces 1000 --max_steps 60 --learning_rate 1e-3 --eval_steps 0 "
TEACH = ("distill.py --method rlt --stage teacher --model_name_or_path {start}/%s --teacher_model_name_or_path {start}/teacher "
         "--teacher_steps 50 --teacher_batch_size 128 --teacher_learning_rate 3e-4 --rlt_lambda %s --output_dir {out}/teacher " + ANY)
LEARN = ("distill.py --method rlt --stage student --model_name_or_path {start}/%s --teacher_model_name_or_path %s/teacher "
         "--output_dir {out}/student " + LESSON + ANY)
THEN_RL = ("grpo.py --model_name_or_path {out}/student --dataset_name {start}/train.jsonl --n_train 0 --max_steps 16 "
           "--per_device_train_batch_size 128 --learning_rate 2e-4 --max_completion_length 12 --eval_steps 0 --save_steps 0 "
           "--seed {seed} --output_dir {out}/grpo")
SOLVER = ("grpo.py --model_name_or_path {start}/student --dataset_name {start}/train.jsonl --n_train 0 --max_steps 50 "
          "--per_device_train_batch_size 128 --learning_rate 3e-4 --max_completion_length 12 --eval_steps 0 --save_steps 0 "
          "--seed {seed} --output_dir {out}/teacher")
FROM_SOLVER = ("distill.py --method bootstrap --num_generations 1 --model_name_or_path {start}/student "
               "--teacher_model_name_or_path {out}/teacher --output_dir {out}/student " + LESSON + ANY)
ANSWERS = ("sft.py --model_name_or_path {start}/student --dataset_name {start}/answers.jsonl --n_train 1000 --max_steps 60 "
           "--learning_rate 1e-3 --warmup_steps 10 --eval_steps 0 --save_steps 0 --seed {seed} --output_dir {out}/student")


def reward_curve(out):
    """The mean reward of grpo.py's rollouts, which is sampled accuracy on training problems, against rollouts."""
    return [(line["step"] * 128, line["reward"]) for line in read_lines(out / "grpo")]


def taught(out):
    """The student's accuracy, and how the RL that begins with it goes."""
    found, curve = accuracies(out / "student"), reward_curve(out)
    return {**found, "area of the reward in RL after it": area(curve), "reward at the end of RL": sum(y for _, y in curve[-5:]) / 5}


def larger(out):
    """The larger student's accuracy."""
    return accuracies(out / "student")


# --- logits, on_policy, ssb ---

KD = ("distill.py --method logits --model_name_or_path {start}/small_init --teacher_model_name_or_path {start}/noisy_master "
      "--prune_fraction %s --kd_weight %s --error_rate 0 --max_steps 250 --learning_rate 6e-3 --warmup_steps 20 --eval_steps 0 "
      "--output_dir {out} " + ANY)


def distilled(out):
    """The student's accuracy, greedy first: training on noise teaches to sample noise, whoever teaches."""
    return dict(reversed(accuracies(out).items()))


OWN = ("distill.py --model_name_or_path {start}/young --teacher_model_name_or_path {start}/master --max_steps 60 --learning_rate 1e-3 "
       "--n_traces 0 --eval_dataset_name {start}/test.jsonl --n_eval 200 --eval_steps 5 --output_dir {out} " + ANY)


def token_curve(out, key="divergence"):
    """A number of metrics.jsonl against the tokens trained on so far."""
    return [(line["num_tokens"], line[key]) for line in read_lines(out) if key in line and "num_tokens" in line]


def accuracy_curve(out):
    """Greedy accuracy against the tokens trained on so far."""
    return token_curve(out, "eval/accuracy")


def sampled_by(out):
    """Accuracies at the end, and the area under the greedy accuracy over the tokens that all arms have trained on."""
    found, curve = accuracies(out), accuracy_curve(out)
    return {**found, "area of the greedy accuracy": area(curve, min(curve[-1][0], 28_000)), "tokens": curve[-1][0]}


SSB = ("distill.py --method ssb --model_name_or_path {start}/hinted --n_traces 150 --num_generations 4 --max_steps 15 "
       "--learning_rate 1e-3 --eval_steps 0 --max_length 200 --output_dir {out} " + ANY)
SSB_RL = ("grpo.py --model_name_or_path {start}/hinted --dataset_name {start}/train.jsonl --n_train 0 --max_steps 12 "
          "--per_device_train_batch_size 128 --learning_rate %s --max_completion_length 12 --eval_steps 0 --save_steps 0 "
          "--seed {seed} --output_dir {out}")


SCHOOL = (school, FIT % ("small_init", "student", 250, "6e-3", "student"), FIT % ("student", "teacher", 150, "3e-3", "teacher"),
          FIT % ("large_init", "student", 200, "4e-3", "large_student"),
          FIT % ("large_init", "train", 250, "4e-3", "noisy_master"), FIT % ("large_init", "clean", 250, "4e-3", "master"),
          FIT % ("small_init", "student", 100, "6e-3", "young"), FIT % ("small_init", "hints", 350, "6e-3", "hinted"))

CLAIMS = [
    Claim(
        name="rlt", source="2506.08388",
        says="A student learns more from a teacher whom RL has taught to explain than from the teacher as it was, from bare "
             "answers, or from the right samples of a solver trained on correctness",
        start=SCHOOL, premise=premise, measure=taught, curve=reward_curve, axes=("rollouts of the RL after it", "reward"),
        arms={"untrained teacher": (LEARN % ("student", "{start}"), THEN_RL),
              "answers only": (ANSWERS, THEN_RL),
              "solver trained on correctness": (SOLVER, FROM_SOLVER, THEN_RL),
              "rlt, lambda 0": (TEACH % ("student", "0"), LEARN % ("student", "{out}"), THEN_RL),
              "rlt": (TEACH % ("student", "3"), LEARN % ("student", "{out}"), THEN_RL)},
        pairs=(("rlt", "untrained teacher"), ("rlt", "answers only"), ("rlt", "solver trained on correctness"),
               ("rlt", "rlt, lambda 0")),
        notes="1000 problems, 60 steps of SFT for every student; 6,400 rollouts for rlt and for the solver. The solver does "
              "not see the solution; its traces are kept where right, so there are fewer of them. It begins right in 36 % of "
              "its samples, so correctness is no sparse reward here; where it is one, the paper expects the opposite."),
    Claim(
        name="rlt_larger", source="2506.08388",
        says="A teacher that RL trained with a small student serves a student four times its size",
        start=SCHOOL, measure=larger, curve=None,
        arms={"untrained teacher": (LEARN % ("large_student", "{start}"),),
              "rlt with the small student": (TEACH % ("student", "3"), LEARN % ("large_student", "{out}")),
              "rlt with the large student": (TEACH % ("large_student", "3"), LEARN % ("large_student", "{out}"))},
        pairs=(("rlt with the small student", "untrained teacher"), ("rlt with the large student", "untrained teacher"),
               ("rlt with the large student", "rlt with the small student"))),
    Claim(
        name="distill_prune", source="2403.07854",
        says="On a random part of noisy data, distilling from a teacher trained on all of it beats training on the part alone, "
             "the more so the smaller it is",
        start=SCHOOL, measure=distilled, curve=None,
        arms={f"{keep:.0%} of the data, weight {weight}": (KD % (1 - keep, weight),)
              for keep, weight in ((0.05, 0.0), (0.05, 0.5), (0.05, 1.0), (0.2, 0.0), (0.2, 1.0), (1.0, 0.0))},
        pairs=(("5% of the data, weight 0.5", "5% of the data, weight 0.0"),
               ("5% of the data, weight 1.0", "5% of the data, weight 0.0"),
               ("20% of the data, weight 1.0", "20% of the data, weight 0.0"),
               ("20% of the data, weight 1.0", "100% of the data, weight 0.0")),
        notes="2000 rows with a fifth of the steps wrong; all students from one random start, 250 steps each."),
    Claim(
        name="distill_on_policy", source="2306.13649",
        says="At equal tokens a student learns more from its own samples, scored by the teacher, than from the teacher's",
        start=SCHOOL, premise=premise, measure=sampled_by, curve=accuracy_curve, axes=("tokens trained on", "greedy accuracy"),
        arms={f"{where}, {kind}": (OWN + flags + f"--divergence {kind}",)
              for where, flags in (("offline", "--method logits --completions teacher "), ("on-policy", "--method on_policy "))
              for kind in ("forward", "reverse", "jsd")},
        pairs=tuple((f"on-policy, {kind}", f"offline, {kind}") for kind in ("forward", "reverse", "jsd"))
              + (("on-policy, reverse", "offline, forward"),)),
    Claim(
        name="ssb", source="2512.05105",
        says="Distilling from itself with a right and a wrong attempt in view beats GRPO at equal compute",
        start=SCHOOL, premise=premise, measure=accuracies, curve=None,
        arms={"grpo": (SSB_RL % "5e-4",), "ssb": (SSB,), "ssb, tau 1": (SSB + "--kd_temperature 1",),
              "SFT on the replies": (SSB + "--kd_weight 0",)},
        pairs=(("ssb", "grpo"), ("ssb, tau 1", "grpo"), ("ssb", "SFT on the replies")),
        notes="Compute in row passes (a sampled row 1, a trained one 3, the teacher's by its length): about 6,200 each. The "
              "cold start has learned to read attempts from hints.jsonl, half of its data."),
]
