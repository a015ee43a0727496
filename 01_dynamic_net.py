# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///
"""Chapter 1: the dynamic network (paper, section 4.3).

One set of weights holds a huge number of networks. A *student* is a short tuple of choices, its genotype: how deep each
stage is, how wide (or with which kernels), how far each block expands. The student's weights are the leading slice of
the shared ones, so a student costs nothing to make. This chapter builds both networks of the paper, counts their
students exactly, prices any student in parameters and MACs, and shows that a slice computes what a standalone network
of its sizes computes.

    python 01_dynamic_net.py --dataset toy                     # the tiny network, a few seconds
    python 01_dynamic_net.py --dataset cifar10 --net mbv3      # the paper's Dyn-MobileNetV3

reads   the images of --dataset, which it decodes once, into --data-dir, for all chapters
writes  01_dynamic_net.pt   the network and its shared weights, drawn at random: what chapter 2 trains
        01_students.csv     a row per student of the table: its genes, parameters and MACs
"""
from __future__ import annotations

import argparse, fcntl, io, itertools, math, os, random, shlex, subprocess, sys, warnings, zipfile, zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGE = {  # flag: (paper, quick, tiny, help)
    "students": (5, 5, 5, "random students in the table"),
}

# ---- The lesson: a network that contains networks --------------------------------------------------------------------
def divisible(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not below 90% of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded

def dynamic_resnet(classes: int, stem: int, stages: tuple, depth: tuple, width: tuple, expand: tuple, stem_stride=1):
    """ResNet for small images: (genes, its blocks from image to logits, each behind the genes that it depends on).

    Three 3x3 convolutions, the second optional; stages (width, base depth, stride) of bottleneck blocks, 1x1 down, 3x3,
    1x1 up, of which the first pools and projects its shortcut; a classifier. Depth and expand genes add or drop blocks
    and shape them one by one; a width gene is its stage's, because identity shortcuts join the blocks.
    """
    genes = {"depth_stem": (depth[0], depth[-1]), **{f"depth_{s}": depth for s in range(1, len(stages) + 1)}}
    genes |= {f"width_{part}": width for part in ("mid", "stem", *range(1, len(stages) + 1))}
    def mid(m):
        return divisible(divisible(stem * m) // 2)
    blocks = [("width_mid", lambda m: Block((Layer("stem_1", 3, mid(m), 3, stem_stride),))),
              ("depth_stem width_mid", lambda _, m: Block((Layer("stem_2", mid(m), mid(m), 3),), shortcut=())),
              ("width_mid width_stem", lambda m, s: Block((Layer("stem_3", mid(m), divisible(stem * s), 3),)))]
    def bottleneck(name, before, out, stride):
        def block(expand, width, width_before=None):
            channels = divisible(out * width)
            inp = divisible(before * width_before) if width_before else channels
            middle = divisible(round(channels * expand))
            main = (Layer(f"{name}_reduce", inp, middle), Layer(f"{name}_middle", middle, middle, 3, stride),
                    Layer(f"{name}_last", middle, channels, act="none"))
            shortcut = (Layer(f"{name}_shortcut", inp, channels, act="none"),) if width_before else ()
            return Block(main, shortcut, act="relu")
        return block
    before = "stem", stem
    for s, (out, base_depth, stride) in enumerate(stages, 1):
        for b in range(1, base_depth + depth[-1] + 1):
            genes[f"expand_{s}_{b}"] = expand
            blocks.append((f"expand_{s}_{b} width_{s}" + (f" width_{before[0]}" if b == 1 else ""),
                           bottleneck(f"{s}_{b}", before[1], out, stride if b == 1 else 1)))
        before = s, out
    return genes, [*blocks, (f"width_{before[0]}", lambda w: classifier(divisible(before[1] * w), classes))]

def dynamic_mobilenet(classes: int, stem: int, stages: tuple, depth: tuple, kernel: tuple, expand: tuple, head: tuple,
                      stem_stride=1):
    """MobileNetV3, likewise: stages (width, base depth, stride, activation, squeeze-and-excitation?) of inverted
    bottlenecks, 1x1 up, depthwise, gate, 1x1 down, whose shortcut is there where the shape is kept."""
    slots = [f"{s}_{b}" for s, stage in enumerate(stages, 1) for b in range(1, stage[1] + depth[-1] + 1)]
    genes = {f"depth_{s}": depth for s in range(1, len(stages) + 1)}
    genes |= {f"kernel_{slot}": kernel for slot in slots} | {f"expand_{slot}": expand for slot in slots}
    def inverted(name, inp, out, stride, act, gated):
        def block(kernel, expand):
            middle = divisible(round(inp * expand))
            squeezed = divisible(middle // 4)
            main = (Layer(f"{name}_reduce", inp, middle, act=act),
                    Layer(f"{name}_middle", middle, middle, kernel, stride, middle, act=act),
                    Layer(f"{name}_last", middle, out, act="none"))
            gate = (Layer(f"{name}_squeeze", middle, squeezed, tail=BIAS),
                    Layer(f"{name}_excite", squeezed, middle, tail=BIAS, act="hsigmoid"))
            return Block(main[expand == 1:], () if stride == 1 and inp == out else None, gate if gated else ())
        return block
    first = inverted("0_1", stem, stem, 1, "relu", False)
    blocks = [("", lambda: Block((Layer("stem", 3, stem, 3, stem_stride, act="hswish"),))), ("", lambda: first(3, 1))]
    inp = stem
    for s, (out, base_depth, stride, act, gated) in enumerate(stages, 1):
        for b in range(1, base_depth + depth[-1] + 1):
            blocks.append((f"kernel_{s}_{b} expand_{s}_{b}",
                           inverted(f"{s}_{b}", inp, out, stride if b == 1 else 1, act, gated)))
            inp = out
    return genes, [*blocks, ("", lambda: Block((Layer("head_1", inp, head[0], act="hswish"),))),
                   ("", lambda: Block((Layer("head_2", *head, tail=(), act="hswish"),), pool=True)),
                   ("", lambda: classifier(head[1], classes))]

def wide_resnet(classes: int, depth: int, width: int, stem_stride=1):
    """WRN-depth-width (Zagoruyko and Komodakis, 2016), a plain network: no genes, one student. Batch norm and ReLU come
    before each convolution; where the width changes, the shortcut is a strided 1x1 convolution behind the first."""
    blocks, inp = [Block((Layer("stem", 3, 16, 3, stem_stride, tail=(), act="none"),))], 16
    for s, out in enumerate((16 * width, 32 * width, 64 * width), 1):
        for b in range(1, (depth - 4) // 6 + 1):
            step = 2 if b == 1 and s > 1 else 1
            norm, name = Layer(f"{s}_{b}_norm", inp, inp, 0), f"{s}_{b}"
            main = (Layer(f"{name}_first", inp, out, 3, step), Layer(f"{name}_last", out, out, 3, tail=(), act="none"))
            shortcut = Layer(f"{name}_shortcut", inp, out, 1, step, tail=(), act="none")
            blocks += [Block((norm,)), Block(main, (shortcut,))] if b == 1 else [Block((norm, *main), ())]
            inp = out
    blocks += [Block((Layer("norm", inp, inp, 0),)), classifier(inp, classes)]
    return {}, [("", lambda block=block: block) for block in blocks]

def classifier(inp: int, classes: int) -> Block:
    """Global average pooling and a linear layer, which all end in."""
    return Block((Layer("classifier", inp, classes, tail=BIAS, act="none"),), pool=True)

NETWORKS = {  # sections 4.3 and 5.0.1; "tiny" is of the same construction, for laptops and tests
    ("resnet50", "paper"): (dynamic_resnet, dict(
        stem=64, stages=((256, 2, 1), (512, 2, 2), (1024, 4, 2), (2048, 2, 2)), depth=(0, 1, 2), width=(0.65, 0.8, 1.0),
        expand=(0.2, 0.25, 0.35))),
    ("resnet50", "tiny"): (dynamic_resnet, dict(
        stem=16, stages=((64, 1, 2), (128, 1, 2)), depth=(0, 1), width=(0.5, 0.75, 1.0), expand=(0.25, 0.375, 0.5),
        stem_stride=2)),
    ("mbv3", "paper"): (dynamic_mobilenet, dict(
        stem=16, stages=((24, 0, 1, "relu", False), (40, 0, 2, "relu", True), (80, 0, 2, "hswish", False),
                         (112, 0, 1, "hswish", True), (160, 0, 2, "hswish", True)),
        depth=(2, 3, 4), kernel=(3, 5, 7), expand=(3, 4, 6), head=(960, 1280))),
    ("mbv3", "tiny"): (dynamic_mobilenet, dict(
        stem=16, stages=((24, 0, 2, "relu", False), (40, 0, 2, "hswish", True)), depth=(1, 2), kernel=(3, 5),
        expand=(2, 3, 4), head=(128, 128), stem_stride=2)),
    ("wrn34_10", "paper"): (wide_resnet, dict(depth=34, width=10)),  # the teacher of the paper's RSLAD rows in table 1
    ("wrn34_10", "tiny"): (wide_resnet, dict(depth=10, width=2, stem_stride=2)),
}

def make_net(name: str, preset: str, classes: int) -> Net:
    """The network: each block in every variant that its genes allow. `expand_2_3` belongs to the third block of the
    second stage, and is on from a depth on that leaves that stage three blocks."""
    build, sizes = NETWORKS[name, "tiny" if preset == "tiny" else "paper"]
    genes, builders = build(classes, **sizes)
    names, switches, blocks = list(genes), [], []
    for part in (name.split("_") for name in names):
        block = len(part) == 3  # kernel_2_3 and expand_2_3
        switches.append((names.index(f"depth_{part[1]}"), int(part[2]) - sizes["stages"][int(part[1]) - 1][1])
                        if block else (0, 0))
    for needed, build in builders:
        places = tuple(names.index(name) for name in needed.split())
        values = itertools.product(*(genes[names[i]] + (0,) * (switches[i] != (0, 0)) for i in places))
        blocks.append((places, {chosen: None if 0 in chosen else build(*chosen) for chosen in values}))
    return Net(genes, tuple(switches), blocks)

def count_students(net: Net) -> int:
    """How many genotypes the network holds, exactly (section 4.3; the paper's estimate is 2e19 for both).

    The genes of a block that is switched off do not count: a stage of n active blocks has (choices per block)^n forms.
    Some genotypes are the same network, where channels are rounded to the same multiple of 8.
    """
    sizes = {name: len(choices) for name, choices in net.genes.items() if not name.startswith("depth")}
    owned = [(name, *switch) for name, switch in zip(net.genes, net.switches) if name in sizes and switch != (0, 0)]
    total = math.prod(size for name, size in sizes.items() if name not in [block for block, *_ in owned])
    for place, (name, depths) in enumerate(net.genes.items()):
        if name.startswith("depth"):
            total *= sum(math.prod(sizes[block] for block, owner, least in owned if owner == place and least <= depth)
                         for depth in depths)
    return total

def shapes(net: Net) -> dict[str, tuple]:
    """Name and shape of every shared weight: those of the largest student, and the kernel transforms."""
    shape, kernels = {}, {}
    for layer in layers([block for _, variants in net.blocks for block in variants.values() if block]):
        kernels.setdefault(layer.name, set()).add(layer.kernel)
    for layer in layers(blocks_of(net, student_at(net, -1))):
        if layer.kernel:
            shape[f"{layer.name}.conv.weight"] = (layer.out, layer.inp // layer.groups, layer.kernel, layer.kernel)
        shape |= {f"{layer.name}.{part}": (layer.out,) for part in layer.tail}
        shape |= {f"{layer.name}.to{k}": (k * k, k * k) for k in sorted(kernels[layer.name]) if k < layer.kernel}
    return shape

def plain(value):
    """The same of tuples, lists and dicts alone, as chapters read it from the file."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value

def init_weights(net: Net) -> dict[str, Tensor]:
    """Shared weights at random: He et al. (2015) for convolutions, identities for batch norm and kernel transforms."""
    shared = {}
    for name, shape in shapes(net).items():
        if name.endswith("conv.weight"):
            fan_out = shape[2] * shape[3] * (1 if shape[1] == 1 else shape[0])  # one input channel: depthwise
            shared[name] = torch.randn(shape) * (2 / fan_out) ** 0.5
        elif name.endswith("bias"):
            shared[name] = torch.zeros(shape)
        else:
            shared[name] = torch.eye(shape[0]) if len(shape) == 2 else torch.ones(shape)
    shared["classifier.conv.weight"] *= 0.1  # start near the uniform answer
    return shared

def difference_from_standalone(shared: dict[str, Tensor], blocks: tuple) -> float:
    """Largest difference between the logits of a slice and those of a network of plain layers that copied it."""
    x = torch.rand(8, 3, 32, 32)
    weights = slice_weights(shared, blocks)
    stats = {layer.name: (0.1 * torch.randn(layer.out), 0.5 + torch.rand(layer.out)) for layer in layers(blocks)}
    standalone = Standalone(blocks, weights, stats).eval()
    with torch.no_grad():
        return (forward(weights, blocks, x, stats) - standalone(x)).abs().max().item()

# ---- The dynamic network: genes -> layers -> a slice of the shared weights -> logits ---------------------------------
# {gene: its choices, smallest first}, in the order of a genotype; what switches each gene on, for canonical(); and for
# each block of the largest student the places of the genes that it depends on, and {their values: the Block, or None
# where they switch it off}. Chapter 1 makes it, the others read it.
Net = namedtuple("Net", "genes switches blocks")
# A convolution (a linear layer is a 1x1 one; kernel 0: none), the weights behind it (batch norm, a bias or none) and
# its activation.
BN = ("bn.weight", "bn.bias")
BIAS = ("conv.bias",)
Layer = namedtuple("Layer", "name inp out kernel stride groups tail act", defaults=(1, 1, 1, BN, "relu"))
# act(main(x) + shortcut(x)): shortcut None is none, () the identity. gate, squeeze-and-excitation, scales what the last
# layer of main reads. pool: global average pooling first.
Block = namedtuple("Block", "main shortcut gate act pool", defaults=(None, (), "none", False))
ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "hswish": F.hardswish, "hsigmoid": F.hardsigmoid}

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

def slice_weights(shared: dict[str, Tensor], blocks: tuple, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A student's weights: leading channels of the shared ones, transformed centres of kernels; convolutions packed,
    channels last (1.2 times as fast as channels first), and in `dtype`, if given."""
    weights = {}
    for layer in layers(blocks):
        if layer.kernel:
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
            x = run(block.shortcut[0], F.avg_pool2d(x, x.shape[-1] // y.shape[-1] // block.shortcut[0].stride))
        x = ACTIVATIONS[block.act](y if block.shortcut is None else y + x)
    return x.flatten(1)

def forward(weights: dict, blocks: tuple, x: Tensor, stats: dict | None = None, momentum: float = 0.0) -> Tensor:
    """Logits (B, classes) of a student for images x (B, 3, 32, 32) in [0, 1]. Without `stats`, {layer: (mean, var)},
    each batch norm uses its batch's statistics, as in training; with them these, frozen; with a momentum too, its
    batch's again, while `stats` are updated in place (calibration). In bf16 are convolutions alone."""
    def run(layer, x):
        conv, bn = f"{layer.name}.conv", f"{layer.name}.bn"
        if layer.kernel:
            x = F.conv2d(x, weights[f"{conv}.weight"], weights.get(f"{conv}.bias"), layer.stride, layer.kernel // 2, 1,
                         layer.groups)
        if layer.tail == BN:
            mean, var = stats[layer.name] if stats else (None, None)
            x = F.batch_norm(x, mean, var, weights[f"{bn}.weight"], weights[f"{bn}.bias"], not stats or momentum > 0,
                             momentum)
        return ACTIVATIONS[layer.act](x)
    dtype = weights[f"{blocks[0].main[0].name}.conv.weight"].dtype
    return walk(blocks, x.to(dtype).contiguous(memory_format=torch.channels_last), run).to(x.dtype)

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
            if layer.kernel:
                part.conv = nn.Conv2d(layer.inp, layer.out, layer.kernel, layer.stride, layer.kernel // 2, 1,
                                      layer.groups, layer.tail == BIAS)
            if layer.tail == BN:
                part.bn = nn.BatchNorm2d(layer.out)
                state[f"{layer.name}.bn.running_mean"], state[f"{layer.name}.bn.running_var"] = stats[layer.name]
            self.add_module(layer.name, part)
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        return walk(self.blocks, x, lambda layer, x: ACTIVATIONS[layer.act](getattr(self, layer.name)(x)))

# ---- Data: every image is decoded once, and lives on the device as uint8 ---------------------------------------------
def data_file(args) -> Path:
    """The cache of --dataset's images, which chapter 1 writes; another one when a folder gains or loses files."""
    mark = f"-{args.seed}" if args.dataset == "toy" else ""
    if args.dataset not in ("cifar10", "cifar100", "toy"):
        found = [(str(path), path.stat().st_mtime_ns) for path in sorted(Path(args.dataset).resolve().glob("t*/*/"))]
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

# ---- The images: read once, for all chapters -------------------------------------------------------------------------
def toy_images(count: int, seed: int) -> tuple[Tensor, Tensor, list]:
    """`count` pictures of stripes, their labels and classes: 3 orientations x 3 frequencies, and a checkerboard.

    Phase, colours, contrast and noise are random, so no pixel tells the class (a linear classifier fails), flips and
    crops keep it, and the contrast is such that an attack of 8/255 overturns some images and not others.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    tilt = np.choose(labels % 3, [np.zeros(count), np.full(count, np.pi / 2), rng.choice([-1, 1], count) * np.pi / 4])
    frequency = 2 * np.pi / np.array([16, 8, 4.5])[labels // 3 % 3]  # radians per pixel
    y, x = np.mgrid[:32, :32]
    phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1))
    along = np.cos(tilt)[:, None, None] * x + np.sin(tilt)[:, None, None] * y  # (N, 32, 32)
    checks = np.sign(np.sin(np.pi / 4 * x + phase[0]) * np.sin(np.pi / 4 * y + phase[1]))
    wave = np.where(labels[:, None, None] == 9, checks, np.sin(frequency[:, None, None] * along + phase[0]))
    colour = rng.normal(0, 1, (count, 3, 1, 1))
    colour *= rng.uniform(0.12, 0.42, (count, 1, 1, 1)) / np.abs(colour).max(1, keepdims=True)
    images = rng.uniform(0.3, 0.7, (count, 3, 1, 1)) + colour * wave[:, None] + rng.normal(0, 0.04, (count, 3, 32, 32))
    names = [f"{width} {way}" for width in ("wide", "medium", "narrow") for way in ("upright", "level", "slanted")]
    return torch.from_numpy((images.clip(0, 1) * 255).astype(np.uint8)), torch.from_numpy(labels), [*names, "checks"]

def cifar_images(args, train: bool) -> tuple[Tensor, Tensor, list]:
    """CIFAR-10 or CIFAR-100 through torchvision, which downloads and checks it; exits if that fails."""
    import torchvision
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[args.dataset]
    try:
        images = source(args.data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        fail(f"{args.dataset} could not be downloaded ({type(error).__name__}): offline, put {source.filename} into "
             f"{args.data_dir}, or take --dataset toy or a folder of images")
    return torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets), images.classes

def folder_images(folder: Path) -> tuple[Tensor, Tensor, list]:
    """The images of folder/<class>/*, resized to 32x32; exits if a class is empty or an image does not decode."""
    from torchvision.datasets import ImageFolder
    try:
        files = ImageFolder(folder)
    except FileNotFoundError as error:  # no class, or an empty one
        fail(f"{folder}: {str(error).splitlines()[0]}")
    images = np.empty((len(files), 32, 32, 3), np.uint8)
    warnings.filterwarnings("error", ".*decompression bomb")  # above 89 million pixels; twice that is an error anyway
    for i, (path, _) in enumerate(files.samples):
        try:
            images[i] = np.asarray(files.loader(path).resize((32, 32)))
        except Exception as error:  # whatever the decoder raises, the user needs the file's name
            fail(f"{path} does not decode ({type(error).__name__}): repair or remove it")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets), files.classes

def read_images(args):
    """Decode the images of --dataset into data_file(args), where every chapter finds them."""
    print(f"reading the images of {args.dataset} (once, into {data_file(args)})", flush=True)
    if args.dataset == "toy":
        train, test = toy_images(2400, 2 * args.seed), toy_images(500, 2 * args.seed + 1)
    elif args.dataset in ("cifar10", "cifar100"):
        train, test = cifar_images(args, True), cifar_images(args, False)
    else:
        missing = [part for part in ("train", "test") if not Path(args.dataset, part).is_dir()]
        if missing:
            fail(f"--dataset {args.dataset}: not cifar10, cifar100 or toy, nor a folder with train/ and test/ "
                 f"({' and '.join(missing)} missing)")
        train, test = folder_images(Path(args.dataset, "train")), folder_images(Path(args.dataset, "test"))
        if train[2] != test[2]:
            fail(f"{args.dataset}: train/ and test/ differ in {sorted(set(train[2]) ^ set(test[2]))}")
    if len(train[0]) < 20:
        fail(f"{args.dataset} has {len(train[0])} training images: at least 20 are needed, a tenth is held out")
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
    split = {"held_out": order[:len(order) // 10], "train": order[len(order) // 10:]}  # the same for every seed
    lock(args, args.data_dir)
    write(data_file(args), {
        "settings": {}, "classes": int(train[1].max()) + 1, "names": train[2], "test": test[0], "test_labels": test[1],
        **{name: train[0][pick] for name, pick in split.items()},
        **{f"{name}_labels": train[1][pick] for name, pick in split.items()}})

# ---- The chapter -----------------------------------------------------------------------------------------------------
def main():
    args = read_flags(STAGE)
    if (args.net, "paper") not in NETWORKS:
        fail(f"--net {args.net}: choose from {', '.join(sorted({name for name, _ in NETWORKS}))}")
    if not data_file(args).exists():
        read_images(args)
    load_data(args)
    net = make_net(args.net, args.preset, args.common["classes"])
    checkpoint = args.out / "01_dynamic_net.pt"
    if checkpoint.exists() and not args.restart:
        load(checkpoint, args.settings, shapes(net))
        return finish(args, [], [f"{checkpoint} earlier (--restart makes it anew)"], "02_teacher_trades.py")
    lock(args, args.out, checkpoint)
    torch.manual_seed(args.seed)
    shared = init_weights(net)
    rng = random.Random(args.seed)
    students = {"largest": student_at(net, -1), "smallest": student_at(net, 0), "middle": student_at(net, 1)}
    if args.net == "resnet50":  # nearly the sizes of the usual ResNet-50, or their like in the tiny network
        usual = {"depth": 1, "width": 1.0, "expand": 0.25}
        picks = {name: usual[name.split("_")[0]] for name in net.genes} | {"depth_stem": 0}
        students["ResNet-50-like"] = canonical(net, tuple(picks.values()))
    students |= {f"random {i}": sample(net, rng) for i in range(1, args.students + 1)}
    print(f"{args.net} for {args.common['classes']} classes: {len(net.genes)} genes, {count_students(net):,} students")
    shown, rows, names = [], [], {student: name for name, student in reversed(students.items())}  # each student once
    for student, name in reversed(names.items()):
        params, macs = cost(net, student)
        difference = difference_from_standalone(shared, blocks_of(net, student))
        shown.append({"student": name, "params (M)": params / 1e6, "MACs (M)": macs / 1e6,
                      "slice against standalone": f"{difference:.0e}"})
        rows.append({**dict(zip(net.genes, student)), "params": params, "macs": macs})
    write(args.out / "01_students.csv", rows)
    write(checkpoint, {"settings": args.settings, "net": plain(net), "weights": shared})
    print("the last column: how far logits are from those of a network of plain layers that copied the slice")
    finish(args, shown, [checkpoint, args.out / "01_students.csv"], "02_teacher_trades.py")

if __name__ == "__main__":
    run_chapter(main)
