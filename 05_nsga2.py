# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///
"""Chapter 5: multi-objective search (paper, sections 4.5, 5.0.2 and 5.3; NSGA-II, Deb et al., 2002).

Which student for this device? NSGA-II evolves genotypes towards predicted accuracy and predicted robustness at once,
under a budget of MACs; no network runs during the search, and none stands in this file. Then chapter 2 judges the
chosen students for real and exports them. All figures are drawn here, from the tables of all chapters.

    python 05_nsga2.py --dataset toy                                  # alone, this runs the whole chain
    python 05_nsga2.py --dataset cifar10 --max-macs 500 1000 2000     # a student for each of three devices
    python 05_nsga2.py --dataset cifar10 --figures                    # only draw what there is, at any time

reads   01_dynamic_net.pt, 04_predictor.pt     (that of --sampling; made first if missing); for figures, all tables
writes  05_population.csv   first and last generation     05_best.csv   the chosen students, as predicted
        05_front.csv        the last non-dominated front  05_search.pt  the same, for chapter 2, which makes table 1
        05_cost.csv         hours for 1 to 50 devices     *.svg         the figures, each beside its table
"""
from __future__ import annotations

import argparse, csv, fcntl, html, io, math, os, random, shlex, subprocess, sys, textwrap, time, zipfile, zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STAGE = {  # flag: (paper, quick, tiny, help)
    "population": (100, 100, 40, "individuals; 100 in the released code"),
    "generations": (100, 100, 20, "paper: 100 (section 5.3)"),
    "mutation": (0.1, 0.1, 0.1, "probability of a gene to mutate; paper: 0.1 (section 5.3)"),
}

# ---- The lesson: NSGA-II ---------------------------------------------------------------------------------------------
def dominance(objectives: np.ndarray, violation: np.ndarray) -> np.ndarray:
    """Matrix (N, N): does i dominate j? Deb's rule: the feasible beat the infeasible, a smaller violation a larger one,
    and at equal violation it takes to be as good in all objectives (N, M), which are maximised, and better in one."""
    as_good = np.ones((len(objectives), len(objectives)), dtype=bool)
    better = ~as_good
    for values in objectives.T:
        as_good &= values[:, None] >= values
        better |= values[:, None] > values
    return np.where(violation[:, None] == violation, as_good & better, violation[:, None] < violation)

def non_dominated_sort(dominates: np.ndarray) -> np.ndarray:
    """Rank (N,) of each individual: 0 if none dominates it, 1 if only those of rank 0 do, ... (Deb, section III A)."""
    count = dominates.sum(0)  # by how many others is each one dominated
    rank = np.full(len(count), -1)
    for level in range(len(count)):
        front = (count == 0) & (rank < 0)
        if not front.any():
            break
        rank[front] = level
        count = count - dominates[front].sum(0)
    return rank

def crowding_distance(objectives: np.ndarray) -> np.ndarray:
    """Room around each individual of one front (N, M): the gap between its neighbours, as a share of the range, summed
    over objectives; infinite at the ends (Deb, section III B)."""
    distance = np.zeros(len(objectives))
    for values in objectives.T:
        order = values.argsort(kind="stable")
        distance[order[[0, -1]]] = np.inf
        spread = values[order[-1]] - values[order[0]]
        if spread > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / spread
    return distance

def best_first(objectives: np.ndarray, violation: np.ndarray) -> np.ndarray:
    """Indices (N,) of the individuals, best first: by rank, within a rank the less crowded before the others."""
    rank = non_dominated_sort(dominance(objectives, violation))
    distance = np.empty(len(rank))
    for level in range(rank.max() + 1):
        distance[rank == level] = crowding_distance(objectives[rank == level])
    return np.lexsort((-distance, rank))

def breed(net: Net, mother: tuple, father: tuple, mutation: float, rng: random.Random) -> tuple:
    """A child: each gene from either parent (uniform crossover), drawn anew with probability `mutation`, and where it
    was off in that parent but is on in the child."""
    child = [m if rng.random() < 0.5 else f for m, f in zip(mother, father)]
    return canonical(net, [rng.choice(choices) if rng.random() < mutation or gene not in choices else gene
                           for gene, choices in zip(child, net.genes.values())])

def macs_counter(net: Net):
    """macs(student), what cost() counts, from a table for each block: the size of its map depends on no gene."""
    tables, side = [], 32
    for places, variants in net.blocks:
        counted = {values: block_cost(block, side)[1:] for values, block in variants.items() if block}
        side = [after for _, after in counted.values()][0]
        tables.append((places, {values: counted.get(values, (0,))[0] for values in variants}))
    return lambda student: sum([table[tuple([student[place] for place in places])] for places, table in tables])

def nsga2(net: Net, evaluate, population: int, generations: int, mutation: float, seed: int) -> tuple:
    """Evolve students towards large objectives; evaluate(students) returns ((N, M) objectives, (N,) violations >= 0).
    Returns the first and the last generation, each (students, objectives, violations), best first; none holds a student
    twice, so they are smaller than `population` where there are fewer students."""
    rng = random.Random(seed)
    def distinct(draw, known: list) -> list:
        students = dict.fromkeys(known)
        for _ in range(20 * population):  # there may be fewer different students than asked for
            if len(students) < len(known) + population:
                students.setdefault(draw())
        return list(students)[len(known):]
    def survivors(students: list, objectives: np.ndarray, violation: np.ndarray) -> tuple:
        best = best_first(objectives, violation)[:population]
        return [students[i] for i in best], objectives[best], violation[best]
    def child() -> tuple:  # of two tournaments: draw two parents, keep the better; they are sorted, best first
        mother, father = (parents[min(rng.randrange(len(parents)), rng.randrange(len(parents)))] for _ in range(2))
        return breed(net, mother, father, mutation, rng)

    students = [student_at(net, 0), *distinct(lambda: sample(net, rng), [student_at(net, 0)])]  # one that always fits
    first = generation = survivors(students, *evaluate(students))
    for _ in range(generations):
        parents = generation[0]
        children = distinct(child, parents)
        if children:
            judged = zip(generation[1:], evaluate(children))
            generation = survivors(parents + children, *(np.concatenate(pair) for pair in judged))
    return first, generation

# ---- The figures, from the tables that chapters 2 to 5 have written --------------------------------------------------
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a", "#b8860b", "#56b4e9")  # for the colour-blind, too
STYLE = """text{fill:#1f2328} path{stroke:#d1d9e0} polyline{fill:none;stroke-width:2} .page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc} path{stroke:#3d444d} .page{fill:#0d1117}}"""
NATURAL, ROBUST = "natural accuracy in %", "robust accuracy in %"

def plot(path: Path, caption: str, panels: list):
    """Write panels, (title, x label, y label, {name: (style, xs, ys)}), side by side as an SVG, for light and dark
    pages. Styles are line, dots, rings, and level, a line from side to side at ys[0]."""
    parts, bottom = [], 400 + 18 * max(len(series) for *_, series in panels)
    def text(x, y, words, anchor="middle", more=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(words)}</text>')
    def line(points, colour):
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" stroke="{colour}"/>')
    def circles(points, look):
        parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>' for x, y in points)

    for left, (title, x_label, y_label, series) in zip(range(70, 10 ** 6, 420), panels):  # a panel is 320 x 280 pixels
        scale = []  # value at its lower left corner, pixels for a unit: of x, then of y
        for axis, pixels in ((1, 320), (2, -280)):
            values = [value for drawn in series.values() for value in drawn[axis]]
            span = max(values) - min(values) or abs(values[0]) or 1
            step = next(m * 10.0 ** e for e in range(-9, 12) for m in (1, 2, 5) if span <= 6 * m * 10.0 ** e)
            first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
            last += first == last
            scale.append((first * step, pixels / (last - first) / step))
            for tick in range(first, last + 1):
                at, words = pixels * (tick - first) / (last - first), f"{tick * step:.6g}"
                if axis == 1:
                    parts.append(f'<path d="M{left + at:.1f} 50v280"/>')
                    text(left + at, 348, words)
                else:
                    parts.append(f'<path d="M{left} {330 + at:.1f}h320"/>')
                    text(left - 6, 334 + at, words, "end")
        text(left + 160, 36, title, more='font-weight="bold"')
        text(left + 160, 370, x_label)
        text(0, 0, y_label, more=f'transform="translate({left - 48} 190) rotate(-90)"')
        (x0, dx), (y0, dy) = scale
        for (name, (style, xs, ys)), colour, legend in zip(series.items(), COLOURS, range(392, 10 ** 6, 18)):
            points = [(left + (x - x0) * dx, 330 + (y - y0) * dy) for x, y in zip(xs, ys)]
            if style in ("line", "level"):
                line(points or [(x, 330 + (ys[0] - y0) * dy) for x in (left, left + 320)], colour)
                line([(left - 4, legend), (left + 12, legend)], colour)
            else:
                ring = f'r="6" fill="none" stroke-width="2" stroke="{colour}"'
                circles([*points, (left + 4, legend)], ring if style == "rings" else f'r="3" fill="{colour}"')
            text(left + 20, legend + 4, name, "start")
    for words in textwrap.wrap(caption, 65 * len(panels)):
        text(22, bottom, words, "start", 'font-size="12"')
        bottom += 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {420 * len(panels) + 20} {bottom}"'
    write(path, "\n".join([f'{head} font-family="sans-serif" font-size="13">', f"<style>{STYLE}</style>",
                           '<rect class="page" width="100%" height="100%"/>', *parts, "</svg>\n"]).encode())

def table(args, name: str, **wanted: str) -> list[dict]:
    """The rows of a table in the folder, whose columns are as wanted; none if there is no such table."""
    args.table = args.out / f"{name}.csv"  # for the message if it cannot be drawn
    rows = list(csv.DictReader(args.table.read_text().splitlines())) if args.table.exists() else []
    return [row for row in rows if wanted.items() <= row.items()]

def series(rows: list[dict], style: str, x: str = "natural", y: str = "robust") -> tuple:
    """(style, xs, ys) of the rows that have a y, and a finite one; accuracies in %."""
    def values(name):
        share = name.split("_")[0] in ("natural", "robust", "predicted", "pgd20") and name != "natural_kl"
        return [(100 if share else 1) * float(row[name]) for row in rows if row[y] and math.isfinite(float(row[y]))]
    return style, values(x) if x else [], values(y)

def figures(args) -> list[Path]:
    """Draw every figure whose tables are in the folder, and write the table of costs; returns the files. Exits if a
    table is damaged."""
    files = []
    def draw(name, caption, *panels):
        panels = [(*labels, {key: drawn for key, drawn in found.items() if drawn[2]}) for *labels, found in panels]
        if panels and all(found for *_, found in panels):
            files.append(args.out / f"{name}.svg")
            plot(files[-1], caption, panels)
    try:
        for path in sorted(args.out.glob("0[23]_*_log.csv")):
            draw_training(args, path.stem, draw)
        draw_sampling(args, draw)
        draw_cost(args, files, draw)
        for sampling, end in (("progressive", ""), ("random", "_random")):
            draw_predictor(args, end, draw)
            draw_search(args, sampling, end, draw)
    except (KeyError, ValueError, TypeError, IndexError, StopIteration) as error:
        fail(f"{args.table} cannot be drawn ({error!r}): repair it, or have it made anew")
    return files

def draw_training(args, name: str, draw):
    """The losses of a run of chapter 2 or 3, and the accuracies that it has looked at."""
    rows = table(args, name)
    losses = [column for column in rows[0] if column in ("loss", "cross_entropy") or column.endswith("kl")]
    accuracies = [column for column in rows[0] if column not in ("epoch", "lr", "seconds", *losses)]
    draw(name, "Losses are means over an epoch's training images, accuracies of held-out training images under PGD.", *(
        (name[:-4], "epoch", label, {key.replace("_", " "): series(rows, "line", "epoch", key) for key in chosen})
        for chosen, label in ((losses, "loss in nats"), (accuracies, "accuracy in %"))))

def draw_sampling(args, draw):
    """Figures 2 and 7: many students of both samplings, and the teacher. Figure 6: three that differ in width alone."""
    clouds, lines, teacher = {}, {}, []
    for sampling, end in (("progressive", ""), ("random", "_random")):
        clouds[f"{sampling} sampling"] = series(table(args, f"04_students{end}"), "dots")
        lines[f"{sampling} sampling"] = [row for row in table(args, f"04_widths{end}") if row["student"] != "teacher"]
        teacher = table(args, f"04_widths{end}", student="teacher") or teacher
    draw("04_students", "Paper: progressive sampling gains 13 % natural, 14 % robust accuracy (MobileNet: 10 %, 5 %).",
         (args.out.name, NATURAL, ROBUST, {**clouds, "teacher": series(teacher, "rings")}))
    draw("04_widths", "Students that differ in width (kernel) alone, all other genes being the largest.", *(
        (args.out.name, "width (kernel) of the student", label, {
            **{name: series(rows, "line", "student", target) for name, rows in lines.items()},
            "teacher": series(teacher, "level", "", target)})
        for target, label in (("natural", NATURAL), ("robust", ROBUST))))

def draw_predictor(args, end: str, draw):
    """Figure 9: predicted against measured, on students that did not train the predictor."""
    rows = table(args, f"04_predictions{end}")
    panels = []
    for row, label in zip(table(args, f"04_report{end}"), (NATURAL, ROBUST)):
        title = f"RMSE {float(row['RMSE']):.4f}, Kendall's tau {float(row['tau']):.2f}"
        panels.append((title, f"measured {label}", f"predicted {label}", {
            "students": series(rows, "dots", row["target"], f"predicted_{row['target']}"),
            "predicted = measured": series(rows, "line", row["target"], row["target"])}))
    draw(f"04_predictions{end}", f"{len(rows)} students not used in training. Paper: 0.0076, 0.0072.", *panels)

def draw_search(args, sampling: str, end: str, draw):
    """Figure 10: the first and the last generation, a panel for each budget."""
    panels, predicted = [], ("predicted_natural", "predicted_robust")
    for best in table(args, f"05_best{end}"):
        budget = best["max_macs"]
        front = sorted(table(args, f"05_front{end}", max_macs=budget), key=lambda row: float(row["predicted_natural"]))
        judged = table(args, "02_table1", method=METHODS[sampling], student=best["student"])
        first, last = (table(args, f"05_population{end}", max_macs=budget, generation=g) for g in ("first", "last"))
        panels.append((f"{sampling} sampling, {budget} million MACs", NATURAL, ROBUST, {
            "first generation": series(first, "dots", *predicted), "last generation": series(last, "dots", *predicted),
            "front": series(front, "line", *predicted), "chosen, predicted": series([best], "rings", *predicted),
            "chosen, on the test images": series(judged, "rings", "natural", "pgd20")}))
    draw(f"05_population{end}", "Predictions are of accuracy on held-out training images.", *panels)

def draw_cost(args, files: list, draw):
    """Figure 8: for 1 to 50 devices, a student retrained for each by RSLAD, or one dynamic network and searches."""
    finished = [path.stem for path in sorted(args.out.glob("0[345]_*.pt"))]  # the tables of others are not whole yet
    retrained = [float(table(args, f"{name}_log")[-1]["seconds"]) for name in finished if name.startswith("03_fixed")
                 and not name.endswith("_state")]
    if not retrained or not {"03_progressive", "04_predictor", "05_search"} <= {*finished}:
        return
    trained, measured, searched = (series(table(args, name), "", "", "seconds")[2] for name in (
        "03_progressive_log", "04_students", "05_best"))
    each, once = sum(retrained) / len(retrained), trained[-1] + sum(measured)
    rows = [{"devices": count, "retraining": count * each / 3600, "ProARD": (once + count * max(searched)) / 3600}
            for count in range(1, 51)]
    files.append(args.out / "05_cost.csv")
    write(files[-1], rows)
    ratio = f"50 devices: {rows[-1]['retraining'] / rows[-1]['ProARD']:.3g} times less than retraining (paper: 60)"
    print(ratio)
    draw("05_cost", f"{ratio}. Both need the same teacher first.", (args.out.name, "devices", "hours", {
        name: series(rows, "line", "devices", name) for name in ("retraining", "ProARD")}))

# ---- The dynamic network: genes -> layers -> a slice of the shared weights -> logits ---------------------------------
# {gene: its choices, smallest first}, in the order of a genotype; what switches each gene on, for canonical(); and for
# each block of the largest student the places of the genes that it depends on, and {their values: the Block, or None
# where they switch it off}. Chapter 1 makes it, the others read it.
Net = namedtuple("Net", "genes switches blocks")
# A convolution (a linear layer is a 1x1 one; kernel 0: none), the weights behind it (batch norm, a bias or none) and
# its activation.
BN = ("bn.weight", "bn.bias")
Layer = namedtuple("Layer", "name inp out kernel stride groups tail act", defaults=(1, 1, 1, BN, "relu"))
# act(main(x) + shortcut(x)): shortcut None is none, () the identity. gate, squeeze-and-excitation, scales what the last
# layer of main reads. pool: global average pooling first.
Block = namedtuple("Block", "main shortcut gate act pool", defaults=(None, (), "none", False))

def canonical(net: Net, student: tuple) -> tuple:
    """The one genotype of a student: genes of blocks that its depth genes switch off are 0. A switch is the place of a
    depth gene and the value from which it is on; (0, 0), always on, for most genes."""
    return tuple([gene if student[place] >= least else 0 for gene, (place, least) in zip(student, net.switches)])

def student_at(net: Net, place: int) -> tuple:
    """The student with every gene at this place of its choices: -1 is the largest, the teacher; 0 the smallest."""
    return canonical(net, tuple(choices[place] for choices in net.genes.values()))

def sample(net: Net, rng: random.Random, kinds: tuple = ("depth", "width", "kernel", "expand")) -> tuple:
    """A student whose genes of these kinds are drawn uniformly, the others being the largest."""
    return canonical(net, tuple(rng.choice(choices) if name.split("_")[0] in kinds else choices[-1]
                                for name, choices in net.genes.items()))

def blocks_of(net: Net, student: tuple) -> tuple[Block, ...]:
    """The student's network, from the input image to the logits."""
    found = [variants[tuple([student[place] for place in places])] for places, variants in net.blocks]
    return tuple([block for block in found if block])

def layers(blocks: tuple) -> list[Layer]:
    """All layers of a network."""
    return [layer for block in blocks for layer in (*block.main, *block.gate, *(block.shortcut or ()))]

def block_cost(block: Block, side: int) -> tuple[int, int, int]:
    """(parameters, MACs, side of the map it makes) of a block that is given a map of side x side pixels."""
    params = macs = 0
    side = 1 if block.pool else side
    for layer in (*block.main, *block.gate, *(block.shortcut or ())):
        weight = layer.out * layer.inp // layer.groups * layer.kernel ** 2
        side //= layer.stride if layer in block.main else 1  # the shortcut runs beside them
        macs += weight * (1 if layer in block.gate else side ** 2)
        params += weight + len(layer.tail) * layer.out
    return params, macs, side

# ---- The predictor ---------------------------------------------------------------------------------------------------
def one_hot(net: Net, students: list[tuple]) -> Tensor:
    """Features (N, sum of choices) of students: for each gene a 1 at its choice; a gene that is off has none."""
    place, choice = zip(*((i, value) for i, choices in enumerate(net.genes.values()) for value in choices))
    return (torch.tensor(students, dtype=torch.float64)[:, place] == torch.tensor(choice, dtype=torch.float64)).float()

def predictor_shapes(net: Net, hidden_layers: int, hidden_width: int) -> dict[str, tuple]:
    """Names and shapes of the predictor's weights; mean and scale are those of its two targets."""
    widths = [sum(map(len, net.genes.values())), *[hidden_width] * hidden_layers, 2]
    shape = {"mean": (2,), "scale": (2,)}
    for i, (inp, out) in enumerate(zip(widths, widths[1:])):
        shape |= {f"matrix_{i}": (inp, out), f"bias_{i}": (out,)}
    return shape

def mlp(weights: dict, x: Tensor) -> Tensor:
    """A fully-connected network with ReLU: features x (N, sum of choices) -> (N, 2)."""
    last = len(weights) // 2 - 2
    for i in range(last):
        x = F.relu(x @ weights[f"matrix_{i}"] + weights[f"bias_{i}"])
    return x @ weights[f"matrix_{last}"] + weights[f"bias_{last}"]

def predict_accuracy(weights: dict, net: Net, students: list[tuple]) -> Tensor:
    """Predicted (natural, robust) accuracy of students, (N, 2), each a share of 1."""
    return mlp(weights, one_hot(net, students)) * weights["scale"] + weights["mean"]

# ---- Data: every image is decoded once, and lives on the device as uint8 ---------------------------------------------
def data_file(args) -> Path:
    """The cache of --dataset's images, which chapter 1 writes; another one when a folder gains or loses files."""
    mark = f"-{args.seed}" if args.dataset == "toy" else ""
    if args.dataset not in ("cifar10", "cifar100", "toy"):
        found = [(str(path), path.stat().st_mtime_ns) for path in sorted(Path(args.dataset).resolve().glob("t*/*/"))]
        mark = f"-{zlib.crc32(repr(found).encode()):08x}"
    return args.data_dir / f"{args.name}{mark}.pt"

# ---- Files: the only thing that chapters share -----------------------------------------------------------------------
def fail(message: str):
    """One line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)

def write(path: Path, content):
    """Write a checkpoint (a dict), a table (a list of rows) or bytes: the whole file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())  # not to the file: a full disk would not be an OSError
        content = buffer.getvalue()
    elif isinstance(content, list):
        lines = [columns := max(content, key=len), *([row.get(column, "") for column in columns] for row in content)]
        content = "".join(",".join(map(str, line)) + "\n" for line in lines).encode()
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def load(path: Path, settings: dict, expected: dict | None = None) -> dict:
    """Read a checkpoint; exits if it is damaged, of other settings, or its weights are not the `expected` {name: shape}
    in float32. Checksums are compared (testzip names a bad part), no code in it is run, tensors stay on the disk."""
    try:
        content = zipfile.ZipFile(path).testzip() or torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        other = [f"{name} {content['settings'].get(name)}, not {value}" for name, value in settings.items()
                 if content["settings"].get(name) != value]
        found = {name: (weight.shape, weight.dtype) for name, weight in content.get("weights", {}).items()}
    except Exception as error:  # torch.load raises many kinds
        fail(f"{path} is cut short or not one of our files ({type(error).__name__}): delete it to have it made anew")
    if other:
        fail(f"{path} was made with {'; '.join(other)}: take another --out, or make it anew with --restart")
    if expected and found != {name: (shape, torch.float32) for name, shape in expected.items()}:
        fail(f"{path} does not hold the weights of this network: delete it to have it made anew")
    return content

def read_net(args) -> dict[str, Tensor]:
    """The untrained weights of chapter 1; sets args.net, and args.shapes, {name: shape} of all shared weights."""
    path = need(args, args.out / "01_dynamic_net.pt", "01_dynamic_net.py")
    content = load(path, args.common)
    def block(main, shortcut, gate, act, pool):
        return Block(*(part and tuple(Layer(*layer) for layer in part) for part in (main, shortcut, gate)), act, pool)
    try:
        genes, switches, tables = content["net"]
        args.net = Net(genes, switches, [(places, {values: found and block(*found) for values, found in table.items()})
                                         for places, table in tables])
        args.shapes = {name: part.shape for name, part in content["weights"].items()}
        wanted = {f"{layer.name}.conv.weight": (layer.out, layer.inp // layer.groups, layer.kernel, layer.kernel)
                  for layer in layers(blocks_of(args.net, student_at(args.net, -1))) if layer.kernel}
        assert wanted == {name: shape for name, shape in args.shapes.items() if name.endswith("conv.weight")}
    except Exception:  # many kinds, of a file that is not chapter 1's
        fail(f"{path} does not hold a network: delete it to have it made anew")
    return content["weights"]

def lock(args, folder: Path, *old: Path):
    """Keep other processes out of the folder until this one ends, in whatever way; with --restart, delete `old`."""
    folder.mkdir(parents=True, exist_ok=True)
    args.locks[folder] = open(folder / ".lock", "a")
    try:
        fcntl.flock(args.locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by process {(folder / '.lock').read_text()}: wait for it, or take another folder")
    (folder / ".lock").write_text(str(os.getpid()))
    for path in old if args.restart else ():
        path.unlink(missing_ok=True)

# ---- Flags, and how chapters follow each other -----------------------------------------------------------------------
SAMPLING = {"choices": ("progressive", "random"), "default": "progressive", "help": "how chapter 3 draws students"}
METHODS = {"teacher": "TRADES", "fixed": "RSLAD", "progressive": "ProARD", "random": "random sampling"}  # in table 1

def read_flags(stage: dict, **others: dict) -> argparse.Namespace:
    """The flags common to all chapters, the numbers of this one's `stage`, and other flags with their settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    common = {"dataset": {"default": "cifar10", "metavar": "cifar10|cifar100|toy|PATH",
                          "help": "PATH: a folder with train/<class>/* and test/<class>/* images"},
              "net": {"default": "resnet50", "metavar": "resnet50|mbv3|wrn34_10"},
              "preset": {"choices": ("paper", "quick", "tiny"), "help": "default: paper, for toy tiny"},
              "out": {"type": Path, "help": "folder of all chapters' files (default: runs/<dataset>-<net>)"},
              "data_dir": {"type": Path, "default": Path("data"), "help": "folder of the cached images"},
              "seed": {"type": int, "default": 0},
              "device": {"help": "cpu, cuda or cuda:N (default: cuda if there is one)"}}
    numbers = {name: {"type": type(paper), "help": f"{text} (presets: paper {paper:g}, quick {quick:g}, tiny {tiny:g})"}
               for name, (paper, quick, tiny, text) in stage.items()}
    parser.add_argument("--restart", action="store_true", help="start this chapter over")
    for name, settings in {**common, **numbers, **others}.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    args = parser.parse_args(namespace=argparse.Namespace(bench=False, locks={}))
    args.given = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in common
                  if getattr(args, name) != parser.get_default(name)]
    args.preset = args.preset or ("tiny" if args.dataset == "toy" else "paper")
    for name, values in stage.items():
        if getattr(args, name) is None:
            setattr(args, name, values[("paper", "quick", "tiny").index(args.preset)])
        if not 0 < getattr(args, name) < float("inf"):
            fail(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.seed <= 10 ** 6:
        fail("--seed must be between 0 and a million")
    args.name = Path(args.dataset).resolve().name
    args.out = args.out or Path("runs", f"{args.name}-{args.net}")
    args.common = {"dataset": data_file(args).stem, "net": args.net, "preset": args.preset}
    kept = {key: getattr(args, key) for key in stage | others if key not in ("bench", "judge", "figures", "save_every")}
    args.settings = {**args.common, "seed": args.seed, **kept}
    try:
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        fail(f"--device {args.device}: there is no such device here; --device cpu always works")
    return args

def need(args, path: Path, script: str, *words: str) -> Path:
    """The path of another chapter's file; if it is missing, that chapter runs first, with the same common flags."""
    if not path.exists():
        print(f"{path} is missing: running {script}\n", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name(script), *args.given, *words]).returncode:
            raise SystemExit(2)  # it has said why, unless it was killed
    return path

def finish(args, rows: list[dict], wrote: tuple = (), following: str = ""):
    """A table of aligned columns, what was written, and the command that comes next."""
    lines = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    for line in [list(rows[0]), *lines] if rows else []:
        print("".join(cell.rjust(2 + max(map(len, column))) for cell, *column in zip(line, rows[0], *lines)))
    print(*(["wrote", *wrote] if wrote else []), end="\n" if wrote else "")
    print(*([f"next: python {following} {shlex.join(args.given)}\n"] if following else []), end="")

def run_chapter(main):
    """main(); Ctrl-C and a file that cannot be written end it with one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; continue with: python", shlex.join(w for w in sys.argv if w != "--restart"), file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:
        fail(f"{error.filename or 'a file'} could not be written: {error.strerror}")

# ---- The chapter -----------------------------------------------------------------------------------------------------
def search(args, budgets: list, macs_of, suffix: str, done: Path, after: tuple):
    """Search a student for each budget, in millions of MACs, and write what was found."""
    net = args.net
    path = need(args, args.out / f"04_predictor{suffix}.pt", "04_predictor.py", f"--sampling={args.sampling}")
    predictor = load(path, args.common)["weights"]
    hidden = len(predictor) // 2 - 2, predictor.get("bias_0", torch.empty(0)).numel()  # layers and their width
    load(path, args.common, predictor_shapes(net, *hidden))
    lock(args, args.out, done)
    population, fronts, best, chosen, start = [], [], [], {"largest": student_at(net, -1)}, time.monotonic()
    for budget in budgets:
        def evaluate(students):
            macs = np.array([macs_of(student) / 1e6 for student in students])
            return predict_accuracy(predictor, net, students).double().numpy(), (macs - budget).clip(min=0)

        generations = nsga2(net, evaluate, args.population, args.generations, args.mutation, args.seed)
        for name, (students, objectives, violation) in zip(("first", "last"), generations):
            rows = [{"max_macs": f"{budget:g}", "generation": name, **dict(zip(net.genes, student)),
                     "macs": macs_of(student), "predicted_natural": natural, "predicted_robust": robust}
                    for student, (natural, robust) in zip(students, objectives.tolist())]
            population += rows
        front = np.flatnonzero(non_dominated_sort(dominance(objectives, violation)) == 0)  # of the last generation
        fronts += [rows[i] for i in front]
        pick = front[objectives[front].sum(1).argmax()]  # both count alike
        chosen[f"best of {budget:g}M"] = students[pick]
        best.append({"student": f"best of {budget:g}M", **rows[pick], "seconds": time.monotonic() - start})
        start = time.monotonic()
        print(f"{budget:g} million MACs: {len(front)} students on the front", flush=True)
    tables = {"population": population, "front": fronts, "best": best}
    for name, content in tables.items():
        write(args.out / f"05_{name}{suffix}.csv", content)
    stale = [path for path in args.out.glob("05_student*.pt2") if ("_random" in path.name) == ("_random" == suffix)]
    for path in (*after, *stale):  # they are made anew
        path.unlink(missing_ok=True)
    seconds = sum(row["seconds"] for row in best)
    write(done, {"settings": args.settings, "students": chosen, "seconds": seconds})
    finish(args, [{key: value for key, value in row.items() if key not in net.genes} for row in best],
           [args.out / f"05_{name}{suffix}.csv" for name in tables])
    fcntl.flock(args.locks[args.out], fcntl.LOCK_UN)  # chapter 2 judges them in this folder

def main():
    args = read_flags(STAGE, sampling=SAMPLING, max_macs={
        "nargs": "+", "type": float, "metavar": "MILLIONS", "help": "budgets of MACs, one student for each; default: "
        "the paper's 2000 for Dyn-ResNet50 (section 5.3), halfway from smallest to largest student elsewhere"},
        figures={"action": "store_true", "help": "draw the figures of all tables in the folder, and nothing else"})
    if args.figures:
        return finish(args, [], figures(args) or fail(f"{args.out} holds no tables yet: run a chapter first"))
    read_net(args)
    args.common["classes"] = args.settings["classes"] = args.shapes["classifier.conv.weight"][0]
    load(args.out / "01_dynamic_net.pt", args.common)  # now that the classes are known
    net, suffix = args.net, "" if args.sampling == "progressive" else "_random"
    if not net.genes:
        fail(f"--net {args.common['net']} has no students to search among")
    macs_of = macs_counter(net)
    ends = [macs_of(student_at(net, place)) / 1e6 for place in (0, -1)]  # the smallest and the largest student's
    budgets = args.settings["max_macs"] = args.max_macs or [2000.0 if ends[1] > 2000 else round(sum(ends) / 2, 1)]
    if not all(ends[0] <= budget < float("inf") for budget in budgets):
        fail(f"--max-macs must be at least {ends[0]:.4g}, the millions of MACs that the smallest student takes")
    done = args.out / f"05_search{suffix}.pt"
    after = args.out / "02_table1.csv", args.out / f"05_population{suffix}.svg"  # of chapter 2, of figures()
    if not done.exists() or args.restart:
        search(args, budgets, macs_of, suffix, done, after)
    else:
        load(done, args.settings)
        if all(path.exists() for path in after):  # they are missing if it was stopped between
            return finish(args, [], [f"{done} earlier (--restart makes it anew; --figures draws)"])
    need(args, after[0], "02_teacher_trades.py", "--judge")
    finish(args, [], figures(args))

if __name__ == "__main__":
    run_chapter(main)
