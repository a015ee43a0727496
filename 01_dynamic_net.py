"""Chapter 1: the dynamic network (paper, section 4.3).

One set of weights holds trillions of networks (tiny: thousands). A student is a genotype, a short
tuple of choices: how deep each stage is, how wide (or with which kernels), how far each block
expands. Its weights are the leading slices of the shared ones, so a student costs nothing to make.

    images  = decode --dataset once, hold out a tenth of the training images
    genes   = {gene: its choices, smallest first}                 # what may vary
    shared  = random weights of the largest student
    for each student to look at:                                  # one choice for each gene
        slice  = shared[:its outputs, :its inputs], layer by layer
        logits = network(slice, images)     # the same as of a network that has this slice alone
        count its parameters and multiply-accumulates (MACs)
    the gradient of a student's loss flows through the slice into the shared weights

    python 01_dynamic_net.py --dataset toy                  # the tiny network, a few seconds
    python 01_dynamic_net.py --dataset cifar10 --net mbv3   # the paper's Dyn-MobileNetV3

reads   the images of --dataset: cifar10, cifar100, toy, or a folder of train/ and test/<class>/*
writes  01_images.pt        all images, which no later chapter reads from anywhere else
        01_dynamic_net.pt   the network: genes, sizes, and the shared weights, drawn at random
        01_students.csv     a row for each student shown: its name, genes, parameters and MACs
"""

import argparse
import copy
import csv
import hashlib
import io
import math
import os
import random
import shlex
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


# ---- The idea: a student's weights are slices of shared ones -------------------------------------
class Slices:
    """Layers whose weights are leading slices of shared ones: as many outputs as are asked for, as
    many inputs as there are. Taken in the first call; gradients flow back through them."""

    def __init__(self, shared):
        self.shared, self.slices = shared, {}  # {name: a whole weight}, {name: the slice of it}

    def conv(self, name, x, out, kernel=1, stride=1, depthwise=False, bias=False):
        """A convolution to `out` channels; depthwise, each of them reads one channel alone."""
        if name not in self.slices:
            with torch.enable_grad():  # later calls may learn, even if this one does not
                weight = self.shared[name][:out, : x.shape[1]]  # depthwise there is one input alone
                while weight.shape[-1] > kernel:  # 7 -> 5 -> 3: the centre, times a learned matrix
                    side = weight.shape[-1] - 2
                    centre = weight[:, :, 1:-1, 1:-1].reshape(out, side * side)
                    weight = (centre @ self.shared[f"{name}_to{side}"]).view(out, 1, side, side)
                self.slices[name] = weight.contiguous(memory_format=torch.channels_last)
        shift = self.vector(f"{name}_bias", out) if bias else None
        groups = out if depthwise else 1
        return F.conv2d(x, self.slices[name], shift, stride, kernel // 2, groups=groups)

    def vector(self, name, size):
        if name not in self.slices:
            with torch.enable_grad():
                self.slices[name] = self.shared[name][:size]
        return self.slices[name]


def show_slice():
    """The idea of the paper in one layer: half of its channels are a layer, too."""
    shared = {"layer": torch.randn(8, 6, 3, 3, requires_grad=True)}  # outputs, inputs, 3 x 3
    student, x = Slices(shared), torch.randn(1, 3, 5, 5)  # an image with half of the inputs
    y = student.conv("layer", x, out=4, kernel=3)  # (1, 4, 5, 5): half of the outputs
    alone = F.conv2d(x, shared["layer"][:4, :3], padding=1)  # a layer that has this slice alone
    y.sum().backward()
    reached = (shared["layer"].grad != 0).float()  # which weights the gradient reaches
    inside, others, unread = reached[:4, :3], reached[4:], reached[:, 3:]
    print(f"half of a layer's channels: {tuple(inside.shape)} of {tuple(reached.shape)} weights")
    print(f"a layer that has this slice alone differs by {(alone - y).abs().max():.0e}: rounding")
    print(f"the gradient reaches {inside.mean():.0%} of the slice,", end=" ")
    print(f"{others.mean():.0%} of other outputs' weights, {unread.mean():.0%} of other inputs'\n")


# ---- The lesson: students of one network ---------------------------------------------------------
FLAGS = {}  # flag: (paper, quick, tiny, least, most, help); this chapter has none of its own


def main():
    args = read_flags()
    files = [args.out / f"01_{name}" for name in ("images.pt", "students.csv", "dynamic_net.pt")]
    pixels, listed, checkpoint = files
    if checkpoint.exists() and pixels.exists() and not args.restart:
        print(load(checkpoint, args.common)["summary"])
        return finish(args, [], [f"{checkpoint} earlier (--restart reads anew)"], CHAPTERS[1])
    for old in (pixels, checkpoint):
        keep_others(old, args.common)
    show_slice()
    print(f"the images of {args.dataset}, and {args.net} on the CPU in float32")
    args.out.mkdir(parents=True, exist_ok=True)
    images = read_images(args)
    for old in files:
        old.unlink(missing_ok=True)
    save(pixels, args.common, {}, **images)
    images = load(pixels, args.common)  # which adds its checksum
    counts = ", ".join(f"{len(images[part])} {part}" for part in ("train", "held_out", "test"))
    summary = f"{args.dataset}: {counts} images; logits in this order: {', '.join(images['names'])}"
    print(summary)
    net = make_net(args.net, args.common["preset"], len(images["names"]))
    print(f"{len(net['genes'])} genes, {count_students(net):,} genotypes")
    torch.manual_seed(args.seed)
    shared, rng = random_weights(net), random.Random(args.seed)
    students = {"largest": student_at(net, -1), "smallest": student_at(net, 0)}
    students["usual"] = usual(net)  # about ResNet-50, or a common MobileNetV3
    students |= {f"random_{number}": sample(net, rng) for number in range(1, 6)}
    print("a student is one choice for each gene, 0 where its block is switched off; random_1 is")
    print(dict(zip(net["genes"], students["random_1"])))
    print(EXPLAINED)
    x = images["test"][:8] / 255
    rows, table = [], []
    for name, student in students.items():
        network = Network(net, shared, student)
        logits = network(x)
        alone = Network(net, {key: part.clone() for key, part in network.slices.items()}, student)
        with FlopCounterMode(display=False) as counter:
            network(x[:1])
        macs = counter.get_total_flops() // 2  # of one image; a multiply-accumulate is two
        params = sum(part.numel() for part in network.slices.values())
        genes = dict(zip(net["genes"], student))
        rows.append({"student": name, **genes, "params": params, "macs": macs})
        table.append(
            {
                "student": name,
                "M parameters": params / 1e6,
                "M MACs": macs / 1e6,
                "alone it differs": (alone(x) - logits).abs().max().item(),
            }
        )
    write_csv(listed, rows)
    made = {"weights": shared, "students": students, "summary": summary, **net}
    save(checkpoint, args.common, images, **made)
    finish(args, table, files, CHAPTERS[1])


# ---- Genotypes: what may vary --------------------------------------------------------------------
# fmt: off
NETWORKS = {  # sections 4.3 and 5.0.1; "tiny" is of the same construction, for laptops and tests
    ("resnet50", "paper"): {
        "stem": 64, "stem_stride": 1,
        # channels, least number of blocks, stride
        "stages": ((256, 2, 1), (512, 2, 2), (1024, 4, 2), (2048, 2, 2)),
        "depth": (0, 1, 2), "width": (0.65, 0.8, 1.0), "expand": (0.2, 0.25, 0.35),
        "usual": {"depth": 1, "depth_stem": 0, "depth_2": 2, "depth_3": 2, "width": 1.0,
                  "expand": 0.25}},
    ("resnet50", "tiny"): {
        "stem": 16, "stem_stride": 2, "stages": ((64, 1, 2), (128, 1, 2)),
        "depth": (0, 1), "width": (0.5, 0.75, 1.0), "expand": (0.25, 0.375, 0.5),
        "usual": {"depth": 1, "width": 1.0, "expand": 0.25}},
    ("mbv3", "paper"): {
        "stem": 16, "stem_stride": 1, "head": (960, 1280),
        "stages": (  # channels, stride, activation, squeeze-and-excitation?
            (24, 1, "relu", False), (40, 2, "relu", True), (80, 2, "hardswish", False),
            (112, 1, "hardswish", True), (160, 2, "hardswish", True)),
        "depth": (2, 3, 4), "kernel": (3, 5, 7), "expand": (3, 4, 6),
        "usual": {"depth": 4, "kernel": 7, "expand": 4}},
    ("mbv3", "tiny"): {
        "stem": 16, "stem_stride": 2, "head": (128, 128),
        "stages": ((24, 2, "relu", False), (40, 2, "hardswish", True)),
        "depth": (1, 2), "kernel": (3, 5), "expand": (2, 3, 4),
        "usual": {"depth": 1, "kernel": 3, "expand": 4}},
}
# fmt: on

EXPLAINED = """
depth: blocks of a stage (ResNet: beyond the least), or a second layer of the stem; width: channels
of a stage, the stem, its middle, as a share of the largest's; kernel: side of a depthwise kernel;
expand: channels inside a block, as a multiple of its output's (MobileNet: of its input's)

"alone it differs": by how much logits change in a network of this slice alone: 0, but for rounding
"""


def make_net(name, preset, classes):
    """What a network is beside its weights: sizes, {gene: choices, smallest first}, and switches,
    {gene: (a depth gene, the least depth at which it is on)}. Later chapters call `net` all that
    is in 01_dynamic_net.pt: this, the weights, and the students shown here."""
    net = {**NETWORKS[name, "tiny" if preset == "tiny" else "paper"], "classes": classes}
    genes, switches = mobilenet_genes(net) if name == "mbv3" else resnet_genes(net)
    return {**net, "genes": genes, "switches": switches}


def resnet_genes(net):
    """Dyn-ResNet50's: a width is a whole stage's, because identity shortcuts join its blocks."""
    genes = {"depth_stem": (net["depth"][0], net["depth"][-1])}  # more than 0: with one more layer
    numbers = range(1, len(net["stages"]) + 1)
    genes |= {f"depth_{i}": net["depth"] for i in numbers}
    # "mid" is inside the stem; how wide a block is inside, its expansion says.
    genes |= {f"width_{part}": net["width"] for part in ("mid", "stem", *numbers)}
    switches = {}
    for i, (_, blocks, _) in enumerate(net["stages"], 1):
        for j in range(1, blocks + net["depth"][-1] + 1):
            genes[f"expand_{i}_{j}"] = net["expand"]
            switches[f"expand_{i}_{j}"] = (f"depth_{i}", j - blocks)  # at most 0: always on
    return genes, switches


def mobilenet_genes(net):
    """Dyn-MobileNetV3's: its blocks choose a kernel where ResNet's stages have widths."""
    genes = {f"depth_{i}": net["depth"] for i, _ in enumerate(net["stages"], 1)}
    switches = {}
    for kind in ("kernel", "expand"):
        for i, _ in enumerate(net["stages"], 1):
            for j in range(1, net["depth"][-1] + 1):
                genes[f"{kind}_{i}_{j}"] = net[kind]
                switches[f"{kind}_{i}_{j}"] = (f"depth_{i}", j)
    return genes, switches


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


def usual(net):
    """The student that the paper trains alone: at its sizes nearly ResNet-50 (23.54 M parameters;
    paper 23.52). MobileNet: of those with the same depth, kernel and expansion everywhere, the one
    whose size is nearest (4.17 M; paper 4.21)."""
    chosen = net["usual"]  # of a gene, or of all of a kind
    return canonical(net, [chosen.get(gene, chosen[gene.split("_")[0]]) for gene in net["genes"]])


def count_students(net):
    """How many genotypes the network holds, exactly (section 4.3; paper: 2e19, MobileNet). Genes
    of a block that is off do not count, so the forms of a stage add up over its depths."""
    total, switches = 1, net["switches"].items()
    for gene in net["genes"].keys() - net["switches"].keys():
        forms = 0
        for choice in net["genes"][gene]:
            on = [g for g, (depth, least) in switches if depth == gene and least <= choice]
            forms += math.prod(len(net["genes"][g]) for g in on)  # none for a width: product 1
        total *= forms
    return total


# ---- The two networks: genotype -> slices of the shared weights -> logits ------------------------
def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Network(Slices):
    """A student: logits (B, classes) = network(x), x (B, 3, 32, 32) in [0, 1]. Its slices
    are those of the first call, in part copies: after an SGD step, make a new one. Batch norm has
    the batch's statistics, as in training, and keeps them in `stats`."""

    def __init__(self, net, shared, student):
        super().__init__(shared)
        self.net, self.choice = net, dict(zip(net["genes"], student))
        self.stats = {}  # {layer: (mean, variance) of its output's channels}
        self.momentum = 1.0  # of these averages: 1 keeps those of the last batch alone

    def __call__(self, x):
        x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster than channels first
        x = self.mobilenet(x) if "kernel" in self.net else self.resnet(x)
        return self.conv("classifier", x, self.net["classes"], bias=True).flatten(1).float()

    def resnet(self, x):
        """Dyn-ResNet50, from images to the pooled map (B, C, 1, 1)."""
        net, choice = self.net, self.choice
        mid = divisible(divisible(net["stem"] * choice["width_mid"]) // 2)
        x = F.relu_(self.conv_bn("stem_1", x, mid, 3, net["stem_stride"]))
        if choice["depth_stem"]:
            x = x + F.relu_(self.conv_bn("stem_2", x, mid, 3))
        x = F.relu_(self.conv_bn("stem_3", x, divisible(net["stem"] * choice["width_stem"]), 3))
        for i, (channels, blocks, stride) in enumerate(net["stages"], 1):
            out = divisible(channels * choice[f"width_{i}"])
            for j in range(1, blocks + choice[f"depth_{i}"] + 1):
                middle = divisible(round(out * choice[f"expand_{i}_{j}"]))
                y = F.relu_(self.conv_bn(f"{i}_{j}_reduce", x, middle))
                y = F.relu_(self.conv_bn(f"{i}_{j}_middle", y, middle, 3, stride))
                y = self.conv_bn(f"{i}_{j}_last", y, out)
                if j == 1:  # the first block of a stage changes the shape
                    x = self.conv_bn(f"{i}_{j}_shortcut", F.avg_pool2d(x, stride), out)
                x = F.relu_(x + y)
                stride = 1  # of the blocks that follow
        return x.mean((2, 3), keepdim=True)

    def mobilenet(self, x):
        """Dyn-MobileNetV3, from images to the pooled features (B, C, 1, 1)."""
        net, choice = self.net, self.choice
        x = F.hardswish(self.conv_bn("stem", x, net["stem"], 3, net["stem_stride"]))
        y = F.relu_(self.conv_bn("0_1_middle", x, net["stem"], 3, depthwise=True))
        x = x + self.conv_bn("0_1_last", y, net["stem"])
        for i, (out, stride, activation, gated) in enumerate(net["stages"], 1):
            act = getattr(F, activation)
            for j in range(1, choice[f"depth_{i}"] + 1):
                kernel = choice[f"kernel_{i}_{j}"]
                middle = divisible(round(x.shape[1] * choice[f"expand_{i}_{j}"]))
                y = act(self.conv_bn(f"{i}_{j}_reduce", x, middle))
                y = act(self.conv_bn(f"{i}_{j}_middle", y, middle, kernel, stride, depthwise=True))
                if gated:  # squeeze-and-excitation
                    gate, squeezed = y.mean((2, 3), keepdim=True), divisible(middle // 4)
                    gate = F.relu_(self.conv(f"{i}_{j}_squeeze", gate, squeezed, bias=True))
                    y = y * F.hardsigmoid(self.conv(f"{i}_{j}_excite", gate, middle, bias=True))
                y = self.conv_bn(f"{i}_{j}_last", y, out)
                x = x + y if x.shape[1:] == y.shape[1:] else y
                stride = 1  # of the blocks that follow
        x = F.hardswish(self.conv_bn("head_1", x, net["head"][0]))
        return F.hardswish(self.conv("head_2", x.mean((2, 3), keepdim=True), net["head"][1]))

    @torch.no_grad()
    def fold_norms(self):
        """A student whose batch norms have the statistics that are now in `stats`, to be judged and
        for chapter 3's attack: a scale and a shift, which become part of each convolution."""
        student = copy.copy(self)
        student.slices = {**self.slices}
        for name, (mean, variance) in self.stats.items():
            scale, shift = (student.slices.pop(f"{name}_{part}") for part in ("scale", "shift"))
            factor = scale / (variance + 1e-5).sqrt()
            student.slices[name] = factor[:, None, None, None] * self.slices[name]
            student.slices[f"{name}_bias"] = shift - mean * factor
        return student

    def conv_bn(self, name, x, out, *sizes, **options):
        folded = f"{name}_bias" in self.slices  # batch norm is part of the convolution
        x = self.conv(name, x, out, *sizes, **options, bias=folded)
        if folded:
            return x
        scale, shift = (self.vector(f"{name}_{part}", out) for part in ("scale", "shift"))
        if name not in self.stats:
            self.stats[name] = scale.new_zeros(2, out)
        mean, variance = self.stats[name]  # which batch_norm updates in place
        return F.batch_norm(x, mean, variance, scale, shift, True, self.momentum)


class RandomWeights(Network):
    """Draws each shared weight when one of the largest student's layers first asks for it, so that
    shapes stand in the forward pass alone: He et al. (2015) for convolutions, identities for batch
    norm and kernel transforms."""

    def conv(self, name, x, out, kernel=1, stride=1, depthwise=False, bias=False):
        shape = (out, 1 if depthwise else x.shape[1], kernel, kernel)
        fan_out = kernel**2 * (1 if depthwise else out)
        self.shared[name] = torch.randn(shape) * (2 / fan_out) ** 0.5
        if depthwise:  # the only kernels that vary; see Slices.conv
            for side in range(3, kernel, 2):
                self.shared[f"{name}_to{side}"] = torch.eye(side * side)
        return super().conv(name, x, out, kernel, stride, depthwise, bias)

    def vector(self, name, size):
        self.shared[name] = torch.ones(size) if name.endswith("scale") else torch.zeros(size)
        return super().vector(name, size)


def random_weights(net):
    """All shared weights: those of the largest student, of which every other one sees a part."""
    shared = {}
    RandomWeights(net, shared, student_at(net, -1))(torch.zeros(2, 3, 32, 32))
    shared["classifier"] *= 0.1  # start near the uniform answer
    return shared


# ---- Data: read once, augmented ------------------------------------------------------------------
def read_images(args):
    """{train, held_out, test}, uint8 (N, 3, 32, 32), {...}_labels, (N,), and the classes' names; a
    tenth of the training images is held out, the same for every seed. And calibration: augmented
    training images, one draw for all, from which batch norms have their statistics when judged."""
    if args.dataset == "toy":
        train, test = toy_images(2400, 2 * args.seed), toy_images(500, 2 * args.seed + 1)
    elif args.dataset in ("cifar10", "cifar100"):
        train, test = cifar_images(args, True), cifar_images(args, False)
    else:
        train, test = (folder_images(Path(args.dataset), part) for part in ("train", "test"))
    pixels, labels, names = train
    if names != test[2]:
        fail(f"{args.dataset}: train/ and test/ differ in {sorted({*names} ^ {*test[2]})}")
    if len(pixels) < 20:
        fail(f"{args.dataset} has {len(pixels)} training images: at least 20 are needed")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    held_out, kept = order.tensor_split([len(order) // 10])
    most = 500 if args.common["preset"] == "tiny" else 2000
    torch.manual_seed(0)
    calibration = augment(pixels[kept][:4000])[:most]  # 4000: so all presets draw the same crops
    return {
        "train": pixels[kept],
        "held_out": pixels[held_out],
        "test": test[0],
        "names": names,
        "calibration": calibration,
        "train_labels": labels[kept],
        "held_out_labels": labels[held_out],
        "test_labels": test[1],
    }


def toy_images(count, seed):
    """`count` pictures of stripes, labels and names: 3 widths x 3 orientations. Phase, colours and
    noise are random: no pixel tells the class, and flips and crops keep it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, count)
    tilt = np.array([0, np.pi / 2, np.pi / 4])[labels % 3]
    frequency = 2 * np.pi / np.array([16, 8, 4.5])[labels // 3]  # radians per pixel
    y, x = np.mgrid[:32, :32][..., None]
    along = frequency * (np.cos(tilt) * x + np.sin(tilt) * y)  # (32, 32, N)
    stripes = np.sin(along + rng.uniform(0, 2 * np.pi, count)).transpose(2, 0, 1)[:, None]
    colour = rng.uniform(-0.4, 0.4, (count, 3, 1, 1))
    images = rng.normal(0.5, 0.04, (count, 3, 32, 32)) + colour * stripes
    pixels = (255 * images.clip(0, 1)).astype(np.uint8)  # (N, 3, 32, 32)
    widths, ways = "wide medium narrow".split(), "upright level slanted".split()
    names = [f"{width} {way}" for width in widths for way in ways]
    return torch.from_numpy(pixels), torch.from_numpy(labels), names


def cifar_images(args, train):
    """CIFAR-10 or CIFAR-100 by torchvision, which downloads it; exits if it cannot. OSError if the
    disk is what fails."""
    from torchvision import datasets

    source = getattr(datasets, args.dataset.upper())
    try:
        images = source("data", train=train, download=True)
    except (OSError, RuntimeError) as error:
        if getattr(error, "strerror", None) and not isinstance(
            error, (ConnectionError, TimeoutError)
        ):
            raise OSError(error.errno, error.strerror, "data")
        fail(
            f"{args.dataset} could not be downloaded ({type(error).__name__}): put "
            f"{source.filename} into data/, or take --dataset toy or a folder"
        )
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(images.targets), images.classes


def folder_images(folder, part):
    """The images below folder/part/<class>, but for hidden ones, as in .ipynb_checkpoints; exits
    if some are damaged, or if there are fewer than two classes."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    root = folder / part
    if not root.is_dir():
        fail(
            f"--dataset {folder}: not cifar10, cifar100, toy, or a folder of train/<class>/* and "
            f"test/<class>/* images: there is no {root}"
        )
    paths = sorted(files_below(root))
    files = [
        path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and path.parent != root
    ]
    owners = [path.relative_to(root).parts[0] for path in files]
    names, others = sorted({*owners}), len(paths) - len(files)
    print(f"{root}: {len(files)} images of {len(names)} classes; {others} other files, not read")
    if len(names) < 2:
        fail(f"{root} has images of {names} alone: at least two classes are needed, a folder each")
    pixels, damaged = [], []
    for path in files:
        try:
            pixels.append(picture(path))
        except Exception as error:  # of many kinds; Pillow's end in <_io.BytesIO object at ...>
            reason = str(error).split(" <")[0] or type(error).__name__
            damaged.append(f"{path} ({reason})")
    if damaged:
        few = ", ".join(damaged[:10])
        fail(f"{len(damaged)} images cannot be used, convert or remove them: {few}")
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([names.index(name) for name in owners])
    return (
        images,
        labels,
        [name.replace("\n", " ").encode(errors="replace").decode() for name in names],
    )


def files_below(folder, above=()):
    """All files below a folder, those in linked folders too, but hidden ones."""
    real = folder.resolve()
    if real not in above:  # else it is a loop of links
        for path in folder.iterdir():
            if path.name[0] != ".":
                yield from files_below(path, (*above, real)) if path.is_dir() else [path]


def picture(path):
    """The image in a file as a viewer shows it: turned as its camera was held, white where it is
    transparent, 16 bits scaled to 8; uint8 (32, 32, 3). Errors, of many kinds, if it is damaged."""
    from torchvision.datasets.folder import Image  # Pillow's, which torchvision reads with

    image = Image.open(io.BytesIO(path.read_bytes()))
    turn = image.getexif().get(274, 1)  # EXIF's orientation, 1 to 8
    if image.mode.startswith("I;16"):  # a plain conversion would clip it
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits, of no known range")
    if 1 < turn < 9:
        image = image.transpose((0, 3, 1, 5, 4, 6, 2)[turn - 2])  # Pillow's numbers for them
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return np.asarray(white.convert("RGB").resize((32, 32)))


def augment(images):
    """Images (B, 3, 32, 32), each cropped (4 black pixels around) and flipped its own way."""
    count, device = len(images), images.device
    crops = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32)
    row, column = torch.randint(9, (2, count), device=device)
    x = crops[torch.arange(count, device=device), :, row, column]
    return torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, x.flip(3), x)


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


if __name__ == "__main__":
    run_chapter()
