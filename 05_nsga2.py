"""Chapter 5: multi-objective search (paper, sections 4.5, 5.0.2, 5.3; NSGA-II, Deb et al., 2002).

A student dominates another if it is nowhere worse and somewhere better. Students that none
dominates are the first front (rank 0), those dominated only by them the second, and so on.

    objectives = predicted accuracy, robustness; constraint: MACs within the device's budget
    generation = random students                        # and the smallest, which fits any budget
    repeat:                                             # 100 times in the paper
        children = genes from two parents, some drawn anew; parent = better of two
        generation = the best half of parents and children    # by rank, then the gap to neighbours
    chosen = the largest sum of both objectives on the first front    # the paper does not say which

Two objectives keep all trade-offs on the front: which one to take is decided last. On the tiny
network they hardly differed: the front was one student, and when measured no better than the best
that chapter 4 had measured, or than the usual one, of as many MACs.

Read first: nsga2 to breed, main; figures stand last and may be skipped.

    python 05_nsga2.py --dataset toy                             # runs all chapters
    python 05_nsga2.py --dataset cifar10 --max-macs 500          # for a smaller device

reads   04_predictor.pt (made first if missing); for figures all .pt files of the folder
writes  05_search.pt, 05_best.csv, 05_population.csv   the chosen student; first, last generation
        table1.csv, student.pt2     by chapter 2: judged on the test images, and exported
        05_cost.csv, *.svg          hours for 1 to 50 devices (if there is a 03_usual.pt); figures
        (most names end in _random with --sampling random, in _500M with --max-macs 500)
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from math import ceil, floor, inf, log10
from pathlib import Path
from secrets import token_hex
from statistics import median
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F

STAGE = "05"
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "population": (100, 100, 40, 2, inf, "students in a generation; released code 100"),
    "generations": (100, 100, 20, 1, inf, "paper 100 (section 5.3)"),
    "mutation": (0.1, 0.1, 0.1, 0, 1, "probability that a gene is drawn anew; paper 0.1"),
}


# ---- The lesson: NSGA-II -------------------------------------------------------------------------
def nsga2(net, evaluate, population, generations, mutation, seed):
    """Evolve students towards large objectives; evaluate(students) gives them, (N, M), and by how
    much each student violates the budget, (N,). Returns the first and the last generation, each
    (students, objectives, violations), best first."""
    rng = random.Random(f"{seed} search")  # not chapter 4's, which would draw the same students

    def new_students(draw, known):
        """`population` students by draw() that differ from each other and from the known ones. In a
        small network they may be fewer: draw() is called 20 times as often at most."""
        students = {tuple(student.values()): student for student in known}
        for _ in range(20 * population):
            if len(students) == len(known) + population:
                break
            student = draw()
            students[tuple(student.values())] = student
        return list(students.values())[len(known) :]

    def child(parents):
        """Of two parents, each chosen by a binary tournament: the better one of two at random.
        Parents are sorted, best first, so the lower index wins."""
        mother, father = (parents[min(rng.choices(range(len(parents)), k=2))] for _ in range(2))
        return breed(net, mother, father, mutation, rng)

    smallest = net["students"]["smallest"]  # fits any budget that can be met
    students = [smallest, *new_students(lambda: sample(net, rng), [smallest])]
    first = generation = survivors(students, *evaluate(students), population)
    for _ in range(generations):
        parents = generation[0]
        children = new_students(lambda: child(parents), parents)
        if children:
            scores = [np.concatenate(pair) for pair in zip(generation[1:], evaluate(children))]
            generation = survivors(parents + children, *scores, population)
    return first, generation


def survivors(students, objectives, violation, population):
    """The best first: by rank, within a rank those with more room."""
    rank = non_dominated_sort(dominance(objectives, violation))
    distance = np.empty(len(rank))
    for level in range(rank.max() + 1):
        distance[rank == level] = crowding_distance(objectives[rank == level])
    best = np.lexsort((-distance, rank))[:population]  # the last key, rank, counts first
    return [students[i] for i in best], objectives[best], violation[best]


def dominance(objectives, violation):
    """Matrix (N, N): does i dominate j? Deb's rule: the smaller violation wins; at equal ones, the
    student that is as good in all objectives (N, M), which are maximised, and better in one."""
    as_good = (objectives[:, None] >= objectives).all(2)
    better = (objectives[:, None] > objectives).any(2)
    tie, smaller = violation[:, None] == violation, violation[:, None] < violation
    return np.where(tie, as_good & better, smaller)


def non_dominated_sort(dominates):
    """Rank (N,) of each: 0 if none dominates it, 1 if only those of rank 0 do, ... (Deb, III A)."""
    count = dominates.sum(0)  # by how many others is each one dominated
    rank = np.full(len(count), -1)
    while (rank < 0).any():
        front = (count == 0) & (rank < 0)
        rank[front] = rank.max() + 1
        count -= dominates[front].sum(0)
    return rank


def crowding_distance(objectives):
    """Room around each student of one front, (N, M): the gap between its two neighbours, divided by
    the range, summed over the objectives (III B)."""
    distance = np.zeros(len(objectives))
    for values in objectives.T:
        order = values.argsort(kind="stable")
        distance[order[[0, -1]]] = np.inf
        spread = np.ptp(values) or 1  # 1 where all are equal, and all gaps 0
        distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / spread
    return distance


def breed(net, mother, father, mutation, rng):
    """A child: each gene from either parent (uniform crossover), drawn anew with probability
    `mutation`, or if it was off (0) there; canonical() zeroes those that stay off."""
    child = {}
    for gene, choices in net["genes"].items():
        child[gene] = rng.choice([mother[gene], father[gene]])
        if rng.random() < mutation or child[gene] not in choices:  # 0, where it was off
            child[gene] = rng.choice(choices)
    return canonical(net, child)


def main():
    args = read_flags(
        max_macs={"type": float, "help": "in millions; default 2000, for small networks mid-range"},
        figures={"action": "store_true", "help": "only draw what is in the folder"},
    )
    end = "" if args.sampling == "progressive" else f"_{args.sampling}"  # of the names of files
    if args.figures:
        return finish(args, [], figures(args))
    fitted = f"04_predictor{end}.pt"
    run_missing(args, "01_dynamic_net.pt", "02_teacher.pt", f"03_{args.sampling}.pt", fitted)
    source = load(args.out / fitted, args.common)
    net = source["net"]
    least, most = (cost(net, net["students"][name])[1] / 1e6 for name in ("smallest", "largest"))
    budget = 2000.0 if most > 2000 else round((least + most) / 2, 1)
    if args.max_macs is not None:
        budget, end = args.max_macs, f"{end}_{args.max_macs:.12g}M"
    if not least <= budget <= 1000 * most:  # far above: not in millions
        ends = f"the smallest student's are {least:.4g}, the largest's {most:.4g}"
        sys.exit(f"--max-macs is in millions: {ends}")
    settings = source["settings"] | args.settings | {"05 max_macs": budget}
    checkpoint, table1 = args.out / f"05_search{end}.pt", args.out / "table1.csv"
    if checkpoint.exists():
        print(f"{checkpoint} is finished (delete it to redo it)")
    else:
        student, tables = search(args, net, source["predictor"], budget)
        made = {"net": net, "weights": source["weights"], "students": {"best": student}}
        table1.unlink(missing_ok=True)  # it lacks this student
        save(checkpoint, settings, **made, rows=tables)
    tables, wrote = load(checkpoint, settings)["rows"], [checkpoint]
    for name, rows in tables.items():
        wrote.append(args.out / f"05_{name}{end}.csv")
        write_csv(wrote[-1], rows)
    best = {key: value for key, value in tables["best"][0].items() if key not in net["genes"]}
    finish(args, [best], wrote)
    if not table1.exists():
        run_chapter(args, CHAPTERS[2], "--judge", f"--eps={settings['04 eps']}")
    finish(args, [], figures(args))


def search(args, net, predictor, budget):
    """The chosen student for a budget in millions of MACs, and tables of the search."""
    print(f"{args.generations} generations of {args.population}, at most {budget} million MACs")
    start = time.monotonic()

    def evaluate(students):
        macs = np.array([cost(net, student)[1] / 1e6 for student in students])
        objectives = predict_accuracy(predictor, net, students).double().numpy()
        return objectives, (macs - budget).clip(0)

    first, last = nsga2(net, evaluate, args.population, args.generations, args.mutation, args.seed)
    rows = []
    for name, (students, objectives, violation) in (("first", first), ("last", last)):
        first_front = non_dominated_sort(dominance(objectives, violation)) == 0
        for student, scores, on_front in zip(students, objectives.tolist(), first_front.tolist()):
            row = {"generation": name, **student}
            row["params"], row["macs"] = cost(net, student)
            row["predicted_natural"], row["predicted_robust"] = scores
            rows.append({**row, "front": on_front})
    front = [row for row in rows if row["generation"] == "last" and row["front"]]
    best = max(front, key=lambda row: row["predicted_natural"] + row["predicted_robust"])
    best = {**best, "seconds": time.monotonic() - start}
    return {gene: best[gene] for gene in net["genes"]}, {"best": [best], "population": rows}


# ---- What a student costs ------------------------------------------------------------------------
def cost(net, student):
    """(parameters, MACs of one 3x32x32 image) of a student, layer by layer; by formula, since a
    search asks for thousands. Chapter 1 counts the same from the network; a test holds them equal.
    """
    side = 32 // net["stem_stride"]
    params = macs = 0

    def layer(inputs, out, kernel=1, pooled=False, bias=False):
        """`inputs`: channels that an output reads, 1 if depthwise. On side x side pixels and with
        batch norm; pooled: on one pixel and without, perhaps with a bias."""
        nonlocal params, macs
        params += inputs * out * kernel**2 + (bias if pooled else 2) * out
        macs += inputs * out * kernel**2 * (1 if pooled else side**2)

    mobile, x = "kernel" in net, net["stem"]
    if mobile:
        layer(3, x, kernel=3)
        layer(1, x, kernel=3)
        layer(x, x)
    else:
        mid = divisible(divisible(x * student["width_mid"]) // 2)
        x = divisible(x * student["width_stem"])
        layer(3, mid, kernel=3)
        if student["depth_stem"]:
            layer(mid, mid, kernel=3)
        layer(mid, x, kernel=3)
    for i, (channels, blocks, stride, _, gated) in enumerate(net["stages"], 1):
        out = divisible(channels * student.get(f"width_{i}", 1))
        for j in range(1, blocks + student[f"depth_{i}"] + 1):
            middle = divisible(round((x if mobile else out) * student[f"expand_{i}_{j}"]))
            layer(x, middle)
            side //= stride if j == 1 else 1  # the first block's k x k layer shrinks the image
            layer(1 if mobile else middle, middle, kernel=student.get(f"kernel_{i}_{j}", 3))
            if gated:
                squeezed = divisible(middle // 4)
                layer(middle, squeezed, pooled=True, bias=True)
                layer(squeezed, middle, pooled=True, bias=True)
            layer(middle, out)
            if j == 1 and not mobile:
                layer(x, out)  # the shortcut
            x = out
    if mobile:
        layer(x, net["head"][0])
        layer(*net["head"], pooled=True)
        x = net["head"][1]
    layer(x, len(net["classes"]), pooled=True, bias=True)  # the classifier
    return params, macs


# ---- Figures; the lesson does not need them ------------------------------------------------------
def figures(args):
    """Draw every figure whose files are in the folder; returns their paths."""
    made, drawn, clouds, sizes, lines = {}, [], {}, {}, {}
    for path in sorted(args.out.glob("0[2-5]_*.pt")):
        try:
            made[path.stem] = load(path, args.common)
        except SystemExit as problem:  # it rests on another teacher, or on other images
            print(f"left out: {problem}")

    def draw(name, *panels):
        if all(series for *_, series in panels):
            drawn.append(plot(args.out / f"{name}.svg", panels))

    for name, file in made.items():
        rows, settings, axes = file["rows"], file["settings"], ("natural", "robust")
        if name[:2] in ("02", "03"):  # training curves
            keys = [key for key in rows[0] if key not in ("epoch", "lr", "seconds")]
            curves = {key: ("line", points(rows, "epoch", key)) for key in keys}
            losses = {key: curves.pop(key) for key in keys if not is_accuracy(key)}
            draw(name, ("epoch", "loss", losses), ("epoch", "held out, %", curves))
        elif name[:2] == "04":
            label = name.removeprefix("04_predictor").strip("_") or "progressive"
            label += f", eps {settings['04 eps']:g}, PGD-{settings['04 steps']}"
            test, panels = rows["predictions"], []
            clouds[label] = ("dots", points(rows["students"], *axes))
            macs = [{**row, "MACs": cost(file["net"], row)[1] / 1e6} for row in rows["students"]]
            sizes[label] = ("dots", points(macs, "MACs", "robust"))
            for key in axes:  # figure 9
                lines[f"{key}: {label}"] = ("line", points(rows["widths"], "student", key))
                series = {"students": ("dots", points(test, key, f"predicted_{key}"))}
                series["as measured"] = ("line", points(test, key, key))
                panels.append((f"measured {key} accuracy, %", "predicted, %", series))
            draw(name.replace("predictor", "predictions"), *panels)
        else:  # figure 10
            axes, most = ("predicted_natural", "predicted_robust"), settings["05 max_macs"]
            fit, series = [row for row in rows["population"] if row["macs"] <= 1e6 * most], {}
            for key in ("first", "last"):
                shown = [row for row in fit if row["generation"] == key]
                series[f"{key} generation"] = ("dots", points(shown, *axes))
            front = points([row for row in shown if row["front"]], *axes)
            series[f"front, at most {most} million MACs"] = ("line", sorted(front))
            series["chosen"] = ("dots", points(rows["best"], *axes))
            labels = "predicted natural accuracy, %", "predicted robust accuracy, %"
            draw(name.replace("search", "population"), (*labels, series))
    robust = "robust accuracy, %"  # figures 2 and 7, and what a smaller device loses
    draw("04_students", ("natural accuracy, %", robust, clouds), ("million MACs", robust, sizes))
    draw("04_widths", ("width (kernel)", "accuracy, %", lines))  # figure 6
    rows = costs(made)
    if rows:
        write_csv(args.out / "05_cost.csv", rows)
        lines = {key: ("line", points(rows, "devices", key)) for key in [*rows[0]][1:]}
        draw("05_cost", ("devices", "hours", lines))
    return drawn


def points(rows, x, y):
    """Pairs of two columns, accuracies in %."""
    x_unit, y_unit = (100 if is_accuracy(key) else 1 for key in (x, y))
    return [(x_unit * row[x], y_unit * row[y]) for row in rows]


def is_accuracy(key):
    return ("natural" in key or "robust" in key) and not key.endswith("kl")


def costs(made):
    """Figure 8: hours for 1 to 50 devices: RSLAD for each, with the same flags; or one dynamic
    network, the measured students, and a search for each. Both need the same teacher first."""
    if not {"03_progressive", "04_predictor", "05_search"} <= made.keys():
        return []

    def seconds(rows):  # the median: time for which a laptop was suspended does not count
        return median(row["seconds"] for row in rows) * len(rows)

    flags = lambda file: [flag for flag in file["settings"].items() if flag[0].startswith("03 ")]
    shared, alone = made["03_progressive"], []
    for name, file in made.items():
        if name[:2] == "03" and len(file["students"]) == 1 and flags(file) == flags(shared):
            alone.append(seconds(file["rows"]))  # RSLAD of one student
    once = seconds(shared["rows"]) + seconds(made["04_predictor"]["rows"]["students"])
    search = seconds(made["05_search"]["rows"]["best"])
    if not alone:
        return []
    each = sum(alone) / len(alone)
    print(f"50 devices: {50 * each / (once + 50 * search):.3g} times cheaper to train (paper: 60)")
    return [
        {"devices": n, "retraining": n * each / 3600, "one network": (once + n * search) / 3600}
        for n in range(1, 51)
    ]


def plot(path, panels):
    """Write panels (x label, y label, {name: (line or dots, points)}) side by side, as SVG."""
    parts = ['<rect width="100%" height="100%" fill="white"/>']
    colours = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a", "#b8860b"  # colour-blind safe
    for number, (x_label, y_label, series) in enumerate(panels):
        parts.append(f'<g transform="translate({420 * number + 60})">')  # 320 x 280, from (0, 30)
        xs, ys = map(ticks, zip(*(pair for _, pairs in series.values() for pair in pairs)))
        at_x = lambda x: 320 * (x - xs[0]) / (xs[-1] - xs[0])
        at_y = lambda y: 310 - 280 * (y - ys[0]) / (ys[-1] - ys[0])
        for x in xs:
            parts.append(f'<path d="M{at_x(x):.1f} 30v280" stroke="#ddd"/>')
            parts.append(f'<text x="{at_x(x):.1f}" y="328" text-anchor="middle">{x:.6g}</text>')
        for y in ys:
            parts.append(f'<path d="M0 {at_y(y):.1f}h320" stroke="#ddd"/>')
            parts.append(f'<text x="-6" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
        parts.append(f'<text y="20">{y_label}</text><text x="90" y="350">{x_label}</text>')
        for i, (name, (style, pairs)) in enumerate(series.items()):
            colour = colours[i % len(colours)]
            if style == "line":
                line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in pairs)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
            else:
                dot = f'r="3" fill="{colour}" fill-opacity="0.7"/>'
                parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" {dot}' for x, y in pairs]
            parts.append(f'<text y="{372 + 18 * i}" fill="{colour}">{name}</text>')
        parts.append("</g>")
    size = f"0 0 {420 * len(panels)} {380 + 18 * max(len(series) for *_, series in panels)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" style="font:13px sans-serif">'
    path.write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")
    return path


def ticks(values):
    """Round numbers around the values: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    spread = max(values) - min(values) or 1
    step = 10 ** floor(log10(spread))  # the spread is one to ten of these
    step *= next(share for share in (0.2, 0.25, 0.5, 1, 2) if spread <= 5 * share * step)
    first, last = floor(min(values) / step), ceil(max(values) / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


# ==== Nothing below is new: the same text as in earlier chapters, held equal by a test ============
# ---- The predictor, as in chapter 4 --------------------------------------------------------------
def predict_accuracy(predictor, net, students):
    """Predicted (natural, robust) accuracy of students, (N, 2), each a share of 1."""
    answers = mlp(predictor["layers"], one_hot(net, students))
    return answers * predictor["scale"] + predictor["mean"]


def one_hot(net, students):
    """Features (N, all choices): for each gene a 1 at its choice; none where it is off."""
    columns = [
        [float(student[gene] == choice) for student in students]
        for gene, choices in net["genes"].items()
        for choice in choices
    ]
    return torch.tensor(columns).T


def mlp(layers, x):
    """A fully-connected network with ReLU: features x (N, all choices) -> (N, 2)."""
    for matrix, bias in layers[:-1]:
        x = F.relu(x @ matrix + bias)
    matrix, bias = layers[-1]
    return x @ matrix + bias


# ---- The genotype, as in chapter 1 ---------------------------------------------------------------
def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def canonical(net, student):
    """The genotype with 0 for each gene of a block that its depth switches off, so that a network
    has one genotype (more only where channel rounding merges choices)."""
    off = [gene for gene, (depth, least) in net["switches"].items() if student[depth] < least]
    return student | dict.fromkeys(off, 0)


def sample(net, rng):
    """A student with a random choice of each gene."""
    return canonical(net, {gene: rng.choice(choices) for gene, choices in net["genes"].items()})


# ---- Files and flags, the same in every chapter --------------------------------------------------
def run_missing(args, *files):
    """For each file: if it and all later ones are missing, run its chapter."""
    for i, name in enumerate(files):
        if not any((args.out / later).exists() for later in files[i:]):
            run_chapter(args, CHAPTERS[int(name[:2])])


def run_chapter(args, script, *flags):
    print(f"running {script}\n", flush=True)
    script = Path(__file__).resolve().with_name(script)
    if subprocess.run([sys.executable, script, *args.given, *flags]).returncode:
        sys.exit(f"{script.name} was not finished")


def save(path, settings, **content):
    """Write what load() reads, whole or not at all. Another job may have written it by now: exits
    if its settings differ, and keeps a finished file (.pt) as it is."""
    if path.exists():
        load(path, settings, sources=False)  # may exit
        if path.suffix == ".pt":
            return
    temporary = path.with_name(f"{path.name}.{token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:  # given a path, torch.save would store its name
            torch.save({"settings": settings, **content}, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the renaming could leave an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # if it was stopped before


def load(path, settings, sources=True):
    """What save() wrote. Its settings are all flags, and the checksums of all files, that led to
    it; exits if a flag differs from `settings`, or (sources) a checksum from the folder's."""
    content, expected = torch.load(path, map_location="cpu", weights_only=True), {**settings}
    for source in path.parent.glob("*.pt") if sources else ():
        if source.name in content["settings"]:
            expected[source.name] = crc32(source.read_bytes())
    for name, value in expected.items():
        old = content["settings"].get(name)
        if old != value:
            sys.exit(f"{path}: {name} was {old}, is {value}: delete the file, or use another --out")
    content["settings"][path.name] = crc32(path.read_bytes())  # for what is made from it
    return content


def write_csv(path, rows):
    lines = [rows[0].keys(), *(row.values() for row in rows)]  # names and numbers have no commas
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))


NAMES = "01_dynamic_net 02_teacher_trades 03_progressive_rslad 04_predictor 05_nsga2".split()

CHAPTERS = {int(name[:2]): f"{name}.py" for name in NAMES}

COMMON = {  # flags of every chapter, which it passes on to those that it runs
    "dataset": {"default": "cifar10", "help": "cifar10, cifar100, toy, or a folder of images"},
    "net": {"default": "resnet50", "choices": ["resnet50", "mbv3"]},
    "preset": {"choices": ["paper", "quick", "tiny"], "help": "default: paper, for toy tiny"},
    "sampling": {"default": "progressive", "choices": ["progressive", "random", "scratch"]},
    "out": {"type": Path, "help": "folder; default: runs/<dataset>-<net>-<preset>-seed<seed>"},
    "seed": {"default": 0, "type": int},
    "device": {"default": "cuda" if torch.cuda.is_available() else "cpu"},
}


def read_flags(**others):
    """All flags; those `given`, to pass on; `common` and `settings`, which files are made with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = sys.exit  # a bad flag: one line
    for flag, (*values, least, most, text) in FLAGS.items():
        others[flag] = {"type": type(values[0]), "help": f"{text}; presets {values}"}
    for flag, options in {**COMMON, **others}.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", **options)
    args = parser.parse_args()
    flags = vars(args)
    args.given = [f"--{f}={flags[f]}" for f in COMMON if flags[f] != parser.get_default(f)]
    args.preset = args.preset or ("tiny" if args.dataset == "toy" else "paper")
    for flag, (*values, least, most, text) in FLAGS.items():
        if flags[flag] is None:
            flags[flag] = values[COMMON["preset"]["choices"].index(args.preset)]
        if not least <= flags[flag] <= most:
            sys.exit(f"{flag} is {flags[flag]}, not {least} to {most}: {text}")
    args.settings = {f"{STAGE} {flag}": flags[flag] for flag in FLAGS}
    args.common = {name: flags[name] for name in ("dataset", "net", "preset", "seed")}
    folder = f"{Path(args.dataset).name}-{args.net}-{args.preset}-seed{args.seed}"
    args.out = args.out or Path("runs", folder)
    return args


def finish(args, rows, wrote, following=""):
    """Print a table, the files that were written, and the next command."""
    for line in [*rows[:1], *(row.values() for row in rows)]:  # a dict stands for its keys
        print(*(format(cell, ">14.4g" if isinstance(cell, float) else ">14") for cell in line))
    print("files:", *wrote)
    if following:
        print("next: python", following, *args.given)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a chapter that it runs, too
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes")
