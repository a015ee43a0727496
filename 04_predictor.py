# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///
"""Chapter 4: the accuracy-robustness predictor (paper, sections 4.5 and 5.2).

A search needs the accuracy and the robustness of thousands of students, and PGD is far too slow to ask each. So some
students are measured, one after another, and a small fully-connected network learns to predict both numbers from the
genotype alone. Its error means something only beside two others: how much students differ at all, and how far the
number measured for one student moves when other images are taken.

    python 04_predictor.py --dataset toy                            # runs the chapters before it where needed
    python 04_predictor.py --dataset cifar10 --sampling random      # students of the random-sampling baseline

reads   01_dynamic_net.pt    the network
        03_progressive.pt    the shared weights (03_random.pt with --sampling random; made first if missing)
        02_teacher.pt        for 04_widths.csv and the pictures
writes  04_students.csv      a row per measured student, written at once: genes, natural and robust accuracy, and both
                             on the first half of the images alone; 04_students.pt holds how they were measured
        04_predictions.csv   measured and predicted accuracy of the students that tested the predictor
        04_report.csv        how far they are apart
        04_widths.csv        figure 6: the teacher, and students that differ in width (kernel) alone, measured
        04_pictures.png      some images, what the attack adds (times 16), the sum, and how they are classified
        04_predictor.pt      the predictor; delete it to train another on the same students
        With --sampling random, names end in _random.
"""
from __future__ import annotations

import argparse, fcntl, functools, io, os, random, resource, shlex, subprocess, sys, time, timeit, zipfile, zlib
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

STAGE = {  # flag: (paper, quick, tiny, help)
    "students": (2000, 300, 40, "students to measure; paper: 2000 (section 5.2)"),
    "test_students": (300, 60, 10, "of them held out to test the predictor; paper: 300 (section 5.2)"),
    "images": (1000, 1000, 200, "held-out training images per student (all there are, if fewer); not in the paper"),
    "eps": (8.0, 8.0, 8.0, "largest change of a pixel, in 1/255; paper: 0.031, about 8/255 (section 5.0.2)"),
    "step_size": (1.81, 1.81, 1.81, "of the attack, in 1/255; paper: 0.0071, 1.81/255 (section 5.0.2)"),
    "steps": (20, 20, 10, "of the attack; paper: 20 (section 5.0.2)"),
    "calibration_images": (2000, 2000, 500, "training images for batch-norm statistics; released code: 2000 to 4000"),
    "epochs": (30, 30, 30, "epochs of the predictor; paper: 30 (section 5.2)"),
    "predictor_lr": (1e-3, 1e-3, 1e-3, "of Adam; 1e-3 in the released code"),
    "hidden_layers": (6, 6, 3, "of the predictor; 6 in the released code"),
    "hidden_width": (400, 400, 100, "of each; 400 in the released code"),
}

# ---- The lesson: measure some students, predict the others -----------------------------------------------------------
MEASURED = ("natural", "robust", "natural_half", "robust_half", "seconds")  # columns of 04_students.csv after the genes
PREDICTOR_FLAGS = ("test_students", "epochs", "predictor_lr", "hidden_layers", "hidden_width")

def draw_students(net: Net, count: int, seed: int) -> list[tuple]:
    """`count` distinct students, each gene drawn uniformly; exits if the network does not hold so many."""
    rng = random.Random(seed)
    students = {}
    for _ in range(100 * count):
        students[sample(net, rng)] = None
        if len(students) == count:
            return list(students)
    fail(f"--students {count}: this network does not hold so many different students")

def measure(args, shared: dict[str, Tensor], students: list[tuple], data: dict, path: Path) -> list[dict]:
    """Natural and robust accuracy of each student on held-out training images; every row is written at once."""
    rows = read_students(path, args.net, students) if path.exists() and not args.bench else []
    if 0 < len(rows) < len(students):
        print(f"continuing {path} at student {len(rows) + 1}", flush=True)
    images, labels = data["held_out"][:args.images], data["held_out_labels"][:args.images]
    meter = Meter(args, args.students, "students", len(rows))
    for student in students[len(rows):]:
        start = time.perf_counter()
        predict = calibrated(shared, args.net, student, data["train"][:args.calibration_images])
        meter.mark("calibration")
        natural, robust = judge(predict, images, labels, args.eps / 255, args.step_size / 255, args.steps)
        whole, half = ([right.float().mean().item() for right in (natural[:n], robust[:n])]
                       for n in (args.images, args.images // 2))
        row = *whole, *half, time.perf_counter() - start
        rows.append(dict(zip((*args.net.genes, *MEASURED), (*student, *row))))
        if not args.bench:
            write(path, rows)
        meter.lap("natural images and attack", args.images, lambda: f"natural {whole[0]:.3f}, robust {whole[1]:.3f}")
    return rows

def train_predictor(args, students: list[tuple], labels: Tensor) -> dict[str, Tensor]:
    """The MLP's weights, fitted to labels (N, 2) of students by mean squared error."""
    torch.manual_seed(args.seed)
    features = one_hot(args.net, students)
    mean, scale = labels.mean(0), labels.std(0).clamp(min=1e-4)  # both targets at the same scale
    weights = {name: torch.randn(shape) * (2 / shape[0]) ** 0.5 if len(shape) == 2 else torch.zeros(shape)
               for name, shape in predictor_shapes(args.net, args.hidden_layers, args.hidden_width).items()}
    weights[f"matrix_{args.hidden_layers}"].zero_()  # before training it answers the mean
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], lr=args.predictor_lr)
    for _ in range(args.epochs):
        for pick in torch.randperm(len(students)).split(16):
            loss = F.mse_loss(mlp(weights, features[pick]), (labels[pick] - mean) / scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()} | {"mean": mean, "scale": scale}

def report(labels: Tensor, halves: Tensor, predicted: Tensor) -> list[dict]:
    """What an RMSE means: a row per target, from labels (N, 2), those on half the images, and test predictions (T, 2).
    A search needs the order alone: Kendall's tau-b is the share of pairs in the right order less that in the wrong one.

    Two labels from other images are compared without measuring twice: the halves are disjoint, their difference has
    twice the variance of that between two labels of all images each.
    """
    test = labels[-len(predicted):]
    error = (predicted - test).square().mean(0).sqrt()
    real, found = ((part[:, None] - part).sign() for part in (test, predicted))  # (T, T, 2); ties are 0
    tau = (real * found).sum((0, 1)) / (real.square().sum((0, 1)) * found.square().sum((0, 1))).sqrt()
    moved = (2 * labels - 2 * halves) / 2 ** 0.5  # second half - first half = 2 (whole - first half)
    return [{"target": ("natural", "robust")[i], "RMSE": error[i].item(), "paper": (0.0076, 0.0072)[i],
             "tau": tau[i].item(), "students' mean": labels[:, i].mean().item(),
             "students' sd": labels[:, i].std().item(),
             "moves on other images": moved[:, i].square().mean().sqrt().item(),
             "of that not shared": moved[:, i].std().item()} for i in range(2)]

def read_students(path: Path, net: Net, students: list[tuple]) -> list[dict]:
    """Rows of measured students; exits unless they are the first of `students`, whole, and plausible numbers."""
    lines = path.read_text(errors="replace").split("\n")
    header, place = [*net.genes, *MEASURED], f"{path}: repair or delete it;"
    missing = set(header) - set(lines[0].split(","))
    if lines[0].split(",") != header:
        fail(f"{place} its columns are not this network's" + (f", {sorted(missing)[0]} is missing" if missing else ""))
    if lines[-1] or len(lines) - 2 > len(students):
        fail(f"{place} " + ("its last row is cut short" if lines[-1] else f"it has more than {len(students)} students"))
    rows = []
    for number, (line, student) in enumerate(zip(lines[1:-1], students), 2):
        try:
            values = [float(word) for word in line.split(",")]
        except ValueError as error:
            fail(f"{place} line {number}: {error}")
        if len(values) != len(header) or not all(0 <= value <= 1 for value in values[len(student):-1]):
            fail(f"{place} line {number} does not hold {len(header)} numbers, accuracies between 0 and 1")
        for (gene, choices), value, drawn in zip(net.genes.items(), values, student):
            if value != drawn:
                fail(f"{place} line {number}: {gene} is {value:g}, " + ("another student than --seed draws" if value in
                     (0, *choices) else f"not one of {choices}"))
        rows.append(dict(zip(header, (*student, *values[len(student):]))))
    return rows

def measure_widths(args, shared: dict[str, Tensor], teacher, data: dict) -> list[dict]:
    """Figure 6: natural and robust accuracy of the teacher and of students that differ in width (kernel) alone."""
    genes, rows = args.net.genes.items(), []
    varied = [name for name, _ in genes if name.startswith(("width", "kernel"))]
    students = {value: canonical(args.net, tuple(c[min(i, len(c) - 1) if name in varied else -1] for name, c in genes))
                for i, value in enumerate(args.net.genes[varied[0]] if varied else ())}
    images, labels = data["held_out"][:args.images], data["held_out_labels"][:args.images]
    for name, student in {"teacher": None, **students}.items():
        predict = calibrated(shared, args.net, student, data["train"][:args.calibration_images]) if student else teacher
        found = judge(predict, images, labels, args.eps / 255, args.step_size / 255, args.steps)
        rows.append({"student": name, **{key: right.float().mean().item() for key, right in zip(MEASURED, found)}})
    return rows

def draw_pictures(args, teacher, student, data: dict) -> bytes:
    """A PNG: a column for each of 8 held-out images, those first that the student gets right; rows natural, change
    x 16 around grey, adversarial for the student; with the answers of teacher and student, green if right."""
    from torchvision.utils import draw_bounding_boxes, make_grid, save_image
    rows, names = [], dict(enumerate(load(data_file(args), {}).get("names", ())))
    x, y = data["held_out"][:100] / 255, data["held_out_labels"][:100]
    pick = (student(x).argmax(1) != y).int().argsort(stable=True)[:8]
    x, y = x[pick], y[pick]
    x_adv = pgd(student, x, lambda logits: F.cross_entropy(logits, y), torch.zeros_like(x), args.eps / 255,
                args.step_size / 255, args.steps)
    for images, judged in ((x, x), (0.5 + 16 * (x_adv - x), None), (x_adv, x_adv)):
        tiles = F.interpolate(images.clamp(0, 1), scale_factor=4)
        tiles = list((255 * F.pad(tiles, (0, 0, 0, 0 if judged is None else 36), value=1)).byte().cpu())
        for who, predict, top in (("T", teacher, 130), ("S", student, 147)) if judged is not None else ():
            for i, answer in enumerate(predict(judged).argmax(1).tolist()):
                box, words = torch.tensor([[1, top, 126, top + 15]]), f"{who}: {names.get(answer, answer)}"
                tiles[i] = draw_bounding_boxes(tiles[i], box, [words], "green" if answer == y[i] else "red")
        rows.append(make_grid(tiles, 8, pad_value=255))
    save_image(torch.cat(rows, 1) / 255, buffer := io.BytesIO(), format="png")
    return buffer.getvalue()

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

# ---- Training: the loop, the log, a state to continue from, and --bench ----------------------------------------------
BENCH = {"action": "store_true", "help": "time a few iterations, say where the time goes, and stop"}

class Meter:
    """Counts iterations (or students) and says, every 10 seconds, how long the rest will take. With --bench it times
    them, part by part: 8 under PyTorch's FLOP counter, which warm up too, then 8 more; then the program ends."""
    def __init__(self, args, total: int, unit: str, done: int):
        self.args, self.total, self.unit, self.first, self.done = args, total, unit, done, done
        self.start = self.said = self.last = time.perf_counter()
        self.parts, self.laps, self.counter = {}, [], FlopCounterMode(display=False)
        if args.bench:
            self.counter.__enter__()
    def mark(self, part: str):
        """With --bench: the time since the last mark went into this part. Without, nothing waits for the device."""
        if self.args.bench:
            if self.args.device.type == "cuda":
                torch.cuda.synchronize()
            self.parts[part], self.last = time.perf_counter() - self.last, time.perf_counter()
    def lap(self, part: str, images: int, say):
        """`part` was the last of one over so many images. `say` is called, and waits for the device, when it is due."""
        self.mark(part)
        self.done, now = self.done + 1, time.perf_counter()
        if self.args.bench:
            self.laps.append(dict(self.parts))
            if len(self.laps) == 8:
                self.counter.__exit__(None, None, None)
            if len(self.laps) == 16:
                self.report(images, self.laps[8:])
        elif self.done == self.first + 3 or now - self.said > 10:
            minutes = (now - self.start) / (self.done - self.first) * (self.total - self.done) / 60
            print(f"  {self.done}/{self.total} {self.unit}  {say()}  {minutes:.1f} minutes left", flush=True)
            self.said = now
    def report(self, images: int, laps: list[dict]):
        """Where the time of a median lap goes, how fast it is beside a matrix product, and what the whole run takes."""
        on_gpu = self.args.device.type == "cuda"
        dtype, side = getattr(self.args, "dtype", torch.float32), 8192 if on_gpu else 1024
        matrix = torch.rand(side, side, device=self.args.device, dtype=dtype)
        peak = 2 * side ** 3 / min(timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=20))
        rate = self.counter.get_total_flops() / sum(sum(lap.values()) for lap in laps)
        lap = {part: torch.tensor([lap[part] for lap in laps]).median().item() for part in laps[0]}
        whole = torch.tensor([sum(lap.values()) for lap in laps]).median().item()
        finish(self.args, [{"part": name, "ms": 1e3 * s, "share": f"{s / whole:.0%}"} for name, s in lap.items()])
        memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(0).ru_maxrss
        print(f"{images / whole:.4g} images/s, {60 / whole:.4g} {self.unit}/minute on {self.args.device}, {dtype}; "
              f"{rate / 1e12:.3g} TFLOP/s, {rate / peak:.0%} of a matrix product's here\n"
              f"memory {memory / 2 ** 30:.3g} GiB at most; {self.total} {self.unit}: {self.total * whole / 3600:.3g} h")
        raise SystemExit

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
def main():
    args = read_flags(STAGE, sampling=SAMPLING, bench=BENCH)
    data, _ = load_data(args), read_net(args)
    suffix = "" if args.sampling == "progressive" else "_random"
    measured, checkpoint = args.out / f"04_students{suffix}.pt", args.out / f"04_predictor{suffix}.pt"
    following = f"05_nsga2.py --sampling={args.sampling}"
    if checkpoint.exists() and not args.restart and not args.bench:
        load(checkpoint, args.settings)
        return finish(args, [], [f"{checkpoint} earlier (--restart makes it anew)"], following)
    if not 1 < args.test_students < args.students - 1 or args.images < 2:
        fail("--test-students must be between 2 and --students less 2, --images at least 2")
    args.images = min(args.images, len(data["held_out"])) // 2 * 2  # two halves
    path = args.out / f"03_{args.sampling}.pt"
    if args.bench and not path.exists():
        fail(f"--bench needs {path}, since only images that are classified right are attacked: run chapter 3 first")
    need(args, path, "03_progressive_rslad.py", f"--sampling={args.sampling}")
    weights = load(path, args.common, args.shapes)["weights"]
    shared = {name: weight.to(args.device) for name, weight in weights.items()}
    settings = {name: args.settings[name] for name in args.settings if name not in PREDICTOR_FLAGS}
    settings["weights"] = f"{zlib.crc32(b''.join(weight.numpy().tobytes() for weight in weights.values())):08x}"
    table = args.out / f"04_students{suffix}.csv"
    students = draw_students(args.net, args.students, args.seed)
    if args.bench:
        measure(args, shared, 2 * students[:8], data, table)
    lock(args, args.out, checkpoint, table, measured)
    if table.exists() and not measured.exists():
        fail(f"{table} lacks {measured.name}, which says how it was measured: delete it, or --restart")
    if measured.exists():
        load(measured, settings)
    write(measured, {"settings": settings})
    print(f"{args.students} students, each by PGD-{args.steps} on {args.images} held-out training images", flush=True)
    rows = measure(args, shared, students, data, table)
    labels = torch.tensor([[row[name] for name in MEASURED] for row in rows])  # (N, 4)
    predictor = train_predictor(args, students[:-args.test_students], labels[:-args.test_students, :2])
    test = students[-args.test_students:]
    predicted = predict_accuracy(predictor, args.net, test)
    rows = [{**dict(zip(args.net.genes, student)), "natural": row["natural"], "robust": row["robust"],
             "predicted_natural": natural, "predicted_robust": robust}
            for student, row, (natural, robust) in zip(test, rows[-args.test_students:], predicted.tolist())]
    write(args.out / f"04_predictions{suffix}.csv", rows)
    write(args.out / f"04_report{suffix}.csv", found := report(labels[:, :2], labels[:, 2:4], predicted))
    files = [checkpoint, *(args.out / f"04_{name}{suffix}.csv" for name in ("students", "predictions", "report"))]
    if (path := args.out / "02_teacher.pt").exists():
        weights = {name: w.to(args.device) for name, w in load(path, args.common, args.shapes)["weights"].items()}
        images = data["train"][:args.calibration_images]
        teacher, student = (calibrated(part, args.net, student_at(args.net, place), images)
                            for part, place in ((weights, -1), (shared, 1)))
        files += [args.out / f"04_widths{suffix}.csv", args.out / f"04_pictures{suffix}.png"]
        write(files[-2], measure_widths(args, shared, teacher, data))
        write(files[-1], draw_pictures(args, teacher, student, data))
    write(checkpoint, {"settings": args.settings, "weights": predictor})
    print(f"RMSE on {len(test)} students that were not used in training; all numbers are shares of 1:")
    finish(args, found, files, following)

if __name__ == "__main__":
    run_chapter(main)
