# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///
"""Chapter 5: multi-objective search (paper, sections 4.5, 5.0.2 and 5.3; NSGA-II, Deb et al., 2002).

Which student for this device? NSGA-II evolves genotypes towards predicted accuracy and predicted robustness at once,
under a budget of MACs; no network runs during the search. Then the chosen students are judged for real: natural images,
FGSM and PGD-20 on the test set. The best is exported as a standalone network that needs none of this code.

    python 05_nsga2.py --dataset toy                                  # alone, this runs the whole chain
    python 05_nsga2.py --dataset cifar10 --max-macs 500 1000 2000     # a student for each of three devices

reads   01_dynamic_net.pt, 03_progressive.pt, 04_predictor.pt     (those of --sampling; made first if missing)
writes  05_population.csv   first and last generation       05_best.csv      the chosen, predicted and measured
        05_front.csv        the last non-dominated front    05_student.pt2   to deploy (one for each of several budgets)
"""
from __future__ import annotations

import argparse, fcntl, functools, io, os, random, shlex, subprocess, sys, zipfile, zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGE = {  # flag: (paper, quick, tiny, help)
    "population": (100, 100, 40, "individuals; 100 in the released code"),
    "generations": (100, 100, 20, "paper: 100 (section 5.3)"),
    "mutation": (0.1, 0.1, 0.1, "probability of a gene to mutate; paper: 0.1 (section 5.3)"),
    "eps": (8.0, 8.0, 8.0, "largest change of a pixel, in 1/255; paper: 8 (section 5.0.1)"),
    "step_size": (2.0, 2.0, 2.0, "of PGD, in 1/255; paper: 0.0078 = 2/255 (figure 2)"),
    "steps": (20, 20, 20, "of PGD; paper: 20 (section 5.0.1)"),
    "calibration_images": (2000, 2000, 500, "training images for batch-norm statistics; released code: 2000 to 4000"),
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
    """macs(student), what cost() counts, from differences counted before: what the depth of a stage or the genes of a
    block add depends on the widths around it alone. It takes a quarter off the time of a search."""
    names, groups = list(net.genes), {"": []}  # a group is what one term of the sum depends on: places of genes
    widths = {i: name[6:] for i, name in enumerate(names) if name.startswith("width")}
    reference = [choices[-1 if name.startswith("depth") else 0] for name, choices in net.genes.items()]
    for i, name in enumerate(names):
        owner = "" if i in widths or name == "depth_stem" else name.split("_", 1)[1]  # a stage, a block, or all at once
        around = [] if not owner else [str(int(owner[0]) - 1 or "stem"), owner[0]]
        groups.setdefault(owner, [place for place, part in widths.items() if part in around]).append(i)

    @functools.lru_cache(maxsize=None)
    def term(owner: str, values: tuple) -> int:
        found = dict(zip(groups[owner], values))
        if 0 in [value for place, value in found.items() if names[place].startswith("expand")]:
            return 0  # the block is off, which the term of its stage's depth has counted
        student = tuple(found.get(place, value) for place, value in enumerate(reference))
        plain = tuple(found.get(place, value) if place in widths else value for place, value in enumerate(reference))
        return cost(net, student)[1] - (cost(net, plain)[1] if owner else 0)

    return lambda student: sum([term(owner, tuple([student[i] for i in places])) for owner, places in groups.items()])

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

# ---- The dynamic network: genes -> layers -> a slice of the shared weights -> logits ---------------------------------
# Channels of the stem; stages (width, base depth, stride[, activation, squeeze-and-excitation]); the choices of each
# kind of gene, smallest first; {gene: its choices} in the order of a genotype. Chapter 1 makes it, the others read it.
Net = namedtuple("Net", "stem stages depth expand width kernel head stem_stride classes genes switches",
                 defaults=((), (), (), 1, 10, (), ()))
# A convolution (a linear layer is a 1x1 one), the weights behind it (batch norm, a bias or none) and its activation.
BN = ("bn.weight", "bn.bias")
BIAS = ("conv.bias",)
Layer = namedtuple("Layer", "name inp out kernel stride groups tail act", defaults=(1, 1, 1, BN, "relu"))
# act(main(x) + shortcut(x)): shortcut None is none, () the identity. gate, squeeze-and-excitation, scales what the last
# layer of main reads. pool: global average pooling first.
Block = namedtuple("Block", "main shortcut gate act pool", defaults=(None, (), "none", False))
ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "hswish": F.hardswish, "hsigmoid": F.hardsigmoid}

def divisible(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not below 90% of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded

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

@functools.lru_cache(maxsize=None)
def residual(resnet: bool, name: str, inp: int, out: int, kernel: int, expand: float, stride: int, act="", gated=False):
    """ResNet's block (1x1 down, 3x3, 1x1 up; the first of a stage pools and projects its shortcut) or MobileNet's (1x1
    up, depthwise, gate, 1x1 down; its shortcut is there where the shape is kept)."""
    middle = divisible(round((out if resnet else inp) * expand))
    main = (Layer(f"{name}_reduce", inp, middle, act=act or "relu"),
            Layer(f"{name}_middle", middle, middle, kernel, stride, 1 if resnet else middle, act=act or "relu"),
            Layer(f"{name}_last", middle, out, act="none"))
    if resnet:
        return Block(main, (Layer(f"{name}_shortcut", inp, out, act="none"),) * name.endswith("_1"), act="relu")
    squeezed = divisible(middle // 4)
    gate = (Layer(f"{name}_squeeze", middle, squeezed, tail=BIAS),
            Layer(f"{name}_excite", squeezed, middle, tail=BIAS, act="hsigmoid"))
    return Block(main[expand == 1:], () if stride == 1 and inp == out else None, gate if gated else ())

def blocks_of(net: Net, student: tuple) -> tuple[Block, ...]:
    """The student's network, from the input image to the logits."""
    gene = dict(zip(net.genes, student))
    if net.width:
        inp = divisible(net.stem * gene["width_stem"])
        middle = divisible(divisible(net.stem * gene["width_mid"]) // 2)
        blocks = [Block((Layer("stem_1", 3, middle, 3, net.stem_stride),)),
                  Block((Layer("stem_2", middle, middle, 3),), shortcut=()), Block((Layer("stem_3", middle, inp, 3),))]
        if gene["depth_stem"] < net.depth[-1]:
            del blocks[1]
    else:
        inp = net.stem
        blocks = [Block((Layer("stem", 3, inp, 3, net.stem_stride, act="hswish"),)),
                  residual(False, "0_1", inp, inp, 3, 1, 1)]
    for s, (width, base_depth, stride, *act_and_gate) in enumerate(net.stages, 1):
        out = divisible(width * gene[f"width_{s}"]) if net.width else width
        for b in range(1, base_depth + gene[f"depth_{s}"] + 1):
            kernel, expand = gene[f"kernel_{s}_{b}"] if net.kernel else 3, gene[f"expand_{s}_{b}"]
            blocks.append(residual(net.width != (), f"{s}_{b}", inp, out, kernel, expand, stride if b == 1 else 1,
                                   *act_and_gate))
            inp = out
    if net.head:
        blocks += [Block((Layer("head_1", inp, net.head[0], act="hswish"),)),
                   Block((Layer("head_2", *net.head, tail=(), act="hswish"),), pool=True)]
        inp = net.head[1]
    return (*blocks, Block((Layer("classifier", inp, net.classes, tail=BIAS, act="none"),), pool=True))

def layers(blocks: tuple) -> list[Layer]:
    """All layers of a network."""
    return [layer for block in blocks for layer in (*block.main, *block.gate, *(block.shortcut or ()))]

def slice_weights(shared: dict[str, Tensor], blocks: tuple, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A student's weights: leading channels of the shared ones, transformed centres of kernels; convolutions packed,
    channels last (1.2 times as fast as channels first), and in `dtype`, if given."""
    weights = {}
    for layer in layers(blocks):
        weight = shared[f"{layer.name}.conv.weight"][:layer.out, :layer.inp // layer.groups]
        while weight.shape[-1] > layer.kernel:  # 7x7 -> 5x5 -> 3x3, each by the layer's own learned matrix
            k = weight.shape[-1] - 2
            centre = weight[:, :, 1:-1, 1:-1].reshape(-1, k * k)
            weight = (centre @ shared[f"{layer.name}.to{k}"]).view(layer.out, 1, k, k)
        weights[f"{layer.name}.conv.weight"] = weight.contiguous(memory_format=torch.channels_last)
        weights |= {f"{layer.name}.{part}": shared[f"{layer.name}.{part}"][:layer.out] for part in layer.tail}
    if dtype:
        weights = {name: weight.to(dtype) if ".conv." in name else weight for name, weight in weights.items()}
    return weights

def walk(blocks: tuple, x: Tensor, run) -> Tensor:
    """x (B, 3, H, W) -> logits (B, classes); run(layer, x) computes one layer."""
    for block in blocks:
        y = x = x.mean((2, 3), keepdim=True) if block.pool else x
        for layer in block.main[:-1]:
            y = run(layer, y)
        if block.gate:
            squeeze, excite = block.gate
            y = y * run(excite, run(squeeze, y.mean((2, 3), keepdim=True)))
        y = run(block.main[-1], y)
        if block.shortcut:
            x = run(block.shortcut[0], F.avg_pool2d(x, x.shape[-1] // y.shape[-1]))
        x = ACTIVATIONS[block.act](y if block.shortcut is None else y + x)
    return x.flatten(1)

def forward(weights: dict, blocks: tuple, x: Tensor, stats: dict | None = None, momentum: float = 0.0) -> Tensor:
    """Logits (B, classes) of a student for images x (B, 3, 32, 32) in [0, 1]. Without `stats`, {layer: (mean, var)},
    each batch norm uses its batch's statistics, as in training; with them these, frozen; with a momentum too, its
    batch's again, while `stats` are updated in place (calibration). In bf16 are convolutions alone."""
    def run(layer, x):
        conv, bn = f"{layer.name}.conv", f"{layer.name}.bn"
        x = F.conv2d(x, weights[f"{conv}.weight"], weights.get(f"{conv}.bias"), layer.stride, layer.kernel // 2, 1,
                     layer.groups)
        if layer.tail == BN:
            mean, var = stats[layer.name] if stats else (None, None)
            x = F.batch_norm(x, mean, var, weights[f"{bn}.weight"], weights[f"{bn}.bias"], not stats or momentum > 0,
                             momentum)
        return ACTIVATIONS[layer.act](x)
    dtype = weights[f"{blocks[0].main[0].name}.conv.weight"].dtype
    return walk(blocks, x.to(dtype).contiguous(memory_format=torch.channels_last), run).to(x.dtype)

@functools.lru_cache(maxsize=None)
def block_cost(block: Block, side: int) -> tuple[int, int, int]:
    """(parameters, MACs, side of the map it makes) of a block that is given a map of side x side pixels."""
    params = macs = 0
    side = 1 if block.pool else side
    for layer in (*block.main, *block.gate, *(block.shortcut or ())):
        weight = layer.out * layer.inp // layer.groups * layer.kernel ** 2
        side //= layer.stride
        macs += weight * (1 if layer in block.gate else side ** 2)
        params += weight + len(layer.tail) * layer.out
    return params, macs, side

def cost(net: Net, student: tuple) -> tuple[int, int]:
    """(parameters, MACs of one 3x32x32 image) of a student; batch norm and activations are not counted as MACs."""
    params = macs = 0
    side = 32  # of the map, in pixels
    for block in blocks_of(net, student):
        more, much, side = block_cost(block, side)
        params, macs = params + more, macs + much
    return params, macs

class Standalone(nn.Module):
    """A student as an ordinary network of nn.Conv2d and nn.BatchNorm2d; its state dict is the slice and its stats."""

    def __init__(self, blocks: tuple, weights: dict[str, Tensor], stats: dict):
        super().__init__()
        self.blocks, state = blocks, dict(weights)
        for layer in layers(blocks):
            part = nn.Sequential()
            part.conv = nn.Conv2d(layer.inp, layer.out, layer.kernel, layer.stride, layer.kernel // 2, 1, layer.groups,
                                  layer.tail == BIAS)
            if layer.tail == BN:
                part.bn = nn.BatchNorm2d(layer.out)
                state[f"{layer.name}.bn.running_mean"], state[f"{layer.name}.bn.running_var"] = stats[layer.name]
            self.add_module(layer.name, part)
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        return walk(self.blocks, x, lambda layer, x: ACTIVATIONS[layer.act](getattr(self, layer.name)(x)))

# ---- Attack and judgement --------------------------------------------------------------------------------------------
def pgd(predict, x: Tensor, loss, start: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """Projected gradient ascent (Madry et al., 2018), the inner maximisation of equation 1: climbs loss(predict(x'))
    from x + start by signed steps, within |x' - x| <= eps and [0, 1]. Images are (B, 3, 32, 32), 1 is white."""
    x_adv = (x + start).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        gradient, = torch.autograd.grad(loss(predict(x_adv)), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv

def calibrated(shared: dict, net: Net, student: tuple, images: Tensor, dtype: torch.dtype | None = None, batch=250):
    """The student as it is judged and exported: logits = predict(x), with its own frozen batch-norm statistics,
    averages over uint8 training images (N, 3, 32, 32): no shared statistics would suit every student."""
    blocks = blocks_of(net, student)
    weights = {name: weight.detach() for name, weight in slice_weights(shared, blocks, dtype).items()}
    stats = {layer.name: (torch.zeros(layer.out, device=images.device), torch.ones(layer.out, device=images.device))
             for layer in layers(blocks) if layer.tail == BN}
    with torch.no_grad():
        for i, x in enumerate(images.split(batch)):
            forward(weights, blocks, x / 255, stats, momentum=len(x) / (i * batch + len(x)))  # a plain average
    return functools.partial(forward, weights, blocks, stats=stats)

def judge(predict, images: Tensor, labels: Tensor, eps: float, step_size: float, steps: int, batch: int = 250):
    """(natural, robust): which uint8 images are classified right, and which still are after PGD; bool (N,) each. PGD
    climbs the cross-entropy from a uniform start in the ball (FGSM, with one step, from the image): the same start for
    all images, so that the answer for one depends neither on its place nor on the batch."""
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(images.device)
    start = (2 * noise - 1) * (eps if steps > 1 else 0)
    natural, robust = torch.zeros(2, len(images), dtype=torch.bool, device=images.device)
    for first in range(0, len(images), batch):
        x, y = images[first:first + batch] / 255, labels[first:first + batch]
        with torch.no_grad():
            right = natural[first:first + batch] = predict(x).argmax(1) == y
        if right.any():
            x, y = x[right], y[right]  # the others are lost already
            x_adv = pgd(predict, x, lambda logits: F.cross_entropy(logits, y), start, eps, step_size, steps)
            with torch.no_grad():
                robust[first:first + batch][right] = predict(x_adv).argmax(1) == y
    return natural, robust

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
        folders = [folder for folder in sorted(Path(args.dataset).resolve().glob("t*/*")) if folder.is_dir()]
        found = [(str(folder), folder.stat().st_mtime_ns) for folder in folders]
        mark = f"-{zlib.crc32(repr(found).encode()):08x}"
    return args.data_dir / f"{args.name}{mark}.pt"

def load_data(args) -> dict[str, Tensor]:
    """{train, held_out, test}, uint8 (N, 3, 32, 32), and {train, held_out, test}_labels, (N,), on --device; held_out is
    a tenth of the training images. Adds the number of classes to the settings."""
    path = need(args, data_file(args), "01_dynamic_net.py")
    content = load(path, {})
    data = {name: part.to(args.device) for name, part in content.items() if torch.is_tensor(part)}
    for name in ("train", "held_out", "test"):
        images, labels = (data.get(key, torch.empty(1)) for key in (name, f"{name}_labels"))
        if (images.dtype, images.shape, labels.dtype) != (torch.uint8, (len(labels), 3, 32, 32), torch.int64) or not (
                labels.numel() and 0 <= labels.min() and labels.max() < content["classes"]):
            fail(f"{path} does not hold {name} images and their labels: delete it to have it made anew")
    args.common["classes"] = args.settings["classes"] = content["classes"]
    return data

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
        columns = max(content, key=len)
        lines = [columns, *([row.get(column, "") for column in columns] for row in content)]
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
    try:
        args.net, args.shapes = Net(*content["net"]), {name: part.shape for name, part in content["weights"].items()}
        for layer in layers(blocks_of(args.net, student_at(args.net, -1))):
            layer_shape = layer.out, layer.inp // layer.groups, layer.kernel, layer.kernel
            assert args.shapes[f"{layer.name}.conv.weight"] == layer_shape
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

def read_flags(stage: dict, **others: dict) -> argparse.Namespace:
    """The flags common to all chapters, the numbers of this one's `stage`, and other flags with their settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    common = {"dataset": {"default": "cifar10", "metavar": "cifar10|cifar100|toy|PATH",
                          "help": "PATH: a folder with train/<class>/* and test/<class>/* images"},
              "net": {"default": "resnet50", "metavar": "resnet50|mbv3"},
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
    chosen = {name: getattr(args, name) for name in (*stage, *others) if name not in ("bench", "save_every")}
    args.settings = {**args.common, "seed": args.seed, **chosen}
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
def export(predict, path: Path):
    """Write a calibrated student as a standalone network of plain layers; it takes (B, 3, 32, 32) in [0, 1], any B."""
    weights, blocks = predict.args  # of forward, which calibrated() has bound
    network, anything = Standalone(blocks, weights, predict.keywords["stats"]).cpu().eval(), torch.zeros(2, 3, 32, 32)
    program = torch.export.export(network, (anything,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write(path, buffer.getvalue())

def main():
    args = read_flags(STAGE, sampling=SAMPLING, max_macs={
        "nargs": "+", "type": float, "metavar": "MILLIONS", "help": "budgets of MACs, one student for each; default: "
        "the paper's 2000 for Dyn-ResNet50 (section 5.3), halfway from smallest to largest student elsewhere"})
    data, _ = load_data(args), read_net(args)
    net, suffix = args.net, "" if args.sampling == "progressive" else "_random"
    ends = [cost(net, student_at(net, place))[1] / 1e6 for place in (0, -1)]  # the smallest and the largest student's
    budgets = args.settings["max_macs"] = args.max_macs or [2000.0 if net.stem == 64 else round(sum(ends) / 2, 1)]
    if not all(ends[0] <= budget < float("inf") for budget in budgets):
        fail(f"--max-macs must be at least {ends[0]:.4g}, the millions of MACs that the smallest student takes")
    done = args.out / f"05_search{suffix}.pt"
    if done.exists() and not args.restart:
        load(done, args.settings)
        return finish(args, [], [f"{done} earlier (--restart makes it anew)"])
    path = need(args, args.out / f"04_predictor{suffix}.pt", "04_predictor.py", f"--sampling={args.sampling}")
    predictor = load(path, args.common)["weights"]
    hidden = len(predictor) // 2 - 2, predictor.get("bias_0", torch.empty(0)).numel()  # layers and their width
    load(path, args.common, predictor_shapes(net, *hidden))
    path = need(args, args.out / f"03_{args.sampling}.pt", "03_progressive_rslad.py", f"--sampling={args.sampling}")
    shared = {name: w.to(args.device) for name, w in load(path, args.common, args.shapes)["weights"].items()}
    lock(args, args.out, done)
    population, fronts, chosen, macs_of = [], [], {"largest": student_at(net, -1)}, macs_counter(net)
    for budget in budgets:
        def evaluate(students):
            macs = np.array([macs_of(student) / 1e6 for student in students])
            return predict_accuracy(predictor, net, students).double().numpy(), (macs - budget).clip(min=0)

        generations = nsga2(net, evaluate, args.population, args.generations, args.mutation, args.seed)
        for name, (students, objectives, violation) in zip(("first", "last"), generations):
            rows = [{"max_macs": budget, "generation": name, **dict(zip(net.genes, student)),
                     "macs": cost(net, student)[1], "predicted_natural": natural, "predicted_robust": robust}
                    for student, (natural, robust) in zip(students, objectives.tolist())]
            population += rows
        front = np.flatnonzero(non_dominated_sort(dominance(objectives, violation)) == 0)  # of the last generation
        fronts += [rows[i] for i in front]
        chosen[f"best of {budget:g}M"] = students[front[objectives[front].sum(1).argmax()]]  # both count alike
        print(f"{budget:g} million MACs: {len(front)} students on the front", flush=True)
    print(f"judging {len(chosen)} students on {len(data['test'])} test images", flush=True)
    rows, networks = [], []
    for name, student in chosen.items():
        predict = calibrated(shared, net, student, data["train"][:args.calibration_images])
        test = predict, data["test"], data["test_labels"], args.eps / 255
        (natural, fgsm), (_, robust) = judge(*test, args.eps / 255, 1), judge(*test, args.step_size / 255, args.steps)
        row = {"student": name, **dict(zip(net.genes, student)), **dict(zip(("params", "macs"), cost(net, student)))}
        row["predicted_natural"], row["predicted_robust"] = predict_accuracy(predictor, net, [student])[0].tolist()
        measured = {"natural": natural, "fgsm": fgsm, f"pgd{args.steps}": robust}
        rows.append(row | {attack: right.float().mean().item() for attack, right in measured.items()})
        if name != "largest":
            networks.append(args.out / f"05_student{suffix}{'_' + name.split()[-1] if len(budgets) > 1 else ''}.pt2")
            export(predict, networks[-1])
    tables = {"population": population, "front": fronts, "best": rows}
    for name, content in tables.items():
        write(args.out / f"05_{name}{suffix}.csv", content)
    write(done, {"settings": args.settings})
    rows = [{column: value for column, value in row.items() if column not in net.genes} for row in rows]
    finish(args, rows, [*(args.out / f"05_{name}{suffix}.csv" for name in tables), *networks])

if __name__ == "__main__":
    run_chapter(main)
