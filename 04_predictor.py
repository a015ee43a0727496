"""Chapter 4: the accuracy-robustness predictor (paper, sections 4.5 and 5.2).

A search asks for the accuracies of thousands of students, and PGD is far too slow to answer. So

    for some random students:                             # 2,000 in the paper
        give it batch-norm statistics of its own
        measure its natural and its robust accuracy (PGD-20) on held-out training images
    fit an MLP: genotype, one-hot -> (natural, robust)    # on all but the last 300
    compare predictions and measurements of those 300

Two baselines stand beside the predictor's root mean squared error (RMSE): always the mean, and a
linear model. Fitted to 40 students of the tiny network, the linear model was the best of the three
in 13 of 16 comparisons (level in 2): what single choices add to an accuracy nearly sums up, and an
MLP of 0.8 million weights has to learn even that from 40 examples of 30 features. Measured
accuracies are noisy, being those of a sample of images; but the sample is the same for all
students, so they share most of the noise.

Read first: measure, train_predictor, compare.

    python 04_predictor.py --dataset toy                         # runs what it needs before it
    python 04_predictor.py --dataset cifar10 --sampling random   # students of the baseline

reads   01_images.pt, 03_progressive.pt (made first if missing)
writes  04_measured.state    the measured students, to which more --students are added
        04_predictor.pt      the predictor, and what the tables hold
        04_students.csv, 04_predictions.csv, 04_report.csv, 04_widths.csv (figure 6)
        (with --sampling random all names end in _random)
"""

import argparse
import copy
import os
import random
import signal
import subprocess
import sys
import time
from math import inf
from pathlib import Path
from secrets import token_hex
from zlib import crc32

import torch
import torch.nn.functional as F

torch.backends.cudnn.allow_tf32 = False  # judging is in float32

STAGE = "04"
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "students": (2000, 300, 24, 4, inf, "students to measure; paper 2000 (section 5.2)"),
    "test_students": (300, 60, 6, 2, inf, "of them, kept to test the predictor; paper 300"),
    "images": (1000, 1000, 160, 2, inf, "held-out training images for each; paper silent"),
    "eps": (8.0, 8.0, 8.0, 0.2, inf, "largest change of a pixel, in units of 1/255; paper 8"),
    "step_size": (1.81, 1.81, 1.81, 0.02, inf, "in 1/255: scale it with eps; paper 0.0071 of 1"),
    "steps": (20, 20, 10, 1, inf, "of the attack; paper 20"),
    "epochs": (30, 30, 30, 1, inf, "of the predictor; paper 30"),
}


# ---- The lesson: measure some students, predict the others ---------------------------------------
def measure(network, calibration, held_out, attack):
    """Accuracy of a student, a share of 1, natural and under PGD, on held-out training images, with
    batch-norm statistics of its own; and the seconds that it took."""
    start = time.monotonic()
    natural, robust = judge(calibrated(network, calibration), *held_out, *attack)
    return {"natural": natural, "robust": robust, "seconds": time.monotonic() - start}


def train_predictor(net, students, labels, epochs, seed):
    """Fit an MLP to labels (N, 2) of students by mean squared error: {layers, mean, scale}."""
    torch.manual_seed(seed)
    features = one_hot(net, students)
    mean, scale = labels.mean(0), labels.std(0).clamp(min=1e-4)  # both targets at one scale
    sizes = [features.shape[1], *[400] * 6, 2]  # released code
    layers = []  # (matrix, bias): plain tensors, which chapter 5 reads without this code
    for inp, out in zip(sizes, sizes[1:]):
        layers.append((torch.randn(inp, out) * (2 / inp) ** 0.5, torch.zeros(out)))
    layers[-1][0].zero_()  # before training it answers the mean
    weights = [weight.requires_grad_() for layer in layers for weight in layer]
    optimizer = torch.optim.Adam(weights, lr=1e-3)  # released code
    for _ in range(epochs):
        for pick in torch.randperm(len(students)).split(16):
            loss = F.mse_loss(mlp(layers, features[pick]), (labels[pick] - mean) / scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    layers = [(matrix.detach(), bias.detach()) for matrix, bias in layers]
    return {"layers": layers, "mean": mean, "scale": scale}


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


def compare(net, students, labels, predicted):
    """A row for each target. RMSE on the last T of N students: of the predictions (T, 2), of the
    mean of the others' labels, of a linear model fitted to the others. tau: a search needs only the
    order; Kendall's tau-b (scipy.stats.kendalltau) is the share of pairs in the right order minus
    that in the wrong one, corrected for ties. mean accuracy: of all N."""
    train, test = labels[: -len(predicted)], labels[-len(predicted) :]
    features = one_hot(net, students)
    features = torch.cat([features, torch.ones(len(students), 1)], 1).double()
    linear = torch.linalg.pinv(features[: len(train)]) @ train.double()  # least squares
    answers = {"RMSE": predicted, "of the mean": train.mean(0)}
    answers["linear"] = features[len(train) :] @ linear
    columns = {name: (answer - test).square().mean(0).sqrt() for name, answer in answers.items()}
    # The signs of all pairs' differences, (T * T, 2): tau-b is the cosine between the real ones and
    # the predicted ones, since a product of two signs is 1 if the order is right, -1 if not.
    real, guessed = ((part[:, None] - part).sign().flatten(0, 1) for part in (test, predicted))
    columns["tau"] = F.cosine_similarity(real, guessed, dim=0)
    columns["mean accuracy"] = labels.mean(0)
    papers = {"natural": 0.0076, "robust": 0.0072}  # section 5.2; the abstract has 0.0073
    return [
        {"target": target, "paper's RMSE": paper}
        | {name: column[i].item() for name, column in columns.items()}
        for i, (target, paper) in enumerate(papers.items())
    ]


def main():
    args = read_flags()
    if args.test_students > args.students - 2:
        sys.exit("--test-students must be at most --students minus 2")
    end = "" if args.sampling == "progressive" else f"_{args.sampling}"  # of the names of files
    weights, checkpoint = f"03_{args.sampling}.pt", args.out / f"04_predictor{end}.pt"
    run_missing(args, "01_dynamic_net.pt", "02_teacher.pt", weights)
    source = load(args.out / weights, args.common)
    settings = source["settings"] | args.settings
    if checkpoint.exists():
        print(f"{checkpoint} is finished (delete it to redo it)")
    else:
        fit(args, source, settings, checkpoint, args.out / f"04_measured{end}.state")
    tables, wrote = load(checkpoint, settings)["rows"], [checkpoint]
    for name, rows in tables.items():
        wrote.append(args.out / f"04_{name}{end}.csv")
        write_csv(wrote[-1], rows)
    print(f"\nRMSE and tau on {args.test_students} students that were not used in training.")
    print("Below 'of the mean' it has learned something; if not, use more --students or --images:")
    finish(args, tables["report"], wrote, CHAPTERS[5])


def fit(args, source, settings, checkpoint, state):
    """Measure students of the weights in `source`, fit a predictor to them, and save both."""
    data = moved(load(args.out / "01_images.pt", args.common)["data"], args.device)
    held_out = [data[part][: args.images] for part in ("held_out", "held_out_labels")]
    attack = args.eps / 255, args.step_size / 255, args.steps
    setup = data["calibration"], held_out, attack
    net, shared = source["net"], moved(source["weights"], args.device)
    rng, tests = random.Random(args.seed), args.test_students
    drawn = [sample(net, rng) for _ in range(10 * args.students)]
    students = [*{tuple(s.values()): s for s in drawn}.values()][: args.students]  # all differ
    if len(students) < args.students:
        sys.exit(f"--students {args.students}: only {len(students)} different ones were drawn")
    # More students, or another predictor, need no new measurements of the old ones.
    fitting = "04 students", "04 test_students", "04 epochs"
    measuring = {name: settings[name] for name in settings if name not in fitting}
    rows = load(state, measuring)["rows"] if state.exists() else []
    print(f"{args.students} students, PGD-{args.steps}, {len(held_out[0])} images, {args.device}")
    for student in counted("students:", students[len(rows) :]):
        rows.append({**student, **measure(Network(net, shared, student), *setup)})
        save(state, measuring, rows=rows)

    rows = rows[: len(students)]
    labels = torch.tensor([[row["natural"], row["robust"]] for row in rows])  # (N, 2)
    predictor = train_predictor(net, students[:-tests], labels[:-tests], args.epochs, args.seed)
    predicted = predict_accuracy(predictor, net, students[-tests:])
    columns = "natural", "robust", "predicted_natural", "predicted_robust"
    pairs = torch.cat([labels[-tests:], predicted], 1).tolist()
    tables = {"students": rows, "predictions": [dict(zip(columns, pair)) for pair in pairs]}
    tables["report"] = compare(net, students, labels, predicted)
    tables["widths"] = [
        {"student": width, **measure(Network(net, shared, student), *setup)}
        for width, student in widths(net).items()
    ]
    made = {"net": net, "weights": source["weights"], "predictor": predictor}
    save(checkpoint, settings, **made, rows=tables)


def widths(net):
    """Figure 6: {width (kernel): the largest student with this width in all layers}."""
    kind, largest = "kernel" if "kernel" in net else "width", net["students"]["largest"]
    varies = [gene for gene in largest if gene.startswith(kind)]
    return {value: largest | dict.fromkeys(varies, value) for value in net[kind]}


# ==== Nothing below is new: the same text as in earlier chapters, held equal by a test ============
# ---- The attack, judging, and bookkeeping, as in chapter 2 ---------------------------------------
def pgd(loss, x, noise, eps, step_size, steps):
    """Projected gradient ascent (Madry et al., 2018), the maximum in equation 1: images x' of a
    large loss(x'), with |x' - x| <= eps in each pixel and 0 <= x' <= 1."""
    x_adv, gradient = (x + noise).clamp(0, 1), gradient_of(loss)
    for _ in range(steps):
        x_adv = x_adv + step_size * gradient(x_adv).sign()  # up, by the same in each pixel
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)  # back to within eps, and to [0, 1]
    return x_adv


def gradient_of(loss):
    """A function of images x: the gradient of loss(x) with respect to them; weights get none."""

    def gradient(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():  # even while judging
            return torch.autograd.grad(loss(x), x)[0]

    return Replayed(gradient)  # the same as gradient; on a GPU faster


@torch.no_grad()
def fold_norms(network):
    """A copy with batch norms frozen at `stats`. They become part of the convolutions, which is
    faster: a frozen one is a scale and a shift."""
    frozen = copy.copy(network)
    frozen.slices, frozen.folded = {**network.slices}, True
    for name, (mean, variance) in network.stats.items():
        scale, shift = (frozen.slices.pop(f"{name}_{part}") for part in ("scale", "shift"))
        factor = scale / (variance + 1e-5).sqrt()
        frozen.slices[name] = factor[:, None, None, None] * network.slices[name]
        frozen.slices[f"{name}_bias"] = shift - mean * factor
    return frozen


@torch.no_grad()
def calibrated(network, images):
    """The student as it is judged and exported: batch norms frozen at its own statistics, of uint8
    images (N, 3, 32, 32). What reaches a layer depends on the student: another's would be wrong."""
    network.batches = 0  # its earlier statistics do not count
    for x in images.chunk(-(-len(images) // 250)):  # equal batches, of at most 250
        network(x / 255)
    return fold_norms(network)


@torch.no_grad()
def judge(network, images, labels, eps, step_size, steps, batch=100):
    """[natural, robust] accuracy, shares of 1: of uint8 images (N, 3, 32, 32) those that are right,
    and those still right after PGD on the cross-entropy. Every image gets the same noise at first,
    so batches do not matter; with one step (FGSM) it gets none."""
    noise = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    noise = noise.to(images.device) * (eps if steps > 1 else 0)
    right = []
    for x, y in zip(images.split(batch), labels.split(batch)):
        x = x / 255
        x_adv = pgd(lambda z: F.cross_entropy(network(z), y), x, noise, eps, step_size, steps)
        natural = network(x).argmax(1) == y
        right.append(torch.stack([natural, natural & (network(x_adv).argmax(1) == y)]))
    return torch.cat(right, 1).double().mean(1).tolist()


class Replayed:
    """function(x); on a GPU its second call is recorded as a CUDA graph, which later ones replay:
    one launch in place of a thousand. Without it attacks are the same, up to rounding. What Python
    decides inside (the student, .item()) is frozen: each attack records anew, in the same memory.
    """

    last = None  # the stream to record on, and the last graph

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == 1 or not x.is_cuda:
            return self.function(x)
        if self.calls == 2:
            stream, last = Replayed.last or (torch.cuda.Stream(x.device), None)
            self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                self.graph.capture_begin(pool=last.pool() if last else None)
                self.output = self.function(self.x)
                self.graph.capture_end()
            torch.cuda.current_stream(x.device).wait_stream(stream)
            Replayed.last = stream, self.graph
        self.x.copy_(x)
        self.graph.replay()
        return self.output


def counted(name, items, rounds=1):
    """The items; every ten seconds it prints how many are done, and the time left for `rounds`."""
    start = last = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - last > 10:
            last = time.monotonic()
            left = (last - start) / i * (rounds * len(items) - i) / 60
            print(f"  {name} {i}/{len(items)}, {left:.1f} minutes left", flush=True)
        yield item


def moved(tensors, device, learn=False):
    """Copies of a dictionary's tensors on the device, with gradients if they are to learn."""
    return {k: t.detach().to(device, copy=True).requires_grad_(learn) for k, t in tensors.items()}


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


# ---- The network, as in chapter 1 ----------------------------------------------------------------
def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


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


def smaller_kernel(shared, name, weight, kernel):
    """A depthwise kernel of 5 or 3 is the centre of the next larger one, times a learned matrix."""
    while weight.shape[-1] > kernel:
        side = weight.shape[-1] - 2
        centre = weight[:, 0, 1:-1, 1:-1].flatten(1)  # (out, side * side)
        weight = (centre @ shared[f"{name}_to{side}"]).view(-1, 1, side, side)
    return weight


def canonical(net, student):
    """The genotype with 0 for each gene of a block that its depth switches off, so that a network
    has one genotype (more only where channel rounding merges choices)."""
    off = [gene for gene, (depth, least) in net["switches"].items() if student[depth] < least]
    return student | dict.fromkeys(off, 0)


def sample(net, rng):
    """A student with a random choice of each gene."""
    return canonical(net, {gene: rng.choice(choices) for gene, choices in net["genes"].items()})


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
