"""Chapter 1: the dynamic network (paper, section 4.3; Once-for-all, Cai et al., 2020).

One set of weights holds 10^12 networks or more (tiny: thousands). A student is a genotype, a choice
for each gene. Its weights are leading slices of the shared ones, so it costs next to nothing.

    depth      blocks of a stage (ResNet: beyond the fixed ones); depth_stem: 0 or its middle layer
    width      channels of a stage, of the stem's end or of its middle, as a share of the largest's
    kernel     side of a depthwise kernel (MobileNet, in place of widths)
    expand     channels inside a block, as a multiple of its output's (MobileNet: of its input's)

    images  = read --dataset once, hold out a tenth of the training images
    shared  = random weights of the largest student
    for each student to look at:                     # {gene: choice}
        slice  = shared[:its outputs, :its inputs], layer by layer
        logits = network(slice, images)              # equal to those of a network of its own
        count its parameters and multiply-accumulates (MACs)

    python 01_dynamic_net.py --dataset toy                  # the tiny network, a few seconds
    python 01_dynamic_net.py --dataset cifar10 --net mbv3   # the paper's Dyn-MobileNetV3

reads   the images of --dataset: cifar10, cifar100, toy, or a folder of train/ and test/<class>/*
writes  01_images.pt        all images, for later chapters
        01_dynamic_net.pt   the network: genes, sizes, and the shared weights, drawn at random
        01_students.csv     some students, and what they cost
"""

import argparse
import math
import os
import random
import signal
import sys
from pathlib import Path
from secrets import token_hex
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.datasets.folder import Image  # Pillow's, with which torchvision reads

STAGE = "01"
FLAGS = {}  # flag: (paper, quick, tiny, least, most, help); this chapter has none of its own


# ---- The lesson: a student's weights are slices of shared ones -----------------------------------
class Network:
    """A student: logits (B, classes) = network(x) of images x (B, 3, 32, 32) in [0, 1]. Its weights
    are leading slices of the shared ones, cut at the first call; gradients flow back through them.
    After an SGD step, make a new Network. It owns no weights, so it is no nn.Module."""

    def __init__(self, net, shared, student):
        self.net, self.shared, self.student = net, shared, student
        self.mobile = "kernel" in net
        self.slices = {}  # {layer: the part of its shared weight that this student uses}
        self.stats = {}  # {layer: (mean, variance) of its outputs}, averages over all batches
        self.batches = 0  # how many those are
        self.folded = False  # are batch norms part of the convolutions? (fold_norms, chapter 2)

    def slice(self, name, out, inputs=None, kernel=1):
        """The leading slice of a weight (out, inputs, kernel, kernel), or of a vector (out,)."""
        weight = self.shared[name][:out]  # of all outputs the first
        if inputs is None:
            return weight
        weight = weight[:, :inputs]  # of all inputs the first
        weight = smaller_kernel(self.shared, name, weight, kernel)  # if one is asked for
        return weight.contiguous(memory_format=torch.channels_last)

    def weight(self, name, out, inputs=None, kernel=1):
        """The slice, cut at the first call and kept."""
        if name not in self.slices:
            with torch.enable_grad():  # so it can learn even if the first call was without
                self.slices[name] = self.slice(name, out, inputs, kernel)
        return self.slices[name]

    def conv(self, name, x, out, kernel=1, stride=1, depthwise=False, bias=False):
        """A convolution to `out` channels; in a depthwise one each channel reads only itself."""
        inputs, groups = (1, out) if depthwise else (x.shape[1], 1)
        weight = self.weight(name, out, inputs, kernel)
        shift = self.weight(f"{name}_bias", out) if bias else None
        return F.conv2d(x, weight, shift, stride, kernel // 2, groups=groups)

    def conv_bn(self, name, x, out, kernel=1, stride=1, depthwise=False):
        """A convolution and its batch norm, with the batch's statistics; folded, only a bias."""
        x = self.conv(name, x, out, kernel, stride, depthwise, bias=self.folded)
        if self.folded:
            return x
        scale, shift = self.weight(f"{name}_scale", out), self.weight(f"{name}_shift", out)
        if name not in self.stats:
            self.stats[name] = scale.new_zeros(2, out)
        mean, variance = self.stats[name]
        share = 1 / self.batches  # of this batch in the mean over all, which is updated in place
        return F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=share)

    def __call__(self, x):
        net, student = self.net, self.student
        self.batches += 1
        x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster than channels first
        if self.mobile:
            x = F.hardswish(self.conv_bn("stem", x, net["stem"], 3, net["stem_stride"]))
            y = F.relu_(self.conv_bn("0_1_middle", x, net["stem"], 3, depthwise=True))
            x = x + self.conv_bn("0_1_last", y, net["stem"])  # block 0_1 has no genes
        else:
            mid = divisible(divisible(net["stem"] * student["width_mid"]) // 2)  # released code
            x = F.relu_(self.conv_bn("stem_1", x, mid, 3, net["stem_stride"]))
            if student["depth_stem"]:
                x = x + F.relu_(self.conv_bn("stem_2", x, mid, 3))
            out = divisible(net["stem"] * student["width_stem"])
            x = F.relu_(self.conv_bn("stem_3", x, out, 3))
        for i, (channels, blocks, stride, activation, gated) in enumerate(net["stages"], 1):
            out = divisible(channels * student.get(f"width_{i}", 1))
            for j in range(1, blocks + student[f"depth_{i}"] + 1):
                x = self.block(f"{i}_{j}", x, out, stride, getattr(F, activation), gated)
                stride = 1  # of the blocks that follow
        if self.mobile:
            x = F.hardswish(self.conv_bn("head_1", x, net["head"][0]))
            x = F.hardswish(self.conv("head_2", x.mean((2, 3), keepdim=True), net["head"][1]))
        x = x.mean((2, 3), keepdim=True)  # (B, channels, 1, 1), as MobileNet's is already
        logits = self.conv("classifier", x, len(net["classes"]), bias=True).flatten(1)
        return logits.float()  # a loss is in float32, even where convolutions are in bf16

    def block(self, name, x, out, stride, act, gated):
        """A bottleneck (ResNet) or an inverted one (MobileNet): 1x1, k x k, 1x1, and a shortcut."""
        kernel = self.student.get(f"kernel_{name}", 3)  # ResNet: always 3
        wide = x.shape[1] if self.mobile else out
        middle = divisible(round(wide * self.student[f"expand_{name}"]))
        y = act(self.conv_bn(f"{name}_reduce", x, middle))
        y = act(self.conv_bn(f"{name}_middle", y, middle, kernel, stride, depthwise=self.mobile))
        if gated:  # squeeze-and-excitation
            gate, squeezed = y.mean((2, 3), keepdim=True), divisible(middle // 4)
            gate = F.relu_(self.conv(f"{name}_squeeze", gate, squeezed, bias=True))
            y = y * F.hardsigmoid(self.conv(f"{name}_excite", gate, middle, bias=True))
        y = self.conv_bn(f"{name}_last", y, out)
        if self.mobile:
            return x + y if x.shape == y.shape else y
        if name.endswith("_1"):  # the first block of a stage changes the shape
            x = self.conv_bn(f"{name}_shortcut", F.avg_pool2d(x, stride), out)
        return F.relu_(x + y)


def show_slice():
    """The idea in one layer: half of its channels are a layer, too."""
    shared = {"layer": torch.randn(8, 6, 3, 3, requires_grad=True)}  # outputs, inputs, 3 x 3
    student, x = Network({}, shared, {}), torch.randn(1, 3, 5, 5)  # an image: half of the inputs
    y = student.conv("layer", x, out=4, kernel=3)  # (1, 4, 5, 5): half of the outputs
    alone = F.conv2d(x, shared["layer"][:4, :3], padding=1)  # a layer that has only this slice
    y.sum().backward()
    reached = (shared["layer"].grad != 0).float()  # which weights the gradient reaches
    inside, others, unread = reached[:4, :3], reached[4:], reached[:, 3:]
    print(f"half of a layer's channels: {tuple(inside.shape)} of {tuple(reached.shape)} weights")
    print(f"a layer that has only this slice differs by {(alone - y).abs().max():.0e}: rounding")
    print(f"the gradient reaches {inside.mean():.0%} of the slice,", end=" ")
    print(f"{others.mean():.0%} of other outputs' weights, {unread.mean():.0%} of other inputs'\n")


def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def smaller_kernel(shared, name, weight, kernel):
    """A depthwise kernel of 5 or 3 is the centre of the next larger one, times a learned matrix."""
    while weight.shape[-1] > kernel:
        side = weight.shape[-1] - 2
        centre = weight[:, 0, 1:-1, 1:-1].flatten(1)  # (out, side * side)
        weight = (centre @ shared[f"{name}_to{side}"]).view(-1, 1, side, side)
    return weight


class RandomWeights(Network):
    """Draws a shared weight when a layer of the largest student first asks for its slice, so that
    shapes are written once, in the forward pass: He et al. (2015) for convolutions, identities for
    batch norm and for the matrices between kernels."""

    def slice(self, name, out, inputs=None, kernel=1):
        if inputs is None:
            self.shared[name] = torch.ones(out) if name.endswith("scale") else torch.zeros(out)
        else:
            depthwise = inputs == 1
            fan_out = kernel**2 * (1 if depthwise else out)
            self.shared[name] = torch.randn(out, inputs, kernel, kernel) * (2 / fan_out) ** 0.5
            if depthwise:  # the sides of its smaller kernels
                for side in range(3, kernel, 2):
                    self.shared[f"{name}_to{side}"] = torch.eye(side * side)
        return super().slice(name, out, inputs, kernel)


def random_weights(net):
    """All shared weights, those of the largest student."""
    shared = {}
    RandomWeights(net, shared, net["students"]["largest"])(torch.zeros(2, 3, 32, 32))
    shared["classifier"] *= 0.1  # start near equal probabilities
    return shared


# ---- Genotypes: what may vary --------------------------------------------------------------------
# fmt: off
NETWORKS = {  # sections 4.3 and 5.0.1; "tiny" is of the same construction, for laptops and tests
    ("resnet50", "paper"): {
        "stem": 64, "stem_stride": 1,
        "stages": (  # channels, least blocks, stride, activation, squeeze-and-excitation?
            (256, 2, 1, "relu_", False), (512, 2, 2, "relu_", False),
            (1024, 4, 2, "relu_", False), (2048, 2, 2, "relu_", False)),
        "depth": (0, 1, 2), "width": (0.65, 0.8, 1.0), "expand": (0.2, 0.25, 0.35),
        "usual": {"depth": 1, "depth_stem": 0, "depth_2": 2, "depth_3": 2, "width": 1.0,
                  "expand": 0.25}},
    ("resnet50", "tiny"): {
        "stem": 16, "stem_stride": 2,
        "stages": ((64, 1, 2, "relu_", False), (128, 1, 2, "relu_", False)),
        "depth": (0, 1), "width": (0.5, 0.75, 1.0), "expand": (0.25, 0.375, 0.5),
        "usual": {"depth": 1, "width": 1.0, "expand": 0.25}},
    ("mbv3", "paper"): {
        "stem": 16, "stem_stride": 1, "head": (960, 1280),
        "stages": (
            (24, 0, 1, "relu_", False), (40, 0, 2, "relu_", True), (80, 0, 2, "hardswish", False),
            (112, 0, 1, "hardswish", True), (160, 0, 2, "hardswish", True)),
        "depth": (2, 3, 4), "kernel": (3, 5, 7), "expand": (3, 4, 6),
        "usual": {"depth": 4, "kernel": 7, "expand": 4}},
    ("mbv3", "tiny"): {
        "stem": 16, "stem_stride": 2, "head": (128, 128),
        "stages": ((24, 0, 2, "relu_", False), (40, 0, 2, "hardswish", True)),
        "depth": (1, 2), "kernel": (3, 5), "expand": (2, 3, 4),
        "usual": {"depth": 1, "kernel": 3, "expand": 4}},
}
# fmt: on


def make_net(name, preset, classes):
    """A dynamic network without its weights: sizes, names of the classes, `genes` {gene: choices,
    smallest first}, `switches` {gene: (a depth gene, the least depth at which it is on)}, and some
    `students` by name. "usual" is the one that the paper trains by itself: about ResNet-50 (23.54 M
    parameters; paper 23.52), or the equal-gene MobileNet nearest in size to the paper's
    (4.17 M; paper 4.21)."""
    net = {**NETWORKS[name, "tiny" if preset == "tiny" else "paper"], "classes": classes}
    net["genes"], net["switches"] = make_genes(net)
    usual, genes = net["usual"], net["genes"].items()
    students = {
        "largest": {gene: choices[-1] for gene, choices in genes},
        "middle": {gene: choices[1] for gene, choices in genes},  # the second of 2 or 3
        "smallest": {gene: choices[0] for gene, choices in genes},
        # net["usual"] names a gene, or a kind of genes.
        "usual": {gene: usual.get(gene, usual[gene.split("_")[0]]) for gene, _ in genes},
    }
    net["students"] = {name: canonical(net, student) for name, student in students.items()}
    return net


def make_genes(net):
    """A stage has a depth, and ResNet's a width, since identity shortcuts need one. A block has an
    expansion, and MobileNet's a kernel. ResNet's stem has an optional layer and two widths, too."""
    mobile, numbers = "kernel" in net, range(1, len(net["stages"]) + 1)
    genes, switches = {f"depth_{i}": net["depth"] for i in numbers}, {}
    if not mobile:
        widths = {f"width_{part}": net["width"] for part in ("mid", "stem", *numbers)}
        genes = {"depth_stem": (net["depth"][0], net["depth"][-1]), **genes, **widths}
    for kind in ("kernel", "expand") if mobile else ("expand",):
        for i, (_, blocks, *_) in enumerate(net["stages"], 1):
            for j in range(1, blocks + net["depth"][-1] + 1):
                genes[f"{kind}_{i}_{j}"] = net[kind]
                switches[f"{kind}_{i}_{j}"] = (f"depth_{i}", j - blocks)  # at most 0: always on
    return genes, switches


def canonical(net, student):
    """The genotype with 0 for each gene of a block that its depth switches off, so that a network
    has one genotype (more only where channel rounding merges choices)."""
    off = [gene for gene, (depth, least) in net["switches"].items() if student[depth] < least]
    return student | dict.fromkeys(off, 0)


def sample(net, rng):
    """A student with a random choice of each gene."""
    return canonical(net, {gene: rng.choice(choices) for gene, choices in net["genes"].items()})


def count_students(net):
    """How many genotypes the network holds, exactly: Dyn-ResNet50 2.5e12, Dyn-MobileNetV3 2.2e19
    (the paper, section 4.3, says more than 1e19 of both). Genes of a block that is off do not
    count, so a stage's combinations add up over its depths."""
    total, switches = 1, net["switches"].items()
    for gene in net["genes"].keys() - net["switches"].keys():
        forms = 0
        for choice in net["genes"][gene]:
            on = [g for g, (depth, least) in switches if depth == gene and least <= choice]
            forms += math.prod(len(net["genes"][g]) for g in on)  # 1 for a width
        total *= forms
    return total


def main():
    args = read_flags()
    args.out.mkdir(parents=True, exist_ok=True)
    pixels, checkpoint = args.out / "01_images.pt", args.out / "01_dynamic_net.pt"
    if not pixels.exists():
        save(pixels, args.common, **read_images(args))
    images = load(pixels, args.common)
    if checkpoint.exists():
        print(f"{checkpoint} is finished (delete it to redo it)")
        load(checkpoint, images["settings"])  # exits if it has other settings
        return finish(args, [], [checkpoint], CHAPTERS[2])
    show_slice()
    for part in ("train", "held_out", "test"):
        labels = images["data"][f"{part}_labels"]
        share = labels.bincount().max().item() / len(labels)
        print(f"{args.dataset}: {len(labels)} {part} images, {share:.0%} of the largest class")
    print(f"logits in this order: {', '.join(images['classes'])}")
    net = make_net(args.net, args.preset, images["classes"])
    print(f"{args.net}: {len(net['genes'])} genes, {count_students(net):,} genotypes")
    torch.manual_seed(args.seed)
    shared, rng = random_weights(net), random.Random(args.seed)
    students = net["students"] | {f"random_{i}": sample(net, rng) for i in range(1, 6)}
    print(f"random_1 (0: its block is switched off): {students['random_1']}\n")
    x, rows = images["data"]["test"][:1] / 255, []
    for name, student in students.items():
        network = Network(net, shared, student)
        network(x)  # now it has its slices; transforming kernels is no cost of a student
        with FlopCounterMode(display=False) as counter:
            network(x)
        rows.append({"student": name, **student})
        rows[-1]["params"] = sum(part.numel() for part in network.slices.values())
        rows[-1]["macs"] = counter.get_total_flops() // 2  # a multiply-accumulate is two
    table = [{key: row[key] for key in row if key not in net["genes"]} for row in rows]
    write_csv(args.out / "01_students.csv", rows)
    save(checkpoint, images["settings"], net=net, weights=shared)
    finish(args, table, [pixels, checkpoint, args.out / "01_students.csv"], CHAPTERS[2])


# ---- Images: read once, augmented ----------------------------------------------------------------
def read_images(args):
    """`data`: {train, held_out, test}, uint8 (N, 3, 32, 32), {...}_labels (N,), calibration: one
    draw of augmented training images, for the batch-norm statistics of students that are judged;
    and `classes`, their names. For every seed the same tenth of training images is held out."""
    if args.dataset == "toy":
        train, test = toy_images(2000, 2 * args.seed), toy_images(400, 2 * args.seed + 1)
    elif args.dataset in ("cifar10", "cifar100"):
        train, test = cifar_images(args.dataset, True), cifar_images(args.dataset, False)
    else:
        train, test = (folder_images(Path(args.dataset, part)) for part in ("train", "test"))
    pixels, labels, classes = train
    if classes != test[2]:
        sys.exit(f"{args.dataset}: train/ and test/ differ in {sorted({*classes} ^ {*test[2]})}")
    if len(classes) < 2 or len(pixels) < 10:
        sys.exit(f"{args.dataset}: at least two classes and ten training images are needed")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    by_class = order[labels[order].argsort(stable=True)]  # of which every tenth is held out
    tenth = torch.isin(order, by_class[9::10])  # so each class has its share, in random order
    held_out, kept = order[tenth], order[~tenth]
    count = 500 if args.preset == "tiny" else 2000
    torch.manual_seed(0)
    calibration = augment(pixels[kept][:4000])[:count]  # presets keep more or fewer of these
    data = {"calibration": calibration, "test": test[0], "test_labels": test[1]}
    for part, pick in {"train": kept, "held_out": held_out}.items():
        data[part], data[f"{part}_labels"] = pixels[pick], labels[pick]
    return {"data": data, "classes": classes}


def toy_images(count, seed):
    """Stripe pictures, labels and names: 3 widths x 3 orientations. Phase, colours and noise
    are random: no pixel tells the class, and flips and crops keep it."""
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
    return torch.from_numpy(pixels), torch.from_numpy(labels), [f"stripes {i}" for i in range(9)]


def cifar_images(name, train):
    """CIFAR-10 or CIFAR-100 by torchvision, which downloads it into data/."""
    source = getattr(datasets, name.upper())
    try:
        images = source("data", train=train, download=True)
    except (OSError, RuntimeError) as error:
        way = f"put {source.filename} into data/, or use --dataset toy or a folder"
        sys.exit(f"{name} could not be downloaded ({error}): {way}")
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(images.targets), images.classes


class Folder(datasets.ImageFolder):
    def find_classes(self, directory):
        names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return names, {name: i for i, name in enumerate(names)}  # a hidden folder is no class


def folder_images(folder):
    """The images below folder/<class>."""
    try:
        images = Folder(folder, loader=picture)
    except FileNotFoundError as error:
        need = "cifar10, cifar100, toy, or a folder of train/<class>/* and test/<class>/* images"
        sys.exit(f"--dataset is {need}: {error}")
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in images]))
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets), images.classes


def picture(path):
    """The image in a file as viewers show it, turned as the camera was held and white where it is
    transparent; uint8 (32, 32, 3)."""
    try:
        image = Image.open(path)
        image.load()  # which turns a TIFF, and takes its orientation away
        turn = image.getexif().get(274, 1)  # EXIF's orientation, 1 to 8
        if image.mode[0] in "IF":
            raise ValueError("16 or 32 bits a pixel: convert it to 8")
        if 1 < turn < 9:
            image = image.transpose((0, 3, 1, 5, 4, 6, 2)[turn - 2])  # Pillow's numbers for them
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return np.asarray(white.convert("RGB").resize((32, 32)))
    except (OSError, ValueError, SyntaxError) as error:
        sys.exit(f"{path} cannot be used, convert or remove it: {error}")


def augment(images):
    """Images (B, 3, 32, 32), each randomly cropped (4 black pixels around it) and flipped."""
    count, device = len(images), images.device
    crops = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32)
    row, column = torch.randint(9, (2, count), device=device)
    x = crops[torch.arange(count, device=device), :, row, column]
    return torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, x.flip(3), x)


# ---- Files and flags, the same in every chapter --------------------------------------------------
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
