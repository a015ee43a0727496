"""Chapter 5: multi-objective search (paper, sections 4.5, 5.0.2, 5.3; NSGA-II, Deb et al., 2002).

A student dominates another if it is nowhere worse and somewhere better. Rank 0, the first front, is
dominated by none, rank 1 by those alone, and so on. Crowded is who is near its neighbours there.

    objectives = predicted accuracy and robustness; no more MACs than the device's budget
    generation = random students                        # and the smallest, which fits any budget
    repeat:                                             # 100 times in the paper
        children = genes from two parents, some drawn anew; parents win tournaments of two
        generation = the best half of parents and children    # by rank, then less crowded first
    chosen = the best sum of both objectives on the first front

New here: the search, what a student costs, and, last, the figures, which may be skipped.

    python 05_nsga2.py --dataset toy                                  # alone, the whole chain
    python 05_nsga2.py --dataset cifar10 --max-macs 500 1000 2000     # for three devices

reads   01_dynamic_net.pt, 04_predictor.pt (made first if missing, as what they need); for figures,
        all tables
writes  05_population.csv, 05_front.csv     first and last generation, and its front, as predicted
        05_best.csv, 05_search.pt   what was chosen, for --student and --judge (also ..._random)
        table1.csv, student.pt2     what was chosen, on the test images, and exported, by chapter 2
        05_cost.csv, *.svg          hours for 1 to 50 devices; figures of all tables (--figures)
"""

import argparse
import csv
import hashlib
import html
import io
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# ---- The lesson: NSGA-II -------------------------------------------------------------------------
# fmt: off
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "population": (100, 100, 40, 2, 5000, "students of a generation; released code 100"),
    "generations": (100, 100, 20, 1, 10**6, "paper 100 (section 5.3)"),
    "mutation": (0.1, 0.1, 0.1, 0, 1, "probability of a gene to be drawn anew; paper 0.1"),
}
# fmt: on


def main():
    args = read_flags(
        sampling={"choices": ["progressive", "random"], "default": "progressive"},
        max_macs={"nargs": "+", "type": float, "help": "budgets in millions of MACs"},
        figures={"action": "store_true", "help": "draw the figures of what there is"},
    )
    if args.figures:
        if not args.out.is_dir():
            fail(f"there is no {args.out}")
        return finish(args, [], figures(args))
    end = "_random" if args.sampling == "random" else ""
    weights, fitted = f"03_{args.sampling}.pt", f"04_predictor{end}.pt"  # files
    done = args.out / f"05_search{end}.pt"
    run_missing(args, "01_dynamic_net.pt", "02_teacher.pt", weights, fitted)
    net = load(args.out / "01_dynamic_net.pt", args.common)
    predictor = load(args.out / fitted, net["settings"])
    least, most = (cost(net, student_at(net, place))[1] / 1e6 for place in (0, -1))
    budgets = args.max_macs or [2000.0 if most > 2000 else round((least + most) / 2, 1)]
    if not all(least <= budget <= 1000 * most for budget in budgets):  # far above: not in millions
        ends = f"{math.ceil(100 * least) / 100} is the smallest student's, {most:.6g} the largest's"
        fail(f"--max-macs is in millions: {ends}")
    settings = {**net["settings"], **args.settings, "max_macs": budgets}
    if args.restart or not done.exists():
        done.unlink(missing_ok=True)  # before search() overwrites its tables
        students = search(args, net, predictor, budgets, end)
        save(done, settings, predictor, students=students, searched=weights)
    found = load(done, settings)
    # As chapter 2 writes it into table 1's rows: the checksums of the weights, and of this search.
    made_from = f"{found['made_from'][weights]} {found['mark']}"
    judged = read_csv(args, "table1", made_from=made_from)
    if judged and all(exported(args, name).exists() for name in found["students"]):
        return finish(args, [], [f"{done} earlier (--restart makes it anew)", *figures(args)])
    run_other(args, CHAPTERS[1], "--judge", f"--eps={predictor['settings']['eps']}")
    finish(args, [], figures(args))


def exported(args, name):
    """Where chapter 2 writes a student of this name: in this folder, whatever a table says."""
    return args.out / f"{Path(name.replace('best', 'student')).name}.pt2"


def search(args, net, predictor, budgets, end):
    """Search a student for each budget, in millions of MACs, and write the tables."""
    print(f"{args.generations} generations of {args.population}, on the CPU in float32")
    tables, chosen = {"population": [], "front": [], "best": []}, {}
    for budget in budgets:

        def evaluate(students):
            macs = np.array([cost(net, student)[1] / 1e6 for student in students])
            objectives = predict_accuracy(predictor, net, students).double().numpy()
            return objectives, (macs - budget).clip(0)

        begun = time.monotonic()
        first, last = nsga2(
            net, evaluate, args.population, args.generations, args.mutation, args.seed
        )
        students, objectives, violation = last
        rows = described(net, budget, "last", students, objectives)
        front = np.flatnonzero(non_dominated_sort(dominance(objectives, violation)) == 0)
        front = front[objectives[front, 0].argsort()]
        pick = front[objectives[front].sum(1).argmax()]
        name = f"best{end}" + (f"_{budget:.12g}M" if len(budgets) > 1 else "")
        chosen[name] = students[pick]
        tables["population"] += described(net, budget, "first", *first[:2]) + rows
        tables["front"] += [rows[i] for i in front]
        best = {"student": name, **rows[pick], "eps": predictor["settings"]["eps"]}
        tables["best"].append({**best, "seconds": time.monotonic() - begun})
    # What an earlier search chose is not chosen any more.
    for row in read_csv(args, f"05_best{end}"):
        exported(args, row["student"]).unlink(missing_ok=True)
    for name, rows in tables.items():
        write_csv(args.out / f"05_{name}{end}.csv", rows)
    shown = [{key: row[key] for key in row if key not in net["genes"]} for row in tables["best"]]
    finish(args, shown, [args.out / f"05_{name}{end}.csv" for name in tables])
    return chosen


def described(net, budget, name, students, objectives):
    """A row for each student of a generation."""
    rows = []
    for student, (natural, robust) in zip(students, objectives.tolist()):
        row = {"max_macs": budget, "generation": name, **dict(zip(net["genes"], student))}
        row["params"], row["macs"] = cost(net, student)
        rows.append({**row, "predicted_natural": natural, "predicted_robust": robust})
    return rows


def nsga2(net, evaluate, population, generations, mutation, seed):
    """Evolve students towards large objectives; evaluate(students) gives them, (N, M), and by how
    much the budget is violated, (N,). Returns the first and the last generation, best first."""
    rng = random.Random(f"{seed} search")  # not chapter 4's: else these are its students

    def fill(students, draw):  # `population` more, all different; fewer, if draw() finds none
        together = dict.fromkeys(students)  # as a set, but in order
        for _ in range(20 * population):
            if len(together) == len(students) + population:
                break
            together[draw()] = None
        return list(together)[len(students) :]

    def child(parents):  # they are sorted, best first: of two random places the lower one wins
        mother, father = (parents[min(rng.choices(range(len(parents)), k=2))] for _ in range(2))
        return breed(net, mother, father, mutation, rng)

    smallest = student_at(net, 0)  # one that always fits
    students = [smallest, *fill([smallest], lambda: sample(net, rng))]
    first = generation = survivors(students, *evaluate(students), population)  # of one more
    for _ in range(generations):
        parents = generation[0]
        children = fill(parents, lambda: child(parents))
        if children:
            scores = zip(generation[1:], evaluate(children))  # objectives, violations
            scores = [np.concatenate(pair) for pair in scores]  # of parents and children
            generation = survivors(parents + children, *scores, population)
    return first, generation


def survivors(students, objectives, violation, population):
    """The best first: by rank, within a rank the less crowded before the others."""
    rank = non_dominated_sort(dominance(objectives, violation))
    distance = np.empty(len(rank))
    for level in range(rank.max() + 1):
        distance[rank == level] = crowding_distance(objectives[rank == level])
    best = np.lexsort((-distance, rank))[:population]  # the last key, rank, counts first
    return [students[i] for i in best], objectives[best], violation[best]


def dominance(objectives, violation):
    """Matrix (N, N): does i dominate j? Deb's rule: the smaller violation wins; at equal ones, who
    is as good in all objectives (N, M), which are maximised, and better in one."""
    as_good = (objectives[:, None] >= objectives).all(2)
    better = (objectives[:, None] > objectives).any(2)
    tie, less = violation[:, None] == violation, violation[:, None] < violation
    return np.where(tie, as_good & better, less)


def non_dominated_sort(dominates):
    """Rank (N,) of each: 0 if none dominates it, 1 if only those of rank 0 do, ... (Deb, III A)."""
    count = dominates.sum(0)  # by how many others is each one dominated
    rank = np.full(len(count), -1)
    while (rank < 0).any():
        front = (count == 0) & (rank < 0)
        rank[front] = rank.max() + 1
        count = count - dominates[front].sum(0)
    return rank


def crowding_distance(objectives):
    """Room around each of one front, (N, M): the gap between its two neighbours, divided by the
    range, summed over the objectives (III B)."""
    distance = np.zeros(len(objectives))
    for values in objectives.T:
        order = values.argsort(kind="stable")
        distance[order[[0, -1]]] = np.inf
        spread = np.ptp(values) or 1  # 1 where all are equal, and all gaps 0
        distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / spread
    return distance


def breed(net, mother, father, mutation, rng):
    """A child: each gene from either parent (uniform crossover), drawn anew with probability
    `mutation`, and where it was off in that parent but is on in the child."""
    child = []
    for *genes, choices in zip(mother, father, net["genes"].values()):
        gene = rng.choice(genes)
        anew = rng.random() < mutation or gene not in choices  # 0, where it was off
        child.append(rng.choice(choices) if anew else gene)
    return canonical(net, child)


def read_csv(args, name, **wanted):
    """The rows of a table in the folder whose columns are as wanted; none if there is no table."""
    path = args.out / f"{name}.csv"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]


# ---- What a student costs ------------------------------------------------------------------------
def cost(net, student):
    """(parameters, MACs of one 3x32x32 image) of a student, layer by layer; by formula, since a
    search asks for thousands. Chapter 1 counts the same from the network; a test holds them equal.
    """
    choice, side = dict(zip(net["genes"], student)), 32 // net["stem_stride"]
    params = macs = 0

    def layer(inputs, out, kernel=1, pooled=False, bias=False):
        """`inputs`: channels that an output reads, 1 if depthwise. On a map of side x side, with
        batch norm; pooled: on one pixel, without."""
        nonlocal params, macs
        params += inputs * out * kernel**2 + (bias if pooled else 2) * out
        macs += inputs * out * kernel**2 * (1 if pooled else side**2)

    if "kernel" in net:
        x = net["stem"]
        layer(3, x, kernel=3)
        layer(1, x, kernel=3)
        layer(x, x)
        for i, (out, stride, _, gated) in enumerate(net["stages"], 1):
            for j in range(1, choice[f"depth_{i}"] + 1):
                middle = divisible(round(x * choice[f"expand_{i}_{j}"]))
                layer(x, middle)
                side //= stride if j == 1 else 1
                layer(1, middle, kernel=choice[f"kernel_{i}_{j}"])
                if gated:
                    squeezed = divisible(middle // 4)
                    layer(middle, squeezed, pooled=True, bias=True)
                    layer(squeezed, middle, pooled=True, bias=True)
                layer(middle, out)
                x = out
        layer(x, net["head"][0])
        layer(*net["head"], pooled=True)
        x = net["head"][1]
    else:
        mid = divisible(divisible(net["stem"] * choice["width_mid"]) // 2)
        x = divisible(net["stem"] * choice["width_stem"])
        layer(3, mid, kernel=3)
        if choice["depth_stem"] > 0:
            layer(mid, mid, kernel=3)
        layer(mid, x, kernel=3)
        for i, (channels, blocks, stride) in enumerate(net["stages"], 1):
            out = divisible(channels * choice[f"width_{i}"])
            for j in range(1, blocks + choice[f"depth_{i}"] + 1):
                middle = divisible(round(out * choice[f"expand_{i}_{j}"]))
                layer(x, middle)
                side //= stride if j == 1 else 1
                layer(middle, middle, kernel=3)
                layer(middle, out)
                if j == 1:
                    layer(x, out)  # the shortcut
                x = out
    layer(x, net["classes"], pooled=True, bias=True)  # the classifier
    return params, macs


# ---- The predictor, word for word as in chapter 4 ------------------------------------------------
def predict_accuracy(predictor, net, students):
    """Predicted (natural, robust) accuracy of students, (N, 2), each a share of 1."""
    answers = mlp(predictor["layers"], one_hot(net, students))
    return answers * predictor["scale"] + predictor["mean"]


def one_hot(net, students):
    """Features (N, sum of choices): for each gene a 1 at its choice; none where it is off."""
    columns = [
        [float(student[i] == choice) for student in students]
        for i, choices in enumerate(net["genes"].values())
        for choice in choices
    ]
    return torch.tensor(columns).T


def mlp(layers, x):
    """A fully-connected network with ReLU: features x (N, sum of choices) -> (N, 2)."""
    for matrix, bias in layers[:-1]:
        x = F.relu(x @ matrix + bias)
    matrix, bias = layers[-1]
    return x @ matrix + bias


# ---- The genotype, word for word as in chapter 1 -------------------------------------------------
def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def canonical(net, student):
    """One genotype for all that differ only in blocks which their depths switch off: genes of those
    are 0. (Some genotypes that are left are still the same network, because channels are rounded.)
    """
    chosen = dict(zip(net["genes"], student))
    off = [gene for gene, (depth, least) in net["switches"].items() if chosen[depth] < least]
    return tuple((chosen | dict.fromkeys(off, 0)).values())


def student_at(net, place):
    """The student that takes this choice of every gene: 0 the smallest, 1 the second, -1 the
    largest."""
    return canonical(net, [choices[place] for choices in net["genes"].values()])


def sample(net, rng):
    """A student, each gene at random."""
    return canonical(net, [rng.choice(choices) for choices in net["genes"].values()])


# ---- Other chapters and their files, word for word as in chapter 2 -------------------------------
def run_missing(args, *files):
    """Run each earlier chapter one of whose files is missing."""
    for name in files:
        script = CHAPTERS[int(name[:2]) - 1]
        if not (args.out / name).exists():
            print(f"{args.out / name} is missing: running {script}\n")
            flags = [f"--sampling={args.sampling}"] if script[:2] >= "03" else []
            run_other(args, script, *flags)


def run_other(args, script, *flags):
    """Run another chapter; exits if it fails. If this one is stopped, that one is, too."""
    command = [sys.executable, Path(__file__).resolve().with_name(script), *args.given, *flags]
    code = subprocess.run(command).returncode
    if code < 0:
        fail(f"{script} was killed by signal {-code}: is there too little memory?")
    if code:
        raise SystemExit(2)  # it has said why


def usable(path, settings):
    """What load() gives; nothing of a file that is not there, nor, with a line that says why, of
    one that is stale or not ours."""
    try:
        return load(path, settings) if path.exists() else None
    except SystemExit as problem:
        print(f"passed over: {problem}")


# ---- Files and flags, the same in every chapter --------------------------------------------------
def fail(message):  # run_chapter() prints it as one line on stderr; exit code 2
    raise SystemExit(message)


def write(path, content):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path)  # a full disk's has no name
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue().encode(errors="replace"))


def save(path, settings, source, **content):
    """Write what load() reads, with the checksums of its source, which load() has returned, and of
    what that was made from."""
    keep_others(path, settings)
    made_from = source["made_from"] | {source["file"]: source["mark"]} if source else {}
    about = {"file": path.name, "settings": settings, "made_from": made_from}
    buffer = io.BytesIO()
    torch.save(about | content, buffer)
    write(path, buffer.getvalue())


def keep_others(path, settings):
    """Exits if the file is there, and of other settings: another run has written it."""
    try:
        there = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["settings"]
    except Exception:  # of many kinds: it is not there, or damaged
        return
    if there != settings:
        fail(f"{path} is another run's, of other settings: give each one its own --out")


def load(path, settings):
    """What save() wrote, and `mark`, its checksum; exits if it is damaged, of other settings, or
    stale: if a file from which it was made, directly or by way of others, has changed."""
    own_mark = checksum(path)
    try:
        if zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        file, made_with, made_from = loaded["file"], loaded["settings"], loaded["made_from"]
    except Exception as error:  # of many kinds
        fail(f"{path} is damaged or not ours ({type(error).__name__}): delete it, it is made anew")
    if file != path.name:
        fail(f"{path} is a copy of a {file}, which is not read by this name")
    for name, value in settings.items():
        old = made_with.get(name)
        if old != value:  # a common flag: its old value goes on, even if the images have moved
            way = shlex.join([f"--{name}={old}"]) if name in COMMON else "that again, delete it,"
            fail(f"{path}: {name} was {old}, not {value}: take {way} or another --out")
    stale = ""
    for (name, mark), made_next in zip(made_from.items(), [*made_from, path.name][1:]):
        source = path.with_name(name)
        if source.exists() and checksum(source) != mark:  # the last one: mends begin after it
            stale = f"{name} is another one by now: repeat {CHAPTERS[int(made_next[:2]) - 1]} "
            stale += f"with the flags that made {made_next}, and --restart"
    if stale:
        fail(f"{path} is stale: {stale}")
    return {**loaded, "mark": own_mark}


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


CHAPTERS = """01_dynamic_net.py 02_teacher_trades.py 03_progressive_rslad.py 04_predictor.py
05_nsga2.py""".split()

PRESETS = ["paper", "quick", "tiny"]

COMMON = {  # flags of every chapter, which it passes on to those that it runs
    "dataset": {"default": "cifar10", "help": "cifar10, cifar100, toy, or a folder of images"},
    "net": {"default": "resnet50", "choices": ["resnet50", "mbv3"]},
    "preset": {"choices": PRESETS, "help": "of networks and numbers; default: paper, for toy tiny"},
    "out": {"type": Path, "help": "default: runs/<dataset>-<net>[-<preset>][-seed<seed>]"},
    "seed": {"default": 0, "type": int},
    "device": {"help": "cpu, cuda or cuda:N; default: cuda if there is one"},
}


def read_flags(**others):
    """COMMON's flags, others, and FLAGS, by default the preset's; adds `given`, to pass on, and
    `common` and `settings`, which files are made with."""
    others["restart"] = {"action": "store_true", "help": "start this chapter over"}
    for flag, (*values, least, most, text) in FLAGS.items():
        text += f"; {least} to {most}; presets {values}"
        others[flag] = {"type": type(values[0]), "help": text, "default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    for flag, options in {**COMMON, **others}.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", **options)
    args = parser.parse_args()
    args.given = [
        f"--{flag}={getattr(args, flag)}"
        for flag in COMMON
        if getattr(args, flag) != parser.get_default(flag)
    ]
    usual = "tiny" if args.dataset == "toy" else "paper"
    preset, args.settings = args.preset or usual, {}
    for flag, (*values, least, most, text) in FLAGS.items():
        value = vars(args).setdefault(flag, values[PRESETS.index(preset)])
        if not least <= value <= most:
            fail(f"{flag} is {value}, not {least} to {most}: {text}")
        args.settings[flag] = value
    if not 0 <= args.seed < 2**31:
        fail(f"--seed is {args.seed}, not 0 to {2**31 - 1}")
    folder, built_in = Path(args.dataset).resolve(), args.dataset in ("cifar10", "cifar100", "toy")
    if built_in and (folder / "train").is_dir():
        fail(f"--dataset {args.dataset}: write ./{args.dataset}, or rename the folder of this name")
    dataset = args.dataset if built_in else str(folder)  # two folders may have one last name
    args.common = {"dataset": dataset, "net": args.net, "preset": preset, "seed": args.seed}
    name = f"{folder.name}-{args.net}" + f"-{preset}" * (preset != usual)
    args.out = args.out or Path("runs", name + f"-seed{args.seed}" * (args.seed > 0))
    return args


def finish(args, rows, wrote, following=""):
    """Print a table, where it stands, and the next command."""
    if rows:
        for line in [rows[0], *(row.values() for row in rows)]:
            print(*(format(cell, ">17.4g" if isinstance(cell, float) else ">17") for cell in line))
    print("wrote", *wrote)
    if following:
        print("next: python", following, shlex.join(args.given))


def run_chapter():
    """main(); being stopped, or a file that cannot be read or written, ends it with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a child is ended, too
    if hasattr(sys.stdout, "reconfigure"):  # not if it is closed, or a notebook's
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal may lack letters
    try:
        return main()
    except KeyboardInterrupt:
        line, code = "stopped; the same command goes on; with --restart it starts over", 130
    except OSError as error:
        sys.stdout = None  # it may be what failed, as with `| head`
        name = error.filename or "the output"
        line, code = f"{name} could not be read or written: {error.strerror}", 2
    except SystemExit as stop:
        if not isinstance(stop.code, str):  # of argparse, or of a chapter that ran before this one
            raise
        line, code = stop.code, 2
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(code)


# ---- The figures of all tables; the lesson does not need them ------------------------------------
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a", "#b8860b"  # for the colour-blind


STYLE = """text{fill:#1f2328;font:13px sans-serif} path{stroke:#d1d9e0}
polyline{fill:none;stroke-width:2} .page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc} path{stroke:#3d444d} .page{fill:#0d1117}}"""


NATURAL, ROBUST = "natural accuracy in %", "robust accuracy in %"


def figures(args):
    """Draw every figure whose tables are in the folder, and write the table of costs; the files."""
    files, title, accuracy = [], args.out.name, {"natural": NATURAL, "robust": ROBUST}

    def draw(name, *panels):
        files.extend(plot(args.out / f"{name}.svg", *panels))

    def is_ours(name):  # made from what is there, or in the making
        paths = (args.out / f"{name}{end}" for end in (".pt", ".state"))
        return any(usable(path, args.common) for path in paths)

    for path in sorted(args.out.glob("0[23]_*_log.csv")):  # training curves
        rows, losses, others = read_csv(args, path.stem), {}, {}
        for name in rows[0] if rows and is_ours(path.stem.removesuffix("_log")) else []:
            if "loss" in name or "entropy" in name or "kl" in name:
                losses[name] = points(rows, "epoch", name)
            elif name not in ("epoch", "lr", "seconds"):
                others[name] = points(rows, "epoch", name)
        label = "accuracy on held-out images in %"
        left, right = ("epoch", "loss in nats", losses), ("epoch", label, others)
        draw(path.stem, (path.stem, *left), (path.stem, *right))
    clouds, lines = {}, {}  # figures 2 and 7, many students; figure 6, three that differ in width
    first = {}  # how the students of the first sampling were measured
    for sampling, end in {"progressive": "", "random": "_random"}.items():
        students = usable(args.out / f"04_students{end}.pt", args.common)
        if not students:
            continue
        settings = students["settings"]
        measured = {name: settings[name] for name in ("eps", "step_size", "steps", "images")}
        first = first or measured
        if measured != first:
            print(f"no figure of {sampling} sampling: measured with {measured}, the other {first}")
            continue
        rows = read_csv(args, f"04_students{end}")
        clouds[sampling] = points(rows, "natural", "robust", "dots")
        if not is_ours(f"04_predictor{end}"):
            continue
        teacher, *narrow = read_csv(args, f"04_widths{end}") or [{}]
        clouds["chapter 2's teacher"] = points([teacher], "natural", "robust", "rings")
        lines |= {f"{sampling}, {kind}": points(narrow, "student", kind) for kind in accuracy}
        rows, panels = read_csv(args, f"04_predictions{end}"), []  # figure 9
        for kind, label in accuracy.items():
            series = {"students": points(rows, kind, f"predicted_{kind}", "dots")}
            series["as measured"] = points(rows, kind, kind)
            panels.append((sampling, f"measured {label}", "predicted", series))
        draw(f"04_predictions{end}", *panels)
        panels, axes = [], ("predicted_natural", "predicted_robust")  # figure 10
        search = usable(args.out / f"05_search{end}.pt", args.common)
        for best in read_csv(args, f"05_best{end}") if search else []:
            budget, series = {"max_macs": best["max_macs"]}, {}
            for name in ("first", "last"):  # who is within the budget
                rows = read_csv(args, f"05_population{end}", generation=name, **budget)
                rows = [row for row in rows if float(row["macs"]) <= 1e6 * float(row["max_macs"])]
                series[f"{name} generation"] = points(rows, *axes, "dots")
            series["front"] = points(read_csv(args, f"05_front{end}", **budget), *axes)
            series["chosen, predicted"] = points([best], *axes, "rings")
            made_from = f"{search['made_from'][f'03_{sampling}.pt']} {search['mark']}"
            for row in read_csv(args, "table1", student=best["student"], made_from=made_from):
                label = f"chosen, on test images, eps {row['eps']}/255"
                series[label] = points([row], "natural", "pgd20", "rings")
                if row["eps"] != best["eps"]:
                    print(f"table 1: eps {row['eps']}/255, the predictor: {best['eps']}/255")
            panels.append((f"{budget['max_macs']} million MACs", NATURAL, ROBUST, series))
        draw(f"05_population{end}", *panels)
    draw("04_students", (title, NATURAL, ROBUST, clouds))
    draw("04_widths", (title, "width (kernel) of the student", "accuracy in %", lines))
    rows = costs(args)
    lines = {name: points(rows, "devices", name) for name in ("retraining", "ProARD")}
    draw("05_cost", (title, "devices", "hours", lines))
    return files


def costs(args):
    """Figure 8: hours for 1 to 50 devices: RSLAD for each, or one dynamic network, the measured
    students, and a search for each; both need the same teacher first. RSLAD of other settings that
    cost time is not compared, which is said."""

    def seconds(name):
        return [float(row["seconds"]) for row in read_csv(args, name)]

    paths = sorted(args.out.glob("0[3-5]_*.pt"))
    found = {path.stem: file for path in paths if (file := usable(path, args.common))}
    if not {"03_progressive", "04_predictor", "05_search"} <= {*found}:
        return []
    shared, alone = found["03_progressive"]["settings"], []
    costly = "teacher", "epochs", "batch_size", "steps"
    fixed = {name: file["settings"] for name, file in found.items() if name.startswith("03_fixed")}
    for name, own in fixed.items():
        other = [key for key in costly if own[key] != shared[key]]
        if other:
            print(f"figure 8 is without {name}: not 03_progressive's {', '.join(other)}")
        else:
            alone.append(sum(seconds(f"{name}_log")))
    if not alone:
        return []
    each, search = sum(alone) / len(alone), max(seconds("05_best"))
    once = sum(seconds("03_progressive_log") + seconds("04_students"))
    rows = [
        {"devices": n, "retraining": n * each / 3600, "ProARD": (once + n * search) / 3600}
        for n in range(1, 51)
    ]
    write_csv(args.out / "05_cost.csv", rows)
    print(f"50 devices: {50 * each / (once + 50 * search):.3g} times cheaper to train (paper: 60)")
    return rows


def plot(path, *panels):
    """Write panels, (title, x label, y label, {name: (style, pairs)}), side by side as an SVG, for
    light and dark pages. Styles are line, dots and rings. Nothing is drawn without values."""
    panels = [
        (*labels, {name: drawn for name, drawn in series.items() if drawn[1]})
        for *labels, series in panels
    ]
    if not panels or not all(series for *_, series in panels):
        return []
    parts = ['<rect class="page" width="100%" height="100%"/>']

    def text(x, y, words, anchor="middle", more=""):
        words = html.escape(words)
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>')

    for number, (title, x_label, y_label, series) in enumerate(panels):
        ends = []  # a panel is 320 x 280 pixels
        parts.append(f'<g transform="translate({70 + 420 * number})">')
        for axis in (0, 1):
            values = [pair[axis] for _, pairs in series.values() for pair in pairs]
            span = max(values) - min(values) or 1
            steps = (m * 10.0**e for e in range(-9, 12) for m in (1, 2, 5))
            step = next(step for step in steps if span <= 6 * step)
            first, last = math.floor(min(values) / step), math.floor(max(values) / step) + 1
            ends.append((first * step, last * step))
            for tick in range(first, last + 1):
                share, label = (tick - first) / (last - first), f"{tick * step:.6g}"
                if axis == 0:
                    parts.append(f'<path d="M{320 * share:.1f} 50v280"/>')
                    text(320 * share, 348, label)
                else:
                    parts.append(f'<path d="M0 {330 - 280 * share:.1f}h320"/>')
                    text(-6, 334 - 280 * share, label, "end")
        text(160, 36, title, more='font-weight="bold"')
        text(160, 370, x_label)
        text(0, 0, y_label, more='transform="translate(-48 190) rotate(-90)"')
        (x0, x1), (y0, y1) = ends
        for i, (name, (style, pairs)) in enumerate(series.items()):
            colour, legend = COLOURS[i], 392 + 18 * i
            points = [
                (320 * (x - x0) / (x1 - x0), 330 - 280 * (y - y0) / (y1 - y0)) for x, y in pairs
            ]
            if style == "line":
                for line in (points, [(-4, legend), (12, legend)]):
                    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
                    parts.append(f'<polyline points="{places}" stroke="{colour}"/>')
            else:
                look = f'r="3" fill="{colour}"'
                if style == "rings":
                    look = f'r="6" fill="none" stroke-width="2" stroke="{colour}"'
                parts += [
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>' for x, y in [*points, (4, legend)]
                ]
            text(20, legend + 4, name, "start")
        parts.append("</g>")
    size = f"0 0 {420 * len(panels) + 20} {400 + 18 * max(len(s) for *_, s in panels)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{STYLE}</style>'
    write(path, "\n".join([head, *parts, "</svg>\n"]).encode(errors="replace"))
    return [path]


def points(rows, x, y, style="line"):
    """(style, pairs) for plot(), accuracies in %, of the rows that hold two numbers below 1e9."""

    def value(row, name):
        share = name.startswith(("natural", "robust", "predicted", "pgd")) and "kl" not in name
        try:
            return float(row[name]) * (100 if share else 1)
        except (KeyError, TypeError, ValueError):
            return math.nan

    pairs = [(value(row, x), value(row, y)) for row in rows]
    return style, [pair for pair in pairs if all(abs(number) < 1e9 for number in pair)]


if __name__ == "__main__":
    run_chapter()
