# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///
"""Chapter 3: progressive adversarial robustness distillation (paper, section 4.4, equation 2, figure 4).

The teacher of chapter 2 is frozen, and its weights become the shared ones. In every iteration a student is drawn,
attacked, and taught to answer, with and without the attack, as the teacher does on the natural image (RSLAD, Zi et al.,
2021). Students shrink in three steps: first their widths (kernels) vary, then also depths, then also expansions.
`--sampling random` is the paper's baseline: every gene varies from the first iteration.

    python 03_progressive_rslad.py --dataset toy          # under a minute on two CPU cores
    python 03_progressive_rslad.py --dataset cifar10      # the paper's schedule: days; --preset quick for an hour

reads   02_teacher.pt        the teacher's weights (made first if missing)
writes  03_progressive.pt    the shared weights (03_random.pt with --sampling random)
        03_progressive_log.csv   a row per epoch
"""
from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import io
import math
import os
import random
import shlex
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

STAGE = {  # flag: (paper, quick, tiny, help)
    "epochs": (120, 4, 2, "epochs of each of the three steps; paper: 120 (section 5.0.1)"),
    "lr": (0.01, 0.02, 0.05, "learning rate, under a warm-up and a cosine to 0 in each step; paper: 0.01 (5.0.1)"),
    "warmup": (5 / 120, 0.1, 0.1, "share of each step's iterations before --lr is reached; not in the paper"),
    "momentum": (0.9, 0.9, 0.9, "of SGD; paper: 0.9 (section 5.0.1)"),
    "weight_decay": (2e-4, 2e-4, 2e-4, "of SGD; paper: 2e-4 (section 5.0.1)"),
    "batch_size": (128, 128, 64, "images per iteration; paper: 128 (section 5.0.1)"),
    "alpha": (5 / 6, 5 / 6, 5 / 6, "weight of the adversarial term in equation 2; 5/6 in the released code and RSLAD"),
    "eps": (8.0, 8.0, 8.0, "largest change of a pixel, in 1/255; paper: 8 (section 5.0.1)"),
    "step_size": (2.0, 2.0, 4.0, "of the training attack, in 1/255; paper: 2 (section 5.0.1)"),
    "steps": (10, 10, 3, "of the training attack; paper: 10 (section 5.0.1)"),
    "val_every": (10, 2, 2, "epochs between two looks at the largest, the smallest and a middle student"),
    "val_images": (1000, 1000, 200, "held-out training images for that look"),
    "calibration_images": (2000, 2000, 500, "training images for batch-norm statistics; released code: 2000 to 4000"),
}


# ---- The lesson: progressive sampling and RSLAD ----------------------------------------------------------------------
# What varies in each step, figure 4; kernels are Dyn-MobileNetV3's in place of widths.
STEPS = (("width", "kernel"), ("width", "kernel", "depth"), ("width", "kernel", "depth", "expand"))


def rslad_loss(weights: dict, blocks: tuple, x: Tensor, target: Tensor, args) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - alpha) KL(T(x) || S(x)) + alpha KL(T(x) || S(x')), equation 2; returns (loss, natural KL, adversarial KL).

    x (B, 3, 32, 32) in [0, 1]; target (B, classes) is log T(x), the teacher's natural soft labels (the paper's KL(S, T)
    has F.kl_div's order); x' is what PGD finds by climbing the second KL. Batch statistics throughout.
    """
    frozen = {name: weight.detach() for name, weight in weights.items()}  # the attack needs no gradient of the weights
    x_adv = pgd(lambda x: forward(frozen, blocks, x), x, lambda logits: kl(logits, target),
                0.001 * torch.randn_like(x), args.eps / 255, args.step_size / 255, args.steps)
    natural = kl(forward(weights, blocks, x), target)
    adversarial = kl(forward(weights, blocks, x_adv), target)
    return (1 - args.alpha) * natural + args.alpha * adversarial, natural, adversarial


@torch.no_grad()
def sort_channels(shared: dict[str, Tensor], net: Net):
    """Order every block's middle channels by importance, the L1 norm of the weights that read them, so that a smaller
    expansion keeps the important ones. The largest network computes what it did before."""
    for block in blocks_of(net, student_at(net, -1)):
        if len(block.main) == 3:
            reduce, middle, last = block.main
            order = shared[f"{last.name}.conv.weight"].abs().sum((0, 2, 3)).argsort(descending=True)
            # (layer, dimension to reorder): 0 are its outputs, with bias and batch norm; 1 its inputs.
            places = [(reduce, 0), (middle, 0), (last, 1), *zip(block.gate, (1, 0))]
            for layer, dim in places + ([(middle, 1)] if middle.groups == 1 else []):
                for part in ("conv.weight", *(layer.tail if dim == 0 else ())):
                    weight = shared[f"{layer.name}.{part}"]
                    weight.copy_(weight.index_select(dim, order))


def validate(args, shared: dict[str, Tensor], data: dict) -> dict[str, float]:
    """Natural and robust accuracy of the largest, a middle (all second choices) and the smallest student, held-out."""
    accuracy = {}
    images, labels = (data[name][:args.val_images] for name in ("held_out", "held_out_labels"))
    for size, place in (("largest", -1), ("middle", 1), ("smallest", 0)):
        predict = calibrated(shared, args.net, student_at(args.net, place), data["train"][:args.calibration_images])
        natural, robust = judge(predict, images, labels, args.eps / 255, args.step_size / 255, args.steps)
        accuracy |= {f"natural_{size}": natural.float().mean().item(), f"robust_{size}": robust.float().mean().item()}
    return accuracy


def train_students(args, teacher, shared: dict[str, Tensor], data: dict) -> dict:
    """Distil the teacher, logits = teacher(x), into students of the shared weights, in place; the log's last row."""
    run = Training(args, f"03_{args.sampling}", shared, data, 3, ("loss", "natural_kl", "adversarial_kl"))
    while run.done < run.total:
        step, position = divmod(run.done, args.epochs * run.per_epoch)
        kinds = STEPS[step if args.sampling == "progressive" else -1]
        if position == 0:
            run.optimizer.state.clear()  # each step is a run of its own: no momentum from the one before
            if step == (2 if args.sampling == "progressive" else 0):  # expansions vary from here on
                sort_channels(shared, args.net)
        for i, x, _ in run.batches():
            blocks = blocks_of(args.net, sample(args.net, random.Random(f"{args.seed} {run.done}"), kinds))
            weights = slice_weights(shared, blocks)
            with torch.no_grad():
                target = teacher(x).log_softmax(1)
            losses = rslad_loss(weights, blocks, x, target, args)
            run.optimizer.zero_grad()  # to None: layers the student lacks are not touched, not even by weight decay
            losses[0].backward()
            run.optimizer.step()
            run.losses[i] = torch.stack(losses).detach()
        due = run.done == run.total or run.done // run.per_epoch % args.val_every == 0
        run.end_epoch(**validate(args, shared, data) if due else {})
    return run.rows[-1]


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


def kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax(logits)), mean over images; logits and the log-probabilities `target` are (B, classes)."""
    return F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean", log_target=True)


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


def augment(images: Tensor) -> Tensor:
    """Crop (4 pixels of black around) and flip uint8 images (B, 3, 32, 32), each its own way; float in [0, 1]."""
    count, device = len(images), images.device
    rows = torch.arange(32, device=device) + torch.randint(9, (count, 1), device=device)
    columns = torch.arange(32, device=device) + torch.randint(9, (count, 1), device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    number = torch.arange(count, device=device)
    return padded[number[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2) / 255


# ---- Training runs: batches, the log, and a state to continue from ---------------------------------------------------
class Training:
    """What stands around a training loop: batches, the log, and a state to continue from. `done` counts iterations. All
    randomness of an iteration comes from the seed and its number, so a continued run is the run that never stopped."""
    save_every = 300  # seconds between two saves inside an epoch

    def __init__(self, args, name: str, shared: dict[str, Tensor], data: dict, rounds: int, columns: tuple):
        self.args, self.name, self.shared, self.data, self.columns = args, name, shared, data, columns
        self.batch = min(args.batch_size, len(data["train"]))
        self.per_epoch = len(data["train"]) // self.batch  # an incomplete last batch is left out
        self.done, self.rows, self.best, self.seconds, self.saved = 0, [], {}, 0.0, time.monotonic()
        self.losses = torch.zeros(self.per_epoch, len(columns), device=args.device)
        self.optimizer = torch.optim.SGD(shared.values(), args.lr, args.momentum, weight_decay=args.weight_decay)
        self.state = args.out / f"{name}_state.pt"
        if self.state.exists():
            state = load(self.state, args.settings, args.net)
            for key, weight in state["weights"].items():
                shared[key].data.copy_(weight)
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses.copy_(state["losses"])
            self.done, self.rows, self.best, self.seconds = state["progress"]
            print(f"continuing {self.state} after iteration {self.done}", flush=True)
        self.total = rounds * args.epochs * self.per_epoch
        self.progress = Progress(self.total, "iterations", self.done)

    def batches(self):
        """The rest of this epoch: (number, augmented images (B, 3, 32, 32) in [0, 1], labels (B,)) of each batch."""
        epoch, first = divmod(self.done, self.per_epoch)
        torch.manual_seed(self.args.seed * 10 ** 6 + epoch)
        order = torch.randperm(len(self.data["train"])).to(self.args.device)
        for i in range(first, self.per_epoch):
            if time.monotonic() - self.saved > self.save_every:
                self.save()
            length = self.args.epochs * self.per_epoch  # iterations of a round: a linear warm-up, a cosine to 0
            share = (self.done % length + 1) / length
            self.optimizer.param_groups[0]["lr"] = self.args.lr * min(
                share / self.args.warmup, (1 + math.cos(math.pi * share)) / 2)
            torch.manual_seed(self.args.seed * 10 ** 9 + self.done)
            pick = order[i * self.batch:(i + 1) * self.batch]
            yield i, augment(self.data["train"][pick]), self.data["train_labels"][pick]
            self.done += 1
            self.progress(self.done, lambda: f"epoch {epoch + 1}  loss {self.losses[i, 0]:.4f}")

    def end_epoch(self, **judged: float):
        """Log the epoch's mean losses and what was judged after it; save."""
        self.rows.append({"epoch": self.done // self.per_epoch, **dict(zip(self.columns, self.losses.mean(0).tolist())),
                          "lr": self.optimizer.param_groups[0]["lr"], **judged,
                          "seconds": self.seconds + time.monotonic() - self.saved})
        print("  " + "  ".join(f"{key} {value:.4g}" for key, value in self.rows[-1].items()), flush=True)
        self.save()
        write(self.args.out / f"{self.name}_log.csv", self.rows)

    def save(self):
        """Write what continues this run; exits if a loss was not finite, and what was saved before stays."""
        bad = (~self.losses.isfinite().all(1)).nonzero()
        if len(bad):
            fail(f"the loss is not finite in epoch {(self.done - 1) // self.per_epoch + 1}, iteration "
                 f"{bad[0].item() + 1}: --restart with a lower --lr ({self.state} is as it was before)")
        self.seconds, self.saved = self.seconds + time.monotonic() - self.saved, time.monotonic()
        weights = {key: weight.detach() for key, weight in self.shared.items()}
        write(self.state, {"settings": self.args.settings, "weights": weights, "optimizer": self.optimizer.state_dict(),
                           "losses": self.losses, "progress": (self.done, self.rows, self.best, self.seconds)})


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


class Progress:
    """Prints how long the work will take, then a line every 10 seconds: what is done, what is known, the time left."""

    def __init__(self, total: int, unit: str, done: int):
        self.total, self.unit, self.first, self.start, self.last = total, unit, done, time.monotonic(), time.monotonic()

    def __call__(self, done: int, say):
        """`say` is called, and so waits for the device, only when a line is due."""
        now = time.monotonic()
        if done == self.first + 3 or now - self.last > 10:
            left = datetime.timedelta(seconds=round((now - self.start) / (done - self.first) * (self.total - done)))
            print(f"  {done}/{self.total} {self.unit}  {say()}  {left} left", flush=True)
            self.last = now


def finish(args, rows: list[dict], wrote: list, following: str):
    """A table of aligned columns, what was written, and the command that comes next."""
    lines = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    for line in [list(rows[0]), *lines] if rows else []:
        print("".join(cell.rjust(2 + max(map(len, column))) for cell, *column in zip(line, rows[0], *lines)))
    print("wrote", *wrote)
    if following:
        print("next: python", following, shlex.join(args.given))


# ---- The chapter -----------------------------------------------------------------------------------------------------
def main():
    args = read_flags(STAGE, sampling={"choices": ("progressive", "random"), "default": "progressive"})
    data = load_data(args)
    checkpoint = args.out / f"03_{args.sampling}.pt"
    following = f"04_predictor.py --sampling={args.sampling}"
    if checkpoint.exists() and not args.restart:
        load(checkpoint, args.settings, args.net)
        return finish(args, [], [f"{checkpoint} earlier (--restart makes it anew)"], following)

    weights = load(need(args, args.out / "02_teacher.pt", "02_teacher_trades.py"), args.common, args.net)["weights"]
    weights = {name: weight.to(args.device) for name, weight in weights.items()}
    teacher = calibrated(weights, args.net, student_at(args.net, -1), data["train"][:args.calibration_images])
    shared = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    print(f"RSLAD with {args.sampling} sampling, {len(data['train'])} images, 3 x {args.epochs} epochs", flush=True)
    if args.restart:
        for old in (checkpoint, args.out / f"03_{args.sampling}_state.pt"):
            old.unlink(missing_ok=True)
    accuracy = train_students(args, teacher, shared, data)
    write(checkpoint, {"settings": args.settings, "weights": {name: shared[name].detach() for name in shared}})
    (args.out / f"03_{args.sampling}_state.pt").unlink(missing_ok=True)
    rows = [{"student": size, "natural": accuracy[f"natural_{size}"], f"PGD-{args.steps}": accuracy[f"robust_{size}"]}
            for size in ("largest", "middle", "smallest")]
    print("on held-out training images:")
    finish(args, rows, [checkpoint, args.out / f"03_{args.sampling}_log.csv"], following)


if __name__ == "__main__":
    main()
