"""Chapter 4: the accuracy-robustness predictor (paper, sections 4.5 and 5.2).

A search asks for thousands of students, and PGD is far too slow to answer. So

    for some random students:                             # 2,000 in the paper
        give it batch-norm statistics of its own
        measure its natural and its robust accuracy (PGD-20) on held-out training images
    fit an MLP: genotype, one-hot -> (natural, robust)    # on all but the last 300
    compare its predictions for those with what was measured

The error, RMSE, means something only beside two other numbers: how much students differ at all,
and how far the number measured for one student moves when other images are taken.

New here: main to pictures; attack, judging and network are as in chapters 1 and 2.

    python 04_predictor.py --dataset toy                         # runs what it needs before it
    python 04_predictor.py --dataset cifar10 --sampling random   # students of the baseline

reads   01_images.pt, 01_dynamic_net.pt, 02_teacher.pt, 03_progressive.pt   (made first if missing)
writes  04_students.csv      a row for each measured student; 04_students.pt to go on from there
        04_predictions.csv   measured and predicted accuracy of the test students
        04_report.csv        how far they are apart
        04_widths.csv        figure 6: chapter 2's teacher, students that differ in width (kernel)
        04_pictures.png      images, what an attack adds, the sum, and how they are classified
        04_predictor.pt      the predictor; delete it to fit another one to the same students
        (with --sampling random all names end in _random)
"""

import argparse
import copy
import csv
import hashlib
import io
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

# ---- The lesson: measure some students, predict the others ---------------------------------------
# fmt: off
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "students": (2000, 300, 40, 4, 10**6, "students to measure; paper 2000 (section 5.2)"),
    "test_students": (300, 60, 10, 2, 3000, "of them, kept to test the predictor; paper 300"),
    "images": (1000, 1000, 200, 2, 10**6, "held-out training images for each; paper silent"),
    "eps": (8.0, 8.0, 8.0, 0.2, 255, "change of a pixel, in 1/255: for 0.031 (paper) write 7.9"),
    "step_size": (1.81, 1.81, 1.81, 0.02, 255, "in 1/255: for 0.0071 (paper) write 1.81"),
    "steps": (20, 20, 10, 1, 10**4, "of the attack; paper 20"),
    "epochs": (30, 30, 30, 1, 10**6, "of the predictor (to change it, delete its .pt); paper 30"),
}
# fmt: on

PAPER = {"natural": 0.0076, "robust": 0.0072}  # RMSE (section 5.2; 0.0073 in the abstract)

HIDDEN = [400] * 6  # widths of the predictor's hidden layers (released code)


def main():
    args = read_flags(sampling={"choices": ["progressive", "random"], "default": "progressive"})
    device = pick_device(args)[0]
    before = "01_images.pt", "01_dynamic_net.pt", "02_teacher.pt", f"03_{args.sampling}.pt"
    run_missing(args, *before)
    data = moved(load(args.out / "01_images.pt", args.common), device)
    net = load(args.out / "01_dynamic_net.pt", args.common)
    trained = load(args.out / f"03_{args.sampling}.pt", net["settings"])
    end = "_random" if args.sampling == "random" else ""
    state, checkpoint = args.out / f"04_students{end}.pt", args.out / f"04_predictor{end}.pt"
    settings = {**net["settings"], **args.settings}
    following = f"05_nsga2.py --sampling={args.sampling}"
    if args.test_students > args.students - 2:
        fail("--test-students must be at most --students less 2")
    students = distinct_students(net, args)
    if args.restart:
        checkpoint.unlink(missing_ok=True)
        state.unlink(missing_ok=True)
    if checkpoint.exists():
        load(checkpoint, settings)  # exits if it is stale, or of other settings
        return finish(args, [], [f"{checkpoint} earlier (--restart makes it anew)"], following)
    shared = moved(trained["weights"], device)
    args.attack = args.eps / 255, args.step_size / 255, args.steps
    for part in ("held_out", "held_out_labels"):
        data[part] = data[part][: args.images]

    fitting = "epochs", "test_students"  # need no new measurements
    measuring = {name: settings[name] for name in settings if name not in fitting}
    rows = load(state, measuring)["rows"] if state.exists() else []
    count = len(data["held_out"])
    print(f"{args.students} students, PGD-{args.steps}, {count} images, on {device} in float32")
    for student in counted("students:", students[len(rows) :]):
        row = measure(args, Network(net, shared, student), data)
        rows.append({**dict(zip(net["genes"], student)), **row})
        write_csv(state.with_suffix(".csv"), rows)
        save(state, measuring, trained, rows=rows)  # last: without it, a student is measured anew

    measured, first_half = (  # (N, 2)
        torch.tensor([[row[f"natural{part}"], row[f"robust{part}"]] for row in rows])
        for part in ("", "_half")
    )
    train = args.students - args.test_students  # how many; the others test
    predictor = train_predictor(args, net, students[:train], measured[:train])
    predicted = predict_accuracy(predictor, net, students[train:])
    report = compare(measured, first_half, predicted)
    write_csv(args.out / f"04_report{end}.csv", report)
    columns = "natural", "robust", "predicted_natural", "predicted_robust"
    table = torch.cat([measured[train:], predicted], 1).tolist()
    write_csv(args.out / f"04_predictions{end}.csv", [dict(zip(columns, row)) for row in table])
    taught = load(args.out / "02_teacher.pt", net["settings"])
    teacher = Network(net, moved(taught["weights"], device), student_at(net, -1))
    second = Network(net, shared, student_at(net, 1))  # the second choice of every gene
    write_csv(args.out / f"04_widths{end}.csv", widths(args, net, shared, teacher, data))
    write(args.out / f"04_pictures{end}.png", pictures(args, second, data))
    sources = trained["made_from"] | {trained["file"]: trained["mark"]}
    save(checkpoint, settings, {**taught, "made_from": sources}, **predictor)  # figure 6's, too
    print(f"\non {len(predicted)} students that were not used in training; shares of 1:")
    wrote = checkpoint, args.out / f"04_*{end}.csv", args.out / f"04_pictures{end}.png"
    finish(args, report, wrote, following)


def measure(args, network, data):
    """Accuracy, a share of 1, natural and under PGD, on held-out training images and on their first
    half alone, of a student with batch-norm statistics of its own; and the seconds that it took."""
    begun = time.monotonic()
    network = calibrated(network, data["calibration"])
    images, labels = data["held_out"], data["held_out_labels"]
    right = judge(network, images, labels, *args.attack)
    row = {}
    for end, count in {"": len(images), "_half": len(images) // 2}.items():
        for name, part in zip(("natural", "robust"), right):
            row[name + end] = part[:count].sum().item() / count
    return {**row, "seconds": time.monotonic() - begun}


def distinct_students(net, args):
    """--students different ones, each gene drawn uniformly; exits if there are not so many."""
    rng, students = random.Random(args.seed), {}
    for _ in range(100 * args.students):
        students[sample(net, rng)] = None
        if len(students) == args.students:
            return list(students)
    fail(f"--students {args.students}: this network does not hold so many different ones")


# ---- The predictor -------------------------------------------------------------------------------
def train_predictor(args, net, students, labels):
    """Fit an MLP to labels (N, 2) of students by mean squared error: {layers, mean, scale}."""
    torch.manual_seed(args.seed)
    features = one_hot(net, students)
    mean, scale = labels.mean(0), labels.std(0).clamp(min=1e-4)  # both targets at one scale
    sizes = [features.shape[1], *HIDDEN, 2]
    layers = []  # (matrix, bias): plain tensors, which chapter 5 can read from a file
    for inp, out in zip(sizes, sizes[1:]):
        layers.append((torch.randn(inp, out) * (2 / inp) ** 0.5, torch.zeros(out)))
    layers[-1][0].zero_()  # before training it answers the mean
    weights = [weight.requires_grad_() for layer in layers for weight in layer]
    optimizer = torch.optim.Adam(weights, lr=1e-3)  # released code
    for _ in range(args.epochs):
        for pick in torch.randperm(len(students)).split(16):
            loss = F.mse_loss(mlp(layers, features[pick]), (labels[pick] - mean) / scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    layers = [(matrix.detach(), bias.detach()) for matrix, bias in layers]
    return {"layers": layers, "mean": mean, "scale": scale}


def one_hot(net, students):
    """Features (N, sum of choices): for each gene a 1 at its choice; none where it is off."""
    columns = [
        [float(student[i] == choice) for student in students]
        for i, choices in enumerate(net["genes"].values())
        for choice in choices
    ]
    return torch.tensor(columns).T


def mlp(layers, x):
    """A fully-connected network with ReLU: features x (N, sum of choices) -> (N, 2)."""
    for matrix, bias in layers[:-1]:
        x = F.relu(x @ matrix + bias)
    matrix, bias = layers[-1]
    return x @ matrix + bias


def predict_accuracy(predictor, net, students):
    """Predicted (natural, robust) accuracy of students, (N, 2), each a share of 1."""
    answers = mlp(predictor["layers"], one_hot(net, students))
    return answers * predictor["scale"] + predictor["mean"]


def compare(measured, first_half, predicted):
    """What the error means: a row for each target, from all labels (N, 2), those on the first half
    of the images, and the predictions of the last students (T, 2).

    tau: a search needs the order alone; Kendall's tau-b is the share of pairs in the right order
    less that of pairs in the wrong one, corrected for ties.
    moves by: how far two labels of a student would be apart, on two sets of n images: if a label's
    noise has the variance v, that is sqrt(2 v). A half's has 2 v, and a label is the mean of its
    two halves, so label - first half = (second half - first half) / 2 has (2 v + 2 v) / 4 = v, and
    times sqrt(2), 2 v. The standard deviation over students leaves out what moves all alike. Were
    the noise of each student its own, no predictor's RMSE could be below sqrt(v).
    """
    test = measured[-len(predicted) :]
    error = (predicted - test).square().mean(0).sqrt()
    real, guessed = ((part[:, None] - part).sign().flatten(0, 1) for part in (test, predicted))
    tau = F.cosine_similarity(real, guessed, dim=0)  # of (T * T, 2): -1, 0 or 1 for each pair
    moves = (measured - first_half) * 2**0.5
    columns = {
        "RMSE": error,
        "tau": tau,
        "mean": measured.mean(0),
        "sd of students": measured.std(0),
        "moves by": moves.std(0),
    }
    return [
        {"target": target, "paper's RMSE": paper}
        | {name: column[i].item() for name, column in columns.items()}
        for i, (target, paper) in enumerate(PAPER.items())
    ]


# ---- Figure 6, and pictures of an attack ---------------------------------------------------------
def widths(args, net, shared, teacher, data):
    """Figure 6: the teacher, and students that differ in width (kernel) alone, measured."""
    kind = "kernel" if "kernel" in net else "width"
    rows = [{"student": "teacher", **measure(args, teacher, data)}]
    for value in net[kind]:
        genes = dict(zip(net["genes"], student_at(net, -1)))
        genes |= {gene: value for gene in genes if gene.startswith(kind)}
        network = Network(net, shared, genes.values())
        rows.append({"student": value, **measure(args, network, data)})
    return rows


def pictures(args, network, data):
    """A PNG with a column for each of 8 held-out images that the student gets right: the image, the
    change x 16 around gray, and their sum; framed green where the student is right, else red. Fewer
    if it gets fewer right; if none, a wrong one."""
    from torchvision.utils import make_grid, save_image

    network = calibrated(network, data["calibration"])
    x, y = data["held_out"], data["held_out_labels"]
    right = judge(network, x, y, 0, 0, 0)[0]  # without an attack
    pick = right.nonzero()[:8, 0].tolist() or [0]
    x, y = x[pick] / 255, y[pick]
    x_adv = pgd(network, x, lambda z: F.cross_entropy(z, y), torch.zeros_like(x), *args.attack)
    change = 0.5 + 16 * (x_adv - x)
    # The change is framed as the image.
    right = (network(torch.cat([x, x, x_adv])).argmax(1) == y.repeat(3)).long().cpu()
    red_green = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.0]])
    frames = red_green[right, :, None, None].repeat(1, 1, 36, 36)
    frames[:, :, 2:-2, 2:-2] = torch.cat([x, change, x_adv]).clamp(0, 1).cpu()
    grid = make_grid(F.interpolate(frames, scale_factor=3), len(x))
    buffer = io.BytesIO()
    save_image(grid, buffer, format="png")
    return buffer.getvalue()


# ---- Attack, judging and going on, word for word as in chapter 2 ---------------------------------
def pgd(network, x, loss, noise, eps, step_size, steps):
    """Projected gradient ascent (Madry et al., 2018), the inner maximisation of equation 1: signed
    steps up loss(network(x')) from x + noise, within |x' - x| <= eps and 0 <= x' <= 1."""
    x_adv = (x + noise).clamp(0, 1)

    def step():
        start = x_adv.detach().requires_grad_()
        with torch.enable_grad():  # which judge() switches off
            (gradient,) = torch.autograd.grad(loss(network(start)), start)  # none of the weights'
        moved = x_adv + step_size * gradient.sign()
        x_adv.copy_((x + (moved - x).clamp(-eps, eps)).clamp(0, 1))

    for i in range(steps):
        step()
        if i == 0 and x.is_cuda:  # by now slices are taken and kernels chosen, as they must be
            step = as_graph(step, x.device)
    return x_adv


LAST = {}  # the last CUDA graph, and the stream on which all are recorded


def as_graph(step, device):
    """step() as a CUDA graph: its thousand kernels are recorded, without running, and launched as a
    whole from then on. One by one, Python launches them more slowly than a GPU runs them. Each
    attack is recorded anew, for its student and its tensors, into the memory of the last one."""
    stream = LAST.setdefault("stream", torch.cuda.Stream(device))  # the usual one records nothing
    graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=LAST["graph"].pool() if "graph" in LAST else None)
        step()
        graph.capture_end()
    usual.wait_stream(stream)
    LAST["graph"] = graph
    return graph.replay


@torch.no_grad()
def calibrated(network, images, batch=250):
    """The student as it is judged and exported: with batch-norm statistics of its own, from uint8
    images, augmented as in training. What reaches a layer depends on the student, so no statistics
    would suit all students."""
    for i, x in enumerate(images.split(batch)):
        network.momentum = len(x) / (i * batch + len(x))  # a plain average
        network(x / 255)
    return network.fold_norms()


@torch.no_grad()
def judge(network, images, labels, eps, step_size, steps, batch=100):
    """(natural, robust), bool (N,): which uint8 images are right, and which still are after PGD. It
    climbs the cross-entropy, as all papers report it: judging asks for a wrong class, training for
    any change of the answer. It starts at one place of the ball for all images: no answer depends
    on the batch. PGD of one step starts at the image, as FGSM, whose step is eps."""
    noise = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    noise = noise.to(images.device) * (eps if steps > 1 else 0)
    natural = torch.cat([network(x / 255).argmax(1) for x in images.split(batch)]) == labels
    robust = torch.zeros_like(natural)
    for pick in natural.nonzero()[:, 0].split(batch):
        if images.is_cuda:  # filled up: cuDNN meets one shape, and builds its kernels once
            pick = pick.repeat(batch)[:batch]
        x, y = images[pick] / 255, labels[pick]
        x_adv = pgd(network, x, lambda z: F.cross_entropy(z, y), noise, eps, step_size, steps)
        robust[pick] = network(x_adv).argmax(1) == y
    return natural, robust


def pick_device(args):
    """(the device, autocast to bf16 where a GPU has it, words for both); exits if it is none."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    # CUDA is initialized where the zeros above are on a GPU.
    bf16 = torch.cuda.is_initialized() and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what is said; bf16 is not touched
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    return device, precision, f"{device} in {'bf16' if bf16 else 'float32'}"


def moved(content, device, learn=False):
    """A copy with all tensors on the device, where they get gradients if they are to learn."""
    return {
        name: part.detach().to(device, copy=True).requires_grad_(learn)
        if torch.is_tensor(part)
        else part
        for name, part in content.items()
    }


def run_missing(args, *files):
    """Run each earlier chapter one of whose files is missing."""
    for name in files:
        script = CHAPTERS[int(name[:2]) - 1]
        if not (args.out / name).exists():
            print(f"{args.out / name} is missing: running {script}\n")
            flags = [f"--sampling={args.sampling}"] if script[:2] >= "03" else []
            run_other(args, script, *flags)


def run_other(args, script, *flags):
    """Run another chapter; exits if it fails. If this one is stopped, that one is, too."""
    command = [sys.executable, Path(__file__).resolve().with_name(script), *args.given, *flags]
    code = subprocess.run(command).returncode
    if code < 0:
        fail(f"{script} was killed by signal {-code}: is there too little memory?")
    if code:
        raise SystemExit(2)  # it has said why


def counted(name, items, rounds=1):
    """The items, with a line every ten seconds: how far it is, and the minutes left for so many
    rounds, as epochs are."""
    begun = said = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - said > 10:
            said = time.monotonic()
            left = (said - begun) / i * (rounds * len(items) - i) / 60
            print(f"  {name} {i}/{len(items)}, {left:.1f} minutes left")
        yield item


# ---- The network, word for word as in chapter 1 --------------------------------------------------
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


def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


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
