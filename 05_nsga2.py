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

reads   03_progressive.pt, 04_predictor.pt     (those of --sampling; made first if missing)
writes  05_population.csv   first and last generation       05_best.csv      the chosen, predicted and measured
        05_front.csv        the last non-dominated front    05_student.pt2   to deploy (one for each of several budgets)
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import io
import os
import random
import shlex
import subprocess
import sys
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
    ours, theirs = objectives[:, None], objectives[None]
    better = (ours >= theirs).all(2) & (ours > theirs).any(2)
    return np.where(violation[:, None] == violation[None], better, violation[:, None] < violation[None])


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
    child = (m if rng.random() < 0.5 else f for m, f in zip(mother, father))
    return canonical(net, tuple(rng.choice(choices) if rng.random() < mutation or gene not in choices else gene
                                for gene, choices in zip(child, genes(net).values())))


def nsga2(net: Net, evaluate, population: int, generations: int, mutation: float, seed: int) -> tuple:
    """Evolve students towards large objectives; evaluate(students) returns ((N, M) objectives, (N,) violations >= 0).
    Returns the first and the last generation, each (students, objectives, violations), best first; none holds a student
    twice, so they are smaller than `population` where there are fewer students."""
    rng = random.Random(seed)

    def distinct(draw, found: list) -> list:
        students = dict.fromkeys(found)
        for _ in range(20 * population):  # there may be fewer different students than asked for
            if len(students) < len(found) + population:
                students.setdefault(draw())
        return list(students)

    def survivors(students: list) -> tuple:
        objectives, violation = evaluate(students)
        best = best_first(objectives, violation)[:population]
        return [students[i] for i in best], objectives[best], violation[best]

    def child() -> tuple:  # of two tournaments: draw two parents, keep the better; they are sorted, best first
        mother, father = (parents[min(rng.randrange(len(parents)), rng.randrange(len(parents)))] for _ in range(2))
        return breed(net, mother, father, mutation, rng)

    first = generation = survivors(distinct(lambda: sample(net, rng), [student_at(net, 0)]))  # it meets any budget
    for _ in range(generations):
        parents = generation[0]
        generation = survivors(distinct(child, parents))
    return first, generation


# ---- The dynamic network: genes -> layers -> a slice of the shared weights -> logits ---------------------------------
# A dynamic network: channels of the stem; stages (width, base depth, stride[, activation, squeeze-and-excitation]); the
# choices of each kind of gene, smallest first. Dyn-ResNet50 has width genes, Dyn-MobileNetV3 kernel genes and a head.
Net = namedtuple("Net", "stem stages depth expand width kernel head stem_stride classes", defaults=((), (), (), 1, 10))
# A convolution (a linear layer is a 1x1 one), what follows it (BN, BIAS or nothing: these weights) and its activation.
BN = ("bn.weight", "bn.bias")
BIAS = ("conv.bias",)
Layer = namedtuple("Layer", "name inp out kernel stride groups tail act", defaults=(1, 1, 1, BN, "relu"))
# act(main(x) + shortcut(x)): shortcut None is none, () the identity. The gate, squeeze-and-excitation, scales what the
# last layer of main reads. pool: global average pooling first.
Block = namedtuple("Block", "main shortcut gate act pool", defaults=(None, (), "none", False))
NETWORKS = {  # sections 4.3 and 5.0.1; "tiny" is of the same construction, for laptops and tests
    ("resnet50", "paper"): Net(stem=64, stages=((256, 2, 1), (512, 2, 2), (1024, 4, 2), (2048, 2, 2)),
                               depth=(0, 1, 2), width=(0.65, 0.8, 1.0), expand=(0.2, 0.25, 0.35)),
    ("resnet50", "tiny"): Net(stem=16, stages=((64, 1, 2), (128, 1, 2)), depth=(0, 1), width=(0.5, 0.75, 1.0),
                              expand=(0.25, 0.375, 0.5), stem_stride=2),
    ("mbv3", "paper"): Net(
        stem=16, stages=((24, 0, 1, "relu", False), (40, 0, 2, "relu", True), (80, 0, 2, "hswish", False),
                         (112, 0, 1, "hswish", True), (160, 0, 2, "hswish", True)),
        depth=(2, 3, 4), kernel=(3, 5, 7), expand=(3, 4, 6), head=(960, 1280)),
    ("mbv3", "tiny"): Net(stem=16, stages=((24, 0, 2, "relu", False), (40, 0, 2, "hswish", True)), depth=(1, 2),
                          kernel=(3, 5), expand=(2, 3, 4), head=(128, 128), stem_stride=2),
}
ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "hswish": F.hardswish, "hsigmoid": F.hardsigmoid}


def divisible(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not below 90% of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@functools.lru_cache(maxsize=None)
def genes(net: Net) -> dict[str, tuple]:
    """{gene: its choices} in the order of a genotype. `expand_2_3` belongs to the third block of the second stage."""
    stages = range(1, len(net.stages) + 1)
    slots = [f"{s}_{b}" for s in stages for b in range(1, net.stages[s - 1][1] + net.depth[-1] + 1)]
    space = {"depth_stem": (net.depth[0], net.depth[-1])} if net.width else {}
    space |= {f"depth_{s}": net.depth for s in stages}
    space |= {f"width_{part}": net.width for part in ("mid", "stem", *stages) if net.width}
    space |= {f"kernel_{slot}": net.kernel for slot in slots if net.kernel}
    return space | {f"expand_{slot}": net.expand for slot in slots}


def canonical(net: Net, student: tuple) -> tuple:
    """The one genotype of a student: genes of blocks that its depth genes switch off are 0."""
    value = dict(zip(genes(net), student))
    active = {str(s): stage[1] + value[f"depth_{s}"] for s, stage in enumerate(net.stages, 1)}
    parts = (name.split("_") for name in value)  # three of them, as in expand_2_3, is a block's gene
    return tuple(0 if len(part) == 3 and int(part[2]) > active[part[1]] else gene
                 for part, gene in zip(parts, student))


def student_at(net: Net, place: int) -> tuple:
    """The student with every gene at this place of its choices: -1 is the largest, the teacher; 0 the smallest."""
    return canonical(net, tuple(choices[place] for choices in genes(net).values()))


def sample(net: Net, rng: random.Random, kinds: tuple = ("depth", "width", "kernel", "expand")) -> tuple:
    """A student whose genes of these kinds are drawn uniformly, the others being the largest."""
    return canonical(net, tuple(rng.choice(choices) if name.split("_")[0] in kinds else choices[-1]
                                for name, choices in genes(net).items()))


def bottleneck(name: str, inp: int, out: int, expand: float, stride: int) -> Block:
    """ResNet's block: 1x1 down, 3x3, 1x1 up; the first block of a stage pools and projects its shortcut."""
    middle = divisible(round(out * expand))
    main = (Layer(f"{name}_reduce", inp, middle), Layer(f"{name}_middle", middle, middle, 3, stride),
            Layer(f"{name}_last", middle, out, act="none"))
    shortcut = (Layer(f"{name}_shortcut", inp, out, act="none"),) if name.endswith("_1") else ()
    return Block(main, shortcut, act="relu")


def inverted_bottleneck(name: str, inp: int, out: int, kernel: int, expand: int, stride: int, act: str, gated: bool):
    """MobileNet's block: 1x1 up, depthwise, gate, 1x1 down; the shortcut is there where the shape is kept."""
    middle = divisible(round(inp * expand))
    squeezed = divisible(middle // 4)
    main = (Layer(f"{name}_reduce", inp, middle, act=act),
            Layer(f"{name}_middle", middle, middle, kernel, stride, groups=middle, act=act),
            Layer(f"{name}_last", middle, out, act="none"))
    gate = (Layer(f"{name}_squeeze", middle, squeezed, tail=BIAS),
            Layer(f"{name}_excite", squeezed, middle, tail=BIAS, act="hsigmoid"))
    return Block(main[expand == 1:], () if stride == 1 and inp == out else None, gate if gated else ())


def blocks_of(net: Net, student: tuple) -> tuple[Block, ...]:
    """The student's network, from the input image to the logits."""
    gene = dict(zip(genes(net), student))
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
                  inverted_bottleneck("0_1", inp, inp, 3, 1, 1, "relu", False)]
    for s, (width, base_depth, stride, *act_and_gate) in enumerate(net.stages, 1):
        out = divisible(width * gene[f"width_{s}"]) if net.width else width
        for b in range(1, base_depth + gene[f"depth_{s}"] + 1):
            expand, block_stride = gene[f"expand_{s}_{b}"], stride if b == 1 else 1
            blocks.append(bottleneck(f"{s}_{b}", inp, out, expand, block_stride) if net.width else inverted_bottleneck(
                f"{s}_{b}", inp, out, gene[f"kernel_{s}_{b}"], expand, block_stride, *act_and_gate))
            inp = out
    if net.head:
        blocks += [Block((Layer("head_1", inp, net.head[0], act="hswish"),)),
                   Block((Layer("head_2", *net.head, tail=(), act="hswish"),), pool=True)]
        inp = net.head[1]
    return (*blocks, Block((Layer("classifier", inp, net.classes, tail=BIAS, act="none"),), pool=True))


def layers(blocks: tuple) -> list[Layer]:
    """All layers of a network."""
    return [layer for block in blocks for layer in (*block.main, *block.gate, *(block.shortcut or ()))]


def shapes(net: Net) -> dict[str, tuple]:
    """Name and shape of every shared weight: those of the largest student, and the kernel transforms."""
    shape = {}
    for layer in layers(blocks_of(net, student_at(net, -1))):
        shape[f"{layer.name}.conv.weight"] = (layer.out, layer.inp // layer.groups, layer.kernel, layer.kernel)
        shape |= {f"{layer.name}.{part}": (layer.out,) for part in layer.tail}
        if layer.groups > 1:
            shape |= {f"{layer.name}.to{k}": (k * k, k * k) for k in net.kernel if k < layer.kernel}
    return shape


def slice_weights(shared: dict[str, Tensor], blocks: tuple) -> dict[str, Tensor]:
    """A student's weights: the leading channels of the shared ones, and the transformed centres of the kernels."""
    weights = {}
    for layer in layers(blocks):
        weight = shared[f"{layer.name}.conv.weight"][:layer.out, :layer.inp // layer.groups]
        while weight.shape[-1] > layer.kernel:  # 7x7 -> 5x5 -> 3x3, each by the layer's own learned matrix
            k = weight.shape[-1] - 2
            centre = weight[:, :, 1:-1, 1:-1].reshape(-1, k * k)
            weight = (centre @ shared[f"{layer.name}.to{k}"]).view(layer.out, 1, k, k)
        weights[f"{layer.name}.conv.weight"] = weight.contiguous(memory_format=torch.channels_last)
        weights |= {f"{layer.name}.{part}": shared[f"{layer.name}.{part}"][:layer.out] for part in layer.tail}
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
    """Logits (B, classes) of a student for images x (B, 3, 32, 32) in [0, 1].

    Without `stats`, {layer: (mean, var)}, each batch norm uses its batch's statistics, as in training; with them these,
    frozen; with a momentum too, its batch's again, while `stats` are updated in place (calibration).
    """
    def run(layer, x):
        conv, bn = f"{layer.name}.conv", f"{layer.name}.bn"
        x = F.conv2d(x, weights[f"{conv}.weight"], weights.get(f"{conv}.bias"), layer.stride, layer.kernel // 2, 1,
                     layer.groups)
        if layer.tail == BN:
            mean, var = stats[layer.name] if stats else (None, None)
            x = F.batch_norm(x, mean, var, weights[f"{bn}.weight"], weights[f"{bn}.bias"], not stats or momentum > 0,
                             momentum)
        return ACTIVATIONS[layer.act](x)
    return walk(blocks, x.contiguous(memory_format=torch.channels_last), run)


@functools.lru_cache(maxsize=100000)
def cost(net: Net, student: tuple) -> tuple[int, int]:
    """(parameters, MACs of one 3x32x32 image) of a student; batch norm and activations are not counted as MACs."""
    params = macs = 0
    side = 32  # of the map, in pixels
    for block in blocks_of(net, student):
        side = 1 if block.pool else side
        for layer in (*block.main, *block.gate, *(block.shortcut or ())):
            weight = layer.out * layer.inp // layer.groups * layer.kernel ** 2
            side //= layer.stride
            macs += weight * (1 if layer in block.gate else side ** 2)
            params += weight + len(layer.tail) * layer.out
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


def calibrated(shared: dict, net: Net, student: tuple, images: Tensor, batch: int = 250):
    """The student as it is judged and exported: logits = predict(x), with its own frozen batch-norm statistics,
    averages over uint8 training images (N, 3, 32, 32): no shared statistics would suit every student."""
    blocks = blocks_of(net, student)
    weights = {name: weight.detach() for name, weight in slice_weights(shared, blocks).items()}
    stats = {layer.name: (torch.zeros(layer.out, device=images.device), torch.ones(layer.out, device=images.device))
             for layer in layers(blocks) if layer.tail == BN}
    with torch.no_grad():
        for i, x in enumerate(images.split(batch)):
            forward(weights, blocks, x / 255, stats, momentum=len(x) / (i * batch + len(x)))  # a plain average
    return functools.partial(forward, weights, blocks, stats=stats)


def judge(predict, images: Tensor, labels: Tensor, eps: float, step_size: float, steps: int, batch: int = 250):
    """(natural, robust): which uint8 images are classified right, and which still are after PGD; bool (N,) each. PGD
    climbs the cross-entropy from a uniform start in the ball, of a fixed seed (with one step, FGSM, from the image)."""
    generator = torch.Generator(images.device).manual_seed(0)
    natural, robust = torch.zeros(2, len(images), dtype=torch.bool, device=images.device)
    for first in range(0, len(images), batch):
        x, y = images[first:first + batch] / 255, labels[first:first + batch]
        start = (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1) * (eps if steps > 1 else 0)
        with torch.no_grad():
            right = natural[first:first + batch] = predict(x).argmax(1) == y
        if right.any():
            x, y = x[right], y[right]  # the others are lost already
            x_adv = pgd(predict, x, lambda logits: F.cross_entropy(logits, y), start[right], eps, step_size, steps)
            with torch.no_grad():
                robust[first:first + batch][right] = predict(x_adv).argmax(1) == y
    return natural, robust


# ---- The predictor ---------------------------------------------------------------------------------------------------
def one_hot(net: Net, students: list[tuple]) -> Tensor:
    """Features (N, sum of choices) of students: for each gene a 1 at its choice; a gene that is off has none."""
    place, choice = zip(*((i, value) for i, choices in enumerate(genes(net).values()) for value in choices))
    return (torch.tensor(students, dtype=torch.float64)[:, place] == torch.tensor(choice, dtype=torch.float64)).float()


def mlp(weights: list, x: Tensor) -> Tensor:
    """A fully-connected network with ReLU: x (N, features) -> (N, outputs); weights is a list of (matrix, bias)."""
    for matrix, bias in weights[:-1]:
        x = F.relu(x @ matrix + bias)
    return x @ weights[-1][0] + weights[-1][1]


def predict_accuracy(predictor: dict, net: Net, students: list[tuple]) -> Tensor:
    """Predicted (natural, robust) accuracy of students, (N, 2), each a share of 1."""
    return mlp(predictor["layers"], one_hot(net, students)) * predictor["scale"] + predictor["mean"]


# ---- Data: every image is decoded once, and lives on the device as uint8 ---------------------------------------------
def data_file(args) -> Path:
    """The cache of --dataset's images, which chapter 1 writes; another one when a folder gains or loses files."""
    if args.dataset in ("cifar10", "cifar100", "toy"):
        return args.data_dir / (f"toy-{args.seed}.pt" if args.dataset == "toy" else f"{args.dataset}.pt")
    folders = [folder.resolve() for folder in sorted(Path(args.dataset).glob("t*/*")) if folder.is_dir()]
    found = repr([(str(folder), folder.stat().st_mtime_ns) for folder in folders])
    return args.data_dir / f"{args.name}-{hashlib.sha256(found.encode()).hexdigest()[:12]}.pt"


def load_data(args) -> dict[str, Tensor]:
    """{train, held_out, test}, uint8 (N, 3, 32, 32), and {train, held_out, test}_labels, (N,), on --device; held_out is
    a tenth of the training images. Sets the number of classes in args.net and the settings."""
    content = load(need(args, data_file(args), "01_dynamic_net.py"), {})
    args.net = args.net._replace(classes=content["classes"])
    args.common["classes"] = args.settings["classes"] = content["classes"]
    return {name: part.to(args.device) for name, part in content.items() if torch.is_tensor(part)}


# ---- Files: the only thing that chapters share -----------------------------------------------------------------------
def fail(message: str):
    """One line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path: Path, content):
    """Write a checkpoint (a dict) or a table (a list of rows): the whole file, or none; exits if it cannot."""
    buffer = io.BytesIO()
    if isinstance(content, dict):
        torch.save(content, buffer)
    else:
        lines = [max(content, key=len)] + [[row.get(column, "") for column in max(content, key=len)] for row in content]
        buffer.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        fail(f"{path} could not be written: {error.strerror}")


def load(path: Path, settings: dict, net: Net | None = None) -> dict:
    """Read a checkpoint; exits if it is damaged, of other settings, or its weights are not those of `net`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        made_with = content["settings"]
        found = {name: tuple(weight.shape) for name, weight in content["weights"].items()} if net else None
    except Exception as error:  # torch.load raises many kinds
        fail(f"{path} is cut short or not one of our files ({type(error).__name__}): delete it to have it made anew")
    other = [f"{name} {made_with.get(name)}, not {value}" for name, value in settings.items()
             if made_with.get(name) != value]
    if other:
        fail(f"{path} was made with {'; '.join(other)}: take another --out, or make it anew with --restart")
    if net and found != shapes(net):
        fail(f"{path} does not hold the weights of this network: delete it to have it made anew")
    return content


# ---- Flags and progress ----------------------------------------------------------------------------------------------
def read_flags(stage: dict, **others: dict) -> argparse.Namespace:
    """The flags common to all chapters, the numbers of this one's `stage`, and other flags with their settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--dataset", default="cifar10", metavar="cifar10|cifar100|toy|PATH",
                        help="PATH: a folder with train/<class>/* and test/<class>/* images")
    parser.add_argument("--net", default="resnet50", choices=sorted({name for name, _ in NETWORKS}))
    parser.add_argument("--preset", choices=("paper", "quick", "tiny"), help="default: paper, for toy tiny")
    parser.add_argument("--out", type=Path, help="folder of all chapters' files (default: runs/<dataset>-<net>)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the cached images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--restart", action="store_true", help="start this chapter over")
    for name, (paper, quick, tiny, text) in stage.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(paper),
                            help=f"{text} (presets: paper {paper:g}, quick {quick:g}, tiny {tiny:g})")
    for name, settings in others.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    args = parser.parse_args()
    args.given = [f"--{name.replace('_', '-')}={getattr(args, name)}"
                  for name in ("dataset", "net", "preset", "out", "data_dir", "seed", "device")
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
    args.settings = {**args.common, "seed": args.seed, **{name: getattr(args, name) for name in (*stage, *others)}}
    args.net = NETWORKS[args.net, "tiny" if args.preset == "tiny" else "paper"]
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


def finish(args, rows: list[dict], wrote: list, following: str):
    """A table of aligned columns, what was written, and the command that comes next."""
    lines = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    for line in [list(rows[0]), *lines] if rows else []:
        print("".join(cell.rjust(2 + max(map(len, column))) for cell, *column in zip(line, rows[0], *lines)))
    print("wrote", *wrote)
    if following:
        print("next: python", following, shlex.join(args.given))


# ---- The chapter -----------------------------------------------------------------------------------------------------
def export(predict, path: Path):
    """Write a calibrated student as a standalone network of plain layers; it takes (B, 3, 32, 32) in [0, 1], any B."""
    weights, blocks = predict.args  # of forward, which calibrated() has bound
    network, anything = Standalone(blocks, weights, predict.keywords["stats"]).cpu().eval(), torch.zeros(2, 3, 32, 32)
    program = torch.export.export(network, (anything,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path.with_suffix(".tmp.pt2"))
    os.replace(path.with_suffix(".tmp.pt2"), path)


def main():
    args = read_flags(STAGE, sampling={"choices": ("progressive", "random"), "default": "progressive"}, max_macs={
        "nargs": "+", "type": float, "metavar": "MILLIONS", "help": "budgets of MACs, one student for each; default: "
        "the paper's 2000 for Dyn-ResNet50 (section 5.3), halfway from smallest to largest student elsewhere"})
    data = load_data(args)
    net, suffix = args.net, "" if args.sampling == "progressive" else "_random"
    ends = [cost(net, student_at(net, place))[1] / 1e6 for place in (0, -1)]  # the smallest and the largest student's
    budgets = args.settings["max_macs"] = args.max_macs or [2000.0 if net.stem == 64 else round(sum(ends) / 2, 1)]
    if not all(ends[0] <= budget < float("inf") for budget in budgets):
        fail(f"--max-macs must be at least {ends[0]:.4g}, the millions of MACs that the smallest student takes")
    done = args.out / f"05_search{suffix}.pt"
    if done.exists() and not args.restart:
        load(done, args.settings)
        return finish(args, [], [f"05_*{suffix} in {args.out} earlier (--restart makes them anew)"], "")
    words = f"--sampling={args.sampling}"
    predictor = load(need(args, args.out / f"04_predictor{suffix}.pt", "04_predictor.py", words), args.common)
    path = need(args, args.out / f"03_{args.sampling}.pt", "03_progressive_rslad.py", words)
    shared = {name: weight.to(args.device) for name, weight in load(path, args.common, net)["weights"].items()}
    population, fronts, chosen = [], [], {"largest": student_at(net, -1)}
    for budget in budgets:
        def evaluate(students):
            macs = np.array([cost(net, student)[1] / 1e6 for student in students])
            return predict_accuracy(predictor, net, students).double().numpy(), (macs - budget).clip(min=0)

        generations = nsga2(net, evaluate, args.population, args.generations, args.mutation, args.seed)
        for name, (students, objectives, violation) in zip(("first", "last"), generations):
            rows = [{"max_macs": budget, "generation": name, **dict(zip(genes(net), student)),
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
        test = data["test"], data["test_labels"], args.eps / 255
        natural, fgsm = judge(predict, *test, args.eps / 255, 1)  # FGSM is one step of eps
        _, robust = judge(predict, *test, args.step_size / 255, args.steps)
        row = {"student": name, **dict(zip(genes(net), student)), **dict(zip(("params", "macs"), cost(net, student)))}
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
    shown = [{column: value for column, value in row.items() if column not in genes(net)} for row in rows]
    finish(args, shown, [*(args.out / f"05_{name}{suffix}.csv" for name in tables), *networks], "")


if __name__ == "__main__":
    main()
